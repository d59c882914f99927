"""What somebody may have meant who gave a key, or a group's choice, that does not exist.

Imports neither torch nor lightning, so that mistakes in the configuration answer at once.
"""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from jsae_lightning.errors import UserError

BASE = "base"
"""What a group's choices have in common; no choice itself."""

MOST = 3
"""As many suggestions at most."""

_ENOUGH = 0.7
"""From 0 (nothing in common) to 1 (the same): less is no suggestion."""

_FURTHER = 0.15
"""What is less like by more than this than the best one is no suggestion either."""

_BEGINNING = 0.8
"""The least likeness of a name and its beginning: `gpt2` may mean `gpt2-small`."""

_ELSEWHERE = 0.95
"""What a likeness of the last parts counts, against one of the whole keys: `lr` may mean `optim.lr`."""


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Return the line that refuses a key."""
    return f"{key}: there is no such key: {did_you_mean(key, known)}--cfg job lists all keys"


def unknown_choice(group: str, choice: str, known: Iterable[str]) -> str:
    """Return the line that refuses a group's choice."""
    names = sorted(known)
    return f"{group}: there is no '{choice}': {did_you_mean(choice, names)}the choices are {', '.join(names)}"


def closest(name: str, known: Iterable[str]) -> list[str]:
    """Return what is most like `name`, as a whole or in its last part, the best first."""
    likeness = {candidate: _likeness(name, candidate) for candidate in known}
    least = max([_ENOUGH, *(value - _FURTHER for value in likeness.values())])
    likely = [candidate for candidate, value in likeness.items() if value >= least]
    return sorted(likely, key=lambda candidate: (-likeness[candidate], candidate))[:MOST]


def keys_of(node: DictConfig, prefix: str = "") -> list[str]:
    """Return all keys below a configuration's node, with dots: `sae` and `sae.k`. Resolves nothing."""
    keys = [prefix + str(name) for name in node if not str(name).startswith("_")]
    for name, section in _sections(node):
        keys += keys_of(section, f"{prefix}{name}.")
    return keys


def check_keys(node: DictConfig, prefix: str = "") -> None:
    """Raise UserError for a key that was added (`+sae.kk=3`) where a schema says which there are, and nothing reads it.

    Where there is no schema any key is welcome: the arguments of what is built.
    """
    schema = OmegaConf.get_type(node)
    if is_dataclass(schema):
        known = [field.name for field in fields(schema)]
        for name in map(str, node):
            if name not in known:
                raise UserError(unknown_key(prefix + name, [prefix + field for field in known]))
    for name, section in _sections(node):
        check_keys(section, f"{prefix}{name}.")


def _sections(node: DictConfig) -> list[tuple[str, DictConfig]]:
    children = [(str(name), node._get_node(name)) for name in node]
    return [
        (name, child)
        for name, child in children
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing()
    ]


def choices_of(group: Path) -> list[str]:
    """Return the choices of a group's folder, sorted, those in folders of its own among them: `paper/pythia-70m`."""
    found = (path.relative_to(group).with_suffix("").as_posix() for path in group.rglob("*.yaml"))
    return sorted(choice for choice in found if choice != BASE)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question with what is most like `name`, and a space after it; "" where nothing is."""
    suggestions = closest(name, known)
    return f"did you mean {' or '.join(suggestions)}? " if suggestions else ""


def _likeness(name: str, candidate: str) -> float:
    last = [text.replace("/", ".").rpartition(".")[2] for text in (name, candidate)]
    return max(_ratio(name, candidate), _ELSEWHERE * _ratio(*last))


def _ratio(name: str, candidate: str) -> float:
    ratio = SequenceMatcher(None, name, candidate).ratio()
    return max(ratio, _BEGINNING) if name and candidate.startswith(name) else ratio
