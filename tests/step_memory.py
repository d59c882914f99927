"""Measure the peak memory of a training step in a process of its own: `python step_memory.py JSON_OF_A_STEP_SHAPE`.

Prints the bytes that the pair, its optimizer and three steps add at most to what the process held before (the data of
the step, which its shape does not describe, among it).
"""

import json
import sys
from pathlib import Path

import torch

from jsae_lightning import kernels
from jsae_lightning.frozen_mlp import FrozenMLP
from jsae_lightning.jacobians import edge_penalty
from jsae_lightning.losses import pair_losses
from jsae_lightning.memory import StepShape
from jsae_lightning.penalties import make_penalty
from jsae_lightning.sae import SAEPair


def status_bytes(key: str) -> int:
    """A size of this process in bytes: `VmRSS` now, `VmHWM` at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def step(shape: StepShape, pair: SAEPair, mlp: FrozenMLP, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    """What Lightning and the module do in one optimizer step."""
    penalty = edge_penalty(make_penalty("l1"), "jacobian") if shape.penalty else None
    loss = pair_losses(pair, mlp, x, penalty).total(1.0)
    optimizer.zero_grad()
    loss.backward()
    pair.project_decoder_gradients()
    torch.nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
    optimizer.step()
    pair.normalize_decoders()


def measure(shape: StepShape) -> int:
    """Return the bytes that three steps add at most."""
    kernels.select_kernels(shape.kernels)
    draw = {"W_in": (shape.d_model, shape.d_mlp), "W_out": (shape.d_mlp, shape.d_model)}
    if shape.gated:
        draw["W_gate"] = draw["W_in"]
    mlp = FrozenMLP(**{name: torch.randn(size) / size[0] ** 0.5 for name, size in draw.items()}, activation="gelu")
    x = torch.randn(shape.tokens, shape.d_model)
    before = status_bytes("VmRSS")
    pair = SAEPair(shape.d_model, shape.d_sae, shape.k, d_sae_output=shape.d_sae_output, k_output=shape.k_output)
    optimizer = torch.optim.Adam(pair.parameters(), lr=1e-3)
    step(shape, pair, mlp, optimizer, x)
    Path("/proc/self/clear_refs").write_text("5")  # what making the pair took is no part of a step
    for _ in range(2):
        step(shape, pair, mlp, optimizer, x)
    return status_bytes("VmHWM") - before


if __name__ == "__main__":
    print(measure(StepShape(**json.loads(sys.argv[1]))))
