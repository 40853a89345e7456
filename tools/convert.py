"""Convert a checkpoint between torch (.pth), Paddle (.pdparams) and neutral (.safetensors) files.

    python tools/convert.py student.pth student.pdparams
    python tools/convert.py student.pdparams student.pth
    python tools/convert.py student.pth student.safetensors

The name of the target decides: ``.pdparams`` gets Paddle's names and layouts, any other but
``.safetensors`` torch's; a ``.safetensors`` file keeps the names that it is given (``--names``
changes them). torch must be installed to read or write its own format; Paddle is never needed.
Going there and back gives the same weights bit for bit.

A file that is not of this repository has no facts; say what it is:

    python tools/convert.py resnet.pth resnet.pdparams --foreign torch --project torch_cls_zoo \
        --architecture resnet18
"""

import argparse
import sys
from pathlib import Path
from typing import Any

repo = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(repo / "shared")]  # this checkout, whatever is installed

from shared_core.checkpoints import (
    Array,
    CheckpointError,
    make_facts,
    names,
    neutral,
    pickle_arrays,
)
from shared_core.runs import UsageError, run_command

Arrays = dict[str, Array]
COUNTERS = "num_batches_tracked"  # fact that keeps what Paddle has no place for
LINEAR = "linear_weights"  # fact that says which matrices were transposed


def form_of(path: Path) -> str:
    """``neutral``, ``paddle`` or ``torch``, by the suffix."""
    return {".safetensors": "neutral", ".pdparams": "paddle"}.get(path.suffix, "torch")


def read(path: Path, *, foreign: bool) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and facts (none of a foreign file)."""
    form = form_of(path)
    if form == "neutral":
        return (neutral.read_arrays(path)[0], {}) if foreign else neutral.read(path)
    if form == "paddle":
        if not foreign:
            arrays, facts = pickle_arrays.read(path)
            return pickle_arrays.widened(arrays), facts
        content = pickle_arrays.read_pickle(path)
        if isinstance(content, dict) and isinstance(content.get("model"), dict):
            content = content["model"]
        return pickle_arrays.widened(pickle_arrays.state_arrays(path, content)), {}
    from shared_core.for_torch import checkpoints

    if foreign:
        return checkpoints.to_numpy(checkpoints.load_foreign_weights(path)), {}
    weights, facts = checkpoints.load_checkpoint(path)
    return checkpoints.to_numpy(weights), facts


def write(path: Path, arrays: Arrays, facts: dict[str, Any]) -> None:
    """All or nothing."""
    form = form_of(path)
    if form == "neutral":
        neutral.write(path, arrays, facts)
    elif form == "paddle":
        pickle_arrays.write(path, arrays, facts)
    else:
        from shared_core.for_torch import checkpoints

        checkpoints.save_checkpoint(path, checkpoints.from_numpy(arrays), facts)


def rename(
    arrays: Arrays, facts: dict[str, Any], *, target: str, not_linear: list[str]
) -> tuple[Arrays, dict[str, Any]]:
    """Weights and facts under the names of ``target``, ``"torch"`` or ``"paddle"``."""
    if facts["framework"] == target:
        return arrays, facts
    if facts["framework"] not in ("torch", "paddle"):
        raise CheckpointError(
            f"names of {facts['framework']} are not known, expected torch, paddle"
        )
    facts = {**facts, "framework": target}
    linear = facts.pop(LINEAR, None)
    if linear is None or not_linear:
        linear = names.linear_names(arrays, not_linear=not_linear)
    if target == "paddle":
        facts |= {COUNTERS: names.counters(arrays), LINEAR: linear}
        return names.to_paddle(arrays, linear), facts
    tracked = facts.pop(COUNTERS, {})
    return names.to_torch(arrays, linear, tracked=tracked), facts


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("source", type=Path)
    p.add_argument("target", type=Path)
    p.add_argument("--names", choices=["torch", "paddle"], help="names in a .safetensors target")
    p.add_argument(
        "--not-linear",
        action="append",
        default=[],
        metavar="NAME",
        help="a two-dimensional weight that is no linear layer, such as an embedding; repeatable",
    )
    p.add_argument("--foreign", choices=["torch", "paddle"], help="whose names a file has")
    p.add_argument("--project", help="for --foreign: the project that will load the file")
    p.add_argument("--architecture", help="for --foreign: the name of the model in that project")
    p.add_argument("--force", action="store_true", help="replace an existing target")
    return p


def main(argv: list[str]) -> None:
    """Convert one file."""
    args = parser().parse_args(argv)
    form = form_of(args.target)
    if args.foreign and not (args.project and args.architecture):
        raise UsageError("--foreign needs --project and --architecture")
    if not args.foreign and (args.project or args.architecture):
        raise UsageError("--project and --architecture are for --foreign files")
    if args.names and form != "neutral" and args.names != form:
        raise UsageError(f"--names {args.names} does not fit {args.target.name}")
    if args.target.exists() and not args.force:
        raise CheckpointError(f"{args.target} exists; use --force to replace it")
    arrays, facts = read(args.source, foreign=bool(args.foreign))
    if args.foreign:
        facts = make_facts(
            project=args.project,
            architecture=args.architecture,
            class_names=[],
            framework=args.foreign,
        )
    target = args.names or (facts["framework"] if form == "neutral" else form)
    arrays, facts = rename(arrays, facts, target=target, not_linear=args.not_linear)
    write(args.target, arrays, facts)
    print(f"{args.target}: {len(arrays)} weights, {target} names")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
