"""The command line: `minisd` or `python -m minisd`, with the verbs `train` and `generate`."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

TRAINING_STEPS = {"ddpm": 2500, "class": 2500, "clip": 1000, "text": 2500, "probe": 3000}


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
    models += "text: pictures of what a sentence says; probe: reads postcards"
    train.add_argument("model", choices=list(TRAINING_STEPS), help=models)
    defaults = ", ".join(f"{steps} for {name}" for name, steps in TRAINING_STEPS.items())
    train.add_argument("--steps", type=whole_number(1), help=f"training steps (default: {defaults})")
    train.add_argument("--out", required=True, type=Path, help="folder for checkpoints and the finished model")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    train.add_argument("--seed", type=whole_number(0), default=0)
    sources = "ddpm, class: 'postcards', a folder of pictures (class: with a sub-folder for each class) or a Hub id (default: postcards)"
    sources += "; clip, text: postcards, or a folder with captions or a Hub id"
    train.add_argument("--data", default="postcards", help=sources)
    train.add_argument("--pictures", type=whole_number(1), help="how many (default: 20000 postcards, or all of yours); not for probe")
    train.add_argument("--text-encoder", help="text: the CLIP that reads the sentences, shipped or in a folder (default: clip)")
    train.add_argument("--save-every", type=whole_number(1), default=200, help="steps between checkpoints (default: 200)")

    generate = verbs.add_parser("generate", help="draw pictures", description="Draw pictures with a trained model.")
    generate.add_argument("prompt", nargs="?", help='models of text: what to draw, such as "a red boat at night"')
    models = "a shipped model's name or a folder that train wrote (default: text with a prompt, ddpm without)"
    generate.add_argument("--model", help=models)
    generate.add_argument("-n", type=whole_number(1), default=16, help="how many pictures (default: 16)")
    generate.add_argument("--steps", type=whole_number(1), help="sampling steps, up to 1000 (default: 20)")
    generate.add_argument("--sampler", help="ddpm, ddim, euler, euler_ancestral, heun or dpmpp_2m (default: dpmpp_2m)")
    generate.add_argument("--spacing", help="of the steps: leading, trailing, linspace or karras (default: karras)")
    generate.add_argument("--label", help="models with classes: what to draw, such as boat (default: each class in turn)")
    generate.add_argument(
        "--guidance", type=number, help="models of classes or text: guidance scale; 1 is none (default: the model's own, 3)"
    )
    generate.add_argument("--negative", help="models of classes or text: a class, or a text, to stay away from")
    generate.add_argument("--seed", type=whole_number(0), default=0)
    generate.add_argument("--out", type=Path, default=Path("grid.png"), help="picture file for the grid (default: grid.png)")
    generate.add_argument("--scale", type=whole_number(1), default=4, help="enlarge each pixel this many times (default: 4)")
    return parser


def run_train(options: argparse.Namespace) -> None:
    """`minisd train`: one model, from data to a folder with its weights."""
    steps = options.steps or TRAINING_STEPS[options.model]
    run = {"steps": steps, "out": options.out, "resume": options.resume, "seed": options.seed, "save_every": options.save_every}
    if options.model == "probe":
        from minisd.probe import train_probe

        trained = train_probe(**run)
    elif options.model in ("clip", "text"):
        trained = train_on_captions(options, run)
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


def train_on_captions(options: argparse.Namespace, run: dict):
    """`minisd train clip` and `minisd train text`: pictures with captions."""
    from minisd.clip import train_clip
    from minisd.data import load_images, to_tensor
    from minisd.text_to_image import TEXT_CONFIG, load_pairs, train_text

    if options.text_encoder is not None and options.model != "text":
        raise ValueError("--text-encoder belongs to the model text.")
    if options.data == "postcards":
        images, texts = load_pairs(options.pictures or 20_000)
    else:
        dataset = load_images(options.data, size=TEXT_CONFIG["size"], n=options.pictures)
        images, texts = to_tensor(dataset), [(caption,) for caption in dataset["caption"]]
        if not any(text for (text,) in texts):
            raise ValueError(f"{options.data} has no captions; put a metadata.jsonl with file_name and caption beside the pictures.")
    print(f"training on {len(images)} pictures with {len(texts[0])} caption{'s' * (len(texts[0]) > 1)} each", flush=True)
    if options.model == "clip":
        return train_clip(images, texts, **run)[0]
    return train_text(images, texts, text_encoder=options.text_encoder or "clip", **run)


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
    from minisd.plots import make_grid
    from minisd.samplers import sample
    from minisd.weights import read_model

    if options.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {options.out} must end in .png, .jpg or .webp.")
    if not options.out.resolve().parent.is_dir():
        raise FileNotFoundError(f"the folder of --out {options.out} does not exist.")
    options.model = options.model or ("ddpm" if options.prompt is None else "text")
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
