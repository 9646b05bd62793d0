"""The landscape behind the things of a postcard: sky, stars, sun or moon, clouds, hills, ground.

Every layer is a formula in x and y, the place of a pixel's centre in [0, 1]: x has shape (1, 1, 1, S), y (1, 1, S, 1), pictures are
(N, 3, S, S), so that what depends on the row or the column alone is cheap. A layer is painted with `lerp_`: colour over picture, in place,
as much as its mask says. Masks are (N, 1, S, S) in [0, 1]: 0.5 + distance inside the edge in pixels, cut off at 0 and 1.
Nothing is drawn by lot here: what looks random comes from the scene's own `texture` number.
"""

import math

import torch
from torch import Tensor

from minisd.scenes import GROUNDS, LIGHTS, SKIES, Scenes
from minisd.shapes import hex_colour

SUN_RADIUS, MOON_RADIUS = 0.082, 0.092

# Colours by sky: day, sunset, night.
SKY_TOP = hex_colour("#5AAAE2", "#654A9E", "#0C153A")
SKY_MIDDLE = hex_colour("#A2D6F1", "#EA7591", "#202A66")
SKY_LOW = hex_colour("#FDF2DA", "#FDBC70", "#4A4A98")
CLOUD = hex_colour("#FFFFFF", "#FFCDB4", "#2C3674")
CLOUD_SHADE = hex_colour("#D3E7F5", "#E99AA0", "#242D66")
STAR = hex_colour("#FFF6D8")
SUN = hex_colour("#FFD23F", "#FFEFA8", "#FFEFA8")
SUN_GLOW = hex_colour("#FFF3B8", "#FFD488", "#FFD488")
MOON = hex_colour("#FFFEF4", "#FFF8E0", "#FFF0BC")
MOON_GLOW = hex_colour("#EAF7FF", "#F9BDB8", "#6F78BE")

# Colours by ground (a line each), then sky.
FAR = hex_colour(
    *("#BEE08C", "#D3BF70", "#44876C"),
    *("#FAE6BA", "#F8CF9E", "#B7A199"),
    *("#F7FBFF", "#FDEBEA", "#BCCDED"),
    *("#6CC3D8", "#DB8B8F", "#30659A"),
)
NEAR = hex_colour(
    *("#76B65E", "#929E55", "#255C50"),
    *("#ECCB92", "#E3A97E", "#8C7779"),
    *("#DDEBF7", "#EBCFDF", "#95ACDA"),
    *("#217EA8", "#6A5293", "#163463"),
)
ACCENT = hex_colour(
    *("#559C52", "#727F44", "#1C4B44"),
    *("#D3A96E", "#C5866A", "#6E5C66"),
    *("#B4CFE8", "#D5AECB", "#7A93C6"),
    *("#D8F3F4", "#FFDDB4", "#8DB1DA"),
)
HILL = hex_colour(
    *("#86C3A6", "#AC7890", "#2A4D70"),
    *("#E3B98C", "#C98A86", "#665A82"),
    *("#A9C4E0", "#BE97BF", "#566DA8"),
    *("#8FC0D2", "#A56A90", "#263F70"),
)
FAR_HILL = hex_colour(
    *("#B3DCD0", "#CF8C9A", "#33447A"),
    *("#F0D3AC", "#E09C8E", "#56508A"),
    *("#CBDFF0", "#D9A9C2", "#4A5AA0"),
    *("#B9DCE6", "#CC8096", "#323E80"),
)
SNOW_CAP = hex_colour("#FFFFFF", "#FFEFEA", "#B4C6EC")


def numbers(texture: Tensor, count: int, stream: int) -> Tensor:
    """(N,) seeds to (N, count) numbers in [0, 1) that look random; another `stream` gives other numbers. (An integer hash.)"""
    z = texture[:, None] * 7919 + torch.arange(count) * 104729 + stream * 1299709
    for factor in (0x45D9F3B, 0x119DE1F3):
        z = z & 0xFFFFFFFF
        z = (z ^ (z >> 16)) * factor
    z = z & 0xFFFFFFFF
    return ((z ^ (z >> 15)) & 0xFFFFFF).float() / (1 << 24)


def column(values: Tensor) -> Tensor:
    """(N,) to (N, 1, 1, 1), to be combined with pictures."""
    return values.view(-1, 1, 1, 1)


def coordinates(size: int) -> tuple[Tensor, Tensor]:
    """x (1, 1, 1, S) and y (1, 1, S, 1) of the centres of the pixels."""
    centres = (torch.arange(size) + 0.5) / size
    return centres.view(1, 1, 1, size), centres.view(1, 1, size, 1)


def paint_sky(scenes: Scenes, image: Tensor) -> None:
    """Paint all of (N, 3, S, S) as sky, with stars at night."""
    x, y = coordinates(image.shape[-1])
    depth = (y / column(scenes.horizon)).clamp(0, 1)  # (N, 1, S, 1): 0 at the top, 1 at the horizon
    upper = torch.lerp(SKY_TOP[scenes.sky], SKY_MIDDLE[scenes.sky], (depth / 0.6).clamp(0, 1))
    image.copy_(torch.lerp(upper, SKY_LOW[scenes.sky], ((depth - 0.5) / 0.5).clamp(0, 1)))
    rows = (scenes.sky == SKIES.index("night")).nonzero()[:, 0]
    if len(rows):
        _paint_stars(scenes[rows], image, rows, x, y)


def paint_light(scenes: Scenes, image: Tensor) -> tuple[Tensor, Tensor]:
    """Paint sun and moon. Returns the rows of the pictures that have one (n,) and where it is, a mask (n, h, S) of their upper h rows."""
    rows = (scenes.light > 0).nonzero()[:, 0]
    scenes, size = scenes[rows], image.shape[-1]
    height = math.ceil(0.62 * size)
    x, y = coordinates(size)
    dx, dy = x - column(scenes.light_x), y[:, :, :height] - column(scenes.light_y)
    distance = (dx.square() + dy.square()).sqrt_()  # (n, 1, h, S)
    moon = column(scenes.light == LIGHTS.index("moon"))
    bite = ((dx - 0.046).square() + (dy + 0.022).square()).sqrt_() - 0.078  # what is cut out of the moon
    disc = torch.where(moon, torch.maximum(distance - MOON_RADIUS, -bite), distance - SUN_RADIUS)
    mask = (0.5 - disc * size).clamp_(0, 1)
    glow, colour = torch.where(moon, MOON_GLOW[scenes.sky], SUN_GLOW[scenes.sky]), torch.where(moon, MOON[scenes.sky], SUN[scenes.sky])
    sky = image[rows, :, :height]
    sky.lerp_(glow, (1 - distance / torch.where(moon, 0.22, 0.34)).clamp_(min=0).square_() * 0.85)
    sky.lerp_(glow, (0.5 - (distance - torch.where(moon, 0.0, 0.115)) * size).clamp_(0, 1) * 0.5)  # a ring around the sun
    image[rows, :, :height] = sky.lerp_(colour, mask)
    return rows, mask[:, 0]


def paint_clouds(scenes: Scenes, image: Tensor) -> None:
    """A large and a small cloud with flat bottoms, on the other side of the picture than the light."""
    size = image.shape[-1]
    height = math.ceil(0.40 * size)
    x, y = coordinates(size)
    sky, y = image[:, :, :height], y[:, :, :height]
    lots = numbers(scenes.texture, 6, 2)
    away = torch.where(scenes.light_x < 0.5, 1.0, -1.0)
    free = 0.1 + 0.8 * lots[:, 0]
    large = torch.where(scenes.light > 0, scenes.light_x + away * (0.36 + 0.14 * lots[:, 0]), free)
    small = torch.where(scenes.light > 0, large + away * (0.27 + 0.1 * lots[:, 1]), free + torch.where(free < 0.5, 0.4, -0.4))
    upper = lots[:, 2] < 0.5  # which of the two is higher
    spots = [(large, torch.where(upper, 0.10, 0.21), 0.046, lots[:, 3]), (small, torch.where(upper, 0.24, 0.09), 0.03, lots[:, 4])]
    for centre, level, radius, lot in spots:
        dx, dy = (x - column(centre)) / radius, (y - column(level + 0.03 * lot)) / radius
        cloud = None
        for offset, lift, scale in ((-1.7, 0.05, 0.7), (-0.45, -0.45, 1.1), (0.75, -0.2, 0.85), (1.75, 0.1, 0.6)):
            puff = ((dx - offset).square() + (dy - lift).square()).sqrt_() - scale
            cloud = puff if cloud is None else torch.minimum(cloud, puff)
        cloud = torch.maximum(cloud, dy - 0.4)
        mask = (0.5 - cloud * (radius * size)).clamp_(0, 1)
        shade = ((dy + 0.6) / 1.2).clamp(0, 1)  # (N, 1, h, 1)
        sky.lerp_(torch.lerp(CLOUD[scenes.sky], CLOUD_SHADE[scenes.sky], shade), mask * 0.92)


def paint_ground(scenes: Scenes, image: Tensor) -> Tensor:
    """Paint hills and ground. Returns their mask (N, S, S)."""
    size = image.shape[-1]
    top = int(0.36 * size)
    x, y = coordinates(size)
    land, y = image[:, :, top:], y[:, :, top:]
    palette = scenes.ground * len(SKIES) + scenes.sky
    lots = numbers(scenes.texture, 14, 3)
    horizon = column(scenes.horizon)
    everything = torch.zeros(len(scenes), size, size)
    ridges = ((_far_ridge(scenes, x, lots), FAR_HILL), (_ridge(scenes, x, lots), HILL))
    for ridge, colours in ridges:
        mask = (0.5 + (y - ridge) * size).clamp_(0, 1)
        land.lerp_(colours[palette], mask)
        everything[:, top:] = torch.maximum(everything[:, top:], mask[:, 0])
    sea = column(scenes.ground == GROUNDS.index("sea"))
    edge = horizon + torch.where(sea, 0.0, 0.012) * _wave(x, lots[:, 2:], 0.8)
    mask = (0.5 + (y - edge) * size).clamp_(0, 1)
    depth = ((y - horizon) / (1 - horizon)).clamp(0, 1)
    land.lerp_(torch.lerp(FAR[palette], NEAR[palette], depth), mask)
    for ground, paint in enumerate((_paint_meadow, _paint_sand, _paint_snow, _paint_sea)):
        rows = (scenes.ground == ground).nonzero()[:, 0]
        if len(rows):
            part = land[rows]
            paint(scenes[rows], part, ACCENT[palette[rows]], lots[rows], x, y)
            land[rows] = part
    everything[:, top:] = torch.maximum(everything[:, top:], mask[:, 0])
    return everything


def _wave(x: Tensor, lots: Tensor, frequency: float) -> Tensor:
    """A smooth line between about -1 and 1: (N, 1, 1, S)."""
    first = torch.sin(2 * math.pi * (frequency * x + column(lots[:, 0])))
    return 0.65 * first + 0.35 * torch.sin(2 * math.pi * (2.1 * frequency * x + column(lots[:, 1])))


def _peaks(x: Tensor, lots: Tensor, frequency: float) -> Tensor:
    """A line of pointed mountains between about -1 and 1."""
    first = ((frequency * x + column(lots[:, 0])) % 1 - 0.5).abs()
    second = ((2.3 * frequency * x + column(lots[:, 1])) % 1 - 0.5).abs()
    return 1 - 2.6 * torch.minimum(first * 1.6, second + 0.15)


def _ridge(scenes: Scenes, x: Tensor, lots: Tensor) -> Tensor:
    """Height of the hills: round in the meadow, pointed in the snow, flat-topped in the desert, low islands in the sea. (N, 1, 1, S)"""
    wave = _wave(x, lots, 1.1)
    lines = (
        0.030 + 0.030 * wave,
        0.030 + 0.032 * (2.6 * wave).clamp(-0.8, 1.0),
        0.040 + 0.048 * _peaks(x, lots, 1.5),
        -0.008 + 0.032 * wave,
    )
    return column(scenes.horizon) - _by_ground(scenes, lines)


def _far_ridge(scenes: Scenes, x: Tensor, lots: Tensor) -> Tensor:
    lots = lots[:, 10:]
    wave = _wave(x, lots, 0.9)
    lines = (0.055 + 0.025 * wave, 0.045 + 0.028 * (2.6 * wave).clamp(-0.8, 1.0), 0.065 + 0.045 * _peaks(x, lots, 1.9), 0.030 * wave)
    return column(scenes.horizon) - _by_ground(scenes, lines)


def _by_ground(scenes: Scenes, lines: tuple[Tensor, ...]) -> Tensor:
    """Of one line for each ground, the one of each scene's ground."""
    return torch.stack(lines)[scenes.ground, torch.arange(len(scenes))]


def _cells(texture: Tensor, stream: int, across: int, down: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divide the picture into cells with one spot each. Returns for each pixel x and y from its cell's spot, and a number that
    belongs to the cell; each (N, 1, h, S)."""
    lots = numbers(texture, 3 * across * down, stream).view(-1, 3, down, across)
    lots[:, 0] = (lots[:, 0] * 0.6 + 0.2 + torch.arange(across)) / across
    lots[:, 1] = (lots[:, 1] * 0.6 + 0.2 + torch.arange(down)[:, None]) / down
    lots = lots[:, :, (y.flatten() * down).long()][:, :, :, (x.flatten() * across).long()]  # (N, 3, h, S)
    return x - lots[:, 0:1], y - lots[:, 1:2], lots[:, 2:3]


def _paint_stars(scenes: Scenes, image: Tensor, rows: Tensor, x: Tensor, y: Tensor) -> None:
    size = image.shape[-1]
    y = y[:, :, : math.ceil(0.6 * size)]
    dx, dy, lot = _cells(scenes.texture, 1, 9, 10, x, y)
    radius = 0.003 + 0.007 * lot * lot
    distance = (dx.square() + dy.square()).sqrt_()
    mask = (0.5 + (radius - distance) * size).clamp_(0, 1) * (radius * size * 2).clamp_max(1)
    free = ((x - column(scenes.light_x)).square() + (y - column(scenes.light_y)).square()).sqrt_() > 0.12  # none before the moon
    part = image[rows, :, : y.shape[2]]
    image[rows, :, : y.shape[2]] = part.lerp_(STAR, mask * (free & (lot > 0.25)))


def _paint_meadow(scenes: Scenes, land: Tensor, accent: Tensor, lots: Tensor, x: Tensor, y: Tensor) -> None:
    """A rolling second tone, tufts of grass and a few flowers."""
    size = land.shape[-1]
    for offset, alpha in ((0.09, 0.22), (0.25, 0.28)):
        edge = column(scenes.horizon) + offset + 0.035 * _wave(x, lots[:, 4 if offset < 0.2 else 6 :], 0.7)
        land.lerp_(accent, (0.5 + (y - edge) * size).clamp_(0, 1) * alpha)
    dx, dy, lot = _cells(scenes.texture, 4, 9, 13, x, y)
    below = (y - dy > column(scenes.horizon) + 0.05).float()
    reach = 0.014 + 0.014 * lot  # how wide and how high a tuft is
    blades = (1.5 * math.pi / reach * dx).cos_().abs_() * (1 - (dx.abs() / reach).clamp_max(1))
    tuft = torch.minimum(1.7 * reach * blades + dy, 0.002 - dy) - 0.0015
    land.lerp_(accent, (0.5 + tuft * size).clamp_(0, 1) * below * (lot > 0.3) * 0.85)
    flower = 0.007 - (dx.square() + dy.square()).sqrt_()
    land.lerp_(STAR, (0.5 + flower * size).clamp_(0, 1) * below * (lot < 0.1) * 0.8)


def _paint_sand(scenes: Scenes, land: Tensor, accent: Tensor, lots: Tensor, x: Tensor, y: Tensor) -> None:
    """Dunes, in shade below their crests, with ripples."""
    size = land.shape[-1]
    _paint_crests(scenes, land, accent, lots, x, y, 0.045, 0.6)
    dx, dy, lot = _cells(scenes.texture, 6, 4, 20, x, y)
    bend = dx / (0.04 + 0.06 * lot)
    ripple = 0.0045 * (1 - bend.square()) - (dy + 0.006 * bend.square()).abs()
    below = y - dy > column(scenes.horizon) + 0.04
    land.lerp_(accent, (0.5 + ripple * size).clamp_(0, 1) * (below & (lot > 0.4)) * 0.7)


def _paint_snow(scenes: Scenes, land: Tensor, accent: Tensor, lots: Tensor, x: Tensor, y: Tensor) -> None:
    """Snow on the mountains, drifts with blue shade."""
    size = land.shape[-1]
    ridge, horizon = _ridge(scenes, x, lots), column(scenes.horizon)
    line = horizon - 0.05 + 0.008 * (((x * 11) % 1 - 0.5).abs() * 4 - 1)
    cap = torch.minimum(y - ridge, line - y)
    land.lerp_(SNOW_CAP[scenes.sky], (0.5 + cap * size).clamp_(0, 1))
    _paint_crests(scenes, land, accent, lots, x, y, 0.035, 0.75)


def _paint_crests(scenes: Scenes, land: Tensor, accent: Tensor, lots: Tensor, x: Tensor, y: Tensor, rise: float, alpha: float) -> None:
    for i, offset in enumerate((0.09, 0.25)):
        below = y - column(scenes.horizon) - offset - rise * _wave(x, lots[:, 4 + 2 * i :], 0.7)
        shade = (1 - below / 0.15).clamp_(0, 1) * (0.5 + below * land.shape[-1]).clamp_(0, 1)
        land.lerp_(accent, shade * alpha)


def _paint_sea(scenes: Scenes, land: Tensor, accent: Tensor, lots: Tensor, x: Tensor, y: Tensor) -> None:
    """Lines of waves, and the glitter of the light on the water."""
    size = land.shape[-1]
    depth = y - column(scenes.horizon)  # (n, 1, h, 1)
    dx, dy, lot = _cells(scenes.texture, 5, 6, 22, x, y)
    on_water = (depth - dy > 0.02).float()
    glitter = (1 - (x - column(scenes.light_x)).abs() / (0.06 + 0.25 * depth)).clamp_(0, 1) * column(scenes.light > 0)
    land.lerp_(accent, glitter * (depth > 0).float() * 0.30)
    crest = (0.004 + 0.012 * depth) * (1 - (dx / (0.025 + 0.05 * lot)).square()) - dy.abs()
    land.lerp_(accent, (0.5 + crest * size).clamp_(0, 1) * on_water * (0.45 + 0.5 * glitter) * ((lot > 0.25) | (glitter > 0.2)))
