"""The end of a run: metrics.json and what is printed."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console

from jsae_lightning import jacobian_metrics
from jsae_lightning.callbacks import InTrainingEvaluation, Throughput
from jsae_lightning.errors import UserError
from jsae_lightning.evaluation import Evaluation
from jsae_lightning.summary import final_metrics, print_summary, summary_tables, write_metrics_json

METRICS: dict[str, Any] = {
    "val/explained_variance_input": 0.91234,
    "val/explained_variance_output": 0.85,
    "val/mse_input": 0.001234,
    "val/mse_output": 0.00002,
    "val/ce_score_input": 0.9,
    "val/ce_score_output": 0.8,
    "val/ce_score_both": 0.7654,
    "val/kl_score_input": 0.9,
    "val/kl_score_output": 0.8,
    "val/kl_score_both": 0.7,
    "val/l0_input": 31.5,
    "val/l0_output": 32.0,
    "val/dead_share_input": 0.123,
    "val/dead_share_output": math.nan,
    "val/ce_clean": 2.5,
    "val/ce_both": 2.75,
    "val/ce_zero_output": 4.0,
    "jacobian/share_above_0.01": 0.0625,
    "jacobian/effective_edges": 143.25,
    "time/tokens_per_second": 12345.6,
    "time/seconds": 61.2,
    "run/steps": 977,
    "run/tokens_seen": 1_000_448,
    "run/status": "finished",
}


def printed(folder: str = "/logs/run 1", encoding: str = "utf-8", metrics: dict[str, Any] = METRICS) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_summary(metrics, folder, Console(file=file, width=80))
    file.flush()
    return file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def cells(text: str, label: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if label in line)
    return [cell.strip() for cell in line.replace("\u2502", "|").replace("|J|", "J").strip("|").split("|")]


def test_summary_has_the_figures_side_by_side() -> None:
    text = printed()
    assert cells(text, "explained variance") == ["explained variance", "0.9123", "0.8500", ""]
    assert cells(text, "CE score") == ["CE score", "0.9000", "0.8000", "0.7654"]
    assert cells(text, "dead latents")[1:3] == ["12.3%", "nan"]
    assert cells(text, "> 0.005")[1] == "-", "a figure that was not measured"
    assert cells(text, "> 0.01 ") == ["J > 0.01", "6.25%", "J > max / 10", "-"]
    assert cells(text, "effective edges") == ["mean J", "-", "effective edges", "143.2"]
    assert "clean 2.5000, both spliced 2.7500, zero-ablated 4.0000 nats" in text
    assert "12,346 tokens/s, 61 s in all, 977 steps, 1,000,448 tokens" in text
    assert "tensorboard --logdir '/logs/run 1/tensorboard'" in text


def test_summary_fits_80_columns_but_never_breaks_a_path() -> None:
    folder = "/a/" + "long/" * 30 + "run"
    lines = printed(folder).splitlines()
    assert any(line.endswith(folder) for line in lines)
    assert all(len(line) <= 80 for line in lines if folder not in line)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_summary_prints_where_there_is_no_unicode(encoding: str) -> None:
    text = printed("/logs/caf\u00e9/\u4e2d", encoding)
    assert "0.9123" in text
    assert "\\u4e2d" in text


def test_rows_are_what_the_evaluation_reports() -> None:
    """A typo in a key would show as "-" for ever."""
    values = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    measures = jacobian_metrics.jacobian_measures(values, torch.ones(3, 4) > 0, torch.ones(3, 4) > 0)
    metrics = {f"jacobian/{name}": float(value.mean()) for name, value in measures.items()}
    table = summary_tables(metrics)[1]
    assert not any(cell == "-" for column in table.columns for cell in column.cells)


def test_metrics_json_is_valid_and_keeps_every_bit(tmp_path: Path) -> None:
    write_metrics_json(path := tmp_path / "metrics.json", {"a": 1 / 3, "b": math.nan, "c": -math.inf, "d": 3, "e": "x"})
    text = path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": 1 / 3, "b": None, "c": None, "d": 3, "e": "x"}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_metrics_json_failing_leaves_the_old_file(tmp_path: Path) -> None:
    write_metrics_json(path := tmp_path / "metrics.json", {"a": 1})
    with pytest.raises(TypeError):
        write_metrics_json(path, {"a": object()})  # type: ignore[dict-item]
    assert json.loads(path.read_text()) == {"a": 1}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_metrics_json(tmp_path / "file" / "run" / "metrics.json", {"a": 1})


@pytest.mark.parametrize(("max_steps", "status"), [(7, "finished"), (9, "stopped")])
def test_final_metrics_come_from_the_callbacks(max_steps: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = InTrainingEvaluation(None, 1, None, None, False)
    rate = torch.zeros(4, dtype=torch.float64)
    bins = torch.zeros(3, dtype=torch.int64)
    evaluation.last = Evaluation({"val/loss": 0.5}, rate, rate, bins, bins)
    throughput = Throughput()
    throughput.load_state_dict({"tokens": 100, "seconds": 30.0, "paused_seconds": 10.0})
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        callbacks=[evaluation, throughput],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module = LightningModule()
    module.tokens_seen = torch.tensor(112)
    monkeypatch.setattr(Trainer, "lightning_module", module)
    monkeypatch.setattr(Trainer, "global_step", 7)
    assert final_metrics(trainer) == {
        "val/loss": 0.5,
        "time/tokens_per_second": 5.0,
        "time/seconds": 30.0,
        "time/paused_seconds": 10.0,
        "run/steps": 7,
        "run/tokens_seen": 112,
        "run/status": status,
    }
