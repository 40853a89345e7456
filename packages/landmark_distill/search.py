"""Find the nearest images of a gallery for query images: table, JSON, CSV and a picture."""

# ruff: noqa: E402
from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]
if __name__ == "__main__":  # before torch: threads that hardly spin while they wait
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import csv
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from landmark_distill.contact_sheet import Tile, write_sheet
from landmark_distill.embed import add_model_options
from landmark_distill.embedder import Embedder, choose_device, list_images, load_embedder
from landmark_distill.feature_store import FeatureStore, open_store
from landmark_distill.search_exact import ENGINES, ExactIndex
from landmark_distill.search_faiss import KINDS, FaissIndex
from shared_core.checkpoints import atomic_write
from shared_core.datasets import ImageSet
from shared_core.runs import UsageError, run_command
from shared_core.runs.numbers import SIZE

SHEET_QUERIES, SHEET_NEIGHBOURS = 24, 8


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="search.py",
        description="The nearest images of a gallery, which embed.py made, for each query.",
        epilog="Exit code: 0, or 1 when a query could not be read (the others are answered).",
    )
    p.add_argument("gallery", type=Path, metavar="GALLERY", help="features of embed.py, .npy")
    p.add_argument(
        "query", type=Path, metavar="QUERY", help="an image, a folder, or features (.npy)"
    )
    p.add_argument("--model", type=Path, help="the network that made the gallery; for images")
    p.add_argument("--k", type=SIZE, default=10, help="neighbours (default 10)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the answers there as JSON")
    p.add_argument("--csv", type=Path, metavar="FILE", help="write a row a neighbour there")
    p.add_argument("--sheet", type=Path, metavar="FILE", help="draw queries and neighbours, .png")
    p.add_argument(
        "--index",
        choices=("exact", *KINDS),
        default="exact",
        help="exact (default), or FAISS; ivf and hnsw are for large galleries and may miss some",
    )
    p.add_argument("--engine", choices=ENGINES, help="how the exact search scans (default: auto)")
    p.add_argument("--probes", type=SIZE, help="of ivf and hnsw: more finds more (16)")
    add_model_options(p)
    return p


def embed_queries(
    embedder: Embedder, files: Sequence[Path], *, batch: int, threads: int
) -> tuple[NDArray[np.float32], list[Path], list[tuple[Path, str]]]:
    """Features ``(Q, D)`` of the readable files, these files, and the others with the reason."""
    images = ImageSet(list(files), [0] * len(files))
    loader = embedder.sight.loader(
        images, batch_size=batch, threads=threads, device=embedder.device, on_error="skip"
    )
    parts, kept = [], []
    for one in loader:
        parts.append(embedder(one.images))
        kept += [files[index] for index in one.indices.tolist()]
    bad = [(Path(skipped.name), skipped.reason) for skipped in loader.loader.skipped]
    if not parts:
        return np.zeros((0, embedder.width), np.float32), [], bad
    return np.concatenate(parts), kept, bad


def answers(
    gallery: FeatureStore, index: ExactIndex | FaissIndex, queries: NDArray[Any],
    names: Sequence[str], k: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """For each query its name and neighbours: rank from 1, row, path, score."""
    found = index.search(queries, k)
    return [
        {
            "query": name,
            "neighbours": [
                {"rank": rank, "row": row, "path": gallery.paths[row], "score": float(score)}
                for rank, (row, score) in enumerate(
                    zip(rows.tolist(), scores.tolist(), strict=True), start=1
                )
                if row >= 0 and math.isfinite(score)
            ],
        }
        for name, rows, scores in zip(names, found.indices, found.scores, strict=True)
    ]


def _queries(
    args: argparse.Namespace, gallery: FeatureStore
) -> tuple[NDArray[Any], list[str], list[Path | None], list[tuple[Path, str]]]:
    if args.query.suffix == ".npy":
        if args.model is not None:
            raise UsageError("--model is for images, the query is a file of features")
        store = open_store(args.query)
        _same_network(gallery, store.facts.get("weights"), args.query)
        pictures = [store.image(row) for row in range(len(store.features))]
        return store.features, list(store.paths), pictures, []
    if args.model is None:
        raise UsageError(f"{args.query} is no .npy file: expected --model MODEL to embed images")
    files, bad = list_images([args.query])
    if not files:
        raise FileNotFoundError(f"{bad[0][0]}: {bad[0][1]}")
    embedder = load_embedder(args.model, device=choose_device(args.device), bf16=args.bf16)
    _same_network(gallery, embedder.weights, args.model)
    features, files, unread = embed_queries(
        embedder, files, batch=args.batch, threads=args.num_workers
    )
    if not files:
        raise ValueError(f"no query can be read: {unread[0][0]}: {unread[0][1]}")
    return features, [str(path) for path in files], list(files), bad + unread


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
    if args.index != "exact" and args.engine is not None:
        raise UsageError(f"--engine is of the exact index, not of {args.index}")
    if args.index not in ("faiss-ivf", "faiss-hnsw") and args.probes is not None:
        raise UsageError(f"--probes is of faiss-ivf and faiss-hnsw, not of {args.index}")
    gallery = open_store(args.gallery)
    queries, names, pictures, bad = _queries(args, gallery)
    index: ExactIndex | FaissIndex
    if args.index == "exact":
        index = ExactIndex(gallery.features, engine=args.engine or "auto")
    else:
        index = FaissIndex(gallery.features, kind=args.index, probes=args.probes or 16)
    found = answers(gallery, index, queries, names, args.k)
    if args.json:
        content = {"gallery": str(args.gallery), "index": index.engine, "answers": found}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        atomic_write(args.json, lambda s: s.write_text(text, "utf-8", "surrogateescape"))
    if args.csv:
        atomic_write(args.csv, lambda scratch: _write_csv(scratch, found))
    if args.sheet:
        _draw(args.sheet, gallery, found, pictures)
    if not (args.json or args.csv or args.sheet):
        _print(found)
    else:
        print(f"{len(found)} queries among {len(index)} images ({index.engine})")
    for path, reason in bad:
        print(f"left out {path}: {reason}", file=sys.stderr)
    return 1 if bad else 0


def _write_csv(path: Path, found: Sequence[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "rank", "path", "score"])
        for one in found:
            for near in one["neighbours"]:
                writer.writerow([one["query"], near["rank"], near["path"], repr(near["score"])])


def _draw(
    path: Path, gallery: FeatureStore, found: Sequence[dict[str, Any]],
    pictures: Sequence[Path | None],
) -> None:  # fmt: skip
    rows = []
    for one, picture in list(zip(found, pictures, strict=True))[:SHEET_QUERIES]:
        near = one["neighbours"][:SHEET_NEIGHBOURS]
        tiles = [Tile(gallery.image(n["row"]), f"{n['score']:.3f}") for n in near]
        rows.append([Tile(picture, Path(one["query"]).name), *tiles])
    write_sheet(path, rows)


def _print(found: Sequence[dict[str, Any]]) -> None:
    for one in found:
        print(one["query"])
        for near in one["neighbours"]:
            print(f"  {near['rank']:3d}  {near['score']:.4f}  {near['path']}")


if __name__ == "__main__":
    sys.exit(run_command(main))
