"""The command line: `minisd` or `python -m minisd`, with the verbs `train` and `generate`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def whole_number(smallest: int):
    """A type for argparse: an integer of at least `smallest`."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {smallest}")
        return int(text)

    return parse


def build_parser() -> argparse.ArgumentParser:
    """The parser with all verbs and flags."""
    parser = argparse.ArgumentParser(prog="minisd", description="Stable Diffusion, built by its students.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train one of the course's models", description="Train one of the course's models.")
    train.add_argument("model", choices=["ddpm", "probe"], help="ddpm: unconditional 32x32 pictures; probe: reads postcards")
    train.add_argument("--steps", type=whole_number(1), help="training steps (default: 5000 for ddpm, 3000 for probe)")
    train.add_argument("--out", required=True, type=Path, help="folder for checkpoints and the finished model")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    train.add_argument("--seed", type=whole_number(0), default=0)
    train.add_argument("--data", default="postcards", help="ddpm: 'postcards', a folder of pictures or a Hub id (default: postcards)")
    train.add_argument("--pictures", type=whole_number(1), help="ddpm: how many to train on (default: 20000 postcards, or all of yours)")
    train.add_argument("--save-every", type=whole_number(1), default=200, help="steps between checkpoints (default: 200)")

    generate = verbs.add_parser("generate", help="draw pictures", description="Draw pictures with a trained model.")
    generate.add_argument("--model", default="ddpm", help="a shipped model's name or a folder that train wrote (default: ddpm)")
    generate.add_argument("-n", type=whole_number(1), default=16, help="how many pictures (default: 16)")
    generate.add_argument("--steps", type=whole_number(1), default=100, help="sampling steps, up to 1000 (default: 100)")
    generate.add_argument("--seed", type=whole_number(0), default=0)
    generate.add_argument("--out", type=Path, default=Path("grid.png"), help="picture file for the grid (default: grid.png)")
    generate.add_argument("--scale", type=whole_number(1), default=4, help="enlarge each pixel this many times (default: 4)")
    return parser


def run_train(options: argparse.Namespace) -> None:
    """`minisd train`: one model, from data to a folder with its weights."""
    if options.model == "probe":
        from minisd.probe import train_probe

        trained = train_probe(options.steps or 3000, options.out, options.resume, options.seed, save_every=options.save_every)
    else:
        from minisd.data import load_images, to_tensor
        from minisd.ddpm import DDPM_CONFIG, train_ddpm

        postcards = options.data == "postcards"
        limits = {"n": options.pictures or 20_000, "things": 1} if postcards else {"n": options.pictures}
        images = to_tensor(load_images(options.data, size=DDPM_CONFIG["size"], **limits))
        print(f"training on {len(images)} pictures", flush=True)
        trained = train_ddpm(images, options.steps or 5000, options.out, options.resume, options.seed, save_every=options.save_every)
    done = len(trained.losses)
    recent = trained.losses[-100:]
    mean = sum(recent) / len(recent)
    print(f"{done} steps, {trained.seconds:.0f} s in this run, mean loss of the last {len(recent)}: {mean:.4f}; model in {options.out}")


def run_generate(options: argparse.Namespace) -> None:
    """`minisd generate`: pictures from noise, saved as one grid."""
    from minisd.ddpm import load_ddpm, sample_ddpm
    from minisd.plots import make_grid

    if options.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {options.out} must end in .png, .jpg or .webp.")
    if not options.out.resolve().parent.is_dir():
        raise FileNotFoundError(f"the folder of --out {options.out} does not exist.")
    denoiser = load_ddpm(options.model)
    images = sample_ddpm(denoiser, (options.n, 3, denoiser.size, denoiser.size), steps=options.steps, seed=options.seed)
    make_grid(images, columns=min(8, max(1, round(options.n**0.5))), scale=options.scale).save(options.out)
    print(f"{options.n} pictures in {options.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Mistakes that a user can make end with one sentence on stderr and status 1 or 2."""
    options = build_parser().parse_args(arguments)
    try:
        {"train": run_train, "generate": run_generate}[options.verb](options)
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
