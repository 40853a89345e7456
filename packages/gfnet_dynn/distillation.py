"""Teaching a smaller GFNet: cross-entropy + KD + norm-and-direction + spectrum.

The projectors that these losses need belong to :class:`DistillationLoss`, never to the student:
a student's file is the plain student.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfnet_dynn.spectrum import spectrum_loss
from shared_core.for_torch.losses import kd_kl


class Projector(nn.Sequential):
    """Student embedding to the teacher's width: BatchNorm1d, Dropout, Linear."""

    def __init__(self, student_dim: int, teacher_dim: int, *, dropout: float = 0.5):
        super().__init__(
            nn.BatchNorm1d(student_dim),
            nn.Dropout(dropout),
            nn.Linear(student_dim, teacher_dim),
        )


class ClassCentres:
    """Mean embedding of every class, streamed: one update a batch, float64 sums."""

    def __init__(self, num_classes: int, dim: int):
        self.sums = torch.zeros(num_classes, dim, dtype=torch.float64)
        self.counts = torch.zeros(num_classes, dtype=torch.int64)

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add a batch: ``(N, D)`` embeddings and int64 ``(N,)`` labels, on any device."""
        labels = labels.cpu()
        self.sums.index_add_(0, labels, embeddings.detach().cpu().double())
        self.counts += torch.bincount(labels, minlength=len(self.counts))

    def result(self) -> Tensor:
        """float32 ``(K, D)``.

        Raises:
            ValueError: a class has had no sample.
        """
        empty = torch.nonzero(self.counts == 0).flatten().tolist()
        if empty:
            raise ValueError(f"no samples of class {empty[0]}; expected one or more of each class")
        return (self.sums / self.counts[:, None]).float()


@torch.no_grad()
def class_centres(
    teacher: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, num_classes: int
) -> Tensor:
    """Class centres of a teacher over one pass of the training set, in eval mode.

    Args:
        teacher: ``teacher(images, embed=True) -> (embedding (N, D), logits)``.
        batches: ``(images, labels)``, images normalised and on the teacher's device. Use
            evaluation views, so that the centres do not depend on augmentation.

    Returns:
        float32 ``(K, D)`` on the CPU.
    """
    was_training = teacher.training
    teacher.eval()
    centres = None
    try:
        for images, labels in batches:
            embedding, _ = teacher(images, embed=True)
            if centres is None:
                centres = ClassCentres(num_classes, embedding.shape[1])
            centres.update(embedding, labels)
    finally:
        teacher.train(was_training)
    if centres is None:
        raise ValueError("no batches to take class centres from; expected one or more")
    return centres.result()


def nd_loss(
    projected: Tensor, teacher_embedding: Tensor, targets: Tensor, centres: Tensor
) -> Tensor:
    """Norm-and-direction loss: ``mean(1 - <f_S, c/|c|> / max(|f_S|, |f_T|))``.

    0 exactly where the student's embedding points to its class centre and is at least as long as
    the teacher's; at most 2.

    Args:
        projected: f_S, the student's projected embedding ``(N, D)``; gradient flows here only.
        teacher_embedding: f_T, ``(N, D)``.
        targets: int64 ``(N,)``, or class shares ``(N, K)`` whose mixed centre is the direction.
        centres: c, ``(K, D)``.

    Source: Improving Knowledge Distillation via Regularizing Feature Norm and Direction,
    arXiv 2305.17007, section 3.
    """
    centres = centres.to(projected.device, torch.float32)
    chosen = centres[targets] if targets.ndim == 1 else targets.float() @ centres
    direction = F.normalize(chosen, dim=1)
    projected = projected.float()
    longest = torch.maximum(
        projected.norm(dim=1), teacher_embedding.detach().float().norm(dim=1)
    ).clamp_min(torch.finfo(torch.float32).tiny)
    return (1 - (projected * direction).sum(dim=1) / longest).mean()


def matched_blocks(student_depth: int, teacher_depth: int, count: int) -> list[tuple[int, int]]:
    """``count`` pairs ``(student block, teacher block)`` at equal relative depth, rising."""
    if not 1 <= count <= min(student_depth, teacher_depth):
        raise ValueError(
            f"{count} matched blocks for depths {student_depth} and {teacher_depth}; "
            f"expected 1 to {min(student_depth, teacher_depth)}"
        )

    def places(depth: int) -> list[int]:
        return [(i + 1) * depth // count - 1 for i in range(count)]

    return list(zip(places(student_depth), places(teacher_depth), strict=True))


@contextmanager
def block_outputs(model: nn.Module, blocks: Sequence[int]) -> Iterator[list[Tensor]]:
    """Inside, each forward of ``model`` leaves the tokens after ``blocks`` in the yielded list."""
    found: dict[int, Tensor] = {}
    outputs: list[Tensor] = []

    def hook_of(index: int):
        def hook(_module, _inputs, output):
            found[index] = output
            if len(found) == len(set(blocks)):
                outputs[:] = [found[i] for i in blocks]

        return hook

    stack = getattr(model, "module", model).blocks  # a data-parallel wrapper hides the blocks
    handles = [stack[i].register_forward_hook(hook_of(i)) for i in sorted(set(blocks))]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class DistillationLoss(nn.Module):
    """``CE + kd * ramp * KD(T) + nd * ND + spectrum * Spec``, each weight a number.

    ``ramp = min(1, epoch / warm_up)`` with epochs counted from 1. Train its parameters with the
    student's, and save its state with the run, not with the student.

    Args:
        student_dim, teacher_dim: widths of the embeddings.
        centres: ``(K, teacher_dim)`` of :func:`class_centres`; needed when ``nd`` > 0.
        kd, nd, spectrum: weights, 0 or more.
        temperature: of the KD term.
        warm_up: epochs until the KD term has its full weight; 0 for at once.
        pairs: ``(student block, teacher block)`` for the spectrum term.
        phase: weight of the phase inside the spectrum term.
        label_smoothing: of the cross-entropy, fraction in [0, 1).

    Source: total loss of the norm-and-direction paper, arXiv 2305.17007; KD: Hinton et al. 2015,
    arXiv 1503.02531; the spectrum term is ours.
    """

    def __init__(
        self,
        *,
        student_dim: int,
        teacher_dim: int,
        centres: Tensor | None = None,
        kd: float = 1.0,
        nd: float = 2.0,
        spectrum: float = 0.0,
        temperature: float = 4.0,
        warm_up: float = 0.0,
        pairs: Sequence[tuple[int, int]] = (),
        phase: float = 0.0,
        label_smoothing: float = 0.0,
        dropout: float = 0.5,
    ):
        super().__init__()
        for name, weight in {"kd": kd, "nd": nd, "spectrum": spectrum, "warm_up": warm_up}.items():
            if not weight >= 0:
                raise ValueError(f"{name} of the distillation is {weight}; expected 0 or more")
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; expected more than 0")
        if nd and (centres is None or centres.ndim != 2 or centres.shape[1] != teacher_dim):
            got = None if centres is None else tuple(centres.shape)
            raise ValueError(f"class centres have shape {got}; expected (K, {teacher_dim})")
        if spectrum and not pairs:
            raise ValueError("a spectrum loss without matched blocks; expected one pair or more")
        self.kd, self.nd, self.spectrum = kd, nd, spectrum
        self.temperature, self.warm_up, self.phase = temperature, warm_up, phase
        self.label_smoothing = label_smoothing
        self.pairs = tuple(pairs) if spectrum else ()
        self.register_buffer("centres", centres.clone() if nd else None)
        self.projector = Projector(student_dim, teacher_dim, dropout=dropout) if nd else None
        self.block_projectors = nn.ModuleList(
            nn.Linear(student_dim, teacher_dim, bias=False) for _ in self.pairs
        )

    @property
    def student_blocks(self) -> list[int]:
        return [pair[0] for pair in self.pairs]

    @property
    def teacher_blocks(self) -> list[int]:
        return [pair[1] for pair in self.pairs]

    def ramp(self, epoch: float) -> float:
        """Share of the KD weight in ``epoch``, counted from 1."""
        return min(1.0, epoch / self.warm_up) if self.warm_up else 1.0

    def forward(
        self,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor],
        targets: Tensor,
        *,
        epoch: float,
        student_tokens: Sequence[Tensor] = (),
        teacher_tokens: Sequence[Tensor] = (),
        grid: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """The total under ``loss`` and every part that is in use, unweighted, under its name.

        Args:
            student, teacher: ``(embedding (N, D), logits (N, K))``.
            targets: int64 ``(N,)`` or class shares ``(N, K)`` (mixup).
            epoch: counted from 1.
            student_tokens, teacher_tokens: a tensor ``(N, h*w, C)`` for each pair.
            grid: ``(h, w)`` of the tokens.
        """
        embedding, logits = student
        teacher_embedding, teacher_logits = teacher
        losses = {
            "ce": F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing)
        }
        total = losses["ce"]
        if self.kd:
            losses["kd"] = kd_kl(
                logits.float(), teacher_logits.float(), temperature=self.temperature
            )
            total = total + self.kd * self.ramp(epoch) * losses["kd"]
        if self.nd:
            projected = self.projector(embedding.float())
            losses["nd"] = nd_loss(projected, teacher_embedding, targets, self.centres)
            total = total + self.nd * losses["nd"]
        if self.spectrum:
            if grid is None or not len(student_tokens) == len(teacher_tokens) == len(self.pairs):
                raise ValueError(
                    f"{len(student_tokens)} student and {len(teacher_tokens)} teacher token maps "
                    f"on grid {grid}; expected {len(self.pairs)} of each and a grid"
                )
            terms = [
                spectrum_loss(project(s.float()), t, grid, phase=self.phase)
                for project, s, t in zip(
                    self.block_projectors, student_tokens, teacher_tokens, strict=True
                )
            ]
            losses["spectrum"] = torch.stack(terms).mean()
            total = total + self.spectrum * losses["spectrum"]
        return {"loss": total, **losses}


def freeze_teacher(teacher: nn.Module) -> nn.Module:
    """Put a teacher into eval mode and let nothing in it learn."""
    return teacher.eval().requires_grad_(False)


def distillation_losses(
    criterion: DistillationLoss,
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    epoch: float,
    grid: tuple[int, int] | None = None,
    teacher_images: Tensor | None = None,
) -> dict[str, Tensor]:
    """Both forwards and the losses of one batch; the caller does backward and step.

    Args:
        student, teacher: ``model(images, embed=True) -> (embedding, logits)`` with ``blocks``.
        images: ``(N, 3, H, W)`` normalised; ``teacher_images`` where the teacher sees others.
        grid: ``(h, w)`` in tokens, needed with a spectrum term.

    Raises:
        ValueError: the teacher is in training mode.
    """
    if teacher.training:
        raise ValueError("the teacher is in training mode; expected eval (freeze_teacher)")
    with torch.no_grad(), block_outputs(teacher, criterion.teacher_blocks) as teacher_tokens:
        seen = teacher(images if teacher_images is None else teacher_images, embed=True)
    with block_outputs(student, criterion.student_blocks) as student_tokens:
        learned = student(images, embed=True)
    return criterion(
        learned,
        seen,
        targets,
        epoch=epoch,
        student_tokens=student_tokens,
        teacher_tokens=teacher_tokens,
        grid=grid,
    )
