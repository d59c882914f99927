"""The command line before Hydra sees it: options, quoted values, and what a folder was started with."""

import json
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from jsae_lightning.errors import UserError
from jsae_lightning.launch import (
    RECORD,
    command_to_go_on,
    options_first,
    quoted,
    resumed_arguments,
    with_absolute_paths,
)

NAMES = [
    "run",
    "a b",
    "it's",
    "a=b,c",
    "back\\slash",
    "\\'",
    "é [1] {x} $y (z)",
    "~home",
    "~",
    "1.5",
    "1e3",
    "null",
    "True",
    "/a/-b.c",
]


def test_options_come_before_overrides_with_their_values():
    given = [
        "seed=1",
        "--config-dir",
        "a=b",
        "sae.k=2",
        "-m",
        "--config-name=own",
        "~callbacks.progress",
        "+x=1",
        "-cd",
    ]
    options = ["--config-dir", "a=b", "-m", "--config-name=own", "-cd"]
    assert options_first(given) == (options, ["seed=1", "sae.k=2", "~callbacks.progress", "+x=1"])
    assert resumed_arguments(given) == [*options, "seed=1", "sae.k=2", "~callbacks.progress", "+x=1"]


@pytest.mark.parametrize("name", NAMES)
def test_a_quoted_value_is_text_to_hydra(name):
    assert name not in ("run", "/a/-b.c") or quoted(name) == name
    assert str(OverridesParser.create().parse_override(f"key={quoted(name)}").value()) == name


def record(folder, overrides, flags=()):
    folder.mkdir()
    (folder / RECORD).write_text(json.dumps({"overrides": overrides, "flags": list(flags)}))


@pytest.mark.parametrize("name", NAMES)
def test_the_command_that_goes_on_finds_the_folder(name, tmp_path):
    folder = tmp_path / name.lstrip("/")
    folder.parent.mkdir(exist_ok=True)
    record(folder, ["sae.k=2", "seed=3"], ["--config-dir=own"])
    (program, *arguments) = shlex.split(command_to_go_on(folder, ["seed=4"]))
    assert program == "jsae-train"
    expected = ["--config-dir=own", "sae.k=2", "hydra.mode=RUN", *arguments]
    assert resumed_arguments(arguments) == expected


def test_where_configurations_lie_is_kept_unless_it_is_given_again(tmp_path):
    record(tmp_path / "run", ["sae.k=2"], ["--config-dir=own", "hydra.searchpath=[file:///a]"])
    go_on = ["ckpt_path=auto", f"hydra.run.dir={tmp_path / 'run'}"]
    kept = ["--config-dir=own", "hydra.searchpath=[file:///a]", "sae.k=2", "hydra.mode=RUN", *go_on]
    assert resumed_arguments(go_on) == kept
    other = [*go_on, "hydra.searchpath=[file:///b]"]
    assert resumed_arguments(other) == ["--config-dir=own", "sae.k=2", "hydra.mode=RUN", *other]


def test_paths_that_were_given_in_another_folder_are_found(tmp_path):
    (tmp_path / "then" / "saved").mkdir(parents=True)
    before = [
        "model.path=models/x", "data.path='d/*.jsonl'", "data.cache_dir=/cache", "data.name=saved", "sae.k=2",
    ]  # fmt: skip
    record(tmp_path / "run", before)
    path = tmp_path / "run" / RECORD
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cwd": str(tmp_path / "then")}))
    found = resumed_arguments(["ckpt_path=auto", f"hydra.run.dir={tmp_path / 'run'}"])
    assert found[:5] == [
        f"model.path={tmp_path}/then/models/x",
        f"data.path='{tmp_path}/then/d/*.jsonl'",
        "data.cache_dir=/cache",
        f"data.name={tmp_path}/then/saved",
        "sae.k=2",
    ]
    assert with_absolute_paths(["data.name=wikitext", "ckpt_path=auto", "data.path=~/x"], tmp_path) == [
        "data.name=wikitext", "ckpt_path=auto", "data.path=~/x",
    ]  # fmt: skip


def test_to_go_on_with_nothing_is_refused(tmp_path):
    """To train the default run there would be a surprise; with overrides a run may begin, as after a requeue."""
    alone = ["ckpt_path=auto", f"hydra.run.dir={tmp_path}"]
    with pytest.raises(UserError, match="holds no run that could be gone on with: give a run's folder, or"):
        resumed_arguments(alone)
    assert resumed_arguments([*alone, "seed=1"]) == [*alone, "seed=1"]
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="holds a sweep: give the folder of one of its jobs, or .* sweep.resume=true"):
        resumed_arguments(alone)


def test_a_damaged_record_is_named(tmp_path):
    record(tmp_path / "run", 3)
    with pytest.raises(UserError, match=f"{RECORD}: is damaged"):
        resumed_arguments(["ckpt_path=auto", f"hydra.run.dir={tmp_path / 'run'}"])
