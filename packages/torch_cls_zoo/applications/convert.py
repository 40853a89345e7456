"""``--jit``: the network as TorchScript, ONNX and torch.export files, each checked against it."""

from __future__ import annotations

from typing import Any

from shared_core.for_torch.checkpoints import unwrap
from torch_cls_zoo.applications.session import Session


def convert(session: Session) -> dict[str, dict[str, Any]]:
    """Write the files into ``checkpoints/`` of the run.

    Returns:
        By format the file and how far its outputs lie from the network's.
    """
    from torch_cls_zoo.applications.export_files import demo_facts, export_all

    folder = session.output / "checkpoints"
    facts = demo_facts(
        arch=session.arch,
        class_names=session.classes,
        image_size=session.settings.size,
        mean=session.settings.mean,
        std=session.settings.std,
        family=session.family,
    )

    def write() -> dict[str, dict[str, Any]]:
        plain = unwrap(session.model)
        place = next(plain.parameters()).device
        plain.to("cpu")
        try:
            return export_all(
                plain,
                folder,
                arch=session.arch.replace("/", "_"),
                image_size=session.settings.size,
                facts=facts,
            )
        finally:
            plain.to(place)

    written = session.only_main(write)
    for name, about in written.items():
        session.say(
            f"{name}: {about['file']}, {about['bytes']:,} bytes, "
            f"differs by at most {about['max_abs']:.1e}"
        )
    return written
