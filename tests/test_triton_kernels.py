"""The Triton kernels in Triton's interpreter, on the CPU (`conftest.py` sets TRITON_INTERPRET before Triton loads)."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jsae_lightning import kernels
from jsae_lightning.errors import UserError
from jsae_lightning.kernels import reference, triton
from kernel_checks import KernelChecks, Largest, PenaltyChecks, draw, draw_indices, value_and_gradients

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: its wheels are for Linux")
needs_interpreter = pytest.mark.skipif(
    HAS_TRITON and not triton.interpreted(),
    reason="there is a CUDA device: test_cuda_kernels.py runs the same checks there (or set TRITON_INTERPRET=1)",
)


@needs_triton
@needs_interpreter
@pytest.mark.slow
class TestInterpreterPenalties(PenaltyChecks):
    implementation = triton
    device = "cpu"


@needs_triton
@needs_interpreter
class TestInterpreter(KernelChecks):
    implementation = triton
    device = "cpu"

    def test_kernels_are_interpreted(self):
        from triton.runtime.interpreter import InterpretedFunction

        from jsae_lightning.kernels import triton_bilinear

        assert isinstance(triton_bilinear._bilinear_forward, InterpretedFunction)

    @pytest.mark.parametrize("workspace_bytes", [1, 2 * 64 * 8 * 12])
    def test_workspace_of_some_columns_gives_the_same_bits(self, monkeypatch, workspace_bytes):
        """Slices of 64 and of 128 of 150 columns, the last one narrower, against all columns at once."""
        from jsae_lightning.kernels import triton_bilinear

        tensors = [draw(6, 150), draw(4, 150, seed=1), draw(5, 150, seed=2)]
        indices = [draw_indices(6, 4, 3), draw_indices(5, 4, 3, seed=4)]
        _, whole = value_and_gradients(lambda *rows: triton.bilinear_rows(*rows, *indices), tensors)
        monkeypatch.setattr(triton_bilinear, "WORKSPACE_BYTES", workspace_bytes)
        _, sliced = value_and_gradients(lambda *rows: triton.bilinear_rows(*rows, *indices), tensors)
        for first, second in zip(whole, sliced, strict=True):
            assert torch.equal(first, second)

    def test_gathered_rows_are_never_whole_in_memory(self, monkeypatch):
        """No tensor of torch's is larger than the operands, the result or the workspace; the reference's are."""
        from jsae_lightning.kernels import triton_bilinear

        tokens, k, d_mlp, num_rows = 2, 40, 256, 4
        tensors = [draw(num_rows, d_mlp), draw(tokens, d_mlp, seed=1), draw(num_rows, d_mlp, seed=2)]
        indices = [draw_indices(num_rows, tokens, k), draw_indices(num_rows, tokens, k, seed=4)]
        monkeypatch.setattr(triton_bilinear, "WORKSPACE_BYTES", 1)
        largest = {}
        for implementation in (triton, reference):
            with Largest() as noted:
                value_and_gradients(lambda *rows, i=implementation: i.bilinear_rows(*rows, *indices), tensors)
            largest[implementation] = noted.bytes
        of_workspace = tokens * k * triton_bilinear.MIN_COLUMNS * 8
        assert largest[triton] == max(of_workspace, tokens * k * k * 8)
        assert largest[reference] >= tokens * k * d_mlp * 8

    def test_chosen_by_name(self, monkeypatch):
        monkeypatch.setattr(kernels, "_forced", [])
        kernels.select_kernels("triton")
        assert kernels._for(torch.zeros(1)) is triton
        kernels.select_kernels("auto")
        assert kernels._for(torch.zeros(1)) is kernels.cpu


@pytest.mark.parametrize("allowed", [False, True])
@needs_triton
def test_float32_products_follow_torchs_switch(monkeypatch, allowed):
    from jsae_lightning.kernels.triton_bilinear import dot_precision

    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        assert dot_precision(torch.zeros(1)) == ("tf32" if allowed else "ieee")
        assert dot_precision(torch.zeros(1, dtype=torch.float64)) == "ieee"
    finally:
        torch.set_float32_matmul_precision(precision)


def _no_triton(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))


def test_refused_without_triton(monkeypatch):
    _no_triton(monkeypatch)
    with pytest.raises(UserError, match=r"^kernels: triton cannot run: the package triton is not installed: pip"):
        kernels.select_kernels("triton")


@pytest.mark.parametrize(
    ("capability", "compiler", "header", "message"),
    [
        (None, True, True, "there is no CUDA device: choose kernels=auto"),
        ((7, 5), True, True, "compute capability is 7.5, below 8.0: choose kernels=reference"),
        ((9, 0), False, True, "no C compiler: install gcc"),
        ((9, 0), True, False, "Python.h, which is not there: install python3-dev"),
        ((9, 0), True, True, None),
    ],
)
def test_refused_where_it_cannot_run(monkeypatch, tmp_path, capability, compiler, header, message):
    """And `auto` then takes the reference on a GPU, or these kernels where they run."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(triton.shutil, "which", lambda name: "/usr/bin/gcc" if compiler and name == "gcc" else None)
    monkeypatch.setattr(triton.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    if header:
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(kernels, "_forced", [])
    if message is None:
        kernels.select_kernels("triton")
    else:
        with pytest.raises(UserError, match=f"^kernels: triton cannot run: .*{re.escape(message)}"):
            kernels.select_kernels("triton")

    class OnCuda(torch.Tensor):
        device, is_cuda = torch.device("cuda"), True

    kernels._triton_runs.cache_clear()
    kernels.select_kernels("auto")
    assert kernels._for(torch.zeros(1).as_subclass(OnCuda)) is (reference if message else triton)
    kernels._triton_runs.cache_clear()


def test_cpu_tensors_are_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UserError, match="kernels: triton works on CUDA devices, and this tensor lies on cpu: choose"):
        triton._on_device_of(torch.zeros(1))


def test_importing_the_kernels_does_not_import_triton():
    """Only a first use does; so the package imports, and `kernels=auto` works, where Triton is not installed."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from jsae_lightning import kernels\n"
        "print(kernels.triton.__name__, kernels.topk_encode(torch.ones(1, 1), torch.ones(1, 2), torch.zeros(2), 1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.startswith("jsae_lightning.kernels.triton")


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_the_cards_in_use(tmp_path):
    """Without a GPU: every kernel, as it is launched, becomes a program for capability 9.0, at k 32 for 8.0 too.

    In at most 99 KB of shared memory, what a consumer card has; without atomic operations; and nothing to speak of is
    spilled to memory at the dimensions of language models, multiples of 16.
    """
    script = Path(__file__).parent / "compile_triton.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, script, "90", "80:k32"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, *_ in lines} == {
        "_sums_by_token", "_products_by_token", "_sums_by_row",
        "_bilinear_forward", "_gradient_by_gathered_rows", "_gradient_of_slope",
    }  # fmt: skip
    for name, architecture, shape, _, shared, stack, atomics in lines:
        assert int(shared) <= 99 * 1024, (name, architecture, shape)
        assert int(atomics) == 0, (name, architecture, shape)
        assert int(stack) <= 16 or "float64" in shape or shape.startswith("k50"), (name, architecture, shape)
