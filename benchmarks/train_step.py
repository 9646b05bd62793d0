"""One training step of the UNet at 32x32 beside its peers: `python benchmarks/train_step.py` (needs `pip install -e '.[test,bench]'`).

Same widths, same batch, same loss and optimiser, in one run: time per picture and peak memory, in float32 and bfloat16. Each contender runs
Same widths, same batch, same loss and optimiser, in one run: time per picture and peak memory, float32 and bfloat16. Each contender runs
on the machine disturbs less. "products" are the multiply-accumulates of one forward pass of one picture: they tell how much work a network
asks for. Rows marked * are not the documented use but the nearest thing to ours: diffusers with channels_last, and the network of
denoising-diffusion-pytorch, which has attention on every level, with that attention taken out.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO

import psutil
import torch
from torch import nn

from minisd.utils import processor_name

WIDTHS, GROUPS = (64, 128, 128), 4
GROUPS_OF_ROWS = {
    "one residual block a level (the default)": ["minisd", "diffusers", "diffusers channels_last*"],
    "two residual blocks a level": [
        "minisd, 2 blocks",
        "diffusers, 2 blocks",
        "diffusers, 2 blocks, channels_last*",
        "denoising-diffusion-pytorch",
        "denoising-diffusion-pytorch, no attention*",
    ],
}


class Nothing(nn.Module):
    """Stands in for an attention block whose result is added to its input."""

    def forward(self, x: torch.Tensor) -> float:
        return 0.0


def build(name: str) -> nn.Module:
    """The contender's network, called as model(x, timesteps)."""
    layers = 2 if "2 blocks" in name else 1
    if name.startswith("minisd"):
        from minisd.unet import UNet

        return UNet(3, 3, WIDTHS, layers, GROUPS).to(memory_format=torch.channels_last)
    if name.startswith("diffusers"):
        from diffusers import UNet2DModel

        model = UNet2DModel(
            block_out_channels=WIDTHS,
            layers_per_block=layers,
            norm_num_groups=GROUPS,
            down_block_types=("DownBlock2D",) * len(WIDTHS),
            up_block_types=("UpBlock2D",) * len(WIDTHS),
            add_attention=False,
        )
        return model.to(memory_format=torch.channels_last) if "channels_last" in name else model
    from denoising_diffusion_pytorch import Unet

    model = Unet(WIDTHS[0], dim_mults=tuple(width // WIDTHS[0] for width in WIDTHS))
    if "no attention" in name:
        for blocks in [*model.downs, *model.ups]:
            blocks[2] = Nothing()
        model.mid_attn = Nothing()
    return model


def products(model: nn.Module, x: torch.Tensor, timesteps: torch.Tensor) -> float:
    """Multiply-accumulates of one forward pass, per picture."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x[:1], timesteps[:1])
    return counter.get_total_flops() / 2


def measure(name: str, precision: str, batch: int, steps: int, threads: int) -> dict:
    """Train for a few steps; seconds of the fastest step, peak memory above the empty process, sizes."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    process = psutil.Process()
    build(name)  # imports everything, so that the libraries do not count as memory of the step
    before = process.memory_info().rss
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, noise, timesteps = torch.randn(batch, 3, 32, 32), torch.randn(batch, 3, 32, 32), torch.randint(0, 1000, (batch,))
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            output = model(x, timesteps)
            output = getattr(output, "sample", output)
        loss = (output.float() - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    peak = peak_memory(process) - before
    count = sum(p.numel() for p in model.parameters())
    return {"seconds": min(seconds[1:]), "memory": peak, "parameters": count, "products": products(model, x, timesteps)}


def peak_memory(process: psutil.Process) -> int:
    """The most bytes that this process has held so far."""
    if sys.platform == "win32":
        return process.memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_fresh(name: str, precision: str, options: argparse.Namespace) -> dict:
    """`measure` in a process of its own."""
    arguments = ["--one", name, precision, "--batch", str(options.batch), "--steps", str(options.steps), "--threads", str(options.threads)]
    result = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{name} in {precision} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def print_table(title: str, names: list[str], results: dict) -> None:
    """Time per picture, memory, and both as multiples of the first row's."""
    print(
        f"\n{title}\n{'':44}{'parameters':>11}{'products':>10}"
        + "".join(f"{p + ' ms':>15}{'MB':>7}{'x time':>8}" for p in ("float32", "bfloat16"))
    )
    for name in names:
        line = f"{name:44}"
        for i, precision in enumerate(("float32", "bfloat16")):
            result, ours = results[name, precision], results[names[0], precision]
            if i == 0:
                line += f"{result['parameters'] / 1e6:9.2f} M{result['products'] / 1e6:8.0f} M"
            line += f"{result['milliseconds']:15.2f}{result['memory'] / 2**20:7.0f}{result['milliseconds'] / ours['milliseconds']:8.2f}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="pictures in a step")
    parser.add_argument("--steps", type=int, default=5, help="measured steps in each process")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", nargs=2, metavar=("NAME", "PRECISION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with redirect_stdout(StringIO()):
            result = measure(*options.one, options.batch, options.steps, options.threads)
        print(json.dumps(result))
        return

    if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
        print("denoising-diffusion-pytorch is not installed (pip install -e '.[bench]'): left out.")
        for names in GROUPS_OF_ROWS.values():
            names[:] = [name for name in names if not name.startswith("denoising")]
    print(f"{processor_name()}, {options.threads} threads, torch {torch.__version__}, batch {options.batch}, 32x32, widths {WIDTHS}")
    results: dict = {}
    for _ in range(options.rounds):
        for names in GROUPS_OF_ROWS.values():
            for name in names:
                for precision in ("float32", "bfloat16"):
                    new = run_fresh(name, precision, options)
                    new["milliseconds"] = 1000 * new["seconds"] / options.batch
                    old = results.get((name, precision), new)
                    new["milliseconds"] = min(new["milliseconds"], old["milliseconds"])
                    new["memory"] = min(new["memory"], old["memory"])
                    results[name, precision] = new
    for title, names in GROUPS_OF_ROWS.items():
        print_table(title, names, results)
    print("\nms: per picture and training step; MB: peak of the step above the empty process; x time: compared with the first row.")


if __name__ == "__main__":
    main()
