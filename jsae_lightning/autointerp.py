"""Automated interpretability: examples of latents out, explanations and scores in.

    jsae-autointerp RUN --latents 200 --examples 10      # RUN/eval/autointerp/{input,output}.jsonl
    jsae-autointerp RUN --load-scores FILE               # RUN/eval/autointerp/scores.jsonl, from .jsonl or .csv

`autointerp_export` says what is in the examples, `interpretation_scores` what comes back.
"""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from omegaconf import OmegaConf

from jsae_lightning.console import log_to_stdout, show
from jsae_lightning.errors import UserError
from jsae_lightning.evaluation_request import read_request
from jsae_lightning.exported_pairs import find_export, read_pair_config
from jsae_lightning.launch import exit_codes

if TYPE_CHECKING:
    from jsae_lightning.held_out import HeldOut

PROGRAM = "jsae-autointerp"


def load_held_out(run: Path, overrides: list[str]) -> "HeldOut":
    """Return the held-out tokens, model and pair of a run, as `jsae-eval RUN` loads them."""
    request = read_request(run, overrides)
    from jsae_lightning.evaluation_setup import prepare_held_out  # torch, once the call is known to be right

    return prepare_held_out(request.cfg, request.export, request.pair_config).held_out


def main() -> None:
    """Console script `jsae-autointerp`."""
    with exit_codes(PROGRAM):
        given = _arguments()
        folder = given.out or given.run / "eval"
        if not given.run.is_dir():
            raise UserError(f"{given.run}: there is no such folder: give a run's folder or an exported pair's")
        if given.load_scores is not None:
            _take_scores(given.load_scores, given.run, folder)
            return
        if given.cfg is not None:
            show([OmegaConf.to_yaml(read_request(given.run, given.overrides).cfg).rstrip()])
            return
        log_to_stdout(logging.INFO)
        held_out = load_held_out(given.run, given.overrides)
        from jsae_lightning.autointerp_export import export_autointerp

        paths = export_autointerp(held_out, folder, latents=given.latents, examples=given.examples)
        print("\n".join(f"{side} latents: {path}" for side, path in paths.items()), flush=True)


def _take_scores(source: Path, run: Path, folder: Path) -> None:
    from jsae_lightning.evaluation_files import EXPLANATIONS
    from jsae_lightning.interpretation_scores import load_scores, write_scores

    pair = read_pair_config(find_export(run))
    num_latents = {side: pair[f"{side}_sae"]["d_sae"] for side in ("input", "output")}
    path = write_scores(load_scores(source, num_latents), folder / EXPLANATIONS / "scores.jsonl")
    print(f"scores: {path}", flush=True)


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: give {PROGRAM} RUN first, then options; see {PROGRAM} --help")


def _arguments() -> argparse.Namespace:
    parser = _Parser(
        prog=PROGRAM,
        description="Write examples of latents for automated interpretability, or take its explanations and scores.",
        epilog="Exit codes: 0 done; 2 a mistake in the arguments or files; 1 anything else.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run or of an exported pair")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="as for jsae-eval: data, device, ...")
    parser.add_argument("--latents", metavar="N", type=int, default=200, help="of each side, at random (default: 200)")
    parser.add_argument("--examples", metavar="N", type=int, default=10, help="in each group (default: 10)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="evaluation folder to write to (default: RUN/eval)")
    parser.add_argument(
        "--load-scores", metavar="FILE", type=Path, help=".jsonl or .csv: side, latent, explanation, score"
    )
    parser.add_argument("--cfg", choices=["job"], help="print the configuration of KEY=VALUE, with every key, and stop")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
