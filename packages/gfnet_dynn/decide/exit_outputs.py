"""What all exits say about a split, collected once; every evaluation is computed from that."""

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gfnet_dynn.models.exit_policy import ExitPolicy
from gfnet_dynn.models.gates import uncertainty
from shared_core import metrics
from shared_core.checkpoints import atomic_write
from shared_core.for_torch.precision import Precision


def take_exit(values: NDArray, exit_index: NDArray) -> NDArray:
    """The rows ``(N, ...)`` of ``values (G+1, N, ...)`` at each sample's exit."""
    return values[exit_index, np.arange(values.shape[1])]


@dataclass(frozen=True)
class ExitLogits:
    """A full pass over one split, as arrays; the input of sweeps, sets, risk and placement."""

    logits: NDArray  # float32 (G+1, N, K), final head last
    gate_logits: NDArray  # float32 (N, G)
    labels: NDArray  # int64 (N,)
    costs: NDArray  # float64 (G+1,), cumulative MACs of an image
    exits: tuple[int, ...]  # block index of each of the G exits
    split: str = ""  # calibration, test ...
    split_hash: str = ""  # of the manifest

    def __post_init__(self):
        g, n = len(self.exits), len(self.labels)
        if self.logits.ndim != 3 or self.logits.shape[:2] != (g + 1, n) or n < 1:
            raise ValueError(f"logits have shape {self.logits.shape}; expected ({g + 1}, {n}, K)")
        if self.gate_logits.shape != (n, g) or self.costs.shape != (g + 1,):
            raise ValueError(
                f"gate logits have shape {self.gate_logits.shape} and costs {self.costs.shape}; "
                f"expected ({n}, {g}) and ({g + 1},)"
            )
        if not np.isfinite(self.logits).all():
            raise ValueError(f"logits of split {self.split!r} hold nan or inf; expected numbers")

    @property
    def num_gates(self) -> int:
        return len(self.exits)

    @property
    def num_classes(self) -> int:
        return self.logits.shape[2]

    @cached_property
    def predictions(self) -> NDArray:
        """int64 ``(G+1, N)``."""
        return self.logits.argmax(axis=2)

    @cached_property
    def correct(self) -> NDArray:
        """bool ``(G+1, N)``."""
        return self.predictions == self.labels

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of logits and labels: equal only for the same outputs on the same samples."""
        digest = hashlib.sha256(np.ascontiguousarray(self.logits).tobytes())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        return digest.hexdigest()

    def scores(self, policy: ExitPolicy) -> NDArray:
        """The policy's scores ``(N, G)``; they do not depend on its thresholds."""
        return policy.scores(self.logits, self.gate_logits).numpy()

    def select(self, policy: ExitPolicy) -> NDArray:
        """Where each sample leaves under ``policy``, int64 ``(N,)`` in ``0..G``."""
        return policy.select(self.logits, self.gate_logits)

    def probabilities(self, policy: ExitPolicy | None = None) -> NDArray:
        """float64 ``(G+1, N, K)``, with the policy's temperatures; 1 without a policy."""
        return np.stack(
            [
                metrics.softmax(z, temperature=policy.temperature(index) if policy else 1.0)
                for index, z in enumerate(self.logits)
            ]
        )

    def keep(self, exits: Sequence[int], *, costs: NDArray) -> "ExitLogits":
        """The same split with only the exits of these numbers ``0..G-1`` (and the final head)."""
        kept = list(exits)
        return ExitLogits(
            self.logits[[*kept, self.num_gates]],
            self.gate_logits[:, kept],
            self.labels,
            np.asarray(costs, dtype=np.float64),
            tuple(self.exits[i] for i in kept),
            self.split,
            self.split_hash,
        )

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` file, whole or not at all."""
        arrays = {
            "logits": self.logits,
            "gate_logits": self.gate_logits,
            "labels": self.labels,
            "costs": self.costs,
            "exits": np.asarray(self.exits, dtype=np.int64),
            "split": np.asarray(self.split),
            "split_hash": np.asarray(self.split_hash),
        }

        def write(scratch: Path) -> None:
            with scratch.open("wb") as file:
                np.savez(file, **arrays)

        atomic_write(path, write)

    @classmethod
    def load(cls, path: str | Path) -> "ExitLogits":
        """Read what :meth:`save` wrote; nothing in the file is executed."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no exit outputs at {path}; expected an .npz file")
        try:
            with np.load(path, allow_pickle=False) as file:
                values = {name: file[name] for name in file.files}
            exits = tuple(int(block) for block in values.pop("exits"))
            texts = {name: str(values.pop(name)) for name in ("split", "split_hash")}
            return cls(exits=exits, **values, **texts)
        except Exception as error:  # numpy and zip each raise their own for a broken file
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is no file of exit outputs: {reason}") from error


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    split: str = "",
    split_hash: str = "",
    max_batches: int | None = None,
    precision: Precision | None = None,
) -> ExitLogits:
    """A full pass of a GFNetDynn over a split, in eval mode; the mode is put back after.

    Args:
        model: with ``exits`` and ``exit_costs()``.
        batches: ``(images (N, 3, H, W) on the model's device, labels (N,))``.
        max_batches: stop after so many.
        precision: fp32 if None.
    """
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    logits, gates, labels = [], [], []
    try:
        for images, targets in islice(batches, max_batches):
            with nullcontext() if precision is None else precision.autocast():
                outputs = model(images)
            logits.append(torch.stack([z.float() for z in outputs.logits]).cpu())
            gates.append(outputs.gate_logits.float().cpu())
            labels.append(torch.as_tensor(targets).cpu())
    finally:
        for module, training in was_training.items():
            module.training = training
    if not labels:
        raise ValueError(f"split {split!r} has no batches; expected one or more")
    return ExitLogits(
        torch.cat(logits, dim=1).numpy(),
        torch.cat(gates).numpy(),
        torch.cat(labels).long().numpy(),
        np.asarray(model.exit_costs(), dtype=np.float64),
        tuple(model.exits),
        split,
        split_hash,
    )


def summarise(outputs: ExitLogits, policy: ExitPolicy) -> dict:
    """What a policy does on a split, as plain JSON.

    Returns:
        ``accuracy``, ``ece`` and ``nll`` of the gated prediction, ``final_accuracy``, ``cost``
        (mean MACs an image), ``cost_fraction`` (of a run to the final head), ``num_samples``, and
        ``exits``: for each exit its ``block`` (None for the final head), ``rate``, ``accuracy`` of
        those who leave there (None if nobody does), ``accuracy_all`` and ``ece`` over all samples,
        ``cost`` in MACs. All rates and accuracies are fractions.
    """
    exit_index = outputs.select(policy)
    probabilities = outputs.probabilities(policy)
    gated = take_exit(probabilities, exit_index)
    right = take_exit(outputs.correct, exit_index)
    rates = exit_rates(exit_index, outputs.num_gates)
    mean_cost = float(rates @ outputs.costs)
    rows = []
    for index, block in enumerate((*outputs.exits, None)):
        here = exit_index == index
        rows.append(
            {
                "block": block,
                "rate": float(rates[index]),
                "accuracy": float(right[here].mean()) if here.any() else None,
                "accuracy_all": float(outputs.correct[index].mean()),
                "ece": metrics.ece(probabilities[index], outputs.labels, scheme="mass"),
                "cost": float(outputs.costs[index]),
            }
        )
    with np.errstate(divide="ignore"):
        own = np.log(gated[np.arange(len(gated)), outputs.labels])
    return {
        "accuracy": float(right.mean()),
        "ece": metrics.ece(gated, outputs.labels, scheme="mass"),
        "nll": float(-np.maximum(own, -700.0).mean()),  # exp(-700): about the least float64
        "final_accuracy": float(outputs.correct[-1].mean()),
        "cost": mean_cost,
        "cost_fraction": mean_cost / float(outputs.costs[-1]),
        "num_samples": len(outputs.labels),
        "exits": rows,
    }


def exit_rates(exit_index: NDArray, num_gates: int) -> NDArray:
    """Fraction of the samples that leave at each exit, float64 ``(G+1,)``, sums to 1."""
    return np.bincount(exit_index, minlength=num_gates + 1) / len(exit_index)


def exit_rates_per_class(
    exit_index: NDArray, labels: NDArray, *, num_classes: int, num_gates: int
) -> NDArray:
    """Exit rates of each class, float64 ``(K, G+1)``; NaN rows for classes without samples."""
    cells = np.bincount(
        labels * (num_gates + 1) + exit_index, minlength=num_classes * (num_gates + 1)
    )
    table = cells.reshape(num_classes, num_gates + 1)
    with np.errstate(invalid="ignore"):
        return table / table.sum(axis=1, keepdims=True)


def exit_metrics(outputs: ExitLogits, policy: ExitPolicy) -> dict[str, float]:
    """The metrics of the original by their names, on their true scale; no prefix.

    With ``l`` the block index of an exit: ``acc{l}``, ``ens_acc{l}`` (mean softmax of the exits up
    to l), ``ece{l}``, ``p_max{l}``, ``entropy{l}`` (nats), ``margins{l}``, ``percent_exit{l}``
    (a fraction), ``gated_acc_{l}`` (of those who leave at l; left out when nobody does); the same
    of the final head under ``acc_final``, ``ens_acc_final``, ``final_ece``, ``final_p_max``,
    ``final_entropy``, ``final_margins``, ``percent_exitfinal``, ``gated_acc_final``; and
    ``gated_acc``, ``gated_ece``, ``total_cost`` (mean MACs an image), ``cost_fraction``.

    ECE has 15 bins of equal mass, as in the original, over the whole split.
    """
    summary = summarise(outputs, policy)
    features = uncertainty(torch.from_numpy(outputs.logits)).double().mean(dim=1).numpy()
    mean_softmax = outputs.probabilities().cumsum(axis=0)  # of exits 0..l, times l+1
    result = {}
    for index, row in enumerate(summary["exits"]):
        final = row["block"] is None
        tail = "_final" if final else row["block"]
        head = "final_" if final else ""
        block = "" if final else row["block"]
        result[f"acc{tail}"] = row["accuracy_all"]
        ensemble = mean_softmax[index].argmax(axis=1) == outputs.labels
        result[f"ens_acc{tail}"] = float(ensemble.mean())
        result[f"{head}ece{block}"] = row["ece"]
        for name, column in {"p_max": 0, "entropy": 1, "margins": 2}.items():
            result[f"{head}{name}{block}"] = float(features[index, column])
        result[f"percent_exit{'final' if final else block}"] = row["rate"]
        if row["accuracy"] is not None:
            result[f"gated_acc_{'final' if final else block}"] = row["accuracy"]
    result["gated_acc"] = summary["accuracy"]
    result["gated_ece"] = summary["ece"]
    result["total_cost"] = summary["cost"]
    result["cost_fraction"] = summary["cost_fraction"]
    return result
