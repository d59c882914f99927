"""The encoder's choice from a bfloat16 product: the plain one's values and latents, whatever the product loses."""

import pytest
import torch

from jsae_lightning.kernels import cpu, cpu_topk
from jsae_lightning.kernels.cpu_topk import DenseTopK, ScreenedTopK, topk_encoder
from kernel_checks import PairChecks, SparseChecks, draw


@pytest.fixture
def screened(monkeypatch):
    """Screen every float32 encoder, however small, on any processor; return the shapes of those that were."""
    shapes = []

    class Counted(ScreenedTopK):
        def __init__(self, W, *others):
            shapes.append(tuple(W.shape))
            super().__init__(W, *others)

    for name in ("MIN_TOKENS", "MIN_D_MODEL", "MIN_D_SAE"):
        monkeypatch.setattr(cpu_topk, name, 0)
    monkeypatch.setattr(cpu_topk, "ScreenedTopK", Counted)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", 24)
    monkeypatch.setattr(cpu, "MIN_CHUNK_TOKENS", 2)
    monkeypatch.setattr(cpu_topk, "BLOCK_ELEMENTS", 16)
    return shapes


@pytest.mark.usefixtures("screened")
class TestScreened(SparseChecks, PairChecks):
    implementation = cpu
    device = "cpu"

    def test_topk_encode_with_ties(self):
        """Which of equal latents is chosen is the screen's own affair; the gradients go to those."""
        leaves = [t.requires_grad_() for t in (torch.ones(3, 2), torch.ones(2, 6) / 2, torch.zeros(6))]
        values, indices = cpu.topk_encode(*leaves, 4)
        assert values.tolist() == [[1.0] * 4] * 3
        assert [len(set(row)) for row in indices.tolist()] == [4] * 3
        values.sum().backward()
        chosen = torch.bincount(indices.flatten(), minlength=6).float()
        assert torch.equal(leaves[1].grad, chosen.expand(2, 6))
        assert torch.equal(leaves[2].grad, chosen)


def test_the_checks_above_screen(screened):
    cpu.topk_encode(draw(3, 4).float(), draw(4, 9).float(), draw(9).float(), 2)
    assert screened == [(4, 9)]


def _encoder(d_model=512, d_sae=8192, k=16, tokens=64):
    W = draw(d_model, d_sae, seed=1).float() / d_model**0.5
    x, b = draw(tokens, d_model).float(), draw(d_sae, seed=2).float() / 100
    return x, ScreenedTopK(W, b, k, tokens)


def test_normal_values_need_no_plain_product(monkeypatch):
    """Of 64 tokens none is uncertain, and the latents are those of the float64 pre-activations."""
    monkeypatch.setattr(DenseTopK, "topk", lambda *_: pytest.fail("the plain product was asked for"))
    x, encoder = _encoder()
    values, indices = encoder.topk(x)
    expected = (x.double() @ encoder.rows.double().T + encoder.b.double()).topk(16, dim=1)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(values.double(), expected.values, rtol=1e-5, atol=0)


def test_no_pre_activation_exceeds_its_limit():
    """Inputs, weights and biases over orders of magnitude; the limit is of the order of the largest error."""
    x = draw(50, 300).float() * draw(300, seed=5).exp().float() ** 2
    W = draw(300, 700, seed=1).float() * draw(700, seed=6).exp().float()
    encoder = ScreenedTopK(W, draw(700, seed=2).float() * 10, 4, 50)
    low = x.bfloat16()
    rounded = torch.addmm(encoder.low_b, low, encoder.low_rows.T).float()
    exact = x.double() @ W.double() + encoder.b.double()
    limits = torch.stack([encoder._limit(x, low, column) for column in rounded.T], dim=1)
    assert (exact <= limits).all()
    assert ((limits - rounded).amax(dim=1) < 60 * (exact - rounded).abs().amax(dim=1)).all()


_UP, _DOWN = 1 + 2.0**-8 - 2.0**-20, -(1 + 2.0**-8 + 2.0**-20)
"""Numbers that bfloat16 makes smaller by 2^-8, the most it can at 1."""
_LOSING = [_UP] * 128 + [_DOWN] * 128
_ALIGNED = {
    "inputs": (_LOSING, [1.0] * 256, 0.0),
    "weights": ([1.0] * 256, _LOSING, 0.0),
    "product": ([1.0, 1.0], [1.0, 2.0**-8 - 2.0**-16], 0.0),
    "bias": ([1.0], [-1.0], 1 + 2.0**-8 - 2.0**-16),
    "inputs too small to be squared": ([2.0**-80 * entry for entry in _LOSING], [1.0] * 256, 0.0),
    "weights too small to be squared": ([1.0] * 256, [2.0**-80 * entry for entry in _LOSING], 0.0),
    "products too small for float32": ([2.0**-64] * 256, [2.0**-64] * 256, 0.0),
}


@pytest.mark.parametrize("case", _ALIGNED)
def test_the_worst_of_each_rounding_stays_below_the_limit(case):
    """Every entry loses what it can, in the same direction: each case needs its own term of the bound."""
    x, w, b = (torch.tensor(numbers) for numbers in _ALIGNED[case])
    encoder = ScreenedTopK(w[:, None], b[None], 1, 1)
    low = x[None].bfloat16()
    rounded = torch.addmm(encoder.low_b, low, encoder.low_rows.T).float()[0]
    exact = x.double() @ w.double() + b.double()
    limit = encoder._limit(x[None], low, rounded).double()
    assert exact <= limit
    if case != "products too small for float32":  # which some processors take for zero, and some do not
        assert rounded < exact
    if "too small" not in case:
        assert limit - rounded < 2.2 * (exact - rounded)


def test_an_input_that_only_bfloat16_cannot_hold():
    """3.4e38 is infinite in bfloat16, and infinity times 0 no number: such a token gets the plain product."""
    W = torch.zeros(8, 100)
    W[0] = torch.arange(100) / 128
    x = torch.zeros(2, 8)
    x[0, 0], x[1, 0] = 3.4e38, 1.0
    encoder = ScreenedTopK(W, torch.zeros(100), 3, 2)
    assert not torch.isfinite(x.bfloat16()[0, 0])
    assert encoder.topk(x)[1].tolist() == [[99, 98, 97]] * 2


def test_latents_that_bfloat16_does_not_tell_apart():
    """Columns 1 + j / 4096 are all 1 in bfloat16: every token is uncertain, and gets the plain product's latents."""
    W = (1 + torch.arange(100) / 4096).expand(8, 100)
    encoder = ScreenedTopK(W, torch.zeros(100), 3, 5)
    for useful_afterwards in (False, False):
        values, indices = encoder.topk(torch.ones(5, 8))
        assert indices.tolist() == [[99, 98, 97]] * 5
        assert values.tolist() == [[8 * (1 + j / 4096) for j in (99, 98, 97)]] * 5
        assert encoder.is_useful == useful_afterwards


def test_one_uncertain_token_alone_gets_the_plain_product(monkeypatch):
    """Three tokens have distinct largest latents; the fourth has latents that bfloat16 does not tell apart."""
    W = torch.cat([4 * torch.eye(4).repeat_interleave(2, dim=1), (1 + torch.arange(100) / 4096).expand(4, 100)], dim=1)
    x = torch.cat([torch.eye(4)[:3] * 10 - 2, torch.ones(1, 4)])
    asked = []
    plain = DenseTopK.topk
    monkeypatch.setattr(DenseTopK, "topk", lambda self, x: asked.append(x) or plain(self, x))
    encoder = ScreenedTopK(W, torch.zeros(108), 2, 4)
    values, indices = encoder.topk(x)
    assert [tokens.tolist() for tokens in asked] == [[[1.0] * 4]]
    assert encoder.is_useful
    expected = torch.sort(x @ W, dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :2])
    assert torch.equal(indices.sort(dim=1).values[:3], expected.indices[:3, :2])


def test_values_that_are_no_numbers_come_out_as_from_the_plain_product():
    x, encoder = _encoder(d_model=32, d_sae=256, k=4, tokens=6)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    (values, indices), (expected, expected_indices) = encoder.topk(x), encoder.dense.topk(x)
    torch.testing.assert_close(values, expected, equal_nan=True, rtol=1e-5, atol=1e-6)
    assert torch.equal(indices[[0, 3, 4, 5]], expected_indices[[0, 3, 4, 5]])


def test_which_encoders_are_screened(monkeypatch):
    """Long products of float32 for many tokens, where the processor has bfloat16 ones."""
    supported = [True]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported[0])

    def screens(d_model=256, d_sae=1024, k=4, tokens=2048, dtype=torch.float32):
        W, b = torch.zeros(d_model, d_sae, dtype=dtype), torch.zeros(d_sae, dtype=dtype)
        return isinstance(topk_encoder(W, b, k, tokens, 1), ScreenedTopK)

    assert screens()
    assert not screens(d_model=255)
    assert not screens(d_sae=1023)
    assert not screens(tokens=2047)
    assert not screens(dtype=torch.float64)
    assert not screens(dtype=torch.bfloat16)
    supported[0] = False
    assert not screens()
