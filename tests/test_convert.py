"""jsae-convert: from a run to other projects and back, what is asked of the model, and mistakes in one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from factories import make_pair
from jsae_lightning import FrozenMLP, SAEPair, convert, load_run, tiny_lm
from jsae_lightning.architecture import read_architecture
from jsae_lightning.conversion import FORMATS, ModelChoice, pairs
from jsae_lightning.conversion.models import chosen_model
from jsae_lightning.errors import UserError
from jsae_lightning.evaluation_request import read_request

CONVERTED = Path(__file__).parent / "converted"
TINY = ModelChoice(name=tiny_lm.NAME, layer=1)


@pytest.fixture(scope="module")
def mlp() -> FrozenMLP:
    return FrozenMLP.from_pretrained(tiny_lm.NAME, layer=1)


@pytest.fixture
def run_folder(tmp_path, mlp) -> Path:
    """A run's folder with a pair for the embedded model."""
    model = {
        "name": tiny_lm.NAME, "layer": 1, "revision": None, "dtype": "float32", "random_weights": False,
        "random_seed": 0, "synthetic": None, "mlp_kind": "plain", "mlp_hash": mlp.weights_hash(),
    }  # fmt: skip
    jacobian = {"coef": 0.5, "penalty": "l1", "params": {}, "at": "input"}
    pair = make_pair(d_model=128, d_sae=64, k=4).float()
    pair.save(tmp_path / "run" / "sae_pair", metadata={"model": model, "jacobian": jacobian})
    return tmp_path / "run"


def command(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["jsae-convert", *map(str, arguments)])
    convert.main()


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "jsae"])
def test_there_and_back(run_folder, tmp_path, monkeypatch, capsys, form, mlp):
    """The pair's outputs are the same, and the model is found again by what the files tell, or by the options."""
    command(monkeypatch, run_folder, tmp_path / "theirs", "--to", form)
    assert capsys.readouterr().out == f"{form}: {tmp_path / 'theirs'}\n"
    card = (tmp_path / "theirs" / "README.md").read_text()
    assert f"layer 1 of `{tiny_lm.NAME}`" in card and "`gpt_neox.layers.1.post_attention_layernorm`" in card
    command(monkeypatch, tmp_path / "theirs", tmp_path / "back")
    assert capsys.readouterr().out == f"jsae: {tmp_path / 'back'}\n"
    before, after = load_run(run_folder), load_run(tmp_path / "back")
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    for (_, sae), (_, other) in zip(before.pair.named_saes(), after.pair.named_saes(), strict=True):
        torch.testing.assert_close(other(x)[0], sae(x)[0], rtol=1e-5, atol=1e-5)
    assert after.config["model"]["mlp_hash"] == mlp.weights_hash()
    assert after.config["model"]["mlp_kind"] == "plain" and after.config["model"]["activation"] == "gelu"
    assert after.config["jacobian"]["coef"] == 0.5  # most formats have no place for it, but it is noted
    assert after.config["converted_from"][0]["format"] == form
    assert f"Converted from the format {form}.\n" in (tmp_path / "back" / "README.md").read_text()
    cfg = read_request(tmp_path / "back", ["data=stdlib"]).cfg  # as jsae-eval does
    assert (cfg.model.name, cfg.model.layer) == (tiny_lm.NAME, 1)


def test_the_model_is_what_the_files_tell(run_folder, tmp_path):
    convert.convert([run_folder], tmp_path / "theirs", to="paper")
    assert convert.convert([tmp_path / "theirs"], tmp_path / "back") == []
    assert load_run(tmp_path / "back").config["model"]["layer"] == 1


def test_the_two_saes_alone(tmp_path):
    sources = [CONVERTED / "sparsify", shutil.copytree(CONVERTED / "sparsify", tmp_path / "again")]
    with pytest.raises(UserError, match="--model: the files do not tell it: give it, or --no-model"):
        convert.convert(sources, tmp_path / "pair")
    with pytest.raises(UserError, match="--layer: the files do not tell it: give it, or --no-model"):
        convert.convert(sources, tmp_path / "pair", model=ModelChoice(name=tiny_lm.NAME))
    assert not (tmp_path / "pair").exists()
    (remark,) = convert.convert(sources, tmp_path / "pair", model=ModelChoice(is_left_out=True))
    assert "whether the Jacobian was penalised is not told" in remark
    assert "which does not tell of any penalty" in (tmp_path / "pair" / "README.md").read_text()
    assert SAEPair.load(tmp_path / "pair").d_model == 6
    with pytest.raises(UserError, match="model is missing, so only the two SAEs can be had"):
        load_run(tmp_path / "pair")


def test_a_model_of_another_width_is_refused(tmp_path):
    sources = [CONVERTED / "sparsify", shutil.copytree(CONVERTED / "sparsify", tmp_path / "again")]
    for to in ("jsae", "saelens"):
        with pytest.raises(UserError, match=f"--model: {tiny_lm.NAME} is 128 wide, the SAEs 6"):
            convert.convert(sources, tmp_path / "pair", to=to, model=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_a_copy_of_the_mlp_is_compared_with_the_models(run_folder, tmp_path, mlp):
    convert.convert([run_folder], tmp_path / "theirs", to="paper")
    path = tmp_path / "theirs" / "sae_weights.safetensors"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        copies = {f"mlp.{name}": getattr(mlp, name).to(dtype) for name in ("W_in", "b_in", "W_out", "b_out")}
        save_file({**load_file(path), **copies}, path)
        convert.convert([tmp_path / "theirs"], tmp_path / f"back {dtype}")
    copies["mlp.b_out"] = mlp.b_out * 1.02
    save_file({**load_file(path), **copies}, path)
    with pytest.raises(UserError, match="mlp.b_out: the copy in the checkpoint is not that of layer 1 of"):
        convert.convert([tmp_path / "theirs"], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_options_that_contradict_the_files_are_refused(run_folder, tmp_path):
    with pytest.raises(UserError, match="--layer: is 0, but the files tell 1: leave it out"):
        convert.convert([run_folder], tmp_path / "a", to="saelens", model=ModelChoice(layer=0))
    _edit(run_folder, "layer", 7)
    with pytest.raises(UserError, match="model.layer: 7 is not a layer"):
        convert.convert([run_folder], tmp_path / "a", to="saelens")
    with pytest.raises(UserError, match="--layer: the SAEs are of layers 2 and 3: give those of one MLP"):
        chosen_model([{"layer": 2}, {"layer": 3}], ModelChoice())


def test_what_the_caller_says_goes_before_what_the_files_tell(tmp_path):
    first = {"model_name": "pythia-70m", "layer": 0, "revision": "step1", "dtype": "bfloat16"}
    facts = [first, {"model_name": "other"}]
    told = chosen_model(facts, ModelChoice())
    assert (told.name, told.layer, told.revision, told.dtype) == ("EleutherAI/pythia-70m", 0, "step1", "bfloat16")
    said = chosen_model(facts, ModelChoice(name="team/model", dtype="float16"))
    assert (said.name, said.layer, said.revision, said.dtype) == ("team/model", 0, None, "float16")
    assert chosen_model(facts, ModelChoice(revision="main")).revision == "main"
    assert chosen_model([], ModelChoice(name="team/model", layer=0)).layer == 0
    local = chosen_model(facts, ModelChoice(name=os.path.relpath(tmp_path)))
    assert (local.name, local.revision) == (str(tmp_path), None)


def test_the_options_reach_the_model(run_folder, tmp_path, monkeypatch):
    chosen = []

    def record(facts, choice):
        chosen.append(choice)
        return chosen_model(facts, choice)

    monkeypatch.setattr(pairs, "chosen_model", record)
    options = ("--model", tiny_lm.NAME, "--layer", 1, "--dtype", "bfloat16")
    command(monkeypatch, run_folder, tmp_path / "a", "--to", "saelens", *options)
    metadata = json.loads((tmp_path / "a" / "input" / "cfg.json").read_text())["metadata"]
    assert metadata["model_from_pretrained_kwargs"] == {"dtype": "bfloat16"}
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path / "a", tmp_path / "b", "--revision", "step3")  # a folder has none
    assert chosen == [ModelChoice(tiny_lm.NAME, 1, None, "bfloat16"), ModelChoice(revision="step3")]


def test_a_model_of_random_weights_is_not_taken_for_the_hubs(run_folder, tmp_path):
    _edit(run_folder, "random_weights", True)
    (remark,) = convert.convert([run_folder], tmp_path / "theirs", to="saelens")
    assert "the model's weights were random" in remark
    assert "with its weights drawn at random" in (tmp_path / "theirs" / "README.md").read_text()
    with pytest.raises(UserError, match="--model: the SAEs were trained on a model with random weights"):
        convert.convert([tmp_path / "theirs"], tmp_path / "back")
    convert.convert([tmp_path / "theirs"], tmp_path / "back", model=ModelChoice(is_left_out=True))


def test_a_made_model_cannot_be_loaded_elsewhere(run_folder, tmp_path):
    _edit(run_folder, "synthetic", {"seed": 0})
    (remark,) = convert.convert([run_folder], tmp_path / "theirs", to="sparsify")
    assert "the model is made, other projects cannot load it" in remark


def test_what_saelens_asks_of_its_activations_is_filled_in(run_folder, tmp_path):
    """Its store wants numbers where the run's settings say: as the model and the tokenizer have it."""
    convert.convert([run_folder], tmp_path / "theirs", to="saelens")
    metadata = json.loads((tmp_path / "theirs" / "output" / "cfg.json").read_text())["metadata"]
    assert metadata["context_size"] == read_architecture(tiny_lm.NAME).context_length
    assert metadata["prepend_bos"] is False
    assert metadata["hook_name"] == "gpt_neox.layers.1.mlp"


@pytest.mark.parametrize("kind", ["link", "here"])
def test_a_target_that_is_a_link_or_the_current_folder(run_folder, tmp_path, monkeypatch, kind):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    convert.convert([run_folder], tmp_path / "link" if kind == "link" else ".", to="saelens")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "input" / "cfg.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real", "run"]


def test_an_export_needs_no_more_than_its_model_to_be_converted(run_folder, tmp_path):
    path = run_folder / "sae_pair" / "config.json"
    config = json.loads(path.read_text())
    whole = dict(config)
    del config["jacobian"]
    path.write_text(json.dumps(config))
    assert convert.convert([run_folder], tmp_path / "theirs", to="saelens") == []
    for change, message in (
        ({"jacobian": {"coef": float("inf")}}, "holds a number that is not finite"),
        ({"data": [1]}, r"data: \[1\] is no dict"),
        ({"recipe": 3}, "recipe: 3 is no dict"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match=f"config.json: {message}"):
            convert.convert([run_folder], tmp_path / "other", to="saelens")


def test_input_and_output_beside_others_are_a_pair(run_folder, tmp_path):
    convert.convert([run_folder], tmp_path / "theirs", to="saelens")
    shutil.copytree(tmp_path / "theirs" / "input", tmp_path / "theirs" / "third")
    convert.convert([tmp_path / "theirs"], tmp_path / "back", model=ModelChoice(is_left_out=True))
    assert SAEPair.load(tmp_path / "back").d_model == 128


def test_home_is_understood(run_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(run_folder.parent))
    convert.convert(["~/run"], "~/theirs", to="saelens")
    assert (tmp_path / "theirs" / "README.md").is_file()


def _edit(run_folder, key, value) -> None:
    path = run_folder / "sae_pair" / "config.json"
    config = json.loads(path.read_text())
    config["model"][key] = value
    path.write_text(json.dumps(config))


def test_without_a_model_the_names_of_activations_are_left_out(run_folder, tmp_path):
    assert convert.convert([run_folder], tmp_path / "a", to="saelens", model=ModelChoice(is_left_out=True)) == []
    assert json.loads((tmp_path / "a" / "input" / "cfg.json").read_text())["metadata"]["hook_name"] is None
    gone = ModelChoice(name=str(tmp_path / "nowhere"))
    (remark,) = convert.convert([run_folder], tmp_path / "b", to="sparsify", model=gone)
    assert "nowhere' does not exist" in remark
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["README.md", "input", "output"]


def test_a_gated_mlp_in_the_papers_format_is_told(run_folder, tmp_path):
    _edit(run_folder, "mlp_kind", "gated")
    assert any("knows no gated MLPs" in remark for remark in convert.convert([run_folder], tmp_path / "a", to="paper"))


def test_nothing_is_left_of_what_failed(run_folder, tmp_path):
    make_pair(d_model=128, k_output=3).float().save(tmp_path / "uneven")
    with pytest.raises(UserError, match="--to paper: k is 5 for the input SAE and 3"):
        convert.convert([tmp_path / "uneven"], tmp_path / "new" / "theirs", to="paper")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "uneven"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN"], "1 folders: give one or two to read, then a new one"),
        (["RUN", "a", "b", "c"], "4 folders: give one or two"),
        (["RUN", "new"], "--to: is jsae, which this pair is already"),
        (["RUN", "RUN", "--to", "saelens"], "run: exists already: give a new folder"),
        (["RUN", "new", "--to", "pytorch"], "--to: 'pytorch' is not known: choose one of jsae, paper"),
        (["RUN", "new", "--from", "x"], "--from: 'x' is not known"),
        (["nowhere", "new", "--to", "saelens"], "nowhere: there is no such folder"),
        (["RUN", "new", "--layer", "two"], "invalid int value: 'two'"),
        (["RUN", "new", "--dtype", "float31"], "invalid choice: 'float31'"),
        (["RUN", "file", "--to", "saelens"], "file: exists already"),
        (["RUN", "file/new", "--to", "saelens"], "lies in a file: give a new folder"),
        (["RUN", "new", "--from", "sparsify"], "cfg.json: there is no such file"),
    ],
)
def test_mistakes_end_in_one_line(run_folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, *[run_folder if text == "RUN" else text for text in arguments])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("jsae-convert: error: ")
    assert not (tmp_path / "new").exists()


def test_help_needs_no_torch():
    code = "import sys, jsae_lightning.convert as c\nsys.argv = ['jsae-convert', 'a', 'b', '--to', 'x']\n"
    code += "try: c.main()\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
