"""The loss through a frozen head of 252,903 classes: streamed against whole logits.

Cross-entropy with margin and distillation with its gradient to the features, batch 256, 1024
features, head shared by teacher and student. Against it stand the formulas as the original wrote
them (norms, outer product, one-hot, softmax and log-softmax as matrices of N x C) and plain
PyTorch on a head that was normalised before. Ratios are theirs over ours, in CPU time of the one
thread that works (or wall clock with ``--threads 2``); memory is what a process of its own needs
beyond its inputs.

    python tools/bench/head.py [--quick] [--rounds N] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:1] = [str(REPOSITORY / "packages"), str(REPOSITORY / "shared")]

import torch
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from landmark_distill.head.cosine_head import MARGIN, SCALE, CosineMarginHead
from landmark_distill.head.distillation import KDSettings
from landmark_distill.head.streamed_loss import SoftLabels, soft_labels, streamed_losses
from shared_core.runs import write_benchmark

CLASSES, WIDTH, BATCH = 252_903, 1024, 256
KD = KDSettings("original", 4.0)
Step = Callable[[], tuple[float, torch.Tensor]]


class Inputs:
    """A head with unit rows, and features that lie near their classes."""

    def __init__(self, classes: int, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.empty(classes, WIDTH)
        for part in weight.split(8192):  # no second matrix, which would hide later peaks
            part.normal_(generator=generator)
            part /= part.norm(dim=1, keepdim=True)
        self.head = CosineMarginHead.around(weight)
        self.labels = torch.randint(classes, (batch,), generator=generator)
        near = 3 * weight[self.labels]  # cosine to the own class: about 0.7 and 0.45
        self.teacher = near + 0.1 * torch.randn(batch, WIDTH, generator=generator)
        self.student = near + 0.2 * torch.randn(batch, WIDTH, generator=generator)
        self.half: CosineMarginHead | None = None
        self.soft: SoftLabels | None = None

    def prepare(self, name: str) -> None:
        """What ``name`` finds ready before its step: a bfloat16 head, the stored soft labels."""
        if "bf16" in name:
            self.half = CosineMarginHead.around(self.head.weight.to(torch.bfloat16))
        if "cached" in name:
            self.soft = soft_labels(self.teacher, self.head, labels=self.labels, kd=KD)


def as_written(inputs: Inputs) -> tuple[float, torch.Tensor]:
    """The original's formulas, teacher and student."""

    def logits(x: torch.Tensor) -> torch.Tensor:
        weight = inputs.head.weight
        inner = torch.mm(x, weight.t())
        norms = torch.outer(x.norm(dim=1), weight.norm(dim=1))
        cosine = inner / norms.clamp(min=1e-8)
        one_hot = torch.zeros_like(cosine).scatter_(1, inputs.labels[:, None], 1.0)
        return SCALE * (cosine - one_hot * MARGIN)

    x = inputs.student.clone().requires_grad_()
    with torch.no_grad():
        teacher = logits(inputs.teacher)
    student = logits(x)
    loss = F.cross_entropy(student, inputs.labels) + F.kl_div(
        F.log_softmax(student / KD.temperature, dim=1),
        F.softmax(teacher, dim=1),
        reduction="sum",
    )
    loss.backward()
    return loss.item(), x.grad


def plain(inputs: Inputs) -> tuple[float, torch.Tensor]:
    """Whole logits without needless work: unit rows, the margin taken off in place."""
    weight, rows = inputs.head.weight, torch.arange(len(inputs.labels))

    def logits(x: torch.Tensor) -> torch.Tensor:
        z = SCALE * F.normalize(x, dim=1) @ weight.t()
        z[rows, inputs.labels] -= SCALE * MARGIN
        return z

    x = inputs.student.clone().requires_grad_()
    with torch.no_grad():
        log_p = F.log_softmax(logits(inputs.teacher), dim=1)
    student = logits(x)
    log_q = F.log_softmax(student / KD.temperature, dim=1)
    loss = F.cross_entropy(student, inputs.labels)
    loss = loss + F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    loss.backward()
    return loss.item(), x.grad


def streamed(inputs: Inputs, *, live: bool, half: bool) -> tuple[float, torch.Tensor]:
    """Ours: from the teacher's features (``live``) or from its stored soft labels."""
    head = inputs.half if half else inputs.head
    x = inputs.student.clone().requires_grad_()
    soft = inputs.soft
    if live:
        soft = soft_labels(inputs.teacher, head, labels=inputs.labels, kd=KD)
    losses = streamed_losses(x, head, labels=inputs.labels, soft=soft, kd=KD)
    (losses.ce + losses.kd).backward()
    return (losses.ce + losses.kd).item(), x.grad


STEPS: dict[str, Callable[[Inputs], tuple[float, torch.Tensor]]] = {
    "as written": as_written,
    "plain": plain,
    "live": lambda inputs: streamed(inputs, live=True, half=False),
    "cached": lambda inputs: streamed(inputs, live=False, half=False),
    "live bf16": lambda inputs: streamed(inputs, live=True, half=True),
    "cached bf16": lambda inputs: streamed(inputs, live=False, half=True),
}


def peak_memory() -> float:
    """The most memory that this process had at a time, MiB.

    Linux tells it of this program; what ``getrusage`` says there includes the program before.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak() -> None:
    """Let the most memory be counted from now on, where the system can do that.

    What the allocator keeps of the warm-up goes back first: a step must not find it ready.
    """
    if Path("/proc/self/clear_refs").is_file():
        with contextlib.suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak(name: str, classes: int, batch: int) -> float:
    """MiB that a step needs beyond its inputs; to be called in a process of its own."""
    small = Inputs(5000, batch)  # loads the kernels, which are no part of the step
    small.prepare(name)
    STEPS[name](small)
    inputs = Inputs(classes, batch)
    inputs.prepare(name)
    forget_peak()
    before = peak_memory()
    STEPS[name](inputs)
    return peak_memory() - before


def peak_apart(name: str, options: argparse.Namespace, size: tuple[int, int]) -> float:
    """:func:`peak`, in another process."""
    command = [sys.executable, __file__, "--peak", name, "--threads", str(options.threads)]
    command += ["--classes", str(size[0]), "--batch", str(size[1])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return max(float(done.stdout.split()[-1]), 0.25)  # the system counts in steps of this size


def exact(inputs: Inputs, count: int = 16) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the first samples in float64, from the definition."""
    weight, labels = inputs.head.weight, inputs.labels[:count]
    rows, shrink = torch.arange(count), SCALE * MARGIN

    def logits(x: torch.Tensor) -> torch.Tensor:
        unit = F.normalize(x, dim=1)
        z = torch.cat([unit @ part.double().T for part in weight.split(16384)], dim=1) * SCALE
        z[rows, labels] -= shrink
        return z

    x = inputs.student[:count].double()
    p = F.log_softmax(logits(inputs.teacher[:count].double()), dim=1)
    z = logits(x)
    q = F.log_softmax(z / KD.temperature, dim=1)
    hard = F.log_softmax(z, dim=1)
    loss = (p.exp() * (p - q)).sum() - hard[rows, labels].mean()
    slope = hard.exp()  # of the loss for each logit
    slope[rows, labels] -= 1
    slope = slope / count + (q.exp() - p.exp()) / KD.temperature
    parts = zip(slope.split(16384, dim=1), weight.split(16384), strict=True)
    toward = SCALE * sum(part @ rows_.double() for part, rows_ in parts)
    unit, length = F.normalize(x, dim=1), x.norm(dim=1, keepdim=True)
    return loss.item(), (toward - unit * (unit * toward).sum(1, keepdim=True)) / length


def off(name: str, inputs: Inputs, truth: tuple[float, torch.Tensor]) -> str:
    """Relative errors of loss and gradient of the first samples, in words."""
    count, soft = len(truth[1]), inputs.soft
    few = copy.copy(inputs)
    few.labels, few.student = inputs.labels[:count], inputs.student[:count]
    few.teacher = inputs.teacher[:count]
    few.soft = SoftLabels(soft.mean[:count], soft.entropy[:count], soft.label[:count])
    loss, gradient = STEPS[name](few)
    errors = abs(loss - truth[0]) / abs(truth[0]), (gradient - truth[1]).norm() / truth[1].norm()
    return f"loss {errors[0]:.0e}, gradient {errors[1].item():.0e}"


def row(name: str, ours: list[float], theirs: list[float], **more: Any) -> dict[str, Any]:
    """One row; the ratio of each round, their median and spread."""
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    goal, median = more.get("goal"), round(statistics.median(ratios), 3)
    return {
        "name": name,
        "ours": round(statistics.median(ours), 4),
        "theirs": round(statistics.median(theirs), 4),
        "ratio_median": median,
        "ratio_min": round(ratios[0], 3),
        "ratio_max": round(ratios[-1], 3),
        "met": None if goal is None else median >= goal,
        "skipped": None,
        **more,
    }


def times(inputs: Inputs, names: list[str], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step in each round, by turns."""
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    took: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            start = clock()
            STEPS[name](inputs)
            took[name].append(clock() - start)
    return took


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows."""
    size = (options.classes, options.batch)
    inputs = Inputs(*size)
    inputs.prepare("cached bf16")
    truth = exact(inputs)
    errors = {name: off(name, inputs, truth) for name in STEPS}
    for step in STEPS.values():
        step(inputs)  # warm
    took = times(inputs, list(STEPS), options)
    what = f"{size[0]:,} classes, batch {size[1]}"
    rows = []
    plans = [
        ("stored teacher", "cached", "as written", 4.0),
        ("stored teacher", "cached", "plain", None),
        ("live teacher", "live", "as written", None),
        ("stored teacher, bfloat16 head", "cached bf16", "as written", 8.0),
        ("live teacher, bfloat16 head", "live bf16", "as written", None),
    ]
    for title, ours, theirs, goal in plans:
        more: dict[str, Any] = {"goal": goal, "unit": "s"}
        more["equal"] = f"off float64: {errors[ours]} (theirs: {errors[theirs]})"
        found = row(f"{what}: {title}, against {theirs}", took[ours], took[theirs], **more)
        if "bf16" in ours and goal and not torch.cpu._is_avx512_bf16_supported():
            found |= {"met": None, "skipped": "this processor multiplies no bfloat16"}
        rows.append(found)
    rows.append(roof_row(inputs, took["cached"], f"{what}: stored teacher"))
    base = peak_apart("as written", options, size)
    for name in ("cached", "live", "cached bf16", "live bf16"):
        mine = peak_apart(name, options, size)
        rows.append(
            row(f"{what}: extra memory, {name}, against as written", [mine], [base],
                goal=100.0, unit="MiB", equal="the same steps")
        )  # fmt: skip
    rows += label_rows(inputs, truth)
    return rows


def roof_row(inputs: Inputs, ours: list[float], title: str) -> dict[str, Any]:
    """The three matrix products that are left, timed alone: nothing exact can be faster."""
    rows = inputs.head.weight[:4096]
    x, z = inputs.student, torch.randn(len(inputs.student), len(rows))
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    bare = []
    for _ in range(max(5, len(ours))):
        start = clock()
        for _ in range(4):
            torch.mm(x, rows.T, out=z), z @ rows, z @ rows
        bare.append((clock() - start) / 4 * inputs.head.num_classes / len(rows))
    bare = sorted(bare)[len(bare) // 2 - len(ours) // 2 :][: len(ours)]
    return row(f"{title}, against its matrix products alone", ours, bare, goal=0.85, unit="s",
               equal="not the same work: an upper bound")  # fmt: skip


def label_rows(inputs: Inputs, truth: tuple[float, torch.Tensor]) -> list[dict[str, Any]]:
    """Bytes of a stored soft label, and what half precision costs."""
    packed, whole, rows = inputs.soft.pack(), 4.0 * inputs.head.num_classes, []
    for dtype, goal in (("float16", round(whole / 4096, 1)), ("float32", None)):
        kept = packed.astype(dtype)
        before, inputs.soft = inputs.soft, SoftLabels.unpack(kept)
        again = f"off float64: {off('cached', inputs, truth)}"
        inputs.soft = before
        rows.append(
            row(f"bytes of a soft label in {dtype}, against all probabilities in float32",
                [float(kept[0].nbytes)], [whole], goal=goal, unit="B", equal=again)
        )  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 whether goals are met or not, for the machine decides that, too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="25,000 classes, 2 rounds")
    parser.add_argument("--rounds", type=int, help="rounds by turns (default 5; quick 2)")
    parser.add_argument("--threads", type=int, default=1, help="1: CPU time; more: wall clock")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    parser.add_argument("--classes", type=int, help=f"default {CLASSES}")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--peak", choices=list(STEPS), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.classes = options.classes or (25_000 if options.quick else CLASSES)
    options.rounds = options.rounds or (2 if options.quick else 5)
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(options.peak, options.classes, options.batch))
        return 0
    rows = measure(options)
    for found in rows:
        goal = f"  goal {found['goal']:g}" if found["goal"] else ""
        print(
            f"{found['name']:<78}{found['ours']:>9.3f}{found['theirs']:>13.3f} {found['unit']:<4}"
            f"{found['ratio_median']:7.2f}x ({found['ratio_min']:.2f} to "
            f"{found['ratio_max']:.2f}){goal}; {found['equal']}",
            flush=True,
        )
    if options.json:
        write_benchmark(options.json, topic="head", rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
