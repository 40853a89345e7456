"""The plan: a training step of each network is measured here, and what fits the minutes is taken.

The seconds that were measured are rounded to a coarse grid, and epochs come from one, so that the
same command plans the same on the same machine nearly always.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compare.candidates import MAKERS, Proposal, asked_for, propose
from compare.contract import PLAN_FILE, DataCheck, Limit, Plan, Planned, write
from shared_core.runs.command import UsageError
from shared_core.runs.seeds import derive_seed

EPOCHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 24, 30, 40)
GRID = 1.25  # two neighbouring values of rounded seconds
BATCH = 16  # images of a measured step
ASKED = 9  # times that a candidate's files answer an image of the test part, in all
JUDGED = 12.0  # seconds that timing the two files of a candidate takes
FLOORS = 10.0  # seconds
Step = tuple[str, int]  # network, side in pixels


@dataclass(frozen=True)
class Seconds:
    """What an image costs: seconds to learn from it and to answer, on a machine of its own.

    ``busy``: how many times longer the clock on the wall says it takes here and now.
    """

    learn: float
    answer: float
    busy: float = 1.0


@dataclass(frozen=True)
class Asked:
    """What the command says that the plan depends on."""

    minutes: float
    budget: tuple[Limit, ...] = ()
    batch: int = 1
    shape: str = "cpu"
    threads: int = 1
    seeds: int = 1
    seed: int = 0
    candidates: tuple[str, ...] = ()
    teacher: str | None = None


def make_plan(
    check: DataCheck,
    asked: Asked,
    *,
    folder: Path,
    feature_size: int,
    say: Callable[[str], None],
    measure: Callable[[Step, int, int], Seconds] | None = None,
) -> Plan:
    """Choose candidates, sizes and epochs that fit, print them, write ``plan.json``.

    Args:
        feature_size: of the stored features, pixels.
        measure: (step, classes, threads) -> seconds; the machine's own by default.

    Raises:
        UsageError: not even the first candidate fits.
    """
    measure = measure or measure_step
    proposals = propose(check, teacher=asked.teacher, feature_size=feature_size)
    out = asked_for(proposals, asked.candidates)
    for one in proposals:
        lacking = MAKERS[one.maker].lacking()
        if lacking:
            out.setdefault(one.name, f"needs the package {lacking}")
    steps = {
        step: measure(step, len(check.classes), asked.threads)
        for step in dict.fromkeys(one.step for one in proposals if one.name not in out)
    }
    # Others who compute slow all candidates alike: one factor, however a single step was hit.
    busy = statistics.median(s.busy for s in steps.values()) if steps else 1.0
    rounded = {
        step: Seconds(round_up(s.learn * busy), round_up(s.answer * busy))
        for step, s in steps.items()
    }
    left = 60 * asked.minutes - check.seconds - FLOORS
    chosen = fit(proposals, check, rounded, left, seeds=asked.seeds, left_out=out)
    planned = [
        _planned(one, *chosen[one.name], check, rounded, asked, n)
        for one in proposals
        for n in range(asked.seeds if one.trains else 1)
    ]
    plan = Plan(
        minutes=asked.minutes,
        expected=round(
            sum(one.minutes for one in planned if one.included) + (check.seconds + FLOORS) / 60, 2
        ),
        budget=asked.budget,
        batch=asked.batch,
        shape=asked.shape,
        threads=asked.threads,
        steps={
            f"{network} {side} px, {what}": value
            for (network, side), one in steps.items()
            for what, value in (("learn", one.learn * busy), ("answer", one.answer * busy))
        },
        candidates=tuple(planned),
        seed=asked.seed,
    )
    if not any(one.included for one in planned):
        raise UsageError(too_short(plan))
    write(folder / PLAN_FILE, plan)
    for line in printed(plan):
        say(line)
    return plan


def cost(one: Proposal, epochs: int, check: DataCheck, steps: Mapping[Step, Seconds]) -> float:
    """Seconds that a candidate takes: made, exported, judged."""
    step, asked = steps[one.step], check.images("test") + min(512, check.images("calibration"))
    learn = check.images("train") * step.learn * one.factor
    validate = check.images("calibration") * step.answer * one.factor
    once = check.images("train") * step.answer if one.trains else 0.0  # the probe of the head
    once += one.before * check.images("train") * step.learn
    return one.fixed + JUDGED + epochs * (learn + validate) + once + ASKED * asked * step.answer


def fit(
    proposals: Sequence[Proposal],
    check: DataCheck,
    steps: Mapping[Step, Seconds],
    seconds: float,
    *,
    seeds: int = 1,
    left_out: Mapping[str, str] | None = None,
) -> dict[str, tuple[int, str]]:
    """Name -> (epochs, "" or why it is left out).

    In order, each takes enough epochs if they fit, or as many as fit; what is left over then goes
    to more epochs, in the same order. A teacher is made only where a student of it fits, too.
    """
    left_out = left_out or {}
    found: dict[str, tuple[int, str]] = {}

    def price(one: Proposal, epochs: int) -> float:
        return cost(one, epochs, check, steps) * (seeds if one.trains else 1)

    for one in proposals:
        if one.name in left_out:
            found[one.name] = (0, left_out[one.name])
            continue
        if one.teacher and found.get(one.teacher, (0, "no"))[1]:
            found[one.name] = (0, "its teacher is left out")
            continue
        epochs = [n for n in EPOCHS if one.least <= n <= one.enough] if one.trains else [0]
        students = [x for x in proposals if x.teacher == one.name and x.name not in left_out]
        kept = min((price(x, x.least) for x in students), default=0.0)
        fits = [n for n in epochs if price(one, n) + kept <= seconds]
        if not fits:
            needs = price(one, epochs[0]) + kept
            needs = f"needs {minutes(needs)}, {minutes(max(0, seconds))} are left"
            found[one.name] = (0, needs)
            continue
        found[one.name] = (fits[-1], "")
        seconds -= price(one, fits[-1])
    for one in proposals:
        epochs, reason = found[one.name]
        more = [n for n in EPOCHS if epochs < n <= one.most]
        if reason or not one.trains or not more:
            continue
        fits = [n for n in more if price(one, n) - price(one, epochs) <= seconds]
        if fits:
            seconds -= price(one, fits[-1]) - price(one, epochs)
            found[one.name] = (fits[-1], "")
    return found


def _planned(
    one: Proposal,
    epochs: int,
    reason: str,
    check: DataCheck,
    steps: Mapping[Step, Seconds],
    asked: Asked,
    number: int,
) -> Planned:
    """The candidate with its seed; the first repetition has the plain name."""
    again = "" if number == 0 else f"-s{number}"
    teacher = one.teacher and f"{one.teacher}{again}"
    known = one.step in steps
    return Planned(
        name=f"{one.name}{again}",
        base=one.name,
        maker=one.maker,
        project=MAKERS[one.maker].project,
        title=one.title,
        settings={**one.settings, **({"epochs": epochs} if one.trains else {})},
        seed=derive_seed(asked.seed, "candidate", number) % 2**31 if number else asked.seed,
        minutes=round(cost(one, epochs, check, steps) / 60, 2) if known and not reason else 0.0,
        included=not reason,
        reason=reason,
        order=one.order,
        teacher=teacher,
    )


def round_up(seconds: float) -> float:
    """To the grid: the next power of :data:`GRID`."""
    return float(GRID ** math.ceil(math.log(max(seconds, 1e-7), GRID) - 1e-9))


def minutes(seconds: float) -> str:
    """``3.5 min``."""
    return f"{seconds / 60:.1f} min"


def too_short(plan: Plan) -> str:
    """The line for a plan of nothing."""
    first = next((one for one in plan.candidates if one.reason != "not asked for"), None)
    why = "nothing is asked for" if first is None else f"{first.name} {first.reason}"
    return f"--minutes {plan.minutes:g}: nothing can be made ({why}): expected more minutes"


def printed(plan: Plan) -> list[str]:
    """The plan as a table for a terminal."""
    width = max(len(one.title) for one in plan.candidates)
    lines = [f"plan: {plan.expected:.1f} of {plan.minutes:g} min"]
    for one in plan.candidates:
        epochs = one.settings.get("epochs")
        what = f"{one.minutes:5.1f} min" if one.included else f"left out: {one.reason}"
        many = f"  {epochs:3d} epochs" if epochs and one.included else ""
        lines.append(f"  {one.name:14} {one.title:{width}} {what}{many}")
    return lines


def measure_step(step: Step, classes: int, threads: int) -> Seconds:
    """Seconds an image of learning and of answering, on this machine, as the zoo computes."""
    import torch

    from shared_core.for_torch.networks import make_network
    from shared_core.for_torch.precision import Precision, computes_bf16

    network, side = step
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_network(network, num_classes=classes, image_size=(side, side)).model
    model = model.to(device, memory_format=torch.channels_last)
    images = torch.zeros(BATCH, 3, side, side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(BATCH, dtype=torch.long, device=device)
    precision = Precision(device, "bf16" if computes_bf16(device) and side >= 64 else "fp32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)

    def learn() -> None:
        model.train()
        optimizer.zero_grad()
        with precision.autocast():
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        precision.backward_step(loss, optimizer)

    def answer() -> None:
        model.eval()
        with torch.inference_mode(), precision.autocast():
            model(images)

    study, reply = _timed(learn), _timed(answer)
    if device.type == "cuda":  # the processor's own clock knows nothing of a GPU
        return Seconds(study[0] / BATCH, reply[0] / BATCH)
    busy = (study[0] + reply[0]) / max((study[1] + reply[1]) / threads, 1e-9)
    return Seconds(study[1] / threads / BATCH, reply[1] / threads / BATCH, max(1.0, busy))


def _timed(work: Callable[[], None], rounds: int = 3) -> tuple[float, float]:
    """Medians of a few rounds, after one to warm up: seconds of the wall, of the processor."""
    found = []
    for _ in range(rounds + 1):
        begun = time.perf_counter(), time.process_time()
        work()
        found.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    wall, own = (statistics.median(one) for one in zip(*found[1:], strict=True))
    return wall, own
