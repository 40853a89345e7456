"""The facts of the datasets: a hand table, their consistency, and the lookup by name."""

import re

import pytest

from shared_core.datasets.errors import DatasetError
from shared_core.datasets.sets import specs

# name: classes, images, pixels, images of some classes
HAND_TABLE = {
    "AID": (30, 10_000, 600, {"Airport": 360, "BaseballField": 220, "Viaduct": 420}),
    "NaSC-TG2": (10, 20_000, 128, {}),
    "NWPU-RESISC45": (45, 31_500, 256, {"airplane": 700, "wetland": 700}),
    "PatternNet": (38, 30_400, 256, {"wastewater_treatment_plant": 800}),
    "UCM": (21, 2_100, 256, {"tenniscourt": 100}),
    "CIFAR-10": (10, 60_000, 32, {"truck": 6_000}),
    "ImageNet-1k": (1_000, 1_331_167, None, {}),
    "garbage-4": (4, 64_000, None, {"Harmful": 16_000}),
    "TrashNet": (6, 2_527, None, {"glass": 501, "trash": 137}),
    "clothing-10": (10, None, None, {}),
    "Omniglot": (50, 32_460, 105, {}),
}


def test_every_named_set_is_there_and_no_other():
    assert set(HAND_TABLE) <= set(specs.names())


@pytest.mark.parametrize("name", HAND_TABLE)
def test_facts_equal_the_hand_table(name):
    classes, images, pixels, some = HAND_TABLE[name]
    spec = specs.get(name)
    assert (spec.num_classes, spec.num_images, spec.image_size) == (classes, images, pixels)
    assert {c: (spec.images_per_class or {}).get(c) for c in some} == some
    assert spec.homepage.startswith("http")
    assert spec.licence
    assert all(source for source in spec.sources.values())


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("aid", "AID"),
        ("AID128", "AID"),
        ("AID-new", "AID"),
        ("NaSC", "NaSC-TG2"),
        ("nasc_tg2", "NaSC-TG2"),
        ("NWPU", "NWPU-RESISC45"),
        ("resisc45", "NWPU-RESISC45"),
        ("UCMerced_LandUse", "UCM"),
        ("uc merced", "UCM"),
        ("CIFAR10", "CIFAR-10"),
        ("cifar_10", "CIFAR-10"),
        ("ilsvrc2012", "ImageNet-1k"),
        ("data101031", "garbage-4"),
        ("trashnet", "TrashNet"),
        ("garbage4_255", "garbage4_255"),
        ("clothing10_256", "clothing-10"),
        ("omniglot_small", "Omniglot"),
    ],
)
def test_get_knows_any_spelling(spelling, name):
    assert specs.get(spelling).name == name


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(DatasetError, match=r"unknown dataset 'adi'; known: AID, NaSC-TG2"):
        specs.get("adi")


def test_names_that_are_not_certain_are_not_checked():
    assert specs.get("NaSC").class_names is None
    assert specs.get("ImageNet").class_names is None


def test_register_adds_and_refuses_taken_names(monkeypatch):
    monkeypatch.setattr(specs, "_known", list(specs._known))
    mine = specs.DatasetSpec(
        "mine", 2, None, None, sources={"num_classes": "counted"}, aliases=("my-own",)
    )
    assert specs.register(mine) is specs.get("My Own")
    assert specs.names()[-1] == "mine"
    with pytest.raises(DatasetError, match="'aid' of 'other' is taken by 'AID'"):
        specs.register(
            specs.DatasetSpec(
                "other", 2, None, None, sources={"num_classes": "x"}, aliases=("a-id",)
            )
        )
    with pytest.raises(DatasetError, match="without a letter"):
        specs.register(specs.DatasetSpec("--", 2, None, None, sources={"num_classes": "x"}))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0"),
        ({"class_names": ("a", "b", "b")}, "2 different class names, expected num_classes = 3"),
        (
            {"class_names": ("a", "b", "c"), "images_per_class": {"a": 1, "b": 2, "d": 3}},
            "images_per_class and class_names differ",
        ),
        (
            {"class_names": ("a", "b", "c"), "images_per_class": {"a": 1, "b": 2, "c": 4}},
            "sums to 7, expected num_images = 6",
        ),
        ({"split_images": {"train": 5}}, "split_images sums to 5"),
        ({"sources": {"num_classes": "x"}}, "no source for num_images"),
    ],
)
def test_contradictions_are_refused(facts, message):
    base = {"num_classes": 3, "num_images": 6, "image_size": None}
    sources = dict.fromkeys(
        ("num_classes", "num_images", "class_names", "images_per_class", "split_images"), "here"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        specs.DatasetSpec("x", **{**base, "sources": sources, **facts})


def test_how_to_get_is_one_line_with_page_and_layout():
    line = specs.get("UCM").how_to_get()
    assert "\n" not in line and "ucmerced.edu" in line and "UCM/<class>/*.tif" in line
