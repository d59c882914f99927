"""The global graph: against dense sums, over shards and files, and back from its files."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from held_out_factory import make_held_out
from jsae_lightning import graph as graph_module
from jsae_lightning.edge_accumulator import EdgeAccumulator
from jsae_lightning.errors import UserError
from jsae_lightning.graph import load_graph, read_edges, run_graph
from jsae_lightning.graph_summary import summarize_graph
from jsae_lightning.jacobians import Jacobian, jacobian
from jsae_lightning.sorted_runs import KEY, SortedRuns, combine, sort_block

SETTINGS = {"tokens": None, "top_edges": 7, "contexts": 3, "edge_contexts": 2}


def random_entries(n=5000, d_in=40, d_out=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    key = torch.randint(d_in * d_out, (n,), generator=generator)
    return key, torch.randn(n, generator=generator, dtype=torch.float64)


def accumulated(folder, batches, max_pairs, d_in=40, d_out=30):
    edges = EdgeAccumulator(d_in, d_out, folder, max_pairs=max_pairs)
    for key, values in batches:
        edges.add_entries(key, values)
    blocks = list(edges.pairs())
    return edges, {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def dense(key, values, size=1200):
    count = torch.bincount(key, minlength=size)
    sums = {
        "sum_abs": torch.zeros(size, dtype=torch.float64).index_add_(0, key, values.abs()),
        "sum": torch.zeros(size, dtype=torch.float64).index_add_(0, key, values),
    }
    seen = count.nonzero()[:, 0]
    return {KEY: seen, "count": count[seen]} | {name: value[seen] for name, value in sums.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_pairs", [200, 1000, 100_000])
def test_sums_are_the_dense_ones_in_memory_and_through_files(tmp_path, max_pairs):
    key, values = random_entries()
    values[::7] = 0  # zeros count as pairs
    edges, found = accumulated(tmp_path / "runs", zip(key.split(333), values.split(333), strict=True), max_pairs)
    assert_same(found, dense(key, values))
    assert edges.peak_rows <= max_pairs
    assert (edges.runs.num_files > 1) == (max_pairs < 10_000)
    assert (tmp_path / "runs").exists() == (max_pairs < 10_000)


def test_the_order_of_entries_and_batches_does_not_matter(tmp_path):
    key, values = random_entries()
    order = torch.randperm(len(key), generator=torch.Generator().manual_seed(1))
    _, one = accumulated(tmp_path / "1", [(key, values)], 700)
    batches = zip(key[order].split(50), values[order].split(50), strict=True)
    _, other = accumulated(tmp_path / "2", batches, 100_000)
    assert_same(one, other)


def test_two_ranks_runs_are_one_ranks(tmp_path):
    key, values = random_entries()
    whole = EdgeAccumulator(40, 30, tmp_path / "merged", max_pairs=500)
    for rank in range(2):
        edges = EdgeAccumulator(40, 30, tmp_path / str(rank), max_pairs=500)
        edges.add_entries(key[rank::2], values[rank::2])
        edges.finish().flush()
        whole.runs.adopt(tmp_path / str(rank))
    blocks = list(whole.pairs())
    assert len(blocks) > 1
    assert_same({name: torch.cat([b[name] for b in blocks]) for name in blocks[0]}, dense(key, values))


def test_by_hand(tmp_path):
    """Two tokens, two latents a side; input latent 1 is inactive on the second token."""
    result = Jacobian(
        values=torch.tensor([[[1.0, -2.0], [0.5, 0.0]], [[-3.0, 0.0], [0.0, 0.0]]], dtype=torch.float64),
        indices_out=torch.tensor([[0, 1], [0, 2]]),
        indices_in=torch.tensor([[0, 1], [0, 1]]),
        active_out=torch.tensor([[True, True], [True, False]]),
        active_in=torch.tensor([[True, True], [True, False]]),
        activations_in=torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64),
    )
    edges = EdgeAccumulator(2, 3, tmp_path / "runs")
    edges.add(result)
    (block,) = edges.pairs()
    assert block[KEY].tolist() == [0, 1, 2, 3]
    assert block["count"].tolist() == [2, 1, 1, 1]
    assert block["sum_abs"].tolist() == [4.0, 2.0, 0.5, 0.0]
    assert block["sum"].tolist() == [-2.0, -2.0, 0.5, 0.0]
    summary = summarize_graph(edges, torch.tensor([2, 1, 0]), tmp_path / "s", tmp_path, top_edges=2)
    rows = read_edges_at(tmp_path)
    assert rows == [(0, 0, 2, 2.0, -1.0), (0, 1, 1, 1.0, -1.0), (1, 0, 1, 0.5, 0.5), (1, 1, 1, 0.0, 0.0)]
    assert summary.top.tolist() == [[0, 0, 2, 2, -1], [0, 1, 1, 1, -1]]
    assert summary.figures == pytest.approx(
        {
            "graph/edges": 4,
            "graph/edges_for_90": 2,  # 4, 2, .5, 0: 6 of 6.5 are 92 %
            "graph/effective_edges": 6.5**2 / 20.25,
            "graph/effective_inputs_per_output": (36 / 20 + 1) / 2,
            "graph/gini": 5 / 4 - 2 * (4 + 2 * 2 + 3 * 0.5) / (4 * 6.5),
        }
    )


def read_edges_at(folder):
    columns = read_edges(folder).to_pydict()
    return list(zip(*(columns[name] for name in ("output", "input", "count", "mean_abs", "mean")), strict=True))


def test_figures_do_not_change_with_the_scale_and_are_those_of_a_known_graph(tmp_path):
    figures = []
    for scale in (1.0, 1e-3):
        edges = EdgeAccumulator(40, 30, tmp_path / f"{scale}", max_pairs=400)
        key, values = random_entries()
        edges.add_entries(key, values * scale)
        summary = summarize_graph(edges, torch.full((30,), 9), tmp_path / f"s{scale}", tmp_path, top_edges=5)
        figures.append(summary.figures)
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    weight = dense(key, values)["sum_abs"].sort(descending=True).values
    differences = (weight[:, None] - weight).abs().sum() / (2 * len(weight) * weight.sum())
    assert figures[0]["graph/gini"] == pytest.approx(differences.item())
    needed = int((weight.cumsum(0) < 0.9 * weight.sum()).sum()) + 1
    assert figures[0]["graph/edges_for_90"] == needed
    equal = EdgeAccumulator(40, 30, tmp_path / "equal")
    equal.add_entries(torch.arange(20), torch.ones(20))
    summary = summarize_graph(equal, torch.ones(30, dtype=torch.int64), tmp_path / "s", tmp_path, top_edges=30)
    assert list(summary.figures.values()) == pytest.approx([20, 18, 20, 20, 0])
    assert len(summary.top) == 20
    nothing = EdgeAccumulator(40, 30, tmp_path / "nothing")
    summary = summarize_graph(nothing, torch.ones(30, dtype=torch.int64), tmp_path / "s0", tmp_path, top_edges=3)
    assert summary.figures["graph/edges"] == 0
    assert math.isnan(summary.figures["graph/gini"])
    assert read_edges(tmp_path).num_rows == 0


def brute_force(held_out, mask):
    """Dense sums over tokens, one token at a time."""
    pair = held_out.pair
    shape = (pair.output_sae.d_sae, pair.input_sae.d_sae)
    sum_abs, total = torch.zeros(2, *shape, dtype=torch.float64)
    count = torch.zeros(shape, dtype=torch.int64)
    count_out = torch.zeros(shape[0], dtype=torch.int64)
    with torch.no_grad():
        for x in held_out.language_model.mlp_in(held_out.tokens)[mask]:
            found = jacobian(pair, held_out.mlp, x[None], at=held_out.at)
            for a, i in enumerate(found.indices_out[0].tolist()):
                count_out[i] += int(found.active_out[0, a])
                for b, j in enumerate(found.indices_in[0].tolist()):
                    if found.active[0, a, b]:
                        sum_abs[i, j] += found.values[0, a, b].abs()
                        total[i, j] += found.values[0, a, b]
                        count[i, j] += 1
    return count, sum_abs / count_out[:, None], total / count_out[:, None], count_out


@pytest.mark.parametrize(("at", "tokens", "max_pairs"), [("input", None, 1000), ("reconstruction", 11, 40)])
def test_run_against_brute_force(tmp_path, at, tokens, max_pairs):
    held_out = make_held_out(at=at)
    figures = run_graph(held_out, tmp_path, **SETTINGS | {"tokens": tokens, "max_pairs": max_pairs})
    mask = held_out.included
    if tokens is not None:
        mask = torch.zeros_like(mask)
        places = held_out.included.nonzero()
        for n in range(tokens):  # evenly spaced: the last of each 1/tokens of them
            sequence, position = places[math.ceil((n + 1) * len(places) / tokens) - 1].tolist()
            mask[sequence, position] = True
    count, mean_abs, mean, count_out = brute_force(held_out, mask)
    rows = read_edges_at(tmp_path)
    assert len(rows) == (count > 0).sum() == figures["graph/edges"]
    for i, j, n, a, m in rows:
        assert (n, a, m) == (count[i, j], pytest.approx(mean_abs[i, j].item()), pytest.approx(mean[i, j].item()))
    assert [row[3] for row in rows] == sorted((row[3] for row in rows), reverse=True)
    assert not (tmp_path / "graph" / ".parts").exists()
    described = json.loads((tmp_path / "graph" / "graph.json").read_text())
    assert described["tokens"] == mask.sum()
    assert (described["at"], described["num_edges"], described["d_sae_output"]) == (at, len(rows), 24)
    latents = graph_module.graph_files.read_latents(tmp_path).to_pylist()
    assert [row["count"] for row in latents if row["side"] == "output"] == count_out.tolist()
    assert len(latents) == 32 + 24
    for row in latents:
        assert (row["mean_activation"] is None) == (row["count"] == 0) == (row["max_activation"] == 0)


def test_batches_and_the_order_of_sequences_do_not_matter(tmp_path):
    held_out = make_held_out()
    order = [3, 1, 4, 0, 2]
    other = make_held_out(tokens=held_out.tokens[order], included=held_out.included[order], batch_sequences=5)
    one, two = (run_graph(h, tmp_path / name, **SETTINGS) for h, name in ((held_out, "1"), (other, "2")))
    assert one == pytest.approx(two)
    by_pair = [sorted(read_edges_at(tmp_path / name)) for name in "12"]
    assert [row[:3] for row in by_pair[0]] == [row[:3] for row in by_pair[1]]
    for a, b in zip(*by_pair, strict=True):
        assert a[3:] == pytest.approx(b[3:], abs=1e-9)


def test_passes_and_writing_say_how_far_they_are(tmp_path, caplog):
    with caplog.at_level("INFO"):
        run_graph(make_held_out(), tmp_path, **SETTINGS)
    for name in ("edges", "contexts"):
        assert f"graph: {name}: 5/5 sequences  left 0:00:00" in caplog.messages
    num_latents = len(graph_module.graph_files.read_latents(tmp_path))
    assert f"graph: contexts written: {num_latents}/{num_latents} latents  left 0:00:00" in caplog.messages


def test_networkx_and_graphml(tmp_path):
    import networkx

    run_graph(make_held_out(), tmp_path, **SETTINGS, graphml_edges=12)
    rows = read_edges_at(tmp_path)
    graph = load_graph(tmp_path)
    assert graph.number_of_edges() == len(rows)
    for i, j, count, mean_abs, mean in rows:
        assert graph.edges[("input", j), ("output", i)] == {"weight": mean_abs, "mean": mean, "count": count}
    assert networkx.bipartite.is_bipartite(graph)
    node = graph.nodes[("output", rows[0][0])]
    assert (node["side"], node["latent"], node["bipartite"]) == ("output", rows[0][0], 1)
    assert node["max_activation"] >= node["mean_activation"] > 0
    few = load_graph(tmp_path / "graph", max_edges=5)
    assert set(few.edges) == {(("input", j), ("output", i)) for i, j, *_ in rows[:5]}
    limit = rows[8][3]
    strong = load_graph(tmp_path, max_edges=None, min_weight=limit)
    assert strong.number_of_edges() == sum(row[3] >= limit for row in rows)
    file = networkx.read_graphml(tmp_path / "graph" / "graph.graphml")
    assert file.number_of_edges() == 12
    for i, j, count, mean_abs, mean in rows[:12]:
        assert file.edges[f"input_{j}", f"output_{i}"] == {"weight": mean_abs, "mean": mean, "count": count}


def test_mistakes_are_refused(tmp_path):
    with pytest.raises(UserError, match="jacobian.at"):
        run_graph(make_held_out(at="output"), tmp_path, **SETTINGS)
    with pytest.raises(UserError, match="top_edges: 0"):
        run_graph(make_held_out(), tmp_path, **SETTINGS | {"top_edges": 0})
    with pytest.raises(UserError, match="none of the 45"):
        run_graph(make_held_out(), tmp_path, **SETTINGS | {"tokens": 0})
    with pytest.raises(UserError, match="edges.parquet: there is no such file"):
        load_graph(tmp_path / "elsewhere")
    (tmp_path / "edges.parquet").write_bytes(b"PAR1 half a file")
    with pytest.raises(UserError, match="cannot be read"):
        read_edges(tmp_path)
    with pytest.raises(UserError, match="max_pairs"):
        EdgeAccumulator(4, 4, tmp_path, max_pairs=2)
    with pytest.raises(UserError, match="64 bits"):
        EdgeAccumulator(2**32, 2**31, tmp_path)


def test_runs_are_merged_in_bounded_pieces_in_order(tmp_path):
    generator = torch.Generator().manual_seed(0)
    runs = SortedRuns(tmp_path / "runs", 50)
    keys = torch.randint(-(2**62), 2**62, (400,), generator=generator)
    keys[::5] = 7
    for part in keys.split(90):
        runs.add(sort_block({KEY: part, "twice": part * 2}))
    blocks = list(runs.merged())
    assert torch.equal(torch.cat([block[KEY] for block in blocks]), keys.sort().values)
    assert all(torch.equal(block["twice"], block[KEY] * 2) for block in blocks)
    assert sorted(len(block[KEY]) for block in blocks)[-2] <= 50  # but for the 80 rows with one key
    assert combine({KEY: torch.tensor([3, 1, 3]), "n": torch.tensor([1, 2, 4])})["n"].tolist() == [2, 5]


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from jsae_lightning.edge_accumulator import EdgeAccumulator
from jsae_lightning.graph_summary import summarize_graph

folder, max_pairs, tokens = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
import pyarrow.parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
generator = torch.Generator().manual_seed(0)
edges = EdgeAccumulator(65536, 65536, folder / "runs", max_pairs=max_pairs)
for _ in range(tokens // 100):
    out, inn = torch.randint(65536, (2, 100, 32), generator=generator)
    key = (out[:, :, None] * 65536 + inn[:, None, :]).flatten()
    edges.add_entries(key, torch.rand(len(key), generator=generator))
summary = summarize_graph(edges, torch.full((65536,), 50), folder / "sorted", folder, top_edges=10)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(summary.num_edges, edges.runs.num_files, edges.peak_rows, peak * 1024)
"""


def test_memory_is_bounded_at_65536_latents(tmp_path):
    """3 M random pairs, fifteen times as many as may be in memory."""
    max_pairs = 200_000
    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(max_pairs), "3000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    num_edges, files, peak_rows, peak = map(int, done.stdout.split())
    assert 3.06e6 < num_edges <= 3000 * 1024
    assert files > 5
    assert peak_rows <= max_pairs
    assert peak < 100 * max_pairs + 60e6  # the rest is torch's and pyarrow's own; all pairs in memory take 300 MB


RANK = """
import sys
from pathlib import Path
import torch.distributed as dist
from held_out_factory import make_held_out
from jsae_lightning.autointerp_export import export_autointerp
from jsae_lightning.graph import run_graph

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
figures = run_graph(make_held_out(), folder, tokens=None, top_edges=7, contexts=3, edge_contexts=2, max_pairs=80)
export_autointerp(make_held_out(), folder, latents=4, examples=2)
(folder / f"{rank}.txt").write_text(repr(sorted(figures.items())))
dist.destroy_process_group()
"""


def test_two_ranks_write_what_one_writes(tmp_path):
    from jsae_lightning.autointerp_export import export_autointerp

    (tmp_path / "two").mkdir()
    tests = Path(__file__).parent
    paths = [str(tests.parent), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "two")], env=env) for rank in range(2)]
    one = run_graph(make_held_out(), tmp_path / "one", **SETTINGS)
    export_autointerp(make_held_out(), tmp_path / "one", latents=4, examples=2)
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    texts = [(tmp_path / "two" / f"{rank}.txt").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert dict(eval(texts[0])) == pytest.approx(one)
    by_pair = [sorted(read_edges_at(tmp_path / name)) for name in ("one", "two")]
    assert by_pair[0] == [pytest.approx(row, rel=1e-6, abs=1e-9) for row in by_pair[1]]
    names = ("graph/contexts.jsonl", "graph/edge_contexts.jsonl", "autointerp/input.jsonl", "autointerp/output.jsonl")
    for name in names:
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text(), name
    latents = [graph_module.graph_files.read_latents(tmp_path / name).to_pylist() for name in ("one", "two")]
    assert [row["count"] for row in latents[0]] == [row["count"] for row in latents[1]]
    assert not (tmp_path / "two" / "graph" / ".parts").exists()
