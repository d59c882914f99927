"""The page: one file, nothing loaded from anywhere, every text escaped."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from jsae_lightning.reporting.sections import Item

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Drawn:
    """A figure that is drawn: `svg` as `style.inline_svg` returns it; None if its data are missing."""

    item: Item
    svg: str | None


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, HTML before its figures, and the figures."""

    key: str
    title: str
    body: str
    figures: Sequence[Drawn] = ()
    folded: bool = False


def page(title: str, subtitle: str, sections: Sequence[Section], explorer: Sequence[dict[str, Any]]) -> str:
    """Return the whole page.

    `explorer` has one entry for each run with a graph: {"name": ..., ...`graph_reader.explorer_data`}; if there is
    none, the page has no explorer.
    """
    shown = [*sections]
    links = [(section.key, section.title) for section in shown]
    explorer_html = _EXPLORER if explorer else ""
    if explorer:
        links.append(("explorer", "Edge explorer"))
    navigation = "".join(f'<a href="#{key}">{escape(text)}</a>' for key, text in links)
    return _PAGE.format(
        policy=_POLICY,
        title=escape(title),
        subtitle=escape(subtitle),
        css=_asset("report.css"),
        navigation=navigation,
        sections="".join(map(_section, shown)),
        explorer=explorer_html,
        data=script_json(explorer),
        js=_asset("report.js"),
    )


def script_json(value: Any) -> str:
    """Return JSON that can stand in a `<script type="application/json">`: "<" escaped, no NaN, no lone surrogates."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character, code in (("<", "003c"), (">", "003e"), ("&", "0026"), ("\u2028", "2028"), ("\u2029", "2029")):
        text = text.replace(character, f"\\u{code}")
    return text.encode("utf-8", "replace").decode("utf-8")


def sentences(items: Sequence[str], empty: str = "") -> str:
    """Return texts as a list; `empty` if there are none."""
    if not items:
        return f"<p>{escape(empty)}</p>" if empty else ""
    return "<ul>" + "".join(f"<li>{_with_code(text)}</li>" for text in items) + "</ul>"


def _section(section: Section) -> str:
    drawn = [_figure(figure) for figure in section.figures if figure.svg is not None]
    missing = [f"{figure.item.title}: {figure.item.text}" for figure in section.figures if figure.svg is None]
    figures = f'<div class="figures">{"".join(drawn)}</div>' if drawn else ""
    note = f'<div class="missing"><h3>Not shown</h3>{sentences(missing)}</div>' if missing else ""
    content = f"{section.body}{figures}{note}"
    if section.folded:
        content = f"<details><summary>Show</summary>{content}</details>"
    return f'<section id="{section.key}"><h2>{escape(section.title)}</h2>{content}</section>'


def _figure(figure: Drawn) -> str:
    item = figure.item
    return (
        f'<figure id="figure-{escape(item.key)}"><h3>{escape(item.title)}</h3>'
        f"{figure.svg}<figcaption>{_with_code(item.text)}</figcaption></figure>"
    )


def _with_code(text: str) -> str:
    """Escape a text; what stands between backticks is code."""
    parts = escape(text).split("`")
    if len(parts) % 2 == 0:
        return "`".join(parts)
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))


def _asset(name: str) -> str:
    return (files("jsae_lightning.reporting") / "assets" / name).read_text(encoding="utf-8")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<header><h1>{title}</h1><p>{subtitle}</p><nav aria-label="Parts of the report">{navigation}</nav></header>
<main>{sections}{explorer}</main>
<script type="application/json" id="explorer-data">{data}</script>
<script>{js}</script>
</body>
</html>
"""

_EXPLORER = """<section id="explorer"><h2>Edge explorer</h2>
<p>The global graph: which input latents an output latent depends on, and how strongly. Choose a latent; its
neighbours can be followed, and the address of each can be kept as a link.</p>
<form id="explorer-form">
<label id="run-label">Run <select id="run-choice"></select></label>
<label>Side <select id="side-choice"><option value="output">output latents</option>
<option value="input">input latents</option></select></label>
<label>Number <input id="latent-number" inputmode="numeric" autocomplete="off" size="8"></label>
<button type="submit">Show</button>
<label>Order <select id="order-choice"><option value="strength">by strength</option>
<option value="count">by count</option><option value="number">by number</option></select></label>
</form>
<p id="explorer-message" role="status"></p>
<div class="explorer"><div id="latent-list" class="list" tabindex="0" role="region" aria-label="Latents"></div>
<div id="latent-view" tabindex="-1"></div></div>
<p id="explorer-left-out" class="note"></p></section>"""
