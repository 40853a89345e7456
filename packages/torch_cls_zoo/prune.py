"""Cut off the channels that slimming (--sparsity) left unused; ``--help`` lists the options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.runs import run_command
from shared_core.runs.numbers import number
from shared_core.runs.options import CommandParser, add_common
from torch_cls_zoo.dataloader import PARTS

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    resume: Path
    output: Path
    prune_ratio: float
    prune_least: float
    data: str | None
    part: str
    batch_size: int
    seed: int
    export: bool
    threads: int | None


def build_parser() -> CommandParser:
    """The command line."""
    p = CommandParser(
        prog="prune.py",
        description="Cut the channels with the smallest BatchNorm scales off a trained network, "
        "check that it equals the network with those channels set to 0, and report.",
        epilog="The file that is written is a checkpoint of this zoo: fine-tune it with "
        "main.py --train --arch ARCH --resume FILE, measure with main.py --evaluate --resume FILE.",
    )
    p.add_argument(
        "--resume", type=Path, required=True, metavar="FILE", help="The checkpoint to prune."
    )
    p.add_argument(
        "--prune_ratio", type=number(float, 0, 0.999999), default=0.5, metavar="SHARE",
        help="The share of the channels that is cut.",
    )  # fmt: skip
    p.add_argument(
        "--prune_least", type=number(float, 0, 1, open_low=True), default=0.1, metavar="SHARE",
        help="The share of each layer's channels that stays whatever happens.",
    )  # fmt: skip
    p.add_argument(
        "--part", default="test", choices=PARTS, help="The part that accuracy is measured on."
    )
    p.add_argument("--export", action="store_true", help="Write TorchScript and ONNX files, too.")
    add_common(
        p,
        ["output", "data-path", "batch-size", "seed", "threads"],
        aliases={"data-path": ["--data"], "batch-size": ["-b", "--batch_size"]},
        defaults={"batch-size": 64, "seed": 1234},
        help={
            "output": "The folder that gets the pruned checkpoint and prune.json.",
            "data-path": "Measure the accuracy before and after on this folder of images; the "
            "word builtin draws scenes.",
            "seed": "The seed of the split of the images, as main.py's.",
        },
        more={"output": {"required": True}, "data-path": {"dest": "data", "type": str}},
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Prune and report. Returns the exit code."""
    asked = Asked(**vars(build_parser().parse_args(argv)))
    import json

    import torch

    from shared_core.for_torch.checkpoints import fit_into, load_checkpoint, save_checkpoint
    from torch_cls_zoo.applications.export_files import export_all
    from torch_cls_zoo.applications.model_facts import facts_of_checkpoint
    from torch_cls_zoo.models import build_model
    from torch_cls_zoo.pruning.cutting import merge_kept, prune

    if asked.threads:
        torch.set_num_threads(asked.threads)
    weights, facts = load_checkpoint(asked.resume, project="torch_cls_zoo")
    told = facts_of_checkpoint(facts, where=asked.resume)
    arch, size, before = told.architecture, told.input_size, facts.get("pruned") or {}
    model = build_model(
        arch, num_classes=len(told.class_names), image_size=size, kept=before
    ).model.eval()
    fit_into(model, weights, path=asked.resume)
    pruned, plan, proof = prune(model, size, ratio=asked.prune_ratio, least=asked.prune_least)
    report: dict[str, Any] = {
        "arch": arch,
        "groups": plan.groups,
        "cut": len(plan.cut),
        "largest_scale_cut": plan.threshold,
        **proof,
        "before": _costs(model, size),
        "after": _costs(pruned, size),
        "layers": {
            name: [len(sides["out"]), width]
            for name, sides in plan.kept.items()
            if "out" in sides and (width := _width(model, name)) is not None
        },
    }
    if asked.data is not None:
        found = accuracies([model, pruned], asked, facts)
        report["before"]["accuracy"], report["after"]["accuracy"] = found
    asked.output.mkdir(parents=True, exist_ok=True)
    file = asked.output / f"pruned_{arch.replace('/', '_')}.pth"
    written = {k: v for k, v in facts.items() if k != "sha256"}
    kept = merge_kept(before, plan.kept)
    save_checkpoint(file, pruned.state_dict(), {**written, "pruned": kept, "metrics": {}})
    if asked.export:
        report["exported"] = export_all(
            pruned, asked.output, arch=f"pruned_{arch}", facts=told, formats=("jit", "onnx")
        )
    (asked.output / "prune.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _say(report, file)
    return 0


def accuracies(models: Sequence[nn.Module], asked: Asked, facts: dict[str, Any]) -> list[float]:
    """Top-1 accuracy of each, fractions in [0, 1], on ``--part`` of ``--data``.

    The data are split as ``main.py`` does with the same ``--seed``.

    Raises:
        FileNotFoundError, DatasetError, ValueError: no data, or other classes than the network's.
    """
    import tempfile

    import torch

    from shared_core.for_torch.accuracy import answers_of
    from shared_core.for_torch.distributed import World
    from torch_cls_zoo.applications.model_facts import facts_of_checkpoint
    from torch_cls_zoo.dataloader.folders import check_classes, open_data, part
    from torch_cls_zoo.dataloader.loaders import InputSettings, eval_loader

    told, world = (
        facts_of_checkpoint(facts, where=asked.resume),
        World(0, 1, 0, torch.device("cpu")),
    )
    with tempfile.TemporaryDirectory() as scratch:
        data = open_data(
            str(asked.data),
            Path(scratch),
            num_classes=len(told.class_names),
            seed=asked.seed,
            image_side=min(told.input_size),
        )
        check_classes(data.classes, told.class_names, str(asked.resume))
        loader = eval_loader(
            part(data, asked.part).images,
            InputSettings(told.input_size, told.mean, told.std),
            batch_size=asked.batch_size,
            world=world,
            threads=1,
        )
        return [answers_of(model, loader, world).accuracy for model in models]


def _costs(model: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    from torch_cls_zoo.models.summary import summarize

    summary = summarize(model, size)
    return {"params": summary.params, "macs": summary.macs}


def _width(model: Any, name: str) -> int | None:
    return int(len(dict(model.named_modules())[name].weight))


def _say(report: dict[str, Any], file: Path) -> None:
    before, after = report["before"], report["after"]
    print(f"{'layer':<44}{'left':>7}{'of':>7}")
    for name, (left, width) in report["layers"].items():
        print(f"{name:<44}{left:>7}{width:>7}")
    print(
        f"cut {report['cut']} of {report['groups']} channels (scale up to "
        f"{report['largest_scale_cut']:.3g})"
    )
    for key, name, unit in (("params", "parameters", 1e6), ("macs", "MACs", 1e6)):
        share = after[key] / before[key]
        print(f"{name}: {before[key] / unit:.3f} M -> {after[key] / unit:.3f} M ({share:.1%})")
    if "accuracy" in before:
        print(f"accuracy: {before['accuracy']:.4f} -> {after['accuracy']:.4f}")
    print(
        f"differs from the masked network by {report['to_masked']:.1e} of its largest logit, from "
        f"the whole one by {report['to_whole']:.1e}; wrote {file}"
    )


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
