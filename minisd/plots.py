"""Drawing helpers shared by the lessons: grids of pictures, films, one look for all plots."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from PIL import Image

# One colour per role, the same in every lesson; they stay apart for colour-blind readers (Okabe and Ito's palette).
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def use_style() -> None:
    """Give matplotlib the look of the course. Called once at the top of each lesson."""
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "figure.figsize": (7.5, 3.6),
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": plt.cycler(color=PALETTE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.titlesize": 11,
            "axes.labelsize": 10,
            "legend.frameon": False,
            "lines.linewidth": 2,
            "font.size": 10,
        }
    )


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) floats in [-1, 1] (values outside are clipped) to (B, H, W, C) bytes."""
    return ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """(B, 3, H, W) floats in [-1, 1] to a list of B PIL pictures."""
    return [Image.fromarray(picture.numpy()) for picture in to_uint8(images)]


def make_grid(images: torch.Tensor, columns: int = 8, gap: int = 2, scale: int = 1) -> Image.Image:
    """(B, 3, H, W) floats in [-1, 1] to one PIL picture, row by row on white, each pixel enlarged to `scale` x `scale`."""
    pictures = to_uint8(images)  # (B, H, W, 3)
    count, height, width, _ = pictures.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    grid = Image.fromarray(canvas.numpy())
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


def show_images(
    images: torch.Tensor, titles: Sequence[str] | None = None, columns: int = 8, size: float = 1.2, title: str | None = None
) -> Figure:
    """Show (B, 3, H, W) floats in [-1, 1] as a grid.

    `titles`: a line above each picture; `size`: inches per picture; `title`: one line above all. Returns the matplotlib figure.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    extra = 0.0 if titles is None else 0.18 * (1 + max(t.count("\n") for t in titles))
    figure, axes = plt.subplots(rows, columns, figsize=(columns * size, rows * (size + extra) + (0.3 if title else 0)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, picture) in enumerate(zip(axes.flat, to_uint8(images))):
        axis.imshow(picture.numpy().squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        if titles is not None:
            axis.set_title(titles[i], fontsize=8)
    if title:
        figure.suptitle(title)
    return figure


def save_film(frames: Sequence[torch.Tensor], path: str | Path, columns: int = 8, scale: int = 3, milliseconds: int = 80) -> Path:
    """Save a list of (B, 3, H, W) batches as a GIF that runs once per frame and rests on the last for two seconds."""
    pictures = [make_grid(frame, columns, scale=scale) for frame in frames]
    durations = [milliseconds] * (len(pictures) - 1) + [2000]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return Path(path)
