"""The command line: `minisd` or `python -m minisd`, with the verbs `train`, `generate`, `info` and `convert`."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from minisd.cli_draw import run_generate
from minisd.cli_picture import add_picture_flags
from minisd.cli_train import TRAINING_STEPS, run_train
from minisd.cli_weights import run_convert, run_info


def whole_number(smallest: int):
    """A type for argparse: an integer of at least `smallest`."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {smallest}")
        return int(text)

    return parse


def number(text: str) -> float:
    """A type for argparse: a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The parser with all verbs and flags."""
    parser = argparse.ArgumentParser(prog="minisd", description="Stable Diffusion, built by its students.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train one of the course's models", description="Train one of the course's models.")
    models = (
        "ddpm: unconditional 32x32 pictures; class: pictures of the kind that is asked for; clip: which sentence belongs to which picture; "
    )
    models += "text: pictures of what a sentence says; vae: 64x64 pictures to small latents and back; "
    models += "postcards: all parts of a latent diffusion model, from nothing; inpainting, super-resolution, segmentation: a latent model "
    models += "that paints into pictures, enlarges them, follows a map; probe, segmenter: read postcards"
    train.add_argument("model", choices=list(TRAINING_STEPS), help=models)
    defaults = ", ".join(f"{steps} for {name}" for name, steps in TRAINING_STEPS.items())
    train.add_argument("--steps", type=whole_number(1), help=f"training steps (default: {defaults})")
    train.add_argument("--out", required=True, type=Path, help="folder for checkpoints and the finished model")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    train.add_argument("--seed", type=whole_number(0), default=0)
    sources = "ddpm, class: 'postcards', a folder of pictures (class: with a sub-folder for each class) or a Hub id (default: postcards)"
    sources += "; clip, text: postcards, or a folder with captions or a Hub id; vae: postcards, any folder or a Hub id"
    train.add_argument("--data", default="postcards", help=sources)
    train.add_argument(
        "--pictures", type=whole_number(1), help="how many (default: 20000 postcards, or all of yours; 8000 for variants); not for probe"
    )
    start = "vae: begin with the weights of this autoencoder, shipped or in a folder (default: random ones); "
    train.add_argument("--start", help=start + "inpainting, super-resolution, segmentation: the latent model (default: postcards)")
    only = "vae, with --start: leave the encoder, and so the latents, as they are, and train the decoder with the squared error"
    train.add_argument("--decoder-only", action="store_true", help=only)
    encoders = "text, postcards: the CLIP that reads the sentences, shipped or in a folder (default: clip; postcards trains one)"
    train.add_argument("--text-encoder", help=encoders)
    train.add_argument("--vae", help="postcards: an autoencoder, shipped or in a folder, instead of training one")
    train.add_argument("--count", type=whole_number(1), default=512, help="postcards: prompts of each kind to measure with (default: 512)")
    train.add_argument("--save-every", type=whole_number(1), default=200, help="steps between checkpoints (default: 200)")

    generate = verbs.add_parser("generate", help="draw pictures", description="Draw pictures with a trained model.")
    generate.add_argument("prompt", nargs="?", help='models of text: what to draw, such as "a red boat at night"')
    models = "a shipped model's name, a folder that train wrote, or published weights: a diffusers folder, a .safetensors or .ckpt file, "
    generate.add_argument("--model", help=models + "a name on the Hub (default: postcards with a prompt, ddpm without)")
    generate.add_argument("-n", type=whole_number(1), help="how many pictures (default: 1 of latent models, 16 of the others)")
    generate.add_argument("--steps", type=whole_number(1), help="sampling steps, up to 1000 (default: 20), in latents 25")
    generate.add_argument(
        "--sampler", help="ddpm, ddim, euler, euler_ancestral, heun or dpmpp_2m (default: dpmpp_2m), or what a latent model brings"
    )
    generate.add_argument("--spacing", help="pixel models: of the steps: leading, trailing, linspace or karras (default: karras)")
    generate.add_argument("--size", type=whole_number(8), nargs="+", help="latent models: side, or height and width, in pixels")
    generate.add_argument("--label", help="models with classes: what to draw, such as boat (default: each class in turn)")
    generate.add_argument(
        "--guidance", type=number, help="models of classes or text: guidance scale; 1 is none (default: the model's own, 2 or 3)"
    )
    generate.add_argument("--negative", help="models of classes or text: a class, or a text, to stay away from")
    generate.add_argument("--seed", type=whole_number(0), default=0)
    generate.add_argument(
        "--out", type=Path, default=Path("grid.png"), help="picture file, a grid if there are several (default: grid.png)"
    )
    scale = "enlarge each pixel this many times (default: 4, and 1 for pictures of 256 pixels and more, or with --image)"
    generate.add_argument("--scale", type=whole_number(1), help=scale)
    add_picture_flags(generate)

    published = "a Stable Diffusion 1.x, 2.x or XL: a diffusers folder, a .safetensors or .ckpt file, or a name on the Hub"
    info = verbs.add_parser("info", help="say what a file of published weights holds", description="Say what published weights hold.")
    info.add_argument("path", help=published)
    info.add_argument("--ema", action="store_true", help="look at the averaged copy of the UNet")

    convert = verbs.add_parser("convert", help="write published weights in the other layout", description="Write published weights anew.")
    convert.add_argument("source", help=published)
    convert.add_argument("target", type=Path, help="a name ending in .safetensors: a single file; any other: a diffusers folder")
    convert.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="(default: each tensor keeps its own)")
    predicts = "what the UNet predicts (default: what the source says, or what a probe finds)"
    convert.add_argument("--prediction-type", choices=["epsilon", "v_prediction"], help=predicts)
    convert.add_argument("--variant", help="of a folder's weights, such as fp16 (default: the plain ones if they are there)")
    convert.add_argument("--ema", action="store_true", help="take the averaged copy of the UNet, where a single file holds one")
    return parser


VERBS = {"train": run_train, "generate": run_generate, "info": run_info, "convert": run_convert}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Mistakes that a user can make end with one sentence on stderr and status 1 or 2."""
    options = build_parser().parse_args(arguments)
    try:
        VERBS[options.verb](options)
    except KeyboardInterrupt:
        resume = "; the same command with --resume goes on from the last checkpoint" if options.verb == "train" else ""
        print(f"minisd: stopped{resume}.", file=sys.stderr)
        return 130
    except (ValueError, FileNotFoundError, FileExistsError, FloatingPointError, ConnectionError, OSError) as error:
        if os.environ.get("MINISD_DEBUG"):
            raise
        print(f"minisd: {error}", file=sys.stderr)
        return 1
    return 0
