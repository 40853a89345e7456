"""``smallvision weights list | get NAME FILE | check [NAME ...]``: trained networks at hand."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from shared_core.runs.command import UsageError
from shared_core.weights.catalogue import CATALOGUE, TrainedNetwork, entry, names


def build_parser(prog: str = "smallvision weights") -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Trained networks to start from: what is there, copied or checked."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="What there is, what is installed, and how to get the rest.")
    get = actions.add_parser("get", help="Copy installed weights into a file of your own.")
    get.add_argument("name", metavar="NAME", help=f"One of {', '.join(names())}.")
    get.add_argument("file", type=Path, metavar="FILE", help="Where to; must not be there yet.")
    check = actions.add_parser("check", help="Hold installed weights to the catalogue's sha256.")
    check.add_argument("names", nargs="*", metavar="NAME", help="Which; all installed by default.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the words say. Returns the exit code."""
    args = build_parser().parse_args(argv)
    if args.action == "list":
        _list()
    elif args.action == "get":
        _get(args.name, args.file)
    else:
        _check(args.names)
    return 0


def _installed(name: str) -> tuple[TrainedNetwork, Path]:
    from shared_core.weights.finding import check_file, how_to_get, installed_file

    network = entry(name)
    if network is None:
        raise UsageError(f"weights {name!r}, expected one of {', '.join(names())}")
    path = installed_file(network)
    if path is None:
        raise UsageError(f"{network.name} is not installed; get it by: {how_to_get(network)}")
    check_file(network, path)
    return network, path


def _get(name: str, file: Path) -> None:
    from shared_core.checkpoints import atomic_write

    network, path = _installed(name)
    if file.exists():
        raise UsageError(f"{file} exists, expected a new name")
    atomic_write(file, lambda scratch: shutil.copyfile(path, scratch))
    print(f"{file}: {network.name}, {network.licence}, {network.origin}")


def _check(wanted: Sequence[str]) -> None:
    from shared_core.weights.finding import how_to_get, installed_file
    from shared_core.weights.reading import read_weights

    wanted = wanted or [one.name for one in CATALOGUE if installed_file(one)]
    if not wanted:
        raise UsageError(f"nothing is installed; get some by: {how_to_get(CATALOGUE[0])}")
    for name in wanted:
        network, path = _installed(name)
        print(f"{network.name}: sha256 as published, {len(read_weights(path))} arrays")


def _list() -> None:
    from shared_core.weights.finding import how_to_get, installed_file

    for one in CATALOGUE:
        here = "installed" if installed_file(one) else how_to_get(one)
        print(
            f"{one.name:20} {one.parameters / 1e6:5.2f} M parameters  {one.macs / 1e6:5.0f} M MACs "
            f"at {one.input_size} px  ImageNet {100 * one.accuracy:.1f} %  {one.licence}  {here}"
        )
    print(
        "Any network of timm, torchvision or paddle.vision can be named, too; its library "
        "downloads its weights where there is a network."
    )
