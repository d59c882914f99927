"""Clocks: contestants take turns, so that what else the machine does meets all of them alike."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from jsae_lightning.benchmarking.names import FLOOR, OURS, OURS_QUARTER, OURS_WITHOUT, PUBLISHED, SINGLE_DENSE

Seconds = dict[str, list[float]]


def take_turns(
    steps: Mapping[str, Sequence[Callable[[], object]]],
    rounds: int,
    *,
    after: Callable[[], None],
    synchronize: Callable[[], None],
    report: Callable[[int, dict[str, float]], None],
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Let everyone take its steps once a round; return the seconds a step of each in every round.

    Args:
        steps: what to run, by name, in the order of the turns; of several steps of one name the mean counts.
        rounds: how many.
        after: is called after every step, unmeasured.
        synchronize: waits for the device, before and after every step.
        report: is given the round's number, from 1, and its seconds.
        clock: seconds since whenever.
    """
    seconds: Seconds = {name: [] for name in steps}
    for number in range(1, rounds + 1):
        for name, own_steps in steps.items():
            total = 0.0
            for step in own_steps:
                synchronize()
                began = clock()
                step()
                synchronize()
                total += clock() - began
                after()
            seconds[name].append(total / len(own_steps))
        report(number, {name: values[-1] for name, values in seconds.items()})
    return seconds


def waiting_for(device: torch.device) -> Callable[[], None]:
    """Return what waits until a device has done what it was given."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def medians(seconds: Mapping[str, Iterable[float]]) -> dict[str, float]:
    """Return each one's median."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratios(medians: Mapping[str, float]) -> dict[str, float | None]:
    """Return the figures that the package is judged by, None where one of the two was not measured.

    published_over_ours       how many times faster ours, with the penalty, is than the published formulation
    ours_over_single_dense    ours with the penalty against one traditional SAE (the paper: 2.2 times)
    penalty_overhead          what the penalty adds to our own pair's step, as a share of it
    penalty_overhead_quarter  the same with the penalty on every fourth step (token_fraction 0.25)
    ours_over_floor           ours with the penalty against the floor
    """

    def over(numerator: str, denominator: str, minus: float = 0.0) -> float | None:
        if numerator not in medians or denominator not in medians:
            return None
        return medians[numerator] / medians[denominator] - minus

    return {
        "published_over_ours": over(PUBLISHED, OURS),
        "ours_over_single_dense": over(OURS, SINGLE_DENSE),
        "penalty_overhead": over(OURS, OURS_WITHOUT, 1.0),
        "penalty_overhead_quarter": over(OURS_QUARTER, OURS_WITHOUT, 1.0),
        "ours_over_floor": over(OURS, FLOOR),
    }
