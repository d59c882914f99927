"""How well a ranking of edges finds the true ones: precision, recall and the area under their curve.

    precision(c) = true edges of weight >= c / edges of weight >= c;   recall(c) = the same / all true edges
    average precision = sum over cuts of (recall's increase) * precision

Only the order of the weights matters, so nothing changes when all are scaled. Edges of equal weight are kept or dropped
together. Edges of weight 0 are not found: they are kept at no cut.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from jsae_lightning.metrics import ratio


@dataclass(frozen=True)
class PrecisionRecall:
    """One entry for each cut, from the strongest edges alone to all that were found."""

    kept: Int64[Tensor, " cuts"]
    hits: Int64[Tensor, " cuts"]
    """True edges among the kept ones."""
    num_true: int

    @property
    def precision(self) -> Float[Tensor, " cuts"]:
        """Share of the kept edges that are true, float64."""
        return self.hits.double() / self.kept

    @property
    def recall(self) -> Float[Tensor, " cuts"]:
        """Share of the true edges that are kept, float64; NaN if there are none."""
        return self.hits.double() / self.num_true

    @property
    def average_precision(self) -> float:
        """1 if every true edge is found before any other; 0 if none is found; NaN if there are none to find."""
        new_hits = self.hits.diff(prepend=self.hits.new_zeros(1)).double()
        return ratio(float((new_hits * self.precision).sum()), float(self.num_true))

    @property
    def f1(self) -> Float[Tensor, " cuts"]:
        """2 hits / (kept + all true edges), the harmonic mean of precision and recall."""
        return 2 * self.hits.double() / (self.kept + self.num_true)

    def best(self) -> tuple[float, float, float]:
        """Return precision, recall and F1 at the cut with the largest F1, the first of several; 0, 0, 0 without cuts.

        NaN if there is no true edge.
        """
        if not self.num_true:
            return (float("nan"),) * 3
        if not len(self.kept):
            return (0.0,) * 3
        at = int(self.f1.argmax())
        return float(self.precision[at]), float(self.recall[at]), float(self.f1[at])

    def precision_at(self, num: int) -> float:
        """Return the precision of the `num` strongest edges, ties at the cut counted by their share of true ones.

        If fewer are found: of those. 0 if none is; NaN if `num` is 0.
        """
        if not num:
            return float("nan")
        if not len(self.kept):
            return 0.0
        at = min(int(torch.searchsorted(self.kept, num)), len(self.kept) - 1)
        kept, hits = (int(counts[at - 1]) if at else 0 for counts in (self.kept, self.hits))
        size, hits_of_ties = int(self.kept[at]) - kept, int(self.hits[at]) - hits
        taken = min(num, int(self.kept[at])) - kept
        return (hits + hits_of_ties * taken / size) / (kept + taken)


def precision_recall(
    weights: Float[Tensor, "*edges"], is_true: Bool[Tensor, "*edges"], num_true: int
) -> PrecisionRecall:
    """Rank edges by weight (>= 0) and count the true ones; `num_true` includes those that are not among them."""
    found = weights > 0
    weights, order = weights[found].sort(descending=True)
    hits = is_true[found][order].cumsum(0)
    is_last_of_ties = torch.ones_like(weights, dtype=torch.bool)
    is_last_of_ties[:-1] = weights[:-1] != weights[1:]
    kept = torch.arange(1, len(weights) + 1, device=weights.device)
    return PrecisionRecall(kept[is_last_of_ties].cpu(), hits[is_last_of_ties].cpu(), num_true)
