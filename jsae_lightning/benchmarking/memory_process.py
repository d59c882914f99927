"""The process in which one contestant's memory is measured: a request on stdin, a `Peak` as JSON on stdout."""

import dataclasses
import json
import sys

import torch

from jsae_lightning import kernels
from jsae_lightning.benchmarking.contestants import Step, make_steps
from jsae_lightning.benchmarking.language_models import ModelForward
from jsae_lightning.benchmarking.memory import (
    Peak,
    is_out_of_memory,
    limit_to_free_memory,
    peak_growth,
    resident_bytes,
)
from jsae_lightning.benchmarking.names import MODEL
from jsae_lightning.benchmarking.problem import make_problem
from jsae_lightning.benchmarking.shapes import PRESETS, Settings, Shape

_CPU = torch.device("cpu")


def main() -> None:
    """Measure what is asked for on stdin."""
    request = json.load(sys.stdin)
    peak = measure(request["name"], Shape(**request["shape"]), Settings(**request["settings"]))
    print(json.dumps(dataclasses.asdict(peak)))


def measure(name: str, shape: Shape, settings: Settings) -> Peak:
    """Return the peak of one step of `name` in this process, whose memory is limited to what is free."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    kernels.select_kernels(settings.kernels)
    limit_to_free_memory()
    try:
        _first_step(name, dataclasses.replace(shape, tokens=min(shape.tokens, 16)), settings)()
        before = resident_bytes()
        step = _first_step(name, shape, settings)
        built = max(0, resident_bytes() - before)
        return Peak(peak_growth(step), started_with=built)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Peak(None, fits=False)


def _first_step(name: str, shape: Shape, settings: Settings) -> Step:
    """Return the contestant's step that takes the most memory: the first, where the others have no penalty."""
    if name == MODEL:
        spec = PRESETS[settings.preset].model
        return ModelForward(spec, tokens=shape.tokens, dtype=settings.dtype, device=_CPU, seed=settings.seed)
    return make_steps(name, make_problem(shape, dtype=settings.dtype, device=_CPU, seed=settings.seed))[0]


if __name__ == "__main__":
    main()
