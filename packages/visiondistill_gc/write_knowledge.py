"""Store a finished teacher's answers, so that runs read them instead of running the teacher.

What main.py knows of data and augmentation it takes as well: give the words of the run that will
read the store. ``--views 0`` stores one answer an image, for the evaluation view; ``--views 4``
stores four, for the training views that a run with the same words and ``--knowledge-seed`` replays.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.runs import run_command
from shared_core.runs.numbers import COUNT
from shared_core.runs.options import CommandParser
from visiondistill_gc.options import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Write the store; images that it has already are passed over. Returns the exit code."""
    parser = CommandParser(
        prog="write_knowledge.py",
        description=__doc__,
        epilog="All other words are those of main.py.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FILE",
        help="The teacher, a teacher_fold0.pdparams.")  # fmt: skip
    add("--store", type=Path, required=True, metavar="DIR", help="The folder of the store.")
    add("--views", type=COUNT, default=0, metavar="N",
        help="How many training views of an image are answered; 0 answers the evaluation "
        "view.")  # fmt: skip
    own, words = parser.parse_known_args(argv)
    from visiondistill_gc.config import parse

    settings = parse(words, prog="write_knowledge.py")
    count, images = store_answers(settings, own.model, own.store, views=own.views)
    print(f"{count} answers for {images} images in {own.store}")
    return 0


def store_answers(settings: Settings, model: Path, folder: Path, *, views: int) -> tuple[int, int]:
    """Answer every image of the folds.

    Args:
        settings: of the run that will read the store; its data are prepared in its folder.
        model: the teacher's file.
        views: training views of an image; 0 for the evaluation view.

    Returns:
        How many answers the store holds, and of how many images.

    Raises:
        ValueError: another process works in the run's folder, or the teacher has other classes.
    """
    from shared_core.knowledge import KnowledgeStore
    from shared_core.runs import RunLock, progress
    from visiondistill_gc.utils.data_utils import prepare, train_view
    from visiondistill_gc.utils.model_files import check_categories, load_model
    from visiondistill_gc.utils.transforms import eval_view

    output, loaded = settings.run.output, load_model(model)
    output.mkdir(parents=True, exist_ok=True)
    with RunLock(output):
        data = prepare(settings, output)
    check_categories(model, loaded.class_names, data.classes)
    seed = settings.teacher.knowledge_seed
    view: Any = eval_view(settings.data.input_size)
    if views:
        view = train_view(settings, seed=seed)
    with KnowledgeStore.create(
        folder,
        teacher_hash=loaded.facts["sha256"],
        classes=list(data.classes),
        view=view.settings(),
        dtype="float32",
    ) as store:
        for number in range(max(1, views)):
            batches = _batches(data.images, view, number, threads=settings.data.workers)
            for batch in progress(batches, total=len(batches), label=f"view {number}"):
                keys = [data.images.keys[i] for i in batch.indices]
                store.put(keys, number, loaded.logits(batch.images))
        return len(store), len(data.images)


def _batches(images: Any, view: Any, number: int, *, threads: int) -> Any:
    """Every image in order, in view ``number``."""
    from shared_core.datasets import BatchLoader
    from visiondistill_gc.utils.data_utils import EVAL_BATCH

    loader = BatchLoader(images, view=view, batch_size=EVAL_BATCH, threads=threads)
    loader.order.set_epoch(number)  # the epoch is the view's number
    return loader


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
