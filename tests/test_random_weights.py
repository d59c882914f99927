"""The random controls: which parameters change, from what distribution, under which seed."""

import shutil
from pathlib import Path

import pytest
import torch

from jsae_lightning.language_model import LanguageModel
from jsae_lightning.sae import TopKSAE
from jsae_lightning.seeding import seeded_generator
from tiny_models import make_model_dir

LAYER = 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {family: make_model_dir(family, base / family) for family in ("gpt_neox", "gpt2")}


@pytest.fixture
def copy_of(folders, tmp_path):
    """Make a copy of a family's folder, to be damaged."""
    return lambda family: Path(shutil.copytree(folders[family], tmp_path / family))


def tensors_of(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The model's parameters under transformers' names, without the layers that the bridge puts in between."""
    parameters = model._bridge.original_model.named_parameters()
    return {name.replace("_original_component.", ""): parameter.clone() for name, parameter in parameters}


def test_random_control_redraws_the_matrices_and_keeps_the_vectors(folders):
    trained = tensors_of(LanguageModel.load(str(folders["gpt_neox"]), layer=LAYER))
    state = torch.get_rng_state()
    loaded = LanguageModel.load(str(folders["gpt_neox"]), layer=LAYER, random_weights=True, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    control = tensors_of(loaded)
    again = tensors_of(LanguageModel.load(str(folders["gpt_neox"]), layer=LAYER, random_weights=True, seed=7))
    other = tensors_of(LanguageModel.load(str(folders["gpt_neox"]), layer=LAYER, random_weights=True, seed=8))
    matrices = [name for name, tensor in trained.items() if tensor.ndim >= 2]
    assert len(matrices) == 2 + 3 * 4 and len(trained) > len(matrices)
    for name, tensor in trained.items():
        assert torch.equal(again[name], control[name])
        assert torch.equal(control[name], tensor) == (name not in matrices), name
        assert torch.equal(other[name], control[name]) == (name not in matrices), name
    drawn = torch.cat([control[name].flatten() for name in matrices])
    # 0.8 / sqrt(32) = 0.1414; 50,000 draws: the standard error of their deviation is 0.3 %
    assert drawn.std().item() == pytest.approx(0.8 / 32**0.5, rel=0.02)
    assert abs(drawn.mean().item()) < 0.003
    assert torch.equal(loaded.frozen_mlp.W_in.T, control[f"gpt_neox.layers.{LAYER}.mlp.dense_h_to_4h.weight"])


def test_tied_embeddings_are_redrawn_once_and_stay_tied(folders):
    model = LanguageModel.load(str(folders["gpt2"]), layer=LAYER, random_weights=True)._bridge.original_model
    embedding = model.get_input_embeddings().weight
    assert torch.equal(embedding, model.get_output_embeddings().weight)
    assert embedding.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    first = torch.randn(embedding.shape, generator=seeded_generator("random weights", 0)) * (0.8 / 32**0.5)
    assert torch.equal(embedding, first)  # the first draw of the seed, not a second one over it


def test_what_an_sae_begins_with_is_unrelated_to_a_random_model_of_the_same_seed(folders):
    """Else a latent would start as a token's embedding, which no SAE finds out of itself."""
    model = LanguageModel.load(str(folders["gpt_neox"]), layer=LAYER, random_weights=True, seed=0)
    embedding = model._bridge.original_model.get_input_embeddings().weight
    sae = TopKSAE(32, len(embedding), 4, generator=torch.Generator().manual_seed(0))  # as training draws it
    cosines = torch.nn.functional.cosine_similarity(embedding, sae.W_dec, dim=1)
    assert abs(cosines.mean()) < 0.1


def test_full_reinitialisation_needs_no_weights_and_leaves_the_random_state(copy_of, folders):
    folder = copy_of("gpt_neox")
    (folder / "model.safetensors").unlink()
    state = torch.get_rng_state()
    fresh = tensors_of(LanguageModel.load(str(folder), layer=LAYER, random_weights="full", seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again = tensors_of(LanguageModel.load(str(folder), layer=LAYER, random_weights="full", seed=1))
    other = tensors_of(LanguageModel.load(str(folder), layer=LAYER, random_weights="full", seed=2))
    name = f"gpt_neox.layers.{LAYER}.mlp.dense_h_to_4h"
    assert torch.equal(fresh[f"{name}.weight"], again[f"{name}.weight"])
    assert not torch.equal(fresh[f"{name}.weight"], other[f"{name}.weight"])
    # As before any training, unlike the control: the configuration's own deviation (1,536 draws), biases of zero.
    assert fresh[f"{name}.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert fresh[f"{name}.bias"].abs().max() == 0
