"""The spectrum loss: a student's tokens should carry the teacher's energy at each frequency.

This definition is ours. The original speaks of frequency-domain distillation and shows no loss
on spectra; with its weight at 0 the distillation is cross-entropy, KD and norm-and-direction.
"""

import torch
from torch import Tensor


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


def spectrum_loss(
    student_tokens: Tensor,
    teacher_tokens: Tensor,
    grid: tuple[int, int],
    *,
    phase: float = 0.0,
) -> Tensor:
    """Relative L1 distance of the amplitude spectra, plus ``phase`` times a phase term.

    ``sum w ||F_S| - |F_T|| / sum w |F_T|``, and for the phase
    ``sum w |F_T| (1 - cos(angle between F_S and F_T)) / sum w |F_T|``; F is the half spectrum and
    w its weights. Both are 0 for equal tokens; the amplitude term is 1 for a student of zeros,
    the phase term lies in [0, 2].

    Args:
        student_tokens: ``(N, h*w, C)``, projected to the teacher's C; gradient flows here only.
        teacher_tokens: ``(N, h*w, C)``.
        grid: ``(h, w)`` in tokens.
        phase: weight of the phase term, 0 or more.

    Returns:
        A scalar, unitless.
    """
    if student_tokens.shape != teacher_tokens.shape:
        raise ValueError(
            f"student tokens have shape {tuple(student_tokens.shape)}; "
            f"expected the teacher's {tuple(teacher_tokens.shape)}"
        )
    if phase < 0:
        raise ValueError(f"the weight of the phase term is {phase}; expected 0 or more")
    student = half_spectrum(student_tokens, grid)
    teacher = half_spectrum(teacher_tokens.detach(), grid)
    weights = half_spectrum_weights(grid[1]).to(student_tokens.device)[:, None]  # (w//2+1, 1)
    student_abs, teacher_abs = student.abs(), teacher.abs()
    tiny = torch.finfo(torch.float32).tiny
    scale = (weights * teacher_abs).sum().clamp_min(tiny)
    loss = (weights * (student_abs - teacher_abs).abs()).sum() / scale
    if phase:
        # |F_T| (1 - cos) = |F_T| - Re(conj(F_T) F_S) / |F_S|; an empty bin has no angle.
        inner = (student * teacher.conj()).real / student_abs.clamp_min(1e-12)
        loss = loss + phase * (weights * (teacher_abs - inner)).sum() / scale
    return loss
