"""What figures were measured on."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from jsae_lightning.kernels.cpu_products import onednn_is_faster


def machine(device: torch.device) -> dict[str, Any]:
    """Return the processor, usable cores, torch's threads, the device, and how float32 products are made there.

    `float32_products` says who makes the large ones of `kernels=cpu`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "float32_products": "onednn" if onednn_is_faster() else "torch",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def cpu_name(path: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name as Linux gives it, or what Python knows."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or sys.platform
