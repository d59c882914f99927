"""The estimate of a training step's memory against what a step takes, in a process of its own."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from jsae_lightning.memory import (
    FIRST_STEP_BYTES,
    LanguageModelShape,
    StepShape,
    describe,
    evaluation_bytes,
    run_parts,
    step_bytes,
    step_phases,
)
from running import environment

SHAPE = StepShape(
    tokens=2048, d_model=256, d_mlp=1024, d_sae=16384, d_sae_output=16384, k=16, k_output=16, gated=False,
    penalty=True, kernels="cpu",
)  # fmt: skip
MODEL = LanguageModelShape(
    num_bytes=100, itemsize=4, d_model=256, d_mlp=1024, vocab_size=1000, pass_tokens=10, evaluation_tokens=20
)


def measured(shape: StepShape) -> int:
    """Bytes that training steps add to a process, with the libraries that the first of them loads."""
    script = Path(__file__).with_name("step_memory.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(asdict(shape))],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment(OMP_NUM_THREADS="1"),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("changes", [{}, {"penalty": False}, {"gated": True}, {"tokens": 512, "d_mlp": 4096}], ids=str)
def test_a_step_takes_what_was_estimated(changes):
    shape = replace(SHAPE, **changes)
    found, expected = measured(shape), step_bytes(shape) + FIRST_STEP_BYTES
    assert found == pytest.approx(expected, rel=0.2)
    assert found <= shape.bound + 350_000_000


def test_hand_values():
    shape = StepShape(
        tokens=10, d_model=2, d_mlp=3, d_sae=5, d_sae_output=7, k=1, k_output=2, gated=False, penalty=False,
        kernels="cpu",
    )  # fmt: skip
    params = 2 * (5 * 2) + 5 + 2 + 2 * (7 * 2) + 7 + 2
    assert shape.params == params == 64
    kept = 6 * 10 * 2 + 3 * 10 * (1 + 2)
    assert step_phases(shape) == {
        "forward": 4 * (4 * params + kept + max(10 * 7, 3 * 10 * 3)),
        "backward": 4 * (3 * params + kept + 7 * 2),
        "optimizer": 4 * (4 * params + 3 * 7 * 2),
    }
    assert shape.bound == 16 * params + 8 * 10 * 7


@pytest.mark.parametrize(
    "changes", [{"penalty": False}, {"tokens": 1024}, {"k": 8}, {"d_sae": 8192}, {"d_model": 128}], ids=str
)
def test_less_takes_less(changes):
    assert sum(step_phases(replace(SHAPE, **changes)).values()) < sum(step_phases(SHAPE).values())


def test_plain_kernels_gated_mlps_and_float64_take_more():
    for changes in ({"kernels": "reference"}, {"precision": "64-true"}):
        assert step_bytes(replace(SHAPE, **changes)) > step_bytes(SHAPE)


def test_triton_projects_whole_dictionaries_and_mixed_precision_copies_the_weights():
    large = replace(SHAPE, d_mlp=16384)  # which the CPU's kernels take in slices
    cpu, triton, reference = (
        step_phases(replace(large, kernels=name))["backward"] for name in ("cpu", "triton", "reference")
    )
    assert cpu < triton < reference
    both = large.d_sae + large.d_sae_output
    assert triton >= 4 * 2 * both * large.d_mlp  # P, Q and their gradients
    on_card = replace(SHAPE, kernels="triton")
    plain, half, bfloat = (
        step_phases(replace(on_card, precision=name))["forward"] for name in ("32-true", "16-mixed", "bf16-mixed")
    )
    assert half == bfloat == plain + 2 * SHAPE.params


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_the_encoder_of_the_cpu_kernels_holds_a_chunk_of_the_tokens(monkeypatch, has_bfloat16):
    """512 of the 2,048; with bfloat16 products the weights by rows and rounded as well."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    wide = replace(SHAPE, penalty=False, d_sae=65536, d_sae_output=65536)
    cpu, triton = (step_phases(replace(wide, kernels=name))["forward"] for name in ("cpu", "triton"))
    held = 512 + 256 * 1.5 if has_bfloat16 else 512
    assert triton - cpu == 4 * (2048 - held) * 65536


@pytest.mark.parametrize("d_mlp", [256, 1024, 4096, 16384])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1024, 4096])
def test_the_bound_holds_but_for_what_is_kept(d_mlp, gated, tokens):
    """Whatever d_mlp: the projections are sliced."""
    shape = replace(SHAPE, d_mlp=d_mlp, gated=gated, tokens=tokens)
    terms = 2 if gated else 1
    kept = 4 * tokens * (6 * 256 + 3 * 32 + terms * d_mlp + 5 * 16 * 16) + 12 * tokens * d_mlp
    assert max(step_phases(shape).values()) <= shape.bound + kept


def test_the_shape_of_pythia_410m_fits_12_gb():
    shape = replace(SHAPE, tokens=4096, d_model=1024, d_mlp=4096, d_sae=65536, d_sae_output=65536, k=32, k_output=32)
    assert step_bytes(shape) < 12e9


def test_the_parts_of_a_run():
    parts = run_parts(SHAPE, MODEL, block_bytes=1000, prefetch=False, on_cpu=True)
    assert parts["language model"] == 100 + 2 * 256 * 1024 * 4 and parts["activations"] == 1000
    assert parts["step"] == step_bytes(SHAPE)
    ahead = run_parts(SHAPE, MODEL, block_bytes=1000, prefetch=True, on_cpu=False)
    assert ahead["activations"] == 2000 and ahead["step"] > parts["step"] and ahead["libraries"] == 0
    large = replace(MODEL, evaluation_tokens=10**6)
    by_logits = run_parts(SHAPE, large, block_bytes=0, prefetch=False, on_cpu=True)
    assert by_logits["step"] == 16 * SHAPE.params + evaluation_bytes(large) > parts["step"]
    assert evaluation_bytes(replace(MODEL, evaluation_tokens=0)) == 0


def test_the_line():
    line = describe({"libraries": 700_000_000, "language model": 0, "activations": 67_000_000, "step": 250_000_000})
    assert line == "memory: about 1.02 GB at the peak of training (libraries 0.70, activations 0.07, step 0.25)"
