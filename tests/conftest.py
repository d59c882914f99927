"""Shared fixtures: small random pairs and MLPs, nothing from the network."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share two cores

import pytest
import torch

gc.disable()  # while everything else is imported; `lasting_imports` is not used, for its package must come later

# Triton decides when it is imported, which lightning does. On a GPU its kernels are compiled: test_cuda_kernels.py.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

LONGEST = (
    "test_notebooks.py",
    "test_slurm.py",
    "test_sweeps.py",
    "test_streamed_training.py",
    "test_ddp.py",
    "test_triton_kernels.py",
)
"""Of the files with slow tests: begun first, or one worker is busy with them at the end and the others wait."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first; the others stay in their order."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_collection_finish() -> None:
    """All modules have been imported."""
    gc.freeze()
    gc.enable()
