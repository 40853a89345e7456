"""The options: the README's spellings, and that a flag works or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared_core.runs import UsageError
from torch_cls_zoo.applications.launch import Plan, plan_processes
from torch_cls_zoo.config import ProcessSettings, parse
from torch_cls_zoo.options import OPTIONS, build_parser

# Every flag of the first README and of its code (notes of the first version).
ORIGINAL = (
    "--data --arch --image_size --num_classes --workers --batch_size --seed --sync_bn --cuda "
    "--nodes --gpus --rank --init_method --logdir --train --epochs --opt --lr --lr_ratios "
    "--lr_steps --momentum --wd --weight-decay --warmup --print-freq --pretrained --advprop "
    "--criterion --weighted_loss --threshold_loss --ghm_loss --ohm_loss --hard_ratio --mixup "
    "--mixup_ratio --mixup_alpha --aug --multi_scale --sparsity --slim --evaluate --evaluation "
    "--resume --jit --knowledge --distill --visual_data --visual_method --make_curriculum "
    "--curriculum_thresholds --curriculum_weights --curriculum_learning -a -j -b -p -e -n -g"
).split()


def test_every_flag_of_the_first_readme_is_there():
    known = {word for action in build_parser()._actions for word in action.option_strings}
    assert [flag for flag in ORIGINAL if flag not in known] == []


def test_the_defaults_of_the_first_version_are_kept():
    config = parse(["--train", "--recipe", "readme"])
    training, augment = config.training, config.augment
    assert (training.epochs, training.lr, training.opt) == (85, 1e-4, "adam")
    assert (training.warmup, training.wd, training.slim) == (5, 5e-4, 5e-4)
    assert (augment.mixup_ratio, augment.mixup_alpha, config.data.seed) == (0.5, 1.1, 1234)
    assert config.teaching.curriculum_thresholds == [0.7, 0.5, 0.3, 0.0]
    assert config.loss.hard_ratio == 0.7 and training.print_freq == 50


def test_every_option_ends_in_one_settings_class_or_says_how_the_run_starts():
    """A row of the table that no part of the program can read would have no effect."""
    config = parse(["--train"])
    parts = [getattr(config, name) for name in vars(config) if name not in ("values", "given")]
    known = [name for part in parts for name in vars(part)]
    shared = {"sync_bn"}  # the loss' layers, and a check of the processes
    assert {name for name in known if known.count(name) > 1} == shared
    modes = {"train", "evaluate", "export", "jit"}  # run.modes has them
    starts, spellings = {"go_on", "fresh"}, {"aug", "cuda"}  # run.start; aug_policy, device
    assert set(OPTIONS) - set(known) == modes | starts | spellings


@pytest.mark.parametrize(
    ("words", "read"),
    [
        ("--device cpu", lambda c: c.processes.device == "cpu"),
        ("--no-cuda", lambda c: c.processes.device == "cpu"),
        ("--cuda", lambda c: c.processes.device == "cuda"),
        ("--input-size 30", lambda c: c.data.image_size == (30, 30)),
        ("--image_size 30 40", lambda c: c.data.image_size == (30, 40)),
        ("--data-path x", lambda c: c.data.data == "x" and c.teaching.knowledge_dir == Path("x")),
        ("--data x", lambda c: c.data.data == "x"),
        ("--batch-size 3", lambda c: c.data.batch_size == 3),
        ("-b 3 -j 2", lambda c: (c.data.batch_size, c.data.workers) == (3, 2)),
        ("--init", lambda c: c.network.init == "trained"),
        ("--pretrained w.pth", lambda c: c.network.init == "w.pth"),
        ("--init none", lambda c: c.network.init == "none"),
        ("--aug", lambda c: c.augment.aug_policy == "my"),
        ("--bias_prior 0.1 0.2", lambda c: c.training.bias_prior == [0.1, 0.2]),
        ("--continue", lambda c: c.run.start == "continue"),
        ("--fresh", lambda c: c.run.start == "fresh"),
    ],
)
def test_old_and_new_spellings(words, read):
    assert read(parse(["--train", *words.split()]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epochs 3", "nothing without --train"),
        ("--mixup", "nothing without --train"),
        ("--train --mixup_alpha 0.4", "nothing without --mixup"),
        ("--train --mixup_ratio 0.4", "nothing without --mixup or --cutmix"),
        ("--train --cutmix_alpha 0.4", "nothing without --cutmix"),
        ("--train --slim 0.1", "nothing without --sparsity"),
        ("--train --hard_ratio 0.1", "nothing without --ohm_loss"),
        ("-e --resume WEIGHTS --ohm_loss", "--ohm_loss does nothing without --train"),
        ("-e --train --ghm_counts original", "nothing without --ghm_loss"),
        ("--train --criterion bce --ghm_loss --ghm_counts original", "with --criterion bce"),
        ("--seed 3", "--seed does nothing without --train"),
        ("--train --int8 no", "nothing without --export or --jit"),
        ("--train --knowledge_dir k", "nothing without --knowledge or"),
        ("--train --class_matrices x.yaml", "nothing without --weighted_loss"),
        ("--train --visual_layer fc", "nothing without --visual_data"),
        ("--train --curriculum_weights 1", "nothing without --make_curriculum"),
        ("--train --knowledge_name distill_b.txt", "nothing without --knowledge"),
        ("--train --distill --knowledge train", "run them apart"),
        ("--train --aug --aug_policy imagenet", "--aug means"),
        ("--train --lr_ratios 1 2", "go together"),
        ("--train --lr_ratios 1 2 --lr_steps 1 2 --warmup 3", "--warmup does nothing with"),
        ("--train --lr_ratios 1 2 --lr_steps 1 2 --schedule cosine", "--schedule cosine"),
        ("--train --probe --bias_prior data", "nothing with --probe"),
        ("--train --image_size 1 2 3", "--image_size"),
        ("--train --epochs 5 --warmup 5", "--warmup is 5"),
        ("--train --bias_prior many", "--bias_prior"),
        ("--evaluate", "--resume FILE"),
        ("--train --nodes 2", "--rank is -1"),
        ("--train --nodes 2 --rank 2", "--rank is 2"),
        ("--train --rank 1", "--rank is 1"),
        ("--train --resume --fresh", "no --continue or --fresh"),
        ("--train --continue --fresh", "expected one of them"),
        ("--train --no-cuda --device cuda:1", "--device is cuda:1"),
        ("--train --resume WEIGHTS --pretrained", "both name weights"),
        ("--resume", "add --train"),
        ("--train --data builtin --distill", "--knowledge_dir"),
        ("--find_lr --train", "stands alone"),
        ("--train --recipe probe --lr 0.1", "--lr does nothing with --recipe probe"),
        ("--train --recipe probe --epochs 3", "--epochs does nothing with --recipe probe"),
        ("--train --recipe probe --aug", "--aug does nothing with --recipe probe"),
        ("--train --recipe probe --distill", "--distill does nothing with --recipe probe"),
        ("--find_lr --recipe probe", "--find_lr does nothing with --recipe probe"),
        ("--train --recipe probe --init none", "needs trained weights"),
        ("--train --unfreeze 2 --init none", "needs trained weights"),
        ("--train --patience 10 --epochs 10", "--patience 10 does nothing"),
        ("--train --save_every 3 --accumulate 2", "a multiple of --accumulate 2"),
        ("--find_lr --ema 0.9", "nothing without --train"),
    ],
)
def test_words_that_would_do_nothing_or_contradict_are_refused(words, message, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"x")
    with pytest.raises(UsageError, match=message.replace("*", r"\*")):
        parse(words.replace("WEIGHTS", str(tmp_path / "w.pth")).split())


@pytest.mark.parametrize(
    "words",
    ["--lr 0", "--lr nan", "--epochs 0", "--hard_ratio 0", "--image_size 0 5", "--num_classes 1",
     "--mixup_ratio 1.5", "--momentum 1", "--find_lr 4", "--opt"],
)  # fmt: skip
def test_numbers_out_of_range_are_one_line_and_name_the_option(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--train", "--ohm_loss", "--mixup", *words.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words.split()[0] in error


def test_a_missing_file_of_weights_is_told_at_once():
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        parse(["-e", "--resume", "gone.pth"])


def test_both_spellings_of_grad_cam_plus_plus(tmp_path):
    file = tmp_path / "w.pth"
    file.write_bytes(b"x")
    for name in ("grad-cam++", "grad-camm++"):
        words = ["--visual_data", "test", "--resume", str(file), "--visual_method", name]
        assert parse(words).pictures.visual_method == "grad-cam++"


def test_resume_means_weights_or_a_run(tmp_path):
    (tmp_path / "run" / "state").mkdir(parents=True)
    (tmp_path / "run" / "state" / "train.pth").write_bytes(b"x")
    (tmp_path / "w.pth").write_bytes(b"x")
    weights = parse(["--train", "--resume", str(tmp_path / "w.pth")])
    assert weights.run.start == "new" and weights.network.resume == str(tmp_path / "w.pth")
    for place in (tmp_path / "run", tmp_path / "run" / "state" / "train.pth"):
        config = parse(["--train", "--resume", str(place)])
        assert config.run.start == "resume" and config.run.output == tmp_path / "run"
        assert config.network.resume is None
    bare = parse(["--train", "--output", str(tmp_path / "run"), "--resume"])
    assert bare.run.start == "resume" and bare.run.output == tmp_path / "run"
    with pytest.raises(UsageError, match="goes on in that folder"):
        parse(["--train", "--output", "elsewhere", "--resume", str(tmp_path / "run")])


def test_what_a_command_does_not_say_is_taken_from_the_run(tmp_path):
    (tmp_path / "run").mkdir()
    config = parse(["--train", "--resume", str(tmp_path / "run"), "--lr", "0.5", "-j", "3"])
    stored = config.stored()
    assert stored["lr"] == 0.5 and stored["epochs"] is None and stored["workers"] == 3
    stored = {name: config.values[name] for name in stored}  # as open_run fills it
    whole = config.continued({**stored, "epochs": 7, "ohm_loss": True, "class_matrices": "m.yaml",
                              "weighted_loss": True, "image_size": [20, 30]})  # fmt: skip
    assert (whole.training.epochs, whole.training.lr, whole.data.workers) == (7, 0.5, 3)
    assert whole.loss.class_matrices == Path("m.yaml") and whole.data.image_size == (20, 30)
    needy = parse(["--train", "--resume", str(tmp_path / "run"), "--hard_ratio", "0.5"])
    assert needy.continued({**stored, "ohm_loss": True, "hard_ratio": 0.5}).loss.hard_ratio == 0.5
    with pytest.raises(UsageError, match="--hard_ratio does nothing without --ohm_loss"):
        needy.continued({**stored, "ohm_loss": False})


def asked(**given) -> ProcessSettings:
    usual = {"device": "auto", "nodes": 1, "gpus": None, "rank": -1, "sync_bn": False, "threads": 0}
    return ProcessSettings(**{**usual, "init_method": "tcp://127.0.0.1:1", **given})


@pytest.mark.parametrize(
    ("flags", "gpus", "env", "plan"),
    [
        ({}, 0, {}, Plan("cpu", 1, 0, 1)),
        ({}, 4, {}, Plan("cuda", 4, 0, 4)),
        ({"gpus": 2}, 4, {}, Plan("cuda", 2, 0, 2)),
        ({"gpus": 0}, 4, {}, Plan("cpu", 1, 0, 1)),
        ({"device": "cuda:1"}, 4, {}, Plan("cuda:1", 1, 0, 1)),
        ({"device": "cpu", "gpus": 3}, 4, {}, Plan("cpu", 3, 0, 3)),
        ({"nodes": 3, "rank": 2, "gpus": 4}, 4, {}, Plan("cuda", 4, 8, 12)),
        ({"nodes": 2, "rank": 0, "device": "cpu", "gpus": 2}, 0, {}, Plan("cpu", 2, 0, 4)),
        ({"sync_bn": True}, 2, {}, Plan("cuda", 2, 0, 2)),
        ({}, 2, {"RANK": "1", "WORLD_SIZE": "2"}, Plan("cuda", 1, 1, 2, True)),
    ],
)
def test_flags_to_ranks(flags, gpus, env, plan):
    assert plan_processes(asked(**flags), flags, gpus=gpus, env=env) == plan


def test_all_ranks_of_all_machines_are_there_once():
    nodes, gpus = 3, 4
    ranks = []
    for node in range(nodes):
        flags = {"nodes": nodes, "rank": node, "gpus": gpus}
        plan = plan_processes(asked(**flags), flags, gpus=gpus, env={})
        ranks += [plan.first_rank + local for local in range(plan.local)]
        assert plan.world_size == nodes * gpus
    assert ranks == list(range(nodes * gpus))


@pytest.mark.parametrize(
    ("flags", "gpus", "env", "message"),
    [
        ({"gpus": 2}, 0, {}, "add --no-cuda"),
        ({"device": "cuda"}, 0, {}, "no GPU"),
        ({"device": "tpu"}, 2, {}, "--device is 'tpu'"),
        ({"gpus": 3}, 2, {}, "has 2"),
        ({"gpus": 2, "device": "cuda:0"}, 2, {}, "has 1"),
        ({"sync_bn": True}, 1, {}, "--sync_bn"),
        ({"sync_bn": True, "device": "cpu", "gpus": 2}, 2, {}, "--sync_bn"),
        ({"gpus": 2}, 2, {"RANK": "0", "WORLD_SIZE": "2"}, "torchrun decides"),
        ({"init_method": "tcp://127.0.0.1:1"}, 0, {}, "nothing for one process"),
    ],
)
def test_processes_that_cannot_be_are_refused(flags, gpus, env, message):
    with pytest.raises(UsageError, match=message):
        plan_processes(asked(**flags), flags, gpus=gpus, env=env)


def test_output_has_a_folder_by_default():
    assert parse(["--train"]).run.output == Path("runs/torch_cls_zoo/efficientnet_lite0")
    assert parse(["--train", "-a", "resnet18"]).run.output == Path("runs/torch_cls_zoo/resnet18")
