"""The model card: what a finished model is for and how good it is, from its facts alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared_core.deploy.facts import ModelFacts
from shared_core.deploy.staging import CARD_MARK

_MOST_CLASSES = 40  # that are listed by name


def model_card(facts: ModelFacts, *, name: str) -> str:
    """Markdown for a reader who has the folder and nothing else.

    Args:
        name: of the folder, for the commands.
    """
    parts = [
        CARD_MARK,
        f"# {facts.architecture} ({facts.project})",
        _use(facts),
        _numbers(facts),
        _files(facts),
        _origin(facts),
        _run(facts, name),
    ]
    return "\n\n".join(parts) + "\n"


def _use(facts: ModelFacts) -> str:
    height, width = facts.input_size
    lines = ["## Intended use", ""]
    if facts.task == "embed":
        lines.append("It turns an image into a feature; like images have features that lie close.")
    else:
        shown = ", ".join(f"`{name}`" for name in facts.class_names[:_MOST_CLASSES])
        rest = len(facts.class_names) - _MOST_CLASSES
        shown += f" and {rest} more (see model.json)" if rest > 0 else ""
        lines.append(f"It tells {len(facts.class_names)} classes of images apart: {shown}.")
    lines.append(
        f"Images like those that it was trained on, in RGB; it sees {height} x {width} pixels "
        f"(rule: {_view(facts.view)})."
    )
    if facts.unknown_threshold is not None:
        lines.append(
            f"An image whose best probability is below {facts.unknown_threshold:.3f} is answered "
            "with `unknown`."
        )
    elif facts.task == "classify":
        lines.append(
            "It has no answer for an image of another class: one of these is always given."
        )
    return "\n".join(lines)


def _view(view: Mapping[str, Any]) -> str:
    if view["view"] == "letterbox":
        return f"the whole image fits in, margins filled with grey level {view['fill']}"
    if view["resize_ratio"] is None:
        return "the whole image is squeezed to it"
    return (
        f"the short side is resized to {view['resize_ratio']:.3f} times it, the centre is cut out"
    )


def _numbers(facts: ModelFacts) -> str:
    lines, measured = ["## Numbers", ""], facts.measured
    accuracy = measured.get("accuracy")
    if accuracy:
        lines.append(
            f"Accuracy of `{facts.default}` on the {accuracy['images']} images of the "
            f"{measured['judged_on']} split: {_percent(accuracy)}."
        )
    elif facts.task == "classify":
        lines.append("Accuracy was not measured when this folder was written.")
    rows = []
    for runtime, row in measured.get("files", {}).items():
        times = [
            f"{row['latency'][size]['cpu_ms']:.2f}" if size in row.get("latency", {}) else "-"
            for size in ("1", "16")
        ]
        own = row.get("accuracy")
        same = row["agreement"]["same_class"]
        rows.append(
            f"| `{runtime}` | {_percent(own) if own else '-'} | "
            f"{'-' if same is None else f'{100 * same:.2f} %'} | {' / '.join(times)} | "
            f"{sum(row['bytes'].values()) / 1e6:.2f} |"
        )
    if rows:
        lines += [
            "",
            "| file for | accuracy | same class as the network | ms an image, batch 1 / 16 | MB |",
            "|---|---|---:|---:|---:|",
            *rows,
            "",
            f"Times: one thread, CPU clock, {measured['hardware']['cpu']}.",
        ]
    if facts.costs.get("macs"):
        macs, parameters = facts.costs["macs"], facts.costs.get("parameters")
        line = f"An image costs {macs / 1e6:.1f} million multiply-accumulates"
        lines += ["", line + (f"; {parameters / 1e6:.2f} million weights." if parameters else ".")]
    if facts.exits is not None:
        share = [f"{cost / facts.exits.costs[-1]:.0%}" for cost in facts.exits.costs]
        lines += ["", f"Early exits cost {', '.join(share)} of a full run."]
    return "\n".join(lines)


def _percent(share: Mapping[str, Any]) -> str:
    return (
        f"{100 * share['value']:.2f} % (95 % interval {100 * share['low']:.2f} to "
        f"{100 * share['high']:.2f})"
    )


def _files(facts: ModelFacts) -> str:
    lines = ["## Files", ""]
    for runtime, names in facts.files.items():
        default = ", taken when none is asked for" if runtime == facts.default else ""
        lines.append(f"- {', '.join(f'`{one}`' for one in names)}: for `{runtime}`{default}")
    int8 = facts.measured.get("int8")
    if int8 and not int8["kept"]:
        lines += ["", f"An int8 file was made and refused: {int8['reason']}."]
    return "\n".join(lines)


def _origin(facts: ModelFacts) -> str:
    lines = ["## Where it comes from", ""]
    for name, value in facts.provenance.items():
        if value in (None, "", [], {}):
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{k}: {v}" for k, v in value.items() if v not in (None, "", []))
        lines.append(f"- {name.replace('_', ' ')}: {value}")
    if len(lines) == 2:
        lines.append("Nothing is recorded.")
    return "\n".join(lines)


def _run(facts: ModelFacts, name: str) -> str:
    if not {"onnx", "onnx-int8", "openvino"} & facts.files.keys():
        return f"## How to run it\n\nBy the commands of `{facts.project}`."
    answer = "probabilities (1, K)" if facts.task == "classify" else "features (1, D)"
    return f"""## How to run it

```
smallvision predict {name} photo.jpg
```

```python
from shared_core.datasets import decode
from shared_core.deploy.predictor import open_model
model = open_model("{name}")
print(model.probabilities(model.view(decode("photo.jpg"))[None]))  # {answer}
```"""
