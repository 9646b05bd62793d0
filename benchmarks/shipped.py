"""Measure the shipped models on fresh seeds: the numbers on their cards. python benchmarks/shipped.py [NAME ...] [--count 500]"""

import argparse
import time

import torch

from minisd.ddpm import load_ddpm, sample_ddpm
from minisd.drawing import render
from minisd.guidance import Guided, load_class
from minisd.metrics import frechet_distance, nearest, read_attributes
from minisd.postcards import KINDS, sample_scenes
from minisd.probe import load_probe, probe_accuracy
from minisd.samplers import sample
from minisd.utils import fast_dtype

FRESH = 987_654  # a seed that no training uses


def measure_probe(count: int) -> None:
    """Share of right answers per attribute, on clear pictures, on blurred ones and on small ones."""
    probe = load_probe()
    for split in ("valid", "novel"):
        for things in (1, 2):
            scenes = sample_scenes(count, split=split, seed=FRESH, things=things)
            images = render(scenes, 64)
            blurred = torch.nn.functional.interpolate(images, size=(40, 40), mode="bilinear", antialias=True)
            for name, pictures in (("64 pixels", images), ("blurred to 40", blurred), ("32 pixels", render(scenes, 32))):
                scores = probe_accuracy(probe, scenes, pictures)
                line = "  ".join(f"{attribute} {100 * score:.2f} %" for attribute, score in scores.items())
                print(f"{split}, {things} thing{'s' * (things == 2)}, {name:14s} {line}", flush=True)


def measure_ddpm(count: int) -> None:
    """Fréchet distance to fresh postcards, share of samples with exactly one thing, distance to the training set."""
    denoiser = load_ddpm()
    real = render(sample_scenes(count, split="valid", seed=FRESH, things=1), 32)
    train = render(sample_scenes(20_000, split="train", seed=0, things=1), 32)
    print(f"real against real, {count} pictures: Fréchet distance {frechet_distance(train[:count], real):.2f}")
    for steps in (50, 100):
        start = time.perf_counter()
        batches = [
            sample_ddpm(denoiser, (min(100, count - i), 3, 32, 32), steps=steps, seed=FRESH + i, progress=False)
            for i in range(0, count, 100)
        ]
        seconds = time.perf_counter() - start
        samples = torch.cat(batches).cpu()
        one = ((read_attributes(samples)["kind"] >= 0).sum(1) == 1).float().mean()
        distances, fresh = nearest(samples[:500], train)[1], nearest(real[:500], train)[1]
        print(
            f"{steps} steps ({denoiser.dtype}, {seconds / count:.3f} s a picture): Fréchet distance {frechet_distance(samples, real):.2f}, "
            f"exactly one thing in {one:.1%}, median distance to the nearest training picture {distances.median():.3f} "
            f"(fresh postcards: {fresh.median():.3f})",
            flush=True,
        )


def measure_class(count: int) -> None:
    """For several guidance scales: share of samples with the asked kind and nothing else, Fréchet distance; what the null class draws."""
    denoiser = load_class(device="cpu")
    null = denoiser.model.null_class
    real = render(sample_scenes(count, split="valid", seed=FRESH, things=1), 32)
    train = render(sample_scenes(20_000, split="train", seed=0, things=1), 32)
    print(f"real against real, {count} pictures: Fréchet distance {frechet_distance(train[:count], real):.2f}")

    def draw(scale: float, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        guided = Guided(denoiser, scale, {"labels": null})
        batches = [
            sample(guided, (len(part), 3, 32, 32), steps=25, seed=FRESH + i, progress=False, labels=part)
            for i, part in enumerate(labels.split(100))
        ]
        return torch.cat(batches), (time.perf_counter() - start) / count

    asked = torch.arange(count) % null
    for scale in (1, 1.5, 2, 3, 4, 5, 7.5):
        samples, seconds = draw(scale, asked)
        kinds = read_attributes(samples)["kind"]
        one = (kinds >= 0).sum(1) == 1
        right = (one & (kinds.max(1).values == asked)).float()
        distances = nearest(samples[:500], train)[1]
        print(
            f"scale {scale:g}: the asked kind in {right.mean():.1%} ± {(right.mean() * (1 - right.mean()) / count).sqrt():.1%}, "
            f"least for {KINDS[int(torch.stack([right[asked == k].mean() for k in range(null)]).argmin())]}, "
            f"exactly one thing in {one.float().mean():.1%}, Fréchet distance {frechet_distance(samples, real):.2f}, "
            f"median distance to the nearest training picture {distances.median():.3f}, {seconds:.3f} s a picture",
            flush=True,
        )
    samples, _ = draw(1, torch.full((count,), null))
    kinds = read_attributes(samples)["kind"].max(1).values
    shares = {name: round((kinds == k).float().mean().item(), 3) for k, name in enumerate(KINDS)}
    print(f"null class: Fréchet distance {frechet_distance(samples, real):.2f}, kinds {shares}")


MEASURES = {"probe": measure_probe, "ddpm": measure_ddpm, "class": measure_class}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(MEASURES), metavar="NAME", help=", ".join(MEASURES))
    parser.add_argument("--count", type=int, default=500)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fast dtype {fast_dtype('cpu')}")
    for name in options.names:
        print(f"== {name}")
        MEASURES[name](options.count)
