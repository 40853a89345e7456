"""What a user would write instead of ``make compare``: timm, torch.onnx, onnxruntime's quantizer.

The same trained weights, the same split, the same minutes; nothing of this repository but the list
of files. The recipe is a good one of today: AdamW, one cycle, flips and crops, label smoothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

BATCH, CALIBRATION, CLASSES_OF_IMAGENET = 64, 200, 1000
MEAN, STD = 127 / 255, 128 / 255
Part = tuple[Sequence[str], Sequence[int]]  # files and labels


def make_loader(part: Part, side: int, *, train: bool, workers: int) -> Any:
    """torchvision's transforms and a DataLoader."""
    import torch
    from PIL import Image
    from torchvision import transforms as t

    seen: list[Any] = [t.Resize((side, side))]
    if train:
        seen = [t.RandomResizedCrop(side, scale=(0.4, 1.0)), t.RandomHorizontalFlip()]
    view = t.Compose([*seen, t.ToTensor(), t.Normalize([MEAN] * 3, [STD] * 3)])

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(part[0])

        def __getitem__(self, n: int) -> Any:
            return view(Image.open(part[0][n]).convert("RGB")), part[1][n]

    return torch.utils.data.DataLoader(
        Files(), BATCH, shuffle=train, num_workers=workers, drop_last=train and len(part[0]) > BATCH
    )


def fine_tune(
    train: Part, *, weights: Path, classes: int, side: int, minutes: float, threads: int, seed: int
) -> Any:
    """timm's lite0 from the weights, for so many minutes."""
    import timm
    import torch

    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=CLASSES_OF_IMAGENET)
    values = torch.load(weights, weights_only=True).values()
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    model.reset_classifier(classes)
    model = model.to(memory_format=torch.channels_last).train()
    head = list(model.get_classifier().parameters())
    body = [p for p in model.parameters() if all(p is not h for h in head)]
    optimizer = torch.optim.AdamW(
        [{"params": body, "lr": 5e-4}, {"params": head, "lr": 3e-3}], weight_decay=0.02
    )
    loader = make_loader(train, side, train=True, workers=threads)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    rates = [group["lr"] for group in optimizer.param_groups]
    begun, last = time.monotonic(), 60 * minutes
    while (spent := time.monotonic() - begun) < last:
        for images, labels in loader:
            spent = time.monotonic() - begun
            if spent >= last:
                break
            share = spent / last  # of the one cycle: a tenth of it rises
            factor = share / 0.1 if share < 0.1 else 0.5 * (1 + np.cos(np.pi * (share - 0.1) / 0.9))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * max(factor, 1e-3)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model(images.to(memory_format=torch.channels_last)), labels)
            loss.backward()
            optimizer.step()
    return model.eval()


def export(model: Any, train: Part, folder: Path, *, side: int, seed: int) -> tuple[Path, Path]:
    """``float.onnx`` and ``int8.onnx``."""
    import torch
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    folder.mkdir(parents=True, exist_ok=True)
    example, whole, small = (
        torch.zeros(2, 3, side, side),
        folder / "float.onnx",
        folder / "int8.onnx",
    )
    torch.onnx.export(
        model, (example,), whole, dynamo=False, opset_version=17, input_names=["image"],
        output_names=["logits"], dynamic_axes={"image": {0: "n"}, "logits": {0: "n"}},
    )  # fmt: skip
    chosen = np.random.default_rng(seed).permutation(len(train[0]))[:CALIBRATION]
    part = [train[0][n] for n in chosen], [train[1][n] for n in chosen]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(make_loader(part, side, train=False, workers=0))

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else {"image": batch[0].numpy()}

    quantize_static(
        whole, small, Reader(), per_channel=True, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )  # fmt: skip
    return whole, small


def answers(run: Any, test: Part, side: int) -> np.ndarray:
    """Class of every image by ``run``: normalised images ``(N, 3, H, W)`` to logits."""
    loader = make_loader(test, side, train=False, workers=0)
    return np.concatenate([run(images.numpy()).argmax(axis=1) for images, _ in loader])
