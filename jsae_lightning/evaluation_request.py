"""What is to be judged, and how: read without torch, so that mistakes in a call answer at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from jsae_lightning.evaluate_config import compose_evaluation
from jsae_lightning.exported_pairs import check_for_evaluation, find_export, read_pair_config


@dataclass(frozen=True)
class EvaluationRequest:
    """A pair and the configuration of its evaluation."""

    folder: Path
    """A run's or an exported pair's."""
    export: Path
    """The exported pair's folder."""
    pair_config: dict[str, Any]
    """Its `config.json`."""
    cfg: DictConfig
    target: Path
    """The folder of the results."""


def read_request(
    folder: str | Path, overrides: Sequence[str], *, out: str | None = None, config_dirs: Sequence[str] = ()
) -> EvaluationRequest:
    """Read the pair's `config.json` and compose the configuration; the arguments are those of `evaluate.evaluate`.

    Raises:
        UserError: there is no exported pair in `folder`, or `overrides` hold a mistake.
    """
    folder = Path(folder).expanduser()
    export = find_export(folder)
    pair_config = read_pair_config(export)
    check_for_evaluation(export, pair_config)
    cfg = compose_evaluation(folder, pair_config, overrides, config_dirs)
    return EvaluationRequest(folder, export, pair_config, cfg, Path(out or cfg.eval.out or folder / "eval"))
