"""Which jobs a folder holds: found by their files, listed by the sweep, matched with each other."""

import json

import pytest

from jsae_lightning.job_records import read_job
from jsae_lightning.sweep_folders import find_jobs
from sweep_folders import make_job


def names(folder):
    return [job.name for job in find_jobs(folder)]


def write_sweep(folder, *jobs):
    folder.mkdir(exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps({"jobs": [list(job) for job in jobs]}))


def test_natural_order(tmp_path):
    for number in (10, 2, 0, 1):
        make_job(tmp_path / str(number))
    assert names(tmp_path) == ["0", "1", "2", "10"]


def test_nested_subdirs_and_a_folder_of_runs(tmp_path):
    make_job(tmp_path / "experiment=paper" / "k=16")
    make_job(tmp_path / "experiment=paper" / "k=4")
    make_job(tmp_path / "2026-01-01_10-00-00" / "run")
    (tmp_path / "notes").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert names(tmp_path) == ["2026-01-01_10-00-00/run", "experiment=paper/k=4", "experiment=paper/k=16"]


def test_what_a_job_s_folder_holds_is_no_job(tmp_path):
    make_job(make_job(tmp_path / "0") / "copy")
    make_job(tmp_path / ".submitit" / "1")
    assert names(tmp_path) == ["0"]


def test_listed_jobs_without_a_folder_or_anything_in_it_have_not_started(tmp_path):
    write_sweep(tmp_path, ["sae.k=1"], ["sae.k=2"], ["sae.k=3"])
    make_job(tmp_path / "0", "sae.k=1")
    (tmp_path / "1" / "empty").mkdir(parents=True)
    records = [read_job(job) for job in find_jobs(tmp_path)]
    assert [(r.job, r.status, r.overrides["sae.k"]) for r in records] == [
        ("0", "unfinished", 1),
        ("1", "not started", 2),
        ("2", "not started", 3),
    ]


def test_listed_jobs_are_found_by_their_overrides_in_folders_of_other_names(tmp_path):
    write_sweep(tmp_path, ["sae.k=1"], ["sae.k=2"], ["sae.k=3"])
    make_job(tmp_path / "k" / "3", "seed=1", "sae.k=3")
    make_job(tmp_path / "k" / "1", "seed=1", "sae.k=1")
    records = [read_job(job) for job in find_jobs(tmp_path)]
    assert [(r.job, r.status, r.overrides["sae.k"]) for r in records] == [
        ("1", "not started", 2),
        ("k/1", "unfinished", 1),
        ("k/3", "unfinished", 3),
    ]


def test_job_that_was_resumed_with_other_overrides_is_still_the_listed_one(tmp_path):
    write_sweep(tmp_path, ["sae.k=1"])
    make_job(tmp_path / "0", "sae.k=7")
    assert [(job.name, job.overrides) for job in find_jobs(tmp_path)] == [("0", ["sae.k=7"])]


def test_folder_that_has_lost_its_overrides_takes_those_of_the_list(tmp_path):
    write_sweep(tmp_path, ["sae.k=1"])
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "train.log").write_text("begun")
    (place,) = find_jobs(tmp_path)
    record = read_job(place)
    assert (record.status, record.overrides, record.place.complete) == ("unfinished", {"sae.k": 1}, False)


def test_numbered_folders_of_a_sweep_are_jobs_whatever_they_hold(tmp_path):
    (tmp_path / "multirun.yaml").write_text("")
    (tmp_path / "3").mkdir()
    make_job(tmp_path / "4" / "nested")
    (tmp_path / "other").mkdir()
    assert names(tmp_path) == ["3", "4/nested"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"jobs": 3}', b'{"jobs": []}'])
def test_damaged_list_of_jobs_is_passed_over(content, tmp_path):
    make_job(tmp_path / "0")
    (tmp_path / "sweep.json").write_bytes(content)
    assert names(tmp_path) == ["0"]
