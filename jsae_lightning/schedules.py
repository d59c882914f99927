"""Schedules as pure functions of the number of completed optimizer steps."""

import math


def lr_factor(step: int, total_steps: int, warmup_fraction: float, decay_fraction: float) -> float:
    """Return the share of the peak learning rate that optimizer step number `step` (from 0) uses.

    Linear from 0 over the first `warmup_fraction` of the steps (step 0 uses 1/warmup steps, so that no step is wasted),
    constant, linear to 0 over the last `decay_fraction` (the last step uses 1/decay steps). Farnik et al., appendix.
    """
    warmup, decay = round(total_steps * warmup_fraction), round(total_steps * decay_fraction)
    rising = (step + 1) / warmup if warmup else 1.0
    falling = (total_steps - step) / decay if decay else 1.0
    return max(0.0, min(1.0, rising, falling))


def coef_factor(step: int, total_steps: int, warmup_fraction: float, decay_fraction: float = 0.0) -> float:
    """Return the share of the final penalty weight that optimizer step number `step` (from 0) uses.

    step / (warmup_fraction * total_steps), at most 1: exactly 0 at the first step. Farnik et al., appendix. Over the
    last `decay_fraction` of the steps, which is ours (0 in the paper), linear to 0 as in `lr_factor`.
    """
    warmup, decay = round(total_steps * warmup_fraction), round(total_steps * decay_fraction)
    rising = step / warmup if warmup else 1.0
    falling = (total_steps - step) / decay if decay else 1.0
    return max(0.0, min(1.0, rising, falling))


def penalizes(step: int, token_fraction: float) -> bool:
    """Return whether optimizer step number `step` (from 0) computes the Jacobian penalty.

    ceil((step + 1) f) > ceil(step f), f = `token_fraction`: a systematic sample of the steps, the first one included,
    which holds that share of the tokens; with the weight 1 / f the penalty's gradient, summed over 1 / f steps, is that
    of all tokens in expectation, because batches are shuffled. Not in the paper.
    """
    return math.ceil((step + 1) * token_fraction) > math.ceil(step * token_fraction)
