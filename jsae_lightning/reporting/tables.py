"""The report's tables, as HTML: every heading sorts, every number carries its standard error."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from jsae_lightning.reporting.readers import TRADITIONAL, Judged, Number

HEADLINE = (
    ("val/explained_variance_input", "EV, input SAE"),
    ("val/explained_variance_output", "EV, output SAE"),
    ("val/ce_score_both", "CE score, both"),
    ("val/kl_both", "KL, both (nats)"),
    ("jacobian/mean_abs", "mean |J|"),
    ("jacobian/share_above_0.01", "share of |J| above .01"),
    ("jacobian/effective_edges", "effective edges"),
    ("jacobian/hoyer", "Hoyer"),
    ("jacobian/gini", "Gini"),
)
GROUPS = (
    ("val/", "Reconstruction and the spliced language model"),
    ("jacobian/", "The Jacobian, at the setting of training"),
    ("fidelity/", "Is the sparse graph the computation?"),
    ("jacobian_at_", "The Jacobian, at the other setting"),
)


def kind_text(run: Judged) -> str:
    """Return what a run is, in words: JSAE or traditional, and on what weights."""
    text = "traditional" if run.kind == TRADITIONAL else "JSAE"
    if run.random_weights:
        text += ", random model" + (" (all weights)" if run.random_weights == "full" else "")
    return text


def model_text(run: Judged) -> str:
    """Return the language model and the layer."""
    model = run.pair.get("model") or {}
    return f"{model.get('name', 'unknown')}, layer {model.get('layer', '?')}"


def number_text(value: Number | float | int | None) -> str:
    """Return a number with its standard error as HTML: four digits, and two of the error."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    mean, error = (value.mean, value.standard_error) if isinstance(value, Number) else (value, None)
    text = f"{mean:.4g}"
    return text if error is None else f'{text} <span class="se">± {error:.2g}</span>'


def header_list(run: Judged) -> str:
    """Return what was trained and what it was judged on, as a list of terms."""
    pair, evaluation = run.pair, run.evaluation
    jacobian = pair.get("jacobian") or {}
    sizes = [pair.get(f"{side}_sae") or {} for side in ("input", "output")]
    rows = [
        ("Language model", model_text(run)),
        ("Kind", kind_text(run)),
        ("Latents (input, output)", ", ".join(f"{size.get('d_sae', 0):,}" for size in sizes)),
        ("k (input, output)", ", ".join(str(size.get("k", "?")) for size in sizes)),
        ("Width of the model", f"{sizes[0].get('d_model', '?')}"),
        ("Penalty", f"{jacobian.get('penalty', '?')}, weight {jacobian.get('coef', '?')}"),
        ("Jacobian at the", str(jacobian.get("at", "?"))),
        ("Trained on", f"{_count(pair.get('tokens_seen'))} tokens"),
        (
            "Judged on",
            f"{_count(evaluation.get('tokens'))} held-out tokens of {_count(evaluation.get('documents'))} documents; "
            f"Jacobians of {_count(evaluation.get('jacobian_tokens'))}",
        ),
        ("Folder", str(run.folder)),
    ]
    items = "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(text)}</dd></div>" for term, text in rows)
    return f'<dl class="facts">{items}</dl>'


def runs_table(runs: Sequence[Judged], varying: Sequence[str]) -> str:
    """Return the table of the runs of a sweep: what varies between them, and the headline figures."""
    figures = [(key, label) for key, label in HEADLINE if any(key in run.figures for run in runs)]
    # A weight that the overrides set stands there already.
    columns = ["Run", "Kind", *([] if "jacobian.coef" in varying else ["Weight"]), *varying]
    rows = []
    for run in runs:
        cells: list[Any] = [run.name, kind_text(run)]
        cells += [] if "jacobian.coef" in varying else [run.coef]
        cells += [run.overrides.get(key) for key in varying]
        rows.append([*cells, *(run.figures.get(key) for key, _ in figures)])
    return table([*columns, *(label for _, label in figures)], rows, "The runs. A heading sorts by its column.")


def headline_table(run: Judged) -> str:
    """Return the headline figures of one run."""
    rows = [[label, run.figures[key], key] for key, label in HEADLINE if key in run.figures]
    return table(["Measure", "Value", "Key"], rows, "In short. A heading sorts by its column.")


def all_figures_tables(runs: Sequence[Judged]) -> str:
    """Return every figure of every run, a folded table for each family."""
    keys = list(dict.fromkeys(key for run in runs for key in run.figures))
    parts = []
    known = tuple(prefix for prefix, _ in GROUPS)
    for prefix, title in (*GROUPS, ("", "Others")):
        chosen = [key for key in keys if (key.startswith(prefix) if prefix else not key.startswith(known))]
        if chosen:
            rows = [[key, *(run.figures.get(key) for run in runs)] for key in sorted(chosen)]
            body = table(["Key", *(run.name for run in runs)], rows, title)
            parts.append(f"<details><summary>{escape(title)}: {len(chosen)} figures</summary>{body}</details>")
    return "".join(parts)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str) -> str:
    """Return a table whose headings are buttons; a cell's value to sort by is in `data-value`."""
    head = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="sortable"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, Number) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        key = value.mean if isinstance(value, Number) else value
        return f'<td class="number" data-value="{key!r}">{number_text(value)}</td>'
    if value is None:
        return '<td class="number" data-value=""></td>'
    return f'<td data-value="{escape(str(value))}">{escape(str(value))}</td>'


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "an unknown number of"
