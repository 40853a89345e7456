"""The winner as a folder to hand on: one form, its card, a snippet, a Dockerfile, lines to type."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from compare.asking import TEST, parts_of, stored_answers
from compare.contract import (
    CANDIDATES,
    CHECK_FILE,
    JUDGED_FILE,
    SPLIT_FILE,
    WINNER,
    Choice,
    DataCheck,
    Judged,
    read,
    read_rows,
)
from compare.forms import forms_of
from compare.snippet import snippet
from shared_core.deploy import evaluate as core
from shared_core.deploy.answers import make_answer
from shared_core.deploy.facts import INT8, ONNX, ModelError, ModelFacts, read_facts, write_facts
from shared_core.deploy.graph import set_facts
from shared_core.deploy.inputs import Source
from shared_core.deploy.model_card import model_card
from shared_core.deploy.predictor import OPENVINO, Outputs, open_model
from shared_core.deploy.session import holds_int8
from shared_core.deploy.staging import CARD_FILE
from shared_core.runs.environment import environment
from shared_core.texts import printable

_HEALTH = "http://127.0.0.1:8080/health"
SNIPPET_FILE, DOCKER_FILE = "snippet.py", "Dockerfile"
CHECKED = 256  # test images that the shipped folder and the snippet are asked
# What the service needs, and nothing of training.
PACKAGES = ("numpy", "scipy", "opencv-python-headless", "simplejpeg", "pillow", "safetensors",
            "onnxruntime", "fastapi", "uvicorn", "python-multipart")  # fmt: skip


def ship(folder: Path, choice: Choice, *, say: Callable[[str], None]) -> Choice:
    """Write ``winner/`` and return the choice with the lines to type.

    The folder appears whole, in the place of an earlier one. It is asked test images first: it must
    answer what was judged: the same classes, probabilities within 1e-5.

    Raises:
        ModelError: it answers otherwise than what was judged.
    """
    check = read(folder / CHECK_FILE, DataCheck)
    rows = {(row.candidate, row.form): row for row in read_rows(folder / JUDGED_FILE, Judged)}
    row = rows[choice.candidate, choice.form]
    scratch = folder / f".{WINNER.name}-{os.getpid()}"
    for left in folder.glob(f".{WINNER.name}-*"):
        shutil.rmtree(left)
    scratch.mkdir()
    facts = _copied(folder / CANDIDATES / row.candidate / "model", scratch, row, choice, check)
    write_facts(scratch, facts)
    images = _some(parts_of(folder, check.root)[TEST])
    _check(folder, scratch, row, images)
    agreement = _write_snippet(scratch, facts, images[0], say)
    if agreement is not None:
        more = {**facts.more, "snippet_same_answer": agreement}
        facts = facts.replaced(more=more)
    write_facts(scratch, facts)
    (scratch / DOCKER_FILE).write_text(dockerfile(facts), encoding="utf-8")
    card = model_card(facts, name=WINNER.name) + _card_end(row, choice, check, agreement)
    (scratch / CARD_FILE).write_text(card, encoding="utf-8")
    _put(scratch, folder / WINNER)
    say(f"shipped {row.name} to {folder / WINNER}")
    return replace(choice, lines=_lines(folder, check, agreement is not None))


def previous(folder: Path) -> Path | None:
    """The model folder that a run shipped, or None."""
    return folder / WINNER if (folder / WINNER / "model.json").is_file() else None


def _put(scratch: Path, target: Path) -> None:
    old = scratch.with_name(scratch.name + "-old")
    if target.exists():
        os.replace(target, old)
    os.replace(scratch, target)
    shutil.rmtree(old, ignore_errors=True)


def _copied(
    model: Path, scratch: Path, row: Judged, choice: Choice, check: DataCheck
) -> ModelFacts:
    """Copy the files of the row's form; the facts of the new folder."""
    source = read_facts(model)
    names = forms_of(source)[row.form]
    for name in names:
        shutil.copyfile(model / name, scratch / name)
    files = {row.form: names}
    if row.form not in (ONNX, INT8):  # OpenVINO; an ONNX file opens in ONNX Runtime as well
        kept = {form: files for form, files in source.files.items() if files == names}
        files = {OPENVINO: names, **{k: v for k, v in kept.items() if k in (ONNX, INT8)}}
    default = next(iter(files))
    facts = source.replaced(
        files=files, default=default, sha256={}, measured={},
        unknown_threshold=row.unknown["threshold"],
        provenance={**source.provenance, "data": f"{check.name}, {_counts(check)}",
                    "split_hash": check.split_hash},
    )  # fmt: skip
    for name in names:
        if name.endswith(".onnx"):  # the file says the same when it is found alone
            set_facts(scratch / name, facts)
    digests = {n: hashlib.sha256((scratch / n).read_bytes()).hexdigest() for n in names}
    sizes = {name: (scratch / name).stat().st_size for name in names}
    return facts.replaced(
        sha256=digests, costs={**source.costs, "bytes": sizes},
        measured=_measured(row, choice, default, sizes),
    )  # fmt: skip


def _measured(
    row: Judged, choice: Choice, default: str, sizes: Mapping[str, int]
) -> dict[str, Any]:
    """What was judged, as the core's cards and pages read it."""
    images = sum(one.support for one in row.per_class)
    share = {"value": row.accuracy.value, "low": row.accuracy.low, "high": row.accuracy.high,
             "images": images}  # fmt: skip
    latency = {size: {"cpu_ms": one["p50"], "p95_ms": one["p95"]}
               for size, one in row.latency.items()}  # fmt: skip
    hardware = environment()
    return {
        "judged_on": "test",
        "accuracy": share,
        "at_least": {"value": choice.at_least, "confidence": 0.95},
        "macro_f1": row.macro_f1,
        "ece": row.ece,
        "unknown": dict(row.unknown),
        "files": {default: {"accuracy": share, "latency": latency, "bytes": dict(sizes),
                            "agreement": {"images": images, "same_class": row.agreement}}},
        "hardware": {"cpu": hardware["cpu"], "system": hardware["system"]},
    }  # fmt: skip


def _some(images: core.Labelled) -> tuple[core.Labelled, np.ndarray]:
    """At most ``CHECKED`` images from all over the part, and their places in it."""
    chosen = np.unique(np.linspace(0, len(images.files) - 1, CHECKED).round().astype(int))
    files = [images.files[n] for n in chosen]
    return replace(images, files=files, labels=images.labels[chosen]), chosen


def _check(
    folder: Path, scratch: Path, row: Judged, images: tuple[core.Labelled, np.ndarray]
) -> None:
    """Refuse a folder that answers otherwise than the file that was judged."""
    found = core.judge(open_model(scratch), images[0])
    answers = stored_answers(folder, row.candidate)
    names, classes = read_facts(scratch).class_names, images[0].classes
    given = np.array([classes.index(names[k]) for k in found.values.argmax(axis=1)])
    same = given == answers[f"{row.form}/test"][images[1]]
    apart = np.abs(found.values.max(axis=1) - answers[f"{row.form}/test_top"][images[1]]).max()
    if not same.all() or not apart <= 1e-5:
        raise ModelError(
            f"{row.name}: the shipped folder gives {int((~same).sum())} of {len(same)} images "
            f"another class than the file that was judged, probabilities differ by {apart:.1e}"
        )


def _write_snippet(
    scratch: Path, facts: ModelFacts, images: core.Labelled, say: Callable[[str], None]
) -> float | None:
    """Write ``snippet.py``; the share of images to which it gives the folder's own answer."""
    form = next((one for one in (INT8, ONNX) if one in facts.files), None)
    if form is None:
        say(f"no {SNIPPET_FILE}: the files are not for ONNX Runtime")
        return None
    try:
        int8 = any(holds_int8(scratch / name) for name in facts.files[form])
        text = snippet(facts, form, int8=int8)
    except ModelError as error:
        say(f"no {SNIPPET_FILE}: {error}")
        return None
    (scratch / SNIPPET_FILE).write_text(text, encoding="utf-8")
    predictor = open_model(scratch)
    judged = core.judge(predictor, images)
    outputs = Outputs(judged.values, None)
    own = [make_answer(predictor, Source(""), outputs, n, top=1).label
           for n in range(len(judged.labels))]  # fmt: skip
    words = [sys.executable, "-I", str(scratch / SNIPPET_FILE), *map(str, images.files)]
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8")
    said = [line.rsplit("\t", 2)[1] for line in done.stdout.splitlines() if "\t" in line]
    if done.returncode or len(said) != len(own):
        say(f"no {SNIPPET_FILE}: it fails on these images: {done.stderr.strip()[-200:]}")
        (scratch / SNIPPET_FILE).unlink()
        return None
    return float(np.mean([a == b for a, b in zip(own, said, strict=True)]))


def dockerfile(facts: ModelFacts) -> str:
    """The service as an image: pinned, not root, with a health check; nothing of training."""
    wanted = [*PACKAGES, *(["openvino"] if facts.default == OPENVINO else [])]
    pins = " \\\n      ".join(f"{name}=={_version(name)}" for name in wanted)
    python = ".".join(map(str, sys.version_info[:2]))
    files = " ".join(sorted({name for names in facts.files.values() for name in names}))
    return f"""# The model of this folder as a service on port 8080. To build it (shared: the core):
#   docker build --build-context core=shared -t {facts.architecture.lower()} .
# and to run it:
#   docker run --rm --read-only -p 8080:8080 {facts.architecture.lower()}
FROM python:{python}-slim
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN pip install --no-cache-dir \\
      {pins}
COPY --from=core . /core
RUN pip install --no-cache-dir --no-deps /core && rm -r /core && useradd --uid 10001 service
COPY model.json README.md {files} /model/
USER 10001
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s --retries=3 \\
  CMD ["python", "-c", "from urllib.request import urlopen as u; u('{_HEALTH}', timeout=4)"]
ENTRYPOINT ["smallvision", "serve", "/model", "--host", "0.0.0.0", "--port", "8080"]
"""


def _version(package: str) -> str:
    """As it was tested here; of OpenCV without windows that of its sibling."""
    try:
        return metadata.version(package.removesuffix("-headless"))
    except metadata.PackageNotFoundError:
        return metadata.version(package)


def _counts(check: DataCheck) -> str:
    return ", ".join(f"{check.images(part)} {part}" for part in check.counts) + " images"


def _card_end(row: Judged, choice: Choice, check: DataCheck, agreement: float | None) -> str:
    """What the journey knows beyond the facts: the choice, the promise, the data check."""
    unknown = row.unknown
    lines = ["", "## How it was chosen", "", choice.sentence]
    if choice.at_least is not None:
        lines += ["", f"At least {choice.at_least:.4f} accurate with confidence 95 % on images "
                  "like the test split's, which chose nothing (exact binomial bound)."]  # fmt: skip
    lines += [
        "",
        f"Below a probability of {unknown['threshold']:.4f} the answer is `unknown`: "
        f"{100 * unknown['kept']:.1f} % of the test images are above it, and "
        f"{100 * unknown['false_accepts']:.1f} % of {unknown['source']}",
        "",
        "## Data check",
        "",
        f"- {check.name}: {_counts(check)}, {len(check.classes)} classes",
        *(f"- {number} x {kind.replace('_', ' ')}" for kind, number in check.found.items()),
        *(f"- {printable(note)}" for note in check.notes),
    ]
    if agreement is not None:
        lines += ["", "## Without this repository", "", "```", f"python {SNIPPET_FILE} photo.jpg",
                  "```", "", "It needs onnxruntime, numpy and Pillow. Of the test images that it "
                  f"was asked it gave {100 * agreement:.2f} % the answer of `smallvision predict`.",
                  ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _lines(folder: Path, check: DataCheck, has_snippet: bool) -> tuple[str, ...]:
    winner = str(folder / WINNER)
    here = Path(sys.executable).parent  # of the environment; not always on the PATH
    if here.is_relative_to(Path.cwd()):
        here = here.relative_to(Path.cwd())
    command = here / "smallvision"
    commands: list[list[str | Path]] = [
        [command, "predict", winner, "photo.jpg"],
        [command, "serve", winner],
        [command, "evaluate", winner, check.root, "--split", folder / SPLIT_FILE],
    ]
    if has_snippet:
        commands.append([here / "python", folder / WINNER / SNIPPET_FILE, "photo.jpg"])
    core_folder = Path(__file__).resolve().parents[2] / "shared"
    commands.append(
        ["docker", "build", "--build-context", f"core={core_folder}", "-t", "model", winner]
    )
    return tuple(shlex.join(map(str, words)) for words in commands)
