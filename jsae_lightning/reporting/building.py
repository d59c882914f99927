"""Build the report of evaluated pairs: read, draw, assemble, write."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsae_lightning.atomic_files import atomic_file
from jsae_lightning.reporting import sections, style, tables
from jsae_lightning.reporting.graph_reader import explorer_data, read_graph
from jsae_lightning.reporting.html import Drawn, Section, page, sentences
from jsae_lightning.reporting.readers import (
    Comparison,
    Found,
    Judged,
    read_comparison,
    read_evaluation,
    unique_names,
)
from jsae_lightning.reporting.sections import Item

MAX_PAGE_BYTES = 15_000_000
"""The page stays below; what the explorer shows is cut to what the figures leave."""
MAX_EXPLORER_BYTES = 6_000_000
MAX_DETAILED = 6
"""Runs whose own figures are in the page of a sweep."""


def read_runs(found: Found) -> list[Judged]:
    """Read all evaluations; a run's name tells what varies, as in `3: coef=0.5, k=16`, else, of several, its kind."""
    runs = [read_evaluation(folder, overrides) for folder, overrides in found.evaluated]
    keys = varying(runs)
    names = []
    for run in runs:
        own = ", ".join(f"{key.rsplit('.', 1)[-1]}={run.overrides[key]}" for key in keys if key in run.overrides)
        own = own or (tables.kind_text(run) if len(runs) > 1 else "")
        names.append(f"{run.own_name}: {own}" if own else run.own_name)
    return [replace(run, name=name) for run, name in zip(runs, unique_names(names), strict=True)]


def varying(runs: Sequence[Judged]) -> list[str]:
    """Return the overrides whose value is not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    return [key for key in keys if len({repr(run.overrides.get(key)) for run in runs}) > 1]


def build_report(folder: Path, found: Found, out: Path, notes: Sequence[str] = ()) -> tuple[Path, list[str]]:
    """Write `report.html` and `figures/*.png`, `*.svg` to `out`, each file whole or not at all.

    Args:
        folder: what is reported on, for the page's title.
        found: its evaluations, at least one.
        out: where to write.
        notes: sentences to stand in the page, such as runs without an evaluation.

    Returns:
        The page's path and the titles of the figures whose data are missing.
    """
    runs = read_runs(found)
    comparison = read_comparison(found.comparison)
    painter = _Painter(out / "figures")
    parts = [_summary(runs, found, comparison, notes)]
    parts.append(Section("jacobian", "The Jacobian", "", painter.draw(sections.jacobian_items(runs))))
    if len(runs) > 1 or comparison is not None:
        items = sections.comparison_items(runs, comparison)
        parts.append(Section("comparison", "Between runs", "", painter.draw(items)))
    parts.append(Section("functions", "The functions between latents", "", painter.draw(sections.fidelity_items(runs))))
    graphs = []
    for number, run in enumerate(runs[:MAX_DETAILED]):
        graph = read_graph(run.folder)
        alone = len(runs) == 1
        key = "" if alone else f"run-{number}-"
        figures = painter.draw(sections.run_items(run, graph, key))
        title = "This run" if alone else f"Run {run.name}"
        body = "" if alone else tables.header_list(run)
        parts.append(Section(f"{key}details", title, body, figures, folded=not alone))
        if graph is not None and len(graph.mean_abs):
            graphs.append((run, graph))
    parts.append(Section("figures-all", "All figures", tables.all_figures_tables(runs) + _provenance(runs)))
    used = painter.bytes_used + sum(len(part.body.encode("utf-8", "replace")) for part in parts)
    budget = max(0, min(MAX_EXPLORER_BYTES, MAX_PAGE_BYTES - used - 500_000)) // max(1, len(graphs))
    explorer = [{"name": run.name} | explorer_data(graph, run.folder, max_bytes=budget) for run, graph in graphs]
    title = f"{tables.model_text(runs[0])}: {folder.resolve().name}"
    subtitle = f"Jacobian sparse autoencoders: {len(runs)} {'pair' if len(runs) == 1 else 'pairs'} judged"
    path = out / "report.html"
    with atomic_file(path) as temporary:
        temporary.write_text(page(title, subtitle, parts, explorer), encoding="utf-8", errors="replace")
    return path, painter.missing


class _Painter:
    """Draws figures one at a time and writes their files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_used = 0
        self.missing: list[str] = []

    def draw(self, items: Sequence[Item]) -> list[Drawn]:
        return [self._draw(item) for item in items]

    def _draw(self, item: Item) -> Drawn:
        if item.draw is None:
            self.missing.append(item.title)
            return Drawn(item, None)
        figure = item.draw()
        png, svg = style.to_png(figure), style.to_svg(figure)
        with atomic_file(self.folder / f"{item.key}.png") as temporary:
            temporary.write_bytes(png)
        with atomic_file(self.folder / f"{item.key}.svg") as temporary:
            temporary.write_text(svg, encoding="utf-8")
        inline = style.inline_svg(svg, title=item.alt, key=item.key)
        self.bytes_used += len(inline.encode("utf-8"))
        return Drawn(item, inline)


def _summary(runs: Sequence[Judged], found: Found, comparison: Comparison | None, notes: Sequence[str]) -> Section:
    alone = len(runs) == 1
    body = tables.header_list(runs[0]) if alone else ""
    if comparison is not None and comparison.findings:
        verdicts, findings = map(sentences, (comparison.verdicts, comparison.findings))
        body += f'<h3>Findings</h3><div class="findings">{verdicts}'
        body += f"<details><summary>The numbers behind it: {len(comparison.findings)} findings</summary>{findings}"
        body += "</details></div>"
    body += tables.headline_table(runs[0]) if alone else tables.runs_table(runs, varying(runs))
    body += '<p class="note">± is one standard error over documents. EV: explained variance. CE score: 1 if the '
    body += "language model's loss is unchanged, 0 if it is that of the MLP set to zero.</p>"
    texts = list(notes)
    if len(runs) > sections.MAX_SERIES:
        texts.append(f"Figures of several runs show {sections.MAX_SERIES} of {len(runs)}, evenly spread; tables all.")
    if len(runs) > MAX_DETAILED:
        texts.append(f"Figures of single runs are shown for the first {MAX_DETAILED}: report on another run's folder "
                     "to see its own.")  # fmt: skip
    return Section("summary", "Summary", body + sentences(texts))


def _provenance(runs: Sequence[Judged]) -> str:
    rows: list[list[Any]] = []
    for run in runs:
        versions = run.pair.get("versions") or {}
        rows.append(
            [
                run.name,
                run.evaluation.get("seed"),
                run.evaluation.get("ranks"),
                ", ".join(map(str, run.evaluation.get("parts") or [])),
                round(sum(value for value in (run.evaluation.get("seconds") or {}).values()), 1),
                versions.get("jsae_lightning"),
                versions.get("torch"),
            ]
        )
    columns = ["Run", "Seed", "Ranks", "Parts", "Seconds", "jsae_lightning", "torch"]
    table = tables.table(columns, rows, "How the pairs were judged, and the versions they were trained with.")
    return f"<details><summary>Provenance</summary>{table}</details>"
