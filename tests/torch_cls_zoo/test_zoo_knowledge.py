"""Knowledge files: full precision, averaging, what is missing, whose paths; and what is learned."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from shared_core.for_torch.checkpoints import load_checkpoint
from shared_core.knowledge import KnowledgeStore
from torch_cls_zoo.dataloader.knowledge_files import read_knowledge, write_knowledge
from torch_cls_zoo.dataloader.sample_files import read_sample_file, rows_for, write_sample_file

PATHS = ["train/a/0.jpg", 'train/a/with, comma "and quotes".jpg', "train/b/ü 2.jpg", "#odd.jpg"]
CLASSES = ("a", "b")


def probabilities(seed: int, rows: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet([1, 1], rows).astype(np.float32)


def read(folder, **more):
    settings = {"classes": CLASSES, "sums_to_one": True} | more
    return read_knowledge(folder, PATHS, np.array([0, 0, 1, 1]), **settings)


def test_numbers_and_paths_come_back_exactly(tmp_path):
    values = probabilities(0)
    values[0] = [1e-30, 1.0]
    write_sample_file(tmp_path / "x.txt", PATHS, values, about={"classes": ["a", "b"]})
    back = read_sample_file(tmp_path / "x.txt")
    np.testing.assert_array_equal(back.values.astype(np.float32), values)
    assert rows_for(back, PATHS).tolist() == [0, 1, 2, 3]
    assert back.about["classes"] == ["a", "b"]
    text = (tmp_path / "x.txt").read_text()
    assert text.splitlines()[1].startswith("train/a/0.jpg,1e-30,")


def test_the_mean_is_over_the_files_that_have_the_image(tmp_path):
    first, second = probabilities(1), probabilities(2)
    write_knowledge(tmp_path, PATHS, first, np.array([0, 0, 1, 1]), name="distill.txt",
                    about={"classes": list(CLASSES)})  # fmt: skip
    write_sample_file(tmp_path / "distill_b.txt", PATHS[:2], second[:2], about={})
    found = read(tmp_path)
    want = first.astype(np.float64)
    want[:2] = (want[:2] + second[:2]) / 2
    np.testing.assert_allclose(found.values, want, rtol=1e-6)
    assert found.files == ("distill.txt", "distill_b.txt") and found.missing == 0
    labels = read_sample_file(tmp_path / "label.txt")
    np.testing.assert_array_equal(labels.values, np.eye(2)[[0, 0, 1, 1]])


def test_a_missing_sample_is_an_error_unless_it_is_allowed(tmp_path):
    write_sample_file(tmp_path / "distill.txt", PATHS[:2], probabilities(0)[:2], about={})
    with pytest.raises(ValueError, match=r"2 of 4 samples are missing, the first is train/b/ü 2"):
        read(tmp_path)
    with pytest.raises(ValueError, match="2 of 4"):
        read(tmp_path, allow_missing=1)
    found = read(tmp_path, allow_missing=2)
    assert found.missing == 2
    np.testing.assert_array_equal(found.values[2:], [[0, 1], [0, 1]])


def test_a_file_of_the_first_version_is_read_whatever_folder_it_was_written_from(tmp_path):
    lines = [f"../other/data/train/{c}/{n}.jpg,0.25,0.75" for c in "ab" for n in range(2)]
    (tmp_path / "distill_old.txt").write_text("\n".join(lines) + "\n")
    paths = [f"train/{c}/{n}.jpg" for c in "ab" for n in range(2)]
    found = read_knowledge(tmp_path, paths, np.zeros(4, int), classes=CLASSES, sums_to_one=True)
    np.testing.assert_allclose(found.values, [[0.25, 0.75]] * 4)


def test_a_file_from_notepad_is_read_whatever_its_encoding(tmp_path, capsys):
    wanted = ["train/衣/é.jpg", "train/帽/1.jpg"]
    rows = ".\\train\\衣\\e\u0301.jpg,0.5,0.5\r\ntrain/帽/1.jpg,0.25,0.75\r\n"
    for encoding, text in (("utf-8-sig", rows), ("gb18030", rows)):
        (tmp_path / "x.txt").write_bytes(text.encode(encoding))
        read = read_sample_file(tmp_path / "x.txt", known=wanted)
        assert read.values[rows_for(read, wanted)].tolist() == [[0.5, 0.5], [0.25, 0.75]]
    assert "GB18030" in capsys.readouterr().err


def test_a_tail_that_two_rows_share_is_no_match(tmp_path):
    (tmp_path / "x.txt").write_text("one/train/a/0.jpg,1,0\ntwo/train/a/0.jpg,0,1\n")
    assert rows_for(read_sample_file(tmp_path / "x.txt"), ["train/a/0.jpg"]).tolist() == [-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train/a/0.jpg,0.5,half\n", "line 1: expected a path and numbers"),
        ("train/a/0.jpg,0.5\n", "1 numbers, expected 2"),
        ("# {}\ntrain/a/0.jpg,nan,1\n", "line 2: a number is not finite"),
        ("train/a/0.jpg,1,0\ntrain/a/0.jpg,1,0\n", "is there twice"),
        ("# only remarks\n", "has no samples"),
        ('# {"classes": ["b", "a"]}\ntrain/a/0.jpg,1,0\n', "classes are"),
        ("train/a/0.jpg,0.9,0.9\n", "sums to 1.800"),
    ],
)
def test_bad_files_are_one_line(tmp_path, text, message):
    (tmp_path / "distill.txt").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, allow_missing=4)
    assert "\n" not in str(caught.value)


def test_rows_of_a_sigmoid_teacher_are_taken_by_bce(tmp_path):
    write_sample_file(tmp_path / "distill.txt", PATHS, np.full((4, 2), 0.9), about={})
    assert read(tmp_path, sums_to_one=False).values == pytest.approx(0.9)


def test_no_file_and_a_bad_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="--knowledge train"):
        read(tmp_path)
    with pytest.raises(ValueError, match="a name like distill_b0.txt"):
        write_knowledge(tmp_path, PATHS, probabilities(0), np.zeros(4, int), name="t.txt",
                        about={})  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory, zoo_data, zoo_best, zoo_command):
    folder = tmp_path_factory.mktemp("knowledge")
    words = ("--knowledge", "train", "--data", zoo_data, "--resume", zoo_best, "--no-cuda")
    done = zoo_command(*words, "--knowledge_dir", folder, "--output", folder / "o")
    assert done.code == 0, done.err
    return folder


def test_the_command_writes_the_teacher_s_softmax(written, zoo_data, zoo_best):
    """Text file and store hold what the network says, computed here image by image."""
    from shared_core.datasets import content_key, decode
    from shared_core.datasets.views.evaluation import LetterboxView
    from torch_cls_zoo.models import build_model

    weights, facts = load_checkpoint(zoo_best)
    net = build_model("test_resnet", num_classes=3, image_size=(24, 24)).model.eval()
    net.load_state_dict(weights)
    file = read_sample_file(written / "distill.txt")
    assert len(file.names) == 24 and file.about["classes"] == ["blue", "green", "red"]
    (folder,) = (written / "knowledge").iterdir()
    store = KnowledgeStore.open(folder, classes=["blue", "green", "red"],
                                teacher_hash=facts["sha256"])  # fmt: skip
    assert file.about["teacher"] == facts["sha256"]
    for name, row in zip(file.names, file.values, strict=True):
        pixels = LetterboxView((24, 24))(decode(zoo_data / name)) / 255
        image = ((pixels - facts["mean"]) / facts["std"]).transpose(2, 0, 1)[None]
        with torch.no_grad():
            logits = net(torch.from_numpy(image).float()).double()[0]
        np.testing.assert_allclose(row, logits.softmax(0).numpy(), atol=1e-5)
        assert row.sum() == pytest.approx(1, abs=1e-6)
        stored = store.get([content_key(zoo_data / name)], 0)[0]
        np.testing.assert_allclose(stored, logits.numpy(), atol=1e-4)


def test_students_learn_from_the_files_and_not_from_the_labels(
    written, zoo_folder, zoo_words, zoo_command, tmp_path
):
    """With the teachers' classes exchanged in the file the student learns the exchanged ones."""
    file = read_sample_file(written / "distill.txt")
    exchanged = file.values[:, [1, 0, 2]]
    write_sample_file(tmp_path / "distill.txt", file.names, exchanged, about=file.about)
    run = tmp_path / "run"
    done = zoo_command(*zoo_words(run, "--distill", "--knowledge_dir", tmp_path, "--epochs", 6))
    assert done.code == 0, done.err
    assert "0 images without a teacher" in done.out
    matrix = np.array(
        json.loads((run / "result.json").read_text())["measured"]["test"]["confusion"]
    )
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["split"] == "train" and last["accuracy"] < 0.6  # against the labels
    assert matrix[:2].argmax(axis=1).tolist() != [0, 1]


def test_a_student_without_all_images_needs_leave(written, zoo_words, zoo_command, tmp_path):
    file = read_sample_file(written / "distill.txt")
    write_sample_file(tmp_path / "distill.txt", file.names[2:], file.values[2:], about=file.about)
    words = zoo_words(tmp_path / "run", "--distill", "--knowledge_dir", tmp_path, "--epochs", 2)
    done = zoo_command(*words)
    assert done.code == 1 and "2 of 24 samples are missing" in done.err
    assert done.err.count("\n") == 1
    words[words.index(str(tmp_path / "run"))] = str(tmp_path / "run2")
    done = zoo_command(*words, "--distill_allow_missing", 2)
    assert done.code == 0 and "2 images without a teacher" in done.out
