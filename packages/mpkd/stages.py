"""The stages that train: the teacher from labels, the student from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mpkd.dataset.data_utils import CALIBRATION, TEST, TRAIN
from mpkd.few_bits import lower, needs_teacher
from mpkd.model.lora import adapter_weights, add_lora, merge_lora
from mpkd.model.networks import OWN, build_net, sight_of
from mpkd.model.student import check_small_enough
from mpkd.model.teacher import check_teaches
from mpkd.quant.layers import quant_layers
from mpkd.run_context import ADAPTER_FILE, STUDENT_FILE, TEACHER_FILE, Run, check_engine_device
from mpkd.starting import Started, start_head, start_net
from mpkd.trainer.objectives import LearningTeacher, Objective, make_objective
from mpkd.trainer.settings import Settings, bits_settings, finetuned, settings_from
from mpkd.utils.common import PROJECT, describe_net, load_net, starts_trained
from shared_core import checkpoints
from shared_core.for_torch.checkpoints import load_into, save_checkpoint
from shared_core.for_torch.cost import count_params
from shared_core.for_torch.networks import find_network, head_names
from shared_core.runs import UsageError
from shared_core.weights.finding import find_weights


def check_networks(run: Run) -> None:
    """Build both networks without memory: what cannot be is told before anything is trained.

    Raises:
        ValueError: an unknown network, or a small student that is not small beside its teacher.
        UsageError: a teacher's engine that does not compute on the run's device; weights to start
            from that are not there.
    """
    config = run.config
    check_engine_device(config, run.device)
    made = {}
    for role in ("student", "teacher") if needs_teacher(config) else ("student",):
        about = describe_net(role, config, image_size=run.data.image_size)
        with torch.device("meta"):
            made[role] = build_net(about, num_classes=len(run.data.classes))
        if starts_trained(config, role):
            own = about["name"] == OWN
            name = "" if own else find_network(about["name"]).name
            find_weights(config[f"model.{role}_ckpt"], architecture=name)
    if "teacher" in made and config["model.student_model"] == OWN:
        check_small_enough(made["student"], made["teacher"])


# -- teacher --------------------------------------------------------------------------------------


def teacher_stage(run: Run) -> dict[str, Any]:
    """Load the teacher, fine-tune it, and refuse one that knows nothing."""
    config = run.config
    if not needs_teacher(config):
        return {"skipped": "mode labels has no teacher"}
    if config["distillation.mode"] == "apprentice_a":
        return {"skipped": "apprentice_a trains it beside the student"}
    run.begin("teacher")
    started = start_net(run, "teacher")
    net = started.net
    if not started.source and config["teacher.mode"] != "full" and not adapts_student(config):
        raise UsageError(
            f"teacher.mode {config['teacher.mode']} adapts a trained network: expected "
            "model.teacher_ckpt, or teacher.mode=full"
        )
    floor: dict[str, Any] = {}
    seconds, epoch = 0.0, 0
    if started.ours:
        said = f"{config['model.teacher_ckpt']} is of this project and of these classes"
        run.log.say(f"teacher: {said}, used as it is")
    else:
        floor = start_head(run, started, "teacher")
        epoch, seconds = _fine_tune(run, started)
    result = run.evaluate(net, CALIBRATION)
    check_teaches(result.accuracy, run.data.shares(CALIBRATION))
    test = run.evaluate(net, TEST)
    metrics = {"calibration_accuracy": result.accuracy, "test_accuracy": test.accuracy}
    digest = run.save(TEACHER_FILE, net, started.about, epoch=epoch, metrics=metrics)
    run.log.say(f"teacher: test accuracy {test.accuracy:.4f}")
    return {
        **metrics, "name": config["model.teacher_model"], "parameters": count_params(net),
        "epoch": epoch, "sha256": digest, "start": started.source, "seconds": seconds,
        "image_size": started.about["image_size"], "floor": floor,
    }  # fmt: skip


def _fine_tune(run: Run, started: Started) -> tuple[int, float]:
    """Train the teacher on labels: all of it, its head, or adapters that are merged at the end."""
    config, net = run.config, started.net
    mode = "full" if adapts_student(config) else config["teacher.mode"]
    heads = head_names(net, len(run.data.classes)) if mode != "full" else []
    if mode == "head":
        net.requires_grad_(False)
        for head in heads:
            net.get_submodule(head).requires_grad_(True)
    elif mode == "lora":
        adapt(run, net, trained=heads if started.new_head else ())
    settings = settings_from(
        config, epochs=config["teacher.epochs"], learning_rate=config["teacher.learning_rate"]
    )
    trained = bool(started.source)
    if trained and mode == "full":
        settings = finetuned(settings, config, classes=len(run.data.classes))
    objective = labels_objective(config, trained=trained)
    best, trainer = run.fit(
        "teacher", net, objective, settings=settings, start_counts=trained and mode == "full",
        loader=run.training_loader("teacher", sight=sight_of(net)),
        frozen_norms=mode != "full" or (trained and config["finetune.freeze_norms"]),
    )  # fmt: skip
    if mode == "lora":
        finish_adapters(run, net)
    net.requires_grad_(True)
    seconds = trainer.state.seconds
    trainer.state.remove()
    return best.epoch, seconds


def labels_objective(config: Mapping[str, Any], *, trained: bool) -> Objective:
    """Labels, smoothed for a network that starts from trained weights."""
    smoothing = config["finetune.label_smoothing"] if trained else 0.0
    return make_objective({"distillation.mode": "labels"}, None, smoothing=smoothing)


def adapt(run: Run, net: nn.Module, *, trained: Sequence[str]) -> None:
    """Give ``net`` the adapters of ``lora.*``."""
    config = run.config
    names = add_lora(
        net, rank=config["lora.r"], alpha=config["lora.alpha"], dropout=config["lora.dropout"],
        targets=config["lora.target_modules"] or None, trained=trained,
    )  # fmt: skip
    net.to(run.device)
    run.log.say(f"lora: {len(names)} layers with adapters of rank {config['lora.r']}")


def finish_adapters(run: Run, net: nn.Module) -> None:
    """Keep the adapters in a file of their own and merge them into the weights."""
    if run.world.is_main:
        facts = checkpoints.make_facts(
            project=PROJECT, architecture="adapters", class_names=run.data.classes,
            framework="torch", config=run.config,
        )  # fmt: skip
        save_checkpoint(run.checkpoint(ADAPTER_FILE), adapter_weights(net), facts)
    merge_lora(net)


# -- distil ---------------------------------------------------------------------------------------


def load_teacher(run: Run) -> tuple[nn.Module, str]:
    """The teacher of an earlier stage and its sha256."""
    net, facts = load_net(run.checkpoint(TEACHER_FILE))
    return net.to(run.device), facts["sha256"]


def distil_stage(run: Run) -> dict[str, Any]:
    """Train the student: on the teacher's outputs, on labels, on both, or as an apprentice."""
    config, mode = run.config, run.config["distillation.mode"]
    run.begin("distil")
    if mode == "apprentice_a":
        return _together(run)
    teacher, digest = load_teacher(run) if needs_teacher(config) else (None, "")
    started, floor = start_student(run, teacher, digest)
    student, about = started.net, started.about
    if mode == "apprentice_c":
        return _lowered(run, student, about, teacher, digest)
    lowers = mode == "apprentice_b" and _lowers(config)
    quantization = lower(run, student) if lowers else None
    if adapts_student(config):
        return _adapted(run, student, about, teacher, digest)
    epoch, seconds = train_student(run, "distil", student, teacher, digest)
    found = _student_result(
        run, student, about, teacher, epoch=epoch, seconds=seconds, quantization=quantization
    )
    return {**found, "floor": floor, "start": started.source}


def start_student(
    run: Run, teacher: nn.Module | None, digest: str
) -> tuple[Started, dict[str, Any]]:
    """The student before its training, and the floor where its labels made one.

    The head of one that starts from trained weights is a linear probe: of labels, or, where the
    teacher alone may speak, of what it says.
    """
    config, started = run.config, start_net(run, "student")
    said = None
    if started.source and config["distillation.mode"] == "teacher_only" and teacher is not None:
        said = run.teacher_says(teacher, digest)
    return started, start_head(run, started, "student", labels=said)


def adapts_student(config: Mapping[str, Any]) -> bool:
    """Whether the adapters of ``teacher.mode=lora`` are the student's."""
    return config["teacher.mode"] == "lora" and config["lora.target"] == "student"


def _first_part(
    run: Run,
    name: str,
    student: nn.Module,
    about: Mapping[str, Any],
    teacher: nn.Module | None,
    digest: str,
) -> float:
    """Train the student before what makes it another network; done once, also after a kill."""
    done = run.log.done(name)
    if done is None:
        epoch, seconds = train_student(run, name, student, teacher, digest)
        run.save(f"{name}.pth", student, about, epoch=epoch, metrics={})
        result = {"epoch": epoch, "seconds": seconds, "csv_position": run.csv.position()}
        done = run.log.finish(name, result)
    load_into(student, run.checkpoint(f"{name}.pth"), project=PROJECT)
    return float(done["seconds"])


def _adapted(
    run: Run, student: nn.Module, about: Mapping[str, Any], teacher: nn.Module | None, digest: str
) -> dict[str, Any]:
    """A trained student, then its adapters, on the same objective; merged at the end."""
    config = run.config
    first = _first_part(run, "student_base", student, about, teacher, digest)
    run.begin("distil", "adapters")
    adapt(run, student, trained=())
    settings = settings_from(
        config, epochs=config["teacher.epochs"], learning_rate=config["teacher.learning_rate"]
    )
    epoch, second = train_student(
        run, "distil", student, teacher, digest, settings=settings, frozen_norms=True
    )
    finish_adapters(run, student)
    return _student_result(run, student, about, teacher, epoch=epoch, seconds=first + second)


def train_student(
    run: Run,
    stage: str,
    student: nn.Module,
    teacher: nn.Module | None,
    digest: str,
    *,
    settings: Settings | None = None,
    frozen_norms: bool = False,
) -> tuple[int, float]:
    """Train a network (quantized or not) by the run's objective; its best epoch and the seconds.

    Args:
        digest: sha256 of the teacher's weights.
        settings: None takes those of the student.
    """
    config = run.config
    images = run.data.learning_set(unlabelled=teacher is not None)
    source, replayed, reference = None, 0, None
    if teacher is not None:
        source, replayed = run.teacher_source(teacher, digest, images, seen=sight_of(student))
        reference = run.reference(teacher)
    alone = config["distillation.mode"] == "teacher_only" and teacher is not None
    trained = starts_trained(config, "student")
    plain = settings is None and not quant_layers(student)
    settings = settings or settings_from(config)
    if trained and plain:
        settings = finetuned(settings, config, classes=len(run.data.classes))
    objective = labels_objective(config, trained=trained)
    if teacher is not None:
        objective = make_objective(config, source)
    loader = run.training_loader("student", images, replayed=replayed, sight=sight_of(student))
    best, trainer = run.fit(
        stage, student, objective, settings=settings, loader=loader, reference=reference,
        choose_by="agreement" if alone else "accuracy", start_counts=trained and plain,
        labelled=len(images) == len(run.data.sets[TRAIN]),
        frozen_norms=frozen_norms or (trained and config["finetune.freeze_norms"]),
    )  # fmt: skip
    seconds = trainer.state.seconds
    trainer.state.remove()
    return best.epoch, seconds


def _student_result(
    run: Run,
    student: nn.Module,
    about: Mapping[str, Any],
    teacher: nn.Module | None,
    *,
    epoch: int,
    seconds: float,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate, write, and say what came out."""  # fmt: skip
    calibration, test = run.evaluate(student, CALIBRATION), run.evaluate(student, TEST)
    metrics: dict[str, Any] = {
        "calibration_accuracy": calibration.accuracy, "test_accuracy": test.accuracy,
    }  # fmt: skip
    if teacher is not None:
        metrics["agreement"] = test.agreement(run.evaluate(teacher, TEST).logits)
    digest = run.save(
        STUDENT_FILE, student, about, epoch=epoch, metrics=metrics, quantization=quantization
    )
    run.log.say(f"distil: test accuracy {test.accuracy:.4f}")
    return {
        **metrics, "name": run.config["model.student_model"], "epoch": epoch,
        "parameters": count_params(student), "mode": run.config["distillation.mode"],
        "sha256": digest, "seconds": seconds,
    }  # fmt: skip


def _together(run: Run) -> dict[str, Any]:
    """Apprentice A: teacher and student from scratch, in one training."""
    config = run.config
    started = start_net(run, "student")
    student, about = started.net, started.about
    run.begin("distil", "teacher")
    helper = start_net(run, "teacher")
    teacher = helper.net
    source = LearningTeacher(teacher)
    quantization = lower(run, student) if _lowers(config) else None
    settings = settings_from(config)
    best, trainer = run.fit(
        "distil", student, make_objective(config, source), settings=settings,
        loader=run.training_loader("student", sight=sight_of(student)), helper=source,
    )  # fmt: skip
    run.save(TEACHER_FILE, teacher, helper.about, epoch=settings.epochs, metrics={})
    result = _student_result(
        run, student, about, teacher, epoch=best.epoch, seconds=trainer.state.seconds,
        quantization=quantization,
    )  # fmt: skip
    trainer.state.remove()
    return result


def _lowered(
    run: Run, student: nn.Module, about: Mapping[str, Any], teacher: nn.Module | None, digest: str
) -> dict[str, Any]:
    """Apprentice C: a student trained on labels; then few bits and the teacher, at a low rate."""
    config = run.config
    first = _first_part(run, "student_labels", student, about, None, "")
    run.begin("distil", "lowered")
    quantization = lower(run, student)
    epoch, second = train_student(
        run, "distil", student, teacher, digest, settings=bits_settings(config)
    )
    return _student_result(
        run, student, about, teacher, epoch=epoch, seconds=first + second,
        quantization=quantization,
    )  # fmt: skip


def _lowers(config: Mapping[str, Any]) -> bool:
    """Whether the student of an apprentice scheme has few bits from the start."""
    return config["quantization.method"] == "qat"
