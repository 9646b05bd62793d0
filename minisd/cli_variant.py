"""The part of the verb `train` that makes the variants of lesson 11: `train inpainting`, `train super-resolution`, `train segmentation`."""

import argparse
import time
from typing import Any

VARIANT_STEPS = {"inpainting": 1000, "super-resolution": 1000, "segmentation": 1000}


def train_variant(options: argparse.Namespace, run: dict[str, Any]) -> None:
    """Train a variant of a latent model on postcards and save all of it as a folder that `StableDiffusion.load` opens.

    `run`: steps, out, resume, seed, save_every. Checkpoints lie in the sub-folder `training`. `options.start`: the model to begin with.
    """
    import torch

    from minisd import variant_training as variants
    from minisd.drawing import render, segment
    from minisd.latent_diffusion import encode_pictures
    from minisd.pipeline import StableDiffusion
    from minisd.postcards import captions, sample_scenes

    if options.data != "postcards":
        raise ValueError(f"{options.model} is trained on postcards only, not on {options.data}.")
    out = options.out
    if (out / "model_index.json").exists():
        raise FileExistsError(f"{out} holds a finished model; choose another folder.")
    if (out / "training").exists() and not run["resume"]:
        raise FileExistsError(f"{out} already holds a run: resume it (--resume), or choose another folder.")
    start = time.perf_counter()
    pipe = StableDiffusion.load(options.start or "postcards")
    count, run = options.pictures or 8_000, run | {"out": out / "training"}
    shares = ((count + 1) // 2, max(1, count // 2))
    parts = [sample_scenes(share, "train", seed=things - 1, things=things) for things, share in zip((1, 2), shares)]
    texts = [text for scenes in parts for text in zip(*[captions(scenes, seed=k) for k in range(4)])]
    print(f"training on {len(texts)} pictures", flush=True)
    side = pipe.unet.config.sample_size * pipe.vae.factor
    pictures = torch.cat([render(scenes, 2 * side if options.model == "super-resolution" else side) for scenes in parts])
    if options.model == "super-resolution":
        made = variants.train_decoder(pipe, pictures, max(1, run["steps"] // 3), seed=run["seed"])
        made = variants.train_super_resolution(made, pictures, texts, **run)
    elif options.model == "inpainting":
        made = variants.train_inpainting(pipe, pictures, encode_pictures(pipe.vae, pictures), texts, **run)
    else:
        maps = torch.cat([segment(scenes, side) for scenes in parts])
        made = variants.train_segmentation(pipe, encode_pictures(pipe.vae, pictures), maps, texts, **run)
    made.save(out)
    print(f"{run['steps']} steps; {(time.perf_counter() - start) / 60:.1f} min with everything; model in {out}")
