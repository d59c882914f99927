"""Which column of a dataset holds the text or the token ids."""

from typing import Any

from jsae_lightning.errors import UserError

TEXT_COLUMNS = ("text", "content")
TOKEN_COLUMNS = ("input_ids", "tokens")


def find_column(
    head: list[dict[str, Any]], where: str, *, text_column: str | None, token_column: str | None
) -> tuple[str, bool]:
    """Return (column, whether it holds token ids), from the first rows of a dataset.

    Without a configured column: the first of TEXT_COLUMNS that holds strings (text suits every model), else the first
    of TOKEN_COLUMNS that holds lists of integers.

    Raises:
        UserError: no such column, with those that were found.
    """
    samples = {name: next((row[name] for row in head if row.get(name) is not None), None) for name in head[0]}
    found = ", ".join(samples) or "none"
    for key, name, fits, kind in (
        ("text_column", text_column, _is_text, "text"),
        ("token_column", token_column, _is_token_list, "lists of token ids"),
    ):
        if name is None:
            continue
        if name not in samples:
            raise UserError(f"data.{key}: no column '{name}' in {where}: choose among the columns found: {found}")
        if not fits(samples[name]):
            raise UserError(f"data.{key}: column '{name}' of {where} does not hold {kind}: columns found: {found}")
        return name, key == "token_column"
    for names, fits in ((TEXT_COLUMNS, _is_text), (TOKEN_COLUMNS, _is_token_list)):
        for name in names:
            if name in samples and fits(samples[name]):
                return name, names is TOKEN_COLUMNS
    raise UserError(
        f"data.text_column: {where} has neither a text column ({' or '.join(TEXT_COLUMNS)}) nor a token column "
        f"({' or '.join(TOKEN_COLUMNS)}); columns found: {found}: name one with data.text_column or data.token_column"
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_token_list(value: Any) -> bool:
    return not isinstance(value, str | dict) and hasattr(value, "__len__") and all(isinstance(v, int) for v in value)
