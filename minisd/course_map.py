"""The map of the course: the parts of a text-to-image model, the lesson that builds each, and the way of a prompt through them."""

import io

import PIL.Image
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from minisd.drawing import render
from minisd.plots import PALETTE, to_uint8
from minisd.postcards import COLOURS, GROUNDS, KINDS, LIGHTS, SKIES, Scenes, sample_scenes

PARTS = {"I  Pixels": "#0072B2", "II  Conditioning": "#00805E", "III  Latents": "#A8487F", "IV  The real one": "#8A6A00"}
PIXELS, CONDITIONING, LATENTS, REAL = PARTS.values()
PROMPT, GREY = PALETTE[1], "#6B7280"

# left, bottom, width, height on a sheet of 100 x 56; what it is; its lessons; the colour of its part
BOXES = [
    (26, 44, 14, 8, "tokenizer", "words to numbers", ("06",), CONDITIONING),
    (51, 44, 15, 8, "text encoder", "numbers to meaning", ("07",), CONDITIONING),
    (24, 23, 12.5, 9.5, "sampler", "takes away a little\nof the noise", ("03", "04"), PIXELS),
    (50, 21.5, 17, 14, "UNet", "what of this is noise?", ("02",), PIXELS),
    (53, 23.3, 11, 4.2, "attention", "", ("08",), CONDITIONING),
    (39.3, 22.9, 8, 4.2, "guidance", "", ("05",), CONDITIONING),
    (76.5, 23, 9.5, 9.5, "decoder", "latent to\npicture", ("09",), LATENTS),
    (24, 3, 14, 7.5, "encoder", "picture to latent", ("09",), LATENTS),
    (51.5, 3, 14, 7.5, "noise schedule", "adds known noise", ("01",), PIXELS),
    (70, 1.5, 29.5, 10.5, "", "", (), REAL),
]


def find_scene(kind: str, colour: str, sky: str, ground: str, light: str) -> Scenes:
    """The first scene with one thing that fits a description."""
    scenes = sample_scenes(6000, things=1)
    fits = (scenes.kind[:, 0] == KINDS.index(kind)) & (scenes.colour[:, 0] == COLOURS.index(colour))
    fits &= (scenes.sky == SKIES.index(sky)) & (scenes.ground == GROUNDS.index(ground)) & (scenes.light == LIGHTS.index(light))
    return scenes[fits.nonzero()[:1, 0]]


def picture(axis: Axes, image: torch.Tensor, left: float, bottom: float, side: float, smooth: bool = True) -> None:
    """Put one picture (3, H, W) in [-1, 1] on the sheet."""
    extent = (left, left + side, bottom, bottom + side)
    axis.imshow(to_uint8(image[None])[0].numpy(), extent=extent, interpolation="antialiased" if smooth else "nearest", zorder=3)


def arrow(axis: Axes, start: tuple, end: tuple, colour: str = GREY, width: float = 1.6, style: str = "-") -> None:
    """An arrow; `style` is "-" or "--"."""
    options = {"arrowstyle": "-|>", "mutation_scale": 8 + 3 * width, "lw": width, "color": colour, "linestyle": style}
    axis.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, zorder=4, **options))


def badge(axis: Axes, x: float, y: float, lesson: str, colour: str) -> None:
    """The number of a lesson on a coloured disc."""
    disc = {"boxstyle": "circle,pad=0.28", "fc": colour, "ec": "white"}
    axis.text(x, y, lesson, size=8, weight="bold", color="white", ha="center", va="center", zorder=6, bbox=disc)


def draw_map(here: str | None = None) -> PIL.Image.Image:
    """The map. `here`: the number of a lesson, such as "02", whose boxes are filled. In 256 colours, so that a notebook stays small."""
    figure = Figure(figsize=(10, 5.8), dpi=100, layout="none")
    axis = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axis.set(xlim=(0, 100), ylim=(0, 57.5), aspect="equal")
    axis.axis("off")

    frames = {"boxstyle": "round,pad=0,rounding_size=1.2", "lw": 1.6}
    axis.add_patch(FancyBboxPatch((21.5, 17.2), 48.5, 21.3, fc="#F3F4F6", ec="#D1D5DB", zorder=0, **frames))
    axis.text(23, 36.6, "again and again, about 25 times", size=8.5, style="italic", color=GREY, va="center")
    for left, bottom, width, height, name, about, lessons, colour in BOXES:
        filled = here in lessons
        axis.add_patch(FancyBboxPatch((left, bottom), width, height, fc=colour if filled else "white", ec=colour, zorder=2, **frames))
        ink, middle = "white" if filled else "#111827", left + width / 2
        centre = bottom + height / 2 + 2.4 * (name == "UNet")  # below it stands the attention
        lines = about.count("\n") + bool(about)
        size = {"UNet": 12}.get(name, 10 if about else 8)
        axis.text(middle, centre + 1.1 * lines, name, size=size, weight="bold", color=ink, ha="center", va="center", zorder=5)
        axis.text(middle, centre - 2.1 + 0.4 * lines, about, size=8, color=ink, ha="center", va="center", zorder=5)
        for i, lesson in enumerate(reversed(lessons)):
            badge(axis, left + width - 0.4 - 3.4 * i, bottom + height, lesson, colour)

    # the way of a prompt
    goal = render(find_scene("house", "red", "night", "snow", "moon"), 128)[0]
    noise = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-2, 2) / 2
    axis.add_patch(FancyBboxPatch((3, 44.5), 16.5, 7, fc="#FFF3EA", ec=PROMPT, zorder=2, **frames))
    axis.text(11.25, 48, "“a red house on\nsnow at night”", size=9.5, style="italic", ha="center", va="center", zorder=3)
    arrow(axis, (19.5, 48), (26, 48), PROMPT, 3)
    arrow(axis, (40, 48), (51, 48), PROMPT, 3)
    arrow(axis, (58.5, 44), (58.5, 35.5), PROMPT, 3)
    axis.text(59.7, 41, "what the sentence asks for", size=8.5, color=PROMPT, va="center")
    arrow(axis, (70, 27.75), (76.5, 27.75), PROMPT, 3)
    arrow(axis, (86, 27.75), (88.9, 27.75), PROMPT, 3)
    picture(axis, goal, 89, 22.5, 10.5)
    axis.text(94.25, 34.3, "picture", size=9, color="#111827", ha="center", va="center")

    # the loop
    picture(axis, noise, 6, 23.5, 8.5, smooth=False)
    axis.text(10.25, 33.2, "noise, from a seed", size=9, color="#111827", ha="center", va="center")
    arrow(axis, (14.5, 27.75), (24, 27.75), GREY, 2)
    arrow(axis, (36.5, 30.6), (50, 30.6), GREY, 2)
    axis.text(43.6, 31.4, "latent, timestep", size=8, color=GREY, ha="center")
    arrow(axis, (50, 25), (47.3, 25), GREY, 2)
    arrow(axis, (39.3, 25), (36.5, 25), GREY, 2)
    small = torch.nn.functional.avg_pool2d(goal, 4)  # (3, 32, 32)
    speckle = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1))
    for i, share in enumerate((0.0, 0.25, 0.5, 0.75, 0.9, 1.0)):
        picture(axis, share * small + (1 - share**2) ** 0.5 * speckle / 2, 24 + 3.4 * i, 18, 3.0, smooth=False)

    # training
    axis.text(23, 13.6, "how it learns", size=8.5, style="italic", color=GREY, va="center")
    for i, image in enumerate(render(sample_scenes(4, seed=5), 64)):
        picture(axis, image, 5.5 + 5 * (i % 2), 1.6 + 5 * (1 - i // 2), 4.7)
    badge(axis, 15.2, 11.2, "00", PIXELS)
    arrow(axis, (15.6, 6.75), (24, 6.75), GREY, 1.6, style="--")
    axis.text(19.6, 7.8, "pictures", size=8.5, color=GREY, ha="center")
    arrow(axis, (38, 6.75), (51.5, 6.75), GREY, 1.6, style="--")
    arrow(axis, (58.5, 10.5), (58.5, 21.5), GREY, 1.6, style="--")
    axis.text(60.6, 14, "training", size=8.5, color=GREY, va="center")
    badge(axis, 58.5, 14, "03", PIXELS)
    axis.plot((5.5, 3.4, 3.4), (6.75, 6.75, 20), color=GREY, lw=1.6, ls="--")
    arrow(axis, (3.4, 20), (3.4, 44.4), GREY, 1.6, style="--")
    axis.text(1.9, 26, "captions", size=8.5, color=GREY, rotation=90, va="center", ha="center")

    for y, lesson, colour, text in (
        (9.7, "10", LATENTS, "all of it together"),
        (6.75, "11", LATENTS, "more to do with it: edit, fill in, enlarge"),
        (3.8, "12", REAL, "the same code with the published weights"),
    ):
        badge(axis, 72, y, lesson, colour)
        axis.text(74, y, text, size=8.2, color="#111827", va="center")

    for i, (name, colour) in enumerate(PARTS.items()):
        axis.text(82, 53.5 - 2.7 * i, f"■  part {name}", size=8.5, color=colour, weight="bold", va="center")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return PIL.Image.open(file).convert("RGB").quantize(256, kmeans=6)
