"""What surrounds a run on the command line: exit codes, and resuming a folder with what it was started with."""

import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from jsae_lightning.atomic_files import atomic_file
from jsae_lightning.config import config_dir
from jsae_lightning.errors import RunError, UserError
from jsae_lightning.processes import is_rank_zero
from jsae_lightning.suggestions import BASE, choices_of, keys_of, unknown_choice, unknown_key

RECORD = "arguments.json"
"""The file in a run's folder that says what it was started with."""

_EXTRAS = {"submitit_slurm": "slurm", "joblib": "parallel"}
"""Launchers that come with an extra of this package."""
_CONFIG_FLAGS = ("--config-dir", "--config-name", "-cd", "-cn")
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
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }
    with atomic_file(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def is_recorded(folder: Path) -> bool:
    """Whether `record_arguments` has been called for a folder."""
    return (folder / RECORD).is_file()


@contextmanager
def hydra_record_kept(arguments: list[str]) -> Iterator[None]:
    """Put the `.hydra/` of a folder that holds a run back as it was if a start is refused there."""
    folder = Path(_given(arguments).get("hydra.run.dir") or os.devnull)
    record = folder / RECORD
    if not record.is_file() or not is_rank_zero():
        yield
        return
    before = record.stat().st_mtime_ns
    contents = {path: path.read_bytes() for path in (folder / ".hydra").glob("*.yaml")}
    try:
        yield
    finally:
        if record.is_file() and record.stat().st_mtime_ns == before:
            for path, content in contents.items():
                with atomic_file(path) as temporary:
                    temporary.write_bytes(content)


def _given(arguments: list[str]) -> dict[str, str]:
    """Return the values of the command line's overrides, of a repeated one the last."""
    pairs = (argument.split("=", 1) for argument in arguments if "=" in argument)
    return {key: value.strip("'\"") for key, value in pairs}


def resumed_arguments(arguments: list[str]) -> list[str]:
    """Put what an earlier run was started with before the new arguments when its folder is to be continued.

    `ckpt_path=auto hydra.run.dir=DIR` alone then goes on with the configuration of DIR. A key that is given again
    takes its new value; repeating everything changes nothing.
    """
    given = _given(arguments)
    folder = given.get("hydra.run.dir", "")
    record = Path(folder) / RECORD
    if given.get("ckpt_path") != "auto" or not folder or not record.is_file():
        return arguments
    try:
        earlier = json.loads(record.read_text(encoding="utf-8"))
        flags, overrides = list(earlier["flags"]), list(earlier["overrides"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record}: is damaged ({error}): remove it and repeat the run's overrides") from error
    again = {_key(argument) for argument in arguments}
    kept = [override for override in overrides if _key(override) not in again]
    if any(argument.startswith(_CONFIG_FLAGS) for argument in arguments):
        flags = []
    # Hydra wants all overrides in one row: the earlier ones go before the first of the new.
    first = next(i for i, argument in enumerate(arguments) if "=" in argument and not argument.startswith("-"))
    # A job of a sweep goes on alone, though its experiment may say that it is a sweep.
    alone = [] if "hydra.mode" in again else ["hydra.mode=RUN"]
    return [*flags, *arguments[:first], *kept, *alone, *arguments[first:]]


def _key(override: str) -> str:
    """Return the key of an override: `+callbacks.x=y`, `~callbacks.x` and `callbacks.x=z` are about the same one."""
    return override.split("=", 1)[0].lstrip("+~")


def config_flags() -> list[str]:
    """Repeat `--config-dir` and `--config-name` for another process; the command line's, as Hydra understood it."""
    runtime, job = HydraConfig.get().runtime, HydraConfig.get().job
    flags = [f"--config-dir={source.path}" for source in runtime.config_sources if source.provider == "command-line"]
    return flags + ([f"--config-name={job.config_name}"] if job.config_name not in (None, "train") else [])
