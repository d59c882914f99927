"""Loggers: nothing is lost, nothing is there twice, and numbers keep their bits."""

import csv
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

from jsae_lightning.errors import UserError
from jsae_lightning.figures import jacobian_heat_map
from jsae_lightning.loggers import ResumableCSVLogger, ResumableTensorBoardLogger, log_metrics


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def events(folder: Path) -> list[Event]:
    files = sorted(folder.glob("*tfevents*"))
    return [Event.FromString(record) for file in files for record in RawEventFileLoader(str(file)).Load()]


def logged(folder: Path) -> list[tuple[int, str]]:
    return [(event.step, value.tag) for event in events(folder) for value in event.summary.value]


def test_csv_calls_of_one_step_share_a_row_and_columns_grow(tmp_path: Path) -> None:
    logger = ResumableCSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    logger.log_metrics({"a": 2.0, "b": 3}, 2)
    logger.log_metrics({"c": 4.0}, 2)
    logger.log_metrics({"a": 5.0}, 3)
    logger.finalize("success")
    assert rows(tmp_path) == [
        {"step": "1", "a": "1.0", "b": "", "c": ""},
        {"step": "2", "a": "2.0", "b": "3", "c": "4.0"},
        {"step": "3", "a": "5.0", "b": "", "c": ""},
    ]


def test_csv_keeps_every_bit_and_tells_nan_from_missing(tmp_path: Path) -> None:
    logger = ResumableCSVLogger(tmp_path)
    values = {"third": 1 / 3, "tiny": 5e-324, "float32": float(torch.tensor(0.1)), "inf": -math.inf}
    logger.log_metrics(values, 1)
    logger.log_metrics({"third": math.nan}, 2)
    logger.log_metrics({"tensor": torch.tensor(0.5, dtype=torch.float64)}, 3)
    logger.flush()
    first, second, third = rows(tmp_path)
    assert {tag: float(first[tag]) for tag in values} == values
    assert second["third"] == "nan"
    assert third["third"] == ""
    assert third["tensor"] == "0.5"


def test_csv_row_that_was_flushed_can_still_grow(tmp_path: Path) -> None:
    logger = ResumableCSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    logger.flush()
    assert len(rows(tmp_path)) == 1
    logger.log_metrics({"b": 2.0}, 1)
    logger.flush()
    logger.flush()
    assert rows(tmp_path) == [{"step": "1", "a": "1.0", "b": "2.0"}]


def log_steps(logger: ResumableCSVLogger, first: int, last: int) -> None:
    for step in range(first, last + 1):
        logger.log_metrics({"train/loss": 1 / step}, step)
        if step % 3 == 0:
            logger.log_metrics({"val/loss": 2 / step, f"only_at_{step}": 0.0}, step)


@pytest.mark.parametrize("checkpoint", [0, 2, 3, 5, 6])
@pytest.mark.parametrize("torn", [b"", b"8,0.12", b"8"])
def test_csv_of_a_killed_and_resumed_run_is_that_of_one_run(tmp_path: Path, checkpoint: int, torn: bytes) -> None:
    log_steps(whole := ResumableCSVLogger(tmp_path / "whole"), 1, 9)
    whole.finalize("success")
    killed = ResumableCSVLogger(tmp_path / "killed")
    log_steps(killed, 1, 7)
    killed.flush()
    path = tmp_path / "killed" / "metrics.csv"
    path.write_bytes(path.read_bytes() + torn)
    resumed = ResumableCSVLogger(tmp_path / "killed")
    resumed.truncate_after(checkpoint)
    log_steps(resumed, checkpoint + 1, 9)
    resumed.finalize("success")
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_csv_drops_columns_that_only_removed_rows_had(tmp_path: Path) -> None:
    logger = ResumableCSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 1)
    logger.log_metrics({"late": 1.0}, 2)
    logger.truncate_after(1)
    assert rows(tmp_path) == [{"step": "1", "a": "1.0"}]


def test_csv_continues_an_existing_file_and_leaves_nothing_else_behind(tmp_path: Path) -> None:
    for step in (1, 2):
        logger = ResumableCSVLogger(tmp_path)
        logger.log_metrics({f"column_{step}": 1.0}, step)
        logger.finalize("failed")
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2"]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_csv_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,a\n1,2.0\nx,3.0\n")
    with pytest.raises(UserError, match=r"metrics\.csv: line 3 has no step"):
        ResumableCSVLogger(tmp_path).truncate_after(1)


def test_log_metrics_reaches_every_logger_on_rank_zero_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loggers = [ResumableCSVLogger(tmp_path / "csv"), ResumableTensorBoardLogger(tmp_path / "tb")]
    trainer = Trainer(accelerator="cpu", logger=loggers, enable_checkpointing=False, enable_progress_bar=False)
    log_metrics(trainer, {"a": torch.tensor(0.25), "b": 2}, 4)
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    log_metrics(trainer, {"a": 9.0}, 5)
    for logger in loggers:
        logger.save()
    assert rows(tmp_path / "csv") == [{"step": "4", "a": "0.25", "b": "2"}]
    assert logged(tmp_path / "tb") == [(4, "a"), (4, "b")]


def test_tensorboard_truncates_its_own_and_earlier_files(tmp_path: Path) -> None:
    logger = ResumableTensorBoardLogger(tmp_path)
    logger.log_config("a: 1")
    for step in range(1, 8):
        logger.log_metrics({"loss": 1 / step}, step)
    logger.flush()
    (path,) = tmp_path.glob("*tfevents*")
    path.write_bytes(path.read_bytes()[:-5])  # the kill came while step 7 was being written
    resumed = ResumableTensorBoardLogger(tmp_path)
    resumed.log_metrics({"loss": 0.0}, 8)  # goes into a file of its own
    resumed.truncate_after(4)
    assert [step for step, tag in logged(tmp_path) if tag == "loss"] == [1, 2, 3, 4]
    assert len(list(tmp_path.iterdir())) == 1, "the file that was left without a summary, or a temporary one, is there"
    for step in range(5, 10):
        resumed.log_metrics({"loss": 1 / step}, step)
    resumed.finalize("success")
    assert [step for step, tag in logged(tmp_path) if tag == "loss"] == list(range(1, 10))
    scalars = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(x.step, x.value) for x in scalars] == [(s, float(torch.tensor(1 / s))) for s in range(1, 10)]


def hparams_tab(folder: Path) -> list[tuple[dict[str, object], dict[str, float], int]]:
    """What TensorBoard's own backend puts into the HPARAMS tab: for each run its parameters, metrics and status."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    context = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(folder))))
    request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=10, allowed_statuses=[0, 1, 2, 3])
    groups = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
    return [
        (
            {name: value.string_value or value.number_value for name, value in group.hparams.items()},
            {value.name.tag: value.value for value in group.metric_values},
            group.sessions[0].status,
        )
        for group in groups
    ]


def test_hparams_tab_shows_the_last_values_of_a_sweep(tmp_path: Path) -> None:
    for run, coef in enumerate((0.0, 0.5)):
        logger = ResumableTensorBoardLogger(tmp_path / str(run))
        logger.log_hyperparams({"jacobian": {"coef": coef, "penalty": "l1"}, "sae": {"auxk": True, "width": None}})
        for step in (10, 20):
            logger.log_metrics(
                {"val/explained_variance_input": step / 100, "jacobian/effective_edges": 3.0 * step}, step
            )
        logger.finalize("success")
    tab = sorted(hparams_tab(tmp_path), key=lambda run: str(run[0]))
    assert len(tab) == 2
    for coef, (params, values, status) in zip((0.0, 0.5), tab, strict=True):
        assert params == {"jacobian.coef": coef, "jacobian.penalty": "l1", "sae.auxk": "True"}
        assert values == {"val/explained_variance_input": pytest.approx(0.2), "jacobian/effective_edges": 60.0}
        assert status == 1, "STATUS_SUCCESS"
    assert (0, "val/explained_variance_input") not in logged(tmp_path / "0"), "a placeholder is in the curve"


def test_resuming_writes_no_second_config_or_hyperparameters(tmp_path: Path) -> None:
    for attempt in range(3):
        logger = ResumableTensorBoardLogger(tmp_path)
        logger.log_config("a: 1")
        logger.log_hyperparams({"a": 1}, {"loss": math.nan})
        logger.truncate_after(attempt)
        logger.log_config("a: 1")
        logger.log_hyperparams({"a": 1})
        logger.log_metrics({"loss": 0.5}, attempt + 1)
        logger.finalize("success")
    tags = [tag for _, tag in logged(tmp_path)]
    assert sorted(tags) == [
        "_hparams_/experiment", "_hparams_/session_end_info", "_hparams_/session_start_info", "config/text_summary",
        "loss", "loss", "loss",
    ]  # fmt: skip
    ((params, values, status),) = hparams_tab(tmp_path)
    assert (params, values, status) == ({"a": 1.0}, {"loss": 0.5}, 1)


def test_config_is_a_code_block(tmp_path: Path) -> None:
    logger = ResumableTensorBoardLogger(tmp_path)
    logger.log_config("sae:\n  k: 32\n")
    logger.flush()
    (event,) = (event for event in events(tmp_path) if event.summary.value)
    assert event.summary.value[0].tensor.string_val == [b"```yaml\nsae:\n  k: 32\n```"]


def test_histogram_keeps_its_counts(tmp_path: Path) -> None:
    logger = ResumableTensorBoardLogger(tmp_path)
    counts, edges = torch.tensor([0, 0, 5, 0, 7, 0]), torch.linspace(-3.0, 3.0, 7)
    logger.log_histogram_counts("h", counts, edges, 3)
    logger.log_histogram_counts("empty", torch.zeros(6), edges, 3)
    logger.flush()
    (event,) = (event for event in events(tmp_path) if event.summary.value)
    assert (event.step, event.summary.value[0].tag) == (3, "h")
    from tensorboard.data_compat import migrate_value
    from tensorboard.util import tensor_util

    bins = tensor_util.make_ndarray(migrate_value(event.summary.value[0]).tensor)
    assert bins.tolist() == [[-1.0, 0.0, 5.0], [0.0, 1.0, 0.0], [1.0, 2.0, 7.0]]


def test_image_is_the_png_that_was_given(tmp_path: Path) -> None:
    png = jacobian_heat_map(torch.rand(4, 3), title="t", label="|J|", limits=(1e-3, 1.0))
    logger = ResumableTensorBoardLogger(tmp_path)
    logger.log_image("map", png, 2)
    logger.flush()
    (image,) = EventAccumulator(str(tmp_path)).Reload().Images("map")
    assert (image.step, image.width, image.height) == (2, 540, 480)
    assert image.encoded_image_string == png
