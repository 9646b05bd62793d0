"""Draw the README's prompts and pictures: python tools/prompts.py."""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from minisd.pipeline import StableDiffusion
from minisd.plots import to_uint8, use_style

PROMPTS = {  # and the seed of each
    "a red house on snow at night": 3,
    "a purple boat on the sea at sunset": 3,
    "a green cactus in the desert by day": 3,
    "a yellow balloon in a meadow in the sunshine": 3,
    "a white tent on the beach after dark, under the moon": 3,
    "a blue snowman in the snow by day": 3,
    "a red rocket left of a yellow tent, on sand at night": 3,
    "a blue tree right of a white house, on grass at sunset": 3,
    "on the left a green boat, on the right a red boat, on the sea by day": 3,
    "a yellow cactus on the right and a purple tent on the left, in the desert at dusk": 3,
    "a white rocket on grass in the moonlight": 3,
    "a green house on the beach in the evening": 3,
}

if __name__ == "__main__":
    use_style()
    target = Path(__file__).resolve().parent.parent / "assets" / "prompts.png"
    pipe = StableDiffusion.load("postcards")
    pictures = pipe.decode(pipe.sample(list(PROMPTS), seed=list(PROMPTS.values()), progress=False))
    figure, axes = plt.subplots(2, 6, figsize=(11, 4.5), dpi=100)
    for axis, picture, prompt in zip(axes.flat, to_uint8(pictures), PROMPTS):
        axis.imshow(picture.numpy(), interpolation="bicubic")
        axis.set_title(textwrap.fill(prompt, 26), fontsize=8.5, loc="left", style="italic")
        axis.axis("off")
    figure.savefig(target)
    print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB")
