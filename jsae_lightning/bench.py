"""How fast a training step is, and how much memory it takes, beside what it could be and what it was before.

jsae-bench                                  # the default run's shape, half a minute
jsae-bench --preset 70m --json bench.json   # the paper's smaller shape
jsae-bench --preset 70m --sweep             # growth.png: tokens, d_sae, k, d_mlp, each doubled
jsae-bench --train                          # the whole loop of jsae-train: language model, step, and what is lost
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsae_lightning.benchmarking.names import LABELS, NAMES
from jsae_lightning.benchmarking.shapes import DEVICES, DTYPES, PRESETS, Settings, Shape, choose_shape
from jsae_lightning.errors import UserError
from jsae_lightning.launch import exit_codes

PROGRAM = "jsae-bench"
DOUBLINGS, STEPS = 3, 64
SIZES = ("tokens", "d_model", "d_mlp", "d_sae", "k", "gated", "activation")
_NOT_WITH_TRAIN = {
    **dict.fromkeys(SIZES, "data.*, sae.* or model.* as KEY=VALUE"),
    "preset": "experiment=NAME or model=NAME as KEY=VALUE",
    "repeats": "--steps",
    "only": "KEY=VALUE",
}


def main() -> None:
    """Console script `jsae-bench`."""
    with exit_codes(PROGRAM):
        given = _arguments(sys.argv[1:])
        for path in (given.json, given.png):
            _check_file(path)
        if given.train:
            _train(given)
        elif given.sweep:
            _sweep(given)
        else:
            _compare(given)


def _compare(given: argparse.Namespace) -> None:
    from jsae_lightning.benchmarking.comparison import compare
    from jsae_lightning.benchmarking.tables import comparison_table, print_lines, ratio_lines, setting_lines

    shape, settings = _shape(given), _settings(given)
    result = compare(shape, settings, given.only or NAMES, _say)
    record = result.record()
    left_out = [f"left out: {LABELS[name]}: {why}" for name, why in result.left_out.items()]
    tail = [*left_out, "", *ratio_lines(record["ratios"])]
    print_lines([*setting_lines(shape, result.versions), "", comparison_table(result), *tail])
    _write(given.json, record)


def _sweep(given: argparse.Namespace) -> None:
    from jsae_lightning.benchmarking.growth import growth_tables, sweep
    from jsae_lightning.benchmarking.growth_figure import write_figure
    from jsae_lightning.benchmarking.tables import print_lines, setting_lines

    shape, settings = _shape(given), _settings(given)
    growth = sweep(shape, settings, given.doublings or DOUBLINGS, _say)
    record = growth.record()
    lines = setting_lines(shape, record["versions"])
    for table in growth_tables(growth):
        lines += ["", table]
    print_lines([*lines, "", *(f"left out: {sentence}" for sentence in growth.left_out)])
    path = given.png or Path("growth.png")
    write_figure(growth, path)
    _say(f"figure: {path}")
    _write(given.json, record)


def _train(given: argparse.Namespace) -> None:
    from jsae_lightning.benchmarking.loop import loop_table, measure_loop, shares
    from jsae_lightning.benchmarking.tables import print_lines

    changes = {
        "kernels": given.kernels,
        "num_threads": given.threads,
        "seed": given.seed,
        "trainer.accelerator": given.device,
        "trainer.precision": {"float32": "32-true", "bf16-mixed": "bf16-mixed"}.get(given.dtype),
    }
    own = [f"{key}={value}" for key, value in changes.items() if value is not None]
    record = measure_loop([*given.overrides, *own], steps=given.steps or STEPS)
    print_lines(loop_table(record))
    _write(given.json, record | {"shares": shares(record["seconds"])})


def _write(path: Path | None, record: dict[str, Any]) -> None:
    if path is None:
        return
    from jsae_lightning.benchmarking.tables import write_json

    write_json(path, record)
    _say(f"figures: {path}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _shape(given: argparse.Namespace) -> Shape:
    return choose_shape(given.preset or "tiny", **{size: getattr(given, size) for size in SIZES})


def _settings(given: argparse.Namespace) -> Settings:
    keys = ("preset", "dtype", "kernels", "device", "threads", "repeats", "seed")
    chosen = {key: value for key in keys if (value := getattr(given, key)) is not None}
    return Settings(**{"preset": "tiny"} | chosen)


def _check_file(path: Path | None) -> None:
    """Refuse what cannot be a file before anything is measured."""
    if path is not None and path.is_dir():
        raise UserError(f"{path}: is a folder: give a file's name")


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see {PROGRAM} --help")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no positive whole number")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    wrong = [name for name in text.split(",") if name not in NAMES]
    if wrong:
        raise argparse.ArgumentTypeError(f"'{wrong[0]}' is not known: choose from {','.join(NAMES)}")
    return tuple(name for name in NAMES if name in text.split(","))


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog=PROGRAM,
        description="Time and memory of a training step (forward and backward, without the optimizer): ours beside "
        "dense traditional SAEs, the published formulation, a floor and the language model. Contestants take turns; "
        "what is printed are medians. Gaussian activations, random weights, no network.",
        epilog="Contestants: " + "; ".join(f"{name} ({label})" for name, label in LABELS.items()) + ". "
        "Exit codes: 0 done; 2 a mistake in the arguments; 1 anything else.",
        allow_abbrev=False,
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--sweep", action="store_true", help="double tokens, d_sae, k and d_mlp in turn; fit exponents")
    mode.add_argument("--train", action="store_true", help="measure jsae-train's whole loop, with its KEY=VALUE")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="with --train: settings of jsae-train")
    parser.add_argument("--preset", choices=PRESETS, help="the shape to start from (default: tiny, the default run's)")
    sizes = parser.add_argument_group("sizes that replace the preset's")
    sizes.add_argument("--tokens", type=_positive, metavar="N", help="tokens of a batch")
    sizes.add_argument("--d-model", type=_positive, metavar="N", help="width of the activations")
    sizes.add_argument("--d-mlp", type=_positive, metavar="N", help="width of the MLP")
    sizes.add_argument("--d-sae", type=_positive, metavar="N", help="latents of each SAE")
    sizes.add_argument("--k", type=_positive, metavar="N", help="active latents a token, of each SAE")
    sizes.add_argument("--gated", action=argparse.BooleanOptionalAction, help="a gated MLP, or a plain one")
    sizes.add_argument("--activation", metavar="NAME", help="of the MLP: gelu, gelu_tanh, relu, relu2, silu")
    parser.add_argument("--dtype", choices=DTYPES, help="float32 (default), or bfloat16 autocast over float32 weights")
    parser.add_argument("--kernels", metavar="NAME", help="of ours: auto (default, by device), reference, cpu, triton")
    parser.add_argument("--device", choices=DEVICES, help="auto (default): CUDA if there is one")
    parser.add_argument(
        "--threads", type=_positive, metavar="N", help="of torch on a CPU (default: torch's own choice)"
    )
    parser.add_argument("--repeats", type=_positive, metavar="N", help="rounds (default: 5), after one of warm-up")
    parser.add_argument("--only", type=_names, metavar="NAME,...", help="measure these contestants alone")
    parser.add_argument("--seed", type=int, metavar="N", help="of data and weights (default: 0)")
    parser.add_argument("--doublings", type=_positive, metavar="N", help=f"of --sweep (default: {DOUBLINGS})")
    parser.add_argument("--steps", type=_positive, metavar="N", help=f"optimizer steps of --train (default: {STEPS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--png", type=Path, metavar="FILE", help="of --sweep: the figure (default: growth.png)")
    given = parser.parse_intermixed_args(list(arguments))
    _check_modes(given)
    return given


def _check_modes(given: argparse.Namespace) -> None:
    """Refuse options that the mode does not read."""
    if given.train:
        for name, remedy in _NOT_WITH_TRAIN.items():
            if getattr(given, name) is not None:
                raise UserError(f"--{name.replace('_', '-')}: has no effect with --train: give {remedy}")
    elif given.overrides:
        raise UserError(f"{given.overrides[0]}: settings of jsae-train are for --train: add it, or leave them out")
    if given.sweep and given.only is not None:
        raise UserError("--only: has no effect with --sweep, which measures ours with and without the penalty")
    for name, mode in (("doublings", "sweep"), ("png", "sweep"), ("steps", "train")):
        if getattr(given, name) is not None and not getattr(given, mode):
            raise UserError(f"--{name}: has no effect without --{mode}: add it, or leave it out")
    if wrong := [text for text in given.overrides if "=" not in text and not text.startswith("~")]:
        raise UserError(f"{wrong[0]}: is no override: give KEY=VALUE")


if __name__ == "__main__":
    main()
