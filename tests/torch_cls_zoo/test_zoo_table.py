"""The README's table of networks: the published numbers come out, and the command's record."""

import json

import pytest
import torch
from torch import nn

from command_tools import run_main
from shared_core.runs import read_result, run_command
from torch_cls_zoo import compare_models
from torch_cls_zoo.experiments.model_table import (
    PUBLISHED,
    costs,
    forward_ratios,
    published_count,
    table_row,
)

# The published way of counting, millions, two decimals; where it differs from the README is said.
COUNTS = {
    "resnet18": 1820.16, "resnet50": 4109.68, "shufflenet_v2_x1_0": 148.01,
    "shufflenet_v2_x2_0": 588.43, "mobilenet_v2": 306.18, "mobilenetv3_small": 57.38,
    "mobilenetv3_large": 222.04, "efficientnet_b0": 391.29, "efficientnet_b4": 1518.97,
}  # fmt: skip
MACS = {
    "resnet18": 1813.56, "resnet50": 4087.15, "shufflenet_v2_x1_0": 143.89,
    "shufflenet_v2_x2_0": 581.22, "mobilenet_v2": 299.50, "mobilenetv3_small": 55.49,
    "mobilenetv3_large": 215.32, "efficientnet_b0": 384.54, "efficientnet_b4": 1501.93,
}  # fmt: skip
DIFFER = {"shufflenet_v2_x1_0", "efficientnet_b0", "efficientnet_b4"}


@pytest.mark.parametrize("arch", PUBLISHED)
def test_the_published_table(arch) -> None:
    found = costs(arch)
    assert round(found["published_count"] / 1e6, 2) == COUNTS[arch]
    assert found["macs"] / 1e6 == pytest.approx(MACS[arch], abs=0.06)
    row = table_row(arch, found)
    assert (row["params_agree"] and row["count_agrees"]) == (arch not in DIFFER)
    assert bool(row.get("why")) == (arch in DIFFER)


def test_the_mismatches_are_what_the_notes_say() -> None:
    assert round(costs("shufflenet_v2_x1_0", num_classes=5)["published_count"] / 1e6, 2) == 148.00
    large = costs("efficientnet_b4", pixels=380)["published_count"] / 1e6
    assert large == pytest.approx(4441.48, abs=0.01)
    published = PUBLISHED["efficientnet_b4"].count
    assert abs(large - published) / published < 0.04


def test_the_count_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=True), nn.BatchNorm2d(6), nn.ReLU(),
        nn.MaxPool2d(2), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    net.insert(0, nn.Conv2d(3, 4, 1, bias=False))
    first, conv, norm = 64 * 4 * 3, 64 * 6 * (2 * 9 + 1), 64 * 6
    relu, pool, linear = 64 * 6, 16 * 6 * 4, 6 * 3 + 3
    assert published_count(net, (8, 8)) == first + conv + norm + relu + pool + linear
    assert net.training and not any(m._forward_hooks for m in net.modules())


def test_the_base_is_as_fast_as_itself() -> None:
    threads = torch.get_num_threads()
    found = forward_ratios(["shufflenet_v2_x0_5"], rounds=3, pixels=64, base="shufflenet_v2_x0_5")
    assert 0.3 < found["shufflenet_v2_x0_5"]["ratio"] < 3
    assert torch.get_num_threads() == threads


def test_the_command_leaves_a_record_and_a_report(tmp_path, capsys) -> None:
    words = ["--output", str(tmp_path / "t"), "--arch", "mobilenetv3_small", "shufflenet_v2_x0_5"]
    assert run_command(compare_models.main, [*words, "--rounds", "0", "--no-onnx"]) == 0
    record = read_result(tmp_path / "t" / "result.json")
    small = record["measured"]["mobilenetv3_small"]
    assert small["params"] == 1_524_006 and small["count_agrees"] and small["params_agree"]
    assert "published" not in record["measured"]["shufflenet_v2_x0_5"]
    assert record["task"] == "torch_cls_zoo/models" and "--no-onnx" in record["command"]
    assert "57.38" in (tmp_path / "t" / "report.md").read_text()
    assert json.dumps(record) and "57.38" in capsys.readouterr().out


def test_the_command_with_times_and_onnx(tmp_path) -> None:
    words = ["--output", str(tmp_path), "--arch", "squeezenet1_1", "--rounds", "1"]
    assert run_command(compare_models.main, words) == 0
    found = read_result(tmp_path / "result.json")["measured"]["squeezenet1_1"]
    assert found["ratio_min"] <= found["ratio"] <= found["ratio_max"]
    assert found["onnx_bytes"] > 4 * found["params"] * 0.95


def test_a_wrong_name_is_told_before_any_work(tmp_path, capsys) -> None:
    words = ["--output", str(tmp_path / "t"), "--arch", "resnet18", "resnt50"]
    assert run_command(compare_models.main, words) == 1
    assert "resnt50" in capsys.readouterr().err and not (tmp_path / "t").exists()
    assert run_main(compare_models.main, ["--output", tmp_path, "--rounds", -1]).code == 2
