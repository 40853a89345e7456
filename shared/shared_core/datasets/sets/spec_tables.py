"""The facts of the datasets that the five projects are reported on, each with its source."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from shared_core.datasets.sets.spec_type import DatasetSpec


def _equal(names: tuple[str, ...], count: int) -> MappingProxyType[str, int]:
    return MappingProxyType(dict.fromkeys(names, count))


def _sources(facts: dict[str, Any], source: str, **others: str) -> dict[str, str]:
    """The same source for all ``facts`` but those that ``others`` names."""
    return {fact: others.get(fact, source) for fact in facts}


_AID_COUNTS = MappingProxyType(
    {
        "Airport": 360,
        "BareLand": 310,
        "BaseballField": 220,
        "Beach": 400,
        "Bridge": 360,
        "Center": 260,
        "Church": 240,
        "Commercial": 350,
        "DenseResidential": 410,
        "Desert": 300,
        "Farmland": 370,
        "Forest": 250,
        "Industrial": 390,
        "Meadow": 280,
        "MediumResidential": 290,
        "Mountain": 340,
        "Park": 350,
        "Parking": 390,
        "Playground": 370,
        "Pond": 420,
        "Port": 380,
        "RailwayStation": 260,
        "Resort": 290,
        "River": 410,
        "School": 300,
        "SparseResidential": 300,
        "Square": 330,
        "Stadium": 290,
        "StorageTanks": 360,
        "Viaduct": 420,
    }
)

_NWPU_NAMES = tuple(
    """airplane airport baseball_diamond basketball_court beach bridge chaparral church
    circular_farmland cloud commercial_area dense_residential desert forest freeway golf_course
    ground_track_field harbor industrial_area intersection island lake meadow medium_residential
    mobile_home_park mountain overpass palace parking_lot railway railway_station
    rectangular_farmland river roundabout runway sea_ice ship snowberg sparse_residential stadium
    storage_tank tennis_court terrace thermal_power_station wetland""".split()
)

_PATTERNNET_NAMES = tuple(
    """airplane baseball_field basketball_court beach bridge cemetery chaparral
    christmas_tree_farm closed_road coastal_mansion crosswalk dense_residential ferry_terminal
    football_field forest freeway golf_course harbor intersection mobile_home_park nursing_home
    oil_gas_field oil_well overpass parking_lot parking_space railway river runway runway_marking
    shipping_yard solar_panel sparse_residential storage_tank swimming_pool tennis_court
    transformer_station wastewater_treatment_plant""".split()
)

_UCM_NAMES = tuple(
    """agricultural airplane baseballdiamond beach buildings chaparral denseresidential forest
    freeway golfcourse harbor intersection mediumresidential mobilehomepark overpass parkinglot
    river runway sparseresidential storagetanks tenniscourt""".split()
)

_CIFAR10_NAMES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())

_CLOTHING_NAMES = tuple(
    "dress hat longsleeve outwear pants shirt shoes shorts skirt t-shirt".split()
)
_GARBAGE_NAMES = ("Harmful", "Kitchen", "Other", "Recyclable")

_TRASHNET_COUNTS = MappingProxyType(
    {"cardboard": 403, "glass": 501, "metal": 410, "paper": 594, "plastic": 482, "trash": 137}
)


def _spec(
    name: str, source: str, facts: dict[str, Any], *, exceptions: dict[str, str] | None = None
) -> DatasetSpec:
    checked = {
        key: facts[key]
        for key in (
            "num_classes",
            "num_images",
            "image_size",
            "class_names",
            "images_per_class",
            "split_images",
        )
        if facts.get(key) is not None
    }
    return DatasetSpec(
        name, **facts, sources=MappingProxyType(_sources(checked, source, **(exceptions or {})))
    )


SPECS: tuple[DatasetSpec, ...] = (
    _spec(
        "AID",
        "Xia et al. 2017, arXiv:1608.05167, section on the construction of AID",
        {
            "num_classes": 30,
            "num_images": 10_000,
            "image_size": 600,
            "class_names": tuple(_AID_COUNTS),
            "images_per_class": _AID_COUNTS,
            "licence": "none stated; pictures from Google Earth, for research",
            "homepage": "http://www.captain-whu.com/project/AID/",
            "aliases": ("AID128", "AID-new", "AID_dataset"),
            "layout": "AID/<class>/*.jpg",
        },
    ),
    _spec(
        "NaSC-TG2",
        "Zhou et al. 2021, doi:10.1109/JSTARS.2021.3063096",
        {
            "num_classes": 10,
            "num_images": 20_000,
            "image_size": 128,
            # Class folder names and their spelling are not certain: counts are checked, names not.
            "class_names": None,
            "licence": "none stated; for research",
            "homepage": "https://doi.org/10.1109/JSTARS.2021.3063096",
            "aliases": ("NaSC", "NaSC_TG2", "NaSC-TG2-RGB"),
            "layout": "NaSC-TG2/<class>/*.jpg",
        },
    ),
    _spec(
        "NWPU-RESISC45",
        "Cheng et al. 2017, arXiv:1703.00121",
        {
            "num_classes": 45,
            "num_images": 31_500,
            "image_size": 256,
            "class_names": _NWPU_NAMES,
            "images_per_class": _equal(_NWPU_NAMES, 700),
            "licence": "none stated; pictures from Google Earth, for research",
            "homepage": "https://huggingface.co/datasets/torchgeo/resisc45",
            "aliases": ("NWPU", "RESISC45", "RESISC", "NWPU45"),
            "layout": "NWPU-RESISC45/<class>/*.jpg",
        },
    ),
    _spec(
        "PatternNet",
        "Zhou et al. 2018, arXiv:1706.03424",
        {
            "num_classes": 38,
            "num_images": 30_400,
            "image_size": 256,
            "class_names": _PATTERNNET_NAMES,
            "images_per_class": _equal(_PATTERNNET_NAMES, 800),
            "licence": "CC BY 4.0 as stated by the copy at huggingface.co/datasets/torchgeo",
            "homepage": "https://huggingface.co/datasets/torchgeo/PatternNet",
            "aliases": ("PatternNet-new",),
            "layout": "PatternNet/<class>/*.jpg",
        },
        exceptions={
            "class_names": "https://huggingface.co/datasets/jonathan-roberts1/PatternNet (card)"
        },
    ),
    _spec(
        "UCM",
        "Yang and Newsam 2010, doi:10.1145/1869790.1869829",
        {
            "num_classes": 21,
            "num_images": 2_100,
            # 256 pixels but for a few images that lack some rows or columns.
            "image_size": 256,
            "class_names": _UCM_NAMES,
            "images_per_class": _equal(_UCM_NAMES, 100),
            "licence": "public domain (USGS National Map)",
            "homepage": "http://weegee.vision.ucmerced.edu/datasets/landuse.html",
            "aliases": ("UCMerced_LandUse", "UCMerced", "UC Merced"),
            "layout": "UCM/<class>/*.tif",
        },
    ),
    _spec(
        "CIFAR-10",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        {
            "num_classes": 10,
            "num_images": 60_000,
            "image_size": 32,
            "class_names": _CIFAR10_NAMES,
            "images_per_class": _equal(_CIFAR10_NAMES, 6_000),
            "split_images": MappingProxyType({"train": 50_000, "test": 10_000}),
            "licence": "none stated; cite Krizhevsky 2009",
            "homepage": "https://www.cs.toronto.edu/~kriz/cifar.html",
            "aliases": ("CIFAR10", "cifar_10"),
            "layout": "CIFAR10/{train,test}/<class>/*.jpg or *.png",
        },
    ),
    _spec(
        "ImageNet-1k",
        "Russakovsky et al. 2015, arXiv:1409.0575, table 2",
        {
            "num_classes": 1_000,
            "num_images": 1_331_167,
            "image_size": None,
            # The folders are named by WordNet ids (n01440764 ...); their number is checked.
            "class_names": None,
            "split_images": MappingProxyType({"train": 1_281_167, "val": 50_000}),
            "licence": "non-commercial research and education, by agreement on the home page",
            "homepage": "https://www.image-net.org/challenges/LSVRC/2012/",
            "aliases": ("ImageNet", "ImageNet1k", "ILSVRC2012", "ILSVRC"),
            "layout": "ImageNet-1k/{train,val}/<wordnet id>/*.JPEG",
        },
    ),
    _spec(
        "garbage-4",
        "https://aistudio.baidu.com/datasetdetail/101031",
        {
            "num_classes": 4,
            "num_images": 64_000,
            "image_size": None,
            "class_names": _GARBAGE_NAMES,
            "images_per_class": _equal(_GARBAGE_NAMES, 16_000),
            "licence": "none stated",
            "homepage": "https://aistudio.baidu.com/datasetdetail/101031",
            "aliases": ("data101031", "garbage4", "garbage"),
            "layout": "data101031/{Harmful,Kitchen,Other,Recyclable}/*.jpg",
        },
    ),
    _spec(
        "TrashNet",
        "https://github.com/garythung/trashnet (README)",
        {
            "num_classes": 6,
            "num_images": 2_527,
            "image_size": None,  # 512 x 384 pixels in the resized edition, not square
            "class_names": tuple(_TRASHNET_COUNTS),
            "images_per_class": _TRASHNET_COUNTS,
            "licence": "MIT",
            "homepage": "https://github.com/garythung/trashnet",
            "aliases": ("trashnet150", "dataset-resized", "trashnet-resized"),
            "layout": "TrashNet/<class>/*.jpg",
        },
    ),
    # Other photographs under the same four class names: no edition of garbage-4.
    _spec(
        "garbage4_255",
        "its folder; who took the photographs is not stated",
        {
            "num_classes": 4,
            "num_images": None,
            "image_size": None,
            "class_names": _GARBAGE_NAMES,
            "licence": "none stated",
            "homepage": "",
            "aliases": (),
            "layout": "garbage4_255/{Harmful,Kitchen,Other,Recyclable}/*.jpg",
        },
    ),
    _spec(
        "clothing-10",
        "https://github.com/alexeygrigorev/clothing-dataset-small (README)",
        {
            "num_classes": 10,
            "num_images": None,
            "image_size": None,
            "class_names": _CLOTHING_NAMES,
            "licence": "CC0",
            "homepage": "https://github.com/alexeygrigorev/clothing-dataset-small",
            "aliases": ("clothing10_256", "clothing10", "clothing-dataset-small"),
            "layout": "clothing-10/{train,validation,test}/<class>/*.jpg",
        },
    ),
    _spec(
        "Omniglot",
        "https://github.com/brendenlake/omniglot (README)",
        {
            "num_classes": 50,  # alphabets, of 1,623 characters in all
            "num_images": 32_460,
            "image_size": 105,
            "class_names": None,
            "licence": "MIT",
            "homepage": "https://github.com/brendenlake/omniglot",
            "aliases": ("omniglot_small", "omniglot-py"),
            "layout": "Omniglot/<alphabet>/<character>/*.png",
        },
    ),
)
