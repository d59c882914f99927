"""Random numbers for a purpose: equal seeds of different purposes give unrelated streams."""

import hashlib

import torch


def seeded_generator(*parts: str | int) -> torch.Generator:
    """A CPU generator whose seed is a hash of `parts`, so that nearby numbers give unrelated streams."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
