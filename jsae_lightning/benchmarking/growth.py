"""How time and memory grow: each size doubled from a shape, and the exponents that fit what was measured.

    value ~ size^b,      b the slope of a straight line through (log size, log value), by least squares

b is 1 for what is linear in a size and 0 for what does not depend on it; a sum of both lies between.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jsae_lightning.benchmarking.comparison import Comparison, Report, compare
from jsae_lightning.benchmarking.names import LABELS, OURS, OURS_WITHOUT
from jsae_lightning.benchmarking.shapes import AXES, Settings, Shape
from jsae_lightning.benchmarking.tables import figure, megabytes
from jsae_lightning.errors import UserError
from jsae_lightning.result_files import markdown_table

Measure = Callable[[Shape], Comparison]


@dataclass(frozen=True)
class Growth:
    """What a sweep found."""

    base: Shape
    points: dict[str, list[Comparison]]
    """Of each size, by rising size, the shape that was started from first."""
    left_out: list[str]
    """Sentences on sizes that were not measured."""

    def exponents(self) -> dict[str, dict[str, float | None]]:
        """Return the fitted exponents of each size; `penalty` is the difference of the two contestants."""
        return {axis: _exponents([getattr(p.shape, axis) for p in found], found) for axis, found in self.points.items()}

    def record(self) -> dict[str, Any]:
        """Return everything as plain values, for a JSON file."""
        return {
            "exponents": self.exponents(),
            "points": {axis: [point.record() for point in found] for axis, found in self.points.items()},
            "left_out": self.left_out,
            "versions": self.points[AXES[0]][0].versions,
        }


def sweep(base: Shape, settings: Settings, doublings: int, report: Report) -> Growth:
    """Measure ours, with and without the penalty, at `base` and at each size doubled up to `doublings` times.

    A size that does not fit into memory, or is impossible, ends its row. Raises UserError if the base does not fit.
    """

    def measure(shape: Shape) -> Comparison:
        return compare(shape, settings, (OURS_WITHOUT, OURS), lambda line: report(f"  {line}"))

    return sweep_with(measure, base, doublings, report)


def sweep_with(measure: Measure, base: Shape, doublings: int, report: Report) -> Growth:
    """Do what `sweep` does, with `measure` for one shape."""
    report(f"start: {base}")
    first = measure(base)
    if first.left_out:
        raise UserError("--sweep: the shape that it starts from does not fit into memory: give smaller sizes")
    points: dict[str, list[Comparison]] = {axis: [first] for axis in AXES}
    left_out: list[str] = []
    for axis in AXES:
        for factor in (2**power for power in range(1, doublings + 1)):
            size = factor * getattr(base, axis)
            try:
                shape = base.scaled(axis, factor)
            except UserError as error:
                left_out.append(f"{axis} from {size:,} on: {error}")
                break
            report(f"{axis} {size:,}")
            found = measure(shape)
            if found.left_out:
                name, why = next(iter(found.left_out.items()))
                left_out.append(f"{axis} from {size:,} on: {LABELS[name]} {why}")
                break
            points[axis].append(found)
    return Growth(base, points, left_out)


def exponent(sizes: Sequence[int], values: Sequence[int | float | None]) -> float | None:
    """Return the slope of log value over log size by least squares; None for fewer than two sizes or values <= 0."""
    if len(set(sizes)) < 2 or any(value is None or value <= 0 for value in values):
        return None
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in values if value is not None]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in xs)


def penalty_seconds(point: Comparison) -> float:
    """Return what the penalty adds to a step, in seconds."""
    return point.medians[OURS] - point.medians[OURS_WITHOUT]


def _exponents(sizes: Sequence[int], points: Sequence[Comparison]) -> dict[str, float | None]:
    return {
        "seconds_ours": exponent(sizes, [point.medians[OURS] for point in points]),
        "seconds_without_penalty": exponent(sizes, [point.medians[OURS_WITHOUT] for point in points]),
        "seconds_penalty": exponent(sizes, [penalty_seconds(point) for point in points]),
        "peak_bytes_ours": exponent(sizes, [point.peak_bytes[OURS] for point in points]),
        "peak_bytes_without_penalty": exponent(sizes, [point.peak_bytes[OURS_WITHOUT] for point in points]),
    }


def growth_tables(growth: Growth) -> list[str]:
    """Return two tables: what was measured, and the exponents."""
    rows, fits = [], []
    for axis, points in growth.points.items():
        for point in points:
            rows.append(
                [
                    axis,
                    f"{getattr(point.shape, axis):,}",
                    f"{point.medians[OURS_WITHOUT]:.4g}",
                    f"{point.medians[OURS]:.4g}",
                    f"{penalty_seconds(point):.4g}",
                    megabytes(point.peak_bytes[OURS_WITHOUT]),
                    megabytes(point.peak_bytes[OURS]),
                ]
            )
        fits.append([axis, *(figure(value, ".2f") for value in growth.exponents()[axis].values())])
    measured = ["", "size", "s, without penalty", "s, with", "s, penalty", "peak MB, without", "peak MB, with"]
    fitted = ["exponent", "s, with", "s, without penalty", "s, penalty", "peak MB, with", "peak MB, without"]
    return [
        markdown_table(measured, rows, [False, *[True] * 6]),
        markdown_table(fitted, fits, [False, *[True] * 5]),
    ]
