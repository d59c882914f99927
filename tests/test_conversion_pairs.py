"""From SAEs of other projects to a pair: formats by their files, sides, what is told, and the names of activations."""

import shutil

import pytest
import torch

from factories import make_pair, make_x
from foreign_saes import CONVERTED, FORMATS, ORIGIN, paper_folder
from jsae_lightning.conversion import saelens
from jsae_lightning.conversion.models import hub_name
from jsae_lightning.conversion.pairs import find_format, read_pair
from jsae_lightning.conversion.sites import find_sites
from jsae_lightning.errors import UserError
from jsae_lightning.sae import SAEPair
from tiny_models import make_model_dir


def test_the_papers_penalty_and_model_are_told(tmp_path):
    told = {"model_name": "pythia-70m-deduped", "hook_layer": 3, "jacobian_coefficient": 2.0, "sparsity_metric": "l1"}
    read = read_pair([paper_folder(tmp_path / "pair", **told, randomize_llm_weights=True)])
    assert read.config["jacobian"]["coef"] == 2.0 and read.config["jacobian"]["penalty"] == "l1"
    assert read.facts[0]["layer"] == 3 and read.facts[0]["random_weights"] is True and not read.remarks
    other = read_pair([paper_folder(tmp_path / "other", jacobian_coefficient=1, sparsity_metric="of their own")])
    assert other.config["jacobian"]["penalty"] == "l1" and other.facts[0]["sparsity_metric"] == "of their own"
    untold = read_pair([paper_folder(tmp_path / "untold", hook_name="blocks.7.ln2.hook_normalized")])
    assert "whether the Jacobian was penalised is not told" in untold.remarks[0] and untold.facts[0]["layer"] == 7


def test_formats_are_recognised_by_their_files(tmp_path):
    for name, module in FORMATS.items():
        assert find_format(CONVERTED / name) == module.__name__.rpartition(".")[2]
    assert find_format(paper_folder(tmp_path / "paper")) == "paper"
    assert find_format(make_pair().save(tmp_path / "ours")) == "jsae"
    with pytest.raises(UserError, match="holds no SAE of a known format"):
        find_format(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        find_format(tmp_path / "nowhere")


def test_two_saes_make_a_pair(tmp_path):
    read = read_pair([CONVERTED / "dictionary_learning", CONVERTED / "saelens"])
    assert [facts["format"] for facts in read.facts] == ["dictionary_learning", "saelens"]
    x = make_x(d_model=6).float()
    assert torch.equal(read.pair.output_sae(x)[0], saelens.read(CONVERTED / "saelens").saes[0](x)[0])
    for side, name in (("output", "saelens"), ("input", "sparsify")):
        shutil.copytree(CONVERTED / name, tmp_path / side)
    assert [facts["format"] for facts in read_pair([tmp_path]).facts] == ["sparsify", "saelens"]
    assert read.config["jacobian"] == {
        "coef": 0.0, "penalty": "l1", "params": {}, "at": "input", "edges": "jacobian", "token_fraction": 1,
    }  # fmt: skip


def test_what_makes_no_pair_is_refused(tmp_path):
    saelens.write(make_pair().input_sae.float(), tmp_path / "wide", "input", ORIGIN)
    ours = make_pair().save(tmp_path / "ours")
    for sources, message in (
        ([CONVERTED / "saelens"], "holds one SAE: give the input SAE's folder and the output SAE's"),
        ([CONVERTED / "sparsify", paper_folder(tmp_path / "paper")], "holds more than two SAEs"),
        ([tmp_path / "wide", CONVERTED / "sparsify"], "its SAE is 10 wide, that of .*sparsify 6"),
        ([ours, CONVERTED / "saelens"], "ours: is a pair already"),
        ([CONVERTED / "saelens", CONVERTED / "sparsify"], r"saelens: is the SAE of an MLP's output \(blocks.3.hook"),
        ([CONVERTED / "sparsify", tmp_path / "wide"], "wide: is the SAE of an MLP's input .*: give the input SAE's"),
        ([CONVERTED / "sparsify", CONVERTED / ".." / "converted" / "sparsify"], "is given for both SAEs"),
    ):
        with pytest.raises(UserError, match=message):
            read_pair(sources)


def test_saes_of_two_precisions_meet_in_the_wider(tmp_path):
    pair = make_pair()
    for side, sae in (("input", pair.input_sae.bfloat16()), ("output", pair.output_sae.float())):
        saelens.write(sae, tmp_path / side, side, ORIGIN)
    assert {parameter.dtype for parameter in read_pair([tmp_path]).pair.parameters()} == {torch.float32}


def test_a_pair_of_two_widths_is_none():
    with pytest.raises(UserError, match="its d_model is 6, the input SAE's 10"):
        SAEPair.of(make_pair().input_sae, make_pair(d_model=6).output_sae)


def test_short_names_of_models_are_the_hubs():
    names = {
        "pythia-70m-deduped": "EleutherAI/pythia-70m-deduped", "gpt2-small": "openai-community/gpt2",
        "gemma-2-2b": "google/gemma-2-2b", "team/model": "team/model", "other": "other", "": None, None: None,
    }  # fmt: skip
    assert {name: hub_name(name) for name in names} == names


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama", "gemma2", "qwen2", "nemotron", "phi3"])
def test_the_modules_named_give_the_mlps_input_and_output(tmp_path, family):
    """Captured by torch's hooks on the bare transformers model, as other packages do."""
    from transformers import AutoModelForCausalLM

    from jsae_lightning.language_model import LanguageModel

    folder = make_model_dir(family, tmp_path / family)
    sites = find_sites(tmp_path / family, family, 1)
    assert sites is not None and ".1." in sites.mlp_in and sites.without_head(sites.mlp_in) in sites.mlp_in
    ours = LanguageModel.load(str(folder), layer=1)
    bare = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    found = {}
    for name in (sites.mlp_in, sites.mlp_out):
        bare.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: found.update({name: output}))
    tokens = torch.randint(200, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bare(tokens)
    mlp_in = ours.mlp_in(tokens)
    torch.testing.assert_close(found[sites.mlp_in], mlp_in, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[sites.mlp_out], ours.frozen_mlp(mlp_in), rtol=1e-4, atol=1e-5)
    bare.base_model.get_submodule(sites.without_head(sites.mlp_out))  # it is there


def test_an_mlp_that_is_no_module_has_no_names(tmp_path):
    make_model_dir("opt", tmp_path / "opt")
    assert find_sites(tmp_path / "opt", "opt", 1) is None
