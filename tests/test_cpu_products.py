"""Float32 products by oneDNN: the same numbers, from any layout, and only where they are faster."""

import pytest
import torch

from jsae_lightning.kernels import cpu_products
from jsae_lightning.kernels.cpu_products import add_product_, onednn_is_faster, product
from kernel_checks import assert_close, draw, force_onednn

ZEN = {"avx512_f": True, "cpu_name": "AMD EPYC 9555"}


@pytest.fixture
def calls(monkeypatch):
    """Have every float32 product made by oneDNN; return the shapes of what it was given."""
    force_onednn(monkeypatch)
    given, by_onednn = [], cpu_products._by_onednn

    def record(a, b):
        given.append((*a.shape, b.shape[1]))
        return by_onednn(a, b)

    monkeypatch.setattr(cpu_products, "_by_onednn", record)
    return given


def _layouts(rows: int, columns: int, seed: int) -> list[torch.Tensor]:
    """The same numbers by rows, by columns, as a slice of columns, and as the transpose of one."""
    matrix = draw(rows, columns, seed=seed, dtype=torch.float32)
    wide = torch.cat([matrix, matrix], dim=1)[:, :columns]
    tall = torch.cat([matrix.T, matrix.T], dim=1)[:, :rows].T
    assert not wide.is_contiguous() and not tall.is_contiguous()
    return [matrix, matrix.T.contiguous().T, wide, tall]


def test_a_product_by_hand(calls):
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.5, 0.0]]), torch.tensor([[5.0, -1.0], [7.0, 2.0]])
    assert product(a, b).tolist() == [[19, 3], [43, 5], [2.5, -0.5]]
    total = torch.ones(3, 2)
    add_product_(total, a, b)
    assert total.tolist() == [[20, 4], [44, 6], [3.5, 0.5]]
    assert calls == [(3, 2, 2), (3, 2, 2)]


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("second", range(4))
def test_any_layout_gives_the_product_of_float64(calls, first, second):
    a, b = _layouts(37, 64, seed=0)[first], _layouts(64, 48, seed=1)[second]
    expected = a.double() @ b.double()
    assert_close(product(a, b), expected, 2e-6)
    assert_close(product(a, b), a @ b, 2e-6)
    assert len(calls) == 2


@pytest.mark.parametrize("block_elements", [1, 48 * 10, 2**21])
def test_a_product_is_added_in_its_place_in_blocks_of_rows(calls, monkeypatch, block_elements):
    monkeypatch.setattr(cpu_products, "BLOCK_ELEMENTS", block_elements)
    a, b, total = (draw(*shape, seed=sum(shape), dtype=torch.float32) for shape in [(37, 64), (64, 48), (37, 48)])
    expected = total.double() + a.double() @ b.double()
    place = total.data_ptr()
    add_product_(total, a, b)
    assert total.data_ptr() == place
    assert_close(total, expected, 2e-6)
    assert sum(rows for rows, *_ in calls) == 37


def test_a_slice_of_columns_is_copied_first(calls, monkeypatch):
    """oneDNN's code for rows with gaps is hundreds of times slower."""
    linear, given = torch.ops.mkldnn._linear_pointwise, []

    def record(a, weight, *rest):
        given.extend([a.is_contiguous() or a.T.is_contiguous(), weight.is_contiguous() or weight.T.is_contiguous()])
        return linear(a, weight, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", record)
    for a in _layouts(37, 64, seed=0):
        for b in _layouts(64, 48, seed=1):
            product(a, b)
    assert given == [True] * 2 * 16


def test_products_repeat_bit_for_bit(calls):
    a, b = draw(300, 200, dtype=torch.float32), draw(200, 100, seed=1, dtype=torch.float32)
    assert torch.equal(product(a, b), product(a, b))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs(calls, dtype):
    a, b = draw(20, 30, dtype=dtype), draw(30, 10, seed=1, dtype=dtype)
    assert torch.equal(product(a, b), a @ b)
    total = torch.zeros(20, 10, dtype=dtype)
    add_product_(total, a, b)
    assert_close(total, a @ b, 1e-2 if dtype == torch.bfloat16 else 1e-12)
    assert not calls


def test_small_and_empty_products_are_torchs(calls, monkeypatch):
    monkeypatch.setattr(cpu_products, "MIN_OPERATIONS", 20 * 30 * 10)
    b = draw(30, 10, seed=1, dtype=torch.float32)
    for rows, made in [(20, 1), (19, 0), (0, 0)]:
        calls.clear()
        assert product(draw(rows, 30, dtype=torch.float32), b).shape == (rows, 10)
        assert len(calls) == made


def test_who_turns_onednn_off_gets_torchs(calls, monkeypatch):
    monkeypatch.setattr(cpu_products, "_is_enabled", lambda: False)
    product(draw(20, 30, dtype=torch.float32), draw(30, 10, dtype=torch.float32))
    assert not calls


@pytest.mark.parametrize(
    ("processor", "is_faster"),
    [
        (ZEN, True),
        (ZEN | {"avx512_f": False}, False),
        (ZEN | {"cpu_name": "Intel(R) Xeon(R) Platinum 8481C"}, False),
        ({"avx512_f": True}, False),
        ({"cpu_name": "Apple M4"}, False),
        ({}, False),
    ],
)
def test_onednn_is_for_avx512_of_others_than_intel(monkeypatch, processor, is_faster):
    """A processor that does not tell its name is left to torch."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor, raising=False)
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(library, "is_available", lambda: True)
    assert onednn_is_faster.__wrapped__() is is_faster


@pytest.mark.parametrize("missing", ["mkl", "mkldnn"])
def test_without_one_of_the_libraries_torch_chooses(monkeypatch, missing):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ZEN, raising=False)
    for library in ("mkl", "mkldnn"):
        monkeypatch.setattr(getattr(torch.backends, library), "is_available", lambda here=library != missing: here)
    assert onednn_is_faster.__wrapped__() is False
