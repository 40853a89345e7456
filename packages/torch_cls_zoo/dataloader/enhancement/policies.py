"""Published policies, replayable: AutoAugment with torchvision's operations, and RandAugment."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from shared_core.datasets.views.randaugment import RandAugment
from torch_cls_zoo.dataloader import POLICIES
from torch_cls_zoo.dataloader.enhancement.my_augment import MyAugment


class AutoAugmentPolicy:
    """One of the policies found on ImageNet, CIFAR-10 or SVHN.

    torchvision draws from torch's global generator, which threads share with the training; here
    the draws come from the view's own generator, so a view can be replayed.

    Args:
        policy: ``imagenet``, ``cifar10`` or ``svhn``.

    Raises:
        ValueError: another policy.

    Source: Cubuk et al. 2019, arXiv:1805.09501, appendix; tables and operations of torchvision.
    """

    def __init__(self, policy: str) -> None:
        if policy not in POLICIES[1:4]:
            raise ValueError(f"policy is {policy!r}, expected one of {', '.join(POLICIES[1:4])}")
        self.name = policy
        self._local = threading.local()  # torchvision's object holds the draws of one image

    def _transform(self) -> Any:
        found = getattr(self._local, "transform", None)
        if found is None:
            from torchvision import transforms

            class Drawn(transforms.AutoAugment):
                """AutoAugment whose draws are handed in."""

                rng: np.random.Generator

                def get_params(self, transform_num: int) -> tuple[int, Any, Any]:  # type: ignore[override]
                    index = int(self.rng.integers(transform_num))
                    return index, self.rng.random(2), self.rng.integers(2, size=2)

            found = Drawn(transforms.AutoAugmentPolicy(self.name), fill=[0, 0, 0])
            self._local.transform = found
        return found

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 RGB ``(H, W, 3)`` in and out: mirrored half of the time, then one sub-policy."""
        from PIL import Image

        if rng.random() < 0.5:
            image = image[:, ::-1]
        transform = self._transform()
        transform.rng = rng
        return np.asarray(transform(Image.fromarray(np.ascontiguousarray(image))), dtype=np.uint8)


class RandPolicy(RandAugment):
    """RandAugment: two random operations of growing severity, at a strength of 9 of 10 or so.

    Source: Cubuk et al. 2020, arXiv:1909.13719; the string is timm's usual one.
    """

    name = "rand"

    def __init__(self) -> None:
        super().__init__("rand-m9-mstd0.5-inc1")


def make_augment(policy: str | None) -> MyAugment | AutoAugmentPolicy | RandPolicy | None:
    """The augmentation of that name; None for none.

    Raises:
        ValueError: an unknown name.
    """
    if policy is None:
        return None
    if policy not in POLICIES:
        raise ValueError(f"augmentation is {policy!r}, expected one of {', '.join(POLICIES)}")
    if policy in ("my", "rand"):
        return MyAugment() if policy == "my" else RandPolicy()
    return AutoAugmentPolicy(policy)
