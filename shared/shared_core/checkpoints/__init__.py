"""What a checkpoint holds, how it is written whole and read safely, and under whose names."""

from shared_core.checkpoints import names, neutral, pickle_arrays
from shared_core.checkpoints.atomic import atomic_write
from shared_core.checkpoints.digest import Array, check_sha256, digest, weights_sha256
from shared_core.checkpoints.errors import CheckpointError
from shared_core.checkpoints.facts import (
    SCHEMA,
    check_facts,
    facts_from_json,
    facts_to_json,
    make_facts,
)
from shared_core.checkpoints.fit import check_fit, plain_names
from shared_core.checkpoints.source import readable_file

__all__ = [
    "SCHEMA",
    "Array",
    "CheckpointError",
    "atomic_write",
    "check_facts",
    "check_fit",
    "check_sha256",
    "digest",
    "facts_from_json",
    "facts_to_json",
    "make_facts",
    "names",
    "neutral",
    "pickle_arrays",
    "plain_names",
    "readable_file",
    "weights_sha256",
]
