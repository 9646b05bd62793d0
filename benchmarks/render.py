"""How many postcards a second one core draws: `python benchmarks/render.py`."""

import time

import torch

from minisd.drawing import render
from minisd.postcards import sample_scenes
from minisd.utils import processor_name


def pictures_per_second(size: int, count: int = 1024, repeats: int = 5) -> float:
    """The best of several runs, so that other work on the machine disturbs the number less."""
    scenes = sample_scenes(count, "train", seed=1)
    render(scenes[:128], size)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        render(scenes, size)
        seconds.append(time.perf_counter() - start)
    return count / min(seconds)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{processor_name()}, 1 thread, torch {torch.__version__}")
    for size in (32, 64, 128):
        print(f"{size:4d} x {size:<4d} {pictures_per_second(size):8,.0f} pictures/s")


if __name__ == "__main__":
    main()
