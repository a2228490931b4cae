"""The notebooks: kept outputs that are clean and small; and (slow) that they run to their end.

A notebook is run by the interpreter of the tests, in a temporary folder and on one device, whatever
devices the tests themselves pretend to have.
"""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="part of the test extra")

FOLDER = Path(__file__).resolve().parent.parent / "colabs"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 300 * 1024
SECONDS = 600  # of one cell, on a machine that does other things besides
# A home, a temporary or a working folder, or a user at a machine.
LOCAL = re.compile(r"/(?:home|root|tmp|work|Users|private|content|mnt)/\w|\w+@[\w-]+:")

read = lambda path: nbformat.read(path, as_version=4)
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def test_all_five_are_there():
    assert {path.stem for path in NOTEBOOKS} == {
        "moe_routes_replay",
        "pr2_rollout_to_report",
        "emo_growth",
        "route_logs",
        "import_and_sample",
    }
    readme = (FOLDER.parent / "README.md").read_text()
    assert not [path.name for path in NOTEBOOKS if f"colabs/{path.name}" not in readme]


@by_name
def test_is_a_notebook_with_its_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < MAX_BYTES
    assert [cell.execution_count for cell in code_cells(notebook)] == list(
        range(1, len(code_cells(notebook)) + 1)
    )
    kinds = [output.output_type for output in outputs(notebook)]
    assert "error" not in kinds
    pictures = [o for o in outputs(notebook) if "image/svg+xml" in o.get("data", {})]
    assert len(pictures) >= 4
    assert sum(cell.cell_type == "markdown" for cell in notebook.cells) >= 5


@by_name
def test_says_nothing_of_the_machine_that_made_it(path):
    for output in outputs(read(path)):
        assert output.get("name") != "stderr"
        for text in (output.get("text", ""), *output.get("data", {}).values()):
            assert not LOCAL.findall(text)


@by_name
def test_installs_only_where_it_has_to(path):
    first = code_cells(read(path))[0].source
    assert "find_spec" in first
    assert "pip" in first


@pytest.mark.slow
@by_name
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="part of the test extra")
    pytest.importorskip("ipykernel", reason="part of the test extra")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = read(path)
    for cell in code_cells(notebook):
        cell.outputs = []
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()  # raises CellExecutionError, with the traceback, at the first error
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs(notebook))
