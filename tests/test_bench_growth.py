"""How growth is fitted and drawn, on numbers that are known."""

import dataclasses
import math

import pytest

from jsae_lightning.benchmarking.comparison import Comparison
from jsae_lightning.benchmarking.growth import exponent, growth_tables, sweep_with
from jsae_lightning.benchmarking.growth_figure import draw_growth, write_figure
from jsae_lightning.benchmarking.names import OURS, OURS_WITHOUT
from jsae_lightning.benchmarking.shapes import Settings, Shape
from jsae_lightning.errors import UserError

BASE = Shape(tokens=8, d_model=4, d_mlp=16, d_sae=32, k=4, gated=False, activation="gelu")


def made_up(shape: Shape, left_out: dict[str, str] | None = None) -> Comparison:
    """A step whose penalty costs tokens d_mlp k^2, and whose encoders cost tokens d_sae."""
    encoders = 1e-3 * shape.tokens * shape.d_sae
    penalty = 1e-3 * shape.tokens * shape.d_mlp * shape.k**2
    return Comparison(
        shape,
        Settings("tiny"),
        seconds={OURS_WITHOUT: [encoders] * 3, OURS: [encoders + penalty] * 3},
        peak_bytes={OURS_WITHOUT: shape.tokens * shape.d_sae, OURS: shape.tokens * (shape.d_sae + shape.d_mlp)},
        losses={},
        left_out=left_out or {},
        versions={"torch": "2"},
    )


def test_the_exponent_is_the_slope_between_logarithms():
    assert exponent([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]) == pytest.approx(2)
    assert exponent([5, 10], [7.0, 7.0]) == pytest.approx(0)
    assert exponent([1, 2, 4], [1.0, 4.0, 4.0]) == pytest.approx(1)  # by hand: slopes 2 and 0
    assert exponent([1, 10, 100], [1.0, 1 / 10, 1 / 100]) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("sizes", "values"), [([2], [1.0]), ([2, 2], [1.0, 2.0]), ([1, 2], [0.0, 1.0]), ([1, 2], [1.0, None])]
)
def test_without_two_positive_values_there_is_no_exponent(sizes, values):
    assert exponent(sizes, values) is None


def test_a_sweep_doubles_each_size_alone_and_finds_the_exponents():
    seen = []

    def measure(shape):
        seen.append(shape)
        return made_up(shape)

    growth = sweep_with(measure, BASE, 2, lambda line: None)
    assert seen == [BASE, *(BASE.scaled(axis, f) for axis in ("tokens", "d_sae", "k", "d_mlp") for f in (2, 4))]
    found = growth.exponents()
    assert {axis: round(fits["seconds_penalty"], 9) for axis, fits in found.items()} == {
        "tokens": 1,
        "d_sae": 0,
        "k": 2,
        "d_mlp": 1,
    }
    assert found["tokens"]["seconds_ours"] == pytest.approx(1)
    assert found["d_sae"]["seconds_without_penalty"] == pytest.approx(1)
    assert 0 < found["d_sae"]["seconds_ours"] < 1
    assert found["d_mlp"]["peak_bytes_without_penalty"] == pytest.approx(0)
    assert growth.record()["points"]["k"][2]["shape"]["k"] == 16


def test_what_does_not_fit_or_cannot_be_ends_its_row_and_is_named():
    def measure(shape):
        return made_up(shape, {OURS: "does not fit"} if shape.tokens >= 32 else None)

    growth = sweep_with(measure, BASE, 4, lambda line: None)
    assert {axis: len(points) for axis, points in growth.points.items()} == {
        "tokens": 2,
        "d_sae": 5,
        "k": 4,
        "d_mlp": 5,
    }
    tokens, k = growth.left_out
    assert tokens == "tokens from 32 on: ours, with the penalty does not fit"
    assert k.startswith("k from 64 on: --k: 64 is more than the 32 latents")
    assert "| tokens |   16 |" in growth_tables(growth)[0]


def test_a_start_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="--sweep: the shape that it starts from does not fit"):
        sweep_with(lambda shape: made_up(shape, {OURS: "too large"}), BASE, 1, lambda line: None)


def test_a_penalty_that_noise_makes_negative_has_no_exponent():
    def measure(shape):
        point = made_up(shape)
        return dataclasses.replace(point, seconds=point.seconds | {OURS: [0.5 * point.medians[OURS_WITHOUT]]})

    growth = sweep_with(measure, BASE, 1, lambda line: None)
    assert growth.exponents()["k"]["seconds_penalty"] is None
    assert growth_tables(growth)[1].splitlines()[-1].split("|")[4].strip() == "-"


def test_the_figure_shows_every_point(tmp_path):
    growth = sweep_with(made_up, BASE, 2, lambda line: None)
    time, memory = draw_growth(growth).axes
    drawn = [line.get_ydata() for line in time.lines]
    assert [list(map(float, line)) for line in drawn[:2]] == [
        [point.medians[name] for point in growth.points["tokens"]] for name in (OURS, OURS_WITHOUT)
    ]
    assert len(time.lines) == len(memory.lines) == 9  # four sizes, with and without, and what is linear
    assert math.isclose(drawn[-1][-1], 4 * drawn[0][0])
    write_figure(growth, tmp_path / "new" / "growth.png")
    assert (tmp_path / "new" / "growth.png").read_bytes().startswith(b"\x89PNG")
