"""The part of the verb `generate` that begins with a picture: `--image in.png --strength 0.6`, and `--mask mask.png`."""

import argparse
from pathlib import Path
from typing import Any


def share(text: str) -> float:
    """A type for argparse: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def add_picture_flags(generate: argparse.ArgumentParser) -> None:
    """The flags of this module."""
    image = "latent models: a picture to begin with, drawn anew as the prompt says; for a model that enlarges, the small picture"
    generate.add_argument("--image", type=Path, help=image)
    what = "with --image: how much of the way is walked anew, from 0 (nothing) to 1 (default: 0.6; with --mask: 1)"
    generate.add_argument("--strength", type=share, help=what)
    mask = "with --image: a black and white picture of the same size; only what is white is painted, the rest keeps every bit"
    generate.add_argument("--mask", type=Path, help=mask)


def check_picture_flags(options: argparse.Namespace, latent: bool) -> None:
    """Raise `ValueError` where these flags do not go with the model or with one another."""
    given = [flag for flag in ("image", "strength", "mask") if getattr(options, flag) is not None]
    if given and not latent:
        raise ValueError(f"--{given[0]} belongs to latent models; {options.model} draws in pixels.")
    if given and options.image is None:
        raise ValueError(f"--{given[0]} needs a picture: --image FILE.")
    if options.image is not None and options.size is not None:
        raise ValueError("--size does not go with --image: the picture has a size already.")


def open_picture(path: Path) -> Any:
    """The picture in a file. Raises `FileNotFoundError` or `ValueError` in one sentence where there is none."""
    import PIL.Image

    try:
        with PIL.Image.open(path) as picture:
            picture.load()
            return picture
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no picture {str(path)!r}.") from None
    except (PIL.UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{str(path)!r} is no picture that can be opened ({type(error).__name__}).") from error


def draw_from_picture(pipe: Any, options: argparse.Namespace, **asked: Any) -> Any:
    """Pictures (n, 3, H, W): --image drawn anew, with --mask painted into, or enlarged, if that is what the model has learned.

    `asked`: steps, guidance, sampler, negative as given. Raises `ValueError` where model and flags do not go together.
    """
    from minisd.applications import as_images, img2img, inpaint
    from minisd.variants import super_resolution

    prompts, channels = [options.prompt] * (options.n or 1), pipe.unet.config.in_channels
    picture = open_picture(options.image).convert("RGB")
    if channels == 9 and options.mask is None:
        raise ValueError(f"{options.model} paints into a picture; say where: --mask FILE.")
    if options.mask is not None:
        strength = 1.0 if options.strength is None else options.strength
        drawn = inpaint(pipe, picture, open_picture(options.mask), prompts, strength, seed=options.seed, **asked)
    elif channels == 4:
        strength = 0.6 if options.strength is None else options.strength
        drawn = img2img(pipe, picture, prompts, strength, seed=options.seed, **asked)
    elif options.strength is not None:
        raise ValueError(f"--strength belongs to models that draw a picture anew or paint into it; {options.model} does neither.")
    else:
        drawn = super_resolution(pipe, picture, prompts, seed=options.seed, **asked)
    return as_images(pipe, drawn).cpu()
