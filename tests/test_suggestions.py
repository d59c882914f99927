"""What is suggested for a key or a choice that does not exist, and which keys are refused."""

from dataclasses import dataclass, field

import pytest
from omegaconf import MISSING, OmegaConf

from jsae_lightning.errors import UserError
from jsae_lightning.suggestions import check_keys, choices_of, closest, keys_of, unknown_choice, unknown_key


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("sae.kk", ["sae.k", "optim.lr"], ["sae.k"]),
        ("lr", ["sae.k", "optim.lr"], ["optim.lr"]),
        ("train.tokens", ["data.tokens", "sae.k"], ["data.tokens"]),
        ("gpt2", ["gpt2-small", "pythia-70m"], ["gpt2-small"]),
        ("pythia-70m", ["none", "paper/pythia-70m"], ["paper/pythia-70m"]),
        ("abcd", ["abce", "abcf", "abcg", "abch"], ["abce", "abcf", "abcg"]),
        ("frog", ["sae.k", "optim.lr"], []),
        ("", ["sae.k"], []),
        ("sae.k", [], []),
    ],
)
def test_closest(name, known, expected):
    assert closest(name, known) == expected


def test_what_is_less_like_than_the_best_is_left_out():
    assert closest("sae.lr", ["sae.k", "optim.lr"]) == ["optim.lr"]
    assert closest("sae.lr", ["sae.k"]) == ["sae.k"]


def test_the_lines():
    assert unknown_key("sae.kk", ["sae.k"]) == (
        "sae.kk: there is no such key: did you mean sae.k? --cfg job lists all keys"
    )
    assert unknown_choice("model", "x", ["b", "a"]) == "model: there is no 'x': the choices are a, b"


@dataclass
class _Section:
    k: int = 1
    params: dict[str, float] = field(default_factory=dict)


@dataclass
class _Root:
    sae: _Section = field(default_factory=_Section)
    missing: _Section = MISSING
    none: _Section | None = None
    free: dict = field(default_factory=dict)


def test_keys_of_a_configuration():
    cfg = OmegaConf.structured(_Root(free={"_target_": "x", "depth": {"a": "${nowhere}"}}))
    assert sorted(keys_of(cfg)) == [
        "free", "free.depth", "free.depth.a", "missing", "none", "sae", "sae.k", "sae.params",
    ]  # fmt: skip


def test_added_keys_are_refused_where_a_schema_says_which_there_are():
    cfg = OmegaConf.structured(_Root)
    OmegaConf.update(cfg, "free.anything", 1, force_add=True)
    OmegaConf.update(cfg, "sae.params.power", 2.0, force_add=True)
    check_keys(cfg)
    OmegaConf.update(cfg, "sae.kk", 3, force_add=True)  # as Hydra does for +sae.kk=3
    with pytest.raises(UserError, match=r"^sae\.kk: there is no such key: did you mean sae\.k\? "):
        check_keys(cfg)


def test_choices_in_folders_of_their_own_are_found(tmp_path):
    (tmp_path / "paper").mkdir()
    for name in ("smoke.yaml", "paper/pythia.yaml", "base.yaml", "notes.txt"):
        (tmp_path / name).touch()
    assert choices_of(tmp_path) == ["paper/pythia", "smoke"]
