"""Two processes under paddle.distributed.launch: one record, shared batches, the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared_core.runs import read_metrics, read_result

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_processes(tmp_path, tiny):
    folder = tmp_path / "run"
    words = tiny(folder, "--folds", "0", "--no-visualdl", "--builtin-images", "20")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"),
            *("--backend", "gloo", "--log_dir", str(tmp_path / "log")),
            *(str(REPOSITORY / "packages" / "visiondistill_gc" / "main.py"), *words),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    logs = "".join(path.read_text() for path in sorted((tmp_path / "log").glob("workerlog*")))
    assert done.returncode == 0, logs[-3000:] + done.stderr[-2000:]
    record = read_result(folder / "result.json")
    assert record["measured"]["out_of_fold"]["folds"] == [0]
    lines = read_metrics(folder / "metrics.jsonl")
    kinds = [(line["stage"], line["split"], line["step"]) for line in lines]
    assert len(kinds) == len(set(kinds)) == 6  # one epoch of the teacher, two of the student
    # Eight images a step: four of each process, so each sees half of the training part.
    assert {line["n"] for line in lines if "n" in line} <= {8.0}
    assert logs.count("--- fold0") == 1
