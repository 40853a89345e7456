"""Store a finished teacher's answers, so that runs read them instead of running the teacher.

What main.py knows of data and augmentation it takes as well: give the words of the run that will
read the store. ``--views 0`` stores one answer an image, for the evaluation view; ``--views 4``
stores four, for the training views that a run with the same words and ``--knowledge-seed`` replays.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.runs import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Write the store; images that it has already are passed over. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="write_knowledge.py", description=__doc__, epilog="Other words: as for main.py."
    )
    parser.add_argument("--model", type=Path, required=True, help="a teacher_fold0.pdparams")
    parser.add_argument("--store", type=Path, required=True, help="folder of the store")
    parser.add_argument("--views", type=int, default=0, help="training views; 0: evaluation view")
    own, words = parser.parse_known_args(argv)
    if own.views < 0:
        parser.error(f"--views {own.views}: expected 0 or more")

    from shared_core.datasets import BatchLoader
    from shared_core.for_paddle.data import Normalizer
    from shared_core.knowledge import KnowledgeStore
    from shared_core.runs import progress
    from visiondistill_gc.config import parse
    from visiondistill_gc.utils.data_utils import EVAL_BATCH, prepare, train_view
    from visiondistill_gc.utils.model_files import check_categories, load_model
    from visiondistill_gc.utils.prediction import predict_logits
    from visiondistill_gc.utils.transforms import eval_view

    args = parse(words, prog="write_knowledge.py")
    args.output.mkdir(parents=True, exist_ok=True)
    data, loaded = prepare(args, args.output), load_model(own.model)
    check_categories(own.model, loaded.class_names, data.classes)
    view = train_view(args, seed=args.knowledge_seed) if own.views else eval_view(args.input_size)
    normalizer = Normalizer(loaded.mean, loaded.std)
    with KnowledgeStore.create(
        own.store,
        teacher_hash=loaded.facts["sha256"],
        classes=list(data.classes),
        view=view.settings(),
        dtype="float32",
    ) as store:
        for number in range(max(1, own.views)):
            loader = BatchLoader(
                data.images, view=view, batch_size=EVAL_BATCH, threads=args.num_workers
            )
            loader.order.set_epoch(number)  # the epoch is the view's number
            for batch in progress(loader, total=len(loader), label=f"view {number}"):
                logits = predict_logits(loaded.net, [batch], normalizer=normalizer).logits
                store.put([data.images.keys[i] for i in batch.indices], number, logits)
        print(f"{len(store)} answers for {len(data.images)} images in {own.store}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
