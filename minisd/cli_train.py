"""The verb `train` of the command line."""

import argparse
import time
from pathlib import Path

from minisd.cli_variant import VARIANT_STEPS, train_variant

TRAINING_STEPS = {"ddpm": 2500, "class": 2500, "clip": 1000, "text": 2500, "vae": 2500, "postcards": 3500}
TRAINING_STEPS |= VARIANT_STEPS | {"probe": 3000, "segmenter": 1500}


def run_train(options: argparse.Namespace) -> None:
    """`minisd train`: one model, from data to a folder with its weights."""
    steps = options.steps or TRAINING_STEPS[options.model]
    if options.model != "vae" and (options.decoder_only or (options.start is not None and options.model not in VARIANT_STEPS)):
        variants = ", ".join(VARIANT_STEPS)
        raise ValueError(f"--start and --decoder-only belong to the model vae; --start also to {variants}.")
    if options.text_encoder is not None and options.model not in ("text", "postcards"):
        raise ValueError("--text-encoder belongs to the models text and postcards.")
    if options.vae is not None and options.model != "postcards":
        raise ValueError("--vae belongs to the model postcards.")
    if options.resume and not any(Path(options.out).rglob("checkpoint.pt")):
        print(f"nothing to resume in {options.out} yet: starting at the first step", flush=True)
    run = {"steps": steps, "out": options.out, "resume": options.resume, "seed": options.seed, "save_every": options.save_every}
    if options.model == "postcards":
        return train_everything(options, run)
    if options.model in VARIANT_STEPS:
        return train_variant(options, run)
    if options.model == "probe":
        from minisd.probe import train_probe

        trained = train_probe(**run)
    elif options.model == "segmenter":
        from minisd.segmenter import train_segmenter

        trained = train_segmenter(**run)
    elif options.model in ("clip", "text"):
        trained = train_on_captions(options, run)
    elif options.model == "vae":
        trained = train_autoencoder(options, run)
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


def train_autoencoder(options: argparse.Namespace, run: dict):
    """`minisd train vae`: pictures, and nothing said about them."""
    from minisd.data import load_images, to_tensor
    from minisd.text_to_image import load_pairs
    from minisd.vae_training import VAE_CONFIG, train_vae

    if options.decoder_only and options.start is None:
        raise ValueError("--decoder-only needs --start: an autoencoder whose latents stay as they are.")
    size = VAE_CONFIG["sample_size"]
    if options.data == "postcards":
        images, _ = load_pairs(options.pictures or 20_000, phrasings=1, size=size)
    else:
        images = to_tensor(load_images(options.data, size=size, n=options.pictures))
    print(f"training on {len(images)} pictures", flush=True)
    return train_vae(images, start=options.start, decoder_only=options.decoder_only, **run)


def train_everything(options: argparse.Namespace, run: dict) -> None:
    """`minisd train postcards`: autoencoder, CLIP and UNet, and at the end how often the pictures show what the prompts say."""
    from minisd.latent_diffusion import measure, train_postcards

    if options.data != "postcards":
        raise ValueError("postcards trains on postcards; the parts can be trained on other pictures: vae, clip.")
    start = time.perf_counter()
    parts = {"vae": options.vae, "text_encoder": options.text_encoder, "pictures": options.pictures or 20_000}
    steps = {"unet": run.pop("steps")}
    pipe = train_postcards(run.pop("out"), steps=steps, **parts, **run, report=lambda text: print(text, flush=True))
    print(f"all parts in {(time.perf_counter() - start) / 60:.1f} min; model in {options.out}; measuring", flush=True)
    shares = measure(pipe, options.count)
    for name, share in shares.items():
        split, things = name.split()
        error = (share * (1 - share) / options.count) ** 0.5
        what = "one thing " if things == "1" else "two things"
        print(f"{what} {split}: {share:.1%} +- {error:.1%} of {options.count} prompts")
