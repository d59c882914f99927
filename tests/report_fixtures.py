"""Evaluation folders as the parts of an evaluation write them, with made-up but consistent numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from sweep_folders import finished, make_job

K, D_SAE = 8, 64
HOSTILE = ["</script>", "<b>", '"', "'", "\n", "مرحبا", " the", "&amp;", "\u2028", "<!--"]


def make_pair_config(coef: float = 1.0, random_weights: bool | str = False) -> dict[str, Any]:
    """`config.json` of an exported pair."""
    sae = {"d_model": 32, "d_sae": D_SAE, "k": K, "subtract_b_dec": False}
    model = {
        "name": "tiny/model<1>",
        "revision": None,
        "layer": 2,
        "dtype": "float32",
        "random_weights": random_weights,
    }
    return {
        "format_version": 1,
        "input_sae": sae,
        "output_sae": sae,
        "model": model | {"random_seed": 0, "mlp_kind": "plain", "activation": "gelu", "mlp_hash": "0" * 64},
        "jacobian": {"penalty": "l1", "params": {}, "coef": coef, "at": "input", "warmup_fraction": 0.05},
        "data": {"source": "stdlib"},
        "tokens_seen": 123456,
        "seed": 0,
        "versions": {},
    }


def make_evaluation(
    folder: Path,
    *,
    name: str = "run",
    coef: float = 1.0,
    random_weights: bool | str = False,
    fidelity: bool = True,
    graph: bool = True,
    hostile: bool = False,
) -> Path:
    """Write `eval.json`, `arrays.safetensors` and `graph/` to `folder`; the larger coef, the sparser J."""
    rng = np.random.default_rng(int(100 * coef) + 7 * bool(random_weights))
    folder.mkdir(parents=True)
    values = rng.standard_t(3, (200, K, K)) * 0.05 / (1 + 3 * coef) * np.exp(rng.normal(0, 0.3 + coef, (200, K, K)))
    values *= 3 if random_weights else 1
    figures = jacobian_figures(values) | {
        "val/ce_clean": 2.0,
        "val/ce_score_both": 0.95 - 0.1 * coef,
        "val/ce_score_input": 0.97 - 0.02 * coef,
        "val/ce_score_output": 0.96 - 0.07 * coef,
        "val/kl_both": 0.05 + 0.1 * coef,
        "val/explained_variance_input": 0.87 - 0.01 * coef,
        "val/explained_variance_output": 0.91 - 0.06 * coef,
        "val/dead_share_output": 0.2,
        "val/unknown": None,
    }
    arrays = jacobian_arrays(values)
    curves: dict[str, Any] = {}
    if fidelity:
        arrays |= fidelity_arrays(rng)
        edges = [0, 1, 2, 4, 8, 16, 32, 64]
        for number, ranking in enumerate(("contribution", "jacobian", "integrated_gradients", "random")):
            fall = [0.4 * 2 ** (-e / (4 + 9 * number)) for e in edges]
            curves[f"edge_kl/{ranking}"] = curve(edges, fall)
            curves[f"edge_error/{ranking}"] = curve(edges, [2 * value for value in fall])
            curves[f"edge_ce/{ranking}"] = curve(edges, [2.02 + value for value in fall])
        figures |= {"fidelity/ablation_slope": 0.97, "fidelity/ablation_r2": 0.9, "fidelity/edge_ce_clean": 2.0}
        figures |= {"fidelity/edge_ce_true": 2.01, "fidelity/flat_share": 0.1, "fidelity/linear_share": 0.8}
        figures |= {"fidelity/jump_relu_share": 0.15, "fidelity/other_share": 0.05}
    content = {
        "format_version": 1,
        "name": name,
        "folder": str(folder.parent),
        "kind": "jsae" if coef else "traditional",
        "random_weights": random_weights,
        "pair": make_pair_config(coef, random_weights),
        "evaluation": {
            "tokens": 4096, "jacobian_tokens": 200, "sequences": 64, "documents": 40, "groups": 40, "at": "input",
            "other_at": "reconstruction", "seed": 0, "ranks": 1, "data": {"source": "stdlib"}, "parts": ["figures"],
            "seconds": {"figures": 1.5}, "peak_bytes": 1 << 28,
        },
        "figures": {
            key: {"mean": value, "standard_error": None if value is None else abs(value) * 0.01}
            for key, value in figures.items()
        },
        "curves": curves,
        "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    (folder / "eval.json").write_text(json.dumps(content), encoding="utf-8")
    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, folder / "arrays.safetensors")
    if graph:
        make_graph(folder / "graph", rng, hostile)
        scores = [{"side": "output", "latent": latent, "explanation": f"explains {latent}", "score": 0.5, "scorer": "s"}
                  for latent in range(10)]  # fmt: skip
        scores[1]["explanation"] = "</script><script>window.hacked = 1</script>" if hostile else "one"
        scores[2] |= {"score": None, "explanation": None}
        write_lines(folder / "autointerp" / "scores.jsonl", scores)
    return folder


def jacobian_figures(values: np.ndarray) -> dict[str, float]:
    magnitudes = np.abs(values).reshape(len(values), -1)
    n = magnitudes.shape[1]
    rms = magnitudes / np.sqrt((magnitudes**2).mean(1, keepdims=True))
    ordered = -np.sort(-magnitudes, axis=1)
    effective = (magnitudes.sum(1) ** 2 / (magnitudes**2).sum(1)).mean()
    figures = {f"jacobian/share_above_{t}": (magnitudes > t).mean() for t in (0.005, 0.01, 0.015, 0.02)}
    figures |= {f"jacobian/rms_share_above_{t}": (rms > t).mean() for t in (0.5, 1, 2, 4)}
    cumulative = ordered.cumsum(1) / ordered.sum(1, keepdims=True)
    figures |= {f"jacobian/top_share_{m}": cumulative[:, m - 1].mean() for m in (1, 2, 4, 8, 16, 32, n)}
    figures |= {
        "jacobian/effective_edges": effective,
        "jacobian/hoyer": 1 - effective / n,
        "jacobian/gini": 0.6,
        "jacobian/mean_abs": magnitudes.mean(),
    }
    return {key: float(value) for key, value in figures.items()}


def jacobian_arrays(values: np.ndarray) -> dict[str, np.ndarray]:
    edges = np.logspace(-6, 2, 81)
    rms = values / np.sqrt((values**2).mean((1, 2), keepdims=True))
    arrays = {"histogram_edges": edges}
    for kind, entries in (("abs", values), ("rms", rms)):
        counts, _ = np.histogram(np.abs(entries), bins=[0, *edges, np.inf])
        for at in ("input", "reconstruction"):
            arrays[f"histogram_{kind}_{at}"] = np.concatenate([[3], counts]).astype(np.int64)
    return arrays | {
        "heatmap": values[:8].astype(np.float32),
        "heatmap_position": np.arange(16).reshape(8, 2),
        "firing_rate_input": np.full(D_SAE, K / D_SAE),
        "firing_rate_output": np.full(D_SAE, K / D_SAE),
    }


def fidelity_arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    predicted = rng.normal(0, 0.1, 300).astype(np.float32)
    noise = rng.normal(0, 0.02, 300).astype(np.float32)
    x = np.tile(np.linspace(0, 2, 20, dtype=np.float32), (8, 1))
    classes = np.array([0, 0, 0, 1, 1, 2, 3, 0])
    shapes = [x[0], np.maximum(x[0] - 1, 0), 0 * x[0], np.sin(3 * x[0])]
    return {
        "ablation_predicted": predicted,
        "ablation_measured": 0.97 * predicted + noise,
        "unit_predicted": predicted,
        "unit_measured": 0.9 * predicted + noise,
        "linearity_x": x,
        "linearity_y": np.stack([shapes[kind] for kind in classes]).astype(np.float32),
        "linearity_class": classes,
        "linearity_latents": rng.integers(0, D_SAE, (8, 2)),
        "second_derivatives": np.abs(rng.normal(0, 0.1, 500)).astype(np.float32),
    }


def curve(x: list[float], y: list[float]) -> dict[str, Any]:
    return {"x": x, "y": y, "standard_error": [0.01 for _ in x]}


def make_graph(folder: Path, rng: np.random.Generator, hostile: bool) -> None:
    folder.mkdir(parents=True)
    pairs = [(output, int(i)) for output in range(40) for i in rng.choice(D_SAE, 30, replace=False)]
    mean_abs = -np.sort(-np.abs(rng.standard_t(2, len(pairs))) * 0.01).astype(np.float32)
    order = rng.permutation(len(pairs))
    outputs, inputs = np.array(pairs, dtype=np.int32)[order].T
    sign = np.where(rng.random(len(pairs)) < 0.3, -1, 1).astype(np.float32)
    table = {
        "output": outputs,
        "input": inputs,
        "count": rng.integers(1, 300, len(pairs)),
        "mean_abs": mean_abs,
        "mean": (mean_abs * sign * 0.9).astype(np.float32),
    }
    pq.write_table(pa.table(table), folder / "edges.parquet")
    latents = [(side, number) for side in ("input", "output") for number in range(D_SAE)]
    pq.write_table(
        pa.table(
            {
                "side": [side for side, _ in latents],
                "latent": pa.array([number for _, number in latents], pa.int32()),
                "count": pa.array([10 + 7 * number % 50 for _, number in latents], pa.int64()),
                "mean_activation": pa.array([1.5] * len(latents), pa.float32()),
                "max_activation": pa.array([4.5] * len(latents), pa.float32()),
            }
        ),
        folder / "latents.parquet",
    )
    info = {"format_version": 1, "tokens": 4096, "at": "input", "d_sae_input": D_SAE, "d_sae_output": D_SAE}
    (folder / "graph.json").write_text(json.dumps(info | {"num_edges": 1200, "kept_edges": 1200, "note": ""}))
    write_lines(
        folder / "contexts.jsonl",
        [
            {"side": side, "latent": number, "count": 20, "examples": [example(rng, hostile) for _ in range(3)]}
            for side, number in latents
        ],
    )
    write_lines(
        folder / "edge_contexts.jsonl",
        [
            {
                "output": int(o),
                "input": int(i),
                "mean_abs": 0.1,
                "mean": 0.1,
                "count": 9,
                "examples": [edge_example(rng)],
            }
            for o, i in zip(outputs[:20], inputs[:20], strict=True)
        ],
    )


def example(rng: np.random.Generator, hostile: bool = False) -> dict[str, Any]:
    words = HOSTILE if hostile else [" the", " cat", " sat", "\n", " on", "def", "(", "x", ")", ":"]
    tokens = [words[i] for i in rng.integers(0, len(words), 33)]
    if hostile:
        tokens[:5] = HOSTILE[:5]
    activations = np.where(rng.random(33) < 0.2, rng.random(33) * 3, 0)
    activations[24] = 4.5
    return {"tokens": tokens, "activations": [round(float(a), 4) for a in activations], "peak": 24,
            "sequence": 3, "position": 30, "document": 1}  # fmt: skip


def edge_example(rng: np.random.Generator) -> dict[str, Any]:
    row = example(rng)
    activations = row.pop("activations")
    return row | {"activations_output": activations, "activations_input": activations[::-1],
                  "jacobian": [0.01 * a for a in activations]}  # fmt: skip


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make_run(folder: Path, *overrides: str, coef: float = 1.0, **evaluation: Any) -> Path:
    """A finished run's folder with an evaluation."""
    make_job(folder, *overrides, status="finished", metrics=finished(val_loss=0.1))
    make_evaluation(folder / "eval", name=folder.name, coef=coef, **evaluation)
    return folder


def make_sweep(folder: Path, coefs: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)) -> Path:
    """A sweep over the penalty's weight, one more on a random model, and the comparison of the first two."""
    for number, coef in enumerate(coefs):
        make_run(folder / str(number), f"jacobian.coef={coef}", coef=coef, graph=number == 1)
    last = folder / str(len(coefs))
    make_run(last, "jacobian.coef=1.0", "model.random_weights=true", random_weights=True, graph=False, fidelity=False)
    runs = [
        {
            "name": str(number),
            "folder": str(folder / str(number)),
            "eval": str(folder / str(number) / "eval" / "eval.json"),
            "random_weights": False,
        }
        for number in range(2)
    ]
    shrunk = {f"jacobian/share_above_{t}": {"mean": 0.3 - 10 * t, "standard_error": 0.01} for t in (0.005, 0.01, 0.02)}
    comparison = {
        "format_version": 1,
        "runs": runs,
        "baseline": {"1": "0"},
        "shrink_matched": [{"run": "1", "baseline": "0", "scale": 0.4, "figures": shrunk}],
        "verdicts": ["1 is sparser than 0 beyond shrinkage."],
        "findings": ["1 has 20 % fewer effective edges than 0: more than shrinkage."],
    }
    (folder / "comparison").mkdir()
    (folder / "comparison" / "comparison.json").write_text(json.dumps(comparison))
    return folder
