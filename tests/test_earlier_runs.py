"""What the folders of a sweep's jobs hold already."""

import json
import re
from pathlib import Path

import pytest

from jsae_lightning.earlier_runs import check_sweep_folder, earlier_run
from jsae_lightning.errors import UserError


@pytest.mark.parametrize("content", ["[]", '{"run/status": 3}', "{half"])
def test_a_damaged_job_is_trained_on_not_fatal_to_the_sweep(content, tmp_path):
    folder, overrides = tmp_path / "0", ["sae.k=2", "sweep.resume=true"]
    folder.mkdir()
    (folder / "arguments.json").write_text('{"overrides": ["sae.k=2"]}')
    (folder / "metrics.json").write_text(content)
    assert earlier_run(folder, overrides, resume=True) == "unfinished"
    (folder / "arguments.json").write_text('{"overrides": null}')
    with pytest.raises(UserError, match="is damaged"):
        earlier_run(folder, overrides, resume=True)
    check_sweep_folder(tmp_path, [overrides], resume=True)


def test_a_job_that_was_continued_on_other_devices_is_still_that_job(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "arguments.json").write_text('{"overrides": ["sae.k=2", "trainer.devices=2", "num_threads=2"]}')
    for same in ("trainer.devices=1", "objective=val/penalty", "checkpoint.best_metric=null"):
        check_sweep_folder(tmp_path, [["sae.k=2", same]], resume=True)
    moved = ["sae.k=2", "data.path=rows.jsonl", "model.path=/models/tiny"]
    (tmp_path / "0" / "arguments.json").write_text(json.dumps({"overrides": moved, "cwd": "/data"}))
    again = ["sae.k=2", "data.path=/data/rows.jsonl", "model.path=/models/tiny"]  # gone on with from another folder
    check_sweep_folder(tmp_path, [again], resume=True)
    here = {"data.path=/data/rows.jsonl", f"data.path={Path.cwd() / 'rows.jsonl'}"}  # another file
    with pytest.raises(UserError, match=re.escape(f"(differing in {', '.join(sorted(here))})")):
        check_sweep_folder(tmp_path, [moved], resume=True)
    (tmp_path / "0" / "arguments.json").write_text('{"overrides": ["sae.k=2"]}')
    for other in ("+data.repeat=true", "trainer=gpu"):  # the latter is another precision
        with pytest.raises(UserError, match=rf"differing in {re.escape(other)}\)"):
            check_sweep_folder(tmp_path, [["sae.k=2", other]], resume=True)
