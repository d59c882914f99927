"""Exports: round trip, and refusal of everything damaged or foreign."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from factories import make_pair, make_x
from jsae_lightning.checkpoint import load_pair, load_run, read_checkpoint
from jsae_lightning.errors import UserError
from jsae_lightning.evaluation_request import read_request
from jsae_lightning.launch import find_checkpoint
from jsae_lightning.sae import SAEPair
from jsae_lightning.torch_devices import usable_device


@pytest.fixture
def export(tmp_path):
    return make_pair(d_sae_output=40, k_output=6).float().save(tmp_path / "pair", metadata={"tokens_seen": 7})


def test_round_trip(export):
    pair = make_pair(d_sae_output=40, k_output=6).float()
    loaded = SAEPair.load(export)
    for name, tensor in pair.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (loaded.output_sae.k, loaded.output_sae.d_sae) == (6, 40)
    x = make_x().float()
    assert torch.equal(loaded.input_sae(x)[0], pair.input_sae(x)[0])


def test_format(export):
    """The keys and shapes that other tools rely on, and no pickle."""
    tensors = load_file(export / "model.safetensors")
    assert {name: list(t.shape) for name, t in tensors.items() if name.startswith("output")} == {
        "output_sae.W_enc": [10, 40],
        "output_sae.b_enc": [40],
        "output_sae.W_dec": [40, 10],
        "output_sae.b_dec": [10],
    }
    config = json.loads((export / "config.json").read_text())
    assert config["format_version"] == 1 and config["tokens_seen"] == 7
    assert config["output_sae"] == {"d_model": 10, "d_sae": 40, "k": 6, "subtract_b_dec": False}
    assert {path.name for path in export.iterdir()} == {"model.safetensors", "config.json", "README.md"}


@pytest.mark.parametrize("others", [[], ["a note"]])
def test_saving_again_replaces_the_pair_and_nothing_else(export, others):
    for name in others:
        (export / name).write_text("somebody's own")
    make_pair().save(export)
    assert load_pair(export).output_sae.d_sae == 32
    assert {path.name for path in export.iterdir()} == {"model.safetensors", "config.json", "README.md", *others}
    assert all((export / name).read_text() == "somebody's own" for name in others)
    assert [path.name for path in export.parent.iterdir()] == ["pair"]


def _edit(export, change):
    tensors = load_file(export / "model.safetensors")
    change(tensors)
    save_file(tensors, export / "model.safetensors")


DAMAGE = {
    "missing tensor": (lambda t: t.pop("input_sae.b_dec"), "input_sae.b_dec is missing"),
    "wrong shape": (lambda t: t.update({"input_sae.b_dec": torch.zeros(3)}), r"input_sae.b_dec has shape \[3\]"),
    "NaN": (lambda t: t["output_sae.W_dec"].fill_(float("nan")), "output_sae.W_dec has NaN"),
    "Inf": (lambda t: t["output_sae.b_enc"].fill_(float("inf")), "output_sae.b_enc has NaN or inf"),
    "float8": (lambda t: t.update({"input_sae.b_dec": torch.ones(10).to(torch.float8_e4m3fn)}), "is torch.float8"),
    "whole numbers": (
        lambda t: t.update({"input_sae.b_dec": torch.ones(10, dtype=torch.int32)}),
        "b_dec is torch.int32",
    ),
    "foreign tensor": (lambda t: t.update({"gate": torch.zeros(1)}), "unknown tensor gate"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tensors_are_refused(damage, export):
    change, message = DAMAGE[damage]
    _edit(export, change)
    with pytest.raises(UserError, match=f"model.safetensors.*{message}"):
        load_pair(export)


def test_truncated_file_is_refused(export):
    path = export / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated"):
        load_pair(export)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no valid JSON"),
        ('{"format_version": 9}', "format_version 9"),
        ('{"format_version": 1}', "input_sae.d_model"),
        ("[]", r"is \[\], not a JSON object"),
        ('"x"', 'is "x", not a JSON object'),
        ("[" * 200_000, "no valid JSON"),
        ('{"format_version": 1, "input_sae": [3]}', r"input_sae: \[3\] is no JSON object"),
    ],
)
def test_bad_config_is_refused(content, message, export):
    (export / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_pair(export)


@pytest.mark.parametrize(
    ("side", "key", "value", "message"),
    [
        ("input_sae", "k", "8", "input_sae.k: '8' is no whole number"),
        ("input_sae", "k", 8.0, "input_sae.k: 8.0 is no whole number"),
        ("input_sae", "d_model", True, "input_sae.d_model: True is no whole number"),
        ("output_sae", "k", None, "output_sae.k: None is no whole number"),
        ("output_sae", "k", 0, "output_sae.k: 0 is no whole number from 1 to"),
        ("input_sae", "d_sae", 10**30, "input_sae.d_sae: 1000000000000000000000000000000 is no whole number from 1"),
        ("output_sae", "k", 41, "output_sae.k: 41 is more than its 40 latents"),
        ("output_sae", "d_model", 11, "input_sae.d_model is 10, output_sae.d_model 11"),
        ("output_sae", "subtract_b_dec", 1, "output_sae.subtract_b_dec: 1 is no bool"),
    ],
)
def test_sizes_that_no_pair_has_are_refused(side, key, value, message, export):
    config = json.loads((export / "config.json").read_text())
    config[side][key] = value
    (export / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"config.json: {message}"):
        load_pair(export)


MODEL = {
    "name": "tiny", "layer": 1, "revision": None, "dtype": "float32", "random_weights": False, "random_seed": 0,
    "mlp_hash": "0" * 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model is missing, so only the two SAEs can be had"),
        ({"model": [1]}, r"model: \[1\] is no JSON object"),
        *(({"model": {k: v for k, v in MODEL.items() if k != key}}, f"model.{key} is missing") for key in MODEL),
        ({"model": MODEL | {"layer": "1"}}, "model.layer: '1' is no int"),
        ({"model": MODEL | {"layer": True}}, "model.layer: True is no int"),
        ({"model": MODEL | {"revision": 7}}, "model.revision: 7 is no str or null"),
    ],
)
def test_what_is_needed_of_the_model_is_checked_where_it_is_needed(change, message, export):
    """The pair alone does without."""
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | change))
    assert load_pair(export).d_model == 10
    with pytest.raises(UserError, match=f"config.json: {message}"):
        load_run(export)
    with pytest.raises(UserError, match=f"config.json: {message}"):
        read_request(export, [])


def test_an_evaluation_needs_to_know_the_penalty(export):
    config = json.loads((export / "config.json").read_text())
    for jacobian, message in (
        (None, "jacobian is missing"),
        ({"coef": 1, "at": "input", "penalty": "l1"}, "jacobian.params is missing"),
    ):
        (export / "config.json").write_text(json.dumps(config | {"model": MODEL, "jacobian": jacobian}))
        with pytest.raises(UserError, match=f"config.json: {message}"):
            read_request(export, [])


@pytest.mark.parametrize("section", ["data", "evaluation"])
@pytest.mark.parametrize("value", [None, [], 3])
def test_sections_that_are_no_objects_are_refused(section, value, export):
    config = json.loads((export / "config.json").read_text())
    jacobian = {"coef": 1, "at": "input", "penalty": "l1", "params": {}}
    (export / "config.json").write_text(json.dumps(config | {"model": MODEL, "jacobian": jacobian, section: value}))
    with pytest.raises(UserError, match=f"config.json: {section}: .* is no JSON object"):
        read_request(export, [])


def test_sizes_are_compared_before_memory_is_taken(export):
    """A pair of 2^30 latents of 10 dimensions would take 80 GB."""
    config = json.loads((export / "config.json").read_text())
    config["input_sae"]["d_sae"] = 2**30
    (export / "config.json").write_text(json.dumps(config))
    message = r"input_sae.W_dec has shape \[32, 10\], config.json says \[1073741824, 10\]"
    with pytest.raises(UserError, match=message):
        load_pair(export)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_pair_is_loaded_in_the_files_precision_and_can_be_trained(export, dtype):
    _edit(export, lambda tensors: tensors.update({name: value.to(dtype) for name, value in tensors.items()}))
    pair = load_pair(export)
    assert {parameter.dtype for parameter in pair.parameters()} == {dtype}
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in pair.parameters())
    assert (pair.input_sae.W_enc.device, pair.output_sae.d_sae) == (torch.device("cpu"), 40)


@pytest.mark.parametrize("device", ["meta", "mps", "vulkan"])
def test_devices_without_numbers_or_code_are_refused(export, device):
    with pytest.raises(UserError, match=f"device: {device} cannot be computed on here"):
        load_pair(export, device=device)


def test_gpus_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert usable_device("cuda:1") == torch.device("cuda:1") and usable_device("cuda") == torch.device("cuda")
    with pytest.raises(UserError, match="device: cuda:2, but torch sees 2: give a lower number"):
        usable_device("cuda:2")
    assert usable_device(None) == torch.device("cpu")


def test_a_device_that_is_not_there_is_refused(export):
    with pytest.raises(UserError, match="device: 'gpu' is no device"):
        load_pair(export, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device: cuda, but torch sees no CUDA device"):
            SAEPair.load(export, device="cuda")
    missing = f"cuda:{max(torch.cuda.device_count(), 1)}"
    with pytest.raises(UserError, match=f"device: {missing}, but torch sees"):
        load_run(export, device=missing)


def test_home_is_understood(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_pair().float().save("~/pair")
    assert (tmp_path / "pair" / "config.json").is_file()
    assert SAEPair.load("~/pair").d_model == 10
    with pytest.raises(UserError, match="model is missing"):
        load_run("~/pair")


def test_a_sweeps_folder_is_no_runs(tmp_path):
    for job in ("0", "1"):
        make_pair().save(tmp_path / job / "sae_pair")
    with pytest.raises(
        UserError, match=r"holds 2 run\(s\), such as 0: give one of their folders; jsae-report takes all"
    ):
        load_run(tmp_path)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        load_pair(tmp_path / "nowhere")


def test_checkpoint_with_code_is_not_executed(tmp_path):
    path, marker = tmp_path / "evil.ckpt", tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(UserError, match="not executed"):
        read_checkpoint(path)
    assert not marker.exists()


def test_find_checkpoint_prefers_last(tmp_path):
    assert find_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    for name in ("step_0000009.ckpt", "step_0000010.ckpt"):
        (tmp_path / "checkpoints" / name).touch()
    assert find_checkpoint(tmp_path).name == "step_0000010.ckpt"
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert find_checkpoint(tmp_path).name == "last.ckpt"


def test_load_run_finds_the_embedded_model_by_its_name_and_checks_its_hash(tmp_path):
    from jsae_lightning import FrozenMLP
    from jsae_lightning.tiny_lm import NAME

    mlp = FrozenMLP.from_pretrained(NAME, layer=1)
    model = {"name": NAME, "layer": 1, "revision": None, "dtype": "float32", "random_weights": False, "random_seed": 0}
    pair = make_pair(d_model=128).float()
    pair.save(tmp_path / "sae_pair", metadata={"model": model | {"mlp_hash": mlp.weights_hash()}})
    run = load_run(tmp_path)
    assert torch.equal(run.mlp.W_in, mlp.W_in) and run.config["model"]["layer"] == 1
    pair.save(tmp_path / "sae_pair", metadata={"model": model | {"layer": 2, "mlp_hash": mlp.weights_hash()}})
    with pytest.raises(UserError, match="not those that the pair was trained on"):
        load_run(tmp_path)


def test_load_run_is_told_where_the_model_is_now(tmp_path, monkeypatch):
    """Trained on a folder of another machine; hash, tokenizer and language model are those of the new place."""
    from jsae_lightning import FrozenMLP, tiny_lm

    here = tmp_path / "moved"
    shutil.copytree(tiny_lm.WEIGHTS, here)
    mlp = FrozenMLP.from_pretrained(tiny_lm.NAME, layer=1)
    model = MODEL | {"name": "/cluster/models/tiny", "mlp_hash": mlp.weights_hash()}
    make_pair(d_model=128).float().save(tmp_path / "pair", metadata={"model": model})
    with pytest.raises(
        UserError, match=r"model.name: there is no /cluster/models/tiny here: .*load_run\(..., model=DIR\)"
    ):
        load_run(tmp_path / "pair")
    monkeypatch.chdir(tmp_path)
    run = load_run(tmp_path / "pair", model="moved")
    monkeypatch.chdir("/")  # it is still found
    assert torch.equal(run.mlp.W_in, mlp.W_in) and run.model == str(here)
    ids = run.tokenizer().encode("def main():")
    assert run.language_model().mlp_in(torch.tensor([ids])).shape == (1, len(ids), 128)
    assert run.config["model"]["name"] == "/cluster/models/tiny"
    (here / "model.safetensors").write_bytes(_other_weights(here / "model.safetensors"))
    with pytest.raises(UserError, match=f"{here}: the MLP's weights .* are not those that the pair was trained on"):
        load_run(tmp_path / "pair", model=here)


def test_a_folder_in_the_place_of_a_hub_model_has_no_revision(tmp_path, monkeypatch):
    from jsae_lightning import FrozenMLP, tiny_lm

    mlp = FrozenMLP.from_pretrained(tiny_lm.NAME, layer=1)
    model = MODEL | {"name": "team/tiny", "revision": "step3000", "mlp_hash": mlp.weights_hash()}
    make_pair(d_model=128).float().save(tmp_path, metadata={"model": model})
    run = load_run(tmp_path, model=str(tiny_lm.WEIGHTS))
    assert torch.equal(run.language_model().frozen_mlp.W_in, mlp.W_in)
    assert run.tokenizer().encode("x")
    monkeypatch.setenv("HOME", str(tiny_lm.WEIGHTS.parent))
    assert load_run(tmp_path, model=f"~/{tiny_lm.WEIGHTS.name}").model == str(tiny_lm.WEIGHTS)


def test_jsae_eval_is_told_where_the_model_is_now(tmp_path):
    """The revision is the hub model's, a folder has none, unless it is asked for."""
    from jsae_lightning import tiny_lm

    model = MODEL | {"name": "team/tiny", "revision": "step3000"}
    jacobian = {"coef": 1, "at": "input", "penalty": "l1", "params": {}}
    make_pair(d_model=128).float().save(tmp_path / "a", metadata={"model": model, "jacobian": jacobian})
    there = [f"model.path={tiny_lm.WEIGHTS}", "data=stdlib"]
    assert read_request(tmp_path / "a", there).cfg.model.revision is None
    assert read_request(tmp_path / "a", [*there, "model.revision=main"]).cfg.model.revision == "main"
    assert read_request(tmp_path / "a", ["data=stdlib"]).cfg.model.revision == "step3000"
    gone = {"model": model | {"name": "/cluster/models/tiny"}, "jacobian": jacobian}
    make_pair(d_model=128).float().save(tmp_path / "b", metadata=gone)
    with pytest.raises(UserError, match="no directory '/cluster/models/tiny': say where .* is now, model.path=DIR"):
        read_request(tmp_path / "b", ["data=stdlib"])


def test_a_model_that_is_made_is_not_to_be_found_elsewhere(tmp_path):
    model = MODEL | {"name": "synthetic", "synthetic": {"seed": 0}}
    make_pair().float().save(tmp_path, metadata={"model": model})
    with pytest.raises(UserError, match="model: x, but the model of this pair is made and not loaded"):
        load_run(tmp_path, model="x")


def test_a_card_needs_no_section(tmp_path):
    pair = make_pair().save(tmp_path / "pair", metadata={"model": None, "jacobian": None})
    assert "layer ? of `unknown`" in (pair / "README.md").read_text()


def _other_weights(path):
    tensors = {name: tensor * 2 for name, tensor in load_file(path).items()}
    return save(tensors, metadata={"format": "pt"})


def test_saving_takes_nothing_that_is_not_the_pairs(tmp_path):
    pair = make_pair().float()
    (tmp_path / "work" / "data").mkdir(parents=True)
    (tmp_path / "work" / "data" / "thesis").write_text("years")
    (tmp_path / "file").write_text("notes")
    for target, message in (("work", "holds other files, such as data, and no exported pair"), ("file", "is a file")):
        with pytest.raises(UserError, match=message):
            pair.save(tmp_path / target)
    assert (tmp_path / "work" / "data" / "thesis").read_text() == "years"
    assert (tmp_path / "file").read_text() == "notes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "work"]


def test_saving_again_replaces_the_pair_and_leaves_its_evaluation(export, tmp_path):
    (export / "eval").mkdir()
    (export / "eval" / "eval.json").write_text("{}")
    (tmp_path / "link").symlink_to(export)
    other = make_pair(seed=1).float()
    other.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (export / "eval" / "eval.json").read_text() == "{}"
    found = load_pair(export).state_dict()
    assert all(torch.equal(found[name], value) for name, value in other.state_dict().items())
    assert sorted(path.name for path in export.iterdir()) == ["README.md", "config.json", "eval", "model.safetensors"]


@pytest.mark.parametrize("others", [[], ["a note"]])
def test_what_cannot_be_saved_leaves_the_pair_that_is_there(export, others):
    for name in others:
        (export / name).touch()
    before = {path.name: path.read_bytes() for path in export.iterdir()}
    with pytest.raises(TypeError):
        make_pair(seed=1).float().save(export, metadata={"no JSON": object()})
    assert {path.name: path.read_bytes() for path in export.iterdir()} == before
    assert [path.name for path in export.parent.iterdir()] == ["pair"]


def test_sizes_are_the_pairs_own_whatever_the_metadata_say(tmp_path):
    pair = make_pair().float()
    metadata = json.loads((pair.save(tmp_path / "one") / "config.json").read_text()) | {"tokens_seen": 7}
    pair.input_sae.k, pair.output_sae.subtract_b_dec = 2, True
    pair.save(tmp_path / "two", metadata=metadata)
    found = load_pair(tmp_path / "two")
    assert (found.input_sae.k, found.output_sae.k) == (2, pair.output_sae.k)
    assert (found.input_sae.subtract_b_dec, found.output_sae.subtract_b_dec) == (False, True)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["tokens_seen"] == 7


def test_the_card_tells_baselines_and_controls(tmp_path):
    def card(**metadata):
        return (make_pair().float().save(tmp_path / "pair", metadata=metadata) / "README.md").read_text()

    model = {"name": "a/model", "layer": 2}
    plain = card(model=model | {"random_weights": False}, jacobian={"penalty": "l1", "coef": 0.5})
    assert "layer 2 of `a/model`, trained with a penalty on the Jacobian" in plain
    control = card(model=model | {"random_weights": True}, jacobian={"penalty": "l1", "coef": 0.0})
    assert "`a/model` with its weights drawn at random, trained without a penalty on the Jacobian" in control
    assert "Penalty: l1 of the Jacobian, weight 0.5, at the ?; trained on ? tokens." in plain
    jacobian = {"penalty": "l1", "coef": 1, "at": "input", "edges": "contribution", "token_fraction": 0.25}
    full = card(model=model | {"revision": "main"}, jacobian=jacobian, tokens_seen=7)
    assert "layer 2 of `a/model`, revision `main`, trained with a penalty" in full
    assert (
        "Penalty: l1 of the Jacobian times the input latents, weight 1, at the input, on a part of 0.25 of the tokens; "
        "trained on 7 tokens." in full
    )
