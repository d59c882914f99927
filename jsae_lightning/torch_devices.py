"""The device that a caller names, checked before anything is loaded for it."""

import torch

from jsae_lightning.errors import UserError


def usable_device(device: str | torch.device | None) -> torch.device:
    """Return the device, None is the CPU; raise UserError if torch knows no such one, or if this machine has none."""
    try:
        chosen = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device: {device!r} is no device: give 'cpu', 'cuda' or 'cuda:0'") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {device}, but torch sees no CUDA device: give 'cpu'")
    if chosen.type == "cuda" and chosen.index is not None and chosen.index >= torch.cuda.device_count():
        raise UserError(f"device: {device}, but torch sees {torch.cuda.device_count()}: give a lower number")
    if chosen.type not in ("cpu", "cuda"):
        try:
            torch.ones(1, device=chosen).item()
        except Exception as error:  # each kind of device has its own
            raise UserError(f"device: {device} cannot be computed on here: give 'cpu'") from error
    return chosen
