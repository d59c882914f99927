"""The Triton kernels on a CUDA device: the checks of `kernel_checks.py`, and what only a GPU shows."""

import pytest
import torch

from jsae_lightning import kernels
from jsae_lightning.errors import UserError
from jsae_lightning.kernels import reference, triton
from kernel_checks import KernelChecks, PenaltyChecks, assert_close, draw, draw_indices, value_and_gradients

REASON = None if torch.cuda.is_available() else "there is no CUDA device"
if REASON is None:
    REASON = "TRITON_INTERPRET is set" if triton.interpreted() else triton.why_unavailable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.mark.slow
class TestCudaPenalties(PenaltyChecks):
    implementation = triton
    device = "cuda"


class TestCuda(KernelChecks):
    implementation = triton
    device = "cuda"

    def test_auto_chooses_triton(self, monkeypatch):
        monkeypatch.setattr(kernels, "_forced", [])
        assert kernels._for(torch.zeros(1, device="cuda")) is triton

    def test_cpu_tensors_are_refused(self):
        with pytest.raises(UserError, match="kernels: triton works on CUDA devices"):
            triton.sparse_decode(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))

    @pytest.mark.parametrize("autocast", [False, True])
    def test_a_training_shape(self, autocast):
        """512 tokens, 4,096 latents, k 32, d_mlp 2,048: against the reference, and the same bits twice."""
        tensors = [
            tensor.float().cuda() for tensor in (draw(4096, 2048), draw(512, 2048, seed=1), draw(4096, 2048, seed=2))
        ]
        indices = [draw_indices(4096, 512, 32).cuda(), draw_indices(4096, 512, 32, seed=4).cuda()]
        indices[0][:, 0] = 7  # a latent of every token

        def run(implementation):
            def function(*rows):
                with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                    return implementation.bilinear_rows(*rows, *indices)

            return value_and_gradients(function, tensors)

        first, second, expected = run(triton), run(triton), run(reference)
        tolerance = 2e-2 if autocast else 1e-4
        for found, again, wanted in zip(
            (first[0], *first[1]), (second[0], *second[1]), (expected[0], *expected[1]), strict=True
        ):
            assert torch.equal(found, again)
            assert_close(found, wanted, tolerance)

    def test_peak_memory_lies_below_the_gathered_rows(self):
        """4,096 tokens, k 32, d_mlp 2,048: rows gathered for one side would be 1 GB in float32."""
        rows = [draw(4096, 2048).float().cuda().requires_grad_() for _ in range(2)]
        slope = draw(4096, 2048, seed=1).float().cuda()
        indices = [draw_indices(4096, 4096, 32, seed=seed).cuda() for seed in (3, 4)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        triton.bilinear_rows(rows[0], slope, rows[1], *indices).square().mean().backward()
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < 4096 * 32 * 2048 * 4 / 2
