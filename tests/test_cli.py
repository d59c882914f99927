"""The command line: bad input gets exit code 2 and one line; start-up loads nothing heavy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from jsae_lightning import train as train_module
from jsae_lightning.launch import exit_codes
from running import toy_overrides, train, write_documents
from tiny_models import make_model_dir


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    return make_model_dir("gpt_neox", folder / "model"), write_documents(folder / "text.txt")


@pytest.fixture
def refusal(monkeypatch, capsys, tmp_path, material):
    """Run the command line in this process and return the one line that it refuses with."""

    def refuse(*arguments: str, toy: bool = True) -> str:
        base = toy_overrides(*material, tmp_path / "run") if toy else [f"hydra.run.dir={tmp_path / 'run'}"]
        GlobalHydra.instance().clear()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["jsae-train", *sorted([*base, *arguments], key=lambda a: a[:2] != "--")])
        with pytest.raises(SystemExit) as stop:
            train_module.main()
        errors = capsys.readouterr().err
        lines = [line for line in errors.splitlines() if "jsae-train: error:" in line]
        assert stop.value.code == 2, errors
        assert len(lines) == 1
        return lines[0]

    return refuse


# The override, and what the message must name: key, value found, remedy.
BAD_CONFIG = [
    ("sae.kk=3", ["sae.kk: there is no such key: did you mean sae.k?"]),
    ("+sae.kk=3", ["sae.kk: there is no such key: did you mean sae.k?"]),
    ("+mine=3", ["mine: there is no such key: --cfg job"]),
    ("seeed=3", ["seeed: there is no such key: did you mean seed"]),
    ("lr=3", ["lr: there is no such key: did you mean optim.lr?"]),
    ("experimnt=smoke", ["experimnt: there is no such key: did you mean experiment?"]),
    ("trainer.max_stepz=3", ["trainer.max_stepz: there is no such key: did you mean trainer.max_steps"]),
    ("+trainer.max_stepz=3", ["trainer.max_stepz", "no such argument"]),
    ("+callbacks.evaluation.everyy=3", ["callbacks.evaluation.everyy", "no such argument"]),
    ("model=pythia-71m", ["model: there is no 'pythia-71m': did you mean", "pythia-70m", "the choices are", "hub"]),
    ("experiment=pythia-70m", ["experiment: there is no 'pythia-70m': did you mean paper/pythia-70m", "sweep/k"]),
    ("nosuchgroup=x", ["nosuchgroup"]),
    ("data=null", ["group", "~GROUP"]),
    ("sae.k=many", ["sae.k", "many"]),
    ("seed=abc", ["seed", "abc"]),
    ("sae.k=0", ["sae.k", "0", "positive"]),
    ("sae.k=65", ["sae.k", "65", "64", "lower"]),
    ("sae.k_output=65", ["sae.k_output", "65", "64"]),
    ("model.layer=3", ["model.layer", "3", "0 to 2"]),
    ("model.layer=-1", ["model.layer", "-1"]),
    ("model.layer=???", ["model.layer", "give model.layer="]),
    ("trainer.accelerator=gpu", ["trainer.accelerator", "trainer=cpu"]),
    ("model.path=nowhere", ["model.path", "nowhere"]),
    ("model.name=some/model", ["model.name", "some/model", "model=hub"]),
    ("model.dtype=int8", ["model.dtype", "int8", "float32"]),
    ("data.path=nowhere.txt", ["data.path", "nowhere.txt"]),
    ("data.source=sqlite", ["data.source", "sqlite", "parquet"]),
    ("data.context_length=65", ["data.context_length", "65", "64"]),
    ("data.batch_tokens=63 trainer.accumulate_grad_batches=2", ["data.batch_tokens", "63", "2"]),
    ("data.val_fraction=2", ["data.val_fraction", "2"]),
    ("jacobian.coef=high", ["jacobian.coef", "high"]),
    ("jacobian.coef=-1", ["jacobian.coef", "-1"]),
    ("jacobian.penalty=l2", ["jacobian.penalty", "l2", "hoyer"]),
    ("jacobian.penalty=hoyer", ["jacobian.coef", "auto", "hoyer"]),
    ("+jacobian.params.power=2", ["power", "l1"]),
    ("jacobian.at=output", ["jacobian.at", "output", "reconstruction"]),
    ("optim.decay_fraction=1 optim.warmup_fraction=0.1", ["optim.decay_fraction", "overlap"]),
    ("jacobian.decay_fraction=0.97", ["jacobian.decay_fraction", "overlap"]),
    ("jacobian.edges=values", ["jacobian.edges", "values", "contribution"]),
    ("jacobian.token_fraction=0", ["jacobian.token_fraction: 0", "above 0"]),
    ("jacobian.token_fraction=1.5", ["jacobian.token_fraction: 1.5", "at most 1"]),
    ("kernels=fast", ["kernels", "fast", "reference"]),
    ("optim.betas=[0.9,7]", ["optim.betas", "7"]),
    ("trainer.accumulate_grad_batches=two", ["trainer.accumulate_grad_batches", "two"]),
    ("trainer.num_nodes=x", ["trainer.num_nodes", "x"]),
    ("data.name=some/dataset", ["data.name", "some/dataset", "no effect"]),
    ("~callbacks.evaluation", ["callbacks.jacobian_histograms", "callbacks.evaluation"]),
    ("trainer.devices=auto", ["trainer.devices", "auto"]),
    ("trainer.max_steps=0", ["trainer.max_steps", "0"]),
    ("ckpt_path=nowhere.ckpt", ["ckpt_path", "nowhere.ckpt"]),
    ("trainer.precision=bf16-true", ["trainer.precision", "bf16-true", "bf16-mixed", "frozen MLP"]),
    ("callbacks.jacobian_histograms.every_n_evaluations=0", ["every_n_evaluations: 0", "~callbacks"]),
    ("callbacks.jacobian_histograms.num_heatmap_tokens=-1", ["num_heatmap_tokens: -1", "0 or more"]),
    ("callbacks.progress.style=bogus", ["callbacks.progress.style", "bogus", "auto, bar, lines"]),
    ("callbacks.progress.every_n_steps=0", ["callbacks.progress.every_n_steps: 0", "above zero"]),
    ("data.text_column=body", ["data.text_column: 'body'", "data.source=text"]),
    ("data.train_split=other", ["data.train_split: 'other'", "data.source=text"]),
    ("checkpoint.best_mode=most", ["checkpoint.best_mode", "most", "min"]),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD_CONFIG, ids=[arguments for arguments, _ in BAD_CONFIG])
def test_bad_configuration_is_refused_before_a_model_loads(arguments, parts, refusal, monkeypatch):
    from jsae_lightning.language_model import LanguageModel

    monkeypatch.setattr(LanguageModel, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    message = refusal(*arguments.split(" "))
    for part in parts:
        assert part in message


def test_kernels_that_cannot_run_are_refused_before_a_model_loads(refusal, monkeypatch):
    from jsae_lightning.language_model import LanguageModel

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(LanguageModel, "load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    assert "error: kernels: triton cannot run: " in refusal("kernels=triton")


@pytest.mark.parametrize(
    "content", ["seeed: 7", "sae:\n  kk: 7", "trainer:\n  max_stepz: 7", "callbacks:\n  evaluation:\n    everyy: 7"]
)
def test_typo_in_an_experiment_file_is_refused(content, refusal, tmp_path):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{content}\n")
    message = refusal(f"--config-dir={tmp_path / 'own'}", "experiment=mine", toy=False)
    assert content.split()[-2].rstrip(":") in message


def test_own_experiment_from_config_dir_trains(material, tmp_path):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\nsae:\n  k: 2\n")
    overrides = [o for o in toy_overrides(*material, tmp_path / "run") if not o.startswith(("experiment", "sae.k"))]
    arguments = [f"--config-dir={tmp_path / 'own'}", "experiment=mine", *overrides, "data.train_tokens=128"]
    output = tmp_path / "output"
    assert train(arguments, output=output) == 0, output.read_text()
    import json

    exported = json.loads((tmp_path / "run" / "sae_pair" / "config.json").read_text())
    assert exported["input_sae"]["k"] == 2
    assert {"optim.lr", "optim.grad_clip", "sae.auxk_coef", "sae.mse_output_coef"} < exported["recipe"].keys()
    assert (exported["recipe"]["optim.lr"], exported["recipe"]["sae.auxk_coef"]) == (5e-4, 1 / 32)


BAD_DATA = {
    "empty file": ("", ["text.txt", "data"]),
    "too small": ("a b c", ["data"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_unusable_text_is_refused(case, refusal, tmp_path):
    content, parts = BAD_DATA[case]
    (tmp_path / "text.txt").write_text(content)
    message = refusal(f"data.path={tmp_path / 'text.txt'}")
    for part in parts:
        assert part in message


def test_dataset_without_text_or_tokens_names_its_columns(refusal, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"label": 1, "title": "x"}\n')
    message = refusal("data=jsonl", "data.document_separator=null", f"data.path={tmp_path / 'rows.jsonl'}")
    assert "label" in message and "title" in message


def test_a_damaged_json_line_is_told_in_one_line(tmp_path, material):
    (tmp_path / "rows.jsonl").write_text('{"text": "some words"}\n{"text": "mo\n')
    output = tmp_path / "output"
    overrides = [*toy_overrides(*material, tmp_path / "run"), "data=jsonl", "data.document_separator=null"]
    assert train([*overrides, f"data.path={tmp_path / 'rows.jsonl'}"], output=output) == 2
    told = [line for line in output.read_text().splitlines() if "JSON" in line]
    assert len(told) == 1
    assert told[0].startswith(f"jsae-train: error: data.path: '{tmp_path / 'rows.jsonl'}'")


def test_tokens_of_another_vocabulary_are_refused(refusal, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join('{"input_ids": [1, 2, 50000]}' for _ in range(200)))
    message = refusal("data=jsonl", "data.document_separator=null", f"data.path={tmp_path / 'rows.jsonl'}")
    assert "50000" in message and "vocabulary" in message


def test_mixture_of_experts_is_refused(refusal, tmp_path):
    message = refusal(f"model.path={make_model_dir('mixtral', tmp_path / 'moe')}")
    assert "expert" in message.lower()


def test_output_folder_that_cannot_be_written(refusal, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = refusal(f"hydra.run.dir={tmp_path / 'file' / 'run'}")
    assert str(tmp_path / "file") in message


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(material, tmp_path):
    run, output = tmp_path / "run", tmp_path / "output"
    code = train([*toy_overrides(*material, run), "trainer.log_every_n_steps=100"], output=output, fault=_nan_at_10)
    assert code == 2
    assert "optimizer step 10" in output.read_text().strip().splitlines()[-1]
    import torch

    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 8
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint["state_dict"].values())


def _nan_at_10() -> None:
    from jsae_lightning.module import JSAEModule

    original = JSAEModule.training_step

    def training_step(self, mlp_in, batch_idx):
        return original(self, mlp_in * float("nan") if batch_idx == 9 else mlp_in, batch_idx)

    JSAEModule.training_step = training_step


def test_a_misspelt_objective_is_refused_before_the_first_step(material, tmp_path):
    run, output = tmp_path / "run", tmp_path / "output"
    assert train([*toy_overrides(*material, run), "objective=val/los"], output=output) == 2
    last = output.read_text().strip().splitlines()[-1]
    assert last.startswith("jsae-train: error: objective: no figure is named 'val/los': did you mean val/loss")
    assert "step 1/" not in output.read_text() and not (run / "checkpoints" / "last.ckpt").exists()


def test_disk_full_during_a_save_keeps_the_earlier_checkpoint(material, tmp_path):
    run, output = tmp_path / "run", tmp_path / "output"
    assert train(toy_overrides(*material, run), output=output, fault=_disk_full_at_third_save) == 2
    last = output.read_text().strip().splitlines()[-1]
    assert "disk is full" in last and "last.ckpt" in last
    import torch

    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 7
    assert not list((run / "checkpoints").glob("*.tmp"))


def _disk_full_at_third_save() -> None:
    import errno

    import torch

    original, calls = torch.save, []

    def save(state, path):
        calls.append(1)
        if len(calls) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(state, path)

    torch.save = save


def test_what_wandb_refuses_is_told_in_one_line(capsys):
    refusal = type("UsageError", (Exception,), {"__module__": "wandb.errors.errors"})
    with pytest.raises(SystemExit) as stop, exit_codes("jsae-train"):
        raise refusal("No API key configured.\nUse `wandb login` to log in.")
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "jsae-train: error: logger: wandb: No API key configured. Use `wandb login` to log in: log in, "
        "set WANDB_MODE=offline, or leave logger=wandb out\n"
    )


def test_a_reader_who_has_seen_enough_is_no_error():
    code = "from jsae_lightning.launch import exit_codes\nwith exit_codes('jsae-collect'):\n"
    code += "    while True:\n        print('a line', flush=True)\n"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"a line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_another_pipe_that_breaks_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop, exit_codes("jsae-train"):
        raise BrokenPipeError(32, "Broken pipe")
    assert stop.value.code == 1
    assert "BrokenPipeError" in capsys.readouterr().err


def test_help_names_every_experiment_and_model(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jsae-train", "--help"])
    train_module.main()
    text = capsys.readouterr().out
    for name in ("paper/pythia-70m", "gated/gemma-2-2b", "qwen2.5-0.5b", "parquet", "hoyer", "ddp", "ckpt_path=auto"):
        assert name in text


def test_help_and_configuration_errors_import_nothing_heavy():
    code = (
        "import sys; sys.argv = ['jsae-train', '--cfg', 'job']; from jsae_lightning.train import main; main(); "
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
