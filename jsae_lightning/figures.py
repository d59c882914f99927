"""Figures, drawn by matplotlib's Agg without pyplot, so that no global state and no window system is involved."""

from io import BytesIO

import torch
from jaxtyping import Float
from torch import Tensor

_LINE_CHARACTERS = 64


def jacobian_heat_map(
    values: Float[Tensor, "k_out k_in"], *, title: str, label: str, limits: tuple[float, float]
) -> bytes:
    """Draw the magnitudes of one token's Jacobian on a log colour scale; return a PNG file.

    Args:
        values: J or a multiple of it, in the units of `limits`. Exact zeros (inactive entries) are drawn in light grey,
            values beyond a limit in that limit's colour.
        title: one line; anything may stand in it.
        label: what the colours stand for.
        limits: the ends of the colour scale, 0 < low < high; the same for all maps that are to be compared.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    magnitudes = values.detach().abs().float().cpu()
    k_out, k_in = magnitudes.shape
    figure = Figure(figsize=(5.4, 4.8), dpi=100)
    # Places given by hand: a layout engine would double the time that a map takes, and there are many in a run.
    axes, bar = figure.add_axes((0.06, 0.07, 0.73, 0.86)), figure.add_axes((0.81, 0.07, 0.03, 0.86))
    image = axes.imshow(
        torch.where(magnitudes > 0, magnitudes, torch.nan).numpy(),
        norm=LogNorm(*limits),
        cmap="magma",
        interpolation="nearest",
        aspect="auto",
    )
    axes.set_facecolor("lightgrey")
    axes.set_xlabel(f"active input latents ({k_in}, shuffled)")
    axes.set_ylabel(f"active output latents ({k_out}, shuffled)")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(printable(title), fontsize=9, parse_math=False)
    colors = figure.colorbar(image, cax=bar, extend="both", label=label, format="%g")
    colors.minorticks_off()
    file = BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def token_title(before: str, token: str) -> str:
    """Return the end of a token's context and the token itself in brackets, on one line."""
    token = _escape(token)
    before = _escape(before)
    room = max(0, _LINE_CHARACTERS - len(token) - 2)
    return f"{'...' if len(before) > room else ''}{before[max(0, len(before) - room) :]}[{token}]"


def printable(text: str) -> str:
    r"""Return `text` on one line with the characters that the default font may lack written as \x.., \u...."""
    return _escape(text).encode("latin-1", "backslashreplace").decode("latin-1")


def _escape(text: str) -> str:
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
