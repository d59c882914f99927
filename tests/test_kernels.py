"""The fast kernels against the plain ones: values and gradients."""

import pytest
import torch

from jsae_lightning import kernels
from jsae_lightning.errors import UserError
from jsae_lightning.kernels import cpu, cpu_jacobian, cpu_products, reference
from kernel_checks import Largest, PenaltyChecks, SparseChecks, force_onednn


def _gradients(function, tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    weights = _draw(*out.shape, seed=9).to(out.dtype)
    return out.detach(), torch.autograd.grad((out * weights).sum(), leaves)


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=["one block", "blocks of some tokens"])
def blocks(request, monkeypatch):
    """The tests' tokens in one block; and in several with a smaller one at the end, every hidden unit a part."""
    if request.param != "one block":
        monkeypatch.setattr(cpu_jacobian, "num_parts", lambda units, threads: units)
        monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", 24)
        monkeypatch.setattr(cpu, "MIN_CHUNK_TOKENS", 2)
        monkeypatch.setattr(cpu_jacobian, "BLOCK_ELEMENTS", 3 * 4 * 16)


@pytest.mark.usefixtures("blocks")
class TestCpu(SparseChecks, PenaltyChecks):
    implementation = cpu
    device = "cpu"


def test_the_encoder_never_holds_all_pre_activations(monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", 4 * 50)
    monkeypatch.setattr(cpu, "MIN_CHUNK_TOKENS", 2)
    with Largest() as largest:
        cpu.topk_encode(_draw(30, 3), _draw(3, 50, seed=1), _draw(50, seed=2), 2)
    assert largest.bytes == 4 * 50 * 8  # of float64: a chunk


def _jacobian_arguments(num_terms=1, tokens=11, d_sae_out=6, d_sae_in=8, k_out=3, k_in=3):
    """Tensors that gradients reach, (weights, W_out), and indices; some latents are used often, some never."""
    d_model, d_mlp = 4, 5
    generator = torch.Generator().manual_seed(3)
    indices = [
        torch.randint(0, n - 1, (tokens, k), generator=generator) for n, k in ((d_sae_out, k_out), (d_sae_in, k_in))
    ]
    tensors = [_draw(d_sae_out, d_model), _draw(d_sae_in, d_model, seed=1)]
    tensors += [_draw(tokens, d_mlp, seed=2 + term) for term in range(num_terms)]
    weights = [_draw(d_model, d_mlp, seed=5 + term) for term in range(num_terms)]
    return tensors, weights, _draw(d_mlp, d_model, seed=8), indices


def _jacobian_gradients(implementation, arguments, dtype=torch.float64):
    tensors, weights, W_out, indices = arguments
    weights, W_out = [weight.to(dtype) for weight in weights], W_out.to(dtype)

    def values(encoder_rows, decoder_rows, *slopes):
        terms = list(zip(weights, slopes, strict=True))
        return implementation.jacobian_values(encoder_rows, decoder_rows, W_out, terms, *indices)

    return _gradients(values, [tensor.to(dtype) for tensor in tensors])


def test_jacobian_values_by_hand():
    """One hidden unit: J = (e . w_out) slope (w_in . d)."""
    encoder_rows, decoder_rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 5.0]])
    W_out, weight, slope = torch.tensor([[7.0, 11.0]]), torch.tensor([[13.0], [17.0]]), torch.tensor([[0.5]])
    for implementation in (cpu, reference):
        values = implementation.jacobian_values(
            encoder_rows, decoder_rows, W_out, [(weight, slope)], torch.tensor([[1, 0]]), torch.tensor([[0, 1]])
        )
        assert values.tolist() == [[[22 * 0.5 * 39, 22 * 0.5 * 85], [7 * 0.5 * 39, 7 * 0.5 * 85]]]


@pytest.mark.parametrize("block_elements", [1, 60, 2**20])
@pytest.mark.parametrize("slices", [1, 2, 5])
@pytest.mark.parametrize("units_of_a_part", [1, 3, 5])
@pytest.mark.parametrize("num_terms", [1, 2])
def test_jacobian_values_agree_with_reference(monkeypatch, block_elements, slices, units_of_a_part, num_terms):
    """Blocks of one token, of some with a rest, and of all; d_mlp whole, uneven and unit by unit; plain and gated."""
    monkeypatch.setattr(cpu_jacobian, "BLOCK_ELEMENTS", block_elements)
    monkeypatch.setattr(cpu_jacobian, "MIN_PART_UNITS", units_of_a_part)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(cpu_jacobian, "num_slices", lambda *shape: slices)
    arguments = _jacobian_arguments(num_terms)
    fast, slow = (_jacobian_gradients(implementation, arguments) for implementation in (cpu, reference))
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("k_out", "k_in"), [(1, 4), (5, 2), (1, 1), (6, 8)])
@pytest.mark.parametrize("tokens", [1, 2, 30])
@pytest.mark.parametrize("dense_share", [0.0, 1.0])
def test_jacobian_values_with_some_and_all_latents_in_use(monkeypatch, dense_share, tokens, k_out, k_in):
    """Unequal k, up to the width; the rows in use copied, or all projected."""
    monkeypatch.setattr(cpu_jacobian, "DENSE_SHARE", dense_share)
    arguments = _jacobian_arguments(tokens=tokens, k_out=k_out, k_in=k_in)
    fast, slow = (_jacobian_gradients(implementation, arguments) for implementation in (cpu, reference))
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slices", [1, 2, 5])
@pytest.mark.parametrize("units_of_a_part", [1, 3, 5])
@pytest.mark.parametrize("num_terms", [1, 2])
def test_jacobian_values_with_products_by_onednn(monkeypatch, slices, units_of_a_part, num_terms):
    """In float32, the only dtype that it is given, against float64; in slices and parts too, whose rows have gaps."""
    force_onednn(monkeypatch)
    given, by_onednn = [], cpu_products._by_onednn
    monkeypatch.setattr(cpu_products, "_by_onednn", lambda a, b: given.append(a.shape) or by_onednn(a, b))
    monkeypatch.setattr(cpu_jacobian, "MIN_PART_UNITS", units_of_a_part)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(cpu_jacobian, "num_slices", lambda *shape: slices)
    arguments = _jacobian_arguments(num_terms)
    fast, slow = _jacobian_gradients(cpu, arguments, torch.float32), _jacobian_gradients(reference, arguments)
    assert given
    torch.testing.assert_close(fast[0].double(), slow[0], rtol=1e-5, atol=1e-5)
    for found, expected in zip(fast[1], slow[1], strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_used_rows_are_padded_to_a_few_numbers_of_them():
    """96 rows, in steps of 3: rows 5 and 70 are used, and the first unused one goes with them."""
    rows = torch.arange(96.0)[:, None].expand(96, 2)
    found = cpu_jacobian._used_rows(rows, torch.tensor([[70, 5], [5, 5]]))
    assert found.rows[:, 0].tolist() == [5, 70, 0] and found.indices.tolist() == [[1, 0], [0, 0]]
    grad = found.expand(torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]))
    assert grad[5].tolist() == [1, 2] and grad[70].tolist() == [3, 4] and grad.sum() == 10
    assert cpu_jacobian._used_rows(rows, torch.tensor([[1, 2, 3]])).rows[:, 0].tolist() == [1, 2, 3]


def test_products_have_few_shapes_whatever_latents_are_in_use(monkeypatch):
    """Or what oneDNN keeps for each would let a training's memory grow."""
    shapes, product, add_product_ = set(), cpu_products.product, cpu_products.add_product_
    monkeypatch.setattr(cpu_jacobian, "product", lambda a, b: shapes.add((*a.shape, b.shape[1])) or product(a, b))
    record = lambda total, a, b: shapes.add((*a.shape, b.shape[1])) or add_product_(total, a, b)  # noqa: E731
    monkeypatch.setattr(cpu_jacobian, "add_product_", record)
    used = set()
    for tokens in range(1, 150):
        arguments = _jacobian_arguments(tokens=tokens, d_sae_out=640, d_sae_in=640)
        used.add(len(arguments[3][0].unique()))
        fast = _jacobian_gradients(cpu, arguments)
        if tokens % 37 == 0:
            torch.testing.assert_close(fast, _jacobian_gradients(reference, arguments), rtol=1e-12, atol=1e-12)
    assert len(used) > 100 and len({rows for rows, *_ in shapes}) <= 33


def test_no_token_at_all_gives_no_values_and_zero_gradients():
    tensors, weights, W_out, indices = _jacobian_arguments()
    arguments = ([*tensors[:2], tensors[2][:0]], weights, W_out, [index[:0] for index in indices])
    values, gradients = _jacobian_gradients(cpu, arguments)
    assert values.shape == (0, 3, 3)
    assert [grad.any().item() for grad in gradients] == [False, False, False]


def test_jacobian_values_repeat_bit_for_bit_in_float32():
    runs = [_jacobian_gradients(cpu, _jacobian_arguments(2, tokens=200), torch.float32) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(first, second) for first, second in zip(runs[0][1], runs[1][1], strict=True))
    reference_values, _ = _jacobian_gradients(reference, _jacobian_arguments(2, tokens=200))
    torch.testing.assert_close(runs[0][0].double(), reference_values, rtol=1e-4, atol=1e-4)


def test_jacobian_values_under_autocast():
    """The products are bfloat16, the rest float32; gradients have the weights' dtype."""
    exact = _jacobian_gradients(reference, _jacobian_arguments(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = _jacobian_gradients(cpu, _jacobian_arguments(2), torch.float32)
    assert rounded[0].dtype == torch.float32
    assert 1e-6 < (rounded[0] - exact[0]).norm() / exact[0].norm() < 0.01
    for fast, slow in zip(rounded[1], exact[1], strict=True):
        assert fast.dtype == torch.float32
        assert 1e-6 < (fast - slow).norm() / slow.norm() < 0.02


def test_projections_fit_in_what_a_step_has_free():
    """At Pythia-70m's shape P, Q and their gradients fit whole; at 410m's in two slices, at a wide gated one in 5."""
    assert cpu_jacobian.num_slices(4096, 512, 2048, 1) == 1
    assert cpu_jacobian.num_slices(4096, 1024, 4096, 1) == 2
    assert cpu_jacobian.num_slices(4096, 2304, 9216, 2) == 5
    assert cpu_jacobian.num_slices(1, 1, 3, 1) == 3


def test_every_thread_has_its_part_where_parts_are_equal_and_not_too_small():
    assert [cpu_jacobian.num_parts(2048, threads) for threads in (1, 2, 3, 8, 64)] == [1, 2, 2, 8, 8]
    assert [cpu_jacobian.num_parts(units, 4) for units in (1, 255, 768, 1025, 1536)] == [1, 1, 3, 1, 4]


def test_slices_divide_into_parts():
    """Llama's, Gemma's and Qwen's shapes and one smaller than a part."""
    for shape in [(2048, 4096, 11008, 2), (2048, 2304, 9216, 2), (2048, 896, 4864, 2)]:
        units = cpu_jacobian.slice_units(*shape)
        assert -(-shape[2] // units) <= cpu_jacobian.num_slices(*shape) > 1
        assert [cpu_jacobian.num_parts(units, threads) for threads in (1, 2, 4)] == [1, 2, min(4, units // 256)]
    assert cpu_jacobian.slice_units(1, 1, 3, 1) == 1
    assert cpu_jacobian.slice_units(4096, 512, 2048, 1) == 2048


def test_select_kernels_forces_an_implementation(monkeypatch):
    monkeypatch.setattr(kernels, "_forced", [])
    kernels.select_kernels("reference")
    assert kernels._for(torch.zeros(1)) is reference
    assert kernels.selected_kernels(torch.device("cpu")) == "reference"
    kernels.select_kernels("auto")
    assert kernels._for(torch.zeros(1)) is cpu
    assert kernels.selected_kernels(torch.device("cpu")) == "cpu"
    with pytest.raises(UserError, match="kernels: 'fast'"):
        kernels.select_kernels("fast")
