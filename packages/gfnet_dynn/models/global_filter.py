"""The global filter: multiply the 2-D spectrum of the token grid by learned complex numbers.

One parameter, ``complex_weight (h, w // 2 + 1, C, 2)``, and three ways to the same output:

- ``fft``: ``rfft2``, product, ``irfft2``, as the paper writes it.
- ``dft``: the transforms as products with small real matrices, rows first, then columns. Faster
  than an FFT on the grids of usual images and on prime sides (37 for 600 px), and it exports to
  ONNX with any opset because nothing complex is left.
- ``dft-dense``: one product with a ``(2 h (w // 2 + 1), h w)`` matrix. Fastest on tiny grids.

``auto`` picks one of them for the grid and the device, see :func:`choose_form`.

Source: Rao et al. 2021, arXiv:2107.00645, section 3.2.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from gfnet_dynn.choices import FILTERS

DENSE_LIMIT = 1024  # tokens; above it the one-product matrices alone would take 8 MB and more


def check_form(form: str) -> str:
    """Return ``form``, or raise a ValueError that names the four known ones."""
    if form not in FILTERS:
        raise ValueError(f"filter: got {form!r}, expected one of {FILTERS}")
    return form


def choose_form(grid: tuple[int, int], device: str) -> str:
    """The form that ``auto`` takes for a token grid ``(h, w)`` on a device type (``cpu`` ...).

    A fixed table, so that two runs do the same arithmetic. Measured with ``tools/bench/filter.py``
    on one core with AVX-512, forward and backward: matrices win up to 48 tokens a side, and beyond
    where a side has a large prime factor; batches of 1, 8 and 32 have the same winner. Devices
    other than a CPU get ``fft``: not measured, and ``auto`` must never be slower than ``rfft2``.
    """
    h, w = grid
    if device != "cpu":
        return "fft"
    if h * w <= 36:
        return "dft-dense"
    if max(h, w) <= 48 or max(largest_prime_factor(h), largest_prime_factor(w)) > 13:
        return "dft"
    return "fft"


def largest_prime_factor(n: int) -> int:
    """The largest prime that divides ``n >= 1``; 1 for 1. FFTs are slow where it is large."""
    largest, factor = 1, 2
    while n > 1:
        if n % factor == 0:
            largest, n = factor, n // factor
        elif factor * factor > n:
            factor = n
        else:
            factor += 1
    return largest


def separable_matrices(h: int, w: int) -> dict[str, np.ndarray]:
    """The four real matrices of a half-spectrum DFT of an ``(h, w)`` grid and its inverse, float64.

    With ``w' = w // 2 + 1``; "re | im" says that the real parts come first along that axis:

    - ``row (2 w', w)``: a real row to its half spectrum, re | im.
    - ``column (2 h, 2 h)``: input rows ``(h, re/im)`` interleaved, output re | im.
    - ``column_inverse (2 h, 2 h)``: input re | im, output rows ``(h, re/im)`` interleaved.
    - ``row_inverse (w, 2 w')``: a half spectrum, re | im, to the real row. The columns that stand
      for two conjugate frequencies count twice; DC and Nyquist count once and their imaginary part
      not at all, which is what ``irfft2`` does.

    Orthonormal: each is scaled by ``1 / sqrt(side)``.
    """
    half = w // 2 + 1
    k, n = np.arange(half)[:, None], np.arange(w)[None, :]
    angle = 2 * np.pi * ((k * n) % w) / w
    row = np.concatenate([np.cos(angle), -np.sin(angle)]) / math.sqrt(w)

    twice = np.full(half, 2.0)
    twice[0] = 1.0
    sine = np.sin(angle)
    sine[0] = 0.0
    if w % 2 == 0:
        twice[-1] = 1.0
        sine[-1] = 0.0
    row_inverse = np.concatenate([np.cos(angle) * twice[:, None], -sine * twice[:, None]])
    row_inverse = row_inverse.T / math.sqrt(w)

    k, n = np.arange(h)[:, None], np.arange(h)[None, :]
    angle = 2 * np.pi * ((k * n) % h) / h
    cos, sin = np.cos(angle) / math.sqrt(h), np.sin(angle) / math.sqrt(h)
    column = np.empty((2, h, h, 2))  # (out part, out frequency, in row, in part)
    column[0, :, :, 0], column[0, :, :, 1] = cos, sin
    column[1, :, :, 0], column[1, :, :, 1] = -sin, cos
    column = column.reshape(2 * h, 2 * h)
    # The DFT is orthonormal, so its real form is an orthogonal matrix: inverse = transpose.
    return {
        "row": row,
        "column": column,
        "column_inverse": column.T.copy(),
        "row_inverse": row_inverse,
    }


def dense_matrices(h: int, w: int) -> dict[str, np.ndarray]:
    """The 2-D half-spectrum DFT and its inverse as one real matrix each, float64.

    ``forward_matrix (2 h w', h w)`` gives re | im; ``inverse_matrix (h w, 2 h w')`` takes it.
    """
    parts = separable_matrices(h, w)
    half = w // 2 + 1
    row = parts["row"].reshape(2, half, w)
    column = parts["column"].reshape(2 * h, h, 2)
    forward = np.einsum("Fap,pkb->Fkab", column, row).reshape(2 * h * half, h * w)
    column = parts["column_inverse"].reshape(h, 2, 2 * h)
    row = parts["row_inverse"].reshape(w, 2, half)
    inverse = np.einsum("apF,bpk->abFk", column, row).reshape(h * w, 2 * h * half)
    return {"forward_matrix": forward, "inverse_matrix": inverse}


class DftTables(nn.Module):
    """The constant matrices of one grid, shared by the filters of all blocks.

    Not in state dicts. float64 in a float64 model, float32 in any other.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.names: list[str] = []

    def add(self, form: str, like: Tensor) -> None:
        """Make the matrices that a form needs, unless they are there, on the device of ``like``."""
        h, w = self.grid
        if form == "dft-dense" and h * w > DENSE_LIMIT:
            raise ValueError(
                f"filter 'dft-dense': got a grid of {h}x{w} tokens, "
                f"expected at most {DENSE_LIMIT} tokens; use 'dft'"
            )
        needed = {"dft": "row", "dft-dense": "forward_matrix"}
        if form not in needed or needed[form] in self.names:
            return
        make = separable_matrices if form == "dft" else dense_matrices
        for name, array in make(h, w).items():
            self.names.append(name)
            self.register_buffer(name, self._convert(array, like), persistent=False)

    @staticmethod
    def _convert(array: np.ndarray, like: Tensor) -> Tensor:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.tensor(array).to(like.device, dtype)

    def _apply(self, fn, recurse=True):
        """Convert, then refill from float64: a float32 table made double would keep its error."""
        super()._apply(fn, recurse)
        arrays = separable_matrices(*self.grid)
        if "forward_matrix" in self.names:
            arrays |= dense_matrices(*self.grid)
        for name in self.names:
            setattr(self, name, self._convert(arrays[name], getattr(self, name)))
        return self


class GlobalFilter(nn.Module):
    """Circular depth-wise convolution of a token grid ``(h, w)`` by a product of spectra.

    Args:
        channels: ``C``.
        grid: tokens ``(h, w)``; any sides, square or not.
        form: ``fft``, ``dft``, ``dft-dense`` or ``auto``.
        tables: matrices to share with other filters of the same grid; own ones by default.

    ``complex_weight`` is real, ``(h, w // 2 + 1, C, 2)`` with (re, im) last, drawn from
    N(0, 0.02^2).
    """

    def __init__(
        self,
        channels: int,
        grid: tuple[int, int],
        *,
        form: str = "auto",
        tables: DftTables | None = None,
    ) -> None:
        super().__init__()
        h, w = grid
        if min(channels, h, w) < 1:
            raise ValueError(f"filter: got {channels} channels on a {h}x{w} grid, expected >= 1")
        self.grid = (h, w)
        self.complex_weight = nn.Parameter(torch.randn(h, w // 2 + 1, channels, 2) * 0.02)
        self.tables = DftTables((h, w)) if tables is None else tables
        self.set_form(form)

    def set_form(self, form: str) -> None:
        """Compute by another form from now on; the parameter stays as it is."""
        self.form = check_form(form)
        # ``auto`` prepares its choice for a CPU, so that a model can move there at any time.
        needed = choose_form(self.grid, "cpu") if form == "auto" else form
        self.tables.add(needed, self.complex_weight)

    @property
    def chosen(self) -> str:
        """The form that runs: ``form`` itself, or what ``auto`` takes on the parameter's device."""
        if self.form != "auto":
            return self.form
        return choose_form(self.grid, self.complex_weight.device.type)

    def forward(self, x: Tensor) -> Tensor:
        """Filter tokens ``(N, h w, C)`` (row-major); same shape and dtype out.

        Computes in float32, or float64 where x is, under autocast and in half models too.
        """
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.forward(x)
        if x.shape[1] != self.grid[0] * self.grid[1]:
            raise ValueError(
                f"filter: got tokens of shape {tuple(x.shape)}, "
                f"expected (N, {self.grid[0] * self.grid[1]}, C)"
            )
        dtype = x.dtype
        if dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        # A channels_last conversion of the model permutes this parameter: hence contiguous.
        weight = self.complex_weight.to(x.dtype).contiguous()
        form = self.chosen
        run = self._fft if form == "fft" else self._dft if form == "dft" else self._dense
        return run(x, weight).to(dtype)

    def _fft(self, x: Tensor, weight: Tensor) -> Tensor:
        n, tokens, channels = x.shape
        spectrum = torch.fft.rfft2(x.reshape(n, *self.grid, channels), dim=(1, 2), norm="ortho")
        spectrum = spectrum * torch.view_as_complex(weight)
        x = torch.fft.irfft2(spectrum, s=self.grid, dim=(1, 2), norm="ortho")
        return x.reshape(n, tokens, channels)

    def _dft(self, x: Tensor, weight: Tensor) -> Tensor:
        n, tokens, channels = x.shape
        (h, w), tables = self.grid, self.tables
        half = w // 2 + 1
        x = left_product(tables.row, x.reshape(n * h, w, channels))  # (N h, 2 w', C)
        x = left_product(tables.column, x.view(n, 2 * h, half * channels))  # (N, 2 h, w' C)
        x = spectral_product(x.view(n, 2, h * half * channels), weight)
        x = left_product(tables.column_inverse, x.view(n, 2 * h, half * channels))
        x = left_product(tables.row_inverse, x.view(n * h, 2 * half, channels))
        return x.view(n, tokens, channels)

    def _dense(self, x: Tensor, weight: Tensor) -> Tensor:
        n, tokens, channels = x.shape
        x = left_product(self.tables.forward_matrix, x)
        points = weight.shape[0] * weight.shape[1]
        x = spectral_product(x.view(n, 2, points * channels), weight)
        return left_product(self.tables.inverse_matrix, x.view(n, 2 * points, channels))

    def extra_repr(self) -> str:
        return f"grid={self.grid}, form={self.form}, chosen={self.chosen}"


def spectral_product(z: Tensor, weight: Tensor) -> Tensor:
    """Complex product of spectra ``z (N, 2, M)``, re | im, with ``weight (..., 2)``, M numbers."""
    weight = weight.view(-1, 2)
    re, im = weight[:, 0].contiguous(), weight[:, 1].contiguous()
    z_re, z_im = z[:, 0], z[:, 1]
    if torch.is_grad_enabled() or is_tracing():
        out_re = torch.addcmul(z_re * re, z_im, im, value=-1)
        return torch.stack([out_re, torch.addcmul(z_re * im, z_im, re)], dim=1)
    out = z * re  # two passes over memory less than stack, but slower to differentiate
    out[:, 0].addcmul_(z_im, im, value=-1)
    out[:, 1].addcmul_(z_re, im)
    return out


def left_product(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix (m, k)`` times each of ``x (N, k, c)``: ``(N, m, c)``, without a copy of ``x``."""
    if is_tracing():  # no branch on the batch, and no Expand in an exported graph
        return torch.matmul(matrix, x)
    if x.shape[0] == 1:
        return torch.mm(matrix, x[0]).unsqueeze(0)
    return torch.bmm(matrix.expand(x.shape[0], -1, -1), x)


def is_tracing() -> bool:
    """Whether a graph is being made of the model, for an export or a compiler."""
    return torch.onnx.is_in_onnx_export() or torch.compiler.is_compiling()
