"""The eight things of the postcards, each a short function of signed distances.

A signed distance is negative inside a shape, zero on its edge and positive outside. One formula then gives a smooth edge at any size:
a pixel is covered by half a pixel minus the distance, in pixels. Things are drawn in their own coordinates: u = 0 is the middle,
v = 0 the foot and v = 1 about the top; `minisd.scenes.HALF_WIDTHS` and `HEIGHTS` say how far each kind reaches.
"""

import torch
from torch import Tensor


def hex_colour(*codes: str) -> Tensor:
    """ "#RRGGBB" codes to colours in [-1, 1], shape (len(codes), 3, 1, 1)."""
    values = [[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in codes]
    return (torch.tensor(values, dtype=torch.float32) / 127.5 - 1)[:, :, None, None]


DARK, ROOF, BROWN, LIGHT_BROWN, CREAM, CARROT, PINK = hex_colour(
    "#43475C", "#6E5448", "#7A4E3A", "#B98A5E", "#FFF6E3", "#F28B3C", "#FF9FB6"
).split(1)


def circle(u: Tensor, v: Tensor, cu: float, cv: float, radius: float) -> Tensor:
    return torch.sqrt((u - cu).square() + (v - cv).square()) - radius


def ellipse(u: Tensor, v: Tensor, cu: float, cv: float, ru: float, rv: float) -> Tensor:
    """The first-order distance, good near the edge: (f - 1) f / |gradient of f²/2| with f = |(u / ru, v / rv)|."""
    u, v = (u - cu) / ru, (v - cv) / rv
    f = (u.square() + v.square()).sqrt_()
    return (f - 1) * f / ((u / ru).square() + (v / rv).square()).sqrt_().clamp_(min=1e-6)


def box(u: Tensor, v: Tensor, cu: float, cv: float, hu: float, hv: float) -> Tensor:
    """Centre and half sides."""
    return torch.maximum((u - cu).abs() - hu, (v - cv).abs() - hv)


def capsule(u: Tensor, v: Tensor, start: tuple[float, float], end: tuple[float, float], radius: float) -> Tensor:
    """A thick line with round ends."""
    du, dv = end[0] - start[0], end[1] - start[1]
    along = (((u - start[0]) * du + (v - start[1]) * dv) / (du * du + dv * dv)).clamp(0, 1)
    return torch.sqrt((u - start[0] - along * du).square() + (v - start[1] - along * dv).square()) - radius


def polygon(u: Tensor, v: Tensor, *corners: tuple[float, float]) -> Tensor:
    """A convex polygon, corners anticlockwise (v points up): the furthest of its half planes."""
    distance = None
    for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1]):
        du, dv = u1 - u0, v1 - v0
        length = (du * du + dv * dv) ** 0.5
        edge = (u - u0) * (dv / length) - (v - v0) * (du / length)
        distance = edge if distance is None else torch.maximum(distance, edge)
    return distance


def union(*distances: Tensor) -> Tensor:
    result = distances[0]
    for distance in distances[1:]:
        result = torch.minimum(result, distance)
    return result


class Pen:
    """Paints M things of one kind onto patches (M, 3, P, P) of their pictures, in place.

    `u` (M, 1, 1, P) and `v` (M, 1, P, 1): where each pixel is in the thing's own coordinates; `scale` (M, 1, 1, 1): pixels per unit.
    `base`, `dark`, `pale` (M, 3, 1, 1): the thing's colour in three tones; `window`: dark glass, or lamp light in the evening.
    `outline` (M, 1, 1, 1): how strongly the thing is outlined (white things are, so that they show on snow).
    `cover` (M, 1, P, P) collects how much of each pixel belongs to the thing.
    """

    def __init__(
        self, image: Tensor, u: Tensor, v: Tensor, scale: Tensor, tones: tuple[Tensor, Tensor, Tensor], window: Tensor, outline: Tensor
    ):
        self.image, self.u, self.v, self.scale = image, u, v, scale
        self.base, self.dark, self.pale = tones
        self.window, self.outline = window, outline
        self.cover = torch.zeros_like(image[:, :1])

    def mask(self, distance: Tensor) -> Tensor:
        return (0.5 - distance * self.scale).clamp_(0, 1)

    def body(self, distance: Tensor) -> Tensor:
        """Paint a part in the thing's own colour. Returns its mask."""
        self.image.lerp_(self.dark, self.mask(distance - 0.028).mul_(self.outline))
        return self.part(distance, self.base)

    def part(self, distance: Tensor, colour: Tensor) -> Tensor:
        """Paint a part of the thing where the distance is negative. Returns its mask."""
        mask = self.mask(distance)
        self.cover = torch.maximum(self.cover, mask)
        self.image.lerp_(colour, mask)
        return mask

    def detail(self, distance: Tensor, colour: Tensor, inside: Tensor, alpha: float = 1.0) -> None:
        """Paint over what lies `inside` the mask of an earlier part."""
        self.image.lerp_(colour, (inside * self.mask(distance)).mul_(alpha))


def house(pen: Pen) -> None:
    u, v = pen.u, pen.v
    pen.part(box(u, v, 0.25, 0.80, 0.055, 0.14), BROWN)
    pen.part(box(u, v, 0.25, 0.94, 0.075, 0.025), LIGHT_BROWN)
    wall = pen.body(box(u, v, 0.0, 0.31, 0.39, 0.31))
    pen.detail(0.19 - u, pen.dark, wall, 0.45)
    pen.detail(0.565 - v, pen.dark, wall, 0.6)
    for centre in (-0.235, 0.235):
        pane = pen.mask(box(u, v, centre, 0.36, 0.07, 0.08))
        pen.detail(box(u, v, centre, 0.36, 0.088, 0.098), CREAM, wall)
        pen.detail(box(u, v, centre, 0.36, 0.07, 0.08), pen.window, wall)
        pen.detail(torch.minimum((u - centre).abs(), (v - 0.36).abs()) - 0.009, CREAM, pane)
    door = pen.mask(union(box(u, v, 0.0, 0.12, 0.08, 0.16), circle(u, v, 0.0, 0.28, 0.08)))
    pen.detail(-v, BROWN, door)
    pen.detail(circle(u, v, 0.045, 0.16, 0.018), CREAM, door)
    roof = pen.part(polygon(u, v, (-0.46, 0.59), (0.46, 0.59), (0.0, 1.0)), ROOF)
    pen.detail(polygon(u, v, (0.0, 0.4), (0.7, 0.4), (0.0, 1.0)), DARK, roof, 0.45)
    pen.detail(circle(u, v, 0.0, 0.73, 0.07), CREAM, roof)
    pen.detail(circle(u, v, 0.0, 0.73, 0.048), pen.window, roof)


def tree(pen: Pen) -> None:
    u, v = pen.u, pen.v
    trunk = pen.part(polygon(u, v, (-0.09, 0.0), (0.09, 0.0), (0.05, 0.5), (-0.05, 0.5)), BROWN)
    pen.detail(-0.02 - u, DARK, trunk, 0.35)
    leaves = union(circle(u, v, -0.17, 0.55, 0.24), circle(u, v, 0.18, 0.54, 0.23), circle(u, v, 0.0, 0.77, 0.28))
    crown = pen.body(leaves)
    pen.detail(-circle(u, v, -0.10, 0.74, 0.38), pen.dark, crown, 0.6)
    pen.detail(circle(u, v, -0.10, 0.85, 0.115), pen.pale, crown, 0.7)
    pen.detail(circle(u, v, -0.24, 0.62, 0.075), pen.pale, crown, 0.6)


def boat(pen: Pen) -> None:
    u, v = pen.u, pen.v
    pen.part(box(u, v, 0.0, 0.62, 0.018, 0.42), BROWN)
    pen.part(polygon(u, v, (0.0, 1.04), (-0.20, 1.00), (0.0, 0.96)), CARROT)
    sail = pen.body(polygon(u, v, (0.045, 0.31), (0.45, 0.31), (0.045, 0.95)))
    pen.detail(box(u, v, 0.25, 0.445, 0.3, 0.03), pen.pale, sail)
    pen.part(polygon(u, v, (-0.38, 0.31), (-0.045, 0.31), (-0.045, 0.84)), CREAM)
    hull = pen.body(polygon(u, v, (-0.33, 0.0), (0.33, 0.0), (0.50, 0.26), (-0.50, 0.26)))
    pen.detail(v - 0.09, pen.dark, hull, 0.8)
    pen.detail(0.225 - v, pen.pale, hull, 0.9)
    for centre in (-0.2, 0.0, 0.2):
        pen.detail(circle(u, v, centre, 0.155, 0.032), CREAM, hull)


def rocket(pen: Pen) -> None:
    u, v = pen.u, pen.v
    pen.part(box(u, v, 0.0, 0.09, 0.10, 0.05), DARK)
    for side in (-1, 1):
        fin = [(side * 0.29, 0.0), (side * 0.24, 0.30), (side * 0.10, 0.48), (side * 0.10, 0.14)]
        pen.part(polygon(u, v, *(fin if side == 1 else fin[::-1])), DARK)
    sides = torch.maximum(circle(u, v, -0.50, 0.52, 0.70), circle(u, v, 0.50, 0.52, 0.70))
    hull = pen.body(torch.maximum(sides, 0.11 - v))
    pen.detail(-circle(u, v, -0.62, 0.52, 0.70), pen.dark, hull, 0.6)
    pen.detail(-circle(u, v, 0.56, 0.52, 0.70), pen.pale, hull, 0.6)
    pen.detail(0.83 - v, DARK, hull)
    pen.detail((v - 0.22).abs() - 0.022, pen.dark, hull)
    pen.detail(circle(u, v, 0.0, 0.60, 0.105), CREAM, hull)
    pen.detail(circle(u, v, 0.0, 0.60, 0.07), pen.window, hull)


def cactus(pen: Pen) -> None:
    u, v = pen.u, pen.v
    trunk = torch.maximum(capsule(u, v, (0.0, 0.0), (0.0, 0.87), 0.145), -v)
    left = union(capsule(u, v, (0.0, 0.34), (-0.285, 0.34), 0.09), capsule(u, v, (-0.285, 0.34), (-0.285, 0.60), 0.09))
    right = union(capsule(u, v, (0.0, 0.46), (0.285, 0.46), 0.09), capsule(u, v, (0.285, 0.46), (0.285, 0.74), 0.09))
    body = pen.body(union(trunk, left, right))
    pen.detail(capsule(u, v, (0.10, 0.0), (0.10, 0.9), 0.045), pen.dark, body, 0.6)
    for start, end in (
        ((-0.065, 0.06), (-0.065, 0.88)),
        ((0.025, 0.06), (0.025, 0.92)),
        ((-0.30, 0.40), (-0.30, 0.60)),
        ((0.27, 0.54), (0.27, 0.74)),
    ):
        pen.detail(capsule(u, v, start, end, 0.012), pen.pale, body, 0.8)
    pen.part(union(circle(u, v, -0.055, 1.0, 0.05), circle(u, v, 0.055, 1.0, 0.05), circle(u, v, 0.0, 1.02, 0.05)), PINK)


def tent(pen: Pen) -> None:
    u, v = pen.u, pen.v
    for side in (-1, 1):
        pen.part(capsule(u, v, (0.0, 0.80), (side * 0.05, 0.91), 0.016), BROWN)
    cloth = pen.body(polygon(u, v, (-0.54, 0.0), (0.54, 0.0), (0.0, 0.86)))
    pen.detail(polygon(u, v, (0.20, 0.0), (0.60, 0.0), (0.0, 0.90)), pen.dark, cloth, 0.7)
    pen.detail((v - 0.10).abs() - 0.025, pen.pale, cloth, 0.8)
    pen.detail(polygon(u, v, (-0.19, 0.0), (0.17, 0.0), (0.0, 0.60)), pen.window, cloth)
    pen.detail(polygon(u, v, (-0.19, 0.0), (-0.09, 0.0), (0.0, 0.60)), pen.pale, cloth)
    pen.detail(polygon(u, v, (0.09, 0.0), (0.17, 0.0), (0.0, 0.60)), pen.base, cloth)


def balloon(pen: Pen) -> None:
    u, v = pen.u, pen.v
    for side in (-1, 1):
        pen.part(capsule(u, v, (side * 0.085, 0.15), (side * 0.15, 0.42), 0.012), BROWN)
    basket = pen.part(box(u, v, 0.0, 0.09, 0.105, 0.09), LIGHT_BROWN)
    pen.detail(0.145 - v, BROWN, basket)
    pen.detail((v - 0.07).abs() - 0.012, BROWN, basket, 0.5)
    skin = union(circle(u, v, 0.0, 0.74, 0.38), polygon(u, v, (-0.11, 0.27), (0.11, 0.27), (0.315, 0.53), (-0.315, 0.53)))
    envelope = pen.body(skin)
    pen.detail(torch.maximum(ellipse(u, v, 0.0, 0.72, 0.27, 0.56), -ellipse(u, v, 0.0, 0.72, 0.13, 0.54)), pen.pale, envelope, 0.55)
    pen.detail((v - 0.50 + 0.25 * u * u).abs() - 0.03, CREAM, envelope)
    pen.detail(-circle(u, v, -0.13, 0.78, 0.42), pen.dark, envelope, 0.5)


def snowman(pen: Pen) -> None:
    u, v = pen.u, pen.v
    for side in (-1, 1):
        pen.part(capsule(u, v, (side * 0.17, 0.47), (side * 0.355, 0.61), 0.018), BROWN)
        pen.part(capsule(u, v, (side * 0.28, 0.553), (side * 0.35, 0.53), 0.014), BROWN)
    belly = pen.body(torch.maximum(circle(u, v, 0.0, 0.24, 0.29), -v))
    pen.detail(-circle(u, v, -0.08, 0.30, 0.31), pen.dark, belly, 0.6)
    pen.detail(circle(u, v, -0.14, 0.32, 0.055), pen.pale, belly, 0.7)
    chest = pen.body(circle(u, v, 0.0, 0.55, 0.20))
    pen.detail(-circle(u, v, -0.06, 0.58, 0.22), pen.dark, chest, 0.6)
    head = pen.body(circle(u, v, 0.0, 0.78, 0.155))
    pen.detail(-circle(u, v, -0.05, 0.81, 0.175), pen.dark, head, 0.6)
    for height in (0.29, 0.42):
        pen.detail(circle(u, v, 0.0, height, 0.03), DARK, belly)
    for side in (-0.06, 0.06):
        pen.detail(circle(u, v, side, 0.81, 0.024), DARK, head)
    pen.part(polygon(u, v, (0.0, 0.73), (0.19, 0.75), (0.0, 0.79)), CARROT)
    scarf = union(capsule(u, v, (-0.14, 0.655), (0.14, 0.655), 0.036), capsule(u, v, (0.11, 0.65), (0.15, 0.50), 0.036))
    pen.part(scarf, DARK)
    pen.part(capsule(u, v, (-0.18, 0.895), (0.18, 0.895), 0.024), DARK)
    hat = pen.part(box(u, v, 0.0, 0.975, 0.12, 0.085), DARK)
    pen.detail((v - 0.935).abs() - 0.018, CREAM, hat)


THINGS = (house, tree, boat, rocket, cactus, tent, balloon, snowman)  # in the order of minisd.scenes.KINDS
