"""The Jacobian of each token of a sentence."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jsae_lightning.jacobian_metrics import rms_normalized
from jsae_lightning.jacobians import Jacobian
from jsae_lightning.reporting.style import COLOR_MAP, log_axis, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def sentence_heat_maps(result: Jacobian, tokens: Sequence[str], *, normalized: bool = False) -> "Figure":
    """Maps of |J|, one for each token and named by it, on one log colour scale.

    Rows are the token's active output latents, columns its active input latents, both in the order of the latents'
    largest |J|, so that what is strong stands in the upper left. Entries of 0 are grey.

    Args:
        result: the Jacobian of the sentence's tokens.
        tokens: the text of each of them.
        normalized: divide each map by its root mean square first, which takes its scale away.
    """
    from matplotlib.colors import LogNorm

    values = rms_normalized(result.values) if normalized else result.values
    maps = values.detach().abs().cpu().double().numpy()
    positive = maps[maps > 0]
    high = float(positive.max()) if len(positive) else 1.0
    low = max(float(np.quantile(positive, 0.05)) if len(positive) else 0.0, high / 1e4)
    norm = LogNorm(low if low < high else high / 10, high)
    rows = math.ceil(len(maps) / 4)
    figure, axes_list = new_figure(rows, 4, height=0.9 + 1.35 * rows)
    image = None
    for number, axes in enumerate(axes_list):
        axes.set_visible(number < len(maps))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
        if number < len(maps):
            one = maps[number]
            one = one[np.argsort(-one.max(axis=1), kind="stable")][:, np.argsort(-one.max(axis=0), kind="stable")]
            axes.set_facecolor("#b9b9b9")
            shown = np.where(one > 0, one, np.nan)
            image = axes.imshow(shown, norm=norm, cmap=COLOR_MAP, interpolation="nearest", aspect="auto")
            axes.set_title(repr(tokens[number]))
    axes_list[0].set_ylabel("outputs")
    axes_list[0].set_xlabel("inputs")
    if image is not None:
        bar = figure.colorbar(image, ax=axes_list, location="bottom", shrink=0.9, extend="both", aspect=30)
        bar.set_label("|J| / rms of the token" if normalized else "|J|")
        log_axis(bar.ax.xaxis)
    return figure
