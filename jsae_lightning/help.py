"""What `--help` prints for `jsae-train` and `jsae-eval`: Hydra's own takes two seconds to list the same groups."""

import textwrap
from pathlib import Path

from jsae_lightning.suggestions import choices_of

_USAGE = """\
usage: jsae-train [GROUP=CHOICE ...] [KEY=VALUE ...] [-m] [--config-dir DIR]

Train a Jacobian SAE pair on the MLP of a language model. Without arguments: on the embedded model and text.

  jsae-train experiment=smoke                                    is everything in order? (half a minute)
  jsae-train experiment=paper/pythia-70m trainer=gpu             the paper's recipe
  jsae-train experiment=none model=local model.path=DIR model.layer=2 data=text data.path=FILE
  jsae-train -m sae.k=16,32 jacobian.coef=0,0.5                  a sweep, one process a job
  jsae-train -m hydra/launcher=slurm_gpu trainer=gpu sae.k=16,32  the same as jobs of Slurm
  jsae-train ckpt_path=auto hydra.run.dir=DIR                    go on with the run in DIR

Groups and their choices:
"""
_MORE = """
  -m, --multirun       sweep over comma-separated values
  --config-dir DIR     your own configuration files, beside the package's
  --cfg job            print the configuration that the arguments compose, with every key
  --hydra-help         Hydra's own options
"""
_EVAL_USAGE = """\
usage: jsae-eval FOLDER [GROUP=CHOICE ...] [KEY=VALUE ...] [--out DIR] [--config-dir DIR]
       jsae-eval --compare FOLDER FOLDER ... [KEY=VALUE ...] [--out DIR]

Judge a trained pair on held-out tokens; FOLDER is a run's, or an exported pair's (sae_pair/).
Without overrides: on the held-out tokens of its own training. Results go to FOLDER/eval.

  jsae-eval logs/runs/DATE eval.tokens=1e6                       on more tokens
  jsae-eval logs/runs/DATE data=c4 eval.exclude_first_position=true
  jsae-eval logs/runs/DATE model.path=DIR                        the language model has moved
  jsae-eval --compare RUN BASELINE                               sparser, or only smaller? (BASELINE: jacobian.coef=0)
  torchrun --nproc-per-node 2 -m jsae_lightning.evaluate FOLDER  the sequences shared out to two processes

"""
_EVAL_MORE = """
  --compare            evaluate what is not evaluated yet, and compare; results go to comparison/ or --out
  --out DIR            where the results go
  --config-dir DIR     your own configuration files, beside the package's
  --cfg job            print the configuration that the arguments compose, with every key, and evaluate nothing

Keys, with what they are set to:
"""
_NOT_CHOSEN = {"paths", "hydra", "eval", "checkpoint", "callbacks", "optim", "sae", "slurm"}


def help_text(config_dir: Path) -> str:
    """Return the help: usage, the groups found below `config_dir` with their choices, flags."""
    lines = []
    for group in sorted(path for path in config_dir.iterdir() if path.is_dir() and path.name not in _NOT_CHOSEN):
        lines += _wrapped(group.name, choices_of(group))
    launchers = sorted(path.stem for path in (config_dir / "hydra" / "launcher").glob("*_*.yaml"))
    lines += _wrapped("hydra/launcher", launchers)
    return _USAGE + "\n".join(lines) + "\n" + _MORE


def eval_help_text(config_dir: Path) -> str:
    """Return the help of `jsae-eval`: usage, the choices of `data`, and the keys of `conf/eval.yaml`."""
    keys = (config_dir / "eval.yaml").read_text(encoding="utf-8").partition("\neval:\n")[2]
    lines = ["eval:", *keys.rstrip().splitlines()]
    return _EVAL_USAGE + "\n".join(
        [*_wrapped("data", choices_of(config_dir / "data")), _EVAL_MORE + "\n".join(f"  {line}" for line in lines)]
    )


def _wrapped(name: str, choices: list[str]) -> list[str]:
    return textwrap.wrap(", ".join(choices), 100, initial_indent=f"  {name:<16}", subsequent_indent=" " * 18)
