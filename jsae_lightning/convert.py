"""Sparse autoencoders of other projects in, pairs out, and back.

    jsae-convert RUN DIR --to saelens                      # DIR/input and DIR/output, for SAELens
    jsae-convert INPUT_SAE OUTPUT_SAE DIR --model M --layer 3      # two folders of SAELens, sparsify, ... as a pair
    jsae-convert DIR_OF_THE_PAPERS_CODE DIR

What is read is recognised by its files; `conversion/` has the formats. A pair that is read can be judged by `jsae-eval`
and loaded by `load_run` like one trained here.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from jsae_lightning.console import show
from jsae_lightning.conversion import FORMATS, ModelChoice
from jsae_lightning.errors import UserError
from jsae_lightning.exported_pairs import DTYPES
from jsae_lightning.launch import exit_codes

PROGRAM = "jsae-convert"


def convert(
    sources: Sequence[str | Path],
    target: str | Path,
    *,
    to: str = "jsae",
    source_format: str | None = None,
    model: ModelChoice | None = None,
) -> list[str]:
    """Write to `target` in the format `to` what `sources` hold, all or nothing; return remarks.

    Args:
        sources: a folder with a pair (a run, an export, the paper's code), or those of the input and of the output SAE.
        target: a new folder.
        to: one of `FORMATS`.
        source_format: one of them; None: it is recognised by the files.
        model: the language model, where the files do not tell it: of its MLP a pair in our format holds the hash, the
            others the names of its input and output.

    Raises:
        UserError: naming file and key, for everything that is damaged, of another kind, or does not fit together.
    """
    for option, chosen in (("--to", to), ("--from", source_format)):
        if chosen is not None and chosen not in FORMATS:
            raise UserError(f"{option}: '{chosen}' is not known: choose one of {', '.join(FORMATS)}")
    target = Path(target).expanduser().resolve()
    if any(parent.exists() and not parent.is_dir() for parent in target.parents):
        raise UserError(f"{target}: lies in a file: give a new folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists already: give a new folder")
    from jsae_lightning.conversion.pairs import read_pair, write_pair  # torch, once the call is known to be right

    read = read_pair([Path(source).expanduser() for source in sources], source_format)
    return [*read.remarks, *write_pair(read, target, to, model or ModelChoice())]


def main() -> None:
    """Console script `jsae-convert`."""
    with exit_codes(PROGRAM):
        given = _arguments()
        *sources, target = given.folders
        model = ModelChoice(given.model, given.layer, given.revision, given.dtype, given.no_model)
        remarks = convert(sources, target, to=given.to, source_format=given.source_format, model=model)
        show([*(f"note: {remark}" for remark in remarks), f"{given.to}: {target}"])


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see {PROGRAM} --help")


def _arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} SOURCE [OUTPUT_SAE] TARGET [options]",
        description="Read a pair, or an MLP's input SAE and its output SAE, and write it in another project's format.",
        epilog="Exit codes: 0 done; 2 a mistake in the arguments or a damaged file; 1 anything else.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="+",
        help="a run, an export or a folder of the paper's code, or two folders with one SAE each; then a new folder",
    )
    parser.add_argument("--to", default="jsae", help=f"the format to write: {', '.join(FORMATS)} (default: jsae)")
    parser.add_argument("--from", dest="source_format", metavar="FORMAT", help="of what is read, if it is not clear")
    group = parser.add_argument_group("the language model, for what is written as jsae")
    group.add_argument("--model", metavar="NAME", help="hub name or folder (default: what the files tell)")
    group.add_argument("--layer", metavar="N", type=int, help="of the MLP, from 0 (default: what the files tell)")
    group.add_argument("--revision", metavar="REV", help="of the hub model")
    group.add_argument(
        "--dtype", choices=DTYPES, help="the model's, for its activations (default: what the files tell, or float32)"
    )
    group.add_argument("--no-model", action="store_true", help="write the two SAEs alone, which SAEPair.load reads")
    given = parser.parse_intermixed_args(arguments)
    if len(given.folders) not in (2, 3):
        raise UserError(f"{len(given.folders)} folders: give one or two to read, then a new one; see {PROGRAM} --help")
    return given


if __name__ == "__main__":
    main()
