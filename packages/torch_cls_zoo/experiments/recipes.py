"""The recipes behind ``--scale``: each states its command, what it takes and what to expect."""

from __future__ import annotations

from dataclasses import dataclass, replace

SCALES = ("full", "short", "rehearsal")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Recipe:
    """What all rows of an experiment share."""

    arch: str
    larger: str  # the larger teacher of `distill`
    image_size: int  # pixels
    epochs: int
    warmup: int
    batch_size: int
    lr: float
    opt: str = "adam"
    cache_side: int = 0  # decode once, at this shorter side in pixels; 0: from the files each time
    threads: int = 0  # 0: torch decides
    classes: int = 4  # of drawn scenes
    images: int = 60  # of a class of drawn scenes
    # Factors of the rate, each with the epoch at which it ends; () for the README's own rule.
    schedule: tuple[tuple[float, int], ...] = ()

    def words(self) -> list[str]:
        """Options of the command that all rows share."""
        words = [
            *("--arch", self.arch, "--image_size", str(self.image_size), str(self.image_size)),
            *("--epochs", str(self.epochs), "--opt", self.opt),
            *("--batch_size", str(self.batch_size), "--lr", str(self.lr), "--aug"),
            *("--threads", str(self.threads), "--recipe", "readme"),
        ]
        if not self.schedule:
            words += ["--warmup", str(self.warmup)]
        else:
            ratios, steps = zip(*self.schedule, strict=True)
            words += ["--lr_ratios", *map(str, ratios), "--lr_steps", *map(str, steps)]
        return words


# COMMAND  make repro-zoo-criteria DATA_ROOT=<folder holding clothing-10> SCALE=full
# The first README's own settings: EfficientNet-b0, 224 pixels, Adam with warm-up, 85 epochs. Hours
# on one GPU. The published rows start from ImageNet weights: EXTRA='--init trained' takes the
# library's (or EXTRA='--init FILE').
FULL = Recipe(
    arch="efficientnet_b0",
    larger="efficientnet_b4",
    image_size=224,
    epochs=85,
    warmup=5,
    batch_size=64,
    lr=1e-4,
)

# COMMAND  make repro-zoo-criteria DATA_ROOT=<folder holding clothing-10> SCALE=short
# Made to take at most 20 minutes on two quiet cores (the other experiments at most 15). A small
# network from scratch, few epochs, real images: it shows how the rows differ under equal, small
# means. The rate is full for three quarters of the epochs: the README's rule would take it down
# after three eighths of them, before a network from scratch has learned much.
SHORT = Recipe(
    arch="resnet10t",
    larger="resnet18",
    image_size=64,
    epochs=10,
    warmup=1,
    batch_size=32,
    lr=2e-3,
    cache_side=96,
    schedule=((0.1, 1), (1.0, 8), (0.1, 10)),
)
# Experiments of more rows, or of larger nets, train for fewer epochs; one of few rows for more.
SHORT_EPOCHS = {"models": 5, "augment": 6, "distill": 6, "curriculum": 14}

# COMMAND  make repro-zoo-criteria SCALE=rehearsal
# About a minute on two cores, on drawn scenes. Every row runs as at the other scales.
REHEARSAL = Recipe(
    arch="test_resnet",  # timm's own network for tests
    larger="shufflenet_v2_x0_5",
    image_size=32,
    epochs=4,
    warmup=1,
    batch_size=16,
    lr=5e-3,
    threads=1,
    classes=3,
    images=40,
    schedule=((0.1, 1), (1.0, 3), (0.1, 4)),
)

RECIPES = {"full": FULL, "short": SHORT, "rehearsal": REHEARSAL}


def recipe(scale: str, experiment: str) -> Recipe:
    """The recipe of an experiment at a scale.

    Raises:
        ValueError: an unknown scale.
    """
    if scale not in RECIPES:
        raise ValueError(f"scale is {scale!r}, expected one of {', '.join(SCALES)}")
    if scale == "short" and experiment in SHORT_EPOCHS:
        epochs = SHORT_EPOCHS[experiment]
        steps = ((0.1, 1), (1.0, max(2, round(0.75 * epochs))), (0.1, epochs))
        return replace(SHORT, epochs=epochs, schedule=steps)
    return RECIPES[scale]
