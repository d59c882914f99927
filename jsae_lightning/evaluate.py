"""Judge trained pairs on held-out tokens.

jsae-eval logs/runs/DATE                                       # figures with standard errors, in logs/runs/DATE/eval
jsae-eval logs/runs/DATE data=c4 eval.tokens=1e6               # on other data, and on more of it
jsae-eval --compare RUN BASELINE RANDOM --out comparison       # what is sparser, and what is only smaller?
torchrun --nproc-per-node 2 -m jsae_lightning.evaluate RUN     # the sequences shared out to several processes
"""

import argparse
import hashlib
import logging
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from jsae_lightning.atomic_files import atomic_folder, remove_stale_folders
from jsae_lightning.config import config_dir
from jsae_lightning.console import log_to_stdout, show
from jsae_lightning.errors import UserError
from jsae_lightning.evaluate_config import (
    covers,
    data_settings,
    parts,
    settings,
)
from jsae_lightning.evaluation_request import EvaluationRequest, read_request
from jsae_lightning.help import eval_help_text
from jsae_lightning.lasting_imports import lasting_imports
from jsae_lightning.launch import exit_codes
from jsae_lightning.processes import is_rank_zero

if TYPE_CHECKING:
    import torch

    from jsae_lightning.held_out import HeldOut

PROGRAM = "jsae-eval"
_PATIENCE = timedelta(hours=12)
"""Other ranks wait while rank 0 sums up a graph; torch's half an hour is short for some 10^8 edges."""
log = logging.getLogger(__name__)


def main() -> None:
    """Console script `jsae-eval`."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        with exit_codes(PROGRAM):
            print(eval_help_text(config_dir()), flush=True)
        return
    with exit_codes(PROGRAM), _ranks():
        given = _arguments(sys.argv[1:])
        if given.compare:
            from jsae_lightning.comparison_files import compare_folders

            compare_folders(given.folders, given.overrides, out=given.out, config_dirs=given.config_dirs)
        else:
            request = read_request(given.folders[0], given.overrides, out=given.out, config_dirs=given.config_dirs)
            if given.shows_config:
                show([OmegaConf.to_yaml(request.cfg).rstrip()])
                return
            with lasting_imports():
                import_module("jsae_lightning.evaluation_setup")
            path = _evaluate(request)
            if is_rank_zero():
                show([path.with_name("eval.md").read_text(encoding="utf-8"), f"results: {path}"])


def evaluate_folder(folder: str | Path, overrides: Sequence[str] = (), *, config_dirs: Sequence[str] = ()) -> Path:
    """Return the path of a pair's `eval.json`, evaluating the pair if there is none or it was made otherwise.

    Results count as made otherwise if the pair's weights have changed since, or a key that the overrides name had
    another value (for `eval.parts`: if a part that is asked for is missing); without overrides, all results of the pair
    count.

    Args:
        folder: of a run or an exported pair.
        overrides: of `conf/eval.yaml`, in Hydra's notation.
        config_dirs: folders with the user's own presets.

    Raises:
        UserError: everything that is wrong with the folder, the overrides, the data or the model.
    """
    from jsae_lightning.evaluation_files import EVAL_JSON, read_record

    request = read_request(folder, overrides, config_dirs=config_dirs)
    path = request.target / EVAL_JSON
    if path.is_file() and (path.parent / "groups.safetensors").is_file():
        earlier = read_record(path)["evaluation"]
        pair_hash = _file_hash(request.export / "model.safetensors")
        if covers(earlier, overrides, request.cfg) and earlier["pair_hash"] == pair_hash:
            return path
    return _evaluate(request)


def evaluate(
    folder: str | Path, overrides: Sequence[str], *, out: str | None = None, config_dirs: Sequence[str] = ()
) -> Path:
    """Evaluate a pair and write its folder of results; return the path of `eval.json`.

    With several ranks all must call it; rank 0 alone writes. Arguments as for `evaluate_folder`; `out` is
    another name for the override `eval.out`.
    """
    return _evaluate(read_request(folder, overrides, out=out, config_dirs=config_dirs))


def _evaluate(request: EvaluationRequest) -> Path:
    from jsae_lightning.distributed import rank_and_world_size
    from jsae_lightning.evaluation_files import EVAL_JSON, check_output, write_evaluation
    from jsae_lightning.evaluation_parts import Task, merge, run_part, runnable_parts
    from jsae_lightning.evaluation_setup import prepare_held_out
    from jsae_lightning.jackknife import document_groups

    export, cfg, target = request.export, request.cfg, request.target
    check_output(target)
    if is_rank_zero():
        remove_stale_folders(target)
    prepared = prepare_held_out(cfg, export, request.pair_config)
    held_out = prepared.held_out
    groups = document_groups(held_out.document, cfg.eval.groups)
    results, seconds = {}, {}
    with _results_folder(target) as temporary:
        limit = None if cfg.eval.jacobian_tokens is None else int(cfg.eval.jacobian_tokens)
        task = Task(
            held_out,
            groups,
            jacobian_tokens=limit,
            penalty=prepared.penalty,
            folder=temporary,
            fidelity_tokens=int(cfg.eval.fidelity_tokens),
            curve_sequences=cfg.eval.curve_sequences,
            contexts=cfg.eval.contexts,
            top_edges=cfg.eval.top_edges,
        )
        names, left_out = runnable_parts(parts(cfg), task, are_chosen=cfg.eval.parts is not None)
        if left_out is not None and is_rank_zero():
            log.warning(left_out)
        for name in names:
            start = time.monotonic()
            results[name] = run_part(name, task)
            seconds[name] = round(time.monotonic() - start, 3)
        rank, world_size = rank_and_world_size()
        if rank == 0:
            judged = int(held_out.included.sum())
            evaluation: dict[str, Any] = {
                "tokens": judged,
                "jacobian_tokens": judged if limit is None else min(judged, limit),
                "sequences": len(held_out.tokens),
                "documents": held_out.num_documents,
                "groups": int(groups.max()) + 1,
                "at": held_out.at,
                "other_at": "reconstruction" if held_out.at == "input" else "input",
                "seed": held_out.seed,
                "ranks": world_size,
                "device": str(prepared.device),
                "data": data_settings(cfg),
                "parts": names,
                "remark": "; ".join(filter(None, (prepared.remark, left_out))) or None,
                "settings": settings(cfg),
                "pair_hash": _file_hash(export / "model.safetensors"),
                "tokens_hash": _tokens_hash(held_out, groups, limit),
                "seconds": seconds,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
            record = _record(request.folder, request.pair_config, evaluation)
            write_evaluation(temporary, record, merge(results))
            _keep_explanations(target, temporary, evaluation["pair_hash"])
    return target / EVAL_JSON


def _record(folder: Path, pair_config: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    from jsae_lightning.evaluation_files import FORMAT_VERSION, finite
    from jsae_lightning.versions import package_versions

    resolved = folder.resolve()
    return finite(
        {
            "format_version": FORMAT_VERSION,
            "name": resolved.parent.name if resolved.name == "sae_pair" else resolved.name,
            "folder": str(folder),
            "kind": "jsae" if pair_config["jacobian"]["coef"] else "traditional",
            "random_weights": pair_config["model"]["random_weights"],
            "pair": pair_config,
            "evaluation": evaluation,
            "versions": package_versions(),
        }
    )


@contextmanager
def _results_folder(target: Path) -> Iterator[Path]:
    """Yield the folder that is written to: on rank 0 one that takes the place of `target` on success."""
    import torch.distributed as dist

    from jsae_lightning.distributed import rank_and_world_size

    rank, world_size = rank_and_world_size()
    if world_size == 1:
        with atomic_folder(target) as temporary:
            yield temporary
        return
    name = [""]
    if rank != 0:
        dist.broadcast_object_list(name)
        yield Path(name[0])
        dist.barrier()
        return
    with atomic_folder(target) as temporary:
        name = [str(temporary)]
        dist.broadcast_object_list(name)
        yield temporary
    dist.barrier()  # the results are there when any rank goes on


def _keep_explanations(target: Path, temporary: Path, pair_hash: str) -> None:
    """Carry explanations of latents over to the new results, unless they are known to be of another pair.

    Others have paid for them. They may have been made before any results, or the earlier results may be damaged.
    """
    from jsae_lightning.evaluation_files import EVAL_JSON, EXPLANATIONS, read_record

    earlier = target / EXPLANATIONS
    if not earlier.is_dir():
        return
    try:
        explained = read_record(target / EVAL_JSON)["evaluation"]["pair_hash"]
    except (UserError, KeyError, TypeError):
        explained = pair_hash
    if explained == pair_hash:
        shutil.copytree(earlier, temporary / EXPLANATIONS, dirs_exist_ok=True)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokens_hash(held_out: "HeldOut", groups: "torch.Tensor", jacobian_tokens: int | None) -> str:
    """Two evaluations with the same hash judged the same positions in the same groups: their figures are paired."""
    digest = hashlib.sha256(str(jacobian_tokens).encode())
    for tensor in (held_out.tokens, held_out.included, groups):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _ranks() -> Iterator[None]:
    """Join the process group of `torchrun`, if that has started several processes, and set up logging."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    log_to_stdout(logging.INFO if rank == 0 else logging.WARNING)
    if world_size == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    # Sums are float64 on the device of the pair; objects and barriers travel over gloo.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class _Arguments:
    folders: list[str]
    overrides: list[str]
    compare: bool
    out: str | None
    config_dirs: list[str]
    shows_config: bool


def _arguments(arguments: Sequence[str]) -> _Arguments:
    parser = argparse.ArgumentParser(prog=PROGRAM, add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("--config-dir", action="append", default=[])
    parser.add_argument("--cfg", choices=["job"])
    try:
        given, unknown = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{PROGRAM}: {error}: --help shows how it is called") from error
    if unknown:
        raise UserError(f"{unknown[0]}: there is no such option: --help lists them")
    overrides = [word for word in given.words if _is_override(word)]
    folders = [word for word in given.words if not _is_override(word)]
    if not folders:
        raise UserError(f"{PROGRAM}: no folder is given: name a run's folder or an exported pair's")
    if len(folders) > 1 and not given.compare:
        raise UserError(f"{folders[1]}: one folder at a time is evaluated: use --compare for several")
    if len(folders) < 2 and given.compare:
        raise UserError("--compare: only one folder is given: name at least two")
    if given.cfg and given.compare:
        raise UserError("--cfg: shows the configuration of one folder's evaluation: leave --compare out")
    return _Arguments(folders, overrides, given.compare, given.out, given.config_dir, given.cfg is not None)


def _is_override(word: str) -> bool:
    """Whether an argument is an override of Hydra's and no folder, whose name may have a `=` too."""
    return ("=" in word or word.startswith(("+", "~"))) and not Path(word).exists()


if __name__ == "__main__":
    main()
