"""How a run stands: its attempts, its lock, and what others may say of it."""

import errno
import json
import os
from pathlib import Path

import pytest

from jsae_lightning.errors import UserError
from jsae_lightning.run_status import add_ended_attempt, locked_folder, read_status, recorded_attempt


def test_the_lock_of_a_folder_and_the_state_of_a_killed_run(tmp_path):
    from jsae_lightning.errors import RunError

    with locked_folder(tmp_path):
        with pytest.raises(RunError, match="another process is training in this folder"), locked_folder(tmp_path):
            pass
        with pytest.raises(SystemExit), recorded_attempt(tmp_path):
            assert read_status(tmp_path).status == "running"
            raise SystemExit(2)
        assert read_status(tmp_path).status == "failed"
        with pytest.raises(UserError), recorded_attempt(tmp_path):
            raise UserError("sae.k: no")
    status = read_status(tmp_path)
    assert [(a.exit_code, a.message) for a in status.attempts] == [(2, "interrupted"), (2, "UserError: sae.k: no")]
    status_file = tmp_path / "status.json"
    status_file.write_text(status_file.read_text().replace('"failed"', '"running"'))
    assert read_status(tmp_path).status == "killed"  # nobody holds the lock
    status_file.write_text("{half")
    assert read_status(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["status.json"]


def test_another_users_run_is_not_called_killed(tmp_path, monkeypatch):
    """Whose lock may be read only, or not even that."""
    open_file, allowed = os.open, [os.O_RDONLY]

    def open_as_another(path, flags, *mode):
        if Path(path).name == ".lock" and flags not in allowed:
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, flags, *mode)

    with locked_folder(tmp_path), recorded_attempt(tmp_path):
        content = (tmp_path / "status.json").read_text()
        monkeypatch.setattr(os, "open", open_as_another)
        assert read_status(tmp_path).status == "running"
        allowed.clear()
        assert read_status(tmp_path).status == "running"
    allowed.append(os.O_RDONLY)
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path).status == "killed"  # its lock is gone
    (tmp_path / ".lock").write_text("")
    assert read_status(tmp_path).status == "killed"  # what a killed process leaves


def test_the_end_is_noted_though_the_disk_is_full(tmp_path, monkeypatch):
    """There is no room for a second file, but the first has its place."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError), recorded_attempt(tmp_path) as attempt:
        attempt.begin()
        monkeypatch.setattr("jsae_lightning.run_status.atomic_file", full)
        raise UserError("last.ckpt: the disk is full")
    found = read_status(tmp_path)
    assert (found.status, found.attempts[0].exit_code) == ("failed", 2)
    assert "the disk is full" in found.attempts[0].message
    assert json.loads((tmp_path / "status.json").read_text())["attempts"][0]["ended_at"]


def test_a_refused_start_leaves_a_finished_run_finished(tmp_path):
    """What fails after everything was checked does not."""
    for _ in range(2):
        with recorded_attempt(tmp_path) as attempt:
            attempt.begin()
        with pytest.raises(UserError), recorded_attempt(tmp_path):
            raise UserError("sae.k: no")
        assert read_status(tmp_path).status == "finished"
    with pytest.raises(UserError), recorded_attempt(tmp_path) as attempt:
        attempt.begin()
        raise UserError("train/loss: no number")
    assert read_status(tmp_path).status == "failed"


def test_the_status_of_a_running_run_is_nobody_elses(tmp_path):
    """Of a second start that was refused nothing is noted."""
    with locked_folder(tmp_path), recorded_attempt(tmp_path):
        before = (tmp_path / "status.json").read_text()
        add_ended_attempt(tmp_path, pid=1, seconds=1.0, exit_code=1, message="refused")
        assert (tmp_path / "status.json").read_text() == before
    assert read_status(tmp_path).status == "finished"


def test_a_run_on_another_machine_is_not_called_killed(tmp_path):
    with recorded_attempt(tmp_path):
        pass
    path = tmp_path / "status.json"
    content = json.loads(path.read_text())
    content["status"] = "running"
    content["attempts"][0]["host"] = "elsewhere"
    path.write_text(json.dumps(content))
    assert read_status(tmp_path).status == "running"


def test_what_a_refused_start_says_of_a_finished_job_is_not_noted(tmp_path):
    with recorded_attempt(tmp_path):
        pass
    before = (tmp_path / "status.json").read_text()
    add_ended_attempt(tmp_path, pid=1, seconds=0.0, exit_code=2, message="holds a run already")
    assert (tmp_path / "status.json").read_text() == before
