"""Networks of PaddleClas, an optional package: built any number of times in one process."""

from __future__ import annotations

from paddle import nn
from paddle.utils import unique_name


def build_paddleclas(name: str, *, num_classes: int) -> nn.Layer:
    """One of paddleclas' classifiers, ``ResNet50`` or ``MobileNetV2`` say, with random weights.

    Its MobileNetV2 gives its parameters fixed names, which Paddle refuses the second time unless
    names are generated in a scope of their own.

    Raises:
        ImportError: paddleclas is not installed; it has wheels for Python 3.10 and 3.11.
        ValueError: it has no such network.
    """
    try:
        import paddleclas
    except ImportError as error:
        raise ImportError(
            "networks of paddleclas need the package: pip install "
            "'visiondistill_gc[paddleclas]' in an environment of its own, Python 3.10 or 3.11"
        ) from error
    build = getattr(paddleclas, name, None)
    if not name[:1].isupper() or not callable(build):
        raise ValueError(f"paddleclas has no network {name!r}, expected for example ResNet50")
    with unique_name.guard():
        return build(pretrained=False, class_num=num_classes)
