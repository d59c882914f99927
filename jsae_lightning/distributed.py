"""Reductions over the ranks of a run; without an initialised process group every function is a no-op for one rank."""

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks, (0, 1) outside a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce_sum(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add up every entry of `sums` over the ranks, in one collective call.

    The entries travel as one float64 vector, so integer counts stay exact up to 2^53 and the order of additions does
    not depend on how many entries there are.

    Args:
        sums: tensors of any shape and real dtype, with the same keys and shapes on every rank (a rank that saw no
            data passes zeros). On a device that the process group's backend can reduce on.

    Returns:
        A new dict with the same keys, shapes, dtypes and devices; `sums` is left as it was.
    """
    if not sums or rank_and_world_size()[1] == 1:
        return dict(sums)
    keys = sorted(sums)
    device = sums[keys[0]].device
    flat = torch.cat([sums[key].detach().reshape(-1).to(device, torch.float64) for key in keys])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    parts = dict(zip(keys, flat.split([sums[key].numel() for key in keys]), strict=True))
    return {key: parts[key].reshape(old.shape).to(old.device, old.dtype) for key, old in sums.items()}


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Return the element-wise maximum over the ranks, as a new tensor; for a boolean mask this is the logical or."""
    if rank_and_world_size()[1] == 1:
        return tensor
    # Not every backend reduces booleans, so they travel as bytes.
    reduced = tensor.detach().to(torch.uint8) if tensor.dtype == torch.bool else tensor.detach().clone()
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
    return reduced.to(tensor.dtype)
