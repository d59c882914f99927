"""Configurations, folders and tokenizers: what is read from them, and the one line each that bad ones get."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from jsae_lightning.errors import UserError
from jsae_lightning.language_model import LanguageModel, check_layer, load_tokenizer, read_architecture
from tiny_hub import forbidden_network
from tiny_models import END_OF_TEXT, FAMILIES, make_model_dir, make_tokenizer

LAYER = 1
TOKENS = torch.arange(20)[None]


@pytest.fixture(scope="module", autouse=True)
def no_network():
    """Local models never touch the network."""
    with forbidden_network():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {family: make_model_dir(family, base / family) for family in FAMILIES}


@pytest.fixture
def copy_of(folders, tmp_path):
    """Make a copy of a family's folder, to be damaged."""
    return lambda family: Path(shutil.copytree(folders[family], tmp_path / family))


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Copies, as the file's own memory map must not be alive when the file is overwritten."""
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def edit_config(folder: Path, **changes) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
def test_architecture_is_read_from_the_configuration_alone(folders, tmp_path, family):
    (tmp_path / "config.json").write_text((folders[family] / "config.json").read_text())
    found = read_architecture(str(tmp_path))
    assert (found.d_model, found.num_layers, found.context_length, found.vocab_size) == (32, 3, 64, 288)
    assert found.model_type == family


def test_sizes_left_to_the_architectures_defaults_are_found(copy_of):
    folder = edit_config(copy_of("llama"), max_position_embeddings=None, vocab_size=None)
    found = read_architecture(str(folder))
    assert (found.context_length, found.vocab_size) == (2048, 32000)  # transformers' defaults for Llama


@pytest.mark.parametrize("layer", [-1, 3, 99])
def test_layer_out_of_range_is_refused_before_the_weights(copy_of, layer):
    folder = copy_of("gpt_neox")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=rf"^model.layer: {layer} is not a layer .* choose one of 0\.\.2$"):
        LanguageModel.load(str(folder), layer=layer)


def test_every_layer_in_range_is_accepted(folders):
    architecture = read_architecture(str(folders["gpt_neox"]))
    for layer in range(3):
        check_layer(architecture, layer)


def test_bad_folders_are_one_line_each(copy_of, tmp_path):
    neox = copy_of("gpt_neox")
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": ')
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    (nameless / "config.json").write_text("{}")
    for path, expected in {
        str(tmp_path / "absent"): "absent' does not exist",
        "./absent": "'./absent' does not exist",
        "": "'' does not exist",
        str(neox / "config.json"): "is a file: give the folder",
        str(empty): "has no config.json",
        str(broken): "is not readable JSON",
        str(nameless): "has no model_type",
    }.items():
        with pytest.raises(UserError, match=expected) as caught:
            read_architecture(path)
        assert str(caught.value).startswith("model") and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"model.revision: 'step1000', but .* is a local folder"):
        read_architecture(str(neox), revision="step1000")


def test_models_that_are_no_causal_language_models_are_refused(copy_of):
    masked = edit_config(copy_of("llama"), architectures=["LlamaForSequenceClassification"])
    with pytest.raises(UserError, match="not a causal language model"):
        read_architecture(str(masked))
    decoder = edit_config(copy_of("qwen2"), is_encoder_decoder=True, architectures=None)
    with pytest.raises(UserError, match="not a causal language model"):
        read_architecture(str(decoder))


def test_unknown_architecture_is_refused_without_running_its_code(copy_of):
    folder = edit_config(copy_of("gpt_neox"), model_type="brand_new", auto_map={"AutoConfig": "own.Config"})
    (folder / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match="transformers has no architecture for"):
        LanguageModel.load(str(folder), layer=LAYER)


def test_missing_corrupt_and_incomplete_weights_are_refused(copy_of):
    from safetensors.torch import save_file

    folder = copy_of("gpt_neox")
    weights = folder / "model.safetensors"
    whole, tensors = weights.read_bytes(), read_tensors(weights)

    def refused(expected: str) -> None:
        with pytest.raises(UserError, match=expected):
            LanguageModel.load(str(folder), layer=LAYER)

    weights.write_bytes(whole[: len(whole) // 2])
    refused("model.safetensors is corrupt or truncated")
    weights.write_bytes(b"\xff" * 1000)
    refused("model.safetensors is corrupt or truncated")
    del tensors[f"gpt_neox.layers.{LAYER}.mlp.dense_h_to_4h.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(f"lack 1 tensors, such as gpt_neox.layers.{LAYER}.mlp.dense_h_to_4h.weight")
    weights.unlink()
    refused("has no weights")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    refused("has no model-00001-of-00002.safetensors, which the index of its weights names")
    index.write_text("{}")
    refused("is not an index of weights")


def test_weights_of_another_shape_are_refused(copy_of):
    with pytest.raises(UserError, match="transformers cannot load"):
        LanguageModel.load(str(edit_config(copy_of("gpt_neox"), intermediate_size=40)), layer=LAYER)


def test_sharded_and_pickled_weights_load(copy_of, folders):
    from transformers import AutoModelForCausalLM

    folder = copy_of("gpt_neox")
    expected = LanguageModel.load(str(folders["gpt_neox"]), layer=LAYER).mlp_in(TOKENS)
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(LanguageModel.load(str(folder), layer=LAYER).mlp_in(TOKENS), expected)
    (folder / "pytorch_model.bin").unlink()
    model.save_pretrained(str(folder), max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(LanguageModel.load(str(folder), layer=LAYER).mlp_in(TOKENS), expected)


def test_weights_that_are_not_finite_are_refused(copy_of):
    from safetensors.torch import save_file

    folder = copy_of("llama")
    tensors = read_tensors(folder / "model.safetensors")
    tensors[f"model.layers.{LAYER}.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="logits are not finite in float32"):
        LanguageModel.load(str(folder), layer=LAYER)


def test_mixture_of_experts_is_refused_from_the_configuration_alone(copy_of):
    folder = copy_of("mixtral")
    (folder / "model.safetensors").unlink()
    for act in (lambda: read_architecture(str(folder)), lambda: LanguageModel.load(str(folder), layer=LAYER)):
        with pytest.raises(UserError, match="mixture of experts .num_local_experts is 4"):
            act()


def test_tokenizer_is_the_folders_own(folders):
    tokenizer = load_tokenizer(str(folders["gpt_neox"]))
    ids = tokenizer.encode("the cat sat")
    assert tokenizer.decode(ids) == "the cat sat"
    assert tokenizer.bos_token == END_OF_TEXT and max(ids) < 288


def test_missing_or_damaged_tokenizers_are_refused(copy_of):
    folder = copy_of("gpt_neox")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer of .* cannot be loaded"):
        load_tokenizer(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer .tokenizer.json, "):
        load_tokenizer(str(folder))


def test_tokenizer_that_loses_text_is_refused(copy_of):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = make_tokenizer(copy_of("gpt_neox"))
    lossy = Tokenizer(models.WordLevel({"[UNK]": 0, "The": 1}, unk_token="[UNK]"))
    lossy.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=lossy, unk_token="[UNK]").save_pretrained(str(folder))
    with pytest.raises(UserError, match="turns 'The cat sat"):
        load_tokenizer(str(folder))
