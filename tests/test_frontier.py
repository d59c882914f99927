"""Frontiers of penalties: the geometry by hand, and the files of made-up runs."""

import json
import math
import shutil
import sys

import pytest

from jsae_lightning import frontier as module
from jsae_lightning.errors import UserError
from jsae_lightning.frontier import Point, frontier, frontier_table, lost, read_at, read_points, split_baseline


def _metrics(ev_in: float, ev_out: float, edges: float) -> dict[str, float]:
    return {
        "val/explained_variance_input": ev_in,
        "val/explained_variance_output": ev_out,
        "jacobian/effective_edges": edges,
        "jacobian/effective_edges_per_output": edges / 16,
        "jacobian/edges_for_90": edges / 12,
    }


def test_points_that_another_beats_are_not_on_the_frontier():
    points = [(0.05, 60.0), (0.0, 100.0), (0.02, 90.0), (0.03, 95.0), (0.1, 60.0)]
    assert frontier(points) == [(0.0, 100.0), (0.02, 90.0), (0.05, 60.0)]
    assert frontier(points[::-1]) == frontier(points)
    assert frontier([]) == []


def test_edges_between_two_points_and_beyond_them():
    points = [(0.0, 100.0), (0.02, 90.0), (0.05, 60.0)]
    assert read_at(points, 0.01) == pytest.approx(95)
    assert read_at(points, 0.02) == pytest.approx(90)
    assert read_at(points, 0.03) == pytest.approx(80)
    assert read_at(points, 0.3) == 60
    assert math.isnan(read_at(points[1:], 0.01))


def test_what_rides_along_is_read_at_the_frontier_of_the_edges():
    points = [(0.0, 100.0, 0.4), (0.02, 90.0, 0.2), (0.03, 95.0, 0.9), (0.04, 60.0, -0.5)]
    assert [point[2] for point in frontier(points)] == [0.4, 0.2, -0.5]
    assert read_at(points, 0.01, 2) == pytest.approx(0.3)
    assert read_at(points, 0.03, 2) == pytest.approx(-0.15)  # the run at .03 that has more edges does not count
    assert read_at(points, 0.5, 2) == -0.5


def test_what_is_lost_is_the_worse_of_the_two_saes_against_the_mean_baseline():
    points = [
        Point("a", "l1", 0.0, _metrics(0.90, 0.80, 100), {}),
        Point("b", "l1", 0.0, _metrics(0.92, 0.82, 104), {}),
        Point("c", "l1", 1.0, _metrics(0.90, 0.75, 50), {}),
        Point("d", "hoyer", 1.0, _metrics(0.95, 0.85, 50), {}),
    ]
    baseline, penalties = split_baseline(points)
    assert baseline["jacobian/effective_edges"] == 102
    assert lost(points[2].metrics, baseline) == pytest.approx(0.06)
    assert lost(points[3].metrics, baseline) == 0
    assert {name: [run.name for run in runs] for name, runs in penalties.items()} == {"l1": ["c"], "hoyer": ["d"]}


def test_without_a_baseline_there_is_nothing_to_lose():
    with pytest.raises(UserError, match=r"jacobian\.coef=0"):
        split_baseline([Point("c", "l1", 1.0, _metrics(0.9, 0.8, 50), {})])


@pytest.fixture
def sweep(tmp_path):
    runs = {
        "0": ({"penalty": "l1", "coef": 0.0}, _metrics(0.9, 0.8, 100)),
        "1": ({"penalty": "l1", "coef": 1.0}, _metrics(0.9, 0.76, 80)),
        "2": ({"penalty": "hoyer", "coef": 0.1, "edges": "contribution"}, _metrics(0.9, 0.78, 25)),
        "3": ({"penalty": "hoyer", "coef": 0.1, "edges": "jacobian"}, _metrics(0.9, 0.79, 90)),
    }
    for name, (jacobian, metrics) in runs.items():
        folder = tmp_path / name
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "overrides.yaml").write_text("[]\n")
        (folder / "sae_pair").mkdir()
        (folder / "sae_pair" / "config.json").write_text(json.dumps({"jacobian": jacobian, "model": {"mlp_hash": "a"}}))
        (folder / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "4" / ".hydra").mkdir(parents=True)  # a job that has not ended
    (tmp_path / "4" / ".hydra" / "overrides.yaml").write_text("[]\n")
    return tmp_path


def test_a_sweep_is_read_and_ranked_by_read_at_the_allowed_loss(sweep):
    points = read_points([sweep])
    assert sorted(point.penalty for point in points) == ["hoyer", "hoyer, edges=contribution", "l1", "l1"]
    lines = frontier_table(points, ["jacobian/effective_edges"], [0.02]).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "none (weight 0)",
        "hoyer, edges=contribution",
        "hoyer",
        "l1",
    ]
    assert "25.0 (4.00x)" in lines[3]
    assert "90.0 (1.11x)" in lines[4]


def _judge(sweep, areas: dict[str, float]) -> None:
    for name, area in areas.items():
        (sweep / name / "eval").mkdir()
        content = {"figures": {module.AREA: {"mean": area, "standard_error": 0.01}}}
        (sweep / name / "eval" / "eval.json").write_text(json.dumps(content))


def test_areas_stand_beside_the_edges_once_all_runs_are_judged(sweep):
    _judge(sweep, {"0": 0.4, "1": 0.5, "2": -0.1})
    assert "area" not in frontier_table(read_points([sweep]), [module.EFFECTIVE])
    _judge(sweep, {"3": 0.2})
    points = read_points([sweep])
    lines = [
        [cell.strip() for cell in line.split("|")] for line in frontier_table(points, [module.EFFECTIVE]).split("\n")
    ]
    assert lines[0][-2] == "edge-curve area at 0.1"
    assert {line[1]: line[-2] for line in lines[2:]} == {
        "none (weight 0)": "0.400",
        "hoyer, edges=contribution": "-0.100",
        "hoyer": "0.200",
        "l1": "0.500",
    }
    assert "| edge-curve area |" in module.points_table(points, [module.EFFECTIVE]).split("\n")[0]


def test_the_figure_has_a_panel_for_each_measure_and_one_for_areas(sweep):
    keys = [module.EFFECTIVE, "jacobian/edges_for_90"]
    assert len(module.frontier_figure(read_points([sweep]), keys).axes) == 2
    _judge(sweep, {"0": 0.4, "1": 0.5, "2": -3.0, "3": 0.2})
    panels = module.frontier_figure(read_points([sweep]), keys).axes
    assert [axes.get_ylabel() for axes in panels] == ["effective edges", "edges for 90", "edge-curve area"]
    lines = [line.get_xydata().tolist() for line in panels[2].lines]
    assert [[0.0, 0.4], [pytest.approx(0.02), -3.0]] in lines  # from the baseline to the only run of a penalty
    assert panels[2].get_ylim()[0] == -1  # what is worse than that is worse


def test_seeds_of_one_weight_are_one_point(sweep):
    """Else the luckiest of them would be read, and the more of them the better."""
    for name, ev_out, edges in (("5", 0.77, 20), ("6", 0.79, 30)):
        shutil.copytree(sweep / "2", sweep / name)
        (sweep / name / "metrics.json").write_text(json.dumps(_metrics(0.9, ev_out, edges)))
    points = read_points([sweep])
    (line,) = [
        line for line in frontier_table(points, [module.EFFECTIVE], [0.02]).split("\n") if "contribution" in line
    ]
    assert [cell.strip() for cell in line.split("|")][2:4] == ["3", "25.0 (4.00x)"]
    (panel,) = module.frontier_figure(points).axes
    assert [[0.0, 100.0], [pytest.approx(0.02), 25.0]] in [line.get_xydata().tolist() for line in panel.lines]


@pytest.mark.parametrize(
    ("part", "key", "name_of_it"),
    [
        ("recipe", "optim.lr", "optim.lr"),
        ("data", "batch_tokens", "data.batch_tokens"),
        ("data", "context_length", "data.context_length"),
    ],
)
def test_runs_of_two_recipes_are_not_mixed(part, key, name_of_it, sweep):
    for name, value in (("1", 1e-3), ("2", 1e-3), ("3", 2e-3)):  # an older export, "0", does not tell
        config = sweep / name / "sae_pair" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {part: {key: value}}))
        if part == "data":
            config = sweep / "0" / "sae_pair" / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {part: {key: 1e-3}}))
    with pytest.raises(UserError, match=rf"3: {name_of_it} is 0\.002, but 0\.001 in"):
        read_points([sweep])


def test_runs_of_two_models_are_not_mixed(sweep):
    config = sweep / "2" / "sae_pair" / "config.json"
    config.write_text(config.read_text().replace('"mlp_hash": "a"', '"mlp_hash": "b"'))
    with pytest.raises(UserError, match=r"2: model\.mlp_hash is b, but a in 0"):
        read_points([sweep])


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("jacobian", {"at": "reconstruction"}, r"jacobian\.at is reconstruction, but input"),
        ("data", {"source": "hub"}, r"data\.source is hub, but text"),
        ("data", {"path": "other.txt"}, r"data\.path is /.*/other\.txt, but /.*/a\.txt"),
        ("data", {"val_sequences": 16}, "held-out tokens is 1024, but 2048"),
        ("eval", {"num_sequences": 8}, "held-out tokens is 512, but 2048"),
    ],
)
def test_runs_judged_otherwise_are_not_mixed(sweep, key, change, message):
    data = {"source": "text", "path": "a.txt", "name": None, "val_sequences": 32, "context_length": 64}
    for name in "0123":
        path = sweep / name / "sae_pair" / "config.json"
        config = json.loads(path.read_text()) | {"data": data}
        if name == "2" and key == "eval":
            (sweep / name / ".hydra" / "config.yaml").write_text(json.dumps({"eval": change}))
        elif name == "2":
            config[key] = config[key] | change
        path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"2: {message} in 0"):
        read_points([sweep])


def test_the_command_writes_table_and_figures(sweep, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jsae-frontier", str(sweep), "--loss", "0.02", "0.05"])
    module.main()
    assert "4.00x" in capsys.readouterr().out
    assert "0.02 EV lost" in (sweep / "frontier.md").read_text()
    assert (sweep / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (sweep / "frontier.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "there is no such folder"), (["."], "no finished run"), (["SWEEP", "--sparsity", "a/b"], "no a/b")],
)
def test_mistakes_are_one_line(sweep, tmp_path_factory, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    monkeypatch.setattr(sys, "argv", ["jsae-frontier", *(str(sweep) if a == "SWEEP" else a for a in arguments)])
    with pytest.raises(SystemExit) as error:
        module.main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err
