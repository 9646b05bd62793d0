"""The verb `generate` of the command line."""

import argparse
from typing import Any

from minisd.cli_picture import check_picture_flags, draw_from_picture


def is_latent(name: str) -> bool:
    """Whether a model's name or path stands for a latent diffusion model: a shipped one, or anything that `StableDiffusion.load` opens."""
    from minisd.latent_diffusion import is_latent_folder
    from minisd.weights import model_folder

    folder = model_folder(name)
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return is_latent_folder(name)
    return (folder / "unet").is_dir() or folder.is_file() or ("/" in name and not folder.exists())


def draw_latent(options: argparse.Namespace) -> Any:
    """Pictures (n, 3, H, W) of a latent diffusion model."""
    from minisd.pipeline import StableDiffusion

    if options.prompt is None:
        raise ValueError(f'{options.model} draws what a sentence says; say one: minisd generate "a red boat at night".')
    if flags := [flag for flag in ("label", "spacing") if getattr(options, flag) is not None]:
        raise ValueError(f"--{flags[0]} belongs to models of pixels; {options.model} draws in latents.")
    if options.size is not None and len(options.size) > 2:
        raise ValueError(f"--size takes a side, or height and width; got {len(options.size)} numbers.")
    pipe = StableDiffusion.load(options.model)
    for note in pipe.notes:
        print(f"note: {note}")
    size = None if options.size is None else options.size[0] if len(options.size) == 1 else tuple(options.size)
    asked = {name: getattr(options, name) for name in ("steps", "guidance", "sampler", "negative") if getattr(options, name) is not None}
    if options.image is not None:
        return draw_from_picture(pipe, options, **asked)
    latents = pipe.sample([options.prompt] * (options.n or 1), seed=options.seed, size=size, **asked)
    return pipe.decode(latents)


def told_in_words(options: argparse.Namespace, config: dict) -> tuple:
    """For a model of text: its guided denoiser, and the context that the prompt makes."""
    from minisd.guidance import Guided
    from minisd.text_to_image import load_text

    if options.prompt is None:
        raise ValueError(
            f'{options.model} draws what a sentence says; say one: minisd generate "a red boat at night" --model {options.model}.'
        )
    if options.label is not None:
        raise ValueError(f"--label needs a model with classes, such as 'class'; {options.model} has none, and takes a sentence.")
    scale = config.get("guidance", 3.0) if options.guidance is None else options.guidance
    if options.negative is not None and scale == 1:
        raise ValueError("--negative needs guidance: with --guidance 1 the model is asked once, and nothing is pushed away.")
    denoiser, encode = load_text(options.model)
    return Guided(denoiser, scale, {"context": encode(options.negative or "")}), {"context": encode(options.prompt)}


def told_what(options: argparse.Namespace, config: dict) -> tuple:
    """For a model with classes: its guided denoiser, and the conditions that the flags ask for."""
    import torch

    from minisd.guidance import Guided, load_class

    def number_of(name: str) -> int:
        if name not in classes:
            raise ValueError(f"unknown label {name!r}; {options.model} knows {', '.join(classes)}.")
        return classes.index(name)

    classes = config["classes"]
    scale = config.get("guidance", 3.0) if options.guidance is None else options.guidance
    if options.negative is not None and scale == 1:
        raise ValueError("--negative needs guidance: with --guidance 1 the model is asked once, and nothing is pushed away.")
    labels = torch.arange(options.n) % len(classes) if options.label is None else torch.full((options.n,), number_of(options.label))
    without = len(classes) if options.negative is None else number_of(options.negative)
    return Guided(load_class(options.model), scale, {"labels": without}), {"labels": labels}


def run_generate(options: argparse.Namespace) -> None:
    """`minisd generate`: pictures from noise, saved as one grid. The model's configuration says what kind of model it is."""
    from minisd.ddpm import load_ddpm
    from minisd.samplers import sample
    from minisd.weights import read_model

    if options.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {options.out} must end in .png, .jpg or .webp.")
    if not options.out.resolve().parent.is_dir():
        raise FileNotFoundError(f"the folder of --out {options.out} does not exist.")
    options.model = options.model or ("ddpm" if options.prompt is None else "postcards")
    latent = is_latent(options.model)
    check_picture_flags(options, latent)
    if latent:
        images = draw_latent(options)
        save_grid(images, max(1, round(len(images) ** 0.5)), options)
        return
    if options.size is not None:
        raise ValueError(f"--size belongs to latent models; {options.model} draws in its own size.")
    options.n = options.n or 16
    config, _ = read_model(options.model)
    columns = max(1, round(options.n**0.5))
    if options.prompt is not None and "text_encoder" not in config:
        raise ValueError(f"{options.model} takes no sentence; a model that does is 'text'.")
    if "text_encoder" in config:
        denoiser, conditions = told_in_words(options, config)
    elif "classes" in config:
        denoiser, conditions = told_what(options, config)
        columns = len(config["classes"]) if options.label is None else columns
    else:
        if flags := [flag for flag in ("label", "guidance", "negative") if getattr(options, flag) is not None]:
            raise ValueError(f"--{flags[0]} needs a model with classes, such as 'class'; {options.model} has none.")
        denoiser, conditions = load_ddpm(options.model), {}
    shape = (options.n, 3, denoiser.size, denoiser.size)
    asked = {name: getattr(options, name) for name in ("sampler", "steps", "spacing") if getattr(options, name) is not None}
    images = sample(denoiser, shape, seed=options.seed, **asked, **conditions)  # what was not asked for is as `sample` has it
    save_grid(images, columns, options)


def save_grid(images: Any, columns: int, options: argparse.Namespace) -> None:
    """Save pictures (n, 3, H, W) as one file, and say so."""
    from minisd.plots import make_grid

    scale = options.scale or (4 if images.shape[-1] < 256 and options.image is None else 1)  # with --image, pixels keep their bits
    make_grid(images, columns=min(8, columns), scale=scale).save(options.out)
    print(f"{len(images)} picture{'s' * (len(images) > 1)} in {options.out}")
