"""Every experiment composes, validates, builds on its own architecture at toy size, and trains two steps."""

import itertools
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from jsae_lightning.config import check_config, config_dir, register, to_dict
from jsae_lightning.tiny_lm import corpus
from running import write_documents
from tiny_models import make_model_dir

EXPERIMENTS = sorted(
    path.relative_to(config_dir() / "experiment").with_suffix("").as_posix()
    for path in (config_dir() / "experiment").rglob("*.yaml")
)
FAMILIES = {"pythia": "gpt_neox", "gpt2": "gpt2", "gemma": "gemma2", "llama": "llama", "qwen": "qwen2"}
TOY = [
    "model.revision=null",
    "model.dtype=float32",
    "data.context_length=16",
    "data.train_tokens=128",
    "data.batch_tokens=64",
    "data.buffer_batches=2",
    "data.lm_batch_sequences=2",
    "data.val_sequences=2",
    "sae.expansion_factor=2",
    "sae.k=4",
    "eval.jacobian_tokens=16",
    "trainer.accelerator=cpu",
]


def _compose(overrides: list[str]):
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", overrides=overrides)


def _family(experiment: str) -> str:
    return next((family for name, family in FAMILIES.items() if name in experiment), "gpt_neox")


@pytest.fixture(scope="module")
def datasets_dir(tmp_path_factory):
    """Local stand-ins for the hub's datasets: raw text with a validation split, and pre-tokenised rows."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("datasets")
    documents = write_documents(folder / "text.txt").read_text().split("\n\n")
    for split in ("train", "validation"):
        part = documents[:200] if split == "train" else documents[200:]
        Dataset.from_dict({"text": part}).to_parquet(str(folder / "raw" / f"{split}.parquet"))
    rows = torch.randint(3, 200, (300, 40), generator=torch.Generator().manual_seed(0)).tolist()
    Dataset.from_dict({"input_ids": rows}).to_parquet(str(folder / "tokens" / "train.parquet"))
    return folder


@pytest.fixture(scope="module")
def small_stdlib(tmp_path_factory):
    """A few short files of the standard library: to tokenise a million tokens for two steps takes most of the time."""
    folder = tmp_path_factory.mktemp("stdlib")
    for held_out in (False, True):
        documents = (d for d in corpus.stdlib_documents(held_out=held_out) if 1000 < len(d[1]) < 3000)
        for name, text in itertools.islice(documents, 8):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_there_are_all_the_promised_experiments():
    promised = {"smoke", "tiny", "synthetic", "baseline/traditional", "control/random", "paper/gpt2-small"}
    promised |= {f"paper/pythia-{size}" for size in ("70m", "160m", "410m", "1b", "2.8b", "6.9b")}
    promised |= {"gated/gemma-2-2b", "gated/llama-3.2-1b", "gated/qwen2.5-0.5b"}
    assert promised <= set(EXPERIMENTS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_builds_and_trains_at_toy_size(experiment, datasets_dir, small_stdlib, tmp_path, monkeypatch):
    from jsae_lightning.building import build_experiment

    monkeypatch.setattr(corpus, "stdlib_root", lambda: small_stdlib)
    model = make_model_dir(_family(experiment), tmp_path / "model")
    cfg = _compose([f"experiment={experiment}", f"paths.output_dir={tmp_path / 'run'}"])
    check_config(cfg)
    overrides = [f"experiment={experiment}", f"paths.output_dir={tmp_path / 'run'}", *TOY]
    if cfg.data.source == "synthetic":  # which is read by its own model only
        overrides += ["model.synthetic.num_documents=64"]
    else:
        overrides += ["model.name=null", f"model.path={model}", "model.layer=1"]
    if cfg.data.source == "hub":
        stand_in = datasets_dir / ("tokens" if cfg.data.token_column else "raw")
        overrides += [f"data.name={stand_in}", "data.config_name=null", "data.repeat=true"]
    cfg = _compose(overrides)
    check_config(cfg)
    built = build_experiment(cfg)
    before = built.module.pair.input_sae.W_enc.detach().clone()
    built.fit()
    assert built.trainer.global_step == 2
    assert not torch.equal(built.module.pair.input_sae.W_enc, before)
    assert 0 < built.metrics()["val/l0_output"] <= 4


RECIPE = {
    "data.train_tokens": 300_000_000,
    "data.batch_tokens": 4096,
    "data.buffer_batches": 32,
    "data.repeat": False,
    "sae.k": 32,
    "sae.auxk_coef": 0,
    "sae.mse_output_coef": 1.0,
    "sae.subtract_b_dec": False,
    "jacobian.penalty": "l1",
    "jacobian.at": "input",
    "jacobian.warmup_fraction": 0.05,
    "optim.lr": 5e-4,
    "optim.betas": [0.9, 0.999],
    "optim.warmup_fraction": 0.01,
    "optim.decay_fraction": 0.2,
    "optim.grad_clip": 1.0,
    "trainer.max_steps": 73_243,
    "eval.exclude_first_position": True,
    "trainer.precision": "bf16-mixed",
}


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name.startswith("paper/")])
def test_paper_presets_hold_the_recipe(experiment):
    cfg = _compose([f"experiment={experiment}"])
    for key, value in RECIPE.items():
        if (experiment, key) != ("paper/gpt2-small", "data.context_length"):
            assert OmegaConf.select(cfg, key) == value, key


@pytest.mark.parametrize(
    ("experiment", "d_model", "layer", "coef", "expansion"),
    [
        ("paper/pythia-70m", 512, 3, 1.0, 32),
        ("paper/pythia-160m", 768, 7, 2 / 3, 32),
        ("paper/pythia-410m", 1024, 15, 0.5, 64),
        ("paper/pythia-1b", 2048, None, 0.25, 32),
        ("paper/pythia-2.8b", 2560, None, 0.2, 32),
        ("paper/pythia-6.9b", 4096, None, 0.125, 32),
    ],
)
def test_paper_lambda_layer_and_width(experiment, d_model, layer, coef, expansion):
    from jsae_lightning.config import jacobian_coef

    cfg = _compose([f"experiment={experiment}"])
    assert jacobian_coef(cfg, d_model) == pytest.approx(coef)
    assert cfg.model.layer == layer or layer is None
    assert cfg.sae.expansion_factor == expansion
    assert cfg.data.context_length == (256 if "6.9b" in experiment else 2048)


@pytest.mark.parametrize("path", sorted((config_dir() / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_preset_composes(path):
    if path.stem == "base":
        return
    extra = {
        "synthetic": ["data=synthetic"],
        "local": ["model.path=.", "model.layer=0"],
        "hub": ["model.name=a/b", "model.layer=0"],
    }.get(path.stem, [])
    check_config(_compose([f"model={path.stem}", *extra]))


@pytest.mark.parametrize("path", sorted((config_dir() / "jacobian").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_penalty_preset_makes_its_penalty(path):
    from jsae_lightning.penalties import make_penalty

    if path.stem == "base":
        return
    cfg = _compose([f"jacobian={path.stem}"])
    check_config(cfg)
    penalty = make_penalty(cfg.jacobian.penalty, **to_dict(cfg.jacobian)["params"])
    assert penalty(torch.rand(2, 4, 4)).ndim == 0


def test_every_leaf_has_a_comment():
    """A user reads `conf/`: every key of the base files says what it is."""
    for name in ("data/base", "model/base", "sae/default", "optim/default", "eval/default", "checkpoint/default"):
        for line in (config_dir() / f"{name}.yaml").read_text().splitlines():
            assert "#" in line or not line.strip(), f"{name}: {line}"


def test_lists_in_config_agree_with_the_code():
    from jsae_lightning import config, kernels
    from jsae_lightning.jacobians import JACOBIAN_AT
    from jsae_lightning.penalties import PENALTIES

    assert set(config.PENALTIES) == set(PENALTIES)
    assert set(config._CHOICES["jacobian.at"]) == set(JACOBIAN_AT)
    assert set(config._CHOICES["kernels"]) == {"auto", *kernels.IMPLEMENTATIONS}
    presets = {path.stem for path in Path(config_dir() / "jacobian").glob("*.yaml")}
    assert presets == {"base", "tiny", "synthetic", *PENALTIES}


@pytest.mark.parametrize("experiment", ["tiny", "synthetic", "paper/pythia-70m", "gated/llama-3.2-1b", "none"])
def test_a_penalty_chosen_on_the_command_line_brings_its_own_weight(experiment):
    cfg = _compose([f"experiment={experiment}", "jacobian=hoyer"])
    assert (cfg.jacobian.penalty, cfg.jacobian.coef) == ("hoyer", 0.07)


def test_the_default_penalty_is_that_of_the_study_and_the_papers_sweeps_keep_the_papers():
    default = _compose([]).jacobian
    assert (default.penalty, default.coef) == ("hoyer_l1", 0.05)
    for experiment in ("sweep/lambda", "sweep/paper", "paper/pythia-70m"):
        assert _compose([f"experiment={experiment}"]).jacobian.penalty == "l1"
    assert _compose(["experiment=baseline/traditional"]).jacobian.coef == 0
