"""What surrounds a run on the command line: exit codes, and resuming a folder with what it was started with."""

import errno
import json
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from jsae_lightning.atomic_files import atomic_file
from jsae_lightning.config import PATHS, config_dir
from jsae_lightning.console import nobody_reads
from jsae_lightning.errors import RunError, UserError
from jsae_lightning.processes import is_rank_zero
from jsae_lightning.suggestions import BASE, choices_of, keys_of, unknown_choice, unknown_key

RECORD = "arguments.json"
"""The file in a run's folder that says what it was started with."""
SWEEP_RECORD = "sweep.json"
"""The file in a sweep's folder that lists the overrides of its jobs."""
SWEEP_MARKS = (SWEEP_RECORD, "multirun.yaml")
"""Files, one of which tells a sweep's folder."""

_EXTRAS = {"submitit_slurm": "slurm", "joblib": "parallel"}
"""Launchers that come with an extra of this package."""
_CONFIG_FLAGS = ("--config-dir", "--config-name", "-cd", "-cn")
_OPTIONS_WITH_A_VALUE = (
    *_CONFIG_FLAGS,
    "--config-path",
    "-cp",
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--experimental-rerun",
)
_OTHER_FOLDER = "make it readable and writable, or choose another folder with hydra.run.dir=DIR"
_FILE_ERRORS = {
    errno.ENOSPC: "free some space; what was saved before is kept",
    errno.EDQUOT: "free some space; what was saved before is kept",
    errno.EACCES: _OTHER_FOLDER,
    errno.EPERM: _OTHER_FOLDER,
    errno.EROFS: _OTHER_FOLDER,
    errno.ENOTDIR: _OTHER_FOLDER,
    errno.EEXIST: _OTHER_FOLDER,
}


@contextmanager
def exit_codes(program: str) -> Iterator[None]:
    """End the process with 2 and one line for a mistake of the user's, with 1 for anything else: one line for what the
    surroundings did to a run, a traceback for what nobody foresaw.
    """  # noqa: D205
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing its own report
    try:
        yield
    except UserError as error:
        _fail(program, str(error))
    except RunError as error:
        _fail(program, str(error), code=1)
    except (HydraException, OmegaConfBaseException) as error:
        _fail(program, _hydra_message(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            sys.exit(128 + signal.SIGPIPE)  # as programs end that do not catch the signal
        if error.errno not in _FILE_ERRORS:
            traceback.print_exc()
            sys.exit(1)
        _fail(program, f"{error.filename or 'a file'}: {error.strerror}: {_FILE_ERRORS[error.errno]}")
    except KeyboardInterrupt:
        _fail(program, "interrupted", code=130)
    except Exception as error:
        if "Config group override must be" in str(error):  # Hydra's, a plain ValueError
            _fail(program, "a config group was set to null: leave it out with ~GROUP (or experiment=none)")
        if type(error).__module__.partition(".")[0] == "wandb":  # no login, no network: told by wandb in its own words
            reason = " ".join(str(error).split()).rstrip(".")
            remedy = "log in, set WANDB_MODE=offline, or leave logger=wandb out"
            _fail(program, f"logger: wandb: {reason}: {remedy}", code=1)
        traceback.print_exc()
        sys.exit(1)


def _fail(program: str, message: str, code: int = 2) -> None:
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    print(f"{program}: {'' if rank == '0' else f'rank {rank}: '}error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _hydra_message(error: Exception) -> str:
    """Join Hydra's message and its cause into one line that ends with a remedy."""
    for launcher, extra in _EXTRAS.items():
        if f"hydra/launcher/{launcher}" in str(error):
            return f"hydra/launcher: needs the launcher's plugin: pip install -c constraints.txt -e '.[{extra}]'"
    cause = error.__cause__ or error.__context__
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        return _unknown_choice(error)
    if isinstance(error, ConfigCompositionException) and isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
        key = re.match(r"Could not override '([^']+)'", str(error))
        if key and isinstance(cause.parent_node, DictConfig):
            return _unknown_key(key[1], cause.parent_node)
    parts = [str(error)] + ([str(cause)] if cause is not None and str(cause) not in str(error) else [])
    lines = [line.strip().rstrip(".") for part in parts for line in part.splitlines()]
    # `full_key` is kept, `object_type` (a class of ours) and the advice to append with "+" would mislead.
    noise = ("object_type", "reference_type", "To append to your", "Config search path", "provider=")
    kept = [line for line in lines if line and not line.startswith(noise)]
    return (
        "; ".join(kept).replace(":; ", ": ")
        + ": correct the key or value (--help lists all choices, --cfg job all keys)"
    )


def _unknown_choice(error: MissingConfigException) -> str:
    """Hydra knows the user's own folder of configurations, and the choices that lie in no folder of their own."""
    parts = str(error.missing_cfg_file).split("/")
    depth = 2 if parts[0] == "hydra" else 1
    group, choice = "/".join(parts[:depth]), "/".join(parts[depth:])
    known = {*(error.options or ()), *choices_of(config_dir() / group)} - {BASE}
    return unknown_choice(group, choice, known)


def _unknown_key(key: str, node: DictConfig) -> str:
    """The node is a part of the whole configuration as it was composed, whose keys are known, as groups are."""
    groups = [path.name for path in config_dir().iterdir() if path.is_dir()]
    root = node._get_root()
    return unknown_key(key, {*(keys_of(root) if isinstance(root, DictConfig) else ()), *groups})


def record_arguments(folder: Path) -> None:
    """Note in a run's folder what it was started with, once everything has been checked; for `resumed_arguments`.

    Hydra's own `.hydra/overrides.yaml` is rewritten before anything is checked, also by a mistaken start
    (`hydra_record_kept` puts it back).
    """
    record = {
        "flags": config_flags(),
        "overrides": list(HydraConfig.get().overrides.task),
        "cwd": str(Path.cwd()),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }
    with atomic_file(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run, `checkpoints/last.ckpt`, or else the highest `step_*.ckpt`."""
    last = folder / "checkpoints" / "last.ckpt"
    if last.is_file():
        return last
    return max((folder / "checkpoints").glob("step_*.ckpt"), default=None)


def is_recorded(folder: Path) -> bool:
    """Whether `record_arguments` has been called for a folder."""
    return (folder / RECORD).is_file()


@contextmanager
def hydra_record_kept(arguments: list[str]) -> Iterator[None]:
    """Put the `.hydra/` of a folder that holds a run back as it was if a start is refused there."""
    folder = Path(_given(options_first(arguments)[1], "hydra.run.dir") or os.devnull)
    record = folder / RECORD
    if not is_recorded(folder) or not is_rank_zero():
        yield
        return
    before = record.stat().st_mtime_ns
    contents = {path: path.read_bytes() for path in (folder / ".hydra").glob("*.yaml")}
    try:
        yield
    finally:
        if is_recorded(folder) and record.stat().st_mtime_ns == before:
            for path, content in contents.items():
                with atomic_file(path) as temporary:
                    temporary.write_bytes(content)


def options_first(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the command line's options, each with its value, and its overrides, which Hydra wants in one row."""
    options: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        options.append(argument)
        if argument in _OPTIONS_WITH_A_VALUE:
            options.extend(islice(rest, 1))
    return options, overrides


def _given(overrides: list[str], key: str) -> str:
    """Return what the last override of a key gives, as Hydra's grammar reads it; "" if there is none, or no text."""
    given = [override for override in overrides if override.startswith(f"{key}=")]
    if not given:
        return ""
    try:
        return str(OverridesParser.create().parse_override(given[-1]).value() or "")
    except HydraException:  # told by Hydra itself, soon
        return ""


def quoted(value: str) -> str:
    """Quote a value for Hydra's grammar where that would read more in it than text."""
    is_plain = re.fullmatch(r"[A-Za-z0-9_./-]*/[A-Za-z0-9_./-]*|[A-Za-z][A-Za-z0-9_.-]*", value)
    if is_plain and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return value
    return QuotedString(value, Quote.single).with_quotes()


def command_to_go_on(folder: Path | str, overrides: Sequence[str] = ()) -> str:
    """Return the command, for a shell, that goes on with a run from its last checkpoint."""
    return shlex.join(["jsae-train", *overrides, "ckpt_path=auto", f"hydra.run.dir={quoted(str(folder))}"])


def resumed_arguments(arguments: list[str]) -> list[str]:
    """Put what an earlier run was started with before the new arguments when its folder is to be continued.

    `ckpt_path=auto hydra.run.dir=DIR` alone then goes on with the configuration of DIR. A key that is given again
    takes its new value; repeating everything changes nothing.
    """
    options, overrides = options_first(arguments)
    folder = Path(_given(overrides, "hydra.run.dir") or os.devnull)
    if _given(overrides, "ckpt_path") != "auto" or folder == Path(os.devnull):
        return [*options, *overrides]
    if not is_recorded(folder):
        if len(overrides) == 2:
            raise UserError(_nothing_to_resume(folder))
        return [*options, *overrides]
    record = folder / RECORD
    try:
        earlier = json.loads(record.read_text(encoding="utf-8"))
        flags, before = list(earlier["flags"]), list(earlier["overrides"])
        if (folder_then := earlier.get("cwd", str(Path.cwd()))) != str(Path.cwd()):
            before = with_absolute_paths(before, folder_then)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record}: is damaged ({error}): remove it and repeat the run's overrides") from error
    begun_from = [override for override in before if _key(override) == "ckpt_path" and override != "ckpt_path=auto"]
    if begun_from and find_checkpoint(folder) is None:  # a run that began from another's checkpoint does so once more
        overrides = [begun_from[-1] if _key(override) == "ckpt_path" else override for override in overrides]
    again = {_key(override) for override in overrides}
    kept = [override for override in before if _key(override) not in again]
    if any(option.startswith(_CONFIG_FLAGS) for option in options):
        flags = []
    # A job of a sweep goes on alone, though its experiment may say that it is a sweep.
    alone = [] if "hydra.mode" in again else ["hydra.mode=RUN"]
    before_options, searched = options_first(flags)
    searched = [override for override in searched if _key(override) not in again]
    return [*before_options, *options, *searched, *kept, *alone, *overrides]


def with_absolute_paths(overrides: Sequence[str], folder: str | Path) -> list[str]:
    """Return overrides that were given in `folder` so that the paths in them are found from any other."""
    return [_with_absolute_path(override, Path(folder)) for override in overrides]


def _with_absolute_path(override: str, folder: Path) -> str:
    key = _key(override)
    value = _given([override], key)
    is_path = key in PATHS or (key == "ckpt_path" and value != "auto")
    is_path = is_path or (key == "data.name" and (folder / value).is_dir())  # else a name of the hub's
    return f"{key}={quoted(str(folder / value))}" if is_path and value and value[0] != "~" else override


def _nothing_to_resume(folder: Path) -> str:
    """The command line asks for nothing but to go on: to train the default run instead would be a surprise."""
    if any((folder / name).exists() for name in SWEEP_MARKS):
        return (
            f"hydra.run.dir: {folder} holds a sweep: give the folder of one of its jobs, or repeat the sweep's command "
            f"with sweep.resume=true hydra.sweep.dir={quoted(str(folder))}"
        )
    return (
        f"hydra.run.dir: {folder} holds no run that could be gone on with: give a run's folder, or the overrides of "
        "the run that is to begin there"
    )


def _key(override: str) -> str:
    """Return the key of an override: `+callbacks.x=y`, `~callbacks.x` and `callbacks.x=z` are about the same one."""
    return override.split("=", 1)[0].lstrip("+~")


def config_flags() -> list[str]:
    """Repeat where the command line says that configurations lie, for another process: `--config-dir`, `--config-name`
    and, after these, `hydra.searchpath`.
    """  # noqa: D205
    hydra = HydraConfig.get()
    sources, name = hydra.runtime.config_sources, hydra.job.config_name
    flags = [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    flags += [f"--config-name={name}"] if name not in (None, "train") else []
    return flags + [override for override in hydra.overrides.hydra if _key(override) == "hydra.searchpath"]
