"""Two runs are the same: their checkpoints, logs and TensorBoard scalars, to the bit."""

import csv
import math
from pathlib import Path

import torch


def checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "csv" / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in found]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((run / "tensorboard").glob("events*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
                elif value.HasField("tensor") and value.tensor.dtype == 1:
                    found.setdefault(value.tag, []).append((event.step, float(make_ndarray(value.tensor))))
    return {tag: sorted(values) for tag, values in found.items() if not tag.startswith("time/")}


def assert_same(left, right, where: str) -> None:
    """Compare nested state exactly, but for figures of time and the `datasets` library's note of a stream's position.

    That one writes the same position in several ways (so many batches, so many examples since).
    """
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            if "Throughput" not in str(key) and key != "dataset":
                assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        both_nan = isinstance(left, float) and isinstance(right, float) and math.isnan(left) and math.isnan(right)
        assert left == right or both_nan, f"{where}: {left} != {right}"


def assert_same_run(run: Path, expected: Path) -> None:
    assert_same(checkpoint(run), checkpoint(expected), "checkpoint")
    files = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (run, expected)]
    assert files[0] == files[1]
    assert rows(run) == rows(expected)
    found = scalars(run)
    assert found == scalars(expected)
    assert all(len({step for step, _ in values}) == len(values) for values in found.values()), "logged twice"
