"""The notebooks are kept without outputs, and run from top to bottom at their smallest size."""

import os
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

from jsae_lightning.errors import UserError
from jsae_lightning.ground_truth import GroundTruth
from jsae_lightning.jacobians import Jacobian
from jsae_lightning.notebooks import example_text, figures_table, job_folders, train
from jsae_lightning.reporting.figures_ground_truth import found_in_true_order, graph_matrices, precision_recall_curves
from jsae_lightning.reporting.figures_sentence import sentence_heat_maps
from jsae_lightning.reporting.readers import Judged, Number
from jsae_lightning.reporting.style import to_png
from jsae_lightning.synthetic.matching import match
from jsae_lightning.synthetic.ranking import precision_recall

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
    assert "input SAE: 512 latents of 128 dimensions, 8 active" in text
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


def known_truth():
    """Two output features, three input features; latents are the features in another order, one input is missing."""
    out, into = torch.eye(4).double()[:2], torch.eye(4).double()[:3]
    found = torch.tensor([[5.0, 0.0], [7.0, 1.0]]).double()
    true = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]).double()
    is_true = torch.tensor([[True, False], [False, True]])
    curve = precision_recall(found, is_true, 3)
    figures = {"ground_truth/base_rate": 0.5}
    return GroundTruth(figures, curve, found, true, match(into, into[[1, 0]].clone()), match(out, out[[1, 0]].clone()))


def test_found_edges_stand_in_the_order_of_the_true_features():
    # On both sides latent 1 stands for feature 0 and latent 0 for feature 1; nothing stands for input feature 2.
    expected = np.array([[1.0, 7.0, np.nan], [0.0, 5.0, np.nan]])
    np.testing.assert_array_equal(found_in_true_order(known_truth()), expected)


def test_figures_of_the_truth_are_drawn():
    truth = known_truth()
    figure = graph_matrices(truth)
    images = [axes.images[0].get_array() for axes in figure.axes[:2]]
    assert float(images[0].max()) == float(np.nanmax(images[1])) == 1.0  # each over its own largest
    figure = precision_recall_curves({"pair": truth})
    curve, base = figure.axes[0].lines
    np.testing.assert_allclose(curve.get_xdata(), truth.curve.recall)
    np.testing.assert_allclose(curve.get_ydata(), truth.curve.precision)
    assert list(base.get_ydata()) == [0.5, 0.5] and "0.39" in curve.get_label()  # (1/2 + 2/3) / 3


def test_sentence_maps_are_named_sorted_and_free_of_scale():
    values = torch.tensor([[[0.1, 0.0], [0.2, 0.4]], [[3.0, 1.0], [2.0, 1.0]]])
    true, index = torch.ones(2, 2, dtype=torch.bool), torch.arange(2).expand(2, 2)
    result = Jacobian(values, index, index, true, true, torch.ones(2, 2))
    figure = sentence_heat_maps(result, [" a", "\n"])
    shown = [axes for axes in figure.axes if axes.images][:2]
    assert [axes.get_title() for axes in shown] == ["' a'", "'\\n'"]
    # The row and the column of the largest entry come first; 0 is left blank.
    np.testing.assert_allclose(shown[0].images[0].get_array().filled(np.nan), [[0.4, 0.2], [np.nan, 0.1]], rtol=1e-6)
    assert to_png(figure).startswith(b"\x89PNG")
    scaled = Jacobian(values * torch.tensor([10.0, 0.1])[:, None, None], index, index, true, true, torch.ones(2, 2))
    maps = [
        [axes.images[0].get_array().filled(0) for axes in sentence_heat_maps(one, ["a", "b"], normalized=True).axes[:2]]
        for one in (result, scaled)
    ]
    np.testing.assert_allclose(maps[0], maps[1], rtol=1e-6)
