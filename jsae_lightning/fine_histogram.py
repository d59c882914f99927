"""A histogram of |J| so fine that the share of entries above any threshold, at any scale, can be read off afterwards.

Bins are the leading bits of the float32 number: every factor of two from 2^-24 to 2^8 is cut into 1024 steps, so that a
bin is at most 0.1 % wide. A share is linear within its bin; it is wrong by no more than the share of the entries in
that bin, which is returned beside it.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

_LOW, _HIGH = -24, 8
_STEPS = 1024
_SHIFT = 23 - 10  # float32 has 23 bits of mantissa, of which 10 are kept
NUM_BINS = (_HIGH - _LOW) * _STEPS


def fine_histogram(values: Float[Tensor, "..."]) -> Int[Tensor, " bins"]:
    """Count |J| above 0 in NUM_BINS bins, int64; smaller and larger ones are in the first and the last. NaN is last."""
    magnitudes = values.detach().abs().float().flatten()
    index = (magnitudes.view(torch.int32) >> _SHIFT) - (_LOW + 127) * _STEPS
    return torch.bincount(index[magnitudes != 0].clamp(0, NUM_BINS - 1), minlength=NUM_BINS)


def counts_above(histogram: Float[Tensor, " bins"] | Int[Tensor, " bins"], threshold: float) -> tuple[float, float]:
    """Return how many entries have |J| > threshold, and by how many that may be wrong: those in the threshold's bin.

    Exact (0 wrong) where the threshold is the lower end of a bin, but for entries that equal it.
    """
    counts = histogram.double()
    position = _position(threshold)
    bin_index = int(position)
    if bin_index >= NUM_BINS:
        return 0.0, 0.0
    inside = float(counts[bin_index])
    fraction = position - bin_index
    above = float(counts[bin_index + 1 :].sum()) + (1 - fraction) * inside
    return above, inside if fraction else 0.0


def _position(threshold: float) -> float:
    """The threshold's bin and how far into it it lies, linear in |J|."""
    if threshold <= 2.0**_LOW:
        return 0.0
    if threshold >= 2.0**_HIGH:
        return float(NUM_BINS)
    mantissa, exponent = _split(threshold)
    return (exponent - _LOW) * _STEPS + (mantissa - 1) * _STEPS


def _split(number: float) -> tuple[float, int]:
    """Return (m, e) with number = m 2^e and 1 <= m < 2."""
    mantissa, exponent = math.frexp(number)
    return 2 * mantissa, exponent - 1
