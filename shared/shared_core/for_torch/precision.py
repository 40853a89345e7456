"""fp32, bf16 and fp16 by one code path: autocast, loss scale, clipping, step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared_core.runs import environment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def computes_bf16(device: torch.device) -> bool:
    """Whether the hardware computes bf16 itself; where it does not, bf16 is emulated, slowly."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool({"avx512_bf16", "amx_bf16"} & set(environment()["cpu_features"]))


@dataclass(frozen=True)
class Step:
    """What one call of :meth:`Precision.backward_step` did."""

    stepped: bool  # False: gradients only gathered, or the step was skipped
    grad_norm: float | None  # 2-norm of all gradients before clipping; None without ``clip``


class Precision:
    """How a run computes: pass everything through it and no loop needs a second branch.

    Args:
        device: where the model is.
        dtype: ``"fp32"``, ``"bf16"``, or ``"fp16"`` (with loss scaling).
        enabled: False computes in fp32 whatever ``dtype`` says.
        init_scale: first loss scale of fp16.
        growth_interval: good steps of fp16 after which the scale doubles.

    Raises:
        ValueError: an unknown ``dtype``.
    """

    def __init__(
        self,
        device: torch.device | str,
        dtype: str = "fp32",
        *,
        enabled: bool = True,
        init_scale: float = 2.0**16,
        growth_interval: int = 2000,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"precision is {dtype!r}, expected one of {', '.join(DTYPES)}")
        self.device = torch.device(device)
        self.dtype = dtype if enabled else "fp32"
        self.skipped_steps = 0  # optimizer steps that fp16 skipped for non-finite gradients
        self.scaler: Any = torch.amp.GradScaler(
            self.device.type,
            init_scale=init_scale,
            growth_interval=growth_interval,
            enabled=self.dtype == "fp16",
        )

    def autocast(self) -> torch.autocast:
        """Context for the forward pass and the loss; leave it before the backward pass."""
        return torch.autocast(
            self.device.type, dtype=DTYPES[self.dtype], enabled=self.dtype != "fp32"
        )

    def backward_step(
        self,
        loss: Tensor,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float | None = None,
        update: bool = True,
    ) -> Step:
        """Backward pass and, unless gradients are being gathered, one optimizer step.

        The gradients are zeroed after the step. Order: backward, unscale, clip, step, update.

        Args:
            loss: scalar. When gradients of ``k`` batches are gathered, already divided by ``k``.
            optimizer: all its parameters are clipped together.
            clip: largest 2-norm of the gradient, above 0; None does not clip.
            update: False only adds to the gradients.

        Raises:
            ValueError: ``clip`` is not positive.
        """
        if clip is not None and not clip > 0:
            raise ValueError(f"clip is {clip}, expected more than 0")
        self.scaler.scale(loss).backward()
        if not update:
            return Step(stepped=False, grad_norm=None)
        norm = None
        if clip is not None:
            self.scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
        scale = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        skipped = self.scaler.get_scale() < scale  # the scaler tells a skipped step only so
        self.skipped_steps += skipped
        optimizer.zero_grad(set_to_none=True)
        return Step(stepped=not skipped, grad_norm=norm)

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs to go on exactly."""
        return {
            "dtype": self.dtype,
            "skipped_steps": self.skipped_steps,
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            ValueError: the state of a run in another precision.
        """
        if state["dtype"] != self.dtype:
            raise ValueError(f"stored precision is {state['dtype']!r}, expected {self.dtype!r}")
        self.skipped_steps = int(state["skipped_steps"])
        if self.dtype == "fp16":
            self.scaler.load_state_dict(dict(state["scaler"]))
