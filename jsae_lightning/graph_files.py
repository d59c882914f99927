"""The files of a graph: edges and latents as Parquet, the strongest edges as GraphML and as a NetworkX graph."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jsae_lightning.atomic_files import atomic_file
from jsae_lightning.errors import UserError
from jsae_lightning.sorted_runs import Block

if TYPE_CHECKING:
    import networkx
    import pyarrow

FORMAT_VERSION = 1
EDGES, LATENTS, GRAPHML, GRAPH = "edges.parquet", "latents.parquet", "graph.graphml", "graph.json"
GRAPHML_EDGES = 20_000
"""Edges in `graph.graphml` and in `load_graph` by default: what graph tools still draw."""

_EDGE_TYPES = {"output": "int32", "input": "int32", "count": "int64", "mean_abs": "float32", "mean": "float32"}


def write_edges(path: Path, blocks: Iterable[Block]) -> int:
    """Write blocks of edges, each already in its place, as one table; return the number of rows.

    Columns: see `_EDGE_TYPES`; other columns of the blocks are left out.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in _EDGE_TYPES.items()])
    rows = 0
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for block in blocks:
            columns = [pa.array(block[field.name].numpy()).cast(field.type) for field in schema]
            table = pa.table(columns, schema=schema)
            writer.write_table(table, row_group_size=2**20)
            rows += table.num_rows
    return rows


def write_latents(path: Path, statistics: dict[str, dict[str, Tensor]]) -> None:
    """Write a row for each latent of both sides: `count`, `mean_activation` (null: never active), `max_activation`.

    `statistics[side]` holds `count`, `sum` and `max` of shape (d_sae,).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for side, found in statistics.items():
        mean = (found["sum"] / found["count"]).float().numpy()
        columns = {
            "side": pa.array([side] * len(mean)),
            "latent": pa.array(range(len(mean)), pa.int32()),
            "count": pa.array(found["count"].numpy()),
            "mean_activation": pa.array(mean, mask=(found["count"] == 0).numpy()),
            "max_activation": pa.array(found["max"].numpy()),
        }
        tables.append(pa.table(columns))
    with atomic_file(path) as temporary:
        pq.write_table(pa.concat_tables(tables), temporary, compression="zstd")


def read_edges(folder: str | Path, *, max_edges: int | None = None, min_weight: float = 0.0) -> "pyarrow.Table":
    """Return the edges of an evaluation (or of its `graph` folder), the strongest first, as a pyarrow table.

    Args:
        folder: an evaluation's folder, or `graph/` in it.
        max_edges: the strongest so many; None: all. Only as much of the file is read as is needed.
        min_weight: those with mean |J| of at least so much.

    Raises:
        UserError: the file is missing or not what `run_graph` writes.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = graph_folder(folder) / EDGES
    try:
        file = pq.ParquetFile(path)
        if missing := set(_EDGE_TYPES) - set(file.schema_arrow.names):
            raise UserError(f"{path}: column {min(missing)} is missing: evaluate again")
        tables, rows = [file.schema_arrow.empty_table()], 0
        for batch in file.iter_batches(batch_size=2**16):
            table = pa.Table.from_batches([batch])
            kept = table.filter(pa.compute.greater_equal(table["mean_abs"], min_weight))
            if max_edges is not None:
                kept = kept.slice(0, max_edges - rows)
            tables.append(kept)
            rows += kept.num_rows
            if rows == max_edges or (len(table) and table["mean_abs"][-1].as_py() < min_weight):
                break
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file: evaluate with the part 'graph' first") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}): evaluate again") from error
    return pa.concat_tables(tables)


def read_latents(folder: str | Path) -> "pyarrow.Table":
    """Return `latents.parquet` of an evaluation, a row for each latent; raise UserError if it is not there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = graph_folder(folder) / LATENTS
    try:
        return pq.read_table(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file: evaluate with the part 'graph' first") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}): evaluate again") from error


def load_graph(
    folder: str | Path, *, max_edges: int | None = GRAPHML_EDGES, min_weight: float = 0.0
) -> "networkx.DiGraph":
    """Return the strongest edges of an evaluation as a bipartite graph from input latents to output latents.

    Nodes are ("input", j) and ("output", i), those with an edge only, with the attributes `side`, `latent`,
    `bipartite` (0 for inputs), `count`, `mean_activation`, `max_activation`; edges have `weight` = mean |J|, `mean` and
    `count`, as in `edges.parquet`. `max_edges=None` loads all edges that have at least `min_weight`.
    Raises UserError as `read_edges` does.
    """
    import networkx

    graph = networkx.DiGraph()
    edges = read_edges(folder, max_edges=max_edges, min_weight=min_weight).to_pydict()
    latents = {(row["side"], row["latent"]): row for row in read_latents(folder).to_pylist()}
    for i, j, count, mean_abs, mean in zip(*(edges[name] for name in _EDGE_TYPES), strict=True):
        for node in (("input", j), ("output", i)):
            if node not in graph:
                graph.add_node(node, bipartite=int(node[0] == "output"), **latents[node])
        graph.add_edge(("input", j), ("output", i), weight=mean_abs, mean=mean, count=count)
    return graph


def write_graphml(path: Path, graph: "networkx.DiGraph") -> None:
    """Write a graph of `load_graph` as GraphML, with `input_12` and `output_7` as the nodes' names."""
    import networkx

    named = networkx.relabel_nodes(graph, {node: f"{node[0]}_{node[1]}" for node in graph})
    with atomic_file(path) as temporary:
        networkx.write_graphml(named, temporary)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one JSON object, indented."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line, as they come; return how many there were."""
    lines = 0
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", errors="replace") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            lines += 1
    return lines


def graph_folder(folder: str | Path) -> Path:
    """Return `graph/` of an evaluation's folder, or the folder itself if it is one."""
    folder = Path(folder)
    return folder if (folder / EDGES).is_file() else folder / "graph"


def strongest_first(weight: Tensor, row: Tensor) -> Tensor:
    """Return int64 keys that order float32 weights >= 0 by falling weight, equal ones by rising row number < 2^32.

    The bits of a float32 that is not negative, read as an integer, rise with it.
    """
    bits = weight.float().contiguous().view(torch.int32).long()
    return ((2**31 - 1 - bits) << 32) | row
