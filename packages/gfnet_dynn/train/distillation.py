"""Teaching a smaller GFNet: cross-entropy + KD + norm-and-direction + spectrum.

The projectors that these losses need belong to :class:`DistillationTask`, never to the student:
a student's file is the plain student.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gfnet_dynn.settings import Distillation
from gfnet_dynn.train.finetune import Task
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

    handles = [model.blocks[i].register_forward_hook(hook_of(i)) for i in sorted(set(blocks))]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def half_spectrum_weights(width: int) -> Tensor:
    """How often each column of a half spectrum stands in the full one, float32 ``(width//2+1,)``.

    1 for the DC column and, at even width, for the Nyquist column; 2 for the others, whose mirror
    images rfft2 leaves out. With them sums over the half spectrum are sums over the full one.
    """
    if width < 1:
        raise ValueError(f"width is {width}; expected 1 or more tokens")
    weights = torch.full((width // 2 + 1,), 2.0)
    weights[0] = 1.0
    if width % 2 == 0:
        weights[-1] = 1.0
    return weights


def half_spectrum(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Orthonormal rfft2 over the token grid, complex64 ``(N, h, w//2+1, C)``.

    Parseval: ``sum(weights * |X|^2) == sum(tokens^2)`` with :func:`half_spectrum_weights`.

    Args:
        tokens: ``(N, h*w, C)``, row-major.
        grid: ``(h, w)`` in tokens.
    """
    h, w = grid
    if tokens.ndim != 3 or tokens.shape[1] != h * w:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; expected (N, {h}*{w}, C)")
    image = tokens.float().unflatten(1, (h, w))
    return torch.fft.rfft2(image, dim=(1, 2), norm="ortho")


def spectrum_loss(student_tokens: Tensor, teacher_tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Relative L1 distance of the amplitude spectra: the teacher's energy at each frequency.

    ``sum w ||F_S| - |F_T|| / sum w |F_T|``; F is the half spectrum and w its weights. 0 for equal
    tokens, 1 for a student of zeros. This definition is ours: the original speaks of
    frequency-domain distillation and shows no loss on spectra.

    Args:
        student_tokens: ``(N, h*w, C)``, projected to the teacher's C; gradient flows here only.
        teacher_tokens: ``(N, h*w, C)``.
        grid: ``(h, w)`` in tokens.

    Returns:
        A scalar, unitless.
    """
    if student_tokens.shape != teacher_tokens.shape:
        raise ValueError(
            f"student tokens have shape {tuple(student_tokens.shape)}; "
            f"expected the teacher's {tuple(teacher_tokens.shape)}"
        )
    student = half_spectrum(student_tokens, grid)
    teacher = half_spectrum(teacher_tokens.detach(), grid)
    weights = half_spectrum_weights(grid[1]).to(student_tokens.device)[:, None]  # (w//2+1, 1)
    scale = (weights * teacher.abs()).sum().clamp_min(torch.finfo(torch.float32).tiny)
    return (weights * (student.abs() - teacher.abs()).abs()).sum() / scale


class DistillationTask(Task):
    """``label * CE + kd * ramp * KD(T) + nd * ND + spectrum * Spec``, each weight a number.

    ``ramp = min(1, epoch / kd_warmup)`` with epochs counted from 1. The teacher is no part of this
    module: nothing of it learns, is saved, or changes its mode. Where its answers are stored it is
    not asked; KD then is all that it can teach.

    Args:
        student: ``model(images, embed=True) -> (embedding (N, D), logits (N, K))`` with ``blocks``.
        teacher: the same, in eval mode; see :func:`freeze_teacher`. None where every batch brings
            its stored answers.
        centres: ``(K, teacher's D)`` of :func:`class_centres`; needed with ``nd_weight``.
        pairs: ``(student block, teacher block)`` for the spectrum term; needed with its weight.
        smoothing: of the labels, fraction in [0, 1).

    Raises:
        ValueError: what a weight needs is missing, or a teacher in training mode.

    Source: total loss of the norm-and-direction paper, arXiv 2305.17007; KD: Hinton et al. 2015,
    arXiv 1503.02531; the spectrum term is ours.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        settings: Distillation,
        *,
        centres: Tensor | None = None,
        pairs: Sequence[tuple[int, int]] = (),
        smoothing: float = 0.0,
        dropout: float = 0.5,
    ):
        super().__init__()
        if teacher is None and (settings.nd_weight or settings.spectrum_weight):
            raise ValueError(
                "stored answers hold no tokens; expected weights of 0 for nd, spectrum"
            )
        dims = student.embed_dim, student.embed_dim if teacher is None else teacher.embed_dim
        if teacher is not None and teacher.training:
            raise ValueError("the teacher is in training mode; expected eval (freeze_teacher)")
        if settings.nd_weight and (centres is None or centres.shape[1:] != dims[1:]):
            got = None if centres is None else tuple(centres.shape)
            raise ValueError(f"class centres have shape {got}; expected (K, {dims[1]})")
        if settings.spectrum_weight and not pairs:
            raise ValueError("a spectrum loss without matched blocks; expected one pair or more")
        self.model, self.settings, self.smoothing = student, settings, smoothing
        self.__dict__["teacher"] = teacher  # not registered: no part of this module
        self.pairs = tuple(pairs) if settings.spectrum_weight else ()
        self.register_buffer("centres", centres.clone() if settings.nd_weight else None)
        self.projector = Projector(*dims, dropout=dropout) if settings.nd_weight else None
        self.block_projectors = nn.ModuleList(nn.Linear(*dims, bias=False) for _ in self.pairs)

    def ramp(self, epoch: float) -> float:
        """Share of the KD weight in ``epoch``, counted from 1."""
        return min(1.0, epoch / self.settings.kd_warmup) if self.settings.kd_warmup else 1.0

    def forward(
        self, images: Tensor, targets: Tensor, epoch: float, answers: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The total under ``loss`` and every part that is in use, unweighted, under its name."""
        blocks = [pair[1] for pair in self.pairs]
        if self.teacher is None:
            assert answers is not None
            teacher_tokens, teacher_embedding, teacher_logits = [], None, answers
        else:
            with torch.no_grad(), block_outputs(self.teacher, blocks) as teacher_tokens:
                teacher_embedding, teacher_logits = self.teacher(images, embed=True)
        with block_outputs(self.model, [pair[0] for pair in self.pairs]) as tokens:
            embedding, logits = self.model(images, embed=True)
        weights, logits = self.settings, logits.float()
        parts = {"ce": F.cross_entropy(logits, targets, label_smoothing=self.smoothing)}
        total = weights.label_weight * parts["ce"]
        if weights.kd_weight:
            parts["kd"] = kd_kl(logits, teacher_logits.float(), temperature=weights.kd_temperature)
            total = total + weights.kd_weight * self.ramp(epoch) * parts["kd"]
        if weights.nd_weight:
            projected = self.projector(embedding.float())
            parts["nd"] = nd_loss(projected, teacher_embedding, targets, self.centres)
            total = total + weights.nd_weight * parts["nd"]
        if weights.spectrum_weight:
            terms = [
                spectrum_loss(project(mine.float()), theirs, self.model.grid)
                for project, mine, theirs in zip(
                    self.block_projectors, tokens, teacher_tokens, strict=True
                )
            ]
            parts["spectrum"] = torch.stack(terms).mean()
            total = total + weights.spectrum_weight * parts["spectrum"]
        return {"loss": total, **parts}


def freeze_teacher(teacher: nn.Module) -> nn.Module:
    """Put a teacher into eval mode and let nothing in it learn."""
    return teacher.eval().requires_grad_(False)
