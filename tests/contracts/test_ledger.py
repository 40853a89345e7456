"""The ledger refuses every way in which a claim or a page can say more than a record."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ledger_claims
import ledger_evidence

REPO = Path(__file__).resolve().parents[2]


def _tool(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, REPO / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


for _name in ("ledger_records", "ledger_documents", "ledger_checks"):
    _tool(_name)
ledger = _tool("ledger")


def _run_record(kind="real", scale="full", **changes):
    record = {
        "schema": "smallvision.record/1",
        "task": "gfnet_dynn/aid",
        "command": "make repro-gfnet-aid",
        "scale": scale,
        "data": {"name": "AID", "kind": kind, "images": 10000, "pixels": 600, "split_hash": "ab"},
        "seeds": [0, 1, 2],
        "measured": {
            "accuracy": [0.95, 0.96, 0.97],
            "one": 0.573,
            "at": {"0.5": {"cost": 12345678}},
            "rows": [{"name": "exit 1", "value": 0.25}],
        },
        "environment": {"cpu": "a processor", "cores": 2},
        "started": "2026-03-04T05:06:07+00:00",
        "wall_seconds": 12.5,
    }
    record["data"].update(changes)
    return record


def _claim(**changes):
    claim = {
        "id": "aid-accuracy",
        "claim": "it is accurate",
        "source": "table 1",
        "published": {"value": 0.9615, "unit": "fraction"},
        "protocol": "three seeds",
        "data": {"name": "AID", "images": 10000, "pixels": 600},
        "command": "make repro-gfnet-aid SCALE=full",
        "tolerance": {"absolute": 0.01},
        "status": "reproduced",
        "measured": {"mean": 0.96, "std": 0.01, "n": 3, "seeds": [0, 1, 2]},
        "record": "aid.json#measured.accuracy",
    }
    claim.update(changes)
    return claim


class Checkout:
    """A small repository with a ledger of its own."""

    def __init__(self, root):
        self.root = root
        (root / "docs/ledger/records").mkdir(parents=True)
        for project in ledger_claims.PROJECTS:
            self.claims([], project)
        self.record("aid.json", _run_record())

    def claims(self, claims, project="gfnet_dynn", **more):
        path = self.root / "docs/ledger" / f"{project}.yaml"
        path.write_text(yaml.safe_dump({"project": project, "claims": claims, **more}))
        return self

    def record(self, name, content):
        text = content if isinstance(content, str) else json.dumps(content)
        (self.root / "docs/ledger/records" / name).write_text(text)
        return self

    def document(self, text, name="README.md"):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return self

    def render(self):
        return ledger.main(["--root", str(self.root)])

    def problems(self, render=True):
        if render:
            self.render()
        return ledger.check(self.root)


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def _only(problems, *words):
    assert len(problems) == 1, problems
    for word in words:
        assert word in problems[0], problems
    assert "\n" not in problems[0]


def test_this_repositorys_ledger_is_sound():
    done = subprocess.run(
        [sys.executable, str(REPO / "tools/ledger.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def _recomputed():
    claims, problems = ledger_claims.load_claims(REPO)
    assert not problems
    return {
        f"{project}-{claim['id']}": claim
        for project, entries in claims.items()
        for claim in entries
        if claim["check"] is not None
    }


@pytest.mark.parametrize("name", _recomputed())
def test_claims_without_data_are_recomputed(name):
    pytest.importorskip("torchvision")
    claim = _recomputed()[name]
    got = ledger_evidence.recompute(claim)
    assert ledger_evidence.rounds_to(got, claim["measured"]["mean"]), got
    assert claim["measured"].get("n", 1) == 1


def test_a_sound_claim_passes_and_is_rendered(checkout):
    assert checkout.claims([_claim()]).problems() == []
    page = (checkout.root / "docs/ledger.md").read_text()
    assert "| AID, 600 px | 0.9615 | 0.96 ± 0.01 (n = 3) | reproduced |" in page
    assert "a processor, 2026-03-04" in page and "(ledger/records/aid.json)" in page


def test_one_record_a_seed_pools_them(checkout):
    for seed, value in enumerate((0.95, 0.96, 0.97)):
        record = _run_record()
        record["seeds"], record["measured"] = [seed], {"test": {"accuracy": value}}
        checkout.record(f"aid-{seed}.json", record)
    names = [f"aid-{seed}.json#measured.test.accuracy" for seed in range(3)]
    assert checkout.claims([_claim(record=names)]).problems() == []


def test_defaults_fill_in_what_a_claim_leaves_out(checkout):
    claim = _claim()
    tolerance = claim.pop("tolerance")
    assert checkout.claims([claim], defaults={"tolerance": tolerance}).problems() == []
    _only(checkout.claims([claim]).problems(), "without a tolerance")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"measured": {"mean": 0.958, "std": 0.01, "n": 3}}, ["mean is 0.958", "0.96"]),
        ({"measured": {"mean": 0.96, "std": 0.02, "n": 3}}, ["std is 0.02"]),
        ({"measured": {"mean": 0.96, "std": 0.01, "n": 2}}, ["n is 2", "3 values"]),
        ({"measured": {"mean": 0.96, "std": 0.01, "n": 3, "seeds": [7]}}, ["seeds are [7]"]),
        ({"record": "gone.json#measured.accuracy"}, ["gone.json does not exist"]),
        ({"record": "aid.json#measured.gone"}, ["has no measured.gone"]),
        ({"record": "aid.json"}, ["file.json#dotted.key"]),
        ({"record": "aid.json#measured"}, ["holds no number"]),
        ({"record": "bench-x.json#rows.a"}, ["is a benchmark"]),
        ({"record": None}, ["without a record or a check"]),
        ({"measured": None}, ["without a measured value"]),
        ({"published": {"value": 0.98, "unit": "fraction"}}, ["left its band", "0.98"]),
        ({"published": {"value": None, "unit": "fraction"}}, ["without a published value"]),
        ({"band": [0.97, 0.99]}, ["left its band", "0.97"]),
        ({"tolerance": {"relative": 0.0001}}, ["left its band"]),
        ({"status": "not reproduced", "reason": "x"}, ["within its tolerance"]),
        ({"status": "within band", "reason": "x"}, ["without a band"]),
        ({"status": "not attempted", "reason": "x"}, ["has a measured value"]),
        ({"status": "rehearsed"}, ["full run on real data"]),
        ({"data": {"name": "UCM"}}, ["claims UCM", "AID"]),
        ({"data": {"name": "AID", "pixels": 128}}, ["128 pixels", "600"]),
        ({"data": {"name": "AID", "images": 7}}, ["7 images"]),
    ],
)
def test_a_claim_that_its_record_does_not_bear_out_is_refused(checkout, changes, words):
    _only(checkout.claims([_claim(**changes)]).problems(), "aid-accuracy", *words)


@pytest.mark.parametrize(
    ("kind", "scale", "status", "words"),
    [
        ("built-in", "rehearsal", "reproduced", ["rehearsal on built-in data"]),
        ("built-in", "rehearsal", "within band", ["rehearsal on built-in data"]),
        ("built-in", "rehearsal", "not reproduced", ["rehearsal on built-in data"]),
        ("subset", "full", "reproduced", ["from a subset of AID"]),
        ("real", "short", "reproduced", ["scale 'short'"]),
        ("built-in", "rehearsal", "rehearsed", None),
        ("subset", "short", "rehearsed", None),
        ("real", "short", "within band", None),
        ("subset", "short", "within band", None),
    ],
)
def test_what_a_run_may_be_called(checkout, kind, scale, status, words):
    checkout.record("aid.json", _run_record(kind, scale))
    claim = _claim(status=status, reason="a shorter schedule", band=[0.9, 0.99])
    if status == "not reproduced":
        claim["published"] = {"value": 0.5, "unit": "fraction"}
    problems = checkout.claims([claim]).problems()
    if words is None:
        assert problems == []
    else:
        _only(problems, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "done"}, ["status is 'done'"]),
        ({"claim": 3}, ["claim is 3", "str"]),
        ({"published": {"value": 0.9}}, ["published has"]),
        ({"published": {"value": "high", "unit": "fraction"}}, ["'high'"]),
        ({"published": {"value": 96.1, "unit": "fraction"}}, ["fraction in [0, 1]"]),
        ({"tolerance": {"about": 1}}, ["tolerance is"]),
        ({"band": [2, 1]}, ["band is [2, 1]"]),
        ({"data": {"pixels": 3}}, ["data is"]),
        ({"measured": {"value": 1}}, ["measured is"]),
        ({"measured": {"mean": 1, "n": 3}}, ["without a deviation"]),
        ({"check": {"function": "no"}}, ["check is"]),
        ({"date": "yesterday"}, ["'yesterday'"]),
        ({"reason": None, "status": "not attempted"}, ["without a reason"]),
        ({"colour": "red"}, ["unknown field 'colour'"]),
    ],
)
def test_a_malformed_claim_is_refused(checkout, changes, words):
    _only(checkout.claims([_claim(**changes)]).problems(), "aid-accuracy", *words)


def test_malformed_files_are_refused(checkout):
    claim = _claim()
    del claim["source"]
    _only(checkout.claims([claim]).problems(), "lacks source")
    _only(checkout.claims([_claim(), _claim()]).problems(), "another claim has this id")
    checkout.claims([])
    path = checkout.root / "docs/ledger/mpkd.yaml"
    path.write_text("{")
    _only(checkout.problems(), "mpkd.yaml: not YAML")
    path.write_text("project: other")
    _only(checkout.problems(), "expected a mapping with project: mpkd")
    path.write_text("project: mpkd\nclaims: 3")
    _only(checkout.problems(), "no list")
    path.unlink()
    _only(checkout.problems(), "mpkd.yaml: missing")


def test_unsound_records_are_refused(checkout):
    lacking = _run_record()
    del lacking["data"]["split_hash"]
    checkout.record("a.json", lacking).record("b.json", "{").record("c.json", "[]")
    checkout.record("bench-x.json", {"topic": "x"})
    problems = checkout.problems()
    assert [p.partition(":")[0].split()[0] for p in problems] == [
        f"docs/ledger/records/{name}" for name in ("a.json", "b.json", "bench-x.json", "c.json")
    ]


def test_a_stale_page_is_noticed(checkout):
    checkout.claims([_claim()]).render()
    page = checkout.root / "docs/ledger.md"
    page.write_text(page.read_text().replace("0.9615", "0.9616"))
    _only(checkout.problems(render=False), "ledger.md: stale")
    page.unlink()
    _only(checkout.problems(render=False), "ledger.md: stale")


ONE = "<!-- record: aid.json#measured.one -->"


@pytest.mark.parametrize(
    "line",
    [
        f"The accuracy is {ONE}0.573 now.",
        f"The accuracy is {ONE} **57.3%** now.",
        f"The accuracy is {ONE}57 % now.",
        "Costs <!-- record: aid.json#measured.at.0.5.cost -->12.3M and "
        "<!-- record: aid.json#measured.at.0.5.cost -->12,345,678 MACs.",
        "| accuracy | <!-- record: aid.json#measured.rows.exit 1.value -->0.25 |",
        "| accuracy | <!-- record: aid.json#measured.rows.0.value -->25% |",
        "The paper reports an accuracy of <!-- claim: aid-accuracy -->96.15%.",
        "The threshold is 0.573.",
        "Accuracy never falls below `0.95` in code.",
        "Accuracy of 0.99 is a dream. <!-- no result -->",
        "Accuracy with its 95 % interval; accurate with confidence 95 %; 准确率及 95 % 区间",
        "Accuracy as in [a paper](https://example.org/0.97).",
        "top-5 of 10 runs, version 0.12.1 of the accuracy tool",
        "```\naccuracy 0.99\n```",
        "# Results\n\nTen images, 3 seeds, batch 16, Python 3.11.\n\n# Use\n\nA 70% split.",
    ],
)
def test_documents_may_say(checkout, line):
    assert checkout.claims([_claim()]).document(f"{line}\n").problems() == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"The accuracy is {ONE}0.574.", ["quotes 0.574", "0.573"]),
        (f"The accuracy is {ONE}58%.", ["quotes 58%"]),
        (f"The accuracy is {ONE}high.", ["without a number"]),
        ("<!-- record: gone.json#measured.one -->0.5", ["gone.json does not exist"]),
        ("<!-- record: aid.json#measured.two -->0.5", ["has no measured.two"]),
        ("<!-- record: aid.json#measured -->0.5", ["expected a number"]),
        ("<!-- claim: nothing -->0.5", ["claim nothing does not exist"]),
        ("<!-- claim: aid-accuracy -->0.97", ["quotes 0.97"]),
        ("It reaches an accuracy of 0.91.", ["0.91 looks like a result"]),
        ("It reaches an accuracy of 95 % in between.", ["95 % looks like a result"]),
        ("It reaches 91 % top-1.", ["91 % looks like a result"]),
        ("准确率 91.5%", ["91.5% looks like a result"]),
        ("# Results\n\n## AID\n\n| AID | 0.57 |", [":5:", "0.57 looks like"]),
        ("# Speed\n\nIt is 5.9x faster.", ["5.9x looks like"]),
    ],
)
@pytest.mark.parametrize("name", ["README.md", "docs/page.md", "packages/mpkd/README.zh-CN.md"])
def test_documents_may_not_say(checkout, line, words, name):
    checkout.claims([_claim()]).document(f"{line}\n", name)
    _only(checkout.problems(), f"{name}:", *words)


def test_benchmarks_can_be_quoted(checkout):
    row = dict.fromkeys(("ours", "theirs", "skipped")) | {"goal": 5}
    row |= {"name": "files 256 px", "ratio_median": 5.91, "ratio_min": 5.0, "ratio_max": 6.0}
    row |= {"met": True, "equal": "same pixels"}
    bench = {"topic": "loader", "date": "2026-03-04", "environment": {}, "rows": [row]}
    checkout.record("bench-loader.json", bench)
    mark = "<!-- record: bench-loader.json#rows.files 256 px.ratio_median -->"
    assert checkout.document(f"# Speed\n\n{mark}5.9x\n").problems() == []
    _only(checkout.document(f"# Speed\n\n{mark}6.1x\n").problems(), "quotes 6.1x")


def test_measure_prints_what_to_paste(checkout, capsys):
    arguments = ["--root", str(checkout.root), "--measure", "aid.json#measured.accuracy"]
    assert ledger.main(arguments) == 0
    pasted = yaml.safe_load(capsys.readouterr().out)
    assert checkout.claims([_claim(**pasted)]).problems() == []
    assert ledger.main([*arguments[:-1], "aid.json#gone"]) == 1


def test_problems_go_to_stderr_and_set_the_exit_code(checkout, capsys):
    checkout.claims([_claim(record="gone.json#x")])
    assert checkout.render() == 1
    assert capsys.readouterr().err.startswith("error: gfnet_dynn: aid-accuracy: record gone.json")
