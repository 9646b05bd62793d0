"""The command line: `minisd` or `python -m minisd`, with the verbs `train` and `generate`."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

TRAINING_STEPS = {"ddpm": 2500, "class": 2500, "clip": 1000, "probe": 3000}


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
    models = "ddpm: unconditional 32x32 pictures; class: pictures of the kind that is asked for; clip: captions and pictures; probe"
    train.add_argument("model", choices=list(TRAINING_STEPS), help=models)
    defaults = ", ".join(f"{steps} for {name}" for name, steps in TRAINING_STEPS.items())
    train.add_argument("--steps", type=whole_number(1), help=f"training steps (default: {defaults})")
    train.add_argument("--out", required=True, type=Path, help="folder for checkpoints and the finished model")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    train.add_argument("--seed", type=whole_number(0), default=0)
    sources = "ddpm, class: 'postcards', a folder of pictures (class: with a sub-folder for each class) or a Hub id (default: postcards)"
    train.add_argument("--data", default="postcards", help=sources)
    train.add_argument("--pictures", type=whole_number(1), help="ddpm, class, clip: how many (default: 20000 postcards, or all of yours)")
    train.add_argument("--save-every", type=whole_number(1), default=200, help="steps between checkpoints (default: 200)")

    generate = verbs.add_parser("generate", help="draw pictures", description="Draw pictures with a trained model.")
    generate.add_argument("--model", default="ddpm", help="a shipped model's name or a folder that train wrote (default: ddpm)")
    generate.add_argument("-n", type=whole_number(1), default=16, help="how many pictures (default: 16)")
    generate.add_argument("--steps", type=whole_number(1), help="sampling steps, up to 1000 (default: 20)")
    generate.add_argument("--sampler", help="ddpm, ddim, euler, euler_ancestral, heun or dpmpp_2m (default: dpmpp_2m)")
    generate.add_argument("--spacing", help="of the steps: leading, trailing, linspace or karras (default: karras)")
    generate.add_argument("--label", help="models with classes: what to draw, such as boat (default: each class in turn)")
    generate.add_argument("--guidance", type=number, help="models with classes: guidance scale; 1 is none (default: the model's own, 3)")
    generate.add_argument("--negative", help="models with classes: a class to stay away from")
    generate.add_argument("--seed", type=whole_number(0), default=0)
    generate.add_argument("--out", type=Path, default=Path("grid.png"), help="picture file for the grid (default: grid.png)")
    generate.add_argument("--scale", type=whole_number(1), default=4, help="enlarge each pixel this many times (default: 4)")
    return parser


def described_postcards(count: int, size: int, phrasings: int = 4) -> tuple:
    """Training postcards, half of them with one thing and half with two, as a tensor (N, 3, size, size), and N tuples of captions."""
    import torch

    from minisd.drawing import render
    from minisd.postcards import captions, sample_scenes

    parts = [
        sample_scenes(number, split="train", seed=things - 1, things=things)
        for things, number in ((1, count - count // 2), (2, count // 2))
    ]
    texts = [each for part in parts for each in zip(*(captions(part, seed=seed) for seed in range(phrasings)))]
    return torch.cat([render(part, size) for part in parts if len(part)]), texts


def run_train(options: argparse.Namespace) -> None:
    """`minisd train`: one model, from data to a folder with its weights."""
    steps = options.steps or TRAINING_STEPS[options.model]
    run = {"steps": steps, "out": options.out, "resume": options.resume, "seed": options.seed, "save_every": options.save_every}
    if options.model == "probe":
        from minisd.probe import train_probe

        trained = train_probe(**run)
    elif options.model == "clip":
        from minisd.clip import train_clip

        if options.data != "postcards":
            raise ValueError("clip learns from postcards and their captions; --data is for ddpm and class.")
        images, texts = described_postcards(options.pictures or 20_000, size=32)
        print(f"training on {len(images)} pictures with {len(texts[0])} captions each", flush=True)
        trained, _ = train_clip(images, texts, **run)
    else:
        import torch

        from minisd.data import load_images, to_tensor
        from minisd.ddpm import DDPM_CONFIG, train_ddpm
        from minisd.guidance import train_class

        postcards = options.data == "postcards"
        limits = {"n": options.pictures or 20_000, "things": 1} if postcards else {"n": options.pictures}
        dataset = load_images(options.data, size=DDPM_CONFIG["size"], **limits)
        images = to_tensor(dataset)
        print(f"training on {len(images)} pictures", flush=True)
        if options.model == "class":
            classes = dataset.features["label"].names
            if len(classes) < 2:
                raise ValueError(f"{options.data} has no classes; put the pictures of each class into a sub-folder of its own.")
            trained = train_class(images, torch.tensor(dataset["label"]), classes=classes, **run)
        else:
            trained = train_ddpm(images, **run)
    done = len(trained.losses)
    recent = trained.losses[-100:]
    mean = sum(recent) / len(recent)
    print(f"{done} steps, {trained.seconds:.0f} s in this run, mean loss of the last {len(recent)}: {mean:.4f}; model in {options.out}")


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
    from minisd.plots import make_grid
    from minisd.samplers import sample
    from minisd.weights import read_model

    if options.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {options.out} must end in .png, .jpg or .webp.")
    if not options.out.resolve().parent.is_dir():
        raise FileNotFoundError(f"the folder of --out {options.out} does not exist.")
    config, _ = read_model(options.model)
    columns = max(1, round(options.n**0.5))
    if "classes" in config:
        denoiser, conditions = told_what(options, config)
        columns = len(config["classes"]) if options.label is None else columns
    else:
        if flags := [flag for flag in ("label", "guidance", "negative") if getattr(options, flag) is not None]:
            raise ValueError(f"--{flags[0]} needs a model with classes, such as 'class'; {options.model} has none.")
        denoiser, conditions = load_ddpm(options.model), {}
    shape = (options.n, 3, denoiser.size, denoiser.size)
    asked = {name: getattr(options, name) for name in ("sampler", "steps", "spacing") if getattr(options, name) is not None}
    images = sample(denoiser, shape, seed=options.seed, **asked, **conditions)  # what was not asked for is as `sample` has it
    make_grid(images, columns=min(8, columns), scale=options.scale).save(options.out)
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
