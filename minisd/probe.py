"""The probe: a small convnet that reads every attribute back from a postcard. The course measures its generators with it.

Trained by `python -m minisd train probe --out DIR`; the shipped weights lie in `minisd/pretrained/probe`.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from minisd.drawing import render
from minisd.postcards import COLOURS, GROUNDS, KINDS, LIGHTS, PLACES, SKIES, Scenes, attributes, sample_scenes
from minisd.train import Trained, train
from minisd.weights import load_into, read_model, save_model

SIZE = 64  # the probe's own resolution; other sizes are scaled to it
FEATURES = 128
# One classifier for each attribute. For each of the three places: which kind and colour stands there; the last class means "nothing".
HEADS = {"sky": len(SKIES), "ground": len(GROUNDS), "light": len(LIGHTS)}
HEADS |= {f"kind_{place}": len(KINDS) + 1 for place in PLACES} | {f"colour_{place}": len(COLOURS) + 1 for place in PLACES}


class Probe(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1], any size, to one row of logits per attribute (see `HEADS`)."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 128), dropout: float = 0.1):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            channels = width
        side = SIZE // 2 ** len(widths)
        self.body = nn.Sequential(*layers)
        self.embed = nn.Linear(channels * side * side, FEATURES)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(FEATURES, sum(HEADS.values()))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to (B, 128): the numbers that the classifiers read, and in which Fréchet distances are measured."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be floats of shape (B, 3, H, W) in [-1, 1], got {tuple(images.shape)} {images.dtype}.")
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=images.shape[-1] > SIZE)
        h = self.body(images)  # (B, 128, 4, 4)
        return F.silu(self.embed(h.flatten(1)))  # (B, 128)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.dropout(self.features(images)))
        return dict(zip(HEADS, logits.split(list(HEADS.values()), dim=1)))

    @torch.no_grad()
    def read(self, images: torch.Tensor, batch_size: int = 256) -> dict[str, torch.Tensor]:
        """What the probe sees, as `postcards.attributes` has it: sky, ground, light (B,); kind, colour (B, 3) by place, -1: nothing."""
        device = next(self.parameters()).device
        answers: dict[str, list[torch.Tensor]] = {name: [] for name in HEADS}
        for batch in images.split(batch_size):
            for name, logits in self(batch.to(device)).items():
                answers[name].append(logits.argmax(1).cpu())
        classes = {name: torch.cat(parts) for name, parts in answers.items()}
        seen = {name: classes[name] for name in ("sky", "ground", "light")}
        for name, nothing in (("kind", len(KINDS)), ("colour", len(COLOURS))):
            columns = torch.stack([classes[f"{name}_{place}"] for place in PLACES], dim=1)  # (B, 3)
            seen[name] = columns.masked_fill(columns == nothing, -1)
        return seen


def load_probe(name_or_folder: str = "probe", device: torch.device | str = "cpu") -> Probe:
    """The shipped probe, or one from a folder that `train probe` wrote, ready to read."""
    _, weights = read_model(name_or_folder)
    return load_into(Probe(), weights, name_or_folder).to(device)


def probe_targets(scenes: Scenes) -> dict[str, torch.Tensor]:
    """The true class of every head, (N,) each."""
    truth = attributes(scenes)
    targets = {name: truth[name] for name in ("sky", "ground", "light")}
    for i, place in enumerate(PLACES):
        targets[f"kind_{place}"] = truth["kind"][:, i] % (len(KINDS) + 1)  # -1, nothing, becomes the last class
        targets[f"colour_{place}"] = truth["colour"][:, i] % (len(COLOURS) + 1)
    return targets


def spoil(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Make pictures a little worse, as generators do: half of each batch seen through fewer pixels, then some noise, another brightness."""
    spoiled = images.clone()
    half = len(images) // 2
    side = int(torch.randint(SIZE // 2, SIZE, (), generator=generator))  # 32 ... 63 pixels
    small = F.interpolate(images[:half], size=(side, side), mode="bilinear", antialias=True)
    spoiled[:half] = F.interpolate(small, size=images.shape[-2:], mode="bilinear")
    strength = 0.08 * torch.rand(len(images), 1, 1, 1, generator=generator)
    gain = 1 + 0.1 * (torch.rand(len(images), 1, 1, 1, generator=generator) - 0.5)
    return spoiled * gain + strength * torch.randn(images.shape, generator=generator)


def probe_batch(step: int, generator: torch.Generator, batch_size: int = 64) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A fresh batch of scenes for the probe: three quarters `train`, one quarter `novel`, so that it knows every (kind, colour) pair."""
    seed = int(torch.randint(2**31, (), generator=generator))
    batches = []
    for split, count in (("train", batch_size * 3 // 4), ("novel", batch_size // 4)):
        scenes = sample_scenes(count, split=split, seed=seed)
        batches.append((render(scenes, SIZE), probe_targets(scenes)))
    images = torch.cat([images for images, _ in batches])
    targets = {name: torch.cat([targets[name] for _, targets in batches]) for name in HEADS}
    return spoil(images, generator), targets


def probe_loss(model: Probe, batch: tuple[torch.Tensor, dict[str, torch.Tensor]], generator: torch.Generator) -> torch.Tensor:
    """The sum of the cross-entropies of all heads."""
    images, targets = batch
    device = next(model.parameters()).device
    logits = model(images.to(device, memory_format=torch.channels_last))
    return sum(F.cross_entropy(logits[name].float(), targets[name].to(device)) for name in HEADS)


def probe_accuracy(probe: Probe, scenes: Scenes, images: torch.Tensor) -> dict[str, float]:
    """Share of right answers for each attribute, over every place; "all" is the share of pictures read without any mistake."""
    seen, truth = probe.read(images), attributes(scenes)
    right = {name: seen[name] == truth[name] for name in truth}
    scores = {name: hits.float().mean().item() for name, hits in right.items()}
    every = torch.stack([hits.reshape(len(images), -1).all(1) for hits in right.values()]).all(0)
    return scores | {"all": every.float().mean().item()}


def train_probe(steps: int, out: str | Path | None = None, resume: bool = False, seed: int = 0, **options) -> Trained:
    """Train a probe on fresh scenes at every step; with `out`, keep checkpoints and the result there. `options` go to `train`."""
    torch.manual_seed(seed)  # the first weights
    trained = train(Probe(), probe_loss, probe_batch, steps=steps, lr=1e-3, weight_decay=0.01, out=out, resume=resume, seed=seed, **options)
    if out is not None:
        save_model(out, trained.model, {"model": "probe", "steps": steps, "seed": seed})
    return trained
