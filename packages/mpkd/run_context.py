"""What every stage of a run needs, and the trainings that stages have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mpkd.dataset import data_utils
from mpkd.dataset.data_utils import CALIBRATION, TEST, TRAIN, Data, SightLoader
from mpkd.deploy.openvino_net import OpenVinoNet
from mpkd.model.networks import PLAIN, Sight, sight_of
from mpkd.trainer.knowledge import store_outputs
from mpkd.trainer.metrics_logger import MetricsLogger
from mpkd.trainer.objectives import LiveTeacher, Objective, StoredTeacher, TeacherSource
from mpkd.trainer.settings import Settings, precision_from
from mpkd.trainer.trainer import Job, Trainer
from mpkd.utils.common import ALONE, Evaluation, evaluate, save_net
from mpkd.utils.seed import seed_stage, stage_seed
from shared_core.datasets import ImageSet
from shared_core.for_torch.checkpoints import weights_sha256
from shared_core.for_torch.distributed import World, barrier, main_writes
from shared_core.for_torch.precision import Precision
from shared_core.for_torch.run_state import Best
from shared_core.knowledge import KnowledgeStore
from shared_core.runs import StageLog, UsageError

T = TypeVar("T")
TEACHER_FILE, STUDENT_FILE = "teacher.pth", "student.pth"
QUANTIZED_FILE, ADAPTER_FILE = "student_quantized.pth", "adapters.pth"
PACKED_FILE = "student_packed.safetensors"  # weights of few bits, several to a byte


@dataclass(frozen=True)
class Run:
    """One run of the pipeline.

    Attributes:
        config: values by dotted key.
        data: the images.
        folder: the run's.
        log, csv: what is said and measured.
        device, world: where, and in how many processes.
        scale: ``full``, ``short`` or ``rehearsal``.
        command: as the user typed it.
        knowledge: where the teacher's outputs lie already; None: this run makes them.
    """

    config: dict[str, Any]
    data: Data
    folder: Path
    log: StageLog
    csv: MetricsLogger
    device: torch.device
    world: World = ALONE
    scale: str = "full"
    command: str = "packages/mpkd/main.py"
    knowledge: Path | None = None

    @property
    def seed(self) -> int:
        """The run's."""
        return int(self.config["experiment.seed"])

    @property
    def view_seed(self) -> int:
        """Decides augmentation; the same for all seeds, so that they share a teacher's outputs."""
        return stage_seed(0, "views")

    def checkpoint(self, name: str) -> Path:
        """A file among the run's checkpoints."""
        return self.folder / "checkpoints" / name

    def from_main(self, work: Callable[[], T]) -> T:
        """Do it in the main process; every process gets the result."""
        return main_writes(work, self.world)

    def save(
        self,
        name: str,
        net: nn.Module,
        about: Mapping[str, Any],
        *,
        epoch: int,
        metrics: Mapping[str, Any],
        quantization: Mapping[str, Any] | None = None,
    ) -> str:
        """Write a network among the run's checkpoints (main process); its sha256."""
        if self.world.is_main:
            save_net(
                self.checkpoint(name), net.state_dict(), about, classes=self.data.classes,
                split_hash=self.data.split_hash, epoch=epoch, metrics=metrics, config=self.config,
                quantization=quantization,
            )  # fmt: skip
        barrier(self.world)
        return weights_sha256(net.state_dict())

    def precision(self, net: nn.Module) -> Precision:
        """A new state of mixed precision, for the side that ``net`` sees."""
        side = sight_of(net).side or self.data.image_size
        return precision_from(self.config, self.device, side=side)

    def begin(self, *purpose: str | int) -> None:
        """Seed the global generators for what follows."""
        seed_stage(self.seed, *purpose)

    # -- loaders ----------------------------------------------------------------------------------

    def training_loader(
        self,
        purpose: str,
        images: ImageSet | None = None,
        *,
        batch_size: int | None = None,
        replayed: int = 0,
        sight: Sight = PLAIN,
    ) -> SightLoader:
        """Shuffled, augmented training batches; views ``0 .. replayed - 1`` in turn if not 0."""
        return data_utils.training_loader(
            self.data, self.data.sets[TRAIN] if images is None else images,
            batch_size=batch_size or self.config["experiment.batch_size"],
            augment=self.config["dataset.augment"], seed=self.seed, view_seed=self.view_seed,
            purpose=purpose, device=self.device, threads=self.config["dataset.workers"],
            rank=self.world.rank, world_size=self.world.world_size, sight=sight,
            view_of_epoch=(lambda epoch: epoch % replayed) if replayed else None,
        )  # fmt: skip

    def evaluation_loader(
        self, part: str = CALIBRATION, *, shared: bool = True, sight: Sight = PLAIN
    ) -> SightLoader:
        """Every image of a part once, in order; shared out among the processes if ``shared``."""
        share = {"rank": self.world.rank, "world_size": self.world.world_size} if shared else {}
        batch_size = max(64, self.config["experiment.batch_size"])
        return data_utils.evaluation_loader(
            self.data, self.data.sets[part], batch_size=batch_size,
            device=self.device, threads=self.config["dataset.workers"], sight=sight, **share,
        )  # fmt: skip

    def evaluate(self, net: nn.Module, part: str = TEST) -> Evaluation:
        """Answers in fp32 to a part, by all processes together."""
        return evaluate(net, self.evaluation_loader(part, sight=sight_of(net)), world=self.world)

    def _calibration_loader(self, count: int | None, sight: Sight) -> SightLoader:
        wanted = int(count or self.config["quantization.calib_samples"])
        images = self.data.sets[TRAIN]
        step = max(1, len(images) // wanted)
        rows = np.arange(0, len(images), step)[:wanted]
        return data_utils.evaluation_loader(
            self.data, images.subset(rows), batch_size=64, device=self.device,
            threads=self.config["dataset.workers"], sight=sight,
        )  # fmt: skip

    def calibration_images(self, count: int | None = None, *, sight: Sight = PLAIN) -> list[Tensor]:
        """Batches of training images as evaluation sees them, on the device, without labels."""
        return [batch.images.clone() for batch in self._calibration_loader(count, sight)]

    def calibration_pixels(self) -> npt.NDArray[np.uint8]:
        """The same images uint8 ``(N, S, S, 3)``."""
        loader = self._calibration_loader(None, PLAIN).loader
        return np.concatenate([batch.images.copy() for batch in loader])

    # -- teachers ---------------------------------------------------------------------------------

    def teacher_source(
        self, teacher: nn.Module, teacher_hash: str, images: ImageSet, *, seen: Sight = PLAIN
    ) -> tuple[TeacherSource, int]:
        """The teacher's logits for training, stored or live, and how many views are replayed.

        Args:
            seen: how the student sees the images.
        """
        engine = self.teacher_engine(teacher)
        if not self.config["distillation.cache_teacher_logits"]:
            autocast = self.precision(teacher).autocast
            return LiveTeacher(engine, autocast=autocast, seen=seen), 0
        if self.knowledge is None:
            self.fill_knowledge(engine, teacher_hash, images)
        folder = self.knowledge or self.folder / "knowledge"
        store = KnowledgeStore.open(folder, teacher_hash=teacher_hash)
        keys = [str(key) for key in images.keys]
        return StoredTeacher(store, keys, device=self.device), self._views

    def teacher_says(self, teacher: nn.Module, teacher_hash: str) -> npt.NDArray[np.int64]:
        """The class that the teacher gives each training image: of the first stored view, or now.

        No label is read.
        """
        train = self.data.sets[TRAIN]
        if not self.config["distillation.cache_teacher_logits"]:
            return self.evaluate(teacher, TRAIN).logits.argmax(axis=1)
        images = self.data.learning_set(unlabelled=True)
        source, _ = self.teacher_source(teacher, teacher_hash, images)
        assert isinstance(source, StoredTeacher)
        return source.store.get([str(key) for key in train.keys], 0).argmax(axis=1)

    @property
    def _views(self) -> int:
        """Augmented views of an image whose teacher outputs are kept."""
        return int(self.config["distillation.views"]) if self.config["dataset.augment"] else 1

    def fill_knowledge(self, engine: nn.Module, teacher_hash: str, images: ImageSet) -> None:
        """Store the teacher's outputs for every view of ``images``, those that are missing."""
        self.from_main(lambda: store_outputs(
            self.folder / "knowledge", engine, self.data, images, views=self._views,
            teacher_hash=teacher_hash, augment=self.config["dataset.augment"],
            seed=self.view_seed, device=self.device,
            batch_size=max(64, self.config["experiment.batch_size"]),
            threads=self.config["dataset.workers"], precision=self.precision(engine),
        ))  # fmt: skip

    def teacher_engine(self, teacher: nn.Module) -> nn.Module:
        """What computes the teacher's logits by ``distillation.teacher_engine``: it, or a twin.

        The twin uses as many threads as torch, and bf16 where torch would compute in it.
        """
        if self.config["distillation.teacher_engine"] == "torch":
            return teacher
        check_engine_device(self.config, self.device)
        sight = sight_of(teacher)
        twin = OpenVinoNet(
            teacher, image_size=sight.side or self.data.image_size,
            threads=torch.get_num_threads(),
            precision="bf16" if self.precision(teacher).dtype == "bf16" else "f32",
        )  # fmt: skip
        twin.sight = sight  # type: ignore[assignment]
        return twin

    def reference(self, teacher: nn.Module) -> npt.NDArray[np.float32]:
        """The teacher's logits for the calibration images."""
        return self.evaluate(teacher, CALIBRATION).logits

    # -- training ---------------------------------------------------------------------------------

    def fit(
        self,
        stage: str,
        net: nn.Module,
        objective: Objective,
        *,
        settings: Settings,
        loader: SightLoader,
        reference: npt.NDArray[np.float32] | None = None,
        choose_by: str = "accuracy",
        **more: Any,
    ) -> tuple[Best, Trainer]:
        """Train ``net`` and keep the best epoch's weights in it.

        Args:
            reference: a teacher's logits for the calibration images.
            choose_by: ``accuracy``, ``agreement`` with ``reference`` (no label is read), or
                ``last``.
            more: further attributes of :class:`~mpkd.trainer.trainer.Job`.

        Returns:
            The best weights, and the trainer: call ``trainer.state.remove()`` when the stage's
            result is written.
        """  # fmt: skip
        if choose_by == "agreement":
            if reference is None:
                raise ValueError("no teacher's logits to agree with, expected some")
            more["score"] = lambda found: found.agreement(reference)
        elif choose_by == "last":
            more["score"] = None
        job = Job(
            stage=stage, net=net, objective=objective, loader=loader,
            validation=self.evaluation_loader(CALIBRATION, sight=sight_of(net)),
            settings=settings, precision=self.precision(net), log=self.log, csv=self.csv,
            world=self.world, reference=reference, **more,
        )  # fmt: skip
        trainer = Trainer(job)
        best = trainer.run()
        net.load_state_dict(best.weights)
        return best, trainer


def check_engine_device(config: Mapping[str, Any], device: torch.device) -> None:
    """Refuse an engine that does not compute where the run does.

    Raises:
        UsageError: OpenVINO on another device than the CPU.
    """
    if config["distillation.teacher_engine"] == "openvino" and device.type != "cpu":
        raise UsageError(
            f"distillation.teacher_engine openvino computes on the CPU, this run on {device}: "
            "expected experiment.device=cpu, or distillation.teacher_engine=torch"
        )
