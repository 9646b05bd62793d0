"""Attention by two plain products or by PyTorch's fused kernel? python benchmarks/attention.py [--threads 1]

Milliseconds of one call, forward alone and forward with backward, at the sizes of the course's UNet and of Stable Diffusion's. With one
thread it is processor time, which a busy machine disturbs less. `minisd.attention.attend` chooses by this table.
"""

import argparse
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from minisd.attention import attend, attention_weights

# name: batch, heads, queries N, keys M, numbers of a head
SIZES = {
    "course, 64 places, self": (32, 4, 64, 64, 28),
    "course, 64 places, 40 tokens": (32, 4, 64, 40, 28),
    "course, 16 places, self": (32, 4, 16, 16, 28),
    "course, 16 places, 40 tokens": (32, 4, 16, 40, 28),
    "SD, 4096 places, self": (1, 8, 4096, 4096, 40),
    "SD, 4096 places, 77 tokens": (1, 8, 4096, 77, 40),
}


def plain(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return attention_weights(queries, keys) @ values


def fused(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(queries, keys, values)


WAYS = {"plain": plain, "fused": fused, "attend": attend}


def milliseconds(function: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The fastest of several calls; at least three, and for at least `seconds`."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    function()
    best, spent, calls = math.inf, 0.0, 0
    while spent < seconds or calls < 3:
        start = clock()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best, spent, calls = min(best, clock() - start), spent + clock() - start, calls + 1
    return 1000 * best


def measure(way: str, size: tuple[int, ...], dtype: torch.dtype, device: torch.device, backward: bool, seconds: float) -> float:
    """Milliseconds of one call. Queries, keys and values lie in memory as the linear layers leave them."""
    batch, heads, queries, keys, width = size
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(batch, n, heads, width, generator=generator).to(device, dtype).transpose(1, 2) for n in (queries, keys, keys)]
    if not backward:
        with torch.no_grad():
            return milliseconds(lambda: WAYS[way](*rows), device, seconds)
    rows = [tensor.requires_grad_() for tensor in rows]
    gradient = torch.ones(batch, heads, queries, width, device=device, dtype=dtype)
    return milliseconds(lambda: torch.autograd.grad(WAYS[way](*rows), rows, gradient), device, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on each number, at least")
    parser.add_argument("--small", action="store_true", help="only the course's sizes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {device.type} ({name}), {options.threads} threads; milliseconds, plain / fused / attend")
    print(f"{'':30}" + "".join(f"{f'{kind} {way}':>30}" for kind in ("float32", "bfloat16") for way in ("forward", "and backward")))
    for label, size in SIZES.items():
        if options.small and not label.startswith("course"):
            continue
        line = f"{label:30}"
        for dtype in (torch.float32, torch.bfloat16):
            for backward in (False, True):
                times = [measure(way, size, dtype, device, backward, options.seconds) for way in WAYS]
                line += f"{' / '.join(f'{t:.2f}' for t in times):>30}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
