"""Learning rate and penalty weight as functions of the optimizer step."""

import pytest

from jsae_lightning.schedules import coef_factor, lr_factor, penalizes


def test_lr_by_hand():
    """100 steps, 10 % warm-up, 20 % decay."""
    factors = [lr_factor(step, 100, 0.1, 0.2) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[50] == factors[80] == 1.0
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)
    assert lr_factor(100, 100, 0.1, 0.2) == 0


def test_lr_without_warmup_or_decay_is_constant():
    assert {lr_factor(step, 7, 0.0, 0.0) for step in range(7)} == {1.0}


def test_lr_rises_then_falls():
    factors = [lr_factor(step, 1000, 0.01, 0.2) for step in range(1000)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[800:] == sorted(factors[800:], reverse=True)


def test_coef_by_hand():
    """100 steps, 5 % warm-up: 0 at the first step, full from the sixth."""
    factors = [coef_factor(step, 100, 0.05) for step in range(7)]
    assert factors == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1])
    assert coef_factor(0, 100, 0.0) == 1


def test_coef_falls_at_the_end_if_asked():
    """100 steps, 10 % warm-up, 20 % decay: full until step 80, 0 after the last."""
    factors = [coef_factor(step, 100, 0.1, 0.2) for step in range(101)]
    assert factors[10] == factors[80] == 1
    assert factors[90] == pytest.approx(0.5)
    assert factors[100] == 0


def test_penalized_steps_by_hand():
    assert [step for step in range(12) if penalizes(step, 0.25)] == [0, 4, 8]
    assert [step for step in range(10) if penalizes(step, 0.4)] == [0, 2, 5, 7]
    assert all(penalizes(step, 1.0) for step in range(10))


@pytest.mark.parametrize("token_fraction", [0.01, 0.1, 0.29, 1 / 3, 0.5, 0.999])
def test_penalized_steps_are_that_share(token_fraction):
    chosen = sum(penalizes(step, token_fraction) for step in range(10_000))
    assert abs(chosen - 10_000 * token_fraction) <= 1
