"""Formats of other projects: against what their own packages made, round trips, and refusal of everything else.

`converted/` was written by the packages that its `expected.json` name: weights, configuration, inputs, and the latents
and reconstructions that they computed.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from factories import make_pair, make_x
from foreign_saes import CONVERTED, FORMATS, ORIGIN, dense, paper_folder
from jsae_lightning.conversion import dictionary_learning, paper, saelens, sparsify
from jsae_lightning.conversion.folding import with_unit_rows
from jsae_lightning.conversion.pairs import find_format
from jsae_lightning.errors import UserError


@pytest.fixture
def folder(tmp_path, request):
    """A copy of one of `converted/`, to be damaged."""
    return Path(shutil.copytree(CONVERTED / request.param, tmp_path / request.param))


@pytest.mark.parametrize("name", FORMATS)
def test_what_their_packages_wrote_computes_what_they_computed(name):
    expected = json.loads((CONVERTED / name / "expected.json").read_text())
    x = torch.tensor(expected["x"])
    foreign = FORMATS[name].read(CONVERTED / name)
    (sae,) = foreign.saes
    assert (sae.d_model, sae.d_sae, sae.k) == (6, 16, 3)
    torch.testing.assert_close(dense(sae, x), torch.tensor(expected["latents"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x)[0], torch.tensor(expected["x_hat"]), rtol=1e-5, atol=1e-5)
    assert sae.subtract_b_dec is (name != "saelens_plain")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(16))  # the rescaled one was written with other norms
    assert not foreign.remarks


def test_what_is_told_of_the_saes_is_kept():
    assert saelens.read(CONVERTED / "saelens").about == {
        "format": "saelens",
        "model_name": "pythia-70m-deduped",
        "hook_name": "blocks.3.hook_mlp_out",
        "layer": 3,
        "context_size": 128,
        "prepend_bos": True,
        "dataset_path": "some/data",
    }
    assert dictionary_learning.read(CONVERTED / "dictionary_learning").about == {
        "format": "dictionary_learning",
        "model_name": "EleutherAI/pythia-70m-deduped",
        "layer": 3,
        "hook_name": "mlp_out_layer_3",
    }
    assert sparsify.read(CONVERTED / "sparsify").about == {"format": "sparsify", "hook_name": "sparsify"}


@pytest.mark.parametrize("form", ["saelens", "sparsify", "dictionary_learning"])
@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_sae_comes_back_as_it_was(tmp_path, form, subtract, dtype):
    sae = make_pair(subtract_b_dec=subtract).input_sae
    with torch.no_grad():
        sae.b_dec *= 10  # of about 1, as in trained SAEs: its product with W_enc is not to be rounded
    sae = sae.to(dtype)
    FORMATS[form].write(sae, tmp_path / "sae", "input", ORIGIN)
    (again,) = FORMATS[form].read(tmp_path / "sae").saes
    is_folded = form != "saelens" and not subtract
    assert again.W_dec.dtype == (torch.promote_types(dtype, torch.float32) if is_folded else dtype)
    assert again.k == sae.k
    for name in ("W_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(again, name), getattr(sae, name).to(again.W_dec.dtype)), name
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    x = make_x(tokens=400)
    wide, again_wide = sae.double(), again.double()
    torch.testing.assert_close(again_wide(x)[0], wide(x)[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dense(again_wide, x), dense(wide, x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("flags", [(False, False), (True, True), (False, True), (True, False)])
def test_a_pair_of_the_papers_code_comes_back_as_it_was(tmp_path, flags):
    pair = make_pair()
    pair.input_sae.subtract_b_dec, pair.output_sae.subtract_b_dec = flags
    paper.write(pair, tmp_path / "pair", ORIGIN)
    again = paper.read(tmp_path / "pair").saes
    x = make_x(tokens=40)
    for sae, other in zip((pair.input_sae, pair.output_sae), again, strict=True):
        torch.testing.assert_close(other(x)[0], sae(x)[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dense(other, x), dense(sae, x), rtol=1e-12, atol=1e-12)
        assert other.subtract_b_dec is all(flags)


def test_the_keys_shapes_and_flags_that_their_packages_expect(tmp_path):
    pair = make_pair(d_sae=32, k=5)
    sae = pair.output_sae.float()
    for module, name in ((saelens, "saelens"), (sparsify, "sparsify"), (dictionary_learning, "dictionary_learning")):
        module.write(sae, tmp_path / name, "output", ORIGIN)
    paper.write(pair.float(), tmp_path / "paper", ORIGIN)

    def shapes(tensors):
        return {name: list(tensor.shape) for name, tensor in tensors.items()}

    ours = {"W_enc": [10, 32], "b_enc": [32], "W_dec": [32, 10], "b_dec": [10]}
    assert shapes(load_file(tmp_path / "saelens" / "sae_weights.safetensors")) == ours
    assert shapes(load_file(tmp_path / "paper" / "sae_weights.safetensors")) == {
        f"_{name}{suffix}": shape for suffix in ("", "_out") for name, shape in ours.items()
    }
    assert shapes(load_file(tmp_path / "sparsify" / "sae.safetensors")) == {
        "encoder.weight": [32, 10],
        "encoder.bias": [32],
        "W_dec": [32, 10],
        "b_dec": [10],
    }
    state = torch.load(tmp_path / "dictionary_learning" / "ae.pt", weights_only=True)
    theirs = {"encoder.weight": [32, 10], "encoder.bias": [32], "decoder.weight": [10, 32], "b_dec": [10]}
    assert shapes(state) == theirs | {"k": [], "threshold": []}
    assert (state["k"].dtype, int(state["k"]), float(state["threshold"])) == (torch.int32, 5, -1.0)

    config = json.loads((tmp_path / "saelens" / "cfg.json").read_text())
    metadata = config.pop("metadata")
    assert config == {
        "architecture": "topk", "d_in": 10, "d_sae": 32, "k": 5, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }  # fmt: skip
    assert metadata["sae_lens_version"] == "6.0.0" and metadata["model_name"] == "team/model"
    assert metadata["hook_name"] == "base.layers.2.mlp" and metadata["model_class_name"] == "AutoModelForCausalLM"
    assert metadata["model_from_pretrained_kwargs"] == {"revision": "main", "dtype": "float32"}
    assert (metadata["prepend_bos"], metadata["context_size"]) == (True, 64)
    modes = {path.stat().st_mode for path in (tmp_path / "saelens").iterdir()}
    assert len(modes) == 1  # safetensors' files are the owner's alone otherwise
    config = json.loads((tmp_path / "paper" / "cfg.json").read_text())
    assert config["apply_b_dec_to_input"] is False and config["activation_fn_kwargs"] == {"k": 5}
    assert config["hook_name"] == "blocks.2.ln2.hook_normalized" and config["mlp_out_mse_coefficient"] == 2.0
    assert (config["jacobian_coefficient"], config["sparsity_metric"]) == (0.5, "l1")
    config = json.loads((tmp_path / "dictionary_learning" / "config.json").read_text())["trainer"]
    assert (config["dict_class"], config["submodule_name"]) == ("AutoEncoderTopK", "base.layers.2.mlp")
    config = json.loads((tmp_path / "sparsify" / "cfg.json").read_text())
    assert (config["num_latents"], config["k"], config["transcode"]) == (32, 5, False)
    assert sparsify.folder_name("output", ORIGIN) == "layers.2.mlp"


def test_norms_are_folded_by_hand():
    """z = (1, 2): times the norms 5 and 1 the first latent is larger, and decoded the same."""
    W_enc, b_enc, W_dec = torch.tensor([[1.0, 2.0]]), torch.tensor([0.0, 1.0]), torch.tensor([[5.0], [-1.0]])
    folded = with_unit_rows(W_enc, b_enc, W_dec)
    assert [tensor.tolist() for tensor in folded] == [[[5.0, 2.0]], [0.0, 1.0], [[1.0], [-1.0]]]
    zero = with_unit_rows(W_enc, b_enc, torch.tensor([[0.0], [2.0]]))
    assert [tensor.tolist() for tensor in zero] == [[[0.0, 4.0]], [0.0, 2.0], [[0.0], [1.0]]]


@pytest.mark.parametrize("folder", ["saelens", "saelens_plain"], indirect=True)
def test_a_scale_of_the_input_is_folded(folder):
    """The SAE sees 3 x and its output is divided by 3."""
    (plain,) = saelens.read(folder).saes
    _edit_json(folder / "cfg.json", normalize_activations="expected_average_only_in")
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 3.0}')
    (scaled,) = saelens.read(folder).saes
    x = make_x(tokens=30, d_model=6).float()
    torch.testing.assert_close(dense(scaled, x), dense(plain, 3 * x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled(x)[0], plain(3 * x)[0] / 3, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("folder", ["saelens"], indirect=True)
@pytest.mark.parametrize("scale", [0, -1.0, "3", None])
def test_a_scale_that_is_none_is_refused(folder, scale):
    _edit_json(folder / "cfg.json", normalize_activations="expected_average_only_in")
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    with pytest.raises(UserError, match=f"activation_scaler.json: scaling_factor: {scale!r} is no number above 0"):
        saelens.read(folder)


@pytest.mark.parametrize("folder", ["saelens"], indirect=True)
def test_the_widest_precision_of_an_saes_tensors_is_kept(folder):
    _edit_tensors(folder / "sae_weights.safetensors", W_dec=lambda t: t.half(), b_enc=lambda t: t + 1e5)
    (sae,) = saelens.read(folder).saes
    assert {parameter.dtype for parameter in sae.parameters()} == {torch.float32} and sae.b_enc.isfinite().all()


@pytest.mark.parametrize(("dtype", "is_told"), [(torch.bfloat16, False), (torch.float32, True)])
def test_norms_are_told_beyond_rounding(tmp_path, dtype, is_told):
    """Rows of norm 1, rounded to bfloat16, and rows that are half a per cent off."""
    sae = make_pair().input_sae.to(dtype)
    with torch.no_grad():
        sae.W_dec *= 1.005 if is_told else 1
    saelens.write(sae, tmp_path / "sae", "input", ORIGIN)
    assert bool(saelens.read(tmp_path / "sae").remarks) is is_told


@pytest.mark.parametrize("folder", ["saelens"], indirect=True)
def test_an_sae_of_saelens_before_version_6_is_read(folder):
    before = saelens.read(folder).saes[0]
    config = json.loads((folder / "cfg.json").read_text())
    for key in ("metadata", "k", "architecture", "apply_b_dec_to_input"):
        del config[key]
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "hook_point": "blocks.3.ln2.hook_normalized"}
    (folder / "cfg.json").write_text(json.dumps(config | old))
    foreign = saelens.read(folder)
    x = make_x(d_model=6).float()
    assert torch.equal(foreign.saes[0](x)[0], before(x)[0])
    assert "lies before the norm's gain in later ones" in foreign.remarks[0]


def test_rows_of_other_norms_are_kept_and_told(tmp_path):
    pair = make_pair()
    with torch.no_grad():
        pair.input_sae.W_dec[0] *= 2
    saelens.write(pair.input_sae, tmp_path / "sae", "input", ORIGIN)
    foreign = saelens.read(tmp_path / "sae")
    assert torch.equal(foreign.saes[0].W_dec, pair.input_sae.W_dec)
    assert "norms from 1 to 2, not 1: they are kept" in foreign.remarks[0]


def _edit_json(path: Path, **changes):
    config = json.loads(path.read_text())
    for key, value in changes.items():
        place, _, key = key.rpartition("__")
        target = config[place] if place else config
        target.pop(key, None)
        if value is not ...:
            target[key] = value
    path.write_text(json.dumps(config))


def _edit_tensors(path: Path, **changes):
    is_pickle = path.suffix == ".pt"
    tensors = torch.load(path, weights_only=True) if is_pickle else load_file(path)
    for key, change in changes.items():
        name = key.replace("__", ".")
        value = change(tensors.get(name)) if callable(change) else change
        tensors.pop(name, None)
        if value is not ...:
            tensors[name] = value
    torch.save(tensors, path) if is_pickle else save_file(tensors, path)


def _nan(tensor):
    return tensor.clone().fill_(float("nan"))


REFUSED = [
    ("saelens", "cfg.json", {"architecture": "jumprelu"}, "architecture is jumprelu: only TopK"),
    ("saelens", "cfg.json", {"architecture": "gated"}, "architecture is gated"),
    ("saelens", "cfg.json", {"architecture": "standard"}, "architecture is standard"),
    ("saelens", "cfg.json", {"k": ...}, "k: None is no whole number"),
    ("saelens", "cfg.json", {"k": True}, "k: True is no whole number"),
    ("saelens", "cfg.json", {"activation_fn_kwargs": {"k": 4}}, "k is 3: activation_fn_kwargs.k is 4"),
    ("saelens", "cfg.json", {"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input: 'false' is no bool"),
    ("saelens", "cfg.json", {"rescale_acts_by_decoder_norm": 1}, "rescale_acts_by_decoder_norm: 1 is no bool"),
    ("saelens", "cfg.json", {"metadata": [1]}, r"metadata: \[1\] is no dict"),
    ("saelens", "cfg.json", {"metadata": {"model_name": 3}}, "model_name: 3 is no str"),
    ("saelens", "cfg.json", {"metadata": {"jsae_lightning": {"layer": "2"}}}, "jsae_lightning.layer: '2' is no int"),
    ("saelens", "cfg.json", {"metadata": {"jsae_lightning": {"jacobian": {"coef": "2"}}}}, "coef: '2' is no int or"),
    ("saelens", "cfg.json", {"metadata": {"jsae_lightning": {"mlp_side": "foo"}}}, "mlp_side: 'foo' is none of input"),
    ("saelens", "cfg.json", {"metadata": {"jsae_lightning": {"dtype": "foo"}}}, "dtype: 'foo' is none of float32"),
    ("saelens", "cfg.json", {"architecture": "gated", "activation_fn": "topk"}, "architecture is gated"),
    ("saelens", "sae_weights.safetensors", {"b_dec": torch.ones(6).to(torch.float8_e4m3fn)}, "b_dec is torch.float8"),
    ("sparsify", "cfg.json", {"signed": True}, "signed is True"),
    ("dictionary_learning", "config.json", {"trainer__layer": 1.5}, "trainer.layer: 1.5 is no int"),
    ("dictionary_learning", "ae.pt", {"k": torch.tensor(3.9)}, "k is 3.9.*, config.json says 3"),
    ("dictionary_learning", "ae.pt", {"k": torch.tensor([3, 3])}, r"k is \[3, 3\], config.json says 3"),
    ("saelens", "cfg.json", {"k": 17}, "k is 17, more than its 16 latents"),
    ("saelens", "cfg.json", {"d_sae": "16"}, "d_sae: '16' is no whole number"),
    ("saelens", "cfg.json", {"d_in": 7}, r"W_enc has shape \[6, 16\], its configuration says \[7, 16\]"),
    ("saelens", "cfg.json", {"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
    ("saelens", "cfg.json", {"normalize_activations": "expected_average_only_in"}, "factor is not in the folder"),
    ("saelens", "cfg.json", {"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
    ("saelens", "sae_weights.safetensors", {"W_dec": ...}, "tensor W_dec is missing"),
    ("saelens", "sae_weights.safetensors", {"b_enc": _nan}, "tensor b_enc has NaN"),
    ("saelens", "sae_weights.safetensors", {"threshold": torch.ones(16)}, "unknown tensor threshold"),
    ("saelens", "sae_weights.safetensors", {"scaling_factor": torch.full((16,), 2.0)}, "scaling_factor is not 1"),
    ("saelens", "sae_weights.safetensors", {"b_dec": torch.ones(6, dtype=torch.int8)}, "b_dec is torch.int8"),
    ("sparsify", "cfg.json", {"activation": "groupmax"}, "activation is 'groupmax'"),
    ("sparsify", "cfg.json", {"transcode": True}, "transcode is True"),
    ("sparsify", "cfg.json", {"skip_connection": True}, "skip_connection is True"),
    ("sparsify", "cfg.json", {"num_latents": 0}, r"shape \[16, 6\], its configuration says \[192, 6\]"),
    ("sparsify", "cfg.json", {"k": 0}, "k: 0 is no whole number"),
    ("sparsify", "sae.safetensors", {"W_skip": torch.ones(6, 6)}, "unknown tensor W_skip"),
    ("sparsify", "sae.safetensors", {"W_dec": lambda t: t.T.contiguous()}, r"W_dec has shape \[6, 16\]"),
    ("dictionary_learning", "config.json", {"trainer": ...}, "trainer is missing"),
    ("dictionary_learning", "config.json", {"trainer__dict_class": "BatchTopKSAE"}, "dict_class is BatchTopKSAE"),
    ("dictionary_learning", "config.json", {"trainer__dict_size": 8}, r"its configuration says \[8, 6\]"),
    ("dictionary_learning", "config.json", {"trainer__k": 4}, "k is 3, config.json says 4"),
    ("dictionary_learning", "ae.pt", {"encoder__bias": ...}, "tensor encoder.bias is missing"),
    ("dictionary_learning", "ae.pt", {"r_mag": torch.ones(16)}, "unknown tensor r_mag"),
    ("dictionary_learning", "ae.pt", {"ae": {"x": 1}}, "is no state dict .*give a finished SAE's, no backup"),
]


@pytest.mark.parametrize(("folder", "file", "change", "message"), REFUSED, indirect=["folder"])
def test_what_is_no_topk_sae_or_damaged_is_refused(folder, file, change, message):
    (_edit_json if file.endswith(".json") else _edit_tensors)(folder / file, **change)
    with pytest.raises(UserError, match=f"{folder.name}.*{message}"):
        FORMATS[folder.name].read(folder)


@pytest.mark.parametrize("folder", ["saelens", "sparsify", "dictionary_learning"], indirect=True)
def test_missing_and_truncated_files_are_refused(folder):
    module = FORMATS[folder.name]
    weights, config = folder / module.WEIGHTS, folder / module.CONFIG
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"{module.WEIGHTS}: truncated"):
        module.read(folder)
    weights.unlink()
    with pytest.raises(UserError, match=f"{module.WEIGHTS}: there is no such file"):
        module.read(folder)
    for text, message in (("{", "no valid JSON"), ("[" * 200_000, "no valid JSON"), ("[1]", "no JSON object")):
        config.write_text(text)
        with pytest.raises(UserError, match=f"{module.CONFIG}: is {message}"):
            module.read(folder)
    config.unlink()
    with pytest.raises(UserError, match=f"{module.CONFIG}: there is no such file"):
        module.read(folder)


@pytest.mark.parametrize("folder", ["dictionary_learning"], indirect=True)
def test_a_pickle_with_code_is_not_executed(folder, tmp_path):
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"encoder.weight": Evil()}, folder / "ae.pt")
    with pytest.raises(UserError, match=r"ae.pt: is no plain state dict and is not executed"):
        dictionary_learning.read(folder)
    assert not marker.exists()


def test_the_papers_pair_by_hand(tmp_path):
    """x = 3; b_dec = 1 is subtracted unless the configuration says no: latent 0 is 2 or 3, and x_hat 3 or 4."""
    for name, config, latent in (("a", {}, 2.0), ("b", {"apply_b_dec_to_input": False}, 3.0)):
        input_sae, output_sae = paper.read(paper_folder(tmp_path / name, **config)).saes
        x_hat, latents = input_sae(torch.tensor([[3.0]]))
        assert (latents.values.tolist(), latents.indices.tolist(), x_hat.tolist()) == (
            [[latent]],
            [[0]],
            [[latent + 1]],
        )
        y_hat, latents = output_sae(torch.tensor([[3.0]]))
        assert (latents.values.tolist(), y_hat.tolist()) == ([[7.0]], [[7.0]])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation_fn_str": "relu"}, "activation_fn_str is 'relu'"),
        ({"activation_fn_str": None}, "activation_fn_str is None"),
        ({"activation_fn_kwargs": None}, "activation_fn_kwargs.k: None is no whole number"),
        ({"activation_fn_kwargs": [3]}, r"activation_fn_kwargs: \[3\] is no dict"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input: 'no' is no bool"),
        ({"randomize_llm_weights": "no"}, "randomize_llm_weights: 'no' is no bool"),
        ({"jacobian_coefficient": "2"}, "jacobian_coefficient: '2' is no int or float"),
        ({"jacobian_coefficient": float("nan")}, "jacobian_coefficient: nan is no int or float"),
        ({"jacobian_coefficient": float("inf")}, "jacobian_coefficient: inf is no int or float"),
        ({"sparsity_metric": []}, r"sparsity_metric: \[\] is no str"),
        ({"hook_layer": True}, "hook_layer: True is no int"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
    ],
)
def test_what_the_papers_code_may_hold_besides_is_refused(tmp_path, config, message):
    with pytest.raises(UserError, match=f"cfg.json: {message}"):
        paper.read(paper_folder(tmp_path / "pair", **config))


def test_a_single_sae_of_the_papers_code_is_refused(tmp_path):
    folder = paper_folder(tmp_path / "pair")
    _edit_tensors(folder / "sae_weights.safetensors", _W_enc_out=...)
    assert find_format(folder) == "paper"
    with pytest.raises(UserError, match="_W_enc_out is missing: it holds one SAE, give a pair"):
        paper.read(folder)


def test_sizes_that_the_papers_code_cannot_hold_are_refused(tmp_path):
    for sizes, message in (({"k_output": 4}, "k is 5 for the input SAE and 4"), ({"d_sae_output": 40}, "d_sae is 32")):
        with pytest.raises(UserError, match=f"--to paper: {message}"):
            paper.write(make_pair(**sizes), tmp_path / "pair", ORIGIN)
