"""Early exit with batch compaction against the plain network and against gating after a full pass.

Same weights, images and thresholds in all of them. Thresholds are set so that 40 / 20 / 15 / 10 /
15 % of the images leave at the four exits and the final head; the images run in batches of 1, 16
and 64. One thread, timed by its CPU time; each batch goes through all of them before the next one
comes, so that a machine that slows down slows all. Three ratios:

- efficiency: speed-up over the plain network, divided by what the MACs say it should be;
- nothing leaves: plain network over early exit with thresholds that nobody reaches;
- reference: every block, head and gate for every image, the gates' features by scipy, the choice in
  a Python loop (what counts operations but saves no time), over early exit.

Then the exported files in ONNX Runtime: the plain network and the chain of segments, in int8,
against torch's eager network with rfft2, and the matrix filter against the file with FFT nodes.

    python tools/bench/early_exit.py [--quick] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:1] = [str(REPOSITORY / "packages"), str(REPOSITORY / "shared")]

import numpy as np
import torch

from gfnet_dynn.models.build import build_gfnet
from gfnet_dynn.models.exit_policy import NEVER, ExitPolicy
from gfnet_dynn.models.gates import uncertainty
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from gfnet_dynn.models.op_counter import model_macs
from shared_core.deploy.exit_policy import ExitPolicy as NumpyPolicy
from shared_core.runs import write_benchmark

MIX = (0.40, 0.20, 0.15, 0.10, 0.15)
# name: architecture, pixels, exits
MODELS = {
    "GFNet-Ti 128 px": ("gfnet-ti", 128, (3, 5, 7, 9)),
    "GFNet-Ti 224 px": ("gfnet-ti", 224, (3, 5, 7, 9)),
    "GFNet-XS 256 px": ("gfnet-xs", 256, (3, 5, 7, 9)),
}
POOL = 64  # images that the thresholds are set on
BATCHES = {1: 20, 16: 32, 64: 64}  # batch size: images, the first ones of the pool
EFFICIENCY, NOTHING, GATE = 0.95, 1 / 1.03, 1.0  # goals, as ratios
FFT_FILE, INT8, CHAIN = 6.0, 2.7, 4.0
DECISIONS = 0.99  # share of the int8 chain's exits that must be float32's


def build(arch: str, pixels: int, exits: tuple[int, ...]) -> GFNetDynn:
    """An untrained network whose gates give different images different answers."""
    torch.manual_seed(0)
    backbone = build_gfnet(arch, img_size=pixels, num_classes=45, drop_path_rate=0)
    model = GFNetDynn(backbone, exits, gate_init="torch").eval()
    with torch.no_grad():
        for head in model.exit_heads:
            head.weight.mul_(20)
    return model


def forced_policy(model: GFNetDynn, images: torch.Tensor) -> ExitPolicy:
    """Thresholds, one an exit, between the scores that make the mix on these images."""
    with torch.no_grad():
        out = model(images)
    scores = ExitPolicy("gate").scores(out.logits, out.gate_logits).double()
    left = torch.ones(len(images), dtype=torch.bool)
    thresholds, due = [], 0.0
    for column, share in zip(scores.unbind(1), MIX, strict=False):
        due += share * len(images)
        count = round(due) - int((~left).sum())
        ranked = column[left].sort(descending=True).values
        thresholds.append(float((ranked[count - 1] + ranked[count]) / 2))
        left &= column < thresholds[-1]
    return ExitPolicy("gate", thresholds)


def scipy_features(logits: torch.Tensor) -> torch.Tensor:
    """The four features as lists and scipy calls, a sample at a time."""
    from scipy.stats import entropy

    rows = []
    for p in torch.softmax(logits, dim=1).numpy():
        top = np.sort(p)[::-1]
        rows.append(
            [float(top[0]), float(entropy(p)), float(top[0] - top[1]), float(entropy(p * p))]
        )
    return torch.tensor(rows)


def reference(model: GFNetDynn, images: torch.Tensor, policy: ExitPolicy) -> torch.Tensor:
    """Every block, head and gate for all, then a Python loop that picks: logits ``(N, K)``."""
    features = model.exit_features(images)
    logits = [model.head(index)(f) for index, f in enumerate(features)]
    gates = [
        torch.sigmoid(gate.linear(scipy_features(z)).squeeze(1))
        for gate, z in zip(model.gates, logits[:-1], strict=True)
    ]
    picked = []
    for row in range(len(images)):
        chosen = len(gates)
        for index, gate in enumerate(gates):
            if gate[row].item() >= policy.threshold(index):
                chosen = index
                break
        picked.append(logits[chosen][row])
    return torch.stack(picked)


def in_batches(run: Callable[[torch.Tensor], Any], images: torch.Tensor, size: int) -> float:
    """CPU seconds of this thread for all images in batches of ``size``."""
    start = time.thread_time()
    with torch.inference_mode():
        for first in range(0, len(images), size):
            run(images[first : first + size])
    return time.thread_time() - start


def by_turns(
    runs: dict[str, Callable[[torch.Tensor], Any]], batches: Sequence[torch.Tensor]
) -> dict[str, float]:
    """CPU seconds of this thread that each run takes for all batches, in changing order."""
    times, order = dict.fromkeys(runs, 0.0), list(runs)
    shuffle = random.Random(0).shuffle
    with torch.inference_mode():
        for batch in batches:
            shuffle(order)  # what ran before leaves its data in the caches
            for name in order:
                start = time.thread_time()
                runs[name](batch)
                times[name] += time.thread_time() - start
    return times


def row(name: str, ours: list[float], theirs: list[float], factor: float, **rest: Any) -> dict:
    """One line of the table: ratio = theirs / ours * factor, round by round; ms an image."""
    ratios = sorted(b / a * factor for a, b in zip(ours, theirs, strict=True))
    median, goal = round(statistics.median(ratios), 3), round(rest.pop("goal"), 4)
    result = {
        "name": name,
        "ours": round(statistics.median(ours) * 1e3, 4),
        "theirs": round(statistics.median(theirs) * 1e3, 4),
        "unit": "ms an image",
        "ratio_median": median,
        "ratio_min": round(ratios[0], 3),
        "ratio_max": round(ratios[-1], 3),
        "goal": goal,
        "met": median >= goal,
        "skipped": None,
        **rest,
    }
    verdict = f"  goal {goal:.3g}: {'met' if result['met'] else 'not met'}"
    print(
        f"{name:<44}{result['ours']:>9.3f}{result['theirs']:>10.3f} ms  "
        f"{median:6.3f}x ({ratios[0]:.3f} to {ratios[-1]:.3f}){verdict}",
        flush=True,
    )
    return result


def compare(name: str, batches: dict[int, int], rounds: int) -> list[dict]:
    """All rows of one network."""
    arch, pixels, exits = MODELS[name]
    model = build(arch, pixels, exits)
    pool = torch.randn(POOL, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))
    # Images of graded contrast, so that gates tell them apart clearly.
    pool = pool * torch.linspace(0.2, 3, POOL).view(-1, 1, 1, 1)
    pool = pool[torch.randperm(POOL, generator=torch.Generator().manual_seed(2))]
    policy = forced_policy(model, pool)
    never = policy.with_thresholds(NEVER)
    rows = []
    for size, images in batches.items():
        data = pool[:images]
        with torch.no_grad():
            full = model(data)
            by_loop = reference(model, data[:8], policy)
        chosen = policy.select(full.logits, full.gate_logits)
        rates = np.bincount(chosen.numpy(), minlength=len(MIX)) / images
        fraction = float(rates @ model.exit_costs()) / model_macs(model.backbone)

        expected = torch.stack(full.logits)[chosen, torch.arange(images)]
        parts = [model.early_exit(part, policy) for part in data.split(size)]
        logits = torch.cat([part.logits for part in parts])
        largest = expected.abs().max()
        worst = ((logits - expected).abs().max() / largest).item()
        if not torch.equal(torch.cat([part.exit_index for part in parts]), chosen) or worst > 1e-4:
            raise ValueError(f"{name}: early exit and full pass differ ({worst:.1e})")
        if (by_loop - expected[:8]).abs().max() > 1e-4 * largest:
            raise ValueError(f"{name}: early exit and the reference differ")

        runs: dict[str, Callable[[torch.Tensor], Any]] = {
            "plain": model.backbone,
            "compacted": lambda x: model.early_exit(x, policy),
            "nothing": lambda x: model.early_exit(x, never),
            "reference": lambda x: reference(model, x, policy),
        }
        times: dict[str, list[float]] = {key: [] for key in runs}
        by_turns(runs, [data[:size]])
        for _ in range(rounds):
            for key, took in by_turns(runs, data.split(size)).items():
                times[key].append(took / images)
        mix = "/".join(f"{100 * r:.0f}" for r in rates)
        where = f"{name}, batch {size}"
        print(f"{where}: exits {mix} %, {100 * fraction:.1f} % of the MACs", flush=True)
        facts = {
            "equal": f"{images} exits equal, logits within {worst:.0e} of the largest",
            "exit_rates": rates.tolist(),
            "macs_fraction": round(fraction, 4),
        }
        ours, base = times["compacted"], times["plain"]
        rows += [
            row(f"{where}: efficiency", ours, base, fraction, goal=EFFICIENCY, **facts),
            row(f"{where}: nothing leaves", times["nothing"], base, 1, goal=NOTHING, **facts),
            row(f"{where}: reference", ours, times["reference"], 1, goal=GATE, **facts),
        ]
    return rows


def compare_gates(rounds: int) -> list[dict]:
    """The gate's features by torch against scipy, 45 classes."""
    rows = []
    for size in (1, 64):
        logits = torch.randn(size, 45, generator=torch.Generator().manual_seed(0)) * 3
        worst = (uncertainty(logits) - scipy_features(logits)).abs().max().item()
        if worst > 1e-4:
            raise ValueError(f"features differ by {worst:.1e}")
        repeats = 200 // size + 5
        pool = logits.repeat(repeats, 1)
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(rounds + 1):
            times["ours"].append(in_batches(uncertainty, pool, size) / len(pool))
            times["theirs"].append(in_batches(scipy_features, pool, size) / len(pool))
        equal = f"within {worst:.0e}"
        name = f"gate features, batch {size}"
        rows.append(row(name, times["ours"][1:], times["theirs"][1:], 1, goal=GATE, equal=equal))
    return rows


def compare_exported(rounds: int) -> list[dict]:
    """Exported files of GFNet-Ti at 224 px, batch 1, against torch's eager network with rfft2."""
    name = "GFNet-Ti 224 px, batch 1"
    lines = {
        f"{name}: ONNX, matrices against FFT nodes": ("onnx", "onnx fft", FFT_FILE),
        f"{name}: ONNX int8 against torch": ("int8", "torch", INT8),
        f"{name}: ONNX int8 with exits against torch": ("chain", "torch", CHAIN),
    }
    missing = [p for p in ("onnx", "onnxscript", "onnxruntime") if find_spec(p) is None]
    vnni = any(flag.endswith("vnni") for flag in cpu_flags())
    if missing:
        reason = f"{missing[0]} is not installed"
        return [skipped(line, goal, reason) for line, (*_, goal) in lines.items()]
    from gfnet_dynn.deploy.segments import write_float
    from shared_core.deploy.exit_chain import ExitChain
    from shared_core.deploy.quantize import quantize_dynamic
    from shared_core.deploy.session import open_session

    model = build(*MODELS["GFNet-Ti 224 px"])
    images = torch.randn(20, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    images = images * torch.linspace(0.2, 3, 20).view(-1, 1, 1, 1)
    policy = forced_policy(model, images)
    policy_in_numpy = NumpyPolicy.from_state(policy.state_dict())
    with tempfile.TemporaryDirectory(prefix="bench-early-exit-") as place:
        folder = Path(place)
        for name in ("plain", "fft", "chain"):
            (folder / name).mkdir()
        (plain,) = write_float(model.backbone, folder / "plain")
        (fft,) = write_float(model.backbone, folder / "fft", filter="fft")
        segments = write_float(model, folder / "chain")
        int8 = folder / "int8.onnx"
        for source, target in ((plain, int8), *((path, path) for path in segments)):
            quantize_dynamic(source, target)
        chain = ExitChain([open_session(path) for path in segments])
        with torch.no_grad():
            full = model(images)
        same = (chain(images.numpy(), policy_in_numpy)[1] == policy.select(*full).numpy()).mean()
        eager = copy.deepcopy(model.backbone)
        eager.set_filter("fft")

        def session(path: Path) -> Callable[[torch.Tensor], Any]:
            run = open_session(path)
            return lambda x: run.run(None, {"image": x.numpy()})[0]

        runs: dict[str, Callable[[torch.Tensor], Any]] = {
            "torch": eager,
            "onnx": session(plain),
            "onnx fft": session(fft),
            "int8": session(int8),
            "chain": lambda x: chain(x.numpy(), policy_in_numpy),
        }
        exact, rounded = runs["onnx"](images), runs["int8"](images)
        times: dict[str, list[float]] = {key: [] for key in runs}
        for number in range(rounds + 1):
            for key, run in runs.items():
                took = in_batches(run, images if number else images[:1], 1) / len(images)
                if number:
                    times[key].append(took)
    equal = {
        "onnx": "logits within 1e-4 of torch's, both files",
        "int8": f"top-1 agreement {(exact.argmax(1) == rounded.argmax(1)).mean():.3f}, error "
        f"{np.linalg.norm(rounded - exact) / np.linalg.norm(exact):.4f}",
        "chain": f"{same:.3f} of the exits equal torch's in float32",
    }
    if same < 0.95:
        raise ValueError(f"int8 chain: {same:.3f} of the decisions are torch's, expected 0.95")
    rows = []
    for line, (ours, theirs, goal) in lines.items():
        if ours != "onnx" and not vnni:
            rows.append(skipped(line, goal, "the CPU has no VNNI"))
            continue
        rows.append(row(line, times[ours], times[theirs], 1, goal=goal, equal=equal[ours]))
        if ours == "chain":
            rows[-1]["met"] &= same >= DECISIONS
    return rows


def cpu_flags() -> list[str]:
    """Features of the CPU as Linux names them; none elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])


def skipped(name: str, goal: float, reason: str) -> dict:
    """A line of the table that was not measured."""
    print(f"{name:<44} skipped: {reason}", flush=True)
    nothing = dict.fromkeys(("ours", "theirs", "ratio_median", "ratio_min", "ratio_max", "met"))
    return {"name": name, **nothing, "goal": goal, "skipped": reason, "equal": None}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 whether goals are met or not, for the machine decides that, too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smaller network, fewer images")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 5; quick 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(argv)
    rounds = options.rounds or (3 if options.quick else 5)
    torch.set_num_threads(1)
    rows = compare_gates(rounds)
    for name in list(MODELS)[: 1 if options.quick else None]:
        rows += compare(name, {1: 20, 64: 64} if options.quick else BATCHES, rounds)
    if not options.quick:
        rows += compare_exported(rounds)
    if options.json:
        write_benchmark(options.json, topic="early_exit", rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
