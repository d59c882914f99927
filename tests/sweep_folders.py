"""Folders as jobs of a sweep leave them, made without training."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import yaml

START = "2026-01-01T10:00:00+00:00"
START_SECONDS = 1767261600.0


def make_job(
    folder: Path,
    *overrides: str,
    status: str | None = None,
    metrics: dict[str, Any] | None = None,
    attempts: list[dict[str, Any]] | None = None,
) -> Path:
    """Make a job's folder with its overrides and, if given, `status.json` (one attempt of 60 s) and `metrics.json`."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides), allow_unicode=True))
    (folder / "arguments.json").write_text(json.dumps({"flags": [], "overrides": overrides}))
    if status is not None:
        content = {"status": status, "attempts": [make_attempt(seconds=60.0)] if attempts is None else attempts}
        (folder / "status.json").write_text(json.dumps(content))
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def make_attempt(seconds: float | None = None, **more: Any) -> dict[str, Any]:
    """An attempt as `status.json` holds it; without seconds it has no end."""
    return {"started_at": START, "host": socket.gethostname(), "pid": 1, "seconds": seconds} | more


def touch_all(folder: Path, seconds: float) -> None:
    """Let every file of a folder have been modified so long after START."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (START_SECONDS + seconds,) * 2)


def finished(**figures: Any) -> dict[str, Any]:
    """The figures of a finished run; `val_loss=1` stands for `val/loss`."""
    return {name.replace("_", "/", 1): value for name, value in figures.items()} | {
        "run/status": "finished",
        "run/steps": 24,
        "time/seconds": 12.5,
    }
