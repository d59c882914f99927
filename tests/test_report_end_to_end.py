"""`jsae-report` on what training and evaluation really leave: a sweep over the weight, from the command line."""

import json
import subprocess
import sys

import pytest

from running import environment, toy_overrides, train, write_documents
from tiny_models import make_model_dir

pytestmark = pytest.mark.slow


def report(*arguments):
    command = [sys.executable, "-m", "jsae_lightning.report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment(), check=False)


def test_a_sweep_is_evaluated_compared_and_reported(tmp_path):
    model, text = make_model_dir("gpt_neox", tmp_path / "model"), write_documents(tmp_path / "text.txt")
    sweep = tmp_path / "sweep"
    for number, coef in enumerate((0, 1)):
        overrides = [*toy_overrides(model, text, sweep / str(number)), f"jacobian.coef={coef}"]
        assert train(overrides, output=tmp_path / "output") == 0, (tmp_path / "output").read_text()
    done = report(sweep)
    assert done.returncode == 0, done.stderr
    page = (sweep / "report" / "report.html").read_text(encoding="utf-8")
    for coef, number in ((0, 0), (1, 1)):
        figures = json.loads((sweep / str(number) / "eval" / "eval.json").read_text())["figures"]
        assert f'data-value="{figures["jacobian/effective_edges"]["mean"]!r}"' in page
        assert f"{number}: coef={coef}" in page
    findings = json.loads((sweep / "comparison" / "comparison.json").read_text())["findings"]
    assert findings and "<h3>Findings</h3>" in page
    figures = {path.stem for path in (sweep / "report" / "figures").glob("*.png")}
    assert {"thresholds", "scale-free", "trade-off-raw", "trade-off-scale-free", "run-0-heat-maps-raw"} <= figures
    # A second time nothing is evaluated again: its files stay as they are.
    times = {path: path.stat().st_mtime_ns for path in sweep.glob("*/eval/eval.json")}
    assert len(times) == 2
    assert report(sweep / "1", "--out", tmp_path / "one").returncode == 0
    assert times == {path: path.stat().st_mtime_ns for path in sweep.glob("*/eval/eval.json")}
    assert (tmp_path / "one" / "report.html").is_file()
