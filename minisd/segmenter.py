"""The probe's companion: a small convnet that says of each pixel of a postcard what it shows. With it the course measures where things are.

The two share the work. The segmenter tells sky, ground, light and things apart, for which few weights are enough, and the probe says which
kind the thing at each place is. Trained by `python -m minisd train segmenter --out DIR`; the shipped weights lie in
`minisd/pretrained/segmenter`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from minisd.drawing import FIRST_THING, render, segment
from minisd.metrics import read_attributes
from minisd.postcards import KINDS, sample_scenes
from minisd.probe import spoil
from minisd.train import Trained, train
from minisd.weights import load_into, read_model, save_model

SIZE = 64  # the segmenter's own resolution; other sizes are scaled to it
CLASSES = FIRST_THING + len(KINDS)  # sky, ground, sun or moon, and a thing of each kind, as in `minisd.drawing.segment`
SEEN = FIRST_THING + 1  # what the network tells apart: sky, ground, sun or moon, a thing
COLUMNS = (0.2, 0.5, 0.8)  # where things at the left, in the middle and at the right have their centres, about


class Block(nn.Module):
    """A 3x3 convolution of each channel alone, then a mixture of channels, norm and SiLU: (B, inputs, H, W) to (B, outputs, H', W').

    Taken apart in this way, a convolution has hardly more weights than the mixture alone (Howard et al. 2017, arXiv:1704.04861).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.each = nn.Conv2d(inputs, inputs, 3, stride=stride, padding=1, groups=inputs, bias=False)
        self.mix = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm = nn.GroupNorm(4, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.norm(self.mix(self.each(x))))


class Segmenter(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1], any size, to logits for each pixel of 64x64: (B, SEEN, 64, 64). A small U without timestep."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 32, 32)):
        super().__init__()
        first = widths[0]
        self.begin = Block(12, first)  # each 2x2 square of pixels is one place
        self.down = nn.ModuleList([Block(a, b, stride=2) for a, b in zip(widths, widths[1:])])
        self.deep = nn.ModuleList([Block(width, width) for width in widths[1:]])
        self.up = nn.ModuleList([Block(b, a) for a, b in zip(widths, widths[1:])])
        self.head = nn.Conv2d(first, 4 * SEEN, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be floats of shape (B, 3, H, W) in [-1, 1], got {tuple(images.shape)} {images.dtype}.")
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=images.shape[-1] > SIZE)
        x = self.begin(F.pixel_unshuffle(images, 2))  # (B, 16, 32, 32)
        skips = []
        for down, deep in zip(self.down, self.deep):
            skips.append(x)
            x = down(x)
            x = x + deep(x)  # at the end (B, 32, 4, 4)
        for up, skip in zip(reversed(self.up), reversed(skips)):
            x = skip + up(F.interpolate(x, scale_factor=2.0))
        return F.pixel_shuffle(self.head(x), 2)  # (B, SEEN, 64, 64)

    @torch.no_grad()
    def read(self, images: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
        """What each pixel shows, (B, 64, 64) int64 on the CPU: 0 sky, 1 ground, 2 sun or moon, 3 + index into KINDS a thing.

        A thing's kind is what the probe sees at the nearest place; where it sees nothing at all, no pixel shows a thing.
        """
        device = self.head.weight.device
        parts = []
        for part in images.split(batch_size):
            logits, kinds = self(part.to(device)).float().cpu(), read_attributes(part)["kind"].cpu()  # (B, SEEN, 64, 64), (B, 3)
            logits[(kinds < 0).all(1), FIRST_THING] = -torch.inf
            away = (((torch.arange(SIZE) + 0.5) / SIZE)[:, None] - torch.tensor(COLUMNS)).abs()  # (64, 3)
            place = away.masked_fill((kinds < 0)[:, None], torch.inf).argmin(2)  # (B, 64): the nearest place with a thing, by column
            labels = logits.argmax(1)
            parts.append(torch.where(labels == FIRST_THING, FIRST_THING + kinds.gather(1, place)[:, None], labels))
        return torch.cat(parts)


def load_segmenter(name_or_folder: str | Path = "segmenter", device: torch.device | str = "cpu") -> Segmenter:
    """The shipped segmenter, or one from a folder that `train segmenter` wrote, ready to read."""
    _, weights = read_model(name_or_folder)
    return load_into(Segmenter(), weights, name_or_folder).to(device)


def overlap(seen: torch.Tensor, wanted: torch.Tensor, classes: int = CLASSES) -> torch.Tensor:
    """Intersection over union of two sets of maps (B, H, W), averaged over the classes that are in either: (B,), from 0 to 1."""
    ours, theirs = (F.one_hot(labels.long(), classes).bool().flatten(1, 2) for labels in (seen, wanted))  # (B, H W, classes)
    both, either = (ours & theirs).sum(1).float(), (ours | theirs).sum(1).float()  # (B, classes)
    return (both / either.clamp(min=1)).sum(1) / (either > 0).sum(1)


def box_overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes (..., 4) of left, top, right, bottom: (...,). A box of NaN overlaps with none."""
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    both = sides.clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]
    return (both / (areas[0] + areas[1] - both)).nan_to_num(0.0)


def found_boxes(labels: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """The box around all pixels of a kind, for maps (B, H, W) and kinds (B, N), -1 for none: (B, N, 4) in [0, 1], or NaN."""
    height, width = labels.shape[1:]
    here = (labels[:, None] == (FIRST_THING + kinds)[:, :, None, None]) & (kinds >= 0)[:, :, None, None]  # (B, N, H, W)
    found = torch.full((*kinds.shape, 4), float("nan"))
    for axis, side, places in ((0, width, here.any(2)), (1, height, here.any(3))):
        there = places.any(2)
        first, last = places.int().argmax(2), side - places.flip(2).int().argmax(2)
        found[..., axis] = torch.where(there, first / side, torch.nan)
        found[..., axis + 2] = torch.where(there, last / side, torch.nan)
    return found


def segmenter_batch(step: int, generator: torch.Generator, batch_size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """A fresh batch: pictures, made a little worse as generators do, and their maps; a quarter of it has pairs of the split `novel`."""
    seed = int(torch.randint(2**31, (), generator=generator))
    parts = [sample_scenes(count, split, seed) for split, count in (("train", batch_size * 3 // 4), ("novel", batch_size // 4))]
    images, labels = (torch.cat([draw(scenes, SIZE) for scenes in parts]) for draw in (render, segment))
    return spoil(images, generator), labels.long().clamp(max=FIRST_THING)


def segmenter_loss(model: Segmenter, batch: tuple[torch.Tensor, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """Cross-entropy, averaged over all pixels."""
    images, labels = batch
    device = model.head.weight.device
    logits = model(images.to(device, memory_format=torch.channels_last))
    return F.cross_entropy(logits.float(), labels.to(device))


def train_segmenter(steps: int, out: str | Path | None = None, resume: bool = False, seed: int = 0, **options) -> Trained:
    """Train a segmenter on fresh scenes at every step; with `out`, keep checkpoints and the result there. `options` go to `train`."""
    torch.manual_seed(seed)  # the first weights
    run = {"lr": 5e-3, "optimizer": "muon", "warmup": 30, "ema_decay": 0.99} | options
    trained = train(Segmenter(), segmenter_loss, segmenter_batch, steps=steps, out=out, resume=resume, seed=seed, **run)
    if out is not None:
        save_model(out, trained.model, {"model": "segmenter", "steps": steps, "seed": seed})
    return trained
