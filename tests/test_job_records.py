"""A job's folder is read in whatever state it is: status, time, step, overrides, figures."""

import os

import pytest

from jsae_lightning.job_records import STATUSES, last_log_line, last_logged_step, read_job, read_metrics
from jsae_lightning.override_values import REMOVED, override_values
from jsae_lightning.run_status import locked_folder
from jsae_lightning.sweep_folders import find_jobs
from sweep_folders import START_SECONDS, finished, make_attempt, make_job, touch_all


def read(folder):
    """Read the only job in a folder."""
    (place,) = find_jobs(folder)
    return read_job(place)


def test_finished_job(tmp_path):
    attempts = [make_attempt(10.5, exit_code=1, message="ValueError: x"), make_attempt(20.0, exit_code=0)]
    make_job(tmp_path / "0", "sae.k=4", status="finished", attempts=attempts, metrics=finished(val_loss=0.5))
    record = read(tmp_path)
    assert (record.job, record.status, record.wall_seconds, record.attempts) == ("0", "finished", 30.5, 2)
    assert (record.step, record.message, record.overrides) == (24, None, {"sae.k": 4})
    assert record.metrics["val/loss"] == 0.5


def test_running_while_the_lock_is_held_and_killed_once_it_is_not(tmp_path):
    folder = make_job(tmp_path / "0", status="running", attempts=[make_attempt()])
    with locked_folder(folder):
        assert read(tmp_path).status == "running"
    assert read(tmp_path).status == "killed"


def test_lock_alone_says_running(tmp_path):
    folder = make_job(tmp_path / "0")
    with locked_folder(folder):
        assert read(tmp_path).status == "running"


def test_failed_job_has_its_message_in_one_line(tmp_path):
    attempt = make_attempt(3.0, exit_code=1, message="ValueError: a\n  b\x1b[0m")
    make_job(tmp_path / "0", status="failed", attempts=[make_attempt(2.0, message="earlier"), attempt])
    record = read(tmp_path)
    assert (record.status, record.message, record.wall_seconds) == ("failed", "ValueError: a b\\x1b[0m", 5.0)


@pytest.mark.parametrize(
    ("status", "figures", "expected"),
    [
        ("finished", {"run/status": "stopped", "run/steps": 3}, "unfinished"),
        (None, {"run/status": "stopped"}, "unfinished"),
        (None, {"run/status": "finished"}, "finished"),
        (None, None, "unfinished"),
        ("finished", None, "finished"),
        ("melted", None, "unfinished"),
        ("failed", {"run/status": "finished"}, "failed"),
    ],
)
def test_status_of_what_the_files_say(status, figures, expected, tmp_path):
    make_job(tmp_path / "0", status=status, metrics=figures)
    assert read(tmp_path).status == expected


def test_attempt_without_an_end_lasted_until_its_newest_file(tmp_path):
    """The first was killed 40 s after its start, the second (begun at 100 s) 250 s after its own."""
    attempts = [make_attempt(), make_attempt(started_at="2026-01-01T10:01:40+00:00")]
    folder = make_job(tmp_path / "0", status="running", attempts=attempts)
    touch_all(folder, 40)
    (folder / "train.log").write_text("x")
    os.utime(folder / "train.log", (START_SECONDS + 350,) * 2)
    assert read(tmp_path).wall_seconds == 40 + 250


@pytest.mark.parametrize("started_at", ["yesterday", 5, "2027-01-01T10:00:00+00:00"])
def test_wall_time_of_the_metrics_where_the_attempts_tell_nothing(started_at, tmp_path):
    attempts = [make_attempt(started_at=started_at)]
    folder = make_job(tmp_path / "0", status="running", attempts=attempts, metrics=finished())
    touch_all(folder, 10)
    assert read(tmp_path).wall_seconds == 12.5


def test_results_in_a_single_run_s_folder_do_not_lengthen_it(tmp_path):
    folder = make_job(tmp_path / "run", status="running", attempts=[make_attempt()])
    touch_all(folder, 10)
    (folder / "results.csv").write_text("x")
    record = read(folder)
    assert (record.job, record.wall_seconds) == (".", 10)


@pytest.mark.parametrize(
    ("content", "step"),
    [
        (b"step,loss\n1,0.5\n2,0.4\n", 2),
        (b"step,loss\n1,0.5\n2,0.4", 1),
        (b"step,loss,more\n1,0.5,\n2,0.4\n", 1),
        (b"step,loss\n1,0.5\n\x00\xff\xfe,1\n", 1),
        (b"step,loss\n", None),
        (b"step,lo", None),
        (b"", None),
        (bytes(range(256)) * 20, None),
        (b"st\n1,2\n", None),
    ],
)
def test_last_whole_row_of_the_csv(content, step, tmp_path):
    (tmp_path / "metrics.csv").write_bytes(content)
    assert last_logged_step(tmp_path / "metrics.csv") == step


def test_long_csv_is_read_from_its_end(tmp_path):
    rows = "".join(f"{step},{'9' * 50}\n" for step in range(1, 20_000))
    (tmp_path / "metrics.csv").write_text("step,loss\n" + rows)
    assert last_logged_step(tmp_path / "metrics.csv") == 19_999


def test_step_of_the_csv_where_there_are_no_metrics(tmp_path):
    folder = make_job(tmp_path / "0")
    (folder / "csv").mkdir()
    (folder / "csv" / "metrics.csv").write_text("step,loss\n7,0.5\n8,0.")
    assert read(tmp_path).step == 7


def test_metrics_of_every_kind(tmp_path):
    text = '{"a": 1, "b": 0.5, "c": null, "d": NaN, "e": Infinity, "f": "x", "g": [1], "h": true, "i\\ud800": 2}'
    (tmp_path / "metrics.json").write_text(text)
    expected = {"a": 1, "b": 0.5, "c": None, "d": None, "e": None, "f": "x", "g": None, "h": True, "i\\ud800": 2}
    assert read_metrics(tmp_path / "metrics.json") == expected


GARBAGE = [
    b"",
    b"\x00\xff\xfe garbage \x80",
    b'{"status": "fin',
    b"[]",
    b"null",
    b"5",
    b"[[1]]",
    b"[" * 100_000,
    b"a: b: c",
]


@pytest.mark.parametrize("content", GARBAGE, ids=[repr(content[:12]) for content in GARBAGE])
@pytest.mark.parametrize("name", ["status.json", "metrics.json", "csv/metrics.csv", "train.log", "arguments.json"])
def test_garbage_in_one_file_leaves_what_the_others_say(name, content, tmp_path):
    folder = make_job(tmp_path / "0", "sae.k=4", status="finished", metrics=finished(val_loss=0.5))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    record = read(tmp_path)
    assert (record.status, record.overrides) == ("finished", {"sae.k": 4})
    assert record.wall_seconds == (12.5 if name == "status.json" else 60.0)
    assert record.metrics == ({} if name == "metrics.json" else finished(val_loss=0.5))


@pytest.mark.parametrize("content", GARBAGE, ids=[repr(content[:12]) for content in GARBAGE])
def test_garbage_in_every_file(content, tmp_path):
    folder = make_job(tmp_path / "0", status="finished", metrics={})
    for path in [
        "status.json",
        "metrics.json",
        "csv/metrics.csv",
        "train.log",
        "arguments.json",
        ".hydra/overrides.yaml",
    ]:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
    record = read(tmp_path)
    assert (record.status, record.overrides, record.metrics) == ("unfinished", {}, {})
    assert (record.wall_seconds, record.attempts, record.step, record.message) == (None, None, None, None)
    assert record.status in STATUSES


@pytest.mark.parametrize(
    "attempts",
    [[{"pid": 1}], ["x"], [make_attempt(other=1)], 5, [make_attempt("long")], [make_attempt(started_at=None)]],
)
def test_attempts_of_another_form(attempts, tmp_path):
    make_job(tmp_path / "0", status="finished", attempts=attempts, metrics=finished())
    assert read(tmp_path).wall_seconds is not None


def test_arguments_are_preferred_to_what_hydra_wrote(tmp_path):
    folder = make_job(tmp_path / "0", "sae.k=4")
    (folder / ".hydra" / "overrides.yaml").write_text("- sae.k=999\n")
    assert read(tmp_path).overrides == {"sae.k": 4}
    (folder / "arguments.json").write_text("{")
    assert read(tmp_path).overrides == {"sae.k": 999}


def test_overrides_become_typed_values():
    overrides = {
        "sae.k=16": 16,
        "+trainer.x=1e-3": 0.001,
        "~callbacks.histograms": REMOVED,
        "~callbacks.other=3": REMOVED,
        "++optim.betas=[0.9,0.99]": "[0.9,0.99]",
        "experiment=paper/pythia-70m": "paper/pythia-70m",
        "model@other=tiny": "tiny",
        "data.name='a|b c'": "a|b c",
        "data.streaming=true": True,
        "data.limit=null": "null",
        "data.x=nan": "nan",
        "data.y=": "",
        "data.z=ü": "ü",
        "sae.choice=1,2": "1,2",
        "broken=[1": "[1",
        "line='a\nb\udc80": "'a\\nb\\udc80",
    }
    found = override_values(overrides)
    assert list(found) == [key.split("=")[0].lstrip("+~") for key in overrides]
    assert list(found.values()) == list(overrides.values())
    assert [type(value) for value in found.values()] == [type(value) for value in overrides.values()]


def test_overrides_that_say_nothing_of_the_run_are_left_out():
    overrides = ["hydra.run.dir=x", "hydra/launcher=y", "ckpt_path=auto", "paths.log_dir=z", "paths=other", "sweep.n=1"]
    assert override_values([*overrides, "nonsense", "", "=5", "sweeping=1"]) == {"sweeping": 1}


def test_last_override_of_a_key_wins():
    assert override_values(["sae.k=1", "+sae.k=2"]) == {"sae.k": 2}


def test_last_log_line_is_the_last_that_is_not_blank_of_what_was_printed_or_logged(tmp_path):
    assert last_log_line(tmp_path) is None
    (tmp_path / "train.log").write_bytes(b"first\nlast \xff line\n\n  \n")
    assert last_log_line(tmp_path) == "last \ufffd line"
    (tmp_path / "console.log").write_text("jsae-train: error: \x1b[1mx\n")
    assert last_log_line(tmp_path) == "jsae-train: error: \\x1b[1mx"
