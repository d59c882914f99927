"""Comparisons of evaluations whose Jacobians are known: merely smaller, really sparser, and neither."""

import json
import math

import pytest
import torch

from jsae_lightning import comparison_files, jacobian_metrics
from jsae_lightning.comparison import (
    compare,
    difference,
    find_baseline,
    find_random,
    read_judged,
    relative_difference,
    shrink_match,
)
from jsae_lightning.comparison_files import check_same_data, compare_folders, write_comparison
from jsae_lightning.comparison_findings import _judge_remaining, direction
from jsae_lightning.errors import UserError
from jsae_lightning.evaluation_files import write_evaluation
from jsae_lightning.evaluation_parts import PartResult
from jsae_lightning.fine_histogram import fine_histogram
from jsae_lightning.jackknife import Figure, leave_one_out, standard_error

GROUPS, TOKENS, K = 12, 30, 4
SCALE = 0.434
SETTINGS = {"data.source": "text", "data.exclude_special_tokens": False, "eval.tokens": 1000,
            "eval.exclude_first_position": False}  # fmt: skip


def draw(seed=0):
    """Jacobians (groups, tokens, k, k), float32, whose scale differs from group to group."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 1 + 0.2 * torch.rand(GROUPS, 1, 1, 1, generator=generator)
    return 0.03 * sizes * torch.randn(GROUPS, TOKENS, K, K, generator=generator)


def only_the_largest(values, count=4):
    """Keep so many of each token's entries, at unchanged size."""
    magnitudes = values.abs().flatten(-2)
    threshold = magnitudes.topk(count, dim=-1).values[..., -1:]
    return torch.where(magnitudes >= threshold, values.flatten(-2), 0.0).view_as(values)


def sums_of(values):
    active = torch.ones(len(values), K, dtype=torch.bool)
    return jacobian_metrics.jacobian_sums(values, active, active)


@pytest.fixture
def judge(tmp_path):
    """Write the evaluation of a pair with these Jacobians, and read it back."""

    def make(values, name="run", *, coef=1.0, weights=False, tokens_hash="same", layer=3, folder=None, **changes):
        def figures(sums):
            return {f"jacobian/{key}": mean for key, mean in jacobian_metrics.jacobian_means(sums).items()}

        means, left_out = leave_one_out([sums_of(part) for part in values], figures)
        columns = {key: torch.tensor([entry[key] for entry in left_out]).double() for key in means}
        site = {"d_model": 8, "d_sae": changes.get("d_sae", 32), "k": K}
        pair = {
            "input_sae": site, "output_sae": site, "seed": 0, "tokens_seen": changes.get("tokens_seen", 1),
            "data": changes.get("data", {}), **changes.get("more", {}),
            "model": {"name": "tiny", "revision": None, "layer": layer, "random_weights": weights, "synthetic": None,
                      "mlp_hash": f"{layer} {weights}"} | changes.get("model", {}),
            "jacobian": {"penalty": "l1", "coef": coef},
        }  # fmt: skip
        evaluation = {
            "tokens": GROUPS * TOKENS, "jacobian_tokens": GROUPS * TOKENS, "sequences": GROUPS, "documents": GROUPS,
            "groups": GROUPS, "at": "input", "other_at": "reconstruction", "tokens_hash": tokens_hash,
            "settings": SETTINGS | changes.get("settings", {}),
        }  # fmt: skip
        record = {
            "format_version": 1, "name": name, "folder": name, "random_weights": weights, "pair": pair,
            "kind": "jsae" if coef else "traditional", "evaluation": evaluation, "versions": {},
        }  # fmt: skip
        result = PartResult(
            figures={key: Figure(mean, standard_error(columns[key])) for key, mean in means.items()},
            replicates=columns,
            groups={
                "fine_histograms": torch.stack([fine_histogram(part) for part in values]),
                "entries": torch.tensor([part.numel() for part in values]),
            },
        )
        path = tmp_path / (folder or name) / "eval"
        path.mkdir(parents=True)
        write_evaluation(path, record, result)
        return read_judged(path / "eval.json")

    return make


def test_merely_smaller(judge):
    """J of the baseline times a number: every difference of the raw shares is shrinkage, and nothing is sparser."""
    base = draw()
    run, baseline = judge(SCALE * base), judge(base, "base", coef=0.0)
    (matched,) = compare([run, baseline])[1]
    assert matched.scale.mean == pytest.approx(SCALE)
    assert matched.scale.standard_error == pytest.approx(0, abs=1e-7)
    for key, rest in matched.remaining.items():
        assert abs(rest.mean) <= matched.resolution[key] < 0.01
        assert run.figure(key).mean < 0.9 * baseline.figure(key).mean
    findings = compare([run, baseline])[0]["findings"]
    start = "run against base: no difference beyond 2 standard errors in any of 4 scale-free measures"
    (line,) = [line for line in findings if line.startswith(start)]
    assert ": its entries are smaller, not fewer (effective edges " in line
    assert "differences up to 0.0 % are not excluded" in line
    shares = [line for line in findings if "share of |J|" in line]
    assert len(shares) == 2
    assert all("all of it is shrinkage" in line for line in shares)
    assert all("points that the histogram resolves" in line for line in shares)


def test_not_significant_is_not_the_same(judge):
    """Two draws, one of them smaller: too noisy to say that as many entries are left, or that all is shrinkage."""
    noisy = [draw(seed) * (1 + 2 * torch.rand(GROUPS, TOKENS, K, K, generator=torch.manual_seed(seed)) ** 8)
             for seed in (1, 2)]  # fmt: skip
    run, baseline = judge(SCALE * noisy[0][:, :2]), judge(noisy[1][:, :2], "base", coef=0.0)
    record, (matched,) = compare([run, baseline])
    change = relative_difference(run, baseline, "jacobian/effective_edges")
    most = abs(change.mean) + 2 * change.standard_error
    assert most > 0.05
    (verdict,) = record["verdicts"]
    assert "no difference beyond 2 standard errors" in verdict
    assert f"differences up to {most * 100:.1f} % are not excluded" in verdict
    assert "not fewer" not in verdict and "no sparser" not in verdict
    key = "jacobian/share_above_0.02"
    rest = matched.remaining[key]
    assert abs(rest.mean) < 2 * rest.standard_error
    (line,) = [line for line in record["findings"] if "share of |J| > 0.02" in line]
    assert "cannot be told apart from shrinkage" in line and "all of it" not in line


@pytest.mark.parametrize(
    ("mean", "error", "resolution", "groups", "expected"),
    [
        (-0.01, 0.001, 0.0, 8, "fewer entries are above it than shrinkage explains."),
        (0.01, 0.001, 0.0, 8, "shrinkage alone would leave fewer above it."),
        (-0.004, 0.0025, 0.0, 8, "all of it is shrinkage (with 95 % confidence, to within 10% of the difference)."),
        (-0.004, 0.0035, 0.0, 8, "this cannot be told apart from shrinkage."),
        (0.003, 0.001, 0.02, 8, "this cannot be told apart from shrinkage. What remains is below the 2.00 points that "
                                "the histogram resolves."),
        (-0.01, 0.001, 0.0, 7, "too few documents for a standard error to go by."),
        (-0.01, math.nan, 0.0, 8, "too few documents for a standard error to go by."),
    ],
)  # fmt: skip
def test_what_remains_of_a_difference_of_ten_points(mean, error, resolution, groups, expected):
    assert _judge_remaining(Figure(mean, error), -0.1, resolution, groups) == expected


def test_seven_groups_are_too_few_for_a_verdict(judge):
    sparse, base = only_the_largest(draw(1)), draw()
    (seven,) = compare([judge(sparse[:7]), judge(base[:7], "base", coef=0.0)])[0]["verdicts"]
    (eight,) = compare([judge(sparse[:8], "8"), judge(base[:8], "base 8", coef=0.0)])[0]["verdicts"]
    assert seven.startswith("run: too few documents") and "7 groups" in seven
    assert eight.startswith("8 is sparser than base 8")


def test_really_sparser(judge):
    base = draw()
    run, baseline = judge(only_the_largest(draw(1))), judge(base, "base", coef=0.0)
    record, (matched,) = compare([run, baseline])
    edges = (run.figure("jacobian/effective_edges").mean / baseline.figure("jacobian/effective_edges").mean - 1) * 100
    verdict = f"run is sparser than base beyond shrinkage (effective edges {edges:+.1f} %; 4 of 4 scale-free measures "
    assert edges < -30
    assert any(line.startswith(verdict) for line in record["findings"])
    assert len(record["verdicts"]) == len(record["shrink_matched"])
    assert all(line in record["findings"] for line in record["verdicts"])
    key = "jacobian/share_above_0.01"
    assert matched.remaining[key].mean < -2 * matched.remaining[key].standard_error
    (line,) = [line for line in record["findings"] if "share of |J| > 0.01" in line]
    assert "fewer entries are above it than shrinkage explains" in line
    assert f"{run.figure(key).mean * 100:.1f} % against {baseline.figure(key).mean * 100:.1f} % (traditional)" in line


def test_less_sparse(judge):
    run, baseline = judge(0.01 * draw(1).sign()), judge(draw(), "base", coef=0.0)
    findings = compare([run, baseline])[0]["findings"]
    assert any("is less sparse than base once shrinkage is taken out" in line for line in findings)


def test_a_scaled_baseline_against_scaling_it(judge):
    """Shares and standard errors of the scaled baseline, from its entries instead of from its histogram."""
    ours, theirs = only_the_largest(draw(1), 9), draw()
    matched = shrink_match(judge(ours), judge(theirs, "base", coef=0.0))
    magnitudes = theirs.double().abs()

    def share(rows, threshold):
        scale = ours[rows].double().abs().mean() / magnitudes[rows].mean()
        return (scale * magnitudes[rows] > threshold).double().mean().item()

    groups = torch.arange(GROUPS)
    for threshold in jacobian_metrics.RAW_THRESHOLDS:
        key = f"jacobian/share_above_{threshold:g}"
        assert abs(matched.figures[key].mean - share(groups, threshold)) <= matched.resolution[key] + 1e-12
        left = [share(groups[groups != group], threshold) for group in range(GROUPS)]
        expected = standard_error(torch.tensor(left).double())
        assert matched.figures[key].standard_error == pytest.approx(expected, rel=0.1)
        own = [(ours[groups != g].abs() > threshold).double().mean().item() for g in range(GROUPS)]
        rest = standard_error(torch.tensor(own).double() - torch.tensor(left).double())
        assert matched.remaining[key].standard_error == pytest.approx(rest, rel=0.1)
    assert matched.figures["jacobian/gini"] == matched.baseline.figure("jacobian/gini")
    assert matched.figures["jacobian/mean_abs"] == matched.run.figure("jacobian/mean_abs")


def test_differences_are_paired_on_the_same_tokens_only(judge):
    base = draw()
    noise = 1 + 0.01 * draw(1) / 0.03
    run, baseline = judge(base * noise), judge(base, "base", coef=0.0)
    elsewhere = judge(base * noise, "elsewhere", tokens_hash="other")
    key = "jacobian/mean_abs"
    paired, apart = difference(run, baseline, key), difference(elsewhere, baseline, key)
    assert paired.mean == apart.mean
    assert paired.standard_error < 0.2 * apart.standard_error  # what both share cancels
    expected = math.hypot(run.figure(key).standard_error, baseline.figure(key).standard_error)
    assert apart.standard_error == pytest.approx(expected)
    assert "paired" in compare([run, baseline])[0]["findings"][0]
    assert "independent samples" in compare([elsewhere, baseline])[0]["findings"][0]
    assert shrink_match(elsewhere, baseline).scale.standard_error > 5 * shrink_match(run, baseline).scale.standard_error


def test_the_baseline_is_of_the_same_model_layer_and_weights(judge):
    run = judge(draw())
    others = [
        judge(draw(), "layer", coef=0.0, layer=2),
        judge(draw(), "random", coef=0.0, weights=True),
        judge(draw(), "penalised", coef=0.5),
    ]
    assert find_baseline(run, [run, *others]) is None
    record, matched = compare([run, *others])
    assert not matched
    assert any(line.startswith("run: none of the pairs given is a traditional one") for line in record["findings"])
    base = judge(draw(), "base", coef=0.0)
    assert find_baseline(run, [run, *others, base]) is base
    assert find_baseline(base, [run, base]) is None
    assert [entry["baseline"] for entry in compare([run, base])[0]["runs"]] == ["base", None]


def test_the_baseline_has_the_same_mlp_under_whatever_name(judge):
    """Synthetic models of two seeds share a name and no weights; a model that was moved has another name."""
    run = judge(draw(), model={"mlp_hash": "a"})
    other_seed = judge(draw(), "seed 1", coef=0.0, model={"mlp_hash": "b"})
    moved = judge(draw(), "moved", coef=0.0, model={"mlp_hash": "a", "name": "/elsewhere/tiny"})
    assert find_baseline(run, [run, other_seed]) is None
    assert find_baseline(run, [run, other_seed, moved]) is moved


def test_the_baseline_has_as_many_latents(judge):
    values = draw()
    run, wider = judge(values), judge(values, "wider", coef=0.0, d_sae=64)
    assert find_baseline(run, [run, wider]) is None
    assert "same k, number of latents and jacobian.at" in compare([run, wider])[0]["findings"][0]


def test_what_else_was_not_alike_is_said(judge):
    values = draw()
    recipe = {"recipe": {"optim.lr": 5e-4, "sae.auxk_coef": 0.0}}
    run = judge(values, data={"context_length": 64, "prefetch": True}, more=recipe)
    other = {"recipe": {"optim.lr": 1e-3, "sae.auxk_coef": 0.0}}
    longer = {"data": {"context_length": 128, "prefetch": False, "repeat": True}, "tokens_seen": 2, "more": other}
    found = compare([run, judge(values, "base", coef=0.0, **longer)])[0]["findings"]
    assert found[1] == (
        "run and base were not trained alike otherwise: tokens_seen 1 against 2; data.context_length 64 against 128; "
        "optim.lr 0.0005 against 0.001. What follows may be due to that."
    )
    # Against a control the penalty counts, too; an export that does not tell its recipe differs in nothing known.
    control = judge(values, "control", weights=True, coef=2.0, data={"context_length": 64})
    found = compare([run, control])[0]["findings"]
    assert any("were not trained alike otherwise: jacobian.coef 1.0 against 2.0. " in line for line in found)
    alike = judge(values, "alike", coef=0.0, data={"context_length": 64}, more=recipe)
    assert not any("not trained alike" in line for line in compare([run, alike])[0]["findings"])


def test_the_random_control_is_of_the_same_synthetic_spec(judge):
    run = judge(draw(), model={"synthetic": {"seed": 0}})
    other = judge(draw(), "other", weights=True, model={"synthetic": {"seed": 1}})
    control = judge(draw(), "control", weights=True, model={"synthetic": {"seed": 0}})
    assert find_random(run, [run, other]) is None
    assert find_random(run, [run, other, control]) is control


def test_a_relative_difference_has_the_error_of_the_ratio(judge):
    base, key = draw(), "jacobian/mean_abs"
    run, baseline = judge(base * (1 + 0.01 * draw(1) / 0.03)), judge(base, "base", coef=0.0)
    apart = relative_difference(judge(run_values := draw(2), "apart", tokens_hash="other"), baseline, key)
    found = relative_difference(run, baseline, key)
    assert found.mean == pytest.approx(run.figure(key).mean / baseline.figure(key).mean - 1)
    assert found.standard_error == pytest.approx(standard_error(run.replicates[key] / baseline.replicates[key]))
    assert apart.mean == pytest.approx(float(run_values.abs().mean() / base.abs().mean()) - 1, rel=1e-3)
    # The delta method against drawing both figures at random
    generator = torch.Generator().manual_seed(0)
    ours, theirs = judge(run_values, "again", tokens_hash="other").figure(key), baseline.figure(key)
    x, y = (
        f.mean + f.standard_error * torch.randn(200_000, generator=generator, dtype=torch.float64)
        for f in (ours, theirs)
    )
    assert apart.standard_error == pytest.approx((x / y).std().item(), rel=0.03)


def test_trained_against_random_weights(judge):
    run, control = judge(only_the_largest(draw())), judge(draw(1), "control", weights=True)
    base = judge(draw(2), "base", coef=0.0)
    assert find_random(run, [run, control, base]) is control
    assert find_random(base, [run, control, base]) is None
    assert find_random(control, [run, control, base]) is None
    record, matched = compare([run, control, base])
    assert [(entry.run.name, entry.baseline.name) for entry in matched] == [("run", "base"), ("run", "control")]
    assert any("run is sparser than control on random weights" in line for line in record["findings"])


def test_the_files_of_a_comparison(judge, tmp_path):
    judged = [judge(SCALE * draw()), judge(draw(), "base", coef=0.0)]
    text = write_comparison(tmp_path / "comparison", judged)
    record = json.loads((tmp_path / "comparison" / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert record["format_version"] == 1
    assert record["runs"][0].keys() == {"name", "folder", "eval", "kind", "random_weights", "baseline"}
    (matched,) = record["shrink_matched"]
    assert (matched["run"], matched["baseline"]) == ("run", "base")
    assert matched["figures"]["jacobian/share_above_0.01"].keys() == {"mean", "standard_error"}
    assert (tmp_path / "comparison" / "comparison.md").read_text() == text
    assert all(finding in text for finding in record["findings"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.source", "hub"), ("data.exclude_special_tokens", True), ("eval.exclude_first_position", True)],
)
def test_pairs_judged_on_different_data_are_not_compared(judge, monkeypatch, tmp_path, key, value):
    paths = {
        "run": judge(draw(), settings={key: value}, tokens_hash="other").path,
        "base": judge(draw(), "base", coef=0.0).path,
    }
    monkeypatch.setattr("jsae_lightning.evaluate.evaluate_folder", lambda folder, *_, **__: paths[folder])
    message = f"{key}: base was judged with {SETTINGS[key]}, run with {value}: give both the same overrides, such as "
    with pytest.raises(UserError, match=message):
        compare_folders(["run", "base"], [], out=str(tmp_path / "comparison"))
    assert not (tmp_path / "comparison").exists()


def test_of_many_pairs_only_the_place_is_printed(judge, monkeypatch, tmp_path, capsys):
    """Forty pairs are a thousand lines."""
    paths = {f"run{index}": judge(draw(), f"run{index}").path for index in range(3)}
    monkeypatch.setattr("jsae_lightning.evaluate.evaluate_folder", lambda folder, *_, **__: paths[folder])
    printed = []
    for most in (3, 2):
        monkeypatch.setattr(comparison_files, "MOST_SHOWN", most)
        compare_folders(list(paths), [], out=str(tmp_path / "comparison"))
        printed.append(capsys.readouterr().out)
    written = (tmp_path / "comparison" / "comparison.md").read_text()
    assert written.strip() in printed[0]
    assert printed[1].splitlines() == [
        f"the tables of 3 pairs, each against each, are in {tmp_path / 'comparison' / 'comparison.md'}",
        f"comparison: {tmp_path / 'comparison' / 'comparison.json'}",
    ]


def test_more_tokens_and_other_models_may_have_other_settings(judge):
    run, other = judge(draw()), {"settings": {"data.source": "hub"}, "tokens_hash": "other"}
    check_same_data([run, judge(draw(), "more", settings={"eval.tokens": 2000}, tokens_hash="other")])
    check_same_data(
        [run, judge(draw(), "same", settings={"data.source": "hub"})]
    )  # the same tokens, as their hash says
    check_same_data([run, judge(draw(), "model", layer=1, model={"name": "large"}, **other)])
    with pytest.raises(UserError, match=r"data\.source"):  # a control
        check_same_data([run, judge(draw(), "control", weights=True, **other)])


def test_entries_that_are_larger_and_no_fewer(judge):
    findings = compare([judge(2 * draw()), judge(draw(), "base", coef=0.0)])[0]["findings"]
    (line,) = [line for line in findings if line.startswith("run against base: no difference beyond")]
    assert "smaller" not in line


def test_one_group_tells_nothing_beyond_the_figures(judge):
    findings = compare([judge(draw()[:1]), judge(draw(1)[:1], "base", coef=0.0)])[0]["findings"]
    assert any(line.startswith("run: too few documents to say whether it is sparser than base") for line in findings)
    assert any("too few documents for a standard error" in line for line in findings)
    assert not any("nan" in line for line in findings)


def test_the_order_of_the_pairs_does_not_matter(judge):
    judged = [judge(only_the_largest(draw(1))), judge(draw(), "base", coef=0.0)]
    assert compare(judged)[0]["findings"] == compare(judged[::-1])[0]["findings"]


def test_pairs_of_the_same_name_are_told_apart(judge):
    judged = [judge(draw(), "run", folder="a/run"), judge(draw(1), "run", coef=0.0, folder="b/run")]
    assert [entry["name"] for entry in compare(judged)[0]["runs"]] == ["a/run", "b/run"]


def test_an_empty_jacobian_matches_nothing(judge):
    record, matched = compare([judge(torch.zeros(GROUPS, TOKENS, K, K)), judge(draw(), "base", coef=0.0)])
    assert not matched
    assert record["shrink_matched"] == []


def test_damaged_results_are_refused(judge):
    path = judge(draw()).path
    (path.parent / "groups.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="evaluate again"):
        read_judged(path)
    path.write_text("{")
    with pytest.raises(UserError, match="is no result of jsae-eval"):
        read_judged(path)


@pytest.mark.parametrize(
    ("mean", "error", "expected"), [(1.0, 0.4, 1), (-1.0, 0.4, -1), (1.0, 0.6, 0), (0.0, 0.0, 0), (1.0, math.nan, 0)]
)
def test_a_difference_counts_beyond_two_standard_errors(mean, error, expected):
    assert direction(Figure(mean, error)) == expected
