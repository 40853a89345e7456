"""Cut off the channels that slimming (--sparsity) left unused; ``--help`` lists the options."""

# ruff: noqa: E402
from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

import argparse
import json
from collections.abc import Sequence
from typing import Any

from shared_core.runs import UsageError, run_command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="prune.py",
        description="Cut the channels with the smallest BatchNorm scales off a trained network, "
        "check that it equals the network with those channels set to 0, and report.",
        epilog="The file that is written is a checkpoint of this zoo: fine-tune it with "
        "main.py --train --arch ARCH --resume FILE, measure with main.py --evaluate --resume FILE.",
    )
    p.add_argument("--resume", type=Path, required=True, metavar="FILE", help="the checkpoint")
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="where to write")
    p.add_argument("--prune_ratio", type=float, default=0.5, help="share of the channels (0.5)")
    p.add_argument("--prune_least", type=float, default=0.1, metavar="SHARE",
                   help="of each layer this much stays (0.1)")  # fmt: skip
    p.add_argument("--data", help="measure accuracy before and after: a data folder, or builtin")
    p.add_argument("--part", default="test", choices=("train", "val", "test"), help="(test)")
    p.add_argument("-b", "--batch_size", type=int, default=64)
    p.add_argument("--seed", type=int, default=1234, help="of the split of --data (1234)")
    p.add_argument("--export", action="store_true", help="also as TorchScript and ONNX")
    p.add_argument("--threads", type=int, default=0, help="threads that compute (torch decides)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Prune and report. Returns the exit code."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    args = build_parser().parse_args(argv)
    if args.batch_size < 1:
        raise UsageError(f"--batch_size {args.batch_size}, expected 1 or more")
    import torch

    from shared_core.for_torch.checkpoints import fit_into, load_checkpoint, save_checkpoint
    from torch_cls_zoo.applications.export_files import export_all
    from torch_cls_zoo.models import build_model
    from torch_cls_zoo.models.summary import summarize
    from torch_cls_zoo.pruning.cutting import merge_kept, prune

    if args.threads:
        torch.set_num_threads(args.threads)
    weights, facts = load_checkpoint(args.resume, project="torch_cls_zoo")
    arch, classes = facts["architecture"], facts["class_names"]
    size = (int(facts["input_size"][1]), int(facts["input_size"][2]))
    before = facts.get("pruned") or {}
    model = build_model(arch, num_classes=len(classes), image_size=size, kept=before).model
    fit_into(model, weights, path=args.resume)
    model.eval()
    pruned, plan, proof = prune(model, size, ratio=args.prune_ratio, least=args.prune_least)
    report: dict[str, Any] = {
        "arch": arch,
        "groups": plan.groups,
        "cut": len(plan.cut),
        "largest_scale_cut": plan.threshold,
        **proof,
    }
    for name, net in (("before", model), ("after", pruned)):
        summary = summarize(net, size)
        report[name] = {"params": summary.params, "macs": summary.macs}
    report["layers"] = {
        name: [len(sides["out"]), width]
        for name, sides in plan.kept.items()
        if "out" in sides and (width := _width(model, name)) is not None
    }
    if args.data is not None:
        from torch_cls_zoo.utils.prune_accuracy import accuracies

        found = accuracies([model, pruned], args, facts, size)
        report["before"]["accuracy"], report["after"]["accuracy"] = found
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"pruned_{arch.replace('/', '_')}.pth"
    kept = merge_kept(before, plan.kept)
    written = {k: v for k, v in facts.items() if k != "sha256"}
    save_checkpoint(file, pruned.state_dict(), {**written, "pruned": kept, "metrics": {}})
    if args.export:
        report["exported"] = export_all(
            pruned, args.output, arch=f"pruned_{arch}", image_size=size, facts=written,
            formats=("jit", "onnx"),
        )  # fmt: skip
    (args.output / "prune.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _say(report, file)
    return 0


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


if __name__ == "__main__":
    sys.exit(run_command(main))
