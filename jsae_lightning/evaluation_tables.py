"""The figures of an evaluation as tables in Markdown."""

from typing import Any

from jsae_lightning.result_files import markdown_table

Figures = dict[str, dict[str, float | None]]

_SAE_ROWS = (
    ("explained variance", "val/explained_variance_", ".4f"),
    ("FVU", "val/fvu_", ".4f"),
    ("MSE", "val/mse_", ".4g"),
    ("cosine", "val/cosine_", ".4f"),
    ("norm ratio", "val/norm_ratio_", ".4f"),
    ("L0", "val/l0_", ".2f"),
    ("dead latents", "val/dead_share_", ".2%"),
    ("CE score", "val/ce_score_", ".4f"),
    ("KL score", "val/kl_score_", ".4f"),
)
_LOSS_ROWS = (
    ("clean", "clean"),
    ("input SAE spliced", "input"),
    ("output SAE spliced", "output"),
    ("both spliced", "both"),
    ("zeros for mlp_in", "zero_input"),
    ("zeros for mlp_out", "zero_output"),
)
_RAW = ("mean_abs", "share_above_", "active_entries", "zero_token_share")


def evaluation_markdown(record: dict[str, Any]) -> str:
    """Return the content of `eval.md` for that of `eval.json`."""
    figures, evaluation = record["figures"], record["evaluation"]
    lines = [f"# {record['name']}", "", *_head(record), ""]
    if "val/mse_input" in figures:
        lines += ["## The two SAEs", "", _sae_table(figures), "", "## The language model's loss", "", _losses(figures)]
        other = f"jacobian_at_{evaluation['other_at']}/"
        settings = (("jacobian/", evaluation["at"]), (other, evaluation["other_at"]))
        lines += ["", "## The Jacobian", "", "Raw measures shrink when all of J does:", ""]
        lines += [_jacobian_table(figures, settings, raw=True), "", "Scale-free measures do not:", ""]
        lines += [_jacobian_table(figures, settings, raw=False), ""]
    rest = [name for name in figures if not name.startswith(("val/", "jacobian"))]
    if rest:
        lines += [
            "## Further figures",
            "",
            markdown_table(["", "mean"], [[n, cell(figures, n)] for n in rest], [False, True]),
        ]
    for name, curve in record["curves"].items():
        rows = [[f"{x:g}", _number(y, ".4g")] for x, y in zip(curve["x"], curve["y"], strict=True)]
        lines += ["", f"## {name}", "", markdown_table(["x", "y"], rows, [True, True])]
    return "\n".join(lines).rstrip("\n") + "\n"


def cell(figures: Figures, name: str, form: str = ".4g") -> str:
    """Return a figure as `mean +- standard error` in a format; "-" where there is none."""
    figure = figures.get(name)
    if figure is None or figure["mean"] is None:
        return "-"
    error = figure["standard_error"]
    return _number(figure["mean"], form) + ("" if error is None else f" +- {_error(error, form)}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _error(value: float, form: str) -> str:
    return format(value, ".2%" if form.endswith("%") else ".2g")


def _head(record: dict[str, Any]) -> list[str]:
    pair, evaluation = record["pair"], record["evaluation"]
    model, weights = pair.get("model", {}), record["random_weights"]
    control = ", random weights" + (" (full)" if weights == "full" else "") if weights else ""
    penalty = pair.get("jacobian", {})
    return [
        f"A {record['kind']} pair on layer {model.get('layer')} of {model.get('name')}{control}; "
        f"penalty {penalty.get('penalty')}, weight {penalty.get('coef')}.",
        "",
        f"Judged on {evaluation['tokens']:,} held-out tokens of {evaluation['sequences']:,} sequences "
        f"({evaluation['jacobian_tokens']:,} for the Jacobian). +- is the standard error over "
        f"{evaluation['documents']:,} documents, by a jackknife over {evaluation['groups']} groups of them.",
    ]


def _sae_table(figures: Figures) -> str:
    rows = [
        [label, *(cell(figures, tag + site, form) if tag + site in figures else "" for site in _SITES)]
        for label, tag, form in _SAE_ROWS
    ]
    return markdown_table(["", "input SAE", "output SAE", "both"], rows, [False, True, True, True])


_SITES = ("input", "output", "both")


def _losses(figures: Figures) -> str:
    rows = [
        [label, cell(figures, f"val/ce_{key}", ".4f"), cell(figures, f"val/kl_{key}", ".4g") if key != "clean" else "0"]
        for label, key in _LOSS_ROWS
    ]
    return markdown_table(["", "cross-entropy, nats", "KL, nats"], rows, [False, True, True])


def _jacobian_table(figures: Figures, settings: tuple[tuple[str, str], ...], *, raw: bool) -> str:
    prefix = settings[0][0]
    names = [name.removeprefix(prefix) for name in figures if name.startswith(prefix)]
    names = [name for name in names if name.startswith(_RAW) == raw]
    rows = [
        [name, *(cell(figures, f"{family}{name}", ".2%" if "share" in name else ".4g") for family, _ in settings)]
        for name in names
    ]
    head = [f"at {setting}" + (" (trained)" if family == "jacobian/" else "") for family, setting in settings]
    return markdown_table(["", *head], rows, [False, True, True])
