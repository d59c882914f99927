"""jsae-convert: from a run to other projects and back, what is asked of the model, and mistakes in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from factories import make_pair
from jsae_lightning import FrozenMLP, SAEPair, convert, load_run, tiny_lm
from jsae_lightning.conversion import FORMATS, ModelChoice
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
    folders = [tmp_path / "theirs"]
    if form == "sparsify":
        folders = [tmp_path / "theirs" / name for name in ("layers.1.post_attention_layernorm", "layers.1.mlp")]
    command(monkeypatch, *folders, tmp_path / "back", "--model", tiny_lm.NAME, "--layer", 1)
    before, after = load_run(run_folder), load_run(tmp_path / "back")
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))
    for (_, sae), (_, other) in zip(before.pair.named_saes(), after.pair.named_saes(), strict=True):
        torch.testing.assert_close(other(x)[0], sae(x)[0], rtol=1e-5, atol=1e-5)
    assert after.config["model"]["mlp_hash"] == mlp.weights_hash()
    assert after.config["model"]["mlp_kind"] == "plain" and after.config["model"]["activation"] == "gelu"
    assert after.config["jacobian"]["coef"] == (0.5 if form == "paper" else 0.0)
    assert after.config["converted_from"][0]["format"] == form
    cfg = read_request(tmp_path / "back", ["data=stdlib"]).cfg  # as jsae-eval does
    assert (cfg.model.name, cfg.model.layer) == (tiny_lm.NAME, 1)


def test_the_model_is_what_the_files_tell(run_folder, tmp_path):
    convert.convert([run_folder], tmp_path / "theirs", to="paper")
    assert convert.convert([tmp_path / "theirs"], tmp_path / "back") == []
    assert load_run(tmp_path / "back").config["model"]["layer"] == 1


def test_the_two_saes_alone(tmp_path):
    sources = [CONVERTED / "saelens", CONVERTED / "sparsify"]
    with pytest.raises(UserError, match="--layer: the files do not tell it: give it, or --no-model"):
        convert.convert(sources, tmp_path / "pair")
    assert not (tmp_path / "pair").exists()
    convert.convert(sources, tmp_path / "pair", model=ModelChoice(is_left_out=True))
    assert SAEPair.load(tmp_path / "pair").d_model == 6
    with pytest.raises(UserError, match="model is missing, so only the two SAEs can be had"):
        load_run(tmp_path / "pair")


def test_a_model_of_another_width_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"--model: {tiny_lm.NAME} is 128 wide, the SAEs 6"):
        convert.convert([CONVERTED / "saelens", CONVERTED / "sparsify"], tmp_path / "pair", model=TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_the_mlp_is_compared_with_the_models(run_folder, tmp_path, mlp):
    convert.convert([run_folder], tmp_path / "theirs", to="paper")
    path = tmp_path / "theirs" / "sae_weights.safetensors"
    copies = {f"mlp.{name}": getattr(mlp, name).half() for name in ("W_in", "b_in", "W_out", "b_out")}
    save_file({**load_file(path), **copies}, path)
    convert.convert([tmp_path / "theirs"], tmp_path / "back")
    with pytest.raises(UserError, match="mlp.W_in: the copy in the checkpoint is not that of layer 2 of"):
        convert.convert([tmp_path / "theirs"], tmp_path / "other", model=ModelChoice(layer=2))
    assert not (tmp_path / "other").exists()


def test_without_a_model_the_names_of_activations_are_left_out(run_folder, tmp_path):
    (remark,) = convert.convert([run_folder], tmp_path / "a", to="saelens", model=ModelChoice(is_left_out=True))
    assert "names of the activations are left out: give --model and --layer" in remark
    assert json.loads((tmp_path / "a" / "input" / "cfg.json").read_text())["metadata"]["hook_name"] is None
    gone = ModelChoice(name=str(tmp_path / "nowhere"), layer=0)
    (remark,) = convert.convert([run_folder], tmp_path / "b", to="sparsify", model=gone)
    assert "nowhere' does not exist" in remark
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["README.md", "input", "output"]


def test_a_gated_mlp_in_the_papers_format_is_told(run_folder, tmp_path):
    path = run_folder / "sae_pair" / "config.json"
    config = json.loads(path.read_text())
    config["model"]["mlp_kind"] = "gated"
    path.write_text(json.dumps(config))
    assert any("knows no gated MLPs" in remark for remark in convert.convert([run_folder], tmp_path / "a", to="paper"))


def test_nothing_is_left_of_what_failed(run_folder, tmp_path):
    make_pair(d_model=128, k_output=3).float().save(tmp_path / "uneven")
    with pytest.raises(UserError, match="--to paper: k is 5 for the input SAE and 3"):
        convert.convert([tmp_path / "uneven"], tmp_path / "theirs", to="paper")
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
        (["RUN", "new", "--from", "sparsify"], "cfg.json: there is no such file"),
    ],
)
def test_mistakes_end_in_one_line(run_folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
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
