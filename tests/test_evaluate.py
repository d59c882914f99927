"""`jsae-eval` on a tiny run: files, figures, extent, mistakes, what is kept, and two ranks."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import jsae_lightning.evaluate as program
from held_out_factory import make_held_out
from jsae_lightning.atomic_files import atomic_folder, remove_stale_folders
from jsae_lightning.building import Experiment
from jsae_lightning.checkpoint import load_run
from jsae_lightning.errors import UserError
from jsae_lightning.evaluate import evaluate, evaluate_folder
from jsae_lightning.evaluate_config import compose_evaluation, covers
from jsae_lightning.evaluation_parts import Task, runnable_parts
from jsae_lightning.jacobians import edge_penalty, jacobian
from jsae_lightning.penalties import make_penalty
from jsae_lightning.reporting.graph_reader import read_graph
from running import run, toy_overrides, train, write_documents
from tiny_models import make_model_dir

ARRAYS = {
    "histogram_edges", "histogram_abs_input", "histogram_abs_reconstruction", "histogram_rms_input",
    "histogram_rms_reconstruction", "heatmap", "heatmap_position", "firing_rate_input", "firing_rate_output",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of seconds with 16 held-out sequences."""
    folder = tmp_path_factory.mktemp("finished")
    material = make_model_dir("gpt_neox", folder / "model"), write_documents(folder / "text.txt")
    overrides = [*toy_overrides(*material, folder / "run"), "data.val_sequences=16", "data.val_fraction=0.3"]
    assert train(overrides, output=folder / "output") == 0, (folder / "output").read_text()
    return folder / "run"


@pytest.fixture(scope="module")
def judged(finished):
    return evaluate_folder(finished)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the run without results."""
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    return tmp_path / "run"


def read(path: Path) -> dict:
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def means(record: dict) -> dict[str, float]:
    return {key: figure["mean"] for key, figure in record["figures"].items()}


def test_figures_are_those_at_the_end_of_training(judged, finished):
    record, expected = read(judged), read(finished / "metrics.json")
    shared = {key for key in expected if key.startswith("val/")} - {"val/loss", "val/penalty"}
    assert len(shared) > 30
    found = means(record)
    assert {key: found[key] for key in shared} == pytest.approx({key: expected[key] for key in shared}, rel=1e-5)
    assert {key for key in expected if key.startswith("jacobian")} <= found.keys()


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-4), (torch.bfloat16, 0.0)])
def test_a_pair_of_another_precision_is_judged(dtype, rel, judged, copy):
    """That of a run in float64, or one that somebody has rounded: then as the same numbers in float32."""
    parts = ["eval.parts=[figures,fidelity]", "kernels=reference"]
    path = copy / "sae_pair" / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    found = means(read(evaluate_folder(copy, parts)))
    run = load_run(copy)
    sentence = run.language_model().mlp_in(torch.arange(8)[None]).flatten(0, 1)
    assert jacobian(run.pair, run.mlp, sentence.to(run.mlp.W_in.dtype), at="input").values.dtype == run.mlp.W_in.dtype
    assert run.mlp.W_in.dtype == torch.promote_types(dtype, torch.float32)
    if dtype == torch.bfloat16:
        shutil.rmtree(copy / "eval")
        save_file({name: tensor.float() for name, tensor in tensors.items()}, path)
        expected = means(read(evaluate_folder(copy, parts)))
    else:
        expected = means(read(judged))
    assert {key for key in found if key.startswith("fidelity/")}
    for key in ("val/explained_variance_input", "val/ce_both", "jacobian/effective_edges", "jacobian/mean_abs"):
        assert found[key] == pytest.approx(expected[key], rel=rel, abs=0.0), key


def test_the_curve_of_edges_agrees_with_the_figure(judged):
    graph = read_graph(judged.parent)
    strongest = np.sort(graph.sum_abs.astype(np.float64))[::-1].cumsum()
    ninety = int(np.argmax(strongest >= (0.9 - 1e-6) * strongest[-1])) + 1
    assert ninety == pytest.approx(read(judged)["figures"]["graph/edges_for_90"]["mean"], abs=1)
    by_mean = np.sort(graph.mean_abs.astype(np.float64))[::-1].cumsum()
    assert int(np.argmax(by_mean >= 0.9 * by_mean[-1])) + 1 > ninety + 5  # another number


def test_the_files_of_an_evaluation(judged, finished):
    record = read(judged)
    assert judged == finished / "eval" / "eval.json"
    assert (record["format_version"], record["name"], record["kind"]) == (1, "run", "jsae")
    assert record["random_weights"] is False
    assert record["pair"] == read(finished / "sae_pair" / "config.json")
    evaluation = record["evaluation"]
    assert (evaluation["sequences"], evaluation["tokens"], evaluation["jacobian_tokens"]) == (16, 256, 256)
    assert evaluation["groups"] == min(50, evaluation["documents"]) > 2
    assert (evaluation["at"], evaluation["other_at"], evaluation["ranks"]) == ("input", "reconstruction", 1)
    assert evaluation["parts"] == ["figures", "fidelity", "graph"]
    assert evaluation["seconds"]["figures"] > 0
    assert evaluation["peak_bytes"] > 10e6
    errors = {key: figure["standard_error"] for key, figure in record["figures"].items()}
    assert all(
        error is not None and error >= 0 for key, error in errors.items() if key.startswith(("val/", "jacobian"))
    )
    assert {key.split("/")[0] for key in errors} == {
        "val",
        "jacobian",
        "jacobian_at_reconstruction",
        "fidelity",
        "graph",
    }
    assert set(record["curves"]) >= {"edge_kl/contribution", "edge_ce/random"}
    for name in ("edges.parquet", "latents.parquet", "graph.graphml", "contexts.jsonl", "edge_contexts.jsonl"):
        assert (judged.parent / "graph" / name).stat().st_size > 0
    assert record["figures"]["jacobian/effective_edges"]["standard_error"] > 0
    arrays = load_file(judged.parent / "arrays.safetensors")
    assert arrays.keys() >= ARRAYS
    assert arrays["heatmap"].shape == (8, 4, 4)
    assert arrays["histogram_abs_input"].sum() == 256 * 16
    text = (judged.parent / "eval.md").read_text()
    assert "standard error over" in text
    assert f"{record['figures']['val/l0_input']['mean']:.2f}" in text


def test_tensorboard_shows_the_means(judged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(judged.parent / "tensorboard"))
    events.Reload()
    expected = means(read(judged))
    assert set(events.Tags()["scalars"]) == {key for key, mean in expected.items() if mean is not None}
    assert events.Scalars("jacobian/gini")[0].value == pytest.approx(expected["jacobian/gini"])


def test_an_export_alone_gives_the_same_figures(judged, finished, tmp_path):
    shutil.copytree(finished / "sae_pair", tmp_path / "pair")
    record = read(evaluate_folder(tmp_path / "pair"))
    assert means(record) == means(read(judged))
    assert record["name"] == "pair"


def test_results_are_used_again_unless_something_else_is_asked_for(copy):
    path = evaluate_folder(copy, ["eval.tokens=64"])
    assert read(path)["evaluation"]["sequences"] == 4
    made = path.stat().st_mtime_ns
    assert evaluate_folder(copy) == path
    assert evaluate_folder(copy, ["eval.tokens=64", "num_threads=2"]) == path
    assert path.stat().st_mtime_ns == made
    evaluate_folder(copy, ["eval.tokens=128"])
    assert path.stat().st_mtime_ns > made
    made = path.stat().st_mtime_ns
    weights = copy / "sae_pair" / "model.safetensors"
    tensors = load_file(weights)
    tensors["input_sae.b_dec"] += 0.1
    from safetensors.torch import save_file

    save_file(tensors, weights)
    evaluate_folder(copy)
    assert path.stat().st_mtime_ns > made


def test_results_with_more_parts_than_asked_for_are_used_again(copy):
    path = evaluate_folder(copy, ["eval.tokens=64", "eval.parts=[figures,graph]"])
    made = path.stat().st_mtime_ns
    for parts in ("[graph,figures]", "[figures]"):
        assert evaluate_folder(copy, ["eval.tokens=64", f"eval.parts={parts}"]) == path
    assert path.stat().st_mtime_ns == made
    assert (path.parent / "graph" / "edges.parquet").is_file()
    record = read(path)["evaluation"]
    pair = read(copy / "sae_pair" / "config.json")
    for words in (["eval.parts=[fidelity]"], ["eval.parts=null"], ["eval.parts=[figures]", "eval.tokens=65"]):
        assert not covers(record, words, compose_evaluation(copy, pair, words))


def test_more_tokens_than_are_held_out(copy, caplog):
    record = read(evaluate_folder(copy, ["eval.tokens=2e4", "eval.batch_sequences=64", "eval.parts=[figures]"]))
    sequences = record["evaluation"]["sequences"]
    assert 16 < sequences < 1000
    assert "all of them are used" in record["evaluation"]["remark"]
    assert any("only" in message for message in caplog.messages)


def test_settings_reach_what_they_are_about(copy):
    options = ["eval.tokens=64", "eval.jacobian_tokens=10", "eval.groups=3", "eval.exclude_first_position=true"]
    record = read(evaluate_folder(copy, options))
    evaluation = record["evaluation"]
    assert (evaluation["tokens"], evaluation["jacobian_tokens"], evaluation["groups"]) == (60, 10, 3)
    arrays = load_file(copy / "eval" / "arrays.safetensors")
    assert arrays["histogram_abs_input"].sum() == 10 * 16
    assert (arrays["heatmap_position"][:, 1] > 0).all()
    evaluate_folder(copy, [*options, "seed=1"])
    again = load_file(copy / "eval" / "arrays.safetensors")
    assert not torch.equal(again["heatmap_position"], arrays["heatmap_position"])


def test_other_data_keep_the_context_of_training(copy, tmp_path):
    write_documents(tmp_path / "other.txt", 600)
    options = ["data=text", f"data.path={tmp_path / 'other.txt'}", "data.val_fraction=0.5", "eval.tokens=64"]
    record = read(evaluate_folder(copy, [*options, "data.document_separator='\\n\\n'"]))
    assert record["evaluation"]["data"]["context_length"] == 16
    assert record["evaluation"]["data"]["path"] == str(tmp_path / "other.txt")


def test_one_document_has_no_standard_error(copy):
    record = read(evaluate_folder(copy, ["eval.groups=1", "eval.tokens=16", "eval.parts=[figures]"]))
    assert {figure["standard_error"] for figure in record["figures"].values()} == {None}
    assert math.isfinite(record["figures"]["val/mse_input"]["mean"])
    assert "+- " not in (copy / "eval" / "eval.md").read_text().split("## The two SAEs")[1]


def test_results_stay_when_an_evaluation_fails(copy, monkeypatch):
    path = evaluate_folder(copy, ["eval.tokens=64"])
    (copy / "eval" / "autointerp").mkdir()
    (copy / "eval" / "autointerp" / "scores.jsonl").write_text("{}\n")
    before = path.read_bytes()

    def fail(name, task):
        (task.folder / "half").write_text("written")
        raise RuntimeError("out of memory")

    with monkeypatch.context() as context:
        context.setattr("jsae_lightning.evaluation_parts.run_part", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            evaluate_folder(copy, ["eval.tokens=128"])
    assert path.read_bytes() == before
    assert not [entry for entry in copy.iterdir() if entry.name.startswith(".eval")]
    evaluate_folder(copy, ["eval.tokens=128"])
    assert read(path)["evaluation"]["sequences"] == 8
    assert (copy / "eval" / "autointerp" / "scores.jsonl").read_text() == "{}\n"  # of the same pair


@pytest.mark.parametrize("record", [None, "{", '{"format_version": 1}', '{"format_version": 1, "evaluation": []}'])
def test_explanations_without_readable_results_are_kept(record, copy):
    """As `jsae-autointerp` leaves them before the first evaluation, or beside a damaged one."""
    (copy / "eval" / "autointerp").mkdir(parents=True)
    (copy / "eval" / "autointerp" / "input.jsonl").write_text("{}\n")
    if record is not None:
        (copy / "eval" / "eval.json").write_text(record)
    path = evaluate(copy, ["eval.tokens=16", "eval.parts=[figures]"])
    assert read(path)["evaluation"]["tokens"] == 16
    assert (copy / "eval" / "autointerp" / "input.jsonl").read_text() == "{}\n"


def test_explanations_of_another_pair_are_not_kept(copy):
    path = evaluate(copy, ["eval.tokens=16", "eval.parts=[figures]"])
    (copy / "eval" / "autointerp").mkdir()
    path.write_text(path.read_text().replace(read(path)["evaluation"]["pair_hash"], "0" * 64))
    evaluate(copy, ["eval.tokens=16", "eval.parts=[figures]"])
    assert not (copy / "eval" / "autointerp").exists()


def test_a_stream_s_rows_of_training_are_not_judged_at_another_length(copy, caplog):
    """Training held out 8 sequences of 16 tokens, two of each row: 5 rows of 24 would be as many tokens."""
    rows = copy / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": [10 + row] * 40}) + "\n" for row in range(200)))
    path = copy / "sae_pair" / "config.json"
    config = read(path)
    config["data"] |= {"source": "jsonl", "path": str(rows), "streaming": True, "document_separator": None}
    path.write_text(json.dumps(config | {"data": config["data"] | {"val_sequences": 8}}))
    options = ["eval.tokens=1600", "data.context_length=24", "eval.parts=[figures]"]
    evaluation = read(evaluate_folder(copy, options))["evaluation"]
    assert (evaluation["sequences"], evaluation["tokens"]) == (4, 96)
    assert evaluation["remark"].endswith("5 sequences of 24 tokens are used, or rather 4, as it held out whole rows")
    assert evaluation["remark"] in caplog.messages


def test_a_run_and_its_export_are_judged_at_the_same_positions(copy, tmp_path):
    """By what the export tells, or for an older one by its run's own configuration."""
    run, alone = copy / "sae_pair", tmp_path / "alone"
    pair = read(run / "config.json")
    assert pair["evaluation"] == {"exclude_first_position": False}
    config = copy / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("exclude_first_position: false", "exclude_first_position: true"))

    def excluded(folder):
        return compose_evaluation(folder, pair, []).eval.exclude_first_position

    assert [excluded(folder) for folder in (copy, run, alone)] == [False, False, False]
    pair["evaluation"]["exclude_first_position"] = True
    assert [excluded(folder) for folder in (copy, run, alone)] == [True, True, True]
    del pair["evaluation"]
    assert [excluded(folder) for folder in (copy, run, alone)] == [True, True, False]


def test_fidelity_is_left_out_where_sequences_are_too_few(copy, caplog):
    record = read(evaluate_folder(copy, ["eval.tokens=16", "eval.contexts=1"]))
    assert record["evaluation"]["parts"] == ["figures", "graph"]
    assert "fidelity is left out" in record["evaluation"]["remark"]
    assert any("fidelity is left out" in message for message in caplog.messages)
    assert "graph/edges" in record["figures"] and not any(key.startswith("fidelity") for key in record["figures"])


def test_what_a_part_needs_is_checked_before_the_first_one_runs(copy, monkeypatch):
    monkeypatch.setattr("jsae_lightning.evaluation_parts.run_part", lambda name, task: pytest.fail(f"{name} has run"))
    with pytest.raises(UserError, match="fidelity needs 2 or more"):
        evaluate_folder(copy, ["eval.tokens=16", "eval.parts=[figures,fidelity]"])
    assert not (copy / "eval").exists()


def test_the_graph_s_needs_are_checked_first_too():
    held_out = make_held_out(at="nowhere")
    task = Task(
        held_out, held_out.document, jacobian_tokens=None, penalty=edge_penalty(make_penalty("l1"), "jacobian"),
        folder=Path(), fidelity_tokens=9, curve_sequences=2, contexts=8, top_edges=9,
    )  # fmt: skip
    for name in ("fidelity", "graph"):
        with pytest.raises(UserError, match=r"jacobian\.at: 'nowhere'"):
            runnable_parts(["figures", name], task, are_chosen=True)
    assert runnable_parts(["figures"], task, are_chosen=True) == (["figures"], None)


def test_folders_of_killed_evaluations_are_removed_and_running_ones_stay(copy):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = socket.gethostname()
    stale, running, elsewhere, other = (
        copy / f".{name}.tmp"
        for name in (
            f"eval.{host}.{ended.pid}.abc", f"eval.{host}.{os.getppid()}.abc", f"eval.not{host}.{ended.pid}.abc",
            f"another.{host}.{ended.pid}.abc",
        )
    )  # fmt: skip
    for folder in (stale, running, elsewhere, other):
        folder.mkdir()
        (folder / "eval.json").write_text("{}")
    seen = []
    with atomic_folder(copy / "eval") as temporary:  # another evaluation, of a living process
        evaluate(copy, ["eval.tokens=16", "eval.parts=[figures]", f"eval.out={copy / 'second'}"])
        assert not (copy / "second" / "graph").exists() and stale.is_dir()
        remove_stale_folders(copy / "eval")
        seen = [folder.is_dir() for folder in (temporary, stale, running, elsewhere, other)]
    assert seen == [True, False, True, True, True]
    stale.mkdir()
    evaluate(copy, ["eval.tokens=16", "eval.parts=[figures]"])
    assert not stale.exists()


def test_an_export_leaves_a_running_evaluation_alone(tmp_path, monkeypatch):
    experiment = Experiment.__new__(Experiment)
    experiment.cfg = OmegaConf.create({"paths": {"output_dir": str(tmp_path)}})
    experiment.module = SimpleNamespace(pair=make_held_out().pair)
    monkeypatch.setattr(Experiment, "_metadata", lambda self: {})
    (tmp_path / ".sae_pair.killed.tmp").mkdir()
    with atomic_folder(tmp_path / "eval") as temporary:
        experiment.export()
        (temporary / "eval.json").write_text("{}")
    assert {entry.name for entry in tmp_path.iterdir()} == {"eval", "sae_pair"}
    assert (tmp_path / "eval" / "eval.json").is_file()


def test_every_part_has_a_function():
    from jsae_lightning import evaluate_config, evaluation_parts

    assert tuple(evaluation_parts.PART_FUNCTIONS) == evaluate_config.PARTS
    one = evaluation_parts.PartResult(arrays={"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="part second: arrays has a"):
        evaluation_parts.merge({"first": one, "second": one})


# The command line


def call(monkeypatch, *arguments) -> int:
    """Run the command in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["jsae-eval", *map(str, arguments)])
    try:
        program.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_writes_and_prints(copy, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, copy, "eval.tokens=64", "--out", tmp_path / "results") == 0
    printed = capsys.readouterr().out
    assert "effective_edges" in printed
    assert f"results: {tmp_path / 'results' / 'eval.json'}" in printed
    assert not (copy / "eval").exists()
    assert read(tmp_path / "results" / "eval.json")["evaluation"]["sequences"] == 4


def test_the_configuration_can_be_seen(copy, monkeypatch, capsys):
    assert call(monkeypatch, copy, "eval.tokens=64", "data.bos=never", "--cfg", "job") == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    assert (shown.eval.tokens, shown.data.bos, shown.eval.groups) == (64, "never", 50)
    assert shown.data.context_length == 16  # of the run
    assert not (copy / "eval").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/nothing"], "there is no such folder"),
        (["{folder}/run/csv"], "config.json: there is no such file"),
        (["{folder}/run", "eval.tokens=0"], "eval.tokens: '0' is not above zero"),
        (["{folder}/run", "eval.groups=-1"], "eval.groups: '-1'"),
        (["{folder}/run", "eval.token=9"], "token"),
        (["{folder}/run", "eval.parts=[figures,nothing]"], "eval.parts: 'nothing' is not known"),
        (["{folder}/run", "eval.parts=[]"], "eval.parts: [] measures nothing"),
        (["{folder}/run", "data.train_tokens=9"], "data.train_tokens: matters in training only"),
        (["{folder}/run", "data=nothing"], "nothing"),
        (["{folder}/run", "device=abacus"], "device: 'abacus' is not known"),
        (["{folder}/run", "model.path=nowhere"], "model.path: there is no directory '/"),
        (["{folder}/run", "model.layer=0"], "are not those that the pair was trained on"),
        (["{folder}/run", "--out", "{folder}/other"], "holds other files"),
        (["{folder}/run", "{folder}/run"], "use --compare"),
        (["--compare", "{folder}/run"], "only one folder"),
        (["--compare", "{folder}/run", "{folder}/run"], "given twice"),
        (["{folder}/run", "--nothing"], "there is no such option"),
        (["{folder}/run", "--cfg", "all"], "invalid choice: 'all'"),
        (["--compare", "{folder}/run", "{folder}/other", "--cfg", "job"], "leave --compare out"),
        ([], "no folder is given"),
    ],
)
def test_mistakes_end_with_one_line(arguments, message, copy, tmp_path, monkeypatch, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("data")
    code = call(monkeypatch, *(argument.format(folder=tmp_path) for argument in arguments))
    errors = capsys.readouterr().err
    assert code == 2, errors
    (line,) = errors.strip().splitlines()
    assert line.startswith("jsae-eval: error: ")
    assert message in line
    assert not (copy / "eval").exists()


def test_a_pair_of_another_model_is_refused(copy):
    path = copy / "sae_pair" / "config.json"
    config = read(path)
    config["model"]["mlp_hash"] = "0" * 64
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="not those that the pair was trained on"):
        evaluate_folder(copy)


def test_a_comparison_evaluates_what_is_not_evaluated_yet(copy, tmp_path, monkeypatch, capsys):
    """Against itself, said to be trained without a penalty: smaller by a factor of 1, and no sparser."""
    shutil.copytree(copy, tmp_path / "baseline")
    path = tmp_path / "baseline" / "sae_pair" / "config.json"
    config = read(path)
    config["jacobian"]["coef"] = 0.0
    path.write_text(json.dumps(config))
    made = evaluate_folder(copy, ["eval.tokens=160"]).stat().st_mtime_ns
    capsys.readouterr()
    assert call(monkeypatch, "--compare", copy, tmp_path / "baseline", "eval.tokens=160") == 0
    printed = capsys.readouterr().out
    assert "run against baseline: no difference beyond 2 standard errors" in printed
    assert (copy / "eval" / "eval.json").stat().st_mtime_ns == made
    record = read(tmp_path / "comparison" / "comparison.json")
    assert [run["baseline"] for run in record["runs"]] == ["baseline", None]
    assert [run["eval"] for run in record["runs"]] == [
        str(tmp_path / name / "eval" / "eval.json") for name in ("run", "baseline")
    ]
    (matched,) = record["shrink_matched"]
    assert (matched["scale"], matched["paired"]) == (1.0, True)
    assert "no difference beyond 2 standard errors" in (tmp_path / "comparison" / "comparison.md").read_text()
    assert call(monkeypatch, "--compare", copy, tmp_path / "baseline", "--out", tmp_path / "elsewhere") == 0
    assert (tmp_path / "elsewhere" / "comparison.json").is_file()


def test_help_needs_no_torch(tmp_path):
    code = (
        "import sys; sys.argv = ['jsae-eval', '--help']\n"
        "from jsae_lightning.evaluate import main\n"
        "main()\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules\n"
    )
    assert run([sys.executable, "-c", code], output=tmp_path / "output") == 0, (tmp_path / "output").read_text()
    text = (tmp_path / "output").read_text()
    for word in ("usage: jsae-eval", "--compare", "jacobian_tokens", "c4", "batch_sequences", "num_threads"):
        assert word in text, word


def test_mistakes_in_the_call_need_no_torch(copy, tmp_path):
    mistakes = (
        ([str(copy), "tokens=3"], "tokens: there is no such key: did you mean eval.tokens?"),
        ([str(tmp_path / "nowhere")], f"{tmp_path / 'nowhere'}: there is no such folder"),
    )
    for number, (arguments, said) in enumerate(mistakes):
        code = (
            f"import sys; sys.argv = ['jsae-eval', *{arguments}]\n"
            "from jsae_lightning.evaluate import main\n"
            "try:\n    main()\n"
            "finally:\n    assert 'torch' not in sys.modules and 'lightning' not in sys.modules\n"
        )
        output = tmp_path / f"output{number}"
        assert run([sys.executable, "-c", code], output=output) == 2
        text = output.read_text()
        assert text.startswith(f"jsae-eval: error: {said}") and len(text.splitlines()) == 1, text


@pytest.mark.slow
def test_two_ranks_equal_one(copy, tmp_path):
    """By torchrun: the sequences are shared out, rank 0 alone writes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    arguments = [*launch, "-m", "jsae_lightning.evaluate", str(copy), "eval.tokens=176", "num_threads=1"]
    assert run(arguments, output=tmp_path / "output") == 0, (tmp_path / "output").read_text()
    two = read(copy / "eval" / "eval.json")
    assert two["evaluation"]["ranks"] == 2
    arrays = load_file(copy / "eval" / "arrays.safetensors")
    one = read(evaluate_folder(copy, ["eval.tokens=176", f"eval.out={tmp_path / 'one'}"]))
    assert (one["evaluation"]["ranks"], one["evaluation"]["sequences"]) == (1, 11)
    for key, figure in one["figures"].items():
        # An area is a share of what the edges explain, here of 0.03 nats out of 6, which float32 holds to 2e-5 of it.
        atol = 5e-6 if "_area_" in key else None
        assert two["figures"][key]["mean"] == pytest.approx(figure["mean"], rel=1e-6, abs=atol), key
        error, found = figure["standard_error"], two["figures"][key]["standard_error"]
        assert found == (error if error is None else pytest.approx(error, rel=1e-3, abs=1e-9)), key
    for name, array in load_file(tmp_path / "one" / "arrays.safetensors").items():
        torch.testing.assert_close(arrays[name], array, rtol=1e-4, atol=1e-6, msg=name)
    assert (tmp_path / "output").read_text().count("results: ") == 1
