"""Image data: facts, folders, splits, decoding, views and loaders, without a framework."""

from shared_core.datasets.augment import (
    EvalView,
    SmallView,
    TrainView,
    augment_small_batch,
    view_rng,
)
from shared_core.datasets.builtin import (
    digits,
    make_digits,
    make_scenes,
    render_scene,
    scene_class_names,
    scene_difficulty,
)
from shared_core.datasets.cache import DecodedCache
from shared_core.datasets.decode import decode
from shared_core.datasets.errors import DatasetError, DatasetNotFoundError, DecodeError
from shared_core.datasets.fingerprint import content_key
from shared_core.datasets.geometry import letterbox, resize
from shared_core.datasets.image_set import ImageSet
from shared_core.datasets.loader import Batch, BatchLoader
from shared_core.datasets.manifest import Manifest
from shared_core.datasets.order import EpochOrder
from shared_core.datasets.prepared import PreparedData, prepare_data
from shared_core.datasets.quarantine import read_quarantine, write_quarantine
from shared_core.datasets.scan import Listing, Sample, find, require, scan
from shared_core.datasets.specs import DatasetSpec, get, names, register
from shared_core.datasets.split import from_layout, make_kfold, make_split

__all__ = [
    "Batch",
    "BatchLoader",
    "DatasetError",
    "DatasetNotFoundError",
    "DatasetSpec",
    "DecodeError",
    "DecodedCache",
    "EpochOrder",
    "EvalView",
    "ImageSet",
    "Listing",
    "Manifest",
    "PreparedData",
    "Sample",
    "SmallView",
    "TrainView",
    "augment_small_batch",
    "content_key",
    "decode",
    "digits",
    "find",
    "from_layout",
    "get",
    "letterbox",
    "make_digits",
    "make_kfold",
    "make_scenes",
    "make_split",
    "names",
    "prepare_data",
    "read_quarantine",
    "register",
    "render_scene",
    "require",
    "resize",
    "scan",
    "scene_class_names",
    "scene_difficulty",
    "view_rng",
    "write_quarantine",
]
