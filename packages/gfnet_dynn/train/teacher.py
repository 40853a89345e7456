"""A network trained by others as the teacher: floor and probe, start, stored answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gfnet_dynn.model_files import check_fits, load_model
from gfnet_dynn.models.named import NamedNetwork
from gfnet_dynn.models.staged import StagedNetwork
from gfnet_dynn.run import Run
from gfnet_dynn.scene_views import turn_images
from shared_core.for_torch.distributed import main_works
from shared_core.for_torch.features import feature_function
from shared_core.for_torch.networks import Network, find_network, head_names
from shared_core.for_torch.precision import Precision
from shared_core.for_torch.pretrained import start_network
from shared_core.knowledge.store import KnowledgeStore
from shared_core.metrics.probe import LinearProbe, fit_probe
from shared_core.metrics.trained_floor import image_features, trained_floor
from shared_core.runs import progress
from shared_core.weights.catalogue import CATALOGUE
from shared_core.weights.finding import TRAINED, how_to_get, installed_file

FLOOR_NETWORK = CATALOGUE[0]
FLOOR_SIDE = 224  # pixels, at most
FLOOR_IMAGES = 50_000  # training images, at most
PROBE_FILE = "trained-features.npz"
DROP_PATH = 0.1
FRESH_RATE = 6.0  # the same of heads that nothing has fitted
HEAD_RATE = 0.6  # times the body's learning rate: the head has been fitted already


def measure_trained_floor(run: Run) -> dict[str, Any] | None:
    """What a linear classifier on a trained network's features reaches; its weights are kept.

    Returns:
        Plain JSON, or None: no weights are installed, or too many images.
    """
    data, classes = run.data, len(run.data.classes)
    if len(data.image_set("train")) > FLOOR_IMAGES:
        return None
    if installed_file(FLOOR_NETWORK) is None:
        run.log.say(f"no floor of trained features: get the network by {how_to_get(FLOOR_NETWORK)}")
        return None
    network = start_network(FLOOR_NETWORK.name, init=TRAINED, num_classes=classes)
    found, probe = trained_floor(
        feature_function(network, num_classes=classes, device=run.device),
        [data.image_set(name) for name in ("train", "calibration", "test")],
        num_classes=classes,
        network=FLOOR_NETWORK.name,
        input_size=min(FLOOR_SIDE, data.input_size),
        threads=run.settings.source.num_workers,
    )
    np.savez(run.folder / PROBE_FILE, **vars(probe))
    return found.facts()


def start_teacher(run: Run) -> NamedNetwork:
    """The network of ``--teacher`` with trained weights and a head that a probe has fitted.

    A linear classifier on stored features is where fine-tuning starts, so it can end below by its
    own fault only.
    """
    names, data = run.settings.networks, run.data
    assert names.teacher_network is not None
    found, size = find_network(names.teacher_network), (data.input_size, data.input_size)
    wanted = {"init": names.pretrained or TRAINED, "num_classes": len(data.classes)}
    rate = DROP_PATH
    try:
        started = start_network(found, **wanted, image_size=size, drop_path_rate=rate)
    except ValueError:  # a network that has no place for it, if no worse
        rate = 0.0
        started = start_network(found, **wanted, image_size=size)
    for note in started.notes:
        run.log.say(f"teacher: {note}")
    if not (run.folder / "state" / "backbone.pth").exists():  # else a state goes on from there
        probe = _stored_probe(run, found.name) or _fit_probe(run, started)
        _into_head(started, probe, len(data.classes))
    kind = StagedNetwork if found.library == "core" else NamedNetwork
    return kind(
        network=f"{found.library}/{found.name}",
        num_classes=len(data.classes),
        img_size=size,
        drop_path_rate=rate,
        started=started,
    ).to(run.device)


def _stored_probe(run: Run, name: str) -> LinearProbe | None:
    """That of the floor, where it is of this network with its own weights and at this size."""
    file = run.folder / PROBE_FILE
    same = name == FLOOR_NETWORK.name and run.data.input_size <= FLOOR_SIDE
    if not same or run.settings.networks.pretrained is not None or not file.exists():
        return None
    with np.load(file) as stored:
        return LinearProbe(stored["weight"], stored["bias"], float(stored["strength"]))


def _fit_probe(run: Run, started: Network) -> LinearProbe:
    data, classes = run.data, len(run.data.classes)
    ask = feature_function(started, num_classes=classes, device=run.device)
    parts = [data.image_set(name) for name in ("train", "calibration")]
    side, threads = data.input_size, run.settings.source.num_workers
    train, held = (image_features(ask, p, input_size=side, threads=threads) for p in parts)
    return fit_probe(
        train, parts[0].labels, num_classes=classes, validation=(held, parts[1].labels)
    )


@torch.no_grad()
def _into_head(started: Network, probe: LinearProbe, classes: int) -> None:
    head = started.model.get_submodule(head_names(started.model, classes)[0])
    head.weight.copy_(torch.from_numpy(probe.weight).reshape(head.weight.shape))
    if head.bias is not None:
        head.bias.copy_(torch.from_numpy(probe.bias))


def stored_answers(run: Run) -> np.ndarray:
    """The teacher's logits of every training image in every turn, float32 ``(N, turns, K)``.

    They are computed once and lie in the run's ``knowledge/``; what a killed try left is used.

    Raises:
        ValueError: a teacher of other classes or another size.
        KnowledgeError: answers of another teacher lie there.
    """
    path, loaders = run.file("backbone"), run.loaders()
    teacher, facts = load_model(path)
    check_fits(path, teacher, facts, run.data)
    batches, turns = loaders.held("train"), loaders.turns
    about = {
        "teacher_hash": facts["sha256"],
        "classes": run.data.classes,
        "view": {**batches.loader.view.settings(), "turns": list(turns)},
    }
    folder, keys = run.folder / "knowledge", run.data.image_set("train").keys

    def ask() -> None:
        store = KnowledgeStore.create(folder, **about, num_samples=len(keys))
        if not any(store.missing(keys, turn) for turn in turns):
            return
        net, precision = teacher.to(run.device).eval(), Precision(run.device, run.precision)
        for batch in progress(batches, total=len(batches), label="the teacher's answers"):
            names = [keys[row] for row in batch.indices.tolist()]
            for turn in turns:
                seen = turn_images(batch.images, torch.full((len(names),), turn))
                with torch.no_grad(), precision.autocast():
                    store.put(names, turn, net(seen).float().cpu().numpy())

    main_works(ask, run.world)
    store = KnowledgeStore.open(folder, **about)
    return np.stack([store.get(keys, turn) for turn in turns], axis=1)
