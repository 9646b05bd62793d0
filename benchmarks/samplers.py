"""What a sampling step costs besides the network: our samplers beside diffusers' schedulers. `python benchmarks/samplers.py`

The network is one elementwise product, so nearly all of the time is the sampler's own. Latents as in Stable Diffusion, (B, 4, 64, 64),
float32, one thread, 25 steps. Ours: `sample` with a `Denoiser` (x0 and noise from the answer, timesteps checked). Theirs: the loop of their
pipelines, `scale_model_input`, network, `step`. They take turns in one run, the fastest of several runs counts. A step of Heun's holds two
calls of the network.
"""

import argparse
import inspect
import time
from collections.abc import Callable

import diffusers
import torch
from torch import nn

from minisd.ddpm import Denoiser
from minisd.noise import NoiseSchedule
from minisd.samplers import SAMPLERS, make_path, sample
from minisd.schedulers import scheduler_config
from minisd.utils import processor_name


class Tiny(nn.Module):
    """The cheapest network there is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.weight * x


def ours(sampler: str, prediction_type: str, shape: tuple[int, ...], steps: int) -> Callable[[], torch.Tensor]:
    """A function that samples once with this package."""
    denoiser = Denoiser(Tiny(), NoiseSchedule("scaled_linear"), prediction_type, dtype=torch.float32)
    path = make_path(denoiser.schedule, steps, "trailing")
    return lambda: sample(denoiser, shape, sampler, timesteps=path, progress=False)


def theirs(sampler: str, prediction_type: str, shape: tuple[int, ...], steps: int) -> Callable[[], torch.Tensor]:
    """A function that samples once with the scheduler of diffusers that takes the same steps."""
    config = scheduler_config(NoiseSchedule("scaled_linear"), prediction_type, sampler, "trailing")
    scheduler, model = getattr(diffusers, config["_class_name"]).from_config(config), Tiny()
    noisy = "generator" in inspect.signature(scheduler.step).parameters

    @torch.no_grad()
    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        scheduler.set_timesteps(steps)
        x = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            output = model(scheduler.scale_model_input(x, t), t.expand(len(x)))
            x = scheduler.step(output, t, x, **({"generator": generator} if noisy else {}), return_dict=False)[0]
        return x

    return run


def fastest(functions: list[Callable[[], torch.Tensor]], repeats: int) -> list[float]:
    """Seconds of the fastest run of each; they take turns, so that other work on the machine meets all of them."""
    best = [float("inf")] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--prediction", default="epsilon")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor_name()}, 1 thread, torch {torch.__version__}, diffusers {diffusers.__version__}, {options.prediction}")
    print(f"{'microseconds a step':20}" + "".join(f"{f'batch {batch}: minisd':>20}{'diffusers':>11}{'x time':>8}" for batch in (1, 8)))
    for sampler in SAMPLERS:
        line = f"{sampler:20}"
        for batch in (1, 8):
            contenders = [make(sampler, options.prediction, (batch, 4, 64, 64), options.steps) for make in (ours, theirs)]
            here, there = (1e6 * seconds / options.steps for seconds in fastest(contenders, options.repeats))
            line += f"{here:20.0f}{there:11.0f}{here / there:8.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
