"""What is shipped: the file that was judged, a snippet that needs nothing of ours, a container."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import compare_runs as runs
import cv2
import numpy as np
import pytest
import tiny_models as tiny

from compare import asking, judge
from compare.choose import choose
from compare.contract import JUDGED_FILE, SPLIT_FILE, Judged, read_rows, write
from compare.ship import dockerfile, previous, ship
from compare.snippet import snippet
from shared_core import smallvision
from shared_core.datasets import EvalView
from shared_core.datasets.views.evaluation import LetterboxView
from shared_core.deploy.facts import ModelError, read_facts
from shared_core.deploy.inputs import load_files
from shared_core.deploy.predictor import open_model
from shared_core.deploy.session import facts_in, open_session

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A judged run; its winner is shipped by each test that wants one."""
    folder = tmp_path_factory.mktemp("run")
    check, plan = runs.make_run(folder, good=tiny.save_model, chain=tiny.save_chain,
                                both=runs.save_both)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking, "memory_mb", lambda *a, **k: 1.0)
        patch.setattr(judge, "measure", lambda timed, **_: {
            name: {"1": {"p50": 2.0, "p95": 3.0}, "16": {"p50": 1.0, "p95": 1.5}}
            for name in timed
        })  # fmt: skip
        rows = judge.judge(folder, check, plan, say=lambda line: None)
    return folder, rows


def shipped(run, candidate="good", form="onnx", say=lambda line: None):
    folder, rows = run
    choice = choose([row for row in rows if (row.candidate, row.form) == (candidate, form)], ())
    return folder / "winner", ship(folder, choice, say=say)


def test_the_winner_is_the_judged_file_with_its_threshold_and_numbers(run):
    winner, choice = shipped(run)
    row = next(row for row in run[1] if (row.candidate, row.form) == ("good", "onnx"))
    facts = read_facts(winner)
    assert sorted(path.name for path in winner.iterdir()) == [
        "Dockerfile", "README.md", "model.json", "model.onnx", "snippet.py"
    ]  # fmt: skip
    assert facts.files == {"onnx": ("model.onnx",)}
    assert facts.unknown_threshold == row.unknown["threshold"]
    inside = facts_in(open_session(winner / "model.onnx"), where="file")
    assert inside.unknown_threshold == facts.unknown_threshold  # the file alone says it, too
    assert facts.measured["accuracy"]["value"] == row.accuracy.value
    assert facts.measured["at_least"]["value"] == choice.at_least < row.accuracy.value
    assert (
        facts.provenance["split_hash"]
        == asking.parts_of(run[0], run[0] / "images")["test"].split_hash
    )
    card = (winner / "README.md").read_text(encoding="utf-8")
    for told in (f"{row.accuracy.value * 100:.2f} %", choice.sentence, "one note", "80 test",
                 f"{facts.unknown_threshold:.3f}", f"{choice.at_least:.4f}"):  # fmt: skip
        assert told in card
    images = asking.parts_of(run[0], run[0] / "images")["test"]
    labels, given, _ = runs.answers_by_hand("test", run[0])
    predictor = open_model(winner)
    views = np.concatenate(
        [one.images for one in load_files(images.files, predictor.view, batch_size=8, workers=0)]
    )
    names = [runs.CLASSES.index(tiny.CLASSES[k])
             for k in predictor.probabilities(views).argmax(axis=1)]  # fmt: skip
    assert names == given.tolist() and (given == labels).mean() == row.accuracy.value
    assert previous(run[0]) == winner and previous(run[0] / "images") is None


def test_the_lines_can_be_typed(run, capsys):
    winner, choice = shipped(run)
    words = [shlex.split(line) for line in choice.lines]
    image = run[0] / "images/test/000.png"
    assert [one[1] for one in words[:3]] == ["predict", "serve", "evaluate"]
    command, python = Path(words[0][0]), Path(words[3][0])
    assert command.name == "smallvision" and python.samefile(sys.executable)
    assert command.parent == python.parent  # typed as it stands, whatever the PATH is
    assert smallvision.main([*words[0][1:3], str(image)]) == 0
    assert smallvision.main([*words[2][1:], "--latency-batches"]) == 0
    told = capsys.readouterr().out
    accuracy = read_facts(winner).measured["accuracy"]["value"]
    assert f"{accuracy:.4f}"[1:] in told or f"{100 * accuracy:.2f}" in told
    assert words[3][1] == str(winner / "snippet.py")


def test_an_unsure_answer_is_unknown_in_the_winner_alone(run, tmp_path):
    winner, _ = shipped(run)
    grey = np.full((9, 9, 3), 118, np.uint8)
    tops, files = [], []
    for n in range(120):  # colours around grey: some of them are unsure
        colour = np.random.default_rng(n).integers(60, 200, 3)
        files.append(tmp_path / f"{n}.png")
        files[-1].write_bytes(tiny.encode((grey * 0 + colour).astype(np.uint8)))
        tops.append(tiny.probabilities_by_hand(colour[None, None, None])[0].max())
    limit = read_facts(winner).unknown_threshold
    wanted = [top < limit for top in tops]
    assert any(wanted) and not all(wanted)
    out = tmp_path / "answers.json"
    words = [*map(str, files), "--json", str(out)]
    smallvision.main(["predict", str(winner), *words])
    answers = json.loads(out.read_text())["images"]
    assert [one["class"] == "unknown" for one in answers] == wanted
    smallvision.main(["predict", str(run[0] / "candidates/good/model"), *words])
    assert "unknown" not in {one["class"] for one in json.loads(out.read_text())["images"]}


def test_another_file_than_was_judged_is_refused(run, tmp_path):
    folder = tmp_path / "run"
    check, plan = runs.make_run(folder, good=tiny.save_model)
    write(folder / JUDGED_FILE, [row for row in run[1] if row.candidate == "good"])
    source = run[0] / "candidates/good" / asking.ANSWERS_FILE
    (folder / "candidates/good" / asking.ANSWERS_FILE).write_bytes(source.read_bytes())
    rows = [row for row in read_rows(folder / JUDGED_FILE, Judged) if row.form == "onnx"]
    choice = choose(rows, ())
    ship(folder, choice, say=lambda line: None)
    before = (folder / "winner/model.json").read_bytes()
    tiny.save_model(folder / "candidates/good/model", weights=runs.WORSE)
    with pytest.raises(ModelError, match="another class than the file that was judged"):
        ship(folder, choice, say=lambda line: None)
    assert (folder / "winner/model.json").read_bytes() == before
    assert (folder / SPLIT_FILE).is_file()


# -- the snippet ----------------------------------------------------------------------------------

ALONE = """
import runpy, sys
ALLOWED = {"numpy", "PIL", "onnxruntime", "google", "flatbuffers", "packaging", "coloredlogs",
           "humanfriendly", "sympy", "mpmath"}

class OnlyThese:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root not in ALLOWED | sys.stdlib_module_names:
            raise ImportError(f"{name} is not there")

for name in [name for name in sys.modules if name.startswith(("cv2", "shared_core"))]:
    del sys.modules[name]
sys.meta_path.insert(0, OnlyThese())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def photo(path, size, *, orientation=1, seed=0):
    """A JPEG with coarse shapes and fine noise; ``size`` is height, width as stored."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (7, 9, 3)).astype(np.uint8)
    pixels = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
    pixels = np.clip(pixels + rng.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(path, quality=92, exif=exif)
    return path


def photos(folder):
    """Large and small, long and square, one turned."""
    sizes = [(300, 420), (97, 64), (33, 500), (40, 21), (20, 26), (1200, 900)]
    files = [photo(folder / f"{n} a.jpg", size, seed=n) for n, size in enumerate(sizes)]
    return [*files, photo(folder / "turned.jpg", (210, 300), orientation=6, seed=99)]


VIEWS = {
    "squeezed": EvalView(tiny.SIDE, resize_ratio=None, method="area"),
    "cut": EvalView(tiny.SIDE, resize_ratio=1 / 0.875, method="cubic"),
    "letterbox": LetterboxView(tiny.SIDE, fill=40),
    "whole": EvalView(tiny.SIDE, resize_ratio=None, method="linear", dct_scaled=False),
}


def alone(script, files):
    """What the snippet prints where there is nothing but onnxruntime, NumPy and Pillow."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(script), *map(str, files)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit("\t", 2) for line in done.stdout.splitlines()]
    return [name for _, name, _ in rows], [float(p) for *_, p in rows]


@pytest.mark.parametrize("name", VIEWS)
def test_the_snippet_sees_what_the_view_sees(name, tmp_path):
    side = 24 if name != "cut" else (24, 30)
    settings = {**VIEWS[name].settings(), "size": [side, side] if side == 24 else list(side)}
    facts = tiny.make_facts(view=settings, input_size=tuple(settings["size"]))
    view = facts.make_view()
    text = snippet(facts, "onnx").partition("\nnames = ")[0].replace("__file__", "'x'")
    text = text.replace("import onnxruntime\n", "")
    space = {}
    exec(compile(text, "snippet", "exec"), space)  # noqa: S102
    from PIL import Image

    files = photos(tmp_path)
    wanted = np.concatenate([one.images for one in
                             load_files(files, view, batch_size=4, workers=0)])  # fmt: skip
    for file, pixels in zip(files, wanted, strict=True):
        got = space["view"](Image.open(file))
        assert got.shape == (1, *view.size, 3) and got.dtype == np.uint8
        apart = np.abs(got[0].astype(int) - pixels)
        assert apart.max() <= 1, file
        assert (apart > 0).mean() < 0.25, file


@pytest.mark.parametrize("kind", ["plain", "chain"])
def test_the_snippet_alone_answers_as_the_predictor(kind, tmp_path):
    facts = tiny.make_facts() if kind == "plain" else tiny.exit_facts()
    facts = facts.replaced(unknown_threshold=0.55)
    (tiny.save_model if kind == "plain" else tiny.save_chain)(tmp_path / "m", facts)
    (tmp_path / "m/snippet.py").write_text(snippet(facts, "onnx"))
    rng = np.random.default_rng(1)
    files = photos(tmp_path)
    for n in range(20):
        colour = rng.integers(0, 256, 3)
        files.append(tmp_path / f"colour{n}.png")
        files[-1].write_bytes(tiny.encode(np.full((30, 20, 3), colour, np.uint8)))
    out = tmp_path / "answers.json"
    smallvision.main(["predict", str(tmp_path / "m"), *map(str, files), "--json", str(out)])
    wanted = json.loads(out.read_text())["images"]
    names, tops = alone(tmp_path / "m/snippet.py", files)
    assert names == [one["class"] for one in wanted]
    assert len(set(names)) > 3 and "unknown" in names
    assert tops == pytest.approx([one["probability"] for one in wanted], abs=5e-3)
    body = (tmp_path / "m/snippet.py").read_text().partition("\nnames = ")[2]
    if kind == "plain":
        assert len(body.splitlines()) == 5


def test_the_snippet_refuses_a_rule_of_exits_that_it_has_not():
    facts = tiny.exit_facts()
    policy = {**facts.exits.policy, "kind": "patience"}
    facts = facts.replaced(exits=replace(facts.exits, policy=policy))
    with pytest.raises(ModelError, match="patience"):
        snippet(facts, "onnx")


def test_the_agreement_of_the_snippet_is_measured_and_told(run):
    (run[0] / ".winner-1-old").mkdir()  # of a shipping that was killed
    winner, _ = shipped(run, "chain")
    assert not list(run[0].glob(".winner*"))
    files = asking.parts_of(run[0], run[0] / "images")["test"].files
    names, _ = alone(winner / "snippet.py", files)
    facts = read_facts(winner)
    given = runs.answers_by_hand("test", run[0])
    assert len(names) == len(given[0])
    assert facts.more["snippet_same_answer"] == 1.0
    assert "gave 100.00 % the answer" in (winner / "README.md").read_text(encoding="utf-8")
    assert facts.files == {"onnx": ("segment0.onnx", "segment1.onnx", "segment2.onnx")}
    assert not list(winner.glob("model.onnx"))  # nothing of the winner before is left


@pytest.mark.parametrize("form", ["onnx", "onnx-int8"])
def test_of_two_files_the_chosen_one_alone_is_shipped(run, form):
    winner, _ = shipped(run, "both", form)
    facts = read_facts(winner)
    name = {"onnx": "model.onnx", "onnx-int8": "model.int8.onnx"}[form]
    assert [path.name for path in winner.glob("*.onnx")] == [name]
    assert (facts.files, facts.default) == ({form: (name,)}, form)
    assert open_model(winner).runtime == form
    text = (winner / "snippet.py").read_text(encoding="utf-8")
    assert ("x64quantprecision" in text) == (form == "onnx-int8")  # exact sums without VNNI
    rows = {row.form: row for row in run[1] if row.candidate == "both"}
    assert rows["onnx"].right != rows["onnx-int8"].right
    assert (rows["onnx"].name, rows["onnx-int8"].name) == ("both float", "both int8")
    assert replace(rows["onnx"], int8=True).name == "both trained int8"
    assert (rows["onnx"].int8, rows["onnx-int8"].int8) == (False, True)
    accuracy = {row.form: row.accuracy.value for row in rows.values()}
    assert facts.measured["accuracy"]["value"] == accuracy[form]


def test_a_file_for_openvino_opens_in_both(run):
    pytest.importorskip("openvino")
    winner, _ = shipped(run, "good", "openvino")
    facts = read_facts(winner)
    assert facts.default == "openvino" and set(facts.files) == {"openvino", "onnx"}
    assert open_model(winner).runtime == "openvino"
    assert "openvino==" in (winner / "Dockerfile").read_text()
    assert (winner / "snippet.py").is_file()


# -- the container --------------------------------------------------------------------------------


def test_the_dockerfile_is_pinned_not_root_and_asks_its_health(run):
    winner, choice = shipped(run)
    text = (winner / "Dockerfile").read_text(encoding="utf-8")
    steps = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    words = [step.split(maxsplit=1) for step in steps]
    names = [name for name, _ in words]
    assert re.fullmatch(r"python:3\.\d+-slim", dict(words)["FROM"])
    assert names.index("USER") < names.index("ENTRYPOINT") and dict(words)["USER"] != "root"
    first = next(rest for name, rest in words if name == "RUN")
    packages = first.removeprefix("pip install --no-cache-dir").split()
    for package in packages:
        name, version = package.split("==")
        assert version == metadata.version(name.removesuffix("-headless"))
    assert {"fastapi", "uvicorn", "onnxruntime", "numpy"} <= {
        one.partition("==")[0] for one in packages
    }
    copied = [rest.split() for name, rest in words if name == "COPY"]
    assert copied[0] == ["--from=core", ".", "/core"]
    for name in copied[1][:-1]:
        assert (winner / name).is_file(), name
    assert set(copied[1][:-1]) >= {"model.json", *read_facts(winner).sha256}
    start = json.loads(dict(words)["ENTRYPOINT"])
    assert start[:3] == ["smallvision", "serve", copied[1][-1].rstrip("/")]
    port = start[start.index("--port") + 1]
    assert dict(words)["EXPOSE"] == port and f":{port}/health" in dict(words)["HEALTHCHECK"]
    build = shlex.split(choice.lines[-1])
    context = next(word for word in build if word.startswith("core="))
    assert (Path(context.removeprefix("core=")) / "shared_core/smallvision.py").is_file()
    assert dockerfile(read_facts(winner)) == text
