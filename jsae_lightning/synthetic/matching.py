"""Which learned latent stands for which true feature, by the cosine of their directions."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from jsae_lightning.synthetic.assignment import best_assignment

MATCH_COSINE = 0.8
"""Below this cosine a latent stands for no feature. Above 1/sqrt(2), so that with orthonormal features no latent stands
for two: a latent half-way between two features (the rotation that co-occurring features invite) is a match of neither.
"""


@dataclass(frozen=True)
class Matching:
    """A dictionary compared with the true directions; -1 stands for no match."""

    latent_of: Int64[Tensor, " n"]
    """The latent that stands for each true feature, all different."""
    feature_of: Int64[Tensor, " d_sae"]
    """The inverse: the feature that each latent stands for, one to one."""
    nearest_feature: Int64[Tensor, " d_sae"]
    """Many to one: the most similar feature of each latent, whatever others stand for it."""
    best_cosine: Float[Tensor, " n"]
    """The largest cosine of any latent with each feature, float64."""

    @property
    def share(self) -> float:
        """Share of the true features that a latent stands for."""
        return float((self.latent_of >= 0).double().mean())

    @property
    def latents_per_feature(self) -> float:
        """Latents whose nearest feature is a given one, mean over features that have any: above 1 where one is split.

        NaN if no latent is near any feature.
        """
        near = self.nearest_feature[self.nearest_feature >= 0]
        return len(near) / len(near.unique()) if len(near) else float("nan")


def match(
    directions: Float[Tensor, "n d_model"], W_dec: Float[Tensor, "d_sae d_model"], threshold: float = MATCH_COSINE
) -> Matching:
    """Match latents to features: the one-to-one assignment with the largest sum of the cosines that reach `threshold`.

    Signed cosines: a latent that points away from a feature does not stand for it. With fewer latents than features
    some features go without.
    """
    directions, W_dec = directions.cpu().double(), W_dec.detach().cpu().double()
    cosine = torch.nn.functional.normalize(directions, dim=1) @ torch.nn.functional.normalize(W_dec, dim=1).T
    counted = torch.where(cosine >= threshold, cosine, 0.0)
    n, d_sae = cosine.shape
    padded = torch.cat([counted, counted.new_zeros(n, max(0, n - d_sae))], dim=1)
    assigned = best_assignment(padded)
    is_match = padded[torch.arange(n), assigned] > 0
    latent_of = torch.where(is_match, assigned, -1)
    feature_of = torch.full((d_sae,), -1)
    feature_of[assigned[is_match]] = torch.arange(n)[is_match]
    nearest = torch.where(cosine.amax(dim=0) >= threshold, cosine.argmax(dim=0), -1)
    return Matching(latent_of, feature_of, nearest, cosine.amax(dim=1))
