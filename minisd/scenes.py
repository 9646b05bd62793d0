"""Postcards, the data of the course: what a scene is, and how scenes are drawn by lot.

A scene says everything about its picture in numbers: which sky, ground and light, which one or two things, where and how large.
`minisd.drawing` turns scenes into pictures, `minisd.captions` into sentences and back.
Lengths are fractions of the picture's side; x runs from left to right and y from top to bottom.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

KINDS = ("house", "tree", "boat", "rocket", "cactus", "tent", "balloon", "snowman")
COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
SKIES = ("day", "sunset", "night")
GROUNDS = ("grass", "sand", "snow", "sea")
LIGHTS = ("none", "sun", "moon")
PLACES = ("left", "middle", "right")
SPLITS = ("train", "valid", "novel")

# Never shown in `train` or `valid`: a model that draws them has learned what a colour is and what a kind is, not which go together.
NOVEL_PAIRS = frozenset(
    {
        ("house", "purple"),
        ("tree", "yellow"),
        ("boat", "green"),
        ("rocket", "blue"),
        ("cactus", "white"),
        ("tent", "red"),
        ("balloon", "green"),
        ("snowman", "purple"),
    }
)

# How far a thing of each kind reaches, for size 1: half its width, and its height. `minisd.shapes` draws inside these limits.
HALF_WIDTHS = torch.tensor([0.46, 0.41, 0.50, 0.29, 0.38, 0.54, 0.38, 0.38])
HEIGHTS = torch.tensor([1.00, 1.05, 1.04, 1.02, 1.07, 0.93, 1.12, 1.06])


@dataclass
class Scenes:
    """N scenes, each field a tensor whose first axis is N. `scenes[i]`, `scenes[2:5]` and `scenes[mask]` are Scenes again.

    The second axis of `kind`, `colour`, `place`, `x`, `y` and `size` is the thing, from left to right; -1 (or NaN for floats)
    where there is no second thing.
    """

    sky: Tensor  # (N,) index into SKIES
    ground: Tensor  # (N,) index into GROUNDS
    light: Tensor  # (N,) index into LIGHTS
    kind: Tensor  # (N, 2) index into KINDS
    colour: Tensor  # (N, 2) index into COLOURS
    place: Tensor  # (N, 2) index into PLACES
    horizon: Tensor  # (N,) height of the horizon
    light_x: Tensor  # (N,) centre of sun or moon (of nothing, where there is no light)
    light_y: Tensor  # (N,)
    x: Tensor  # (N, 2) centre of the thing
    y: Tensor  # (N, 2) its lowest point
    size: Tensor  # (N, 2) its scale; its height is size * HEIGHTS[kind]
    texture: Tensor  # (N,) int64 seed for stars, clouds, hills, waves ...

    def __len__(self) -> int:
        return len(self.sky)

    def __getitem__(self, index: int | slice | Tensor) -> "Scenes":
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"scene {index} asked for, but there are only {len(self)}")
            index = slice(index, index + 1 or None)
        return Scenes(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def sample_scenes(n: int, split: str = "train", seed: int = 0, things: int | None = None) -> Scenes:
    """Draw `n` scenes by lot.

    `split`: "train", "valid" or "novel" (each scene of `novel` has at least one of NOVEL_PAIRS, the others have none);
    `things`: 1 or 2 things in each scene, None for half and half. The same arguments give the same scenes, and the first scenes
    of a larger `n` are those of a smaller one. Splits never share a scene: `texture % 3` is the split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if things not in (None, 1, 2):
        raise ValueError(f"things must be 1, 2 or None for a mixture, not {things!r}")
    if n < 0:
        raise ValueError(f"n must be at least 0, not {n}")
    generator = torch.Generator().manual_seed(3 * seed + SPLITS.index(split))
    lots = iter(torch.rand(n, 24, generator=generator).T)  # 24 numbers in [0, 1) for each scene

    two = (next(lots) < 0.5) if things is None else torch.full((n,), things == 2)
    sky = _choose(next(lots), len(SKIES))
    ground = _choose(next(lots), len(GROUNDS))
    light = _choose_light(next(lots), sky)
    kind, colour = _choose_things(next(lots), next(lots), two & (next(lots) < 0.5), split)
    place = _choose_places(next(lots), two)
    horizon = _between(0.50, 0.62, next(lots))
    texture = 3 * _choose(next(lots), 1 << 22) + SPLITS.index(split)
    x, y, size = _arrange(kind, place, horizon, two, [next(lots) for _ in range(6)])
    light_x = _between(0.12, 0.88, next(lots))
    light_y = _hang_light(light_x, next(lots), kind, x, size)

    absent = torch.stack([torch.zeros_like(two), ~two], dim=1)  # (N, 2)
    kind, colour, place = (tensor.masked_fill(absent, -1) for tensor in (kind, colour, place))
    x, y, size = (tensor.masked_fill(absent, float("nan")) for tensor in (x, y, size))
    return Scenes(sky, ground, light, kind, colour, place, horizon, light_x, light_y, x, y, size, texture)


def boxes(scenes: Scenes) -> Tensor:
    """The boxes around the things: (N, 2, 4) of left, top, right, bottom in [0, 1]; NaN where there is no second thing."""
    kind = scenes.kind.clamp_min(0)
    half, height = HALF_WIDTHS[kind] * scenes.size, HEIGHTS[kind] * scenes.size
    return torch.stack([scenes.x - half, scenes.y - height, scenes.x + half, scenes.y], dim=-1)


def attributes(scenes: Scenes) -> dict[str, Tensor]:
    """What can be read off the pictures, as class indices.

    `sky`, `ground`, `light`: (N,). `kind`, `colour`: (N, 3), one for each of PLACES, -1 where that place is empty.
    """
    kind, colour = (torch.full((len(scenes), 4), -1) for _ in range(2))  # column 3 takes the things that are not there
    column = scenes.place.where(scenes.place >= 0, torch.tensor(3))
    kind.scatter_(1, column, scenes.kind)
    colour.scatter_(1, column, scenes.colour)
    return {"sky": scenes.sky, "ground": scenes.ground, "light": scenes.light, "kind": kind[:, :3], "colour": colour[:, :3]}


def _between(low: float | Tensor, high: float | Tensor, lot: Tensor) -> Tensor:
    return low + (high - low) * lot


def _choose(lot: Tensor, count: int) -> Tensor:
    """Numbers in [0, 1) to whole numbers 0 ... count - 1."""
    return (lot * count).long().clamp_max(count - 1)


def _choose_light(lot: Tensor, sky: Tensor) -> Tensor:
    """None, sun or moon; at night none or moon."""
    night = sky == SKIES.index("night")
    return torch.where(night, 2 * _choose(lot, 2), _choose(lot, 3))


def _choose_things(first: Tensor, second: Tensor, swap: Tensor, split: str) -> tuple[Tensor, Tensor]:
    """Kinds and colours, (N, 2) each, of two things that are not the same. In `novel` the first, or where `swap` the second, is of
    NOVEL_PAIRS and the other may be."""
    pairs = [(kind, colour) for kind in KINDS for colour in COLOURS]
    known = [i for i, pair in enumerate(pairs) if pair not in NOVEL_PAIRS]
    novel = [i for i, pair in enumerate(pairs) if pair in NOVEL_PAIRS]
    ranked = torch.tensor(novel + known if split == "novel" else known)
    a = _choose(first, len(novel) if split == "novel" else len(ranked))
    b = (a + 1 + _choose(second, len(ranked) - 1)) % len(ranked)  # anything but a
    pair = ranked[torch.where(swap[:, None], torch.stack([b, a], dim=1), torch.stack([a, b], dim=1))]  # (N, 2)
    return pair // len(COLOURS), pair % len(COLOURS)


def _choose_places(lot: Tensor, two: Tensor) -> Tensor:
    """(N, 2) places, the first left of the second."""
    one_place = _choose(lot, 3)
    two_places = torch.tensor([[0, 1], [0, 2], [1, 2]])[one_place]
    return torch.where(two[:, None], two_places, one_place[:, None])


def _arrange(kind: Tensor, place: Tensor, horizon: Tensor, two: Tensor, lots: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Where the things stand and how large they are: x, y, size, each (N, 2). They do not touch, and the sky above stays free."""
    lots = torch.stack(lots, dim=1)  # (N, 6)
    alone = ~two[:, None]
    size = torch.where(alone, _between(0.40, 0.50, lots[:, 0:2]), _between(0.32, 0.38, lots[:, 0:2]))
    size = torch.minimum(size, 0.23 / HALF_WIDTHS[kind])
    beside = torch.tensor([[0.185] * 3, [0.53, 0.50, 0.47], [0.815] * 3])  # [place, place of the other]: the middle makes room
    centre = torch.where(alone, torch.tensor([0.23, 0.5, 0.77])[place], beside[place, place.flip(1)])
    x = centre + torch.where(alone, 0.04, 0.025) * (2 * lots[:, 2:4] - 1)
    half = HALF_WIDTHS[kind] * size
    x = torch.maximum(torch.minimum(x, 0.985 - half), 0.015 + half)
    room = ((x[:, 1] - x[:, 0]) / (half[:, 0] + half[:, 1])).clamp_max(1.0)
    size = torch.where(alone, size, size * room[:, None])
    top = torch.maximum(horizon[:, None] + 0.14, 0.28 + HEIGHTS[kind] * size)
    lowest = torch.where(kind == KINDS.index("balloon"), 0.82, 0.93)  # balloons hover
    return x, _between(top, torch.maximum(top, lowest), lots[:, 4:6]), size


def _hang_light(light_x: Tensor, lot: Tensor, kind: Tensor, x: Tensor, size: Tensor) -> Tensor:
    """Height of the light: always above the things, and down to the hills where no thing is below it."""
    clear = ((x - light_x[:, None]).abs() > HALF_WIDTHS[kind] * size + 0.13).all(dim=1)
    return torch.where(clear, _between(0.14, 0.32, lot), _between(0.135, 0.165, lot))
