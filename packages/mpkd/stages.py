"""The stages that train from nothing or from labels: teacher and distil."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mpkd.dataset.data_utils import CALIBRATION, TEST, TRAIN
from mpkd.few_bits import lower, needs_teacher
from mpkd.model.lora import adapter_weights, add_lora, merge_lora
from mpkd.model.student import check_small_enough
from mpkd.model.teacher import check_teaches, head_name, load_pretrained
from mpkd.run_context import ADAPTER_FILE, STUDENT_FILE, TEACHER_FILE, Run, check_engine_device
from mpkd.trainer.objectives import LearningTeacher, Objective, make_objective
from mpkd.trainer.settings import Settings, bits_settings, settings_from
from mpkd.utils.common import PROJECT, build_net, describe_net, load_net
from shared_core import checkpoints
from shared_core.checkpoints import CheckpointError
from shared_core.for_torch.checkpoints import (
    fit_into,
    load_checkpoint,
    load_into,
    save_checkpoint,
)
from shared_core.for_torch.cost import count_params
from shared_core.runs import UsageError


def new_net(run: Run, role: str) -> tuple[nn.Module, dict[str, Any]]:
    """An untrained teacher or student on the run's device, and what rebuilds it."""
    about = describe_net(role, run.config, image_size=run.data.image_size)
    net = build_net(about, num_classes=len(run.data.classes))
    return net.to(run.device), about


def check_networks(run: Run) -> None:
    """Build both networks without memory: a bad name or size is told before anything is trained.

    Raises:
        ValueError: an unknown network, or a small student that is not small beside its teacher.
        UsageError: a teacher's engine that does not compute on the run's device.
    """
    check_engine_device(run.config, run.device)
    count = len(run.data.classes)
    size = run.data.image_size
    with torch.device("meta"):
        student = build_net(describe_net("student", run.config, image_size=size), num_classes=count)
        if needs_teacher(run.config):
            about = describe_net("teacher", run.config, image_size=size)
            teacher = build_net(about, num_classes=count)
            if run.config["model.student_model"] == "simple_cnn":
                check_small_enough(student, teacher)


def _labels_objective() -> Objective:
    return make_objective({"distillation.mode": "labels"}, None)


# -- teacher --------------------------------------------------------------------------------------


def teacher_stage(run: Run) -> dict[str, Any]:
    """Load the teacher, fine-tune it, and refuse one that knows nothing."""
    config = run.config
    if not needs_teacher(config):
        return {"skipped": "mode labels has no teacher"}
    if config["distillation.mode"] == "apprentice_a":
        return {"skipped": "apprentice_a trains it beside the student"}
    run.begin("teacher")
    net, about = new_net(run, "teacher")
    new_head, ours, found = True, False, config["model.teacher_ckpt"]
    if found:
        ours, new_head = _load_teacher(run, net, found)
        source = found
    else:
        source = "trained here"
        if config["teacher.mode"] != "full" and not adapts_student(config):
            raise UsageError(
                f"teacher.mode {config['teacher.mode']} adapts a trained network: expected "
                "model.teacher_ckpt, or teacher.mode=full"
            )
    seconds, epoch = 0.0, 0
    if ours and not new_head:
        run.log.say(f"teacher: {found} is of this project and of these classes, used as it is")
    else:
        epoch, seconds = _fine_tune(run, net, new_head=new_head)
    result = run.evaluate(net, CALIBRATION)
    check_teaches(result.accuracy, run.data.shares(CALIBRATION))
    test = run.evaluate(net, TEST)
    metrics = {"calibration_accuracy": result.accuracy, "test_accuracy": test.accuracy}
    digest = run.save(TEACHER_FILE, net, about, epoch=epoch, metrics=metrics)
    return {
        **metrics, "name": config["model.teacher_model"], "parameters": count_params(net),
        "epoch": epoch, "sha256": digest, "source": source, "seconds": seconds,
    }  # fmt: skip


def _load_teacher(run: Run, net: nn.Module, path: str) -> tuple[bool, bool]:
    """Fill the teacher; whether the file is of this project, and whether its head is new."""
    try:
        weights, facts = load_checkpoint(path, project=PROJECT)
    except CheckpointError as error:
        if "no facts" not in str(error) and "schema" not in str(error):
            raise
        left = load_pretrained(net, path)
        head = "a new head" if left else "its own head"
        run.log.say(f"teacher: starts from {path} with {head}")
        return False, bool(left)
    same = tuple(facts["class_names"]) == run.data.classes
    if facts["net"]["name"] != run.config["model.teacher_model"] or not same:
        raise UsageError(
            f"model.teacher_ckpt {path}: a {facts['net']['name']} of {len(facts['class_names'])} "
            f"classes, expected {run.config['model.teacher_model']} of this data's "
            f"{len(run.data.classes)}"
        )
    fit_into(net, weights, path=path)
    return True, False


def _fine_tune(run: Run, net: nn.Module, *, new_head: bool) -> tuple[int, float]:
    """Train the teacher on labels: all of it, its head, or adapters that are merged at the end."""
    config = run.config
    mode = "full" if adapts_student(config) else config["teacher.mode"]
    head = head_name(net) if mode != "full" else ""
    if mode == "head":
        net.requires_grad_(False)
        net.get_submodule(head).requires_grad_(True)
    elif mode == "lora":
        adapt(run, net, trained=(head,) if new_head else ())
    settings = settings_from(
        config, epochs=config["teacher.epochs"], learning_rate=config["teacher.learning_rate"]
    )
    best, trainer = run.fit(
        "teacher", net, _labels_objective(), settings=settings,
        loader=run.training_loader("teacher"), frozen_norms=mode != "full",
    )  # fmt: skip
    if mode == "lora":
        finish_adapters(run, net)
    net.requires_grad_(True)
    seconds = trainer.state.seconds
    trainer.state.remove()
    return best.epoch, seconds


def adapt(run: Run, net: nn.Module, *, trained: tuple[str, ...]) -> None:
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
    student, about = new_net(run, "student")
    if mode == "apprentice_a":
        return _together(run, student, about)
    teacher, digest = load_teacher(run) if needs_teacher(config) else (None, "")
    if mode == "apprentice_c":
        return _lowered(run, student, about, teacher, digest)
    lowers = mode == "apprentice_b" and _lowers(config)
    quantization = lower(run, student) if lowers else None
    if adapts_student(config):
        return _adapted(run, student, about, teacher, digest)
    epoch, seconds = train_student(run, "distil", student, teacher, digest)
    return _student_result(
        run, student, about, teacher, epoch=epoch, seconds=seconds, quantization=quantization
    )


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
        source, replayed = run.teacher_source(teacher, digest, images)
        reference = run.reference(teacher)
    alone = config["distillation.mode"] == "teacher_only" and teacher is not None
    chosen = config if teacher is not None else {"distillation.mode": "labels"}
    best, trainer = run.fit(
        stage, student, make_objective(chosen, source), settings=settings or settings_from(config),
        loader=run.training_loader("student", images, replayed=replayed), reference=reference,
        choose_by="agreement" if alone else "accuracy",
        labelled=len(images) == len(run.data.sets[TRAIN]), frozen_norms=frozen_norms,
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


def _together(run: Run, student: nn.Module, about: Mapping[str, Any]) -> dict[str, Any]:
    """Apprentice A: teacher and student from scratch, in one training."""
    config = run.config
    run.begin("distil", "teacher")
    teacher, _ = new_net(run, "teacher")
    source = LearningTeacher(teacher)
    quantization = lower(run, student) if _lowers(config) else None
    settings = settings_from(config)
    best, trainer = run.fit(
        "distil", student, make_objective(config, source), settings=settings,
        loader=run.training_loader("student"), helper=source,
    )  # fmt: skip
    shape = describe_net("teacher", config, image_size=run.data.image_size)
    run.save(TEACHER_FILE, teacher, shape, epoch=settings.epochs, metrics={})
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
