"""Find the nearest images of a gallery for query images: table, JSON, CSV and a picture."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from landmark_distill.config import INDEXES
from landmark_distill.embed import add_model_options
from shared_core.runs.command import UsageError, run_command
from shared_core.runs.numbers import SIZE, number
from shared_core.runs.options import CommandParser

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from landmark_distill.gallery.features import FeatureStore
    from landmark_distill.gallery.nearest import ExactIndex, FaissIndex

SHEET_QUERIES, SHEET_NEIGHBOURS = 24, 8


class Queries(NamedTuple):
    """What is asked: features ``(Q, D)``, names, image files, and what could not be read."""

    features: NDArray[Any]
    names: Sequence[str]
    pictures: Sequence[Path | None]
    bad: list[tuple[Path, str]]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = CommandParser(
        prog="search.py",
        description="The nearest images of a gallery, which embed.py made, for each query.",
        epilog="Exit code: 0, or 1 when a query could not be read (the others are answered).",
    )
    one = p.add_argument
    one("gallery", type=Path, metavar="GALLERY", help="Features of embed.py, .npy.")
    one("query", type=Path, metavar="QUERY", help="An image, a folder, or features (.npy).")
    one("--model", type=Path, metavar="FILE",
        help="The network that made the gallery; for images.")  # fmt: skip
    one("--k", type=SIZE, default=10, metavar="N", help="The neighbours of a query.")
    one("--threshold", type=number(float, -1, 1), metavar="X",
        help="A query whose nearest image scores no more is unknown. Without it what embed.py "
        "--far stored with the gallery.")  # fmt: skip
    one("--json", type=Path, metavar="FILE", help="Write the answers there as JSON.")
    one("--csv", type=Path, metavar="FILE", help="Write a row for each neighbour there.")
    one("--sheet", type=Path, metavar="FILE", help="Draw queries and neighbours there, .png.")
    one("--index", choices=INDEXES, default="exact",
        help="How to search. Those of FAISS are for large galleries; ivf and hnsw may miss "
        "some.")  # fmt: skip
    one("--probes", type=SIZE, metavar="N",
        help="What ivf and hnsw look into: more finds more. Without it 16.")  # fmt: skip
    add_model_options(p)
    return p


def answers(
    gallery: FeatureStore,
    index: ExactIndex | FaissIndex,
    queries: NDArray[Any],
    names: Sequence[str],
    k: int,
    threshold: float | None = None,
) -> list[dict[str, Any]]:
    """For each query its name and neighbours: rank from 1, row, path, score; whether it is unknown.

    Args:
        threshold: a query whose nearest image scores no more is unknown; None: nothing is said.
    """
    found = index.search(queries, k)
    said = [{} if threshold is None else {"unknown": bool(not s[0] > threshold)}
            for s in found.scores]  # fmt: skip
    return [
        {
            "query": name,
            **more,
            "neighbours": [
                {"rank": rank, "row": row, "path": gallery.paths[row], "score": float(score)}
                for rank, (row, score) in enumerate(
                    zip(rows.tolist(), scores.tolist(), strict=True), start=1
                )
                if row >= 0 and math.isfinite(score)
            ],
        }
        for name, rows, scores, more in zip(names, found.indices, found.scores, said, strict=True)
    ]


def _queries(args: argparse.Namespace, gallery: FeatureStore) -> Queries:
    from landmark_distill.gallery.embedder import load_embedder
    from landmark_distill.gallery.features import embed_files, open_store, weights_of
    from shared_core.datasets.finding.scan import list_images

    if args.query.suffix == ".npy":
        if args.model is not None:
            raise UsageError("--model is for images, the query is a file of features")
        store = open_store(args.query)
        _same_network(gallery, store.facts.get("weights"), args.query)
        pictures = [store.image(row) for row in range(len(store.features))]
        return Queries(store.features, list(store.paths), pictures, [])
    if args.model is None:
        raise UsageError(f"{args.query} is no .npy file: expected --model FILE to embed images")
    found = list_images(args.query)
    if not found.files:
        raise FileNotFoundError(f"{found.bad[0][0]}: {found.bad[0][1]}")
    embedder = load_embedder(args.model, device=args.device, bf16=args.bf16)
    _same_network(gallery, weights_of(embedder), args.model)
    features, files, unread = embed_files(
        embedder, found.files, batch=args.batch_size, threads=args.workers
    )
    if not files:
        raise ValueError(f"no query can be read: {unread[0][0]}: {unread[0][1]}")
    return Queries(features, [str(path) for path in files], list(files), found.bad + unread)


def _same_network(gallery: FeatureStore, weights: str | None, other: Path) -> None:
    """Features of two networks have nothing to do with each other."""
    mine = gallery.facts.get("weights")
    if mine is None or weights is None:
        return
    if mine.removesuffix("-int8") != weights.removesuffix("-int8"):
        raise ValueError(
            f"the gallery was made by weights {mine[:12]}, {other} has {weights[:12]}; "
            "expected the same network"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Search. Returns the exit code."""
    args = build_parser().parse_args(argv)
    if args.index not in ("faiss-ivf", "faiss-hnsw") and args.probes is not None:
        raise UsageError(f"--probes is of faiss-ivf and faiss-hnsw, not of {args.index}")
    from landmark_distill.gallery.features import open_store
    from landmark_distill.gallery.nearest import ExactIndex, FaissIndex

    gallery = open_store(args.gallery)
    asked = _queries(args, gallery)
    index: ExactIndex | FaissIndex
    if args.index == "exact":
        index = ExactIndex(gallery.features)
    else:
        index = FaissIndex(gallery.features, kind=args.index, probes=args.probes or 16)
    threshold = args.threshold
    if threshold is None:
        threshold = (gallery.facts.get("unknown") or {}).get("threshold")
    found = answers(gallery, index, asked.features, asked.names, args.k, threshold)
    if args.json:
        _write_json(args.json, {"gallery": str(args.gallery), "index": index.kind}, found)
    if args.csv:
        _write_csv(args.csv, found)
    if args.sheet:
        _draw(args.sheet, gallery, found, asked.pictures)
    if not (args.json or args.csv or args.sheet):
        _print(found)
    else:
        unknown = sum(one.get("unknown", False) for one in found)
        more = "" if threshold is None else f", {unknown} unknown"
        print(f"{len(found)} queries among {len(index)} images ({index.kind}){more}")
    for path, reason in asked.bad:
        print(f"left out {path}: {reason}", file=sys.stderr)
    return 1 if asked.bad else 0


def _write_json(path: Path, about: dict[str, Any], found: Sequence[dict[str, Any]]) -> None:
    from shared_core.checkpoints import atomic_write

    text = json.dumps({**about, "answers": found}, indent=2, ensure_ascii=False) + "\n"
    atomic_write(path, lambda scratch: scratch.write_text(text, "utf-8", "surrogateescape"))


def _write_csv(path: Path, found: Sequence[dict[str, Any]]) -> None:
    import csv

    from shared_core.checkpoints import atomic_write

    def write(scratch: Path) -> None:
        with scratch.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["query", "rank", "path", "score"])
            for one in found:
                for near in one["neighbours"]:
                    row = [one["query"], near["rank"], near["path"], repr(near["score"])]
                    writer.writerow(row)

    atomic_write(path, write)


def _draw(
    path: Path,
    gallery: FeatureStore,
    found: Sequence[dict[str, Any]],
    pictures: Sequence[Path | None],
) -> None:
    from landmark_distill.judging.pictures import Tile, write_sheet

    rows = []
    for one, picture in list(zip(found, pictures, strict=True))[:SHEET_QUERIES]:
        near = one["neighbours"][:SHEET_NEIGHBOURS]
        tiles = [Tile(gallery.image(n["row"]), f"{n['score']:.3f}") for n in near]
        rows.append([Tile(picture, Path(one["query"]).name), *tiles])
    write_sheet(path, rows)


def _print(found: Sequence[dict[str, Any]]) -> None:
    for one in found:
        print(one["query"] + (": unknown" if one.get("unknown") else ""))
        for near in one["neighbours"]:
            print(f"  {near['rank']:3d}  {near['score']:.4f}  {near['path']}")


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
