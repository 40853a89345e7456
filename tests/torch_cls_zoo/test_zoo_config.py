"""The options: the README's spellings, and that a flag works or is refused."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from shared_core.runs import UsageError
from torch_cls_zoo.applications.launch import Plan, plan_processes
from torch_cls_zoo.config import build_parser, parse

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
    args = parse(["--train"])
    assert (args.epochs, args.lr, args.opt, args.warmup, args.wd) == (85, 1e-4, "adam", 5, 5e-4)
    assert (args.mixup_ratio, args.mixup_alpha, args.slim, args.seed) == (0.5, 1.1, 5e-4, 1234)
    assert args.curriculum_thresholds == [0.7, 0.5, 0.3, 0.0]
    assert args.hard_ratio == 0.7 and args.print_freq == 50


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
        ("--train --ohm_loss --hard_ratio 0", "--hard_ratio is 0.0"),
        ("--train --class_matrices x.yaml", "nothing without --weighted_loss"),
        ("--train --visual_layer fc", "nothing without --visual_data"),
        ("--train --curriculum_weights 1", "nothing without --make_curriculum"),
        ("--train --knowledge_name distill_b.txt", "nothing without --knowledge"),
        ("--train --distill --knowledge train", "run them apart"),
        ("--train --aug --aug_policy imagenet", "--aug means"),
        ("--train --lr_ratios 1 2", "go together"),
        ("--train --lr 0", "--lr is 0.0"),
        ("--train --image_size 0 5", "--image_size"),
        ("--train --epochs 5 --warmup 5", "--warmup is 5"),
        ("--train --num_classes 1", "--num_classes is 1"),
        ("--train --bias_prior many", "--bias_prior"),
        ("--evaluate", "--resume FILE"),
        ("--train --nodes 2", "--rank is -1"),
        ("--train --nodes 2 --rank 2", "--rank is 2"),
        ("--train --rank 1", "--rank is 1"),
        ("--train --resume --fresh", "expected one of them"),
        ("--resume", "add --train"),
        ("--train --data builtin --distill", "--knowledge_dir"),
        ("--find_lr --train", "stands alone"),
    ],
)
def test_words_that_would_do_nothing_or_contradict_are_refused(words, message):
    with pytest.raises(UsageError, match=message.replace("*", r"\*")):
        parse(words.split())


def test_a_missing_file_of_weights_is_told_at_once():
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        parse(["-e", "--resume", "gone.pth"])


def test_both_spellings_of_grad_cam_plus_plus(tmp_path):
    file = tmp_path / "w.pth"
    file.write_bytes(b"x")
    for name in ("grad-cam++", "grad-camm++"):
        words = ["--visual_data", "test", "--resume", str(file), "--visual_method", name]
        assert parse(words).visual_method == "grad-cam++"


def test_resume_means_weights_or_a_run(tmp_path):
    (tmp_path / "run" / "state").mkdir(parents=True)
    (tmp_path / "run" / "state" / "train.pth").write_bytes(b"x")
    (tmp_path / "w.pth").write_bytes(b"x")
    weights = parse(["--train", "--resume", str(tmp_path / "w.pth")])
    assert not weights.exact and weights.resume == str(tmp_path / "w.pth")
    for place in (tmp_path / "run", tmp_path / "run" / "state" / "train.pth"):
        run = parse(["--train", "--resume", str(place)])
        assert run.exact and run.resume is None and run.output == tmp_path / "run"
    bare = parse(["--train", "--output", str(tmp_path / "run"), "--resume"])
    assert bare.exact and bare.output == tmp_path / "run"
    with pytest.raises(UsageError, match="goes on in that folder"):
        parse(["--train", "--output", "elsewhere", "--resume", str(tmp_path / "run")])


def arguments(**given) -> argparse.Namespace:
    base = {"cuda": None, "gpus": None, "nodes": 1, "rank": -1, "sync_bn": False}
    return argparse.Namespace(**{**base, **given}, given=set(given))


@pytest.mark.parametrize(
    ("flags", "gpus", "env", "plan"),
    [
        ({}, 0, {}, Plan("cpu", 1, 0, 1)),
        ({}, 4, {}, Plan("cuda", 4, 0, 4)),
        ({"gpus": 2}, 4, {}, Plan("cuda", 2, 0, 2)),
        ({"gpus": 0}, 4, {}, Plan("cpu", 1, 0, 1)),
        ({"cuda": False, "gpus": 3}, 4, {}, Plan("cpu", 3, 0, 3)),
        ({"nodes": 3, "rank": 2, "gpus": 4}, 4, {}, Plan("cuda", 4, 8, 12)),
        ({"nodes": 2, "rank": 0, "cuda": False, "gpus": 2}, 0, {}, Plan("cpu", 2, 0, 4)),
        ({"sync_bn": True}, 2, {}, Plan("cuda", 2, 0, 2)),
        ({}, 2, {"RANK": "1", "WORLD_SIZE": "2"}, Plan("cuda", 1, 1, 2, True)),
    ],
)
def test_flags_to_ranks(flags, gpus, env, plan):
    assert plan_processes(arguments(**flags), gpus=gpus, env=env) == plan


def test_all_ranks_of_all_machines_are_there_once():
    nodes, gpus = 3, 4
    ranks = []
    for node in range(nodes):
        plan = plan_processes(arguments(nodes=nodes, rank=node, gpus=gpus), gpus=gpus, env={})
        ranks += [plan.first_rank + local for local in range(plan.local)]
        assert plan.world_size == nodes * gpus
    assert ranks == list(range(nodes * gpus))


@pytest.mark.parametrize(
    ("flags", "gpus", "env", "message"),
    [
        ({"gpus": 2}, 0, {}, "add --no-cuda"),
        ({"cuda": True}, 0, {}, "no GPU"),
        ({"gpus": 3}, 2, {}, "this machine has 2"),
        ({"sync_bn": True}, 1, {}, "--sync_bn"),
        ({"sync_bn": True, "cuda": False, "gpus": 2}, 2, {}, "--sync_bn"),
        ({"gpus": 2}, 2, {"RANK": "0", "WORLD_SIZE": "2"}, "torchrun decides"),
        ({"init_method": "tcp://127.0.0.1:1"}, 0, {}, "nothing for one process"),
    ],
)
def test_processes_that_cannot_be_are_refused(flags, gpus, env, message):
    with pytest.raises(UsageError, match=message):
        plan_processes(arguments(**flags), gpus=gpus, env=env)


def test_output_has_a_folder_by_default():
    assert parse(["--train"]).output == Path("runs/torch_cls_zoo/efficientnet_b0")
    assert parse(["--train", "-a", "resnet18"]).output == Path("runs/torch_cls_zoo/resnet18")
