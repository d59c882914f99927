"""Read an evaluation's global graph, and cut from it what the page's edge explorer can show within a limit of bytes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jsae_lightning.errors import UserError
from jsae_lightning.reporting.readers import number, read_json_lines
from jsae_lightning.sweep_folders import read_json

GRAPH = "graph"
TOP_OUTPUTS, TOP_EDGES, TOP_EXAMPLES = 400, 24, 5
EDGE_EXAMPLES = 2
_DIGITS = 3


@dataclass(frozen=True)
class Graph:
    """The edges, strongest first, and what is known of the latents: `latents[side][latent] = (count, mean, max)`."""

    output: np.ndarray
    input: np.ndarray
    count: np.ndarray
    mean_abs: np.ndarray
    mean: np.ndarray
    latents: dict[str, dict[int, tuple[int, float | None, float | None]]]
    info: dict[str, Any]

    @property
    def sum_abs(self) -> np.ndarray:
        """Each edge's sum of |J| over tokens, by which figures of the whole graph weigh it: mean |J| times the tokens
        on which the output latent was active; 0 where that number is not known.
        """  # noqa: D205
        counts = np.zeros(int(self.output.max()) + 1 if len(self.output) else 0)
        for latent, (count, _, _) in self.latents["output"].items():
            if latent < len(counts):
                counts[latent] = count
        return self.mean_abs * counts[self.output]


def read_graph(evaluation: Path) -> Graph | None:
    """Read `graph/` of an evaluation; None if it has none; raise UserError if a table is damaged."""
    import pyarrow.parquet as pq
    from pyarrow.lib import ArrowException

    folder = evaluation / GRAPH
    if not (folder / "edges.parquet").is_file():
        return None
    try:
        table = pq.read_table(folder / "edges.parquet")
        columns = {name: table[name].to_numpy() for name in ("output", "input", "count", "mean_abs", "mean")}
        latents: dict[str, dict[int, tuple[int, float | None, float | None]]] = {"input": {}, "output": {}}
        if (folder / "latents.parquet").is_file():
            for row in pq.read_table(folder / "latents.parquet").to_pylist():
                means = number(row["mean_activation"]), number(row["max_activation"])
                latents.setdefault(str(row["side"]), {})[int(row["latent"])] = (int(row["count"]), *means)
    except (ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: a table is damaged ({error}): evaluate the pair again") from error
    order = np.argsort(-columns["mean_abs"], kind="stable")
    info = read_json(folder / "graph.json")
    columns = {name: column[order] for name, column in columns.items()}
    return Graph(**columns, latents=latents, info=info if isinstance(info, dict) else {})


def explorer_data(graph: Graph, evaluation: Path, *, max_bytes: int) -> dict[str, Any]:
    """Return what the explorer shows, as JSON can hold it, in at most about `max_bytes` bytes of it.

    `edges`: [output, input, mean |J|, mean J, count] of the strongest TOP_EDGES inputs of each of the TOP_OUTPUTS
    strongest outputs (by sum_j mean |J_ij|), and of the strongest TOP_EDGES outputs of each input among these.
    `latents`: {"output-12": {"count", "mean", "max", "strength"}}; `contexts` and `edge_contexts`: examples; `scores`;
    `left_out`: sentences on what is not there.
    """
    strength = (
        np.bincount(graph.output, weights=graph.mean_abs.astype(np.float64)) if len(graph.output) else np.empty(0)
    )
    outputs = [int(i) for i in np.argsort(-strength, kind="stable")[:TOP_OUTPUTS] if strength[i] > 0]
    kept = _strongest(graph.output, outputs)
    inputs = list(dict.fromkeys(int(i) for i in graph.input[kept]))
    kept = np.union1d(kept, _strongest(graph.input, inputs))
    edges = [
        [int(o), int(i), _round(a), _round(m), int(n)]
        for o, i, a, m, n in zip(
            *(column[kept] for column in (graph.output, graph.input, graph.mean_abs, graph.mean, graph.count)),
            strict=True,
        )
    ]
    reached = list(dict.fromkeys([*outputs, *(edge[0] for edge in edges)]))
    keys = [f"output-{latent}" for latent in reached] + [f"input-{latent}" for latent in inputs]
    data: dict[str, Any] = {
        "outputs": outputs,
        "edges": edges,
        "latents": {key: _latent(graph, strength, key) for key in keys},
        "tokens": graph.info.get("tokens"),
        "scores": _scores(evaluation, set(keys)),
    }
    left_out = []
    num_outputs = int((strength > 0).sum())
    if num_outputs > len(outputs):
        left_out.append(f"the list shows the {len(outputs):,} strongest of {num_outputs:,} output latents")
    if len(edges) < len(graph.output):
        left_out.append(
            f"{len(edges):,} of {len(graph.output):,} edges are in this page, of which each latent shows {TOP_EDGES}"
        )
    budget = max_bytes - len(_json(data))
    wanted = [f"output-{latent}" for latent in outputs] + [f"input-{latent}" for latent in inputs]
    wanted += [key for key in keys if key not in set(wanted)]
    data["edge_contexts"], budget, _ = _within(_edge_contexts(evaluation, edges), max(0, budget), share=0.3)
    data["contexts"], _, without = _within(_contexts(evaluation, wanted), max(0, budget), share=1.0)
    if without:
        left_out.append(f"the contexts of {without:,} latents would make the page too large")
    return data | {"left_out": left_out}


def _strongest(column: np.ndarray, latents: Sequence[int]) -> np.ndarray:
    """The places of the first TOP_EDGES edges of each of the latents; edges are sorted by strength."""
    order = np.argsort(column, kind="stable")
    starts = np.searchsorted(column[order], latents, side="left")
    ends = np.searchsorted(column[order], latents, side="right")
    parts = [order[start : min(end, start + TOP_EDGES)] for start, end in zip(starts, ends, strict=True)]
    return np.sort(np.concatenate(parts)) if parts else np.empty(0, dtype=np.int64)


def _latent(graph: Graph, strength: np.ndarray, key: str) -> dict[str, Any]:
    side, latent = key.split("-")
    count, mean, largest = graph.latents.get(side, {}).get(int(latent), (None, None, None))
    row: dict[str, Any] = {"count": count, "mean": _round(mean), "max": _round(largest)}
    if side == "output":
        row["strength"] = _round(float(strength[int(latent)]))
    return row


def _contexts(evaluation: Path, wanted: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    place = {key: number for number, key in enumerate(wanted)}
    found = {}
    for row in read_json_lines(evaluation / GRAPH / "contexts.jsonl"):
        key = f"{row.get('side')}-{row.get('latent')}"
        if key in place:
            examples = [_example(item, ("activations",)) for item in _objects(row.get("examples"))[:TOP_EXAMPLES]]
            found[key] = [item for item in examples if item["tokens"]]
    return dict(sorted(found.items(), key=lambda item: place[item[0]]))


def _edge_contexts(evaluation: Path, edges: list[list[Any]]) -> dict[str, list[dict[str, Any]]]:
    known = {f"{edge[0]}-{edge[1]}" for edge in edges}
    names = ("activations_output", "activations_input", "jacobian")
    found = {}
    for row in read_json_lines(evaluation / GRAPH / "edge_contexts.jsonl"):
        key = f"{row.get('output')}-{row.get('input')}"
        if key in known:
            examples = [_example(item, names) for item in _objects(row.get("examples"))[:EDGE_EXAMPLES]]
            found[key] = [item for item in examples if item["tokens"]]
    return found


def _example(item: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    tokens = [str(token) for token in item.get("tokens") or []]
    example: dict[str, Any] = {"tokens": tokens}
    for name in names:
        values = [_round(value) or 0 for value in item.get(name) or []][: len(tokens)]
        example[name] = values + [0] * (len(tokens) - len(values))
    place = {key: item.get(key) for key in ("peak", "sequence", "position", "document")}
    return example | {key: int(value) for key, value in place.items() if number(value) is not None}  # type: ignore


def _scores(evaluation: Path, keys: set[str]) -> dict[str, list[dict[str, Any]]]:
    """Explanations and their scores, by latent."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in (evaluation / "autointerp" / "scores.jsonl", evaluation / "scores.jsonl"):
        for row in read_json_lines(path):
            key = f"{row.get('side')}-{row.get('latent')}"
            if key in keys:
                texts = {name: str(row[name]) for name in ("explanation", "scorer") if row.get(name) is not None}
                found.setdefault(key, []).append({"score": _round(row.get("score")), **texts})
    return found


def _within(items: dict[str, Any], budget: int, *, share: float) -> tuple[dict[str, Any], int, int]:
    """Keep the first items that fit in `share` of the budget; return them, what is left of it, how many are not."""
    kept: dict[str, Any] = {}
    used = 0
    for key, value in items.items():
        size = len(_json({key: value}))
        if used + size > budget * share:
            break
        kept[key] = value
        used += size
    return kept, budget - used, len(items) - len(kept)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _round(value: Any) -> float | int | None:
    """A finite number to three digits, as short as JSON can say it; None for anything else."""
    value = number(float(value)) if isinstance(value, (int, float, np.floating, np.integer)) else None
    if value is None:
        return None
    rounded = float(f"{value:.{_DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded
