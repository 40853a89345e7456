"""Image data: facts, folders, splits, decoding, views and loaders, without a framework."""

from shared_core.datasets.builtin.sources import (
    digits,
    make_digits,
    make_scenes,
    render_scene,
    scene_class_names,
    scene_difficulty,
)
from shared_core.datasets.errors import DatasetError, DatasetNotFoundError, DecodeError
from shared_core.datasets.finding.fingerprint import content_key
from shared_core.datasets.finding.quarantine import read_quarantine, write_quarantine
from shared_core.datasets.finding.scan import Listing, Sample, find, require, scan
from shared_core.datasets.reading.cache import DecodedCache
from shared_core.datasets.reading.decode import decode
from shared_core.datasets.reading.image_set import ImageSet
from shared_core.datasets.reading.loader import Batch, BatchLoader
from shared_core.datasets.reading.order import EpochOrder
from shared_core.datasets.sets.specs import DatasetSpec, get, names, register
from shared_core.datasets.splitting.manifest import Manifest
from shared_core.datasets.splitting.prepared import PreparedData, prepare_data
from shared_core.datasets.splitting.split import from_layout, make_kfold, make_split
from shared_core.datasets.views.augment import (
    EvalView,
    SmallView,
    TrainView,
    augment_small_batch,
    view_rng,
)
from shared_core.datasets.views.geometry import letterbox, resize

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
