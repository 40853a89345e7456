"""The notebook runs from top to bottom, draws what it promises, and is stored without outputs."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / "packages" / "visiondistill_gc" / "notebooks" / "distill.ipynb"
# Added to the notebook's own words: the last of a flag counts.
SMALLER = (
    "words += '--init none --student mobilenet_v2 --builtin-images 12 --input-size 32 "
    "--teacher shufflenet_v2_x0_25 "
    "--teacher-epochs 1 --teacher-batch-size 8 --epochs 2 --student-scale 0.1 --hidden 16 "
    "--batch-size 8 --num-workers 1 --allow-untrained-teacher --no-visualdl'.split()"
)


@pytest.fixture(scope="module")
def notebook():
    nbformat = pytest.importorskip("nbformat")
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_stored_without_outputs(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 5
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


def test_it_runs_and_draws(notebook, tmp_path, monkeypatch):
    for name in ("nbclient", "ipykernel", "matplotlib_inline"):
        pytest.importorskip(name)
    import nbformat
    from nbclient import NotebookClient

    roots = [str(REPOSITORY / "packages"), str(REPOSITORY / "shared")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(roots))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    cells = list(notebook.cells)
    (place,) = [n for n, c in enumerate(cells) if "parameters" in c.metadata.get("tags", [])]
    smaller = nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)
    smaller.cells.insert(place + 1, nbformat.v4.new_code_cell(SMALLER))
    client = NotebookClient(smaller, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [o for c in smaller.cells if c.cell_type == "code" for o in c.outputs]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 3  # curves, confusion matrix, predictions
    said = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    assert said.startswith("REHEARSAL") and "REHEARSAL" in said.strip().splitlines()[-1]
    run = tmp_path / "runs" / "visiondistill_gc" / "notebook"
    assert (run / "result.json").is_file() and len(list(run.glob("models_saved/best_*"))) == 2
    assert not (tmp_path / "data").exists()
