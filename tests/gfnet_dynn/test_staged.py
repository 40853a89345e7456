"""Exits on EfficientNet-lite: the same answers as without, real exits, costs, a run, an export."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from gfnet_dynn.config import parse
from gfnet_dynn.model_files import load_model
from gfnet_dynn.models.exit_policy import ExitPolicy
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from gfnet_dynn.models.named import NamedNetwork
from gfnet_dynn.models.staged import StagedNetwork
from shared_core.for_torch.pretrained import start_network
from shared_core.metrics import cost
from shared_core.runs import read_result
from shared_core.weights.catalogue import CATALOGUE
from shared_core.weights.finding import installed_file

SIDE, EXITS = 32, (7, 10, 14)
WORDS = (
    *("--scale", "short", "--backbone-arch", "lite0", "--no-distil", "--input-size", str(SIDE)),
    *("--backbone-epochs", "2", "--finetune-batch", "16", "--num_epoch", "3", "--batch", "16"),
    *("--max_warmup_epoch", "1", "--amp", "fp32", "--num_workers", "1", "--threads", "1"),
    *("--use_mlflow", "false", "--device", "cpu", "--bilevel_batch_count", "2"),
)


@pytest.fixture(scope="module")
def network() -> StagedNetwork:
    if installed_file(CATALOGUE[0]) is None:
        pytest.skip("the package of lite0's weights is not installed")
    torch.manual_seed(0)
    started = start_network("lite0", init="trained", num_classes=5)
    words = {"network": "core/efficientnet_lite0", "num_classes": 5, "img_size": (SIDE, SIDE)}
    return StagedNetwork(**words, started=started).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_it_is_the_same_network_block_by_block(network, images):
    plain = NamedNetwork(**network.config()).eval()
    plain.load_state_dict(network.state_dict())  # strict: no name more
    torch.testing.assert_close(network(images), plain(images))
    for mine, theirs in zip(network(images, embed=True), plain(images, embed=True), strict=True):
        torch.testing.assert_close(mine, theirs)
    maps = network.block_tokens(images, range(network.depth))
    assert [one.shape[1] for one in maps] == list(network.widths) and network.depth == 17
    assert network.token_shape(10) == tuple(maps[10].shape[1:]) == (112, 2, 2)
    torch.testing.assert_close(network.head(network.pool(maps[-1])), network(images))
    other = copy.deepcopy(network)
    other.body.conv_head.weight.zero_()  # the copy's own blocks, not the first one's
    assert not torch.equal(other(images), network(images))


def test_costs_add_up_to_those_of_the_whole(network):
    head = cost.linear(1, 1280, 5, name="head").macs
    assert sum(network.block_macs()) + head == network.macs()
    model = GFNetDynn(network, EXITS)
    costs = model.exit_costs()
    heads = [network.widths[block] * 5 + 4 for block in EXITS]
    for index, block in enumerate(EXITS):
        wanted = sum(network.block_macs()[: block + 1]) + sum(heads[: index + 1])
        assert costs[index] == wanted
    assert costs[-1] == network.macs() + sum(heads)


@torch.no_grad()
def test_samples_leave_with_the_answers_of_a_full_pass(network, images):
    torch.manual_seed(3)
    model = GFNetDynn(network, EXITS).eval()
    logits, gates = model(images)
    scores = torch.stack([z.softmax(1).amax(1) for z in logits[:-1]])
    policy = ExitPolicy("max_prob", float(scores.median()))
    found = model.early_exit(images, policy)
    wanted = policy.select(logits, gates)
    assert torch.equal(found.exit_index, wanted) and len(wanted.unique()) > 1
    for row, place in enumerate(wanted.tolist()):
        torch.testing.assert_close(found.logits[row], logits[place][row], atol=1e-4, rtol=1e-3)
    again = GFNetDynn.from_config(json.loads(json.dumps(model.config())))
    again.load_state_dict(model.state_dict())
    assert isinstance(again.backbone, StagedNetwork)


def test_words(tmp_path):
    (tmp_path / "aid/a").mkdir(parents=True)
    words = ("--scale", "short", "--data-root", str(tmp_path), "--backbone-arch", "lite0")
    values = parse([*words, "--no-distil"], prog="x", scale=None).values
    assert values["exits"] == EXITS and values["backbone_lr"] == 5e-4 and not values["teacher"]
    taught = parse(words, prog="x", scale=None).values
    assert taught["exits"] == (3, 5, 7, 9)  # those of the student


@pytest.fixture(scope="module")
def run(tmp_path_factory, command, folder_of_images):
    if installed_file(CATALOGUE[0]) is None:
        pytest.skip("the package of lite0's weights is not installed")
    home = tmp_path_factory.mktemp("staged")
    images = folder_of_images(home / "images", images=40, size=SIDE)
    done = command(*WORDS, "--data-path", images, "--output", home / "run")
    assert done.code == 0, done.err
    return home / "run"


def test_a_run_gives_a_trained_network_exits(run):
    measured = read_result(run / "result.json")["measured"]
    assert measured["backbone"]["macs"] == measured["exits"]["macs_without_exits"]
    assert [row["block"] for row in measured["exits"]["points"]["fast"]["exits"]] == [*EXITS, None]
    for point in measured["exits"]["points"].values():
        assert point["agreement_with_full_pass"] == 1.0
    (path,) = (run / "checkpoint/best").glob("*.pth")
    model, _ = load_model(path)
    (plain,) = (run / "checkpoint").glob("backbone_*.pth")
    backbone, _ = load_model(plain)
    for name, value in backbone.state_dict().items():  # frozen while exits learn
        assert torch.equal(model.backbone.state_dict()[name], value), name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows if "deep" in row} == {"backbone"}


@pytest.mark.slow
def test_it_is_exported_as_a_chain(run, tmp_path):
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    from gfnet_dynn.export_model import main
    from shared_core.deploy.facts import read_facts

    (path,) = (run / "checkpoint/best").glob("*.pth")
    assert main([str(path), str(tmp_path / "out")]) == 0
    facts = read_facts(tmp_path / "out")
    assert len(facts.files["onnx"]) == len(EXITS) + 1
    agreement = facts.measured["files"]["onnx"]["agreement"]
    assert agreement["same_class"] == agreement["same_exit"] == 1.0
