"""The autoencoder of lesson 09 after a short training with another loss, other colours or other sizes.

    python benchmarks/vae_losses.py                                  as lesson 09 trains it
    python benchmarks/vae_losses.py --absolute 1                     |error| + error², where our loss is error² alone
    python benchmarks/vae_losses.py --colours "another order"        channels exchanged, where ours are drawn, with repetitions
    python benchmarks/vae_losses.py --colours negated                drawn, and every second one of them negated
    python benchmarks/vae_losses.py --widths 16 48 128 128
    python benchmarks/vae_losses.py --model vae                      no training: an autoencoder that is there, shipped or in a folder

PSNR of fresh postcards, mean of `--count` for each split and number of things; then, by day or at sunset, PSNR inside the things alone:
a cactus in the colours of the training pictures, and the white one, which only `novel` has. With the absolute error the loss is about
seven times as large, and so is the weight of KL then, so that the terms keep their proportion.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch

from minisd.drawing import FIRST_THING, render, segment
from minisd.latent_diffusion import encode_pictures
from minisd.postcards import COLOURS, KINDS, SKIES, sample_scenes
from minisd.scenes import Scenes
from minisd.text_to_image import load_pairs
from minisd.utils import processor_name
from minisd.vae import AutoencoderKL
from minisd.vae_training import exchange_channels, load_vae, psnr, train_vae

WAYS = ("as they are", "another order", "drawn", "negated")


def recoloured(images: torch.Tensor, way: str, generator: torch.Generator) -> torch.Tensor:
    """Half of the pictures (B, 3, H, W) with other colours, in one of `WAYS`."""
    if way == "as they are":
        return images
    if way == "drawn":
        return exchange_channels(images, generator)
    half = torch.rand(len(images), 1, generator=generator) < 0.5
    if way == "negated":
        signs = 1.0 - 2.0 * (torch.rand(len(images), 3, generator=generator) < 0.5)
        return exchange_channels(images, generator) * torch.where(half, signs, 1.0)[:, :, None, None]
    orders = torch.rand(len(images), 3, generator=generator).argsort(1)
    return images[torch.arange(len(images))[:, None], torch.where(half, orders, torch.arange(3))]


def loss_of(absolute: float, kl_weight: float, way: str) -> Callable[..., torch.Tensor]:
    """`vae_loss` with `absolute` times |error| added, and with other colours."""

    def loss_fn(model: AutoencoderKL, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        images = recoloured(images, way, generator)
        images = images.to(next(model.parameters()).device, memory_format=torch.channels_last)
        output, posterior = model(images, generator)
        error = output.float() - images
        return absolute * error.abs().mean() + error.square().mean() + kl_weight * posterior.kl().mean()

    return loss_fn


def back(model: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encoded and decoded, on the CPU."""
    with torch.no_grad():
        return torch.cat(
            [model.decode(part.to(model.quant_conv.weight.device)).float().cpu() for part in encode_pictures(model, images).split(100)]
        )


def inside_things(model: AutoencoderKL, scenes: Scenes) -> float:
    """PSNR of the pixels that show a thing, in decibels: the mean over the pictures."""
    images = render(scenes)
    inside = (segment(scenes) >= FIRST_THING)[:, None]
    errors = ((images - back(model, images).clamp(-1, 1)).square() * inside).sum((1, 2, 3)) / (3 * inside.sum((1, 2, 3)))
    return (10 * torch.log10(4 / errors)).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--absolute", type=float, default=0.0, help="weight of |error| (default: %(default)s)")
    parser.add_argument("--kl-weight", type=float, help="default: lesson 09's 5e-5, with |error| 3.5e-4")
    parser.add_argument("--colours", choices=WAYS, default="drawn", help="what is done to half of the pictures (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", help="of the levels (default: lesson 09's)")
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--count", type=int, default=150, help="fresh pictures for each mean (default: %(default)s)")
    parser.add_argument("--model", help="measure this autoencoder, shipped or in a folder, and train none")
    options = parser.parse_args()
    report(load_vae(options.model) if options.model else trained_with(options), options.count)


def trained_with(options: argparse.Namespace) -> AutoencoderKL:
    """An autoencoder after a training with these options."""
    images, _ = load_pairs(options.pictures, phrasings=1, size=64)
    kl_weight = options.kl_weight if options.kl_weight is not None else 3.5e-4 if options.absolute else 5e-5
    config = {"block_out_channels": tuple(options.widths)} if options.widths else None
    loss_fn = loss_of(options.absolute, kl_weight, options.colours)
    trained = train_vae(images, options.steps, config=config, loss_fn=loss_fn, batch_size=options.batch_size)
    print(f"{processor_name()}: {options.steps} steps in {trained.seconds:.0f} s, loss {trained.losses[-1]:.4f}", flush=True)
    return trained.model.requires_grad_(False)


def report(model: AutoencoderKL, count: int) -> None:
    """All that is measured of one autoencoder."""
    for split in ("valid", "novel"):
        for things in (1, 2):
            fresh = render(sample_scenes(count, split=split, seed=987_654, things=things))
            print(f"{split} {things}: {psnr(fresh, back(model, fresh)).mean():.2f} dB")
    scenes = sample_scenes(2 * count, split="valid", seed=5, things=1)
    scenes = scenes[(scenes.sky != SKIES.index("night")).nonzero()[:, 0]]
    there = scenes.kind >= 0
    values = []
    for colour in range(len(COLOURS)):
        kinds, colours = torch.where(there, KINDS.index("cactus"), scenes.kind), torch.where(there, colour, scenes.colour)
        values.append(inside_things(model, replace(scenes, kind=kinds, colour=colours)))
    white = values.pop(COLOURS.index("white"))
    print(f"inside a cactus: {sum(values) / len(values):.1f} dB in the other colours, {white:.1f} dB in white")


if __name__ == "__main__":
    main()
