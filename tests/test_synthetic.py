"""The synthetic language model: its MLP computes the known function, and it goes the way of any other model."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from jsae_lightning.architecture import read_architecture
from jsae_lightning.checkpoint import load_run
from jsae_lightning.config import check_architecture, check_config, config_dir, register
from jsae_lightning.data import ActivationDataModule
from jsae_lightning.errors import UserError
from jsae_lightning.jacobians import jacobian
from jsae_lightning.language_model import LanguageModel
from jsae_lightning.splicing import Spliceable
from jsae_lightning.synthetic.computation import make_computation, readouts
from jsae_lightning.synthetic.documents import SyntheticDocuments
from jsae_lightning.synthetic.language_model import SyntheticLanguageModel
from jsae_lightning.synthetic.spec import make_spec
from jsae_lightning.synthetic.tokens import TokenFeatures, _mixed
from running import TOY_LENGTHS, kill_self, train
from synthetic_factories import spec_values, true_pair


def _features(spec, tokens: int = 200, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(spec.vocab_size, (tokens, spec.active_groups), generator=generator)
    return TokenFeatures(spec).activations(ids)


# The computation


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
def test_the_mlp_computes_the_known_function(activation):
    spec = make_spec(spec_values(activation=activation, negative_share=0.5))
    computation = make_computation(spec)
    s = _features(spec)
    function = {
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda h: torch.nn.functional.gelu(h, approximate="tanh"),
    }[activation]
    expected = torch.zeros(len(s), spec.d_model, dtype=torch.float64)
    for i in range(spec.n_out):
        hidden = sum(computation.weights[i, j] * s[:, j] for j in range(spec.n_in)) - computation.thresholds[i]
        expected += function(hidden)[:, None] * computation.directions_out[i]
    mlp = computation.mlp().double()  # its weights have been rounded to float32
    torch.testing.assert_close(mlp(s @ computation.directions_in), expected, rtol=0, atol=1e-6)
    assert expected.abs().max() > 0.5


def test_one_neuron_by_hand():
    computation = make_computation(make_spec(spec_values(n_in=2, n_out=1, group_size=1, active_groups=1)))
    known = dataclasses.replace(
        computation,
        weights=torch.tensor([[2.0, -0.5]], dtype=torch.float64),
        thresholds=torch.tensor([0.25], dtype=torch.float64),
    )
    s = torch.tensor([[1.0, 1.0], [0.25, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert known.output_features(s).flatten().tolist() == [1.25, 0.0, 1.75]
    assert known.jacobian(s)[:, 0].tolist() == [[2.0, -0.5], [0.0, 0.0], [2.0, 0.0]]


def test_directions_are_orthonormal_where_they_fit():
    computation = make_computation(make_spec(spec_values()))
    for directions in (computation.directions_in, computation.directions_out):
        torch.testing.assert_close(directions @ directions.T, torch.eye(len(directions), dtype=torch.float64))
    assert computation.interference() < 1e-12


def test_more_features_than_dimensions_interfere_as_stated():
    spec = make_spec(spec_values(d_model=8))
    computation = make_computation(spec)
    directions = computation.directions_in
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(spec.n_in, dtype=torch.float64))
    gain = readouts(directions) @ directions.T
    torch.testing.assert_close(gain.diagonal(), torch.ones(spec.n_in, dtype=torch.float64))
    # A tight frame: sum_jl (d_j . d_l)^2 is n^2 / d, so the mean off the diagonal is (n / d - 1) / (n - 1) (Welch)
    expected = ((spec.n_in / 8 - 1) / (spec.n_in - 1)) ** 0.5
    assert computation.interference() == pytest.approx(expected, rel=0.05)
    s = _features(spec)
    hidden = s @ directions @ computation.mlp().W_in.double() - computation.thresholds
    error = hidden - computation.pre_activations(s)
    stated = s @ (gain - torch.eye(spec.n_in)).T @ computation.weights.T
    torch.testing.assert_close(error, stated, rtol=0, atol=1e-5)
    assert error.abs().max() > 0.1


def test_readouts_of_independent_directions_are_their_duals():
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(readouts(directions) @ directions.T, torch.eye(4, dtype=torch.float64))


def test_the_graph_has_the_promised_shape():
    spec = make_spec(spec_values(n_in=24, n_out=12, inputs_per_output=3, active_groups=3, negative_share=0.5))
    computation = make_computation(spec)
    weights, group = computation.weights, computation.group
    assert ((weights != 0).sum(dim=1) == 3).all()
    for row in weights:
        assert len(group[row != 0].unique()) == 3
        assert row.max() > 0
    # Output features of a group read the same input groups, and no input feature twice
    for rows in weights.view(-1, spec.group_size, spec.n_in):
        assert len({tuple(group[row != 0].tolist()) for row in rows}) == 1
        assert ((rows != 0).sum(dim=0) <= 1).all()
    magnitude = weights[weights != 0].abs()
    assert spec.weight_low <= magnitude.min() and magnitude.max() <= spec.weight_high
    assert 0 < (weights < 0).sum() < (weights != 0).sum() / 2
    assert not torch.equal(weights, make_computation(dataclasses.replace(spec, seed=1)).weights)
    assert torch.equal(weights, make_computation(spec).weights)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("at", ["input", "reconstruction"])
def test_the_jacobian_of_the_true_dictionaries_is_the_graph(activation, at):
    spec = make_spec(spec_values(activation=activation, negative_share=0.5))
    computation = make_computation(spec)
    s = _features(spec, 50)
    pair = true_pair(computation, k=spec.n_in)
    found = jacobian(pair, computation.mlp().double(), s @ computation.directions_in, at=at)
    dense = torch.zeros(len(s), spec.n_out, spec.n_in, dtype=torch.float64)
    token = torch.arange(len(s))[:, None, None]
    dense[token, found.indices_out[:, :, None], found.indices_in[:, None, :]] = found.values
    # Off the graph there is the rounding of float32 weights; no latent of the pair is on where its feature is off.
    torch.testing.assert_close(dense * (s > 0)[:, None, :], computation.jacobian(s), rtol=0, atol=1e-5)
    assert computation.jacobian(s).abs().max() > 0.5


# Tokens


def test_each_token_activates_whole_groups_one_of_each_slot():
    spec = make_spec(spec_values())
    tokens = torch.randint(spec.vocab_size, (4, 20), generator=torch.Generator().manual_seed(1))
    s = TokenFeatures(spec)(tokens)
    groups = (s > 0).view(4, 20, spec.groups_in, spec.group_size)
    assert (groups.any(-1) == groups.all(-1)).all()
    assert (groups.any(-1).sum(-1) == spec.active_groups).all()
    assert spec.magnitude_low <= s[s > 0].min() and s.max() < spec.magnitude_high


def test_features_depend_on_the_last_tokens_only():
    spec = make_spec(spec_values())
    features = TokenFeatures(spec)
    tokens = torch.randint(spec.vocab_size, (1, 20), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % spec.vocab_size
    same = (features(tokens) == features(changed)).all(-1)[0]
    assert same.tolist() == [not 10 <= t < 10 + spec.active_groups for t in range(20)]
    whole, window = features(tokens)[0, 15], features.activations(features.windows(tokens)[0, 15])
    assert torch.equal(whole, window)
    assert features.windows(tokens)[0, 0].tolist() == [int(tokens[0, 0])] + [spec.vocab_size] * (spec.active_groups - 1)


def test_magnitudes_are_uniform_and_independent():
    spec = make_spec(spec_values(vocab_size=4000, magnitude_low=1.0, magnitude_high=2.0))
    s = _features(spec, 20_000)
    pairs = s[s[:, 0] > 0][:, :2]
    assert len(pairs) > 1000
    assert pairs.mean(0) - 1.5 == pytest.approx([0, 0], abs=0.03)
    assert pairs.var(0) == pytest.approx([1 / 12, 1 / 12], abs=0.006)
    assert abs(torch.corrcoef(pairs.T)[0, 1]) < 0.1


def test_the_hash_is_splitmix64():
    # The first outputs of the reference implementation for the seeds 0 and 1234567
    found = _mixed(torch.tensor([0, 1234567]))
    assert [value % 2**64 for value in found.tolist()] == [0xE220A8397B1DCDAF, 6457827717110365317]


# The language model


def test_the_model_is_a_language_model():
    values = spec_values()
    model = LanguageModel.load("synthetic", layer=0, synthetic=values)
    assert isinstance(model, SyntheticLanguageModel) and isinstance(model, Spliceable)
    assert read_architecture("synthetic", synthetic=values) == model.architecture
    tokens = torch.randint(values["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(0))
    logits = model.logits(tokens)
    assert logits.shape == (2, 9, values["vocab_size"])
    assert torch.equal(model.logits(tokens, replace_mlp_in=lambda x: x, replace_mlp_out=lambda y: y), logits)
    x = model.mlp_in(tokens)
    y = model.frozen_mlp(x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(logits, (x + y) @ model._unembed)
    torch.testing.assert_close(model.logits(tokens, replace_mlp_out=torch.zeros_like), x @ model._unembed)
    # The residual stream keeps x
    at_zero = model.frozen_mlp(torch.zeros(1, model.spec.d_model))
    torch.testing.assert_close(model.logits(tokens, replace_mlp_in=torch.zeros_like), (x + at_zero) @ model._unembed)


def test_the_hash_tells_models_apart():
    model = SyntheticLanguageModel(spec_values())
    assert model.weights_hash() == SyntheticLanguageModel(spec_values()).weights_hash()
    for change in ({"seed": 1}, {"readout_scale": 2.0}, {"magnitude_high": 3.0}):
        other = SyntheticLanguageModel(spec_values(**change))
        assert other.weights_hash() != model.weights_hash()
        assert (other.frozen_mlp.weights_hash() != model.frozen_mlp.weights_hash()) == ("seed" in change)


def test_documents_are_a_function_of_their_number():
    values = spec_values(num_documents=300)
    documents = SyntheticDocuments(values, "train")
    read = list(documents)
    assert len(read) == len(documents) == 300
    assert torch.equal(documents.first(260), torch.tensor(read[:260]))
    assert torch.equal(SyntheticDocuments(values | {"num_documents": 10}, "train").first(50), torch.tensor(read[:10]))
    assert not torch.equal(SyntheticDocuments(values, "val").first(5), documents.first(5))


def test_documents_are_sampled_from_the_model():
    """Cross-entropy on them is the mean entropy of the model's own predictions, and it is better than without MLP."""
    values = spec_values(num_documents=512, readout_scale=1.0)
    tokens, model = SyntheticDocuments(values, "train").first(512), SyntheticLanguageModel(values)

    def losses(logits):
        log_p = logits[:, :-1].double().log_softmax(-1)
        return -log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)

    cross_entropy, entropy = losses(model.logits(tokens))
    difference = cross_entropy - entropy
    assert abs(difference.mean()) < 4 * difference.std() / difference.numel() ** 0.5
    without, _ = losses(model.logits(tokens, replace_mlp_out=torch.zeros_like))
    assert without.mean() > cross_entropy.mean() + 0.05
    assert cross_entropy.mean() < torch.tensor(values["vocab_size"]).log() - 0.3
    first = torch.bincount(tokens[:, 0], minlength=values["vocab_size"])
    assert first.max() < 40  # uniform: 16 each


# Configuration

BAD = {
    "model.synthetic.n_in=5": "n_in: 5 is no multiple of group_size, 2",
    "model.synthetic.n_out=7": "n_out: 7 is no multiple",
    "model.synthetic.inputs_per_output=30": "inputs_per_output: 30 inputs of different groups, but n_in = 48",
    "model.synthetic.active_groups=5": "active_groups: 5 does not divide the 24 groups",
    "model.synthetic.d_model=0": "d_model: 0 is not above zero",
    "model.synthetic.activation=tanh": "activation: 'tanh' is not known: choose one of relu",
    "model.synthetic.threshold_low=3": "threshold_low: 3.0 is more than threshold_high",
    "model.synthetic.negative_share=2": "negative_share: 2.0 is not a share",
    "model.synthetic.magnitude_low=0": "magnitude_low: 0.0 is not above zero",
    "model.synthetic=null": "model.synthetic: is null with model.name 'synthetic'",
    "model.name=gpt2": "model.synthetic: is set with model.name 'gpt2'",
    "data.source=stdlib": "data.source: stdlib with model.name 'synthetic'",
    "data.text_column=text": "data.text_column: 'text' has no effect with data.source=synthetic",
    "data.context_length=100": "data.context_length: 100 is more than the model's 64",
    "model.layer=1": "model.layer: 1 is out of range",
}


def _compose(*overrides: str):
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.mark.parametrize("override", BAD)
def test_mistakes_are_named_in_one_line(override):
    cfg = _compose("experiment=synthetic", override)
    with pytest.raises(UserError) as error:
        check_config(cfg)
        check_architecture(cfg)
    assert BAD[override] in str(error.value) and "\n" not in str(error.value)


def test_the_source_needs_the_model():
    with pytest.raises(UserError, match="give both model=synthetic and data=synthetic"):
        check_config(_compose("data=synthetic"))
    settings = _compose("experiment=synthetic")
    from jsae_lightning.config import to_dict
    from jsae_lightning.config_schema import make_data_config
    from jsae_lightning.token_sources import open_source

    with pytest.raises(UserError, match="choose model=synthetic"):
        open_source(make_data_config(to_dict(settings.data)))


def test_spec_errors_outside_of_hydra():
    with pytest.raises(UserError, match=r"model.synthetic.size: there is no such key"):
        make_spec(spec_values(size=3))
    values = spec_values()
    del values["n_in"]
    with pytest.raises(UserError, match=r"model.synthetic.n_in: is missing"):
        make_spec(values)
    with pytest.raises(UserError, match="leave them float32 and false"):
        LanguageModel.load("synthetic", layer=0, synthetic=spec_values(), random_weights=True)


def test_the_tests_know_every_key_of_the_preset():
    preset = yaml.safe_load((config_dir() / "model" / "synthetic.yaml").read_text())
    assert set(preset["synthetic"]) == set(spec_values())
    make_spec(preset["synthetic"])


# Training

TOY = ["experiment=synthetic", "model.synthetic.num_documents=64", *TOY_LENGTHS, "data.lm_batch_sequences=2"]


def _module(rank: int = 0, world_size: int = 1) -> ActivationDataModule:
    from jsae_lightning.building import build_data

    module = build_data(_compose(*TOY, "trainer.max_steps=24"))
    module._rank, module._world_size = rank, world_size
    return module


def test_ranks_share_the_batches_out():
    batches = {}
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        module = _module(rank, world_size)
        module.setup()
        assert module.tokenizer is None and module.val_tokens.shape == (4, 64)
        batches[rank, world_size] = list(module.train_dataloader())[:7]
    for alone, *shared in zip(batches[0, 1], batches[0, 2], batches[1, 2], strict=True):
        assert sorted(map(tuple, alone.tolist())) == sorted(map(tuple, torch.cat(shared).tolist()))


def test_a_loader_goes_on_where_another_stopped():
    modules = [_module(), _module()]
    for module in modules:
        module.setup()
    loader = modules[0].train_dataloader()
    batches = iter(loader)
    for _ in range(7):  # inside the second block
        next(batches)
    state = loader.state_dict()
    other = modules[1].train_dataloader()
    other.load_state_dict(state)
    for mine, theirs in zip(batches, other, strict=True):
        assert torch.equal(mine, theirs)


def test_training_exports_and_reloads(tmp_path: Path):
    log = tmp_path / "log"
    assert train([*TOY, f"hydra.run.dir={tmp_path}"], output=log) == 0, log.read_text()[-3000:]
    run = load_run(tmp_path)
    assert run.config["model"]["name"] == "synthetic"
    values = run.config["model"]["synthetic"]
    assert run.mlp.weights_hash() == SyntheticLanguageModel(values).frozen_mlp.weights_hash()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["val/ce_clean"] < metrics["val/ce_zero_output"]
    config = tmp_path / "sae_pair" / "config.json"
    config.write_text(json.dumps(run.config | {"model": run.config["model"] | {"synthetic": values | {"seed": 9}}}))
    with pytest.raises(UserError, match="are not those that the pair was trained on"):
        load_run(tmp_path)


def _kill_at_step_14() -> None:
    """Make the 14th step, inside a block, kill the process."""
    from jsae_lightning.module import JSAEModule

    step, calls = JSAEModule.training_step, []

    def killing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 14:
            kill_self()
        return step(*args, **kwargs)

    JSAEModule.training_step = killing


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path):
    log = tmp_path / "log"
    assert train([*TOY, f"hydra.run.dir={tmp_path / 'whole'}"], output=log) == 0, log.read_text()[-3000:]
    killed = [*TOY, f"hydra.run.dir={tmp_path / 'killed'}"]
    assert train(killed, output=log, fault=_kill_at_step_14) == -signal.SIGKILL
    assert train([*killed, "ckpt_path=auto"], output=log) == 0, log.read_text()[-3000:]
    whole, resumed = (load_run(tmp_path / name).pair.state_dict() for name in ("whole", "killed"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
