"""Where a run's teacher outputs come from: the teacher itself, or a store that it fills."""

from __future__ import annotations

import argparse

from landmark_distill.data_loader import ViewLoader
from landmark_distill.head_kd import KDSettings
from landmark_distill.helpers import view_identity
from landmark_distill.landmark_data import LandmarkData
from landmark_distill.teacher import Live, Stored, Teacher
from shared_core.for_torch.distributed import World
from shared_core.runs import progress


def make_source(
    args: argparse.Namespace, teacher: Teacher | None, data: LandmarkData, world: World
) -> Live | Stored | None:
    """None without a teacher; live without ``--knowledge``; else stored."""
    if teacher is None:
        return None
    if args.knowledge is None:
        return Live(teacher)
    if data.train is None:
        raise ValueError("no training images whose teacher outputs could be stored")
    return Stored(
        args.knowledge,
        teacher,
        kind=args.knowledge_kind,
        keys=[str(key) for key in data.train.keys],
        view=view_identity(args),
        kd=KDSettings(args.kd_variant, args.kd_temperature),
        top_k=args.knowledge_top_k,
        writable=world.world_size == 1,
    )


def fill_store(source: Stored, loader: ViewLoader, *, views: int) -> int:
    """Store the teacher's outputs for every image in views ``0`` to ``views - 1``.

    Returns:
        How many the teacher had to look at; the others were stored before.
    """
    for view in range(views):
        loader.loader.order.set_epoch(view)
        label = f"teacher outputs, view {view + 1}/{views}"
        for batch in progress(loader, total=len(loader), label=label):
            source.fill(batch)
    loader.loader.order.set_epoch(0)
    source.close()
    return source.asked
