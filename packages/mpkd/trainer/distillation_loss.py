"""What a student loses to its teacher: five measures by name, none of which sees a label.

Every function takes student and teacher logits, float ``(N, C)``, computes in float32 (also under
autocast), sends gradients to the student only, and returns a scalar averaged over the batch.
``DistillationLoss`` chooses one by name. ``MixedLoss`` adds the labels: it exists as the baseline
that teacher-only distillation is compared with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_core.for_torch.losses import js_divergence, kd_kl, mse_logits

LOSSES = ("kl", "mse_logits", "js", "dkd", "dist")


def decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Decoupled distillation: the target class against the rest, and the rest among themselves.

    ``T^2 * (alpha * KL(b_t || b_s) + beta * KL(r_t || r_s))``, where ``b`` is the pair of
    probabilities (target, all others) and ``r`` the distribution over the others alone. The paper
    takes the label as the target. Here it is the class that the *teacher* ranks first, so that no
    label enters; where the teacher is right the two are the same.

    Args:
        temperature: ``T > 0``.
        alpha, beta: weights of the two parts, at least 0.

    Source: Zhao et al. 2022, arXiv:2203.08679, equations 4 to 7.
    """
    student, teacher = student_logits / temperature, teacher_logits.detach() / temperature
    target = teacher.argmax(dim=1, keepdim=True)
    log_s, log_t = F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)
    hidden = torch.zeros_like(student, dtype=torch.bool).scatter_(1, target, True)

    def pair(logits: Tensor, log_p: Tensor) -> Tensor:
        """Logarithms of (target, all others); the second without cancellation."""
        rest = torch.logsumexp(logits.masked_fill(hidden, -torch.inf), dim=1, keepdim=True)
        return torch.cat(
            [log_p.gather(1, target), rest - torch.logsumexp(logits, dim=1, keepdim=True)], dim=1
        )

    pair_s, pair_t = pair(student, log_s), pair(teacher, log_t)
    target_part = (pair_t.exp() * (pair_t - pair_s)).sum(dim=1).mean()
    others_s = F.log_softmax(student.masked_fill(hidden, -torch.inf), dim=1)
    others_t = F.log_softmax(teacher.masked_fill(hidden, -torch.inf), dim=1)
    # The target's entry is -inf in both; its share of the sum is 0.
    terms = others_t.exp() * (others_t - others_s).masked_fill(hidden, 0.0)
    rest_part = terms.sum(dim=1).mean()
    return (alpha * target_part + beta * rest_part) * temperature**2


def _correlation(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along ``dim``; 0 where one side is constant."""
    first = first - first.mean(dim=dim, keepdim=True)
    second = second - second.mean(dim=dim, keepdim=True)
    return F.cosine_similarity(first, second, dim=dim, eps=1e-8)


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> Tensor:
    """DIST: the student's probabilities shall correlate with the teacher's, not equal them.

    ``T^2 * (beta * (1 - mean over images of r) + gamma * (1 - mean over classes of r))`` with
    Pearson's ``r`` of the softened probabilities along the classes and along the batch.

    Args:
        temperature: ``T > 0``.
        beta, gamma: weights of the relations within an image and within a class, at least 0.

    Source: Huang et al. 2022, arXiv:2205.10536, equations 7 to 10.
    """
    p = F.softmax(student_logits / temperature, dim=1)
    q = F.softmax(teacher_logits.detach() / temperature, dim=1)
    between = 1 - _correlation(p, q, dim=1).mean()
    within = 1 - _correlation(p, q, dim=0).mean()
    return (beta * between + gamma * within) * temperature**2


class DistillationLoss(nn.Module):
    """One of ``LOSSES`` by name; the labels are not an argument.

    Args:
        name: ``kl`` (``T^2`` times KL at temperature ``T``), ``mse_logits``, ``js``
            (Jensen-Shannon divergence of the softened probabilities), ``dkd`` or ``dist``.
        temperature: ``T > 0``; ``mse_logits`` has none and refuses another than 1.

    Raises:
        ValueError: unknown name, or a temperature that does not fit.
    """

    def __init__(self, name: str = "kl", *, temperature: float = 4.0) -> None:
        super().__init__()
        if name not in LOSSES:
            raise ValueError(f"distillation loss {name!r}: expected one of {', '.join(LOSSES)}")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected more than 0")
        if name == "mse_logits" and temperature != 1:
            raise ValueError(
                f"temperature is {temperature}, expected 1: mse_logits compares the logits as "
                "they are"
            )
        self.name, self.temperature = name, float(temperature)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The loss in nats (``mse_logits``: squared logits; ``dist``: correlation)."""
        student, teacher = student_logits.float(), teacher_logits.detach().float()
        if student.shape != teacher.shape:
            raise ValueError(
                f"teacher logits have shape {tuple(teacher.shape)}, expected the student's "
                f"{tuple(student.shape)}"
            )
        t = self.temperature
        compute: dict[str, Callable[[], Tensor]] = {
            "kl": lambda: kd_kl(student, teacher, temperature=t),
            "mse_logits": lambda: mse_logits(student, teacher),
            "js": lambda: js_divergence(student / t, teacher / t) * t**2,
            "dkd": lambda: decoupled_kd(student, teacher, temperature=t),
            "dist": lambda: dist(student, teacher, temperature=t),
        }
        return compute[self.name]()


class MixedLoss(nn.Module):
    """The baseline with labels: ``alpha * distillation + (1 - alpha) * cross entropy``.

    Args:
        distillation: the measure against the teacher.
        alpha: share of the distillation in ``[0, 1]``; 0 is training on labels alone.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """

    def __init__(self, distillation: DistillationLoss, *, alpha: float) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}, expected a share in [0, 1]")
        self.distillation, self.alpha = distillation, float(alpha)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor
    ) -> Tensor:
        """Scalar; ``labels`` int64 ``(N,)``. ``teacher_logits`` may be None when alpha is 0."""
        loss = (1 - self.alpha) * F.cross_entropy(student_logits.float(), labels)
        if self.alpha:
            if teacher_logits is None:
                raise ValueError(f"no teacher logits, expected some: alpha is {self.alpha}")
            loss = loss + self.alpha * self.distillation(student_logits, teacher_logits)
        return loss


def apprentice_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.5,
    gamma: float = 0.5,
    train_teacher: bool,
) -> Tensor:
    """Apprentice: ``alpha H(y, p_T) + beta H(y, p_A) + gamma H(p_T, p_A)``, logits not softened.

    Scheme A trains teacher and apprentice together (``train_teacher``); in schemes B and C the
    teacher is fixed and its own term, which has no gradient then, is left out. The target of the
    last term is the teacher's probability, through which no gradient flows.

    Args:
        labels: int64 ``(N,)``.

    Source: Mishra and Marr 2018, arXiv:1711.05852, equation 1 and section 4.
    """
    student, teacher = student_logits.float(), teacher_logits.float()
    loss = beta * F.cross_entropy(student, labels)
    soft = F.softmax(teacher.detach(), dim=1)
    loss = loss - gamma * (soft * F.log_softmax(student, dim=1)).sum(dim=1).mean()
    if train_teacher:
        loss = loss + alpha * F.cross_entropy(teacher, labels)
    return loss
