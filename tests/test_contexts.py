"""Top contexts: against a search through everything, windows at borders, edges' contexts, text of tokens."""

import json

import pytest
import torch

from held_out_factory import make_held_out
from jsae_lightning.contexts import AFTER, BEFORE, TokenText, TopContexts, window_slice
from jsae_lightning.edge_contexts import EdgeContexts
from jsae_lightning.graph import latents_of, run_graph
from jsae_lightning.grouped_evaluation import spaced
from jsae_lightning.held_out import HeldOut
from jsae_lightning.jacobians import jacobian
from jsae_lightning.sae import Latents
from tiny_models import make_model_dir, make_tokenizer

SETTINGS = {"tokens": None, "top_edges": 7, "contexts": 3, "edge_contexts": 2}


def read(folder, name):
    return [json.loads(line) for line in (folder / "graph" / name).read_text().splitlines()]


def dense_latents(held_out):
    """(sequences, seq, d_sae) of both sides at `input`, 0 at positions that are not included."""
    x = held_out.language_model.mlp_in(held_out.tokens)
    result = {}
    with torch.no_grad():
        for (side, sae), target in zip(held_out.pair.named_saes(), (x, held_out.mlp(x.flatten(0, 1))), strict=True):
            latents = sae.encode(target.reshape(-1, sae.d_model))
            table = torch.zeros(len(latents.values), sae.d_sae, dtype=torch.float64)
            table.scatter_(1, latents.indices, latents.values.double())
            result[side] = table.view(*x.shape[:2], -1) * held_out.included[:, :, None]
    return result


@pytest.mark.parametrize("batch_sequences", [1, 4])
def test_contexts_against_a_search_through_everything(tmp_path, batch_sequences):
    held_out = make_held_out(sequences=7, seq=50, batch_sequences=batch_sequences)
    run_graph(held_out, tmp_path, **SETTINGS)
    dense = dense_latents(held_out)
    records = read(tmp_path, "contexts.jsonl")
    assert [(r["side"], r["latent"]) for r in records] == [
        (side, latent) for side, width in (("input", 32), ("output", 24)) for latent in range(width)
    ]
    assert any(len(record["examples"]) == 3 for record in records)
    for record in records:
        values = dense[record["side"]][:, :, record["latent"]]
        assert record["count"] == (values > 0).sum()
        highest, at = values.max(dim=1)
        order = [s for s in highest.argsort(descending=True, stable=True).tolist() if highest[s] > 0][:3]
        assert [(e["sequence"], e["position"]) for e in record["examples"]] == [(s, int(at[s])) for s in order]
        for example in record["examples"]:
            s, p = example["sequence"], example["position"]
            first, last = max(0, p - BEFORE), min(50, p + AFTER + 1)
            assert example["tokens"] == [f"<{t}>" for t in held_out.tokens[s, first:last].tolist()]
            assert example["activations"] == pytest.approx(values[s, first:last].tolist(), rel=1e-4)
            assert example["peak"] == p - first
            assert example["document"] == held_out.document[s, p]
    centres = {e["position"] for r in records for e in r["examples"]}
    assert min(centres) < BEFORE
    assert max(centres) > 50 - AFTER  # windows cut at either border


@pytest.mark.parametrize("at", ["input", "reconstruction"])
def test_edge_contexts_against_a_search_through_everything(tmp_path, at):
    held_out = make_held_out(at=at, sequences=6, seq=40)
    run_graph(held_out, tmp_path, **SETTINGS | {"tokens": 90})
    counts = spaced(held_out.included, 90)
    with torch.no_grad():
        found = jacobian(
            held_out.pair, held_out.mlp, held_out.language_model.mlp_in(held_out.tokens).flatten(0, 1), at=at
        )
    dense, active = torch.zeros(240, 24, 32, dtype=torch.float64), torch.zeros(240, 24, 32, dtype=torch.bool)
    token = torch.arange(240)[:, None, None]
    dense[token, found.indices_out[:, :, None], found.indices_in[:, None]] = found.values
    active[token, found.indices_out[:, :, None], found.indices_in[:, None]] = found.active
    dense, active = dense.view(6, 40, 24, 32), active.view(6, 40, 24, 32)
    records = read(tmp_path, "edge_contexts.jsonl")
    weight = (dense.abs() * counts[:, :, None, None]).sum(dim=(0, 1)).flatten()
    assert [r["output"] * 32 + r["input"] for r in records] == weight.argsort(descending=True)[:7].tolist()
    for record in records:
        i, j = record["output"], record["input"]
        values, both = dense[:, :, i, j], active[:, :, i, j] & counts
        highest, where = values.abs().masked_fill(~both, -1).max(dim=1)
        order = [s for s in highest.argsort(descending=True, stable=True).tolist() if highest[s] >= 0][:2]
        assert [(e["sequence"], e["position"]) for e in record["examples"]] == [(s, int(where[s])) for s in order]
        assert record["count"] == both.sum()
        for example in record["examples"]:
            s, p = example["sequence"], example["position"]
            shown = slice(max(0, p - BEFORE), p + AFTER + 1)
            expected = values[s, shown] * held_out.included[s, shown]
            assert example["jacobian"] == pytest.approx(expected.tolist(), rel=1e-4)
            assert example["activations_output"][example["peak"]] > 0
            assert example["activations_input"][example["peak"]] > 0


def test_edges_are_looked_up_in_the_order_of_the_given_latents():
    """Latents that are as good as equal change places when a part of the tokens is encoded again."""
    held_out = make_held_out()
    x = held_out.language_model.mlp_in(held_out.tokens[:1]).flatten(0, 1)
    latents, position = latents_of(held_out, x), torch.arange(len(x))
    swapped = {side: Latents(part.values.flip(1), part.indices.flip(1)) for side, part in latents.items()}
    edges = torch.cartesian_prod(latents["output"].indices[3], latents["input"].indices[3])
    tops = []
    for given in (latents, swapped):
        contexts = EdgeContexts(edges, 1, held_out)
        contexts.add(x, given["output"], given["input"], 0, position, torch.ones(len(x), dtype=torch.bool))
        tops.append(contexts.top.columns)
    assert (tops[0]["score"] > 0).all()
    for name in ("score", "position", "activation", "jacobian"):
        torch.testing.assert_close(tops[1][name], tops[0][name])


def offer(top, row, score, sequence):
    column = torch.tensor([score])
    top.add(torch.tensor([row]), sequence, {"score": column, "activation": column, "position": torch.tensor([0])})


def test_equal_peaks_go_to_the_earlier_sequence_in_any_order():
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        top = TopContexts(2, 2, torch.device("cpu"))
        for sequence in order:
            offer(top, 1, [5.0, 7.0, 5.0, 1.0][sequence], sequence)
        assert top.columns["score"].tolist() == [[-torch.inf] * 2, [7.0, 5.0]]
        if order[0] == 0:
            assert top.columns["sequence"].tolist() == [[-1, -1], [1, 0]]


def test_window_slices():
    assert window_slice(0, 100) == slice(BEFORE, BEFORE + AFTER + 1)
    assert window_slice(99, 100) == slice(0, BEFORE + 1)
    assert window_slice(50, 100) == slice(0, BEFORE + AFTER + 1)
    assert window_slice(1, 3) == slice(BEFORE - 1, BEFORE + 2)


def test_text_of_tokens(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path))
    text = TokenText(tokenizer)
    ids = tokenizer.encode("the cat: (sat)\n on", add_special_tokens=False)
    assert "".join(text(ids)) == "the cat: (sat)\n on"
    half = text(tokenizer.encode("\u00e9", add_special_tokens=False))
    assert "\ufffd" in "".join(half)  # one byte of two
    assert TokenText(None)([3, 5]) == ["<3>", "<5>"]

    class SentencePiece:
        def decode(self, ids, **kwargs):
            return "cat"

        def convert_ids_to_tokens(self, token):
            return "\u2581cat"

    assert TokenText(SentencePiece())([1]) == [" cat"]


def test_on_a_real_architecture(tmp_path):
    from factories import make_pair
    from jsae_lightning.language_model import LanguageModel, load_tokenizer

    folder = make_model_dir("gpt_neox", tmp_path / "model", d_model=16, d_mlp=24)
    model = LanguageModel.load(str(folder), layer=1)
    tokens = torch.randint(250, (3, 12), generator=torch.Generator().manual_seed(0))
    included = torch.ones_like(tokens, dtype=torch.bool)
    included[:, 0] = False
    held_out = HeldOut(
        make_pair(16).float(), model.frozen_mlp, model, tokens, included, torch.zeros_like(tokens), "input", 2,
        tokenizer=load_tokenizer(str(folder)),
    )  # fmt: skip
    figures = run_graph(held_out, tmp_path, **SETTINGS)
    assert 1 < figures["graph/effective_edges"] <= figures["graph/edges"] <= 33 * 25
    assert 0 < figures["graph/gini"] < 1
    assert len(read(tmp_path, "edge_contexts.jsonl")) == 7
    shown = [e for r in read(tmp_path, "contexts.jsonl") for e in r["examples"]]
    assert shown
    assert all(e["position"] > 0 and e["activations"][e["peak"]] == max(e["activations"]) for e in shown)
