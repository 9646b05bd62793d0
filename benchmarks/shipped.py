"""Measure the shipped models on fresh seeds: the numbers on their cards. python benchmarks/shipped.py [NAME ...] [--count 500]"""

import argparse
import dataclasses
import math
import time

import torch
from text_ways import two_things  # the script beside this one

from minisd.clip import load_clip, retrieval
from minisd.ddpm import load_ddpm, sample_ddpm
from minisd.drawing import render, segment
from minisd.guidance import Guided, load_class
from minisd.metrics import caption_accuracy, frechet_distance, nearest, read_attributes
from minisd.pipeline import StableDiffusion
from minisd.postcards import COLOURS, KINDS, Scenes, boxes, captions, sample_scenes
from minisd.probe import load_probe, probe_accuracy
from minisd.samplers import sample
from minisd.segmenter import box_overlap, found_boxes, load_segmenter, overlap
from minisd.text_to_image import load_text
from minisd.utils import fast_dtype
from minisd.vae_training import load_vae, psnr

FRESH = 987_654  # a seed that no training uses


def measure_probe(count: int) -> None:
    """Share of right answers per attribute, on clear pictures, on blurred ones and on small ones."""
    probe = load_probe()
    for split in ("valid", "novel"):
        for things in (1, 2):
            scenes = sample_scenes(count, split=split, seed=FRESH, things=things)
            images = render(scenes, 64)
            blurred = torch.nn.functional.interpolate(images, size=(40, 40), mode="bilinear", antialias=True)
            for name, pictures in (("64 pixels", images), ("blurred to 40", blurred), ("32 pixels", render(scenes, 32))):
                scores = probe_accuracy(probe, scenes, pictures)
                line = "  ".join(f"{attribute} {100 * score:.2f} %" for attribute, score in scores.items())
                print(f"{split}, {things} thing{'s' * (things == 2)}, {name:14s} {line}", flush=True)


def measure_segmenter(count: int) -> None:
    """Share of right pixels, intersection over union of the maps and of the boxes around things, on clear pictures and on blurred ones."""
    segmenter = load_segmenter()
    for split in ("valid", "novel"):
        for things in (1, 2):
            scenes = sample_scenes(count, split=split, seed=FRESH, things=things)
            images, wanted = render(scenes, 64), segment(scenes, 64)
            blurred = torch.nn.functional.interpolate(images, size=(40, 40), mode="bilinear", antialias=True)
            single = (scenes.kind[:, 0] != scenes.kind[:, 1])[:, None] & (scenes.kind >= 0)  # two of one kind share a box
            for name, pictures in (("64 pixels", images), ("blurred to 40", blurred)):
                seen = segmenter.read(pictures)
                inside = box_overlap(found_boxes(seen, scenes.kind), boxes(scenes))[single].mean()
                line = f"right pixels {(seen == wanted).float().mean():.2%}, intersection over union {overlap(seen, wanted).mean():.3f}"
                print(f"{split}, {things} thing{'s' * (things == 2)}, {name:14s} {line}, of boxes {inside:.3f}", flush=True)


def measure_ddpm(count: int) -> None:
    """Fréchet distance to fresh postcards, share of samples with exactly one thing, distance to the training set."""
    denoiser = load_ddpm()
    real = render(sample_scenes(count, split="valid", seed=FRESH, things=1), 32)
    train = render(sample_scenes(20_000, split="train", seed=0, things=1), 32)
    print(f"real against real, {count} pictures: Fréchet distance {frechet_distance(train[:count], real):.2f}")
    for steps in (50, 100):
        start = time.perf_counter()
        batches = [
            sample_ddpm(denoiser, (min(100, count - i), 3, 32, 32), steps=steps, seed=FRESH + i, progress=False)
            for i in range(0, count, 100)
        ]
        seconds = time.perf_counter() - start
        samples = torch.cat(batches).cpu()
        one = ((read_attributes(samples)["kind"] >= 0).sum(1) == 1).float().mean()
        distances, fresh = nearest(samples[:500], train)[1], nearest(real[:500], train)[1]
        print(
            f"{steps} steps ({denoiser.dtype}, {seconds / count:.3f} s a picture): Fréchet distance {frechet_distance(samples, real):.2f}, "
            f"exactly one thing in {one:.1%}, median distance to the nearest training picture {distances.median():.3f} "
            f"(fresh postcards: {fresh.median():.3f})",
            flush=True,
        )


def measure_class(count: int) -> None:
    """For several guidance scales: share of samples with the asked kind and nothing else, Fréchet distance; what is drawn unasked."""
    denoiser = load_class(device="cpu")
    null = denoiser.model.null_class
    real = render(sample_scenes(count, split="valid", seed=FRESH, things=1), 32)
    train = render(sample_scenes(20_000, split="train", seed=0, things=1), 32)
    print(f"real against real, {count} pictures: Fréchet distance {frechet_distance(train[:count], real):.2f}")

    def draw(scale: float, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        guided = Guided(denoiser, scale, {"labels": null})
        batches = [
            sample(guided, (len(part), 3, 32, 32), steps=25, seed=FRESH + i, progress=False, labels=part)
            for i, part in enumerate(labels.split(100))
        ]
        return torch.cat(batches), (time.perf_counter() - start) / count

    asked = torch.arange(count) % null
    for scale in (1, 1.5, 2, 3, 4, 5, 7.5):
        samples, seconds = draw(scale, asked)
        kinds = read_attributes(samples)["kind"]
        one = (kinds >= 0).sum(1) == 1
        right = (one & (kinds.max(1).values == asked)).float()
        distances = nearest(samples[:500], train)[1]
        print(
            f"scale {scale:g}: the asked kind in {right.mean():.1%} ± {(right.mean() * (1 - right.mean()) / count).sqrt():.1%}, "
            f"least for {KINDS[int(torch.stack([right[asked == k].mean() for k in range(null)]).argmin())]}, "
            f"exactly one thing in {one.float().mean():.1%}, Fréchet distance {frechet_distance(samples, real):.2f}, "
            f"median distance to the nearest training picture {distances.median():.3f}, {seconds:.3f} s a picture",
            flush=True,
        )
    parts = torch.arange(count).split(100)
    unasked = load_ddpm(device="cpu")  # the model that the training began with
    free = [sample(unasked, (len(part), 3, 32, 32), steps=25, seed=FRESH + i, progress=False) for i, part in enumerate(parts)]
    for name, samples in (("null class", draw(1, torch.full((count,), null))[0]), ("unconditional model", torch.cat(free))):
        kinds = read_attributes(samples)["kind"]
        kinds = kinds.max(1).values[(kinds >= 0).sum(1) == 1]  # where there is exactly one thing
        counts = torch.bincount(kinds, minlength=null)
        even = len(kinds) / null
        shares = {kind: f"{100 * share:.1f} %" for kind, share in zip(KINDS, (counts / count).tolist())}
        print(
            f"{name}: Fréchet distance {frechet_distance(samples, real):.2f}, kinds {shares}, "
            f"unevenness {((counts - even) ** 2 / even).sum():.1f} (an even model: 7 ± 4)",
            flush=True,
        )


def measure_clip(count: int) -> None:
    """Retrieval among 100 both ways, zero-shot kinds and colours, and how often a picture prefers its caption to the swapped one."""
    model, tokenizer = load_clip(device="cpu")
    for split in ("valid", "novel"):
        for things in (1, 2):
            scenes = sample_scenes(max(100, count), split=split, seed=FRESH, things=things)
            images, ids = render(scenes, 32), tokenizer(captions(scenes, seed=FRESH))
            to_text, to_picture = retrieval(model, images, ids)
            line = f"{split}, {things} thing{'s' * (things == 2)}: "
            line += f"caption for a picture {to_text:.1%}, picture for a caption {to_picture:.1%}"
            with torch.no_grad():
                pictures, texts = model.encode_image(images), model.encode_text(ids)
                if things == 1:
                    wheres = ("on grass by day", "on sand at sunset", "in the snow at night", "at sea by day")
                    by_colour = [[f"a {colour} {kind} {where}" for kind in KINDS for where in wheres] for colour in COLOURS]
                    by_kind = [[f"a {colour} {kind} {where}" for colour in COLOURS for where in wheres] for kind in KINDS]
                    for name, sentences in (("kind", by_kind), ("colour", by_colour)):
                        classes = torch.stack([model.encode_text(tokenizer(each)).mean(0) for each in sentences])
                        right = (pictures @ torch.nn.functional.normalize(classes, dim=1).T).argmax(1) == getattr(scenes, name)[:, 0]
                        line += f", {name} {right.float().mean():.1%}"
                else:
                    different = (scenes.kind[:, 0] != scenes.kind[:, 1]) & (scenes.colour[:, 0] != scenes.colour[:, 1])
                    for what, fields in (("colours", ("colour",)), ("sides", ("colour", "kind"))):
                        swapped = dataclasses.replace(scenes, **{field: getattr(scenes, field).flip(1) for field in fields})
                        others = model.encode_text(tokenizer(captions(swapped, seed=FRESH)))
                        prefers = (pictures * texts).sum(1) > (pictures * others).sum(1)
                        line += f", prefers its caption to the one with {what} swapped {prefers[different].float().mean():.1%}"
            print(line, flush=True)


def report_prompts(what: str, scenes: Scenes, asked: list[str], pictures: torch.Tensor, seconds: float) -> None:
    """One line about pictures of fresh scenes that were asked for: caption accuracy, what of two things is right, Fréchet distance."""
    count, two = len(asked), bool((scenes.kind[:, 1] >= 0).all())
    right = caption_accuracy(pictures, asked)
    line = f"{what}, {2 if two else 1} thing{'s' * two}: "
    line += f"everything right in {right:.1%} ± {(right * (1 - right) / count) ** 0.5:.1%}, {seconds:.3f} s a picture"
    if two:
        parts = two_things(asked, read_attributes(pictures))
        line += ", " + ", ".join(f"{name} {hits / count:.1%}" for name, hits in parts.items())
    if "valid" in what:
        line += f", Fréchet distance {frechet_distance(pictures, render(scenes, pictures.shape[-1])):.2f}"
    print(line, flush=True)


def measure_text(count: int) -> None:
    """Caption accuracy for several guidance scales, with one thing and with two; what of two things is right; Fréchet distance."""
    denoiser, encode = load_text(device="cpu")
    empty = encode([""])
    for scale in (1, 2, 3, 5, 7.5):
        guided = Guided(denoiser, scale, {"context": empty})
        for split in ("valid", "novel"):
            for things in (1, 2):
                scenes = sample_scenes(count, split=split, seed=FRESH, things=things)
                asked = captions(scenes, seed=FRESH)
                start, drawn = time.perf_counter(), []
                for i in range(0, count, 100):
                    context = encode(asked[i : i + 100])
                    drawn.append(sample(guided, (len(context), 3, 32, 32), seed=FRESH + i, progress=False, context=context))
                seconds, pictures = (time.perf_counter() - start) / count, torch.cat(drawn)
                report_prompts(f"scale {scale:g}, {split}", scenes, asked, pictures, seconds)


def measure_vae(count: int) -> None:
    """PSNR of fresh postcards that come back, from latents with noise too and in bfloat16; what the probe reads in them; bits."""
    model, probe = load_vae(device="cpu"), load_probe()
    for split in ("valid", "novel"):
        for things in (1, 2):
            scenes = sample_scenes(count, split=split, seed=FRESH, things=things)
            images = render(scenes, 64)
            clouds = [model.posterior(part) for part in images.split(50)]
            latents = model.config.scaling_factor * torch.cat([cloud.mode() for cloud in clouds])
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
            line, back = f"{split}, {things} thing{'s' * (things == 2)}:", {}
            for name, given in (("back", latents), ("with noise 0.1", latents + 0.1 * noise), ("with noise 0.3", latents + 0.3 * noise)):
                back[name] = torch.cat([model.decode(part) for part in given.split(50)]).clamp(-1, 1)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                back["in bfloat16"] = torch.cat([model.decode(model.encode(part)).float() for part in images.split(50)]).clamp(-1, 1)
            for name, pictures in back.items():
                quality = psnr(images, pictures)
                line += f" {name} {quality.mean():.2f} dB (least {quality.min():.1f}),"
            before, after = (probe_accuracy(probe, scenes, pictures)["all"] for pictures in (images, back["back"]))
            bits = torch.cat([cloud.kl().sum((1, 2, 3)) for cloud in clouds]).mean() / math.log(2)
            print(f"{line} probe: all right in {after:.1%} (originals {before:.1%}), {bits:.0f} bits, std {latents.std():.3f}", flush=True)


def measure_postcards(count: int) -> None:
    """Caption accuracy of the latent model for several guidance scales, what of two things is right, and the time of a picture."""
    pipe = StableDiffusion.load("postcards", device="cpu")
    for scale in (1, 2, 3, 5, 7.5):
        for things in (1, 2):
            for split in ("valid", "novel"):
                scenes = sample_scenes(count, split=split, seed=FRESH, things=things)
                asked = list(captions(scenes, seed=FRESH))
                start, drawn = time.perf_counter(), []
                for i in range(0, count, 128):
                    latents = pipe.sample(asked[i : i + 128], guidance=scale, seed=FRESH + i, progress=False)
                    drawn.append(pipe.decode(latents))
                seconds, pictures = (time.perf_counter() - start) / count, torch.cat(drawn)
                report_prompts(f"scale {scale:g}, {split}", scenes, asked, pictures, seconds)


MEASURES = {
    "probe": measure_probe,
    "segmenter": measure_segmenter,
    "ddpm": measure_ddpm,
    "class": measure_class,
    "clip": measure_clip,
    "text": measure_text,
    "vae": measure_vae,
    "postcards": measure_postcards,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(MEASURES), metavar="NAME", help=", ".join(MEASURES))
    parser.add_argument("--count", type=int, default=500)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fast dtype {fast_dtype('cpu')}")
    for name in options.names:
        print(f"== {name}")
        MEASURES[name](options.count)
