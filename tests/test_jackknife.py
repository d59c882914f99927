"""Standard errors: by hand, against the classical formula and the delta method, and what must not matter."""

import math

import pytest
import torch

from jsae_lightning.jackknife import Figure, document_groups, jackknife, standard_error


def groups(*values, weight=1.0):
    return [{"x": torch.tensor(float(v)), "n": torch.tensor(weight)} for v in values]


def jackknifed(group_sums, figures):
    found = jackknife(group_sums, figures)
    for figure, replicates in found.values():
        assert len(replicates) == 0 or standard_error(replicates) == pytest.approx(figure.standard_error, nan_ok=True)
    return {name: figure for name, (figure, _) in found.items()}


def mean(sums):
    return {"mean": (sums["x"] / sums["n"]).item()}


def test_by_hand():
    """1, 2, 6: without one they are 4, 3.5, 1.5, of mean 3, with squares 1 + .25 + 2.25; times 2/3 is 7/3."""
    found = jackknifed(groups(1, 2, 6), mean)["mean"]
    assert (found.mean, found.standard_error) == pytest.approx((3, math.sqrt(7 / 3)))


def test_the_classical_standard_error_of_a_mean():
    values = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = jackknifed(groups(*values.tolist()), mean)["mean"]
    assert found.standard_error == pytest.approx((values.std() / 20**0.5).item(), rel=1e-5)


def test_a_ratio_against_the_delta_method():
    generator = torch.Generator().manual_seed(1)
    n = 10 + torch.rand(400, generator=generator, dtype=torch.float64)
    x = 3 * n + torch.randn(400, generator=generator, dtype=torch.float64)
    sums = [{"x": a, "n": b} for a, b in zip(x, n, strict=True)]
    ratio = x.sum() / n.sum()
    delta = ((x - ratio * n).square().sum() / 399 / 400).sqrt() / n.mean()
    found = jackknifed(sums, mean)["mean"]
    assert found.mean == pytest.approx(ratio.item())
    assert found.standard_error == pytest.approx(delta.item(), rel=0.01)


def test_brute_force_deletion_of_vector_sums():
    """A figure of a vector of counts, recomputed from the remaining groups instead of by subtraction."""
    generator = torch.Generator().manual_seed(2)
    sums = [{"fired": torch.randint(0, 2, (30,), generator=generator)} for _ in range(6)]

    def dead(s):
        return {"dead": (s["fired"] == 0).double().mean().item()}

    left = [dead({"fired": sum(s["fired"] for j, s in enumerate(sums) if j != i)})["dead"] for i in range(6)]
    centre = sum(left) / 6
    expected = math.sqrt(5 / 6 * sum((v - centre) ** 2 for v in left))
    assert expected > 0
    assert jackknifed(sums, dead)["dead"].standard_error == pytest.approx(expected)


def test_order_and_empty_groups_do_not_matter_and_scale_does():
    values = [0.3, 2.0, -1.0, 5.0]
    found = jackknifed(groups(*values), mean)["mean"]
    assert jackknifed(groups(*values[::-1]), mean)["mean"].standard_error == pytest.approx(found.standard_error)
    empty = groups(0, weight=0.0)
    assert jackknifed([*groups(*values), *empty], mean)["mean"] == found
    tripled = jackknifed(groups(*[3 * v for v in values]), mean)["mean"]
    assert tripled.standard_error == pytest.approx(3 * found.standard_error)
    assert jackknifed(groups(2, 2, 2), mean)["mean"] == Figure(2.0, 0.0)


def test_one_group_has_no_standard_error():
    found = jackknifed(groups(4), mean)["mean"]
    assert found.mean == 4
    assert math.isnan(found.standard_error)
    assert math.isnan(standard_error(torch.zeros(0, dtype=torch.float64)))


def test_documents_are_dealt_to_contiguous_groups_of_equal_size():
    document = torch.tensor([[0, 0, 1, 2], [3, 4, 5, 5], [6, 7, 8, 9]])
    assert document_groups(document, 5).tolist() == [[0, 0, 0, 1], [1, 2, 2, 2], [3, 3, 4, 4]]
    assert torch.equal(document_groups(document, 99), document)
    assert document_groups(document, 1).unique().tolist() == [0]
    sizes = document_groups(torch.arange(103)[None], 50)[0].bincount()
    assert len(sizes) == 50
    assert set(sizes.tolist()) == {2, 3}
    with pytest.raises(ValueError, match="0 groups"):
        document_groups(document, 0)
