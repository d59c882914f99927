"""The notebooks are kept without outputs, and run from top to bottom at their smallest size."""

import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from jsae_lightning.errors import UserError
from jsae_lightning.notebooks import example_text, figures_table, job_folders, train
from jsae_lightning.reporting.readers import Judged, Number

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
PATTERN_OF_PATHS = re.compile(r"(?<![\w.<])/(home|root|tmp|work|Users|mnt)/")


def test_the_notebooks_are_these():
    assert NOTEBOOKS == ["paper_figures", "quickstart", "sparse_graph"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_kept_without_outputs(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert not PATTERN_OF_PATHS.search(text)
    assert "num_threads" not in text
    assert text == nbformat.writes(notebook).rstrip("\n") + "\n"


def run_notebook(name, tmp_path, monkeypatch):
    """Execute a copy in a folder of its own and return its cells' outputs."""
    copy = tmp_path / f"{name}.ipynb"
    shutil.copy(FOLDER / copy.name, copy)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for key, value in {
        "JSAE_NOTEBOOK_SIZE": "smoke",
        "TMPDIR": str(temporary),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }.items():
        monkeypatch.setenv(key, value)
    for key in ("JSAE_RUN", "JSAE_SWEEP"):
        monkeypatch.delenv(key, raising=False)
    notebook = nbformat.read(copy, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    assert {path.name for path in tmp_path.iterdir()} == {copy.name, "temporary", "ipython"}  # nothing left beside it
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def images(outputs):
    return [output for output in outputs if "image/png" in output.get("data", {})]


def texts(outputs):
    """Everything that was printed or shown as Markdown."""
    shown = [output.data["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
    return "\n".join([output.text for output in outputs if output.output_type == "stream"] + shown)


def warnings_in(outputs):
    return [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]


@pytest.mark.slow
def test_quickstart(tmp_path, monkeypatch):
    outputs = run_notebook("quickstart", tmp_path, monkeypatch)
    text = texts(outputs)
    assert len(images(outputs)) == 2
    assert warnings_in(outputs) == []
    assert "input SAE: 256 latents of 64 dimensions, 8 active" in text
    (tokens, *sizes) = map(int, re.search(r"\((\d+), (\d+), (\d+)\) \(tokens, output latents", text).groups())
    assert tokens > 4 and sizes == [8, 8]
    assert len(re.findall(r"input +\d+ -> output +\d+ +J [+-]\d", text)) == 5
    assert len(re.findall(r"\* input \d+ → output \d+, mean abs J", text)) == 4 and text.count("**") >= 16
    edges, scaled = (float(x) for x in re.findall(r"effective edges: +([\d.]+) ", text))
    assert edges == scaled and 1 <= edges <= 64  # dividing J by ten changes no scale-free measure ...
    before, after = (float(x) for x in re.findall(r"\|J\| > 0.01: +([\d.]+)%", text))
    assert after < before  # ... and lowers the raw one
    assert "| effective edges " in text and "| abs J > 0.01 " in text


@pytest.mark.slow
def test_paper_figures(tmp_path, monkeypatch):
    outputs = run_notebook("paper_figures", tmp_path, monkeypatch)
    text = texts(outputs)
    assert len(images(outputs)) == 10
    assert warnings_in(outputs) == []
    assert "4 finished runs: 0, 1, 2, 3" in text
    for kind in ("jsae, trained", "traditional, trained", "jsae, random", "traditional, random"):
        assert f"{kind} weights" in text
    assert len(re.findall(r"share of \|J\| > 0.01: [\d.]+ % against [\d.]+ % \(traditional\)", text)) == 2
    assert "shrink-matched" in text and "scale-free: effective edges" in text


@pytest.mark.slow
def test_sparse_graph(tmp_path, monkeypatch):
    outputs = run_notebook("sparse_graph", tmp_path, monkeypatch)
    text = texts(outputs)
    assert len(images(outputs)) == 5
    assert warnings_in(outputs) == []
    found = dict(re.findall(r"(traditional|JSAE): average precision ([\d.]+)", text))
    assert set(found) == {"traditional", "JSAE"}
    (base,) = re.findall(r"a random order +\| +([\d.]+) \|", text)
    assert all(float(precision) > 2 * float(base) for precision in found.values())  # it does learn something


def test_a_training_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match=r"exit code 2: .*sae\.k"):
        train(tmp_path / "run", ["experiment=smoke", "sae.k=999999"])


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no finished run"):
        job_folders(tmp_path)


def test_context_is_text_with_its_peak_in_bold():
    tokens = list("0123456789") + ["*x\n", "|", " a"]
    shown = example_text({"tokens": tokens, "peak": 10})
    assert shown == "456789**&#42;x⏎**&#124;&#32;a"


def test_table_has_errors_where_they_are_known(tmp_path):
    figures = {"a": Number(0.25, 0.01), "b": Number(3.0)}
    run = Judged("r", "r", tmp_path, "jsae", False, {}, {}, figures, {}, {})
    lines = figures_table({"run": run}, {"A": "a", "B": "b", "C": "c"}).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "run"] and cells[2:] == [["A", "0.25 ± 0.01"], ["B", "3"], ["C", "-"]]
