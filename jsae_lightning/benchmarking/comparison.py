"""One run of the benchmark: every contestant's memory first, which tells what fits; then their time, by turns."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from jsae_lightning import kernels
from jsae_lightning.benchmarking.contestants import Step, make_steps
from jsae_lightning.benchmarking.language_models import ModelForward, mismatch
from jsae_lightning.benchmarking.machine import machine
from jsae_lightning.benchmarking.memory import (
    Peak,
    free_bytes,
    is_out_of_memory,
    measure_apart,
    peak_allocated,
)
from jsae_lightning.benchmarking.names import LABELS, MODEL
from jsae_lightning.benchmarking.problem import Problem, check_activation, choose_device, make_problem
from jsae_lightning.benchmarking.shapes import PRESETS, Settings, Shape
from jsae_lightning.benchmarking.timing import Seconds, medians, ratios, take_turns, waiting_for
from jsae_lightning.versions import package_versions

Report = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """What one run found."""

    shape: Shape
    settings: Settings
    seconds: Seconds
    """Of every round, for each contestant that fits."""
    peak_bytes: dict[str, int | None]
    losses: dict[str, float]
    """Of the warm-up, for those that have one: what computes the same must agree."""
    left_out: dict[str, str]
    """Contestants that were not measured, and why."""
    versions: dict[str, Any]

    @property
    def medians(self) -> dict[str, float]:
        """Seconds of each contestant, the median of the rounds."""
        return medians(self.seconds)

    def record(self) -> dict[str, Any]:
        """Return everything as plain values, for a JSON file."""
        return {
            "ratios": ratios(self.medians),
            "seconds": self.medians,
            "peak_bytes": self.peak_bytes,
            "shape": asdict(self.shape),
            "versions": self.versions,
            "preset": self.settings.preset,
            "tokens_per_second": {name: self.shape.tokens / value for name, value in self.medians.items()},
            "seconds_of_rounds": self.seconds,
            "losses": self.losses,
            "left_out": self.left_out,
        }


def compare(shape: Shape, settings: Settings, names: Sequence[str], report: Report) -> Comparison:
    """Measure the contestants `names`; `report` is given a line for each thing done.

    Raises UserError for settings that cannot be used here.
    """
    device = choose_device(settings)
    prepare(settings)
    check_activation(shape)
    left_out: dict[str, str] = {}
    if MODEL in names and (why := mismatch(PRESETS[settings.preset], shape)):
        left_out[MODEL] = why
    wanted = [name for name in names if name not in left_out]
    peaks = _peaks_apart(shape, settings, wanted, report) if device.type == "cpu" else {}
    left_out |= {name: "does not fit into the memory that is free" for name, peak in peaks.items() if not peak.fits}
    left_out |= _without_room_beside(peaks, [name for name in wanted if name not in left_out])

    problem = make_problem(shape, dtype=settings.dtype, device=device, seed=settings.seed)
    steps: dict[str, list[Step]] = {}
    losses: dict[str, float] = {}
    for name in [name for name in wanted if name not in left_out]:
        try:
            steps[name] = _make(name, shape, settings, problem)
            peaks[name] = _warm_up(name, steps[name], peaks.get(name), problem, losses, report)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            steps.pop(name, None)
            left_out[name] = "does not fit into the device's memory"
        problem.clear_gradients()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for name, why in left_out.items():
        report(f"left out: {LABELS[name]}: {why}")
    seconds = take_turns(
        steps,
        settings.repeats,
        after=problem.clear_gradients,
        synchronize=waiting_for(device),
        report=lambda number, found: report(_round_line(number, settings.repeats, found)),
    )
    peak_bytes = {name: peaks[name].bytes for name in steps}
    return Comparison(shape, settings, seconds, peak_bytes, losses, left_out, _versions(settings, device))


def prepare(settings: Settings) -> None:
    """Set threads, kernels and the seed of torch's own generator for this process; raise UserError for bad kernels."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    kernels.select_kernels(settings.kernels)
    torch.manual_seed(settings.seed)


def _versions(settings: Settings, device: torch.device) -> dict[str, Any]:
    own = {key: getattr(settings, key) for key in ("dtype", "repeats", "seed")}
    return package_versions() | machine(device) | own | {"kernels": kernels.selected_kernels(device)}


def _peaks_apart(shape: Shape, settings: Settings, names: Sequence[str], report: Report) -> dict[str, Peak]:
    peaks = {}
    for name in names:
        peaks[name] = measure_apart(name, shape, settings)
        size = peaks[name].bytes
        found = "does not fit" if not peaks[name].fits else "not known" if size is None else f"{size / 1e6:,.0f} MB"
        report(f"memory: {LABELS[name]}: {found}")
    return peaks


def _without_room_beside(peaks: dict[str, Peak], names: Sequence[str]) -> dict[str, str]:
    """Leave the language model out where it and the pair do not fit side by side, as they must in one process.

    `peaks` is empty on CUDA, where what does not fit shows when it is made.
    """
    free = free_bytes()
    if free is None or MODEL not in names:
        return {}
    others = [name for name in names if name != MODEL]
    state = max((peaks[name].started_with for name in others if name in peaks), default=0)
    highest = max((peaks[name].bytes or 0 for name in names if name in peaks), default=0)
    if MODEL in peaks and peaks[MODEL].started_with + state + highest > free:
        return {MODEL: "does not fit into the memory that is free beside the pair: measure it with --only"}
    return {}


def _make(name: str, shape: Shape, settings: Settings, problem: Problem) -> list[Step]:
    if name != MODEL:
        return make_steps(name, problem)
    spec, device = PRESETS[settings.preset].model, problem.device
    model = ModelForward(spec, tokens=shape.tokens, dtype=settings.dtype, device=device, seed=settings.seed)
    return make_steps(name, problem, model)


def _warm_up(
    name: str, steps: Sequence[Step], peak: Peak | None, problem: Problem, losses: dict[str, float], report: Report
) -> Peak:
    """Run a contestant once, unmeasured but for its memory on CUDA, which is not known yet."""
    found = []
    for step in steps:
        found.append(step())
        problem.clear_gradients()
    if peak is None:  # libraries have taken their workspaces now
        peak = Peak(peak_allocated(steps[0]))
    known = [float(loss) for loss in found if loss is not None]
    if known:
        losses[name] = sum(known) / len(known)
    report(f"warm-up: {LABELS[name]}" + (f": loss {losses[name]:.4f}" if known else ""))
    return peak


def _round_line(number: int, rounds: int, found: dict[str, float]) -> str:
    times = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    return f"round {number} of {rounds}: {times} s"
