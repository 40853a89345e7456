"""fp32, bf16 and fp16 by one code path in Paddle: autocast, loss scale, clipping, step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import Tensor, nn

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LEVELS = ("O1", "O2")


@dataclass(frozen=True)
class Step:
    """What one call of :meth:`Precision.backward_step` did."""

    stepped: bool  # False: gradients only gathered, or the step was skipped
    grad_norm: float | None  # 2-norm of all gradients before clipping; None without ``clip``


class Precision:
    """How a run computes; the twin of :class:`shared_core.for_torch.precision.Precision`.

    Args:
        device: ``"cpu"`` or ``"gpu"``, ``"gpu:0"``...
        dtype: ``"fp32"``, ``"bf16"``, or ``"fp16"`` (with loss scaling).
        level: ``"O1"`` autocasts; ``"O2"`` also keeps the weights small, see :meth:`decorate`.
        enabled: False computes in fp32 whatever ``dtype`` says.
        init_scale: first loss scale of fp16.
        growth_interval: good steps of fp16 after which the scale doubles.

    Raises:
        ValueError: an unknown ``dtype`` or ``level``, or a dtype below fp32 on a CPU, where Paddle
            would go on in fp32 with nothing but a warning.
    """

    def __init__(
        self,
        device: str,
        dtype: str = "fp32",
        *,
        level: str = "O1",
        enabled: bool = True,
        init_scale: float = 2.0**16,
        growth_interval: int = 2000,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"precision is {dtype!r}, expected one of {', '.join(DTYPES)}")
        if level not in LEVELS:
            raise ValueError(f"level is {level!r}, expected one of {', '.join(LEVELS)}")
        if enabled and dtype != "fp32" and device.startswith("cpu"):
            raise ValueError(f"precision is {dtype!r} on a CPU, where Paddle has fp32 only")
        self.device = device
        self.dtype = dtype if enabled else "fp32"
        self.level = level
        self.skipped_steps = 0  # optimizer steps that fp16 skipped for non-finite gradients
        self.scaler: Any = paddle.amp.GradScaler(
            enable=self.dtype == "fp16",
            init_loss_scaling=init_scale,
            incr_every_n_steps=growth_interval,
            decr_every_n_nan_or_inf=1,
        )

    def autocast(self) -> Any:
        """Context for the forward pass and the loss; leave it before the backward pass."""
        enabled = self.dtype != "fp32"
        dtype: Any = DTYPES[self.dtype] if enabled else "float16"  # counts only when enabled
        level: Any = self.level if enabled else "O1"
        return paddle.amp.auto_cast(enable=enabled, dtype=dtype, level=level)

    def decorate(self, model: nn.Layer, optimizer: Any) -> tuple[nn.Layer, Any]:
        """At ``O2``: the model's weights in the low dtype, float32 masters in the optimizer."""
        if self.level == "O1" or self.dtype == "fp32":
            return model, optimizer
        dtype: Any = DTYPES[self.dtype]
        model, optimizer = paddle.amp.decorate(
            models=model, optimizers=optimizer, level="O2", dtype=dtype
        )
        return model, optimizer

    def backward_step(
        self,
        loss: Tensor,
        optimizer: paddle.optimizer.Optimizer,
        *,
        clip: float | None = None,
        update: bool = True,
    ) -> Step:
        """Backward pass and, unless gradients are being gathered, one optimizer step.

        The gradients are cleared after the step. Order: backward, unscale, clip, step, update.

        Args:
            loss: scalar. When gradients of ``k`` batches are gathered, already divided by ``k``.
            optimizer: made with ``parameters=``; all of them are clipped together.
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
        norm: Any = None
        if clip is not None:
            self.scaler.unscale_(optimizer)
            parameters = [p for p in optimizer._parameter_list if p.grad is not None]
            norm = paddle.nn.utils.clip_grad_norm_(parameters, clip).item()
        scale = self._scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        skipped = self._scale() < scale  # every skipped step makes the scale smaller
        self.skipped_steps += skipped
        optimizer.clear_grad()
        return Step(stepped=not skipped, grad_norm=norm)

    def _scale(self) -> float:
        state = self.scaler.state_dict()
        return float(state["scale"][0]) if state else 1.0

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
        self.scaler.load_state_dict(dict(state["scaler"]))
