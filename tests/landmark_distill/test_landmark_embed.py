"""Embed a folder and search in it: the commands, on networks of random weights."""

import csv
import json
import shutil

import cv2
import numpy as np
import pytest
import torch

from landmark_distill import embed, search
from landmark_distill.config import NetworkConfig, ViewConfig
from landmark_distill.gallery.embedder import load_embedder
from landmark_distill.gallery.features import embed_folder
from landmark_distill.model import build_model
from landmark_distill.model_files import save_model
from shared_core.runs import UsageError, run_command

SIZE, WIDTH = 32, 16


def save_small(path, *, seed=0, bgr=False):
    torch.manual_seed(seed)
    model = build_model("Resnet12", image_size=SIZE, feature_dim=WIDTH).eval()
    with torch.no_grad():  # a fresh network hardly tells images apart
        for norm in model.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.running_mean.normal_(0, 0.1)
    network = NetworkConfig("Resnet12", SIZE, WIDTH)
    save_model(
        path, model.state_dict(), network=network, class_names=["a"], epoch=1, metrics={},
        split_hash=None, config={}, views=ViewConfig(SIZE, bgr=bgr), start={},
    )  # fmt: skip
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model file and a folder of images: town/spot/image."""
    root = tmp_path_factory.mktemp("landmark embed")
    model = save_small(root / "max_acc.pth")
    rng = np.random.default_rng(0)
    for town in range(2):
        for spot in range(2):
            colour = rng.integers(0, 256, 3)
            for n in range(3):
                folder = root / "images" / f"town {town}" / f"spot{spot}"
                folder.mkdir(parents=True, exist_ok=True)
                noisy = np.clip(colour + rng.normal(0, 25, (40, 44, 3)), 0, 255).astype(np.uint8)
                cv2.imwrite(str(folder / f"{n}.png"), noisy)
    assert run_command(embed.main, [str(root / "max_acc.pth"), str(root / "images"),
                                    str(root / "g.npy"), "--device", "cpu"]) == 0  # fmt: skip
    return root, model


def test_the_features_are_those_of_the_network(made):
    root, model = made
    rows = np.load(root / "g.npy")
    names = (root / "g.paths.txt").read_text().splitlines()
    assert rows.shape == (12, WIDTH) and rows.dtype == np.float32
    assert names[0] == "town 0/spot0/0.png" and names == sorted(names) and len(names) == 12
    mean, std = (np.array(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = []
    for name in names:
        pixels = cv2.imread(str(root / "images" / name))[..., ::-1]
        small = cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
        images.append(((small / 255 - mean) / std).transpose(2, 0, 1))
    with torch.no_grad():
        wanted = model.embed(torch.tensor(np.array(images), dtype=torch.float32)).double()
    wanted = torch.nn.functional.normalize(wanted, dim=1).numpy()
    np.testing.assert_allclose(rows, wanted, atol=1e-5)
    assert np.ptp(wanted @ wanted.T) > 1e-3  # they tell images apart
    facts = json.loads((root / "g.json").read_text())
    assert facts["images"] == 12 and facts["architecture"] == "Resnet12"


def test_channels_follow_the_model_file(made, tmp_path):
    root, _ = made
    save_small(tmp_path / "bgr.pth", bgr=True)
    embedder = load_embedder(tmp_path / "bgr.pth")
    assert embedder.facts.bgr
    embed_folder(embedder, root / "images", tmp_path / "b.npy", threads=0)
    flipped = tmp_path / "flipped"
    shutil.copytree(root / "images", flipped)
    for path in flipped.rglob("*.png"):
        cv2.imwrite(str(path), np.ascontiguousarray(cv2.imread(str(path))[..., ::-1]))
    save_small(tmp_path / "rgb.pth")
    embed_folder(load_embedder(tmp_path / "rgb.pth"), flipped, tmp_path / "r.npy", threads=0)
    a, b = np.load(tmp_path / "b.npy"), np.load(tmp_path / "r.npy")
    # Mean and deviation stay with their channel, so the two are near, not the same.
    plain = np.load(root / "g.npy")
    assert np.abs(a - b).max() < np.abs(a - plain).max()


def test_unreadable_images_are_named_and_the_rest_is_there(made, tmp_path, capsys):
    root, _ = made
    folder = tmp_path / "some"
    shutil.copytree(root / "images" / "town 0", folder)
    (folder / "broken.png").write_bytes(b"nothing")
    words = [str(root / "max_acc.pth"), str(folder), str(tmp_path / "s.npy"), "--device", "cpu"]
    assert run_command(embed.main, words) == 1
    error = capsys.readouterr().err
    assert error.count("left out") == 1 and "broken.png" in error
    assert len(np.load(tmp_path / "s.npy")) == 6
    assert "broken.png" in json.loads((tmp_path / "s.json").read_text())["unreadable"]
    assert "broken.png" not in (tmp_path / "s.paths.txt").read_text()


def test_search_with_images_finds_each_itself(made, tmp_path, capsys):
    root, _ = made
    out = [tmp_path / name for name in ("a.json", "a.csv", "a.png")]
    words = [str(root / "g.npy"), str(root / "images"), "--model", str(root / "max_acc.pth"),
             "--k", "3", "--json", str(out[0]), "--csv", str(out[1]), "--sheet", str(out[2]),
             "--device", "cpu"]  # fmt: skip
    assert run_command(search.main, words) == 0
    answers = json.loads(out[0].read_text())["answers"]
    rows = np.load(root / "g.npy").astype(np.float64)
    names = (root / "g.paths.txt").read_text().splitlines()
    order = np.argsort(-(rows @ rows.T), axis=1, kind="stable")[:, :3]
    for place, answer in enumerate(answers):
        assert answer["query"] == str(root / "images" / names[place])
        near = answer["neighbours"]
        assert near[0]["path"] == names[place] and near[0]["score"] == pytest.approx(1, abs=1e-6)
        assert [n["row"] for n in near] == order[place].tolist()
        assert [n["rank"] for n in near] == [1, 2, 3]
    table = list(csv.DictReader(out[1].open(newline="")))
    assert len(table) == 36 and table[4]["path"] == answers[1]["neighbours"][1]["path"]
    assert cv2.imread(str(out[2])) is not None
    assert "12 queries among 12 images" in capsys.readouterr().out


def test_a_query_of_no_class_is_unknown_at_the_rate_that_was_asked_for(made, tmp_path, capsys):
    root, _ = made
    words = [str(root / "max_acc.pth"), str(root / "images"), str(tmp_path / "g.npy")]
    assert run_command(embed.main, [*words, "--far", "0.25"]) == 0
    rows = np.load(tmp_path / "g.npy").astype(np.float64)
    names = (tmp_path / "g.paths.txt").read_text().splitlines()
    classes = [name.rsplit("/", 1)[0] for name in names]
    best = sorted(
        max(rows[i] @ rows[j] for j in range(12) if classes[j] != classes[i]) for i in range(12)
    )
    kept = json.loads((tmp_path / "g.json").read_text())["unknown"]
    assert kept["threshold"] == pytest.approx(best[-4], abs=1e-6)  # three of twelve are accepted
    assert (kept["images"], kept["classes"]) == (12, 4)
    # A feature that lies just below the threshold to all, beside one of the gallery's own.
    other = rows[0] - 5 * rows.mean(0)
    np.save(tmp_path / "q.npy", np.stack([rows[3], other]).astype(np.float32))
    asked = [str(tmp_path / "g.npy"), str(tmp_path / "q.npy"), "--json", str(tmp_path / "a.json")]
    assert run_command(search.main, asked) == 0
    said = [a["unknown"] for a in json.loads((tmp_path / "a.json").read_text())["answers"]]
    near = (np.stack([rows[3], other / np.linalg.norm(other)]) @ rows.T).max(1)
    assert said == [bool(one <= kept["threshold"]) for one in near] == [False, True]
    assert "1 unknown" in capsys.readouterr().out
    assert run_command(search.main, [*asked, "--threshold", "-1"]) == 0
    assert "0 unknown" in capsys.readouterr().out
    assert run_command(embed.main, [*words, "--far", "0.01"]) == 0  # of twelve images: not to see
    assert json.loads((tmp_path / "g.json").read_text())["unknown"]["threshold"] is None
    assert "unknown at or below -:" in capsys.readouterr().out


def test_search_with_one_image_prints_and_with_features_needs_no_model(made, tmp_path, capsys):
    root, _ = made
    one = next((root / "images").rglob("*.png"))
    assert run_command(
        search.main,
        [str(root / "g.npy"), str(one), "--model", str(root / "max_acc.pth"), "--k", "2"],
    ) == 0  # fmt: skip
    assert f"  1  1.0000  {one.relative_to(root / 'images').as_posix()}" in capsys.readouterr().out
    words = [str(root / "g.npy"), str(root / "g.npy"), "--json", str(tmp_path / "q.json")]
    assert run_command(search.main, words) == 0
    found = json.loads((tmp_path / "q.json").read_text())
    assert found["index"] == "exact" and len(found["answers"][0]["neighbours"]) == 10
    capsys.readouterr()
    pytest.importorskip("faiss")
    assert run_command(search.main, [*words, "--index", "faiss-flat"]) == 0
    again = json.loads((tmp_path / "q.json").read_text())
    for a, b in zip(found["answers"], again["answers"], strict=True):
        assert [n["row"] for n in a["neighbours"]] == [n["row"] for n in b["neighbours"]]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{images}"], 2, "expected --model"),
        (["{g}", "--model", "{m}"], 2, "--model is for images"),
        (["{g}", "--probes", "3"], 2, "--probes is of"),
        (["{nothing}", "--model", "{m}"], 1, "no such file"),
        (["{images}", "--model", "{other}"], 1, "expected the same network"),
        (["{text}", "--model", "{m}"], 1, "no query can be read"),
        (["{images}", "--model", "{text}"], 1, "text.png"),
    ],
)
def test_bad_words_of_search_are_one_line(made, tmp_path, capsys, words, code, message):
    root, _ = made
    save_small(tmp_path / "other.pth", seed=5)
    (tmp_path / "text.png").write_text("text")
    places = {
        "{images}": root / "images", "{g}": root / "g.npy", "{m}": root / "max_acc.pth",
        "{other}": tmp_path / "other.pth", "{nothing}": tmp_path / "nothing.png",
        "{text}": tmp_path / "text.png",
    }  # fmt: skip
    arguments = [str(root / "g.npy"), *[str(places.get(w, w)) for w in words]]
    assert run_command(search.main, arguments) == code
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["{m}", "{images}", "out.txt"], 2, "ends in .npy"),
        (["{m}", "{nothing}", "{out}"], 1, "is not a folder"),
        (["{m}", "{empty}", "{out}"], 1, "holds no image"),
        (["{empty}", "{images}", "{out}"], 1, "model.json"),
        (["{m}", "{images}", "{out}", "--device", "gpu9"], 1, "--device gpu9"),
    ],
)
def test_bad_words_of_embed_are_one_line(made, tmp_path, capsys, words, code, message):
    root, _ = made
    (tmp_path / "empty").mkdir()
    places = {
        "{m}": root / "max_acc.pth", "{images}": root / "images", "{out}": tmp_path / "o.npy",
        "{nothing}": tmp_path / "nothing", "{empty}": tmp_path / "empty",
    }  # fmt: skip
    assert run_command(embed.main, [str(places.get(w, w)) for w in words]) == code
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_bf16_is_near_and_refused_for_a_folder(made, tmp_path):
    root, _ = made
    images = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
    exact, rough = (
        load_embedder(root / "max_acc.pth", bf16=bf16).probabilities(images)
        for bf16 in (False, True)
    )
    assert 0 < np.abs(exact - rough).max() < 0.1
    with pytest.raises(UsageError, match="--bf16"):
        load_embedder(tmp_path, bf16=True)
