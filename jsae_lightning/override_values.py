"""The overrides of a job as keys and typed values. Imports neither torch nor lightning."""

import math
import re
from collections.abc import Iterable
from functools import cache

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

Cell = int | float | bool | str | None

REMOVED = "(removed)"
"""The value of a key that an override removes: `~callbacks.x`."""

_NOT_A_SETTING = re.compile(r"(hydra|paths|sweep)([./@].*)?|ckpt_path")


def override_values(overrides: Iterable[str]) -> dict[str, Cell]:
    """Return key and value of each override, without those that say where and how a job runs, not what it does.

    The last of several about one key wins, as in Hydra. A line without a key is left out.
    """
    pairs = (_parsed(override) for override in overrides)
    return {key: value for key, value in pairs if key and not _NOT_A_SETTING.fullmatch(key)}


def printable(text: str) -> str:
    """Return `text` with everything that could not be shown in one line, or not be encoded, as an escape."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


@cache
def _parsed(override: str) -> tuple[str, Cell]:
    """Return key (with `@package`, without `+` or `~`) and value of an override, by Hydra's grammar if it fits."""
    key, _, text = override.partition("=")
    key, text = printable(key.strip().lstrip("+~")), printable(text)
    if override.lstrip().startswith("~"):
        return key, REMOVED
    if "=" not in override:
        return "", None
    try:
        parsed = _parser().parse_override(override)
        value = None if parsed.is_sweep_override() else parsed.value()
    except (HydraException, ValueError, RecursionError):
        return key, text
    if isinstance(value, str):
        return key, printable(value)
    if isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return key, value
    return key, text  # null, lists, dictionaries: as they were written, so that null differs from a key not given
