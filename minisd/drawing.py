"""From scenes to pictures and segmentation maps, at any size.

A picture is painted from back to front: the landscape (`minisd.landscape`), then the things (`minisd.shapes`). Each layer is a formula
of the place in the picture, so that one scene gives the same picture at every size, and every edge is smooth.
"""

import math

import torch
from torch import Tensor

from minisd.landscape import ACCENT, column, paint_clouds, paint_ground, paint_light, paint_sky
from minisd.scenes import COLOURS, GROUNDS, HALF_WIDTHS, KINDS, SKIES, Scenes
from minisd.shapes import THINGS, Pen, ellipse, hex_colour

SKY, GROUND, LIGHT, FIRST_THING = 0, 1, 2, 3  # labels of `segment`

# Three tones for each of COLOURS.
BASE = hex_colour("#E5443E", "#FAC830", "#2EA55B", "#2E79DE", "#8F50C8", "#FCF9F3")
DARK_TONE = hex_colour("#B22B3D", "#E09A22", "#1B7C4C", "#1F56AE", "#69359E", "#AEB6CC")
PALE_TONE = hex_colour("#FF8C7A", "#FFE98F", "#80D28C", "#82B7F6", "#C597EE", "#FFFFFF")

# By sky: day, sunset, night.
WINDOW = hex_colour("#55658A", "#FFE08A", "#FFE9A0")
ISLAND = hex_colour("#F5DDA8", "#F0C08E", "#A3939B")
SHADOW = hex_colour("#2B3A55", "#4A2A50", "#0A1030")


def render(scenes: Scenes, size: int = 64) -> Tensor:
    """Paint the scenes: (N, 3, size, size) float32 in [-1, 1]."""
    _check_size(size)
    image = torch.empty(len(scenes), 3, size, size)
    for rows in _chunks(len(scenes), size):
        _paint(scenes[rows], image[rows])
    return image


def segment(scenes: Scenes, size: int = 64) -> Tensor:
    """What each pixel shows, (N, size, size) uint8: 0 sky, 1 ground and hills, 2 sun or moon, 3 + index into KINDS a thing."""
    _check_size(size)
    labels = torch.empty(len(scenes), size, size, dtype=torch.uint8)
    for rows in _chunks(len(scenes), size):
        part = scenes[rows]
        _paint(part, torch.empty(len(part), 3, size, size), labels[rows])
    return labels


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, not {size}")


def _chunks(count: int, size: int) -> list[slice]:
    """So many pictures at a time that the work stays in the processor's cache."""
    step = max(1, 128 * 64 * 64 // (size * size))
    return [slice(start, start + step) for start in range(0, count, step)]


def _paint(scenes: Scenes, image: Tensor, labels: Tensor | None = None) -> None:
    """Paint onto `image` (N, 3, S, S), and write into `labels` (N, S, S) where given, both in place."""
    paint_sky(scenes, image)
    lit, light = paint_light(scenes, image)
    paint_clouds(scenes, image)
    ground = paint_ground(scenes, image)
    if labels is not None:
        labels.fill_(SKY)
        labels[lit, : light.shape[1]] = (light > 0.5).to(torch.uint8) * LIGHT
        labels.masked_fill_(ground > 0.5, GROUND)
    for slot in (0, 1):
        for kind in range(len(KINDS)):
            rows = (scenes.kind[:, slot] == kind).nonzero()[:, 0]
            if len(rows):
                _paint_things(kind, slot, scenes[rows], rows, image, labels)


def _paint_things(kind: int, slot: int, scenes: Scenes, rows: Tensor, image: Tensor, labels: Tensor | None) -> None:
    """Cut patches around the things of one kind out of the pictures, paint on them, and put them back."""
    size = image.shape[-1]
    x, y, scale = scenes.x[:, slot] * size, scenes.y[:, slot] * size, scenes.size[:, slot] * size  # in pixels
    side = min(size, math.ceil(1.5 * scale.max().item()) + 1)
    left = (x - 0.75 * scale).long().clamp(0, size - side)
    top = (y - 1.2 * scale).long().clamp(0, size - side)
    columns, lines = left[:, None] + torch.arange(side), top[:, None] + torch.arange(side)  # (M, P)
    where = (rows[:, None, None], slice(None), lines[:, :, None], columns[:, None, :])
    patch = image[where].permute(0, 3, 1, 2).contiguous()  # (M, 3, P, P)

    scale = column(scale)
    u = (columns[:, None, None, :] + 0.5 - column(x)) / scale
    v = (column(y) - lines[:, None, :, None] - 0.5) / scale
    colour = scenes.colour[:, slot]
    white = column((colour == COLOURS.index("white")).float())
    pen = Pen(patch, u, v, scale, (BASE[colour], DARK_TONE[colour], PALE_TONE[colour]), WINDOW[scenes.sky], white)
    _paint_foot(kind, scenes, pen)
    THINGS[kind](pen)
    if KINDS[kind] == "boat":
        _paint_foam(scenes, pen)
    image[where] = patch.permute(0, 2, 3, 1)
    if labels is not None:
        spot = (rows[:, None, None], lines[:, :, None], columns[:, None, :])
        labels[spot] = labels[spot].masked_fill(pen.cover[:, 0] > 0.5, FIRST_THING + kind)


def _on_sea(scenes: Scenes) -> Tensor:
    return column((scenes.ground == GROUNDS.index("sea")).float())


def _foam(scenes: Scenes) -> Tensor:
    return ACCENT[GROUNDS.index("sea") * len(SKIES) + scenes.sky]


def _paint_foot(kind: int, scenes: Scenes, pen: Pen) -> None:
    """What a thing stands on: a soft shadow, and on the sea a small island (boats float, balloons hover)."""
    sea, half = _on_sea(scenes), HALF_WIDTHS[kind].item()
    hover = 0.13 if KINDS[kind] == "balloon" else 0.0
    distance = ((pen.u / half).square() + ((pen.v + hover) / 0.075).square()).sqrt_()  # 1 on the rim of the shadow
    shade = (1.2 - distance).clamp_(0, 1) * 0.4
    if KINDS[kind] == "boat":
        shade = shade * (1 - sea)
        reach = (1 + pen.v / 0.24).clamp(0, 1)  # 1 at the water line, 0 where the reflection ends
        broken = 0.55 + 0.45 * torch.cos(pen.v * 70)
        pen.image.lerp_(pen.base, pen.mask(pen.u.abs() - 0.40 * reach) * reach * broken * (pen.v < 0) * sea * 0.5)
    elif KINDS[kind] != "balloon":
        pen.image.lerp_(_foam(scenes), pen.mask(ellipse(pen.u, pen.v, 0.0, 0.0, 1.33 * half, 0.115)) * sea * 0.7)
        pen.image.lerp_(ISLAND[scenes.sky], pen.mask(ellipse(pen.u, pen.v, 0.0, 0.0, 1.25 * half, 0.095)) * sea)
    pen.image.lerp_(SHADOW[scenes.sky], shade)


def _paint_foam(scenes: Scenes, pen: Pen) -> None:
    """The water in front of a boat's hull."""
    line = (pen.v - 0.012 * torch.cos(pen.u * 40)).abs() - 0.022 * (1 - (pen.u / 0.46).square())
    pen.image.lerp_(_foam(scenes), pen.mask(line) * _on_sea(scenes) * 0.9)
