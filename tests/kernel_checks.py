"""What any implementation of the kernels must fulfil against `reference`, on the device of the class that inherits."""

import functools
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from factories import make_mlp, make_pair, make_x
from jsae_lightning import kernels
from jsae_lightning.jacobians import jacobian
from jsae_lightning.kernels import cpu_products, reference
from jsae_lightning.penalties import PENALTIES

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_indices(num_rows: int, tokens: int, k: int, seed: int = 3) -> torch.Tensor:
    """With repetitions: some rows in several tokens and several times in one, some in none."""
    return torch.randint(0, num_rows, (tokens, k), generator=torch.Generator().manual_seed(seed))


def force_onednn(monkeypatch) -> None:
    """Have oneDNN make every float32 product of the kernels for processors, however small."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(cpu_products, "MIN_OPERATIONS", 0)
    monkeypatch.setattr(cpu_products, "onednn_is_faster", lambda: True)


def value_and_gradients(function, tensors):
    """Return the value and the gradients of a fixed random functional of it."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    weights = draw(*out.shape, seed=9).to(out)
    return out.detach(), torch.autograd.grad((out * weights).sum(), leaves)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Close in relation to the largest entry: sums of many terms are no more exact than that."""
    largest = expected.double().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance * largest)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation of torch returns, in `bytes`."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


class Implementation:
    """Inherit the checks, and define these."""

    implementation: ModuleType
    device: str

    def compare(self, name, tensors, *others, tolerance, autocast=False):
        """Value and gradients of the operation `name`, which takes `tensors`, then `others`, against `reference`."""
        tensors, others = self.moved(tensors), self.moved(others)

        def of(implementation):
            def function(*leaves):
                with torch.autocast(self.device, torch.bfloat16, enabled=autocast):
                    out = getattr(implementation, name)(*leaves, *others)
                return out[0] if isinstance(out, tuple) else out

            return value_and_gradients(function, tensors)

        (value, grads), (expected, expected_grads) = of(self.implementation), of(reference)
        assert_close(value, expected, tolerance)
        for grad, expected_grad, tensor in zip(grads, expected_grads, tensors, strict=True):
            assert grad.dtype == tensor.dtype
            assert grad.shape == tensor.shape
            assert_close(grad, expected_grad, tolerance)
        return value

    def moved(self, tensors):
        return [tensor.to(self.device) if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]


class SparseChecks(Implementation):
    """TopK encoding and sparse decoding."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        ("tokens", "d_model", "d_sae", "k"),
        [(7, 4, 12, 3), (1, 5, 5, 5), (9, 3, 6, 1), (3, 70, 40, 20), (40, 6, 5, 2)],
        ids=["plain", "k = d_sae", "k = 1", "several tiles", "more entries of a latent than a step"],
    )
    def test_topk_encode(self, tokens, d_model, d_sae, k, dtype):
        tensors = [draw(tokens, d_model, dtype=dtype), draw(d_model, d_sae, seed=1, dtype=dtype)]
        tensors.append(draw(d_sae, seed=2, dtype=dtype))
        self.compare("topk_encode", tensors, k, tolerance=TOLERANCE[dtype])
        of_each = [i.topk_encode(*self.moved(tensors), k)[1] for i in (self.implementation, reference)]
        assert torch.equal(*of_each)

    def test_topk_encode_with_ties(self):
        """Equal entries at the edge of the choice: each implementation's own choice, and its gradients by it."""
        x, W_enc = torch.ones(3, 2), torch.ones(2, 6) / 2
        value = self.compare("topk_encode", [x, W_enc, torch.zeros(6)], 4, tolerance=1e-6)
        assert value.cpu().tolist() == [[1.0] * 4] * 3

    def test_topk_entries_below_zero_are_zero_and_get_no_gradient(self):
        x, W_enc, b_enc = draw(5, 4), draw(4, 8, seed=1), torch.full((8,), -2.0, dtype=torch.float64)
        value = self.compare("topk_encode", [x, W_enc, b_enc], 4, tolerance=1e-11)
        assert 0 < (value > 0).sum() < value.numel()

        values, _ = self.implementation.topk_encode(*self.moved([x, W_enc, b_enc - 100]), 4)
        assert not values.any()

    def test_topk_encode_by_hand(self):
        x, W_enc = torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
        leaves = [t.requires_grad_() for t in self.moved([x, W_enc, torch.tensor([0.0, 0.5, 0.0])])]
        values, indices = self.implementation.topk_encode(*leaves, 2)
        assert values.tolist() == [[3.0, 1.5]]
        assert indices.tolist() == [[0, 1]]
        (values * torch.tensor([[1.0, 10.0]], device=self.device)).sum().backward()
        assert [leaf.grad.tolist() for leaf in leaves] == [
            [[13.0, 0.0]], [[1.0, 10.0, 0.0], [-1.0, -10.0, 0.0]], [1.0, 10.0, 0.0],
        ]  # fmt: skip

    def test_topk_encode_of_a_selection_of_columns(self):
        """As AuxK has it: tensors that are not contiguous."""
        W_enc, b_enc = draw(12, 4, seed=1).T, draw(24, seed=2)[::2]
        self.compare("topk_encode", [draw(4, 6).T, W_enc, b_enc], 3, tolerance=1e-11)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        ("tokens", "k", "d_sae", "d_model"),
        [(5, 3, 8, 4), (3, 1, 4, 130), (2, 17, 6, 3), (40, 2, 3, 70)],
        ids=["plain", "k = 1, two column tiles", "repeated in one token", "more entries of a row than a step"],
    )
    def test_sparse_decode(self, tokens, k, d_sae, d_model, dtype):
        tensors = [draw(tokens, k, dtype=dtype), draw(d_sae, d_model, seed=1, dtype=dtype)]
        indices = draw_indices(d_sae, tokens, k)

        def decode(implementation, values, W_dec):
            return implementation.sparse_decode(values, indices.to(self.device), W_dec)

        tensors = self.moved(tensors)
        found, expected = (
            value_and_gradients(functools.partial(decode, i), tensors) for i in (self.implementation, reference)
        )
        for ours, theirs in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
            assert ours.dtype == dtype
            assert_close(ours, theirs, TOLERANCE[dtype])


class PairChecks(Implementation):
    """A pair's loss and the gradients of all of its parameters."""

    def gradients_of(self, implementation, monkeypatch, pair, mlp, x, penalty, at, autocast):
        """Return the loss and the gradients of all of the pair's parameters."""
        monkeypatch.setattr(kernels, "_forced", [implementation])
        pair.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=autocast):
            loss = PENALTIES[penalty](jacobian(pair, mlp, x, at).values)
            for (_, sae), target in zip(pair.named_saes(), (x, mlp(x)), strict=True):
                loss = loss + (sae(target)[0] - target).square().mean()
        loss.backward()
        return loss.detach(), {name: parameter.grad.clone() for name, parameter in pair.named_parameters()}

    def compare_pairs(self, monkeypatch, pair, mlp, x, penalty, at, tolerance, autocast=False):
        pair, mlp, x = pair.to(self.device), mlp.to(self.device), x.to(self.device)
        (loss, grads), (expected, expected_grads) = (
            self.gradients_of(i, monkeypatch, pair, mlp, x, penalty, at, autocast)
            for i in (self.implementation, reference)
        )
        assert_close(loss, expected, tolerance)
        for name, grad in grads.items():
            assert expected_grads[name].any()
            assert_close(grad, expected_grads[name], tolerance)

    @pytest.mark.parametrize("kind", ["gelu", "gated_silu"])
    @pytest.mark.parametrize("at", ["input", "reconstruction"])
    def test_a_pair_in_float32(self, monkeypatch, kind, at):
        pair = make_pair(d_sae=16, k=3, d_sae_output=20, k_output=4).float()
        self.compare_pairs(monkeypatch, pair, make_mlp(kind).float(), make_x(4).float(), "hoyer_l1", at, 1e-4)

    def test_a_pair_under_bf16_autocast(self, monkeypatch):
        pair = make_pair(d_sae=16, k=3, d_sae_output=20, k_output=4).float()
        mlp, x = make_mlp("gated_silu").float(), make_x(4).float()
        self.compare_pairs(monkeypatch, pair, mlp, x, "l1", "input", 2e-2, autocast=True)


class PenaltyChecks(PairChecks):
    """The same with each penalty, for a plain MLP at the input and a gated one at the reconstruction."""

    @pytest.mark.parametrize(("kind", "at"), [("gelu", "input"), ("gated_silu", "reconstruction")])
    @pytest.mark.parametrize("penalty", PENALTIES)
    def test_a_pair_with_each_penalty(self, monkeypatch, penalty, kind, at):
        pair = make_pair(d_sae=16, k=3, d_sae_output=20, k_output=4)
        self.compare_pairs(monkeypatch, pair, make_mlp(kind), make_x(4), penalty, at, 1e-9)


class KernelChecks(SparseChecks, PairChecks):
    """The above but for the penalties, and `bilinear_rows`, in which the Jacobian is written."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(
        ("tokens", "k_out", "k_in", "num_out", "num_in", "d_mlp"),
        [(7, 3, 3, 6, 8, 5), (3, 1, 4, 6, 2, 64), (2, 5, 1, 5, 9, 70), (3, 12, 20, 12, 20, 130), (1, 70, 66, 9, 80, 9)],
        ids=["plain", "k_out = 1", "k_in = 1", "k = d_sae", "several tiles of slots"],
    )
    def test_bilinear_rows(self, tokens, k_out, k_in, num_out, num_in, d_mlp, dtype):
        tensors = [draw(num_out, d_mlp), draw(tokens, d_mlp, seed=1), draw(num_in, d_mlp, seed=2)]
        indices = draw_indices(num_out, tokens, k_out), draw_indices(num_in, tokens, k_in, seed=4)
        value = self.compare(
            "bilinear_rows", [tensor.to(dtype) for tensor in tensors], *indices, tolerance=TOLERANCE[dtype]
        )
        assert value.dtype == dtype

    def test_bilinear_rows_by_hand(self):
        """J = 2 * 3 * 5 + 1 * 1 * 1 where both rows are used; each gradient is the product of the other two."""
        rows_out, slope = torch.tensor([[0.0, 0.0], [2.0, 1.0]]), torch.tensor([[3.0, 1.0]])
        leaves = [t.requires_grad_() for t in self.moved([rows_out, slope, torch.tensor([[5.0, 1.0]])])]
        indices = self.moved([torch.tensor([[1]]), torch.tensor([[0]])])
        value = self.implementation.bilinear_rows(*leaves, *indices)
        assert value.tolist() == [[[31.0]]]
        value.sum().backward()
        assert [leaf.grad.tolist() for leaf in leaves] == [[[0.0, 0.0], [15.0, 1.0]], [[10.0, 1.0]], [[6.0, 1.0]]]

    def test_bilinear_rows_of_an_expanded_gradient(self):
        """The gradient of a mean has strides of 0; no token at all gives empty values and zero gradients."""
        tensors = self.moved([draw(6, 9), draw(4, 9, seed=1), draw(5, 9, seed=2)])
        for tokens in (4, 0):
            indices = [draw_indices(6, 4, 3)[:tokens].to(self.device), draw_indices(5, 4, 2)[:tokens].to(self.device)]
            gradients = []
            for implementation in (self.implementation, reference):
                leaves = [tensor.clone().requires_grad_() for tensor in tensors]
                implementation.bilinear_rows(leaves[0], leaves[1][:tokens], leaves[2], *indices).sum().backward()
                gradients.append([leaf.grad for leaf in leaves])
            for found, expected in zip(*gradients, strict=True):
                assert_close(found, expected, 1e-12)

    def test_no_gradient_is_made_that_nobody_needs(self):
        rows_out, slope, rows_in = self.moved([draw(6, 9), draw(4, 9, seed=1), draw(5, 9, seed=2)])
        indices = self.moved([draw_indices(6, 4, 3), draw_indices(5, 4, 2)])
        self.implementation.bilinear_rows(rows_out, slope, rows_in.requires_grad_(), *indices).sum().backward()
        assert rows_in.grad is not None
        assert rows_out.grad is None
        assert slope.grad is None

    @pytest.mark.parametrize("name", ["topk_encode", "bilinear_rows"])
    def test_bf16_autocast(self, name):
        """Dtypes: the reference's for the latents, at least float32 for J, and those of the leaves for gradients."""
        if name == "topk_encode":
            arguments = [[draw(7, 16), draw(16, 12, seed=1), draw(12, seed=2)], 3]
        else:
            indices = draw_indices(9, 5, 3), draw_indices(8, 5, 4, seed=4)
            arguments = [[draw(9, 70), draw(5, 70, seed=1), draw(8, 70, seed=2)], *indices]
        arguments[0] = [tensor.float() for tensor in arguments[0]]
        value = self.compare(name, *arguments, tolerance=TOLERANCE[torch.bfloat16], autocast=True)
        assert value.dtype == torch.float32
        if name == "bilinear_rows":  # it really multiplied bfloat16: as rounded, and unlike float32
            rows_out, slope, rows_in = (tensor.to(self.device) for tensor in arguments[0])
            others = self.moved(arguments[1:])
            rounded = [rows_out.bfloat16().float(), slope, rows_in.bfloat16().float()]
            assert (value - reference.bilinear_rows(*rounded, *others)).abs().max() < 0.1
            assert (value - reference.bilinear_rows(rows_out, slope, rows_in, *others)).abs().max() > 1e-3

    def test_bf16_tensors(self):
        """Parameters that are bfloat16 themselves: sums in float32, gradients in their dtype."""
        indices = draw_indices(9, 5, 3)
        tensors = [tensor.bfloat16() for tensor in (draw(9, 20), draw(5, 20, seed=1), draw(8, 20, seed=2))]
        value = self.compare("bilinear_rows", tensors, indices, indices % 8, tolerance=TOLERANCE[torch.bfloat16])
        assert value.dtype == torch.float32
        tensors = [tensor.bfloat16() for tensor in (draw(7, 16), draw(16, 12, seed=1), draw(12, seed=2))]
        self.compare("topk_encode", tensors, 3, tolerance=TOLERANCE[torch.bfloat16])

    def test_repeated_gradients_are_the_same_bits(self):
        """Of rows that many tokens use, in float32, where another order of the sum would show."""
        indices = self.moved([draw_indices(2, 40, 2), draw_indices(3, 40, 3, seed=4)])
        tensors = self.moved([draw(2, 9), draw(40, 9, seed=1), draw(3, 9, seed=2)])
        tensors = [tensor.float() for tensor in tensors]
        weights = self.moved([draw(5, 4, seed=1).float(), draw(4, seed=2).float()])

        def once():
            _, of_rows = value_and_gradients(lambda *rows: self.implementation.bilinear_rows(*rows, *indices), tensors)
            _, of_decoder = value_and_gradients(
                lambda v, w: self.implementation.sparse_decode(v, indices[0], w), (tensors[1][:, :2], tensors[0])
            )
            x = draw(40, 5).to(weights[0])
            _, of_encoder = value_and_gradients(lambda *w: self.implementation.topk_encode(x, *w, 3)[0], weights)
            return (*of_rows, *of_decoder, *of_encoder)

        for first, second in zip(once(), once(), strict=True):
            assert first.any()
            assert torch.equal(first, second)
