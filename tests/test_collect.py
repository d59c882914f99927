"""`jsae-collect`: one table in three files and on the terminal, whatever a sweep's folder holds."""

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from jsae_lightning import collect as collect_module
from jsae_lightning.collect import collect, duration
from jsae_lightning.result_files import cell_text
from jsae_lightning.run_status import locked_folder
from running import toy_overrides, train, write_documents
from sweep_folders import finished, make_attempt, make_job, touch_all
from tiny_models import make_model_dir


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; return exit code, standard output and standard error."""

    def run_command(*arguments):
        monkeypatch.setattr(sys, "argv", ["jsae-collect", *map(str, arguments)])
        code = 0
        try:
            collect_module.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


@pytest.fixture
def sweep(tmp_path):
    """A sweep with a job of every status; the one numbered 10 is finished, 3 runs while its lock is held."""
    folder = tmp_path / "sweep"
    values = [16, 16, 32, 32, 64, 64]
    jobs = [["model=tiny", f"sae.k={k}", f"jacobian.coef={coef}"] for k, coef in zip(values, "010101", strict=True)]
    message = "ValueError: sae.k is | wrong"
    make_job(folder / "0", *jobs[0], status="finished", metrics=finished(val_loss=0.25, val_extra=None))
    make_job(folder / "1", *jobs[1], status="failed", attempts=[make_attempt(5.0, exit_code=1, message=message)])
    make_job(folder / "2", *jobs[2], status="running", attempts=[make_attempt()])
    (folder / "2" / "train.log").write_text("step 7\nstep 8\n")
    touch_all(folder / "2", 3725)
    make_job(folder / "3", *jobs[3], status="running", attempts=[make_attempt()])
    make_job(
        folder / "4", *jobs[4], status="finished", metrics={"run/status": "stopped", "run/steps": 9, "val/loss": 3}
    )
    make_job(
        folder / "10",
        *jobs[0][:2],
        "jacobian.coef=0.5",
        "+note='ü | x'",
        status="finished",
        metrics=finished(val_loss=0.5),
    )
    (folder / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    with locked_folder(folder / "3"):
        yield folder


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_rows_of_every_status(sweep):
    rows = collect(sweep)
    assert [(row["job"], row["status"]) for row in rows] == [
        ("0", "finished"),
        ("1", "failed"),
        ("2", "killed"),
        ("3", "running"),
        ("4", "unfinished"),
        ("5", "not started"),
        ("10", "finished"),
    ]
    assert list(rows[0]) == [
        *("job", "status", "wall_seconds", "attempts", "step", "message"),
        *("sae.k", "jacobian.coef", "note"),
        *("run/status", "run/steps", "time/seconds", "val/extra", "val/loss"),
    ]
    assert [row["jacobian.coef"] for row in rows] == [0, 1, 0, 1, 0, 1, 0.5]
    assert [row["val/loss"] for row in rows] == [0.25, None, None, None, 3, None, 0.5]
    assert rows[1]["message"] == "ValueError: sae.k is | wrong"


def test_the_files_hold_the_same(sweep, run):
    code, out, err = run(sweep)
    assert (code, err) == (0, "")
    rows = collect(sweep)
    header, *cells = read_csv(sweep / "results.csv")
    table = pyarrow.parquet.read_table(sweep / "results.parquet")
    assert header == table.column_names == list(rows[0])
    assert cells == [[cell_text(value) for value in row.values()] for row in rows]
    assert table.to_pylist() == [dict(row) for row in rows]
    markdown = (sweep / "results.md").read_text(encoding="utf-8")
    assert out.startswith(markdown)
    lines = markdown.splitlines()
    assert len(lines) == 2 + len(rows)
    for line, row in zip(lines[2:], rows, strict=True):
        shown = [cell.strip() for cell in line[2:-2].split(" | ")]
        expected = [row["job"], row["status"], duration(row["wall_seconds"])]
        expected += [cell_text(row[name]) for name in ("sae.k", "jacobian.coef", "note")]
        assert shown == [text.replace("|", "\\|") for text in expected]
    assert "ü \\| x" in lines[-1]


def test_types_in_parquet(sweep, run):
    run(sweep)
    schema = pyarrow.parquet.read_schema(sweep / "results.parquet")
    types = {name: str(schema.field(name).type) for name in schema.names}
    assert types == {
        "job": "string",
        "status": "string",
        "wall_seconds": "double",
        "attempts": "int64",
        "step": "int64",
        "message": "string",
        "sae.k": "int64",
        "jacobian.coef": "double",
        "note": "string",
        "run/status": "string",
        "run/steps": "int64",
        "time/seconds": "double",
        "val/extra": "double",
        "val/loss": "double",
    }


def test_terminal_names_failures_their_cause_and_the_way_on(sweep, run):
    _, out, _ = run(sweep)
    lines = out.splitlines()
    assert (
        "job 1 failed: ValueError: sae.k is | wrong; go on with: "
        f"jsae-train ckpt_path=auto hydra.run.dir={sweep / '1'}" in lines
    )
    assert f"job 2 killed: step 8; go on with: jsae-train ckpt_path=auto hydra.run.dir={sweep / '2'}" in lines
    assert "7 jobs: 2 finished, 1 running, 1 failed, 1 killed, 1 unfinished, 1 not started" in lines
    assert " 1:02:05 |" in out


def test_job_without_recorded_arguments_needs_its_overrides_again(tmp_path, run):
    folder = make_job(tmp_path / "a b=c", "sae.k=999", "data.path='x y'", "hydra.mode=RUN", status="failed")
    (folder / "arguments.json").unlink()
    _, out, _ = run(tmp_path)
    (line,) = [line for line in out.splitlines() if line.startswith("job")]
    command = shlex.split(line.split("go on with: ")[1])
    assert command == [
        *("jsae-train", "sae.k=999", "data.path='x y'", "hydra.mode=RUN", "ckpt_path=auto"),
        f"hydra.run.dir='{folder}'",
    ]


def test_job_whose_arguments_are_lost_gets_no_command(tmp_path, run):
    folder = make_job(tmp_path / "0", status="failed")
    (folder / "arguments.json").unlink()
    (folder / ".hydra" / "overrides.yaml").unlink()
    _, out, _ = run(tmp_path)
    assert "job 0 failed: nothing tells why; go on with: repeat its overrides" in out


def test_overrides_that_do_not_vary_are_no_columns(tmp_path):
    make_job(tmp_path / "0", "sae.k=1", "seed=1", "data.x=1.0")
    make_job(tmp_path / "1", "sae.k=2", "seed=1", "data.x=1", "+callbacks.y=null")
    assert [key for key in collect(tmp_path)[0] if key not in collect_module.BASE] == ["sae.k", "callbacks.y"]
    assert [row["callbacks.y"] for row in collect(tmp_path)] == [None, "null"]


def test_a_job_of_unknown_overrides_makes_none_vary(tmp_path):
    make_job(tmp_path / "0", "sae.k=1")
    folder = make_job(tmp_path / "1", status="finished")
    (folder / "arguments.json").write_bytes(b"\xff")
    (folder / ".hydra" / "overrides.yaml").write_bytes(b"\xff")
    assert list(collect(tmp_path)[1]) == list(collect_module.BASE)


def test_a_list_of_only_what_is_swept_makes_nothing_else_vary(tmp_path):
    make_job(tmp_path / "0", "model=tiny", "sae.k=1")
    (tmp_path / "sweep.json").write_text('{"jobs": [["sae.k=1"], ["sae.k=2"]]}')
    assert list(collect(tmp_path)[1]) == [*collect_module.BASE, "sae.k"]


def test_names_that_two_kinds_of_columns_have(tmp_path):
    make_job(tmp_path / "0", "+status=1", "seed=1", metrics={"seed": 5, "job": 6})
    make_job(tmp_path / "1", "+status=2", "seed=2")
    row = collect(tmp_path)[0]
    assert list(row)[6:] == ["override:status", "seed", "metric:job", "metric:seed"]
    assert list(row.values())[6:] == [1, 1, 6, 5]


def test_sort_by_a_column(sweep, run):
    for key, jobs in (
        ("val/loss", ["0", "10", "4", "1", "2", "3", "5"]),
        ("sae.k", ["0", "1", "10", "2", "3", "4", "5"]),
        ("status", ["1", "0", "10", "2", "5", "3", "4"]),
    ):
        assert run(sweep, "--sort", key)[0] == 0
        assert [row[0] for row in read_csv(sweep / "results.csv")[1:]] == jobs, key


def test_metrics_of_the_short_table_and_another_folder(sweep, run, tmp_path):
    code, out, _ = run(sweep, "--metric", "val/loss", "run/steps", "--output", tmp_path / "new" / "folder")
    assert code == 0
    assert [name.strip() for name in out.splitlines()[0].strip("|").split("|")][-2:] == ["val/loss", "run/steps"]
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {
        *("results.csv", "results.md", "results.parquet"),
    }
    assert not list(sweep.glob("results*"))


def test_headline_metrics_that_there_are(tmp_path, run):
    figures = dict.fromkeys([*collect_module.HEADLINE[1:], "val/other"], 0.123456)
    make_job(tmp_path / "0", metrics=figures)
    _, out, _ = run(tmp_path)
    assert out.splitlines()[0].split(" | ")[3:] == [*collect_module.HEADLINE[1:-1], collect_module.HEADLINE[-1] + " |"]
    assert out.count("0.1235") == 4


def test_metric_that_is_yet_to_come(tmp_path, run):
    (tmp_path / "sweep.json").write_text('{"jobs": [["sae.k=1"]]}')
    assert run(tmp_path, "--metric", "val/loss", "--sort", "val/loss")[0] == 0
    code, _, err = run(tmp_path, "--sort", "vall")
    assert code == 2 and "vall" in err


def test_collecting_again_replaces_the_results(sweep, run):
    run(sweep)
    first = (sweep / "results.csv").read_bytes()
    run(sweep)
    assert (sweep / "results.csv").read_bytes() == first


def refused(result, *parts):
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("jsae-collect: error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err


def test_mistakes_are_refused_in_one_line(sweep, run, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    refused(run(tmp_path / "nowhere"), "nowhere", "no such folder", "give that of a sweep")
    refused(run(tmp_path / "file"), "no such folder")
    refused(run(tmp_path / "empty"), "nothing in it looks like a job", "overrides.yaml")
    refused(run(sweep, "--metric", "val/los"), "--metric", "'val/los'", "val/loss")
    refused(run(sweep, "--sort", "sae.kk"), "--sort", "'sae.kk'", "sae.k,", "more")
    refused(run(sweep, "--output", tmp_path / "file"), "file", "--output")
    refused(run(sweep, "--output", tmp_path / "file" / "below"), "file", "choose another folder")
    refused(run(), "SWEEP_DIR")
    refused(run(sweep, "--mertic", "x"), "--mertic")
    refused(run("--metric", "val/loss", sweep), "SWEEP_DIR first")
    assert not list(sweep.glob("*results*"))


def test_results_that_cannot_be_replaced(sweep, run):
    (sweep / "results.md").mkdir()
    refused(run(sweep), "results.md", "--output DIR")
    assert not list(sweep.glob(".*.tmp"))


def in_another_process(code, **more):
    """Run Python code with the package on the path; `more` is given to subprocess.run."""
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONIOENCODING": "ascii"}
    return subprocess.run([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, check=False, **more)


def command(*arguments):
    return f"import sys; sys.argv[1:] = {[*map(str, arguments)]}; from jsae_lightning.collect import main; main()"


def test_terminal_of_another_encoding(sweep):
    done = in_another_process(command(sweep), stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert b"\\xfc \\| x" in done.stdout


def test_reader_that_closes_the_pipe(sweep):
    reading, writing = os.pipe()
    os.close(reading)
    done = in_another_process(command(sweep), stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (sweep / "results.parquet").is_file()


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nsys.argv = ['jsae-collect', '--help']\nfrom jsae_lightning.collect import main\n"
        "try: main()\nexcept SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = in_another_process(code, stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert b"SWEEP_DIR" in done.stdout and b"--sort" in done.stdout


def test_mixed_and_huge_values_reach_the_files(tmp_path, run):
    for number, value in enumerate([1, "true", "auto", 10**30, 1e300]):
        make_job(tmp_path / str(number), f"seed={value}")
    assert run(tmp_path)[0] == 0
    column = pyarrow.parquet.read_table(tmp_path / "results.parquet").column("seed").to_pylist()
    assert column == ["1", "true", "auto", str(10**30), "1e+300"]
    assert [row[6] for row in read_csv(tmp_path / "results.csv")[1:]] == column


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (3725.4, "1:02:05"), (359999.6, "100:00:00"), (None, "")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.slow
def test_a_real_sweep(tmp_path, run):
    """Three jobs of two steps; the second's value is refused, so that it never records its arguments."""
    material = make_model_dir("gpt_neox", tmp_path / "model"), write_documents(tmp_path / "text.txt")
    overrides = [o for o in toy_overrides(*material, tmp_path) if not o.startswith(("hydra.run.dir", "sae.k"))]
    folder = tmp_path / "sweep"
    arguments = ["-m", *overrides, "data.train_tokens=128", "sae.k=2,999,4", f"hydra.sweep.dir={folder}"]
    output = tmp_path / "output"
    assert train(arguments, output=output) != 0
    rows = collect(folder)
    assert [row["job"] for row in rows] == ["0", "1", "2"], output.read_text()
    assert [row["status"] for row in rows] == ["finished", "failed", "finished"], output.read_text()
    assert "sae.k" in rows[1]["message"]
    assert [row["sae.k"] for row in rows] == [2, 999, 4]
    assert [row["step"] for row in rows] == [2, None, 2]
    assert rows[0]["wall_seconds"] > 0
    assert all(isinstance(row["val/explained_variance_input"], float) for row in (rows[0], rows[2]))
    _, out, _ = run(folder)
    assert "3 jobs: 2 finished, 1 failed" in out
    assert "sae.k=999 hydra.mode=RUN ckpt_path=auto hydra.run.dir=" in out
    assert "val/explained_variance_input" in out.splitlines()[0]
