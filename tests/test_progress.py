"""Throughput and progress of a training, on a clock of the tests' own."""

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from callback_runs import (
    StopAt,
    ToyData,
    checkpointing,
    fit,
    make_module,
    make_trainer,
    read_board,
)
from jsae_lightning.callbacks import (
    Throughput,
    TrainingProgress,
)
from jsae_lightning.callbacks.throughput import paused


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that stands still until it is told otherwise."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


class Spend(Callback):
    """Lets a second pass in every micro-batch, and ten in a pause after every optimizer step's."""

    def __init__(self, clock: Callable[[float], None]) -> None:
        self.clock = clock

    def on_train_batch_start(self, *args: Any) -> None:
        self.clock(1.0)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        with paused(trainer):
            self.clock(10.0)


@pytest.mark.parametrize("throughput_is_first", [True, False])
def test_throughput_leaves_pauses_out(
    tmp_path: Path, clock: Callable[[float], None], throughput_is_first: bool
) -> None:
    callbacks: list[Callback] = [Spend(clock), throughput := Throughput()]
    fit(tmp_path, callbacks[::-1] if throughput_is_first else callbacks, steps=3, accumulate=2)
    board = read_board(tmp_path)
    # 16 tokens a second
    assert [event.value for event in board.Scalars("time/tokens_per_second")] == [16.0] * 3
    seconds = [12.0, 34.0, 56.0] if throughput_is_first else [22.0, 44.0, 66.0]
    assert [event.value for event in board.Scalars("time/seconds")] == seconds
    assert throughput.final_metrics() == {
        "time/tokens_per_second": 16.0,
        "time/seconds": 66.0,
        "time/paused_seconds": 60.0,
    }


def test_throughput_of_a_resumed_run_counts_both_parts(tmp_path: Path, clock: Callable[[float], None]) -> None:
    fit(tmp_path, [Throughput(), Spend(clock), StopAt(2), checkpointing(tmp_path)], steps=6)
    clock(1e6)  # the time between the two is no training
    trainer = make_trainer(tmp_path, [throughput := Throughput(), Spend(clock), checkpointing(tmp_path)], steps=6)
    trainer.fit(make_module(6), datamodule=ToyData(6), ckpt_path=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert throughput.final_metrics() == {
        "time/tokens_per_second": 16.0,
        "time/seconds": 66.0,
        "time/paused_seconds": 60.0,
    }


def test_what_is_paused_outside_training_is_none_of_its_time() -> None:
    """As the evaluation of a complete run that is resumed once more."""
    throughput = Throughput()
    throughput.load_state_dict({"tokens": 96, "seconds": 10.0, "paused_seconds": 4.0})
    before = throughput.final_metrics()
    throughput.pause(5.0)
    assert throughput.final_metrics() == before == {
        "time/tokens_per_second": 16.0,
        "time/seconds": 10.0,
        "time/paused_seconds": 4.0,
    }  # fmt: skip


def progress_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "jsae_lightning.callbacks.progress"]


def test_progress_lines(tmp_path: Path, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fit(tmp_path, [Spend(clock), Throughput(), TrainingProgress(2, None, "auto")])
    lines = progress_lines(caplog)
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"]
    assert all(part in lines[0] for part in ("loss ", "EV in ", "out ", "16 tok/s", "left 0:00:33"))
    caplog.clear()
    fit(tmp_path / "by_time", [Spend(clock), TrainingProgress(None, 30.0, "lines")])
    assert [line.split()[1] for line in progress_lines(caplog)] == ["3/5", "5/5"]


def test_figures_of_an_earlier_step_say_so(
    tmp_path: Path, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Logged at step 1 and every third; shown at every step."""
    progress = TrainingProgress(every_n_steps=1, every_seconds=None, style="lines")
    caplog.set_level(logging.INFO)
    trainer = make_trainer(tmp_path, [Spend(clock), Throughput(), progress], steps=7)
    trainer.log_every_n_steps = 3
    trainer.fit(make_module(7), datamodule=ToyData(7))
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("step ")]
    assert all("loss" in line for line in lines)
    found = [line.partition("(of step ")[2].partition(")")[0] for line in lines]
    assert found == ["", "1", "", "3", "3", "", "6"]


def test_progress_of_another_rank_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = TrainingProgress(1, None, "lines")
    progress.disable()
    fit(tmp_path, [progress])
    assert progress_lines(caplog) == []


def test_progress_bar_prints_log_lines_above_itself(
    tmp_path: Path, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    handler = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(handler)

    class Say(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                logging.getLogger("test").info("a line in between")

    try:
        fit(tmp_path, [Spend(clock), Throughput(), TrainingProgress(1, 1.0, "auto"), Say()])
    finally:
        logging.getLogger().removeHandler(handler)
    assert handler.stream is terminal, "the real stream is restored"
    text = Console(file=io.StringIO()).render_str(terminal.getvalue()).plain
    assert "5/5" in text
    assert "16 tok/s" in text
    assert "left 0:00:00" in text
    assert any(line.rstrip().endswith("a line in between") for line in text.splitlines())
    assert progress_lines(caplog) == [], "no lines beside a bar"
