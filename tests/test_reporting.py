"""The report without a browser: what is read, drawn, escaped and left out."""

import hashlib
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from jsae_lightning import report as report_module
from jsae_lightning.errors import UserError
from jsae_lightning.report import write_report
from jsae_lightning.reporting import (
    figures_fidelity,
    figures_graph,
    figures_jacobian,
    figures_tradeoff,
    sections,
    style,
)
from jsae_lightning.reporting.building import read_runs
from jsae_lightning.reporting.graph_reader import TOP_EDGES, explorer_data, read_graph
from jsae_lightning.reporting.html import script_json
from jsae_lightning.reporting.readers import Number, find_evaluations, read_comparison, read_evaluation, unique_names
from jsae_lightning.reporting.tables import number_text, table
from report_fixtures import K, make_evaluation, make_graph, make_run, make_sweep
from sweep_folders import make_job


def write_pair(run, evaluated_weights, weights):
    """Give a run an exported pair, and its evaluation the hash of the weights that were judged."""
    (run / "sae_pair").mkdir()
    (run / "sae_pair" / "config.json").write_text("{}")
    (run / "sae_pair" / "model.safetensors").write_bytes(weights)
    path = run / "eval" / "eval.json"
    record = json.loads(path.read_text())
    record["evaluation"]["pair_hash"] = hashlib.sha256(evaluated_weights).hexdigest()
    path.write_text(json.dumps(record))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A sweep and a run whose texts are hostile; not to be changed."""
    folder = tmp_path_factory.mktemp("report")
    make_sweep(folder / "sweep", coefs=(0.0, 1.0))
    make_run(folder / "run", hostile=True)
    return folder


@pytest.fixture(scope="module")
def run_page(root, tmp_path_factory):
    """The page on the run, drawn once: that takes seconds."""
    return write_report(root / "run", out=tmp_path_factory.mktemp("out"), evaluate=False)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process; return exit code, standard output and standard error."""

    def run_command(*arguments):
        monkeypatch.setattr(sys, "argv", ["jsae-report", *map(str, arguments)])
        code = 0
        try:
            report_module.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


def write_least(folder, name="n"):
    """Write the least that an `eval.json` can hold, which draws nothing."""
    folder.mkdir(parents=True)
    content = {"format_version": 1, "name": name, "pair": {}, "figures": {"val/x": {"mean": math.nan}}}
    (folder / "eval.json").write_text(json.dumps(content))
    return folder


class Page(HTMLParser):
    """A page as a browser would take it apart: tags, and the texts of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.scripts and self.lasttag == "script":
            self.scripts[-1] += data
        else:
            self.text += data


def test_folders_of_every_kind(root, tmp_path):
    run = root / "run"
    assert find_evaluations(run).evaluated == find_evaluations(run / "eval").evaluated == [(run / "eval", {})]
    sweep = find_evaluations(root / "sweep")
    assert [path.parent.name for path, _ in sweep.evaluated] == ["0", "1", "2"]
    assert [overrides["jacobian.coef"] for _, overrides in sweep.evaluated] == [0, 1, 1]
    assert sweep.is_sweep and sweep.comparison == root / "sweep" / "comparison" / "comparison.json"
    compared = find_evaluations(root / "sweep" / "comparison")
    assert [path for path, _ in compared.evaluated] == [path for path, _ in sweep.evaluated][:2]
    # The comparison beside a run is about that run only if it names it.
    assert find_evaluations(root / "sweep" / "0").comparison is not None
    assert find_evaluations(root / "sweep" / "2").comparison is None
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text("{}")
    assert [job.folder for job in find_evaluations(export).missing] == [export]
    make_evaluation(export / "eval", graph=False)
    assert find_evaluations(export).evaluated == [(export / "eval", {})]


def test_an_evaluation_is_read(root):
    run = read_evaluation(root / "run" / "eval")
    written = json.loads((root / "run" / "eval" / "eval.json").read_text())
    key = "jacobian/effective_edges"
    assert run.mean(key) == written["figures"][key]["mean"]
    assert run.error(key) == written["figures"][key]["standard_error"]
    assert "val/unknown" not in run.figures  # null: it has no value
    assert (run.coef, run.entries, run.kind, run.is_random) == (1.0, K * K, "jsae", False)
    assert run.curves["edge_ce/random"].x == [0, 1, 2, 4, 8, 16, 32, 64]
    assert run.arrays["heatmap"].shape == (8, K, K)


def test_names_tell_what_varies(root):
    names = [run.name for run in read_runs(find_evaluations(root / "sweep"))]
    assert names == ["0: coef=0.0", "1: coef=1.0", "2: coef=1.0, random_weights=True"]
    assert unique_names(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "eval.json").write_text("{"), "no valid JSON"),
        (lambda folder: (folder / "eval.json").write_text("[]"), "no JSON object"),
        (lambda folder: (folder / "eval.json").write_text('{"format_version": 9}'), "format_version 9 is not 1"),
        (lambda folder: (folder / "arrays.safetensors").write_bytes(b"torn"), "no safetensors file"),
        (lambda folder: (folder / "graph" / "edges.parquet").write_bytes(b"torn"), "a table is damaged"),
        (lambda folder: (folder / "graph" / "latents.parquet").write_bytes(b"torn"), "a table is damaged"),
    ],
)
def test_damaged_files_are_named(root, tmp_path, command, damage, message):
    folder = tmp_path / "run"
    write_least(folder / "eval")
    shutil.copytree(root / "run" / "eval" / "graph", folder / "eval" / "graph")
    damage(folder / "eval")
    code, _, err = command(folder, "--no-evaluate")
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (folder / "report" / "report.html").exists()


@pytest.mark.parametrize(("at", "label"), [("input", "the true output"), ("reconstruction", "f(x_hat)")])
def test_edge_curves_say_what_the_output_sae_reads(root, at, label):
    (run,) = read_runs(find_evaluations(root / "run"))
    figure = figures_fidelity.edge_curves(replace(run, evaluation=run.evaluation | {"at": at}), "edge_ce")
    assert f"output SAE on {label}" in figure.axes[0].get_legend_handles_labels()[1]


def test_mistakes_of_the_command_line(root, tmp_path, command):
    for arguments, message in (
        ((), "DIR"),
        ((tmp_path / "nowhere",), "no such folder"),
        ((tmp_path,), "give the folder of a run"),
        ((root / "run", "--bad"), "--bad"),
        ((root / "run", "word"), "no override"),
        ((root / "run", "eval.tokens=5", "--no-evaluate"), "--no-evaluate"),
    ):
        code, out, err = command(*arguments)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1, arguments
    make_job(tmp_path / "0", "sae.k=1")
    code, _, err = command(tmp_path)
    assert code == 2 and "no exported pair yet" in err


def test_missing_pairs_are_evaluated_and_failures_noted(tmp_path, monkeypatch, capsys):
    import types

    calls = []

    def evaluate_folder(folder, overrides):
        calls.append((folder.name, overrides))
        if folder.name == "1":
            raise UserError("data: gone: bring it back")
        shutil.rmtree(folder / "eval", ignore_errors=True)
        write_least(folder / "eval", name=folder.name)

    def compare_folders(folders, overrides, *, out):
        calls.append((folders, out))
        raise UserError("the tokens differ")

    modules = {
        "evaluate": {"evaluate_folder": evaluate_folder},
        "comparison_files": {"compare_folders": compare_folders},
    }
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, f"jsae_lightning.{name}", types.SimpleNamespace(**content))
    for number in range(4):
        folder = make_job(tmp_path / str(number), f"sae.k={number}")
        if number < 3:
            (folder / "sae_pair").mkdir()
            (folder / "sae_pair" / "config.json").write_text("{}")
    page = write_report(tmp_path)
    assert [name for name, _ in calls[:3]] == ["0", "1", "2"]
    assert calls[3:] == [([str(tmp_path / "0"), str(tmp_path / "2")], str(tmp_path / "comparison"))]
    out = capsys.readouterr().out
    for note in ("1 could not be evaluated: data: gone", "3 has no exported pair yet", "tokens differ"):
        assert note in out and note in page.read_text(encoding="utf-8")
    calls.clear()
    write_report(tmp_path, ["eval.tokens=9"])  # what is there may have been made with other settings
    assert [call for call in calls[:3] if isinstance(call[0], str)] == [
        ("0", ["eval.tokens=9"]), ("2", ["eval.tokens=9"]), ("1", ["eval.tokens=9"])
    ]  # fmt: skip


def test_report_of_a_run(run_page):
    text = run_page.read_text(encoding="utf-8")
    page = Page(text)
    assert len(text) < 15_000_000
    # Nothing is loaded: no address outside of the page in any attribute, and a policy that forbids it.
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert "default-src 'none'" in text and "@import" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    svgs = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(svgs) >= 18 and all(svg["role"] == "img" and len(svg["aria-label"]) > 10 for svg in svgs)
    assert [tag for tag, _ in page.tags].count("figcaption") == len(svgs)
    figures = run_page.parent / "figures"
    names = {path.name for path in figures.iterdir()}
    assert len(names) == 2 * len(svgs) and {"thresholds.png", "thresholds.svg"} <= names
    for path in figures.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000, path


def test_hostile_texts_stay_texts(run_page):
    page = Page(run_page.read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("script") == 2 == len(page.scripts)
    (data,) = json.loads(page.scripts[0])
    tokens = {token for examples in data["contexts"].values() for item in examples for token in item["tokens"]}
    assert {"</script>", '"', "\u2028", "<!--", "مرحبا"} <= tokens
    assert data["scores"]["output-1"][0]["explanation"] == "</script><script>window.hacked = 1</script>"
    assert "tiny/model<1>" in page.text  # escaped, and read as it was


def test_script_json():
    value = {"a": "</script><!-- & \u2028\u2029 \ud800"}
    text = script_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"a": "</script><!-- & \u2028\u2029 ?"}
    with pytest.raises(ValueError):
        script_json(math.nan)


def test_missing_parts_are_left_out_with_what_to_run(tmp_path):
    run = make_run(tmp_path / "run", fidelity=False, graph=False)
    (run / "eval" / "arrays.safetensors").unlink()
    page = Page(write_report(run, evaluate=False).read_text(encoding="utf-8"))
    for title in (
        "Histogram of |J|",
        "J of example tokens",
        "Second derivatives",
        "Global graph: strength of its edges",
    ):
        assert re.search(rf"{re.escape(title)}[^:]*: Its data are not in the evaluation: run jsae-eval ", page.text), (
            title
        )
    assert not [attributes for _, attributes in page.tags if attributes.get("id") == "explorer-form"]
    assert [tag for tag, _ in page.tags].count("svg") == 4


def test_an_evaluation_with_next_to_nothing(tmp_path):
    page = Page(write_report(write_least(tmp_path / "eval"), evaluate=False).read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("svg") == 0
    assert "Not shown" in page.text


@pytest.mark.slow
def test_report_of_a_sweep(root, tmp_path):
    page = Page(write_report(root / "sweep", out=tmp_path, evaluate=False).read_text(encoding="utf-8"))
    assert "1 has 20 % fewer effective edges than 0" in page.text
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert {"trade-off-raw", "trade-off-scale-free", "random-models", "shrunk-baseline", "run-1-edge-kl"} <= names
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    (data,) = json.loads(page.scripts[0])
    assert data["name"] == "1: coef=1.0"


def test_figures_of_many_runs_show_some(root):
    runs = [read_evaluation(root / "run" / "eval", name=str(number)) for number in range(30)]
    shown = [run.name for run in sections.shown_runs(runs)]
    assert len(shown) == sections.MAX_SERIES and (shown[0], shown[-1]) == ("0", "29")


def test_slope_and_r2_by_hand():
    p, m = np.array([1.0, 2.0]), np.array([2.0, 3.0])
    # slope (2 + 6) / 5 = 1.6; residuals .4, -.2: .2; spread about 2.5: .5
    assert figures_fidelity.slope_and_r2(p, m) == pytest.approx((1.6, 0.6))
    assert all(map(math.isnan, figures_fidelity.slope_and_r2(np.zeros(3), np.ones(3))))
    assert figures_fidelity.slope_and_r2(p, -3 * p) == pytest.approx((-3, 1))


def test_shares_of_classes_add_up(root):
    shares = figures_fidelity.linearity_shares(read_evaluation(root / "run" / "eval"))
    assert shares == pytest.approx({"linear": 0.72, "jump_relu": 0.135, "other": 0.045, "flat": 0.1})


def test_cumulative_share_by_hand():
    counts, share = figures_graph.cumulative_share(np.array([1.0, 4.0, 3.0, 0.0]))
    assert counts.tolist() == [1, 2, 3, 4] and share.tolist() == [0.5, 0.875, 1, 1]
    assert len(figures_graph.cumulative_share(np.zeros(2))[0]) == 0


def test_bars_are_as_high_as_the_figures(root):
    runs = read_runs(find_evaluations(root / "sweep"))
    axes = figures_jacobian.threshold_bars(runs).axes[0]
    heights = [
        bar.get_height() for container in axes.containers if hasattr(container, "patches") for bar in container.patches
    ]
    expected = [100 * run.mean(f"jacobian/share_above_{t}") for run in runs for t in ("0.005", "0.01", "0.015", "0.02")]
    assert heights == pytest.approx(expected)


def test_distribution_function_ends_at_all_entries(root):
    run = read_evaluation(root / "run" / "eval")
    edges, counts = figures_jacobian.histogram(run, "abs")
    (line,) = figures_jacobian.abs_distribution([run], "abs", cumulative=True).axes[0].lines
    y = line.get_ydata()
    assert (np.diff(y) >= 0).all()
    assert y[-1] == pytest.approx(100 * counts[1:-1].sum() / counts[1:].sum())
    at = int(np.searchsorted(edges, 0.01))
    assert y[at] == pytest.approx(100 * counts[1 : at + 2].sum() / counts[1:].sum())


def test_trade_off_places_runs(root):
    runs = read_runs(find_evaluations(root / "sweep"))
    for key, scale in ((figures_tradeoff.SHARE, K * K), (figures_tradeoff.EFFECTIVE, 1)):
        axes = figures_tradeoff.trade_off(runs, key).axes[0]
        assert list(axes.lines[0].get_xdata()) == pytest.approx([runs[0].mean(key) * scale, runs[1].mean(key) * scale])
        assert sorted(text.get_text() for text in axes.texts) == ["0", "1", "1"]
    assert not figures_tradeoff.can_draw(runs[1:], figures_tradeoff.SHARE)  # of one weight


def varied(run, name, coef, *, model=None, k=None, d_sae=None, tokens=None, **jacobian):
    from dataclasses import replace

    pair = json.loads(json.dumps(run.pair))
    pair["jacobian"] |= {"coef": coef} | jacobian
    pair["model"] |= {"mlp_hash": model} if model else {}
    pair["input_sae"] |= ({"k": k} if k else {}) | ({"d_sae": d_sae} if d_sae else {})
    pair |= {"tokens_seen": tokens} if tokens else {}
    return replace(run, name=name, pair=pair)


def test_lines_join_runs_of_one_penalty_on_one_model(root):
    run = read_runs(find_evaluations(root / "sweep"))[0]
    runs = [
        varied(run, "hoyer 2", 2.0, penalty="hoyer"),
        varied(run, "none", 0.0),
        varied(run, "l1 1", 1.0),
        varied(run, "hoyer 1", 1.0, penalty="hoyer"),
        varied(run, "contribution", 1.0, edges="contribution"),
    ]
    names = {label: [run.name for run in line] for label, line in figures_tradeoff.lines_of(runs).items()}
    assert names == {
        "l1": ["none", "l1 1"],
        "hoyer": ["none", "hoyer 1", "hoyer 2"],
        "l1, edges=contribution": ["none", "contribution"],
    }
    apart = [
        varied(run, "at", 1.0, at="reconstruction"),
        varied(run, "model", 1.0, model="1" * 64),
        varied(run, "k", 1.0, k=4),
        varied(run, "alone", 0.0, k=2),
    ]
    lines = figures_tradeoff.lines_of([*runs, *apart])
    assert sorted([run.name for run in line] for line in lines.values())[:4] == [["alone"], ["at"], ["k"], ["model"]]
    assert any(label.endswith("k=4: l1") for label in lines)
    axes = figures_tradeoff.trade_off(runs, figures_tradeoff.EFFECTIVE).axes[0]
    drawn = sorted(len(container.lines[0].get_xdata()) for container in axes.containers)
    assert drawn == sorted(3 * [len(line) for line in figures_tradeoff.lines_of(runs).values()])
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["l1", "hoyer", "l1, edges=contribution", "both SAEs", "input SAE", "output SAE"]


def test_lines_join_pairs_of_one_size(root):
    run = read_runs(find_evaluations(root / "sweep"))[0]
    small = {"d_sae": 1024, "tokens": 1_000_000}
    sizes = {"small": small, "wide": small | {"d_sae": 8192}, "long": small | {"tokens": 2_000_000}}
    runs = [varied(run, f"{name} {coef:g}", coef, **size) for coef in (0.0, 0.5, 1.0) for name, size in sizes.items()]
    lines = figures_tradeoff.lines_of(runs)
    assert sorted([run.name for run in line] for line in lines.values()) == [
        [f"{name} 0", f"{name} 0.5", f"{name} 1"] for name in sorted(sizes)
    ]
    assert any(label.endswith(", 8,192 latents, 1,000,000 tokens: l1") for label in lines)


def test_heat_maps_normalised_do_not_depend_on_scale(root):
    from dataclasses import replace

    run = read_evaluation(root / "run" / "eval")
    scaled = replace(run, arrays=run.arrays | {"heatmap": run.arrays["heatmap"] / 10})
    for normalized, ratio in ((True, 1), (False, 10)):
        maps = [
            figures_jacobian.heat_maps(r, normalized=normalized).axes[0].images[0].get_array() for r in (run, scaled)
        ]
        np.testing.assert_allclose(maps[0], ratio * maps[1], rtol=1e-5)


def test_svg_in_a_page_has_its_colours_and_no_mathematics(root):
    from dataclasses import replace

    run = replace(read_evaluation(root / "run" / "eval"), name="$x^2$ <b>&")
    figure = figures_jacobian.measure_bars([run])
    svg = style.to_svg(figure)
    assert svg == style.to_svg(figure)  # the same for the same data
    inline = style.inline_svg(svg, title='a "title"', key="k")
    assert inline.startswith('<svg role="img" aria-label="a &quot;title&quot;"')
    assert "$x^2$ &lt;b&gt;&amp;" in inline
    assert style.INK not in inline and "var(--ink)" in inline and "var(--paper)" in inline


def test_the_explorer_keeps_the_strongest_edges(root):
    graph = read_graph(root / "run" / "eval")
    data = explorer_data(graph, root / "run" / "eval", max_bytes=10**7)
    edges = list(zip(graph.output.tolist(), graph.input.tolist(), graph.mean_abs.tolist(), strict=True))
    kept = {(edge[0], edge[1]) for edge in data["edges"]}
    for output in range(40):
        own = sorted((edge for edge in edges if edge[0] == output), key=lambda edge: -edge[2])
        assert {edge[:2] for edge in own[:TOP_EDGES]} <= kept
    strengths = [sum(edge[2] for edge in edges if edge[0] == output) for output in data["outputs"]]
    assert strengths == sorted(strengths, reverse=True) and len(strengths) == 40
    assert data["latents"]["output-3"]["strength"] == pytest.approx(strengths[data["outputs"].index(3)], rel=0.01)
    sizes = [edge[2] for edge in data["edges"]]
    assert sizes == sorted(sizes, reverse=True)


def test_the_explorer_stays_within_its_limit_and_says_so(root, tmp_path):
    make_graph(tmp_path / "graph", np.random.default_rng(0), hostile=False)
    graph = read_graph(tmp_path)
    size = [len(script_json(explorer_data(graph, tmp_path, max_bytes=limit))) for limit in (80_000, 120_000, 10**7)]
    assert size[0] < 81_000 < size[1] < 121_000 < size[2]
    left_out = explorer_data(graph, tmp_path, max_bytes=80_000)["left_out"]
    assert any(re.match(r"the contexts of [0-9]+ latents", text) for text in left_out)
    everything = explorer_data(graph, tmp_path, max_bytes=10**7)["left_out"]
    assert not any("contexts" in text for text in everything)


def test_pairs_that_were_trained_on_are_judged_again(tmp_path, monkeypatch, capsys):
    """Without overrides too: the figures are of weights that are no more. What is up to date is left alone."""
    for name in ("0", "1"):
        make_job(tmp_path / name)
        write_least(tmp_path / name / "eval", name).joinpath("eval.json").write_text(
            json.dumps({"format_version": 1, "name": name, "pair": {}, "figures": {}, "evaluation": {}})
        )
    write_pair(tmp_path / "0", b"same", b"same")
    write_pair(tmp_path / "1", b"earlier", b"later")
    judged = []
    functions = {
        "evaluate": {"evaluate_folder": lambda folder, overrides: judged.append((folder, overrides))},
        "comparison_files": {"compare_folders": lambda *_, **__: None},
    }
    for module, replaced in functions.items():
        for name, function in replaced.items():
            monkeypatch.setattr(f"jsae_lightning.{module}.{name}", function)
    write_report(tmp_path, evaluate=False)
    assert not judged
    assert "1 was trained on after its evaluation" in (told := capsys.readouterr().out)
    assert "0 was trained on" not in told
    write_report(tmp_path)
    assert judged == [(tmp_path / "1", [])]


def test_numbers_and_sorting_keys():
    assert number_text(Number(0.123456, 0.00123)) == '0.1235 <span class="se">± 0.0012</span>'
    assert number_text(Number(5.0)) == "5"
    assert number_text(1234567) == "1,234,567"
    html = table(["<a>", "b"], [["<x>", Number(1e-9)], [None, True]], "c & d")
    assert "&lt;a&gt;" in html and 'data-value="1e-09"' in html and 'data-value="&lt;x&gt;"' in html
    assert 'data-value=""' in html and 'data-value="True"' in html and "c &amp; d" in html


def test_comparison_that_is_damaged(tmp_path):
    (tmp_path / "comparison.json").write_text('{"findings": null, "shrink_matched": [3, {"figures": 5}]}')
    comparison = read_comparison(tmp_path / "comparison.json")
    assert comparison.findings == [] and comparison.shrink_matched == [{"figures": {}}]
    (tmp_path / "comparison.json").write_text('{"runs": [{"eval": "gone.json"}]}')
    with pytest.raises(UserError, match="no such file any more"):
        find_evaluations(tmp_path)
