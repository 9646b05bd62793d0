"""Small things that every lesson needs and none teaches: fast mode, the device, the cache folder."""

import os
import platform
import re
from pathlib import Path

import torch


def fast_mode() -> bool:
    """Whether the environment variable `MINISD_FAST` is 1: lessons then train for a few steps and go on with the shipped weights."""
    return os.environ.get("MINISD_FAST") == "1"


def default_device() -> torch.device:
    """The fastest device at hand: CUDA, then Apple's MPS, then the CPU. `MINISD_DEVICE` overrides it."""
    if name := os.environ.get("MINISD_DEVICE"):
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def cache_dir() -> Path:
    """Where rendered data sets are kept: `MINISD_CACHE`, or `~/.cache/minisd`."""
    return Path(os.environ.get("MINISD_CACHE", "~/.cache/minisd")).expanduser()


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """The number format in which `device` multiplies fastest: `torch.bfloat16` where the hardware has it, else `torch.float32`.

    The environment variable `MINISD_PRECISION` ("bfloat16" or "float32") overrides the choice.
    """
    if name := os.environ.get("MINISD_PRECISION"):
        if name not in ("bfloat16", "float32"):
            raise ValueError(f"MINISD_PRECISION is {name!r}; it must be 'bfloat16' or 'float32'.")
        return getattr(torch, name)
    kind = torch.device(device).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":  # AVX512-BF16 or AMX: bf16 products run 2 to 8 times faster; elsewhere they are emulated, and slower
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def processor_name() -> str:
    """What the processor calls itself, to stand beside a measured time."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
