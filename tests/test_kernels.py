"""The fast kernels against the plain ones: values and gradients."""

import pytest
import torch

from jsae_lightning import kernels
from jsae_lightning.errors import UserError
from jsae_lightning.kernels import cpu, reference


def _gradients(function, tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    return out.detach(), torch.autograd.grad((out * weights).sum(), leaves)


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("tokens", "d_sae", "k"), [(7, 12, 3), (1, 5, 5), (9, 6, 1)])
def test_topk_encode_agrees_with_reference(tokens, d_sae, k):
    arguments = (_draw(tokens, 4), _draw(4, d_sae, seed=1), _draw(d_sae, seed=2))
    chosen = [implementation.topk_encode(*arguments, k)[1] for implementation in (cpu, reference)]
    assert torch.equal(*chosen)
    fast, slow = (_gradients(lambda *a, i=i: i.topk_encode(*a, k)[0], arguments) for i in (cpu, reference))
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


def test_topk_encode_by_hand():
    values, indices = cpu.topk_encode(
        torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 2.0]]), torch.tensor([0.0, 0.5, 0.0]), 2
    )
    assert values.tolist() == [[3.0, 1.5]]
    assert indices.tolist() == [[0, 1]]


def test_topk_entry_below_zero_is_clipped_and_gets_no_gradient():
    W_enc = torch.tensor([[1.0, -2.0]], requires_grad=True)
    values, _ = cpu.topk_encode(torch.tensor([[1.0]]), W_enc, torch.zeros(2), 2)
    values.sum().backward()
    assert values.tolist() == [[1.0, 0.0]]
    assert W_enc.grad.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("repeated", [False, True])
def test_sparse_decode_agrees_with_reference(repeated):
    indices = torch.tensor([[0, 0, 2], [5, 1, 1]]) if repeated else torch.tensor([[0, 3, 2], [5, 1, 0]])
    arguments = (_draw(2, 3), _draw(6, 4, seed=1))
    fast, slow = (_gradients(lambda v, w, i=i: i.sparse_decode(v, indices, w), arguments) for i in (cpu, reference))
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block_elements", [1, 60, 2**20])
@pytest.mark.parametrize(("k_out", "k_in"), [(3, 3), (1, 4), (5, 2)])
def test_bilinear_rows_agree_with_reference(monkeypatch, block_elements, k_out, k_in):
    """Blocks of one token, of some with a rest, and of all; unequal k; rows used by several tokens."""
    monkeypatch.setattr(cpu, "BLOCK_ELEMENTS", block_elements)
    generator = torch.Generator().manual_seed(3)
    indices_out = torch.randint(0, 6, (11, k_out), generator=generator)
    indices_in = torch.randint(0, 8, (11, k_in), generator=generator)
    arguments = (_draw(6, 5), _draw(11, 5, seed=1), _draw(8, 5, seed=2))
    fast, slow = (
        _gradients(lambda p, s, q, i=i: i.bilinear_rows(p, s, q, indices_out, indices_in), arguments)
        for i in (cpu, reference)
    )
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


def test_select_kernels_forces_an_implementation(monkeypatch):
    monkeypatch.setattr(kernels, "_forced", [])
    kernels.select_kernels("reference")
    assert kernels._for(torch.zeros(1)) is reference
    kernels.select_kernels("auto")
    assert kernels._for(torch.zeros(1)) is cpu
    with pytest.raises(UserError, match="kernels: 'fast'"):
        kernels.select_kernels("fast")
