"""Language models: the MLP's input and formula on every architecture, splicing, the bridge, what is refused."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from jsae_lightning import bridge, language_model
from jsae_lightning.config import config_dir, to_dict
from jsae_lightning.errors import UserError
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.language_model import LanguageModel
from tiny_hub import forbidden_network
from tiny_models import make_model_dir

FAMILIES = {
    "gpt_neox": ("plain", "gelu", {"b_in", "b_out"}),
    "gpt2": ("plain", "gelu_tanh", {"b_in", "b_out"}),
    "opt": ("plain", "relu", {"b_in", "b_out"}),
    "llama": ("gated", "silu", set()),
    "gemma2": ("gated", "gelu_tanh", set()),
    "qwen2": ("gated", "silu", set()),
    "nemotron": ("plain", "relu2", set()),
    "phi3": ("gated", "silu", set()),
}
LAYER = 1
TOKENS = torch.randint(288, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", autouse=True)
def no_network():
    """Local models never touch the network."""
    with forbidden_network():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {family: make_model_dir(family, base / family) for family in [*FAMILIES, "mixtral"]}


@pytest.fixture(scope="module")
def neox(folders) -> LanguageModel:
    return LanguageModel.load(str(folders["gpt_neox"]), layer=LAYER)


def bare_model(folder: Path, dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_mlp_input_formula_and_logits_are_the_models_own(folders, family):
    """Captured with torch's own hooks on the bare transformers model: no bridge involved."""
    kind, activation, biases = FAMILIES[family]
    ours = LanguageModel.load(str(folders[family]), layer=LAYER)
    mlp = ours.frozen_mlp
    assert (mlp.kind, mlp.activation) == (kind, activation)
    assert {name for name in ("b_in", "b_out", "b_gate") if getattr(mlp, name) is not None} == biases
    assert (mlp.W_in.dtype, mlp.d_model, mlp.d_mlp) == (torch.float32, 32, 48)

    model, seen = bare_model(folders[family]), {}
    # OPT keeps its MLP's two matrices in the block itself; the others have a module around them.
    modules = dict(model.named_modules())
    (first,) = [module for name, module in modules.items() if name.endswith((f".{LAYER}.mlp", f".{LAYER}.fc1"))]
    (last,) = [module for name, module in modules.items() if name.endswith((f".{LAYER}.mlp", f".{LAYER}.fc2"))]
    first.register_forward_pre_hook(lambda module, args: seen.update(mlp_in=args[0]))
    last.register_forward_hook(lambda module, args, output: seen.update(mlp_out=output))
    with torch.no_grad():
        logits = model(TOKENS).logits
    mlp_in = ours.mlp_in(TOKENS)
    assert mlp_in.shape == (2, 12, 32)
    torch.testing.assert_close(mlp_in, seen["mlp_in"].reshape(2, 12, 32), rtol=1e-5, atol=1e-5)
    mlp_out = seen["mlp_out"].reshape(24, 32)
    assert (mlp(seen["mlp_in"].reshape(24, 32)) - mlp_out).norm() < 1e-5 * mlp_out.norm()
    torch.testing.assert_close(ours.logits(TOKENS), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_splicing_replaces_what_enters_and_what_leaves_the_mlp(folders, family):
    model = LanguageModel.load(str(folders[family]), layer=LAYER)
    clean = model.logits(TOKENS)
    assert torch.equal(model.logits(TOKENS, replace_mlp_in=lambda x: x, replace_mlp_out=lambda x: x), clean)
    zeroed = model.logits(TOKENS, replace_mlp_out=torch.zeros_like)
    assert (zeroed - clean).abs().max() > 1e-3

    other = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(4))
    through_input = model.logits(TOKENS, replace_mlp_in=lambda x: other)
    by_hand = model.frozen_mlp(other.flatten(0, 1)).unflatten(0, (2, 12))
    through_output = model.logits(TOKENS, replace_mlp_out=lambda y: by_hand)
    torch.testing.assert_close(through_input, through_output, rtol=1e-4, atol=1e-4)
    assert (through_input - clean).abs().max() > 1e-3
    assert torch.equal(model.logits(TOKENS), clean)  # no hook stays behind


def test_callables_see_the_sites_in_their_order_and_in_float32(folders):
    model, seen = LanguageModel.load(str(folders["llama"]), layer=LAYER, dtype="bfloat16"), []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor)
        return tensor

    assert torch.equal(model.logits(TOKENS, replace_mlp_in=look, replace_mlp_out=look), model.logits(TOKENS))
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in seen] == [((2, 12, 32), torch.float32)] * 2
    assert torch.equal(seen[0], model.mlp_in(TOKENS))
    assert (model.frozen_mlp(seen[0].flatten(0, 1)) - seen[1].flatten(0, 1)).norm() < 0.02 * seen[1].norm()


def test_attention_stays_transformers_own_with_bit_identical_logits(folders):
    for family in ("gpt_neox", "llama", "qwen2", "gemma2"):
        model = LanguageModel.load(str(folders[family]), layer=LAYER)
        with torch.no_grad():
            assert torch.equal(model.logits(TOKENS), bare_model(folders[family])(TOKENS).logits), family
        assert "attn" not in dict(model._bridge.blocks[0].named_children())
        attention = model._bridge.original_model.config._attn_implementation
        assert attention == ("eager" if family == "gemma2" else "sdpa")


@pytest.mark.parametrize("breakage", ["raises", "changes logits"])
def test_standard_bridge_takes_over_where_the_lean_one_fails(folders, monkeypatch, breakage):
    def break_it(adapter):
        if breakage == "raises":
            raise KeyError("blocks")
        lean(adapter)
        adapter.component_mapping.pop("ln_final")
        adapter.prepare_model = lambda model: model.gpt_neox.final_layer_norm.weight.data.mul_(1.5)

    lean = bridge._leave_attention
    monkeypatch.setattr(bridge, "_leave_attention", break_it)
    model = LanguageModel.load(str(folders["gpt_neox"]), layer=LAYER)
    assert "attn" in dict(model._bridge.blocks[0].named_children())
    with torch.no_grad():
        expected = bare_model(folders["gpt_neox"])(TOKENS).logits
    torch.testing.assert_close(model.logits(TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_no_bridge_can_hook_is_refused(folders, monkeypatch):
    from transformer_lens.model_bridge import sources

    def fail(*args, **kwargs):
        raise ValueError("Unsupported architecture\nsecond line")

    monkeypatch.setattr(sources, "build_bridge_from_module", fail)
    with pytest.raises(UserError, match=r"TransformerLens cannot hook it \(ValueError: Unsupported architecture\)"):
        LanguageModel.load(str(folders["gpt_neox"]), layer=LAYER)


def test_mlp_input_stops_before_the_mlp_and_every_layer_can_be_had(folders):
    captured = []
    for layer in range(3):
        model = LanguageModel.load(str(folders["gpt_neox"]), layer=layer)
        ran = []
        for index, block in enumerate(model._bridge.original_model.gpt_neox.layers):
            block.register_forward_hook(lambda *args, index=index, ran=ran: ran.append(index))
        captured.append(model.mlp_in(TOKENS))
        assert ran == list(range(layer))  # blocks that ran to their end
    assert not torch.allclose(captured[0], captured[1]) and not torch.allclose(captured[1], captured[2])


def test_model_is_frozen_in_evaluation_mode_and_outside_autograd(folders):
    folder = folders["gpt2"]  # with dropout of 0.1, were it in training mode
    model = LanguageModel.load(str(folder), layer=LAYER)
    assert not isinstance(model, torch.nn.Module)
    assert not any(parameter.requires_grad for parameter in model._bridge.parameters())
    assert not any(module.training for module in model._bridge.original_model.modules())
    mlp_in = model.mlp_in(TOKENS)
    assert torch.equal(mlp_in, model.mlp_in(TOKENS))
    assert not mlp_in.requires_grad and not mlp_in.is_inference()
    weight = torch.ones(32, requires_grad=True)
    (mlp_in * weight).sum().backward()  # its tensors can enter autograd
    assert weight.grad is not None


def test_activations_do_not_depend_on_the_callers_autocast(neox):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mlp_in, logits = neox.mlp_in(TOKENS), neox.logits(TOKENS)
    assert torch.equal(mlp_in, neox.mlp_in(TOKENS))
    assert torch.equal(logits, neox.logits(TOKENS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_the_models_and_everything_returned_is_float32(folders, neox, dtype):
    model = LanguageModel.load(str(folders["gpt_neox"]), layer=LAYER, dtype=dtype)
    assert {parameter.dtype for parameter in model._bridge.parameters()} == {language_model.DTYPES[dtype]}
    assert model.mlp_in(TOKENS).dtype == model.logits(TOKENS).dtype == model.frozen_mlp.W_in.dtype == torch.float32
    assert torch.equal(model.frozen_mlp.W_in, neox.frozen_mlp.W_in.to(language_model.DTYPES[dtype]).float())
    error = (model.mlp_in(TOKENS) - neox.mlp_in(TOKENS)).norm() / neox.mlp_in(TOKENS).norm()
    assert 1e-5 < error < 0.05


def test_files_stored_in_float16_are_computed_in_the_chosen_dtype(tmp_path):
    folder = make_model_dir("gpt_neox", tmp_path / "half", dtype=torch.float16)
    model = LanguageModel.load(str(folder), layer=LAYER)
    assert {parameter.dtype for parameter in model._bridge.parameters()} == {torch.float32}


def test_pretrained_mlp_is_the_loaded_models(folders, neox):
    mlp = FrozenMLP.from_pretrained(str(folders["gpt_neox"]), layer=LAYER)
    assert mlp.weights_hash() == neox.frozen_mlp.weights_hash()
    other = FrozenMLP.from_pretrained(str(folders["gpt_neox"]), layer=LAYER, random_weights=True)
    assert other.weights_hash() != mlp.weights_hash()
    assert neox.name == str(folders["gpt_neox"]) and neox.revision is None and neox.layer == LAYER
    assert neox.device == torch.device("cpu")


def test_formula_that_does_not_give_the_models_output_is_refused(folders, monkeypatch):
    monkeypatch.setattr(bridge, "_activation_name", lambda bridge: "gelu_tanh")  # the model's is the erf one
    with pytest.raises(UserError, match="with gelu_tanh does not reproduce layer 1 of this gpt_neox: relative error"):
        LanguageModel.load(str(folders["gpt_neox"]), layer=LAYER)


def test_lost_bias_is_noticed_in_every_dtype(folders, monkeypatch):
    def without_bias(wrapped, layer):
        mlp = extract(wrapped, layer)
        mlp.b_in = None
        return mlp

    extract = bridge.extract_mlp
    monkeypatch.setattr(language_model, "extract_mlp", without_bias)
    for dtype in ("float32", "bfloat16", "float16"):
        with pytest.raises(UserError, match="does not reproduce"):
            LanguageModel.load(str(folders["gpt_neox"]), layer=LAYER, dtype=dtype)


@pytest.mark.parametrize("activation", ["quick_gelu", "mish"])
def test_unsupported_activation_is_refused(tmp_path, activation):
    folder = make_model_dir("gpt_neox", tmp_path / "model", hidden_act=activation)
    with pytest.raises(UserError, match=f"activation function '{activation}', which is not supported"):
        LanguageModel.load(str(folder), layer=LAYER)


def test_mixture_of_experts_is_refused_where_the_configuration_does_not_tell(folders, monkeypatch):
    from jsae_lightning import architecture

    monkeypatch.setattr(architecture, "_EXPERT_KEYS", ())
    with pytest.raises(UserError, match="layer 1 of this mixtral has no single dense MLP"):
        LanguageModel.load(str(folders["mixtral"]), layer=LAYER)


def test_a_dtype_may_be_torchs_own(folders):
    rounded = LanguageModel.load(str(folders["gpt_neox"]), layer=LAYER, dtype=torch.bfloat16)
    assert rounded.itemsize == 2
    with pytest.raises(UserError, match="model.dtype: 'int64' is not a floating-point type"):
        LanguageModel.load(str(folders["gpt_neox"]), layer=LAYER, dtype=torch.int64)


def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded():
    with pytest.raises(UserError, match="device: 'gpu' is no device: give 'cpu', 'cuda' or 'cuda:0'"):
        LanguageModel.load("nowhere", layer=LAYER, device="gpu")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2]], "is a list, not a tensor"),
        ("text", "is a str, not a tensor"),
        (TOKENS[0], r"is torch.int64 of shape \[12\], not int64 of \(batch, seq\)"),
        (TOKENS.float(), "is torch.float32 of shape"),
        (TOKENS[:, :0], r"is torch.int64 of shape \[2, 0\]"),
        (TOKENS + 276, "there is an id [0-9]+, but .*gpt_neox knows 0 to 287: take the ids of its own tokenizer"),
        (-TOKENS, "there is an id -[0-9]+, but"),
        (TOKENS.repeat(1, 99), "rows of 1,188, but .*gpt_neox has a context of [0-9]+: cut them"),
    ],
)
def test_tokens_that_the_model_has_not_are_refused(neox, tokens, message):
    with pytest.raises(UserError, match=f"tokens: {message}"):
        neox.check_tokens(tokens)
    neox.check_tokens(TOKENS)
    neox.check_tokens(TOKENS.int())


def test_tokens_are_checked_wherever_they_enter(neox):
    settings = OmegaConf.load(config_dir() / "model" / "synthetic.yaml")
    synthetic = LanguageModel.load("synthetic", layer=0, synthetic=to_dict(settings.synthetic))
    for model in (neox, synthetic):
        wrong = torch.full((1, 2), model.architecture.vocab_size)
        for call in (model.mlp_in, model.logits):
            with pytest.raises(UserError, match="tokens: there is an id"):
                call(wrong)


@pytest.mark.parametrize(("key", "value"), [("dtype", "int8"), ("dtype", "fp32")])
def test_unknown_dtype_is_refused(folders, key, value):
    with pytest.raises(UserError, match=f"model.{key}: '{value}'"):
        LanguageModel.load(str(folders["gpt_neox"]), layer=LAYER, **{key: value})
