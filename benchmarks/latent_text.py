"""What a text encoder tells the UNet of lesson 10, and what a UNet makes of it.

    python benchmarks/latent_text.py clip                           lesson 07's CLIP
    python benchmarks/latent_text.py FOLDER/training/clip           the one that `minisd train postcards --out FOLDER` trained
    python benchmarks/latent_text.py clip --layers 3 --steps 1000   and a UNet trained for 1,000 steps with its last layer
    python benchmarks/latent_text.py ideal --steps 1000             no CLIP: vectors learned for what is in the scene itself
    python benchmarks/latent_text.py ideal --steps 1000 --centre 0.5   the same, with the timesteps of the models on pixels

Four measurements. *Twins*: how often CLIP finds its own sentence nearer to the picture than the same with exchanged colours, or sides.
*Own*: of the vectors at the eight kinds, the share of their variance that is due to which word it is, and not to its sentence, by layer.
*Reader*: a small network with one cross-attention learns, from sentences of the split `train`, to say kind and colour of each thing;
how often is it right for new sentences, and for new pairs? *UNet*: `minisd.latent_diffusion.measure` after so many steps.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from minisd.clip import CLIP, load_clip
from minisd.conditional_unet import ConditionalUNet, ConditionalUNetConfig
from minisd.ddpm import Denoiser, middle_timesteps
from minisd.drawing import render
from minisd.guidance import Guided
from minisd.latent_diffusion import (
    POSTCARDS_CONFIG,
    allowed,
    encode_pictures,
    join,
    latent_timesteps,
    measure,
    text_part,
    train_latent,
)
from minisd.metrics import caption_accuracy
from minisd.postcards import COLOURS, KINDS, attributes, captions, sample_scenes
from minisd.samplers import dpmpp_2m
from minisd.scenes import Scenes
from minisd.schedulers import read_scheduler
from minisd.text_encoder import TextEncoder
from minisd.text_to_image import load_pairs, text_loss
from minisd.tokenizer import Tokenizer
from minisd.train import train
from minisd.vae import AutoencoderKL
from minisd.vae_training import load_vae

SPLITS = [(split, things) for split in ("valid", "novel") for things in (1, 2)]


@torch.no_grad()
def twins(model: CLIP, tokenizer: Tokenizer, count: int) -> dict[str, float]:
    """The share of fresh pictures with two things for which CLIP prefers its own sentence to the exchanged one."""
    scenes = sample_scenes(count, split="valid", seed=99, things=2)
    scenes = scenes[allowed(scenes)]
    pictures, own = model.encode_image(render(scenes, 32)), model.encode_text(tokenizer(captions(scenes, seed=9)))
    shares = {}
    for what, names in (("colours", ["colour"]), ("sides", ["kind", "colour"])):
        other = replace(scenes, **{name: getattr(scenes, name).flip(1) for name in names})
        theirs = model.encode_text(tokenizer(captions(other, seed=9)))
        shares[what] = ((pictures * own).sum(1) > (pictures * theirs).sum(1)).float().mean().item()
    return shares


@torch.no_grad()
def own_share(encoder: TextEncoder, tokenizer: Tokenizer, count: int = 2_000) -> float:
    """Of the vectors at the eight kinds in `count` sentences: the share of their variance that lies between words, not within one."""
    ids = tokenizer(captions(sample_scenes(count, split="valid", seed=34, things=1), seed=34))
    vectors = torch.cat([encoder(part).sequence for part in ids.split(200)])  # (N, L, 128)
    groups = [vectors[ids == tokenizer.encode(kind)[0]] for kind in KINDS]  # (about N / 8, 128) each
    everything = torch.cat(groups)
    within = sum((group - group.mean(0)).square().sum() for group in groups)
    return 1 - (within / (everything - everything.mean(0)).square().sum()).item()


class Reader(nn.Module):
    """Two questions, "the first thing?" and "the second?", asked of a text's vectors (B, L, 128): logits (B, 2, kinds + colours + 2)."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.questions = nn.Parameter(0.1 * torch.randn(2, width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, width))
        self.answers = nn.Linear(width, len(KINDS) + len(COLOURS) + 2)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        vectors = self.norm(vectors)
        heard = self.attention(self.questions.expand(len(vectors), -1, -1), vectors, vectors, need_weights=False)[0]
        return self.answers(heard + self.mlp(heard))


def reader(encoder: TextEncoder, tokenizer: Tokenizer, count: int, steps: int = 500) -> dict[str, float]:
    """How often kinds and colours of all things are read off right, by split and number of things."""

    @torch.no_grad()
    def told(scenes: Scenes) -> tuple[torch.Tensor, torch.Tensor]:
        ids = tokenizer(captions(scenes, seed=3))
        vectors = torch.cat([encoder(part).sequence for part in ids.split(500)])  # (N, L, 128)
        return vectors, torch.stack([scenes.kind + 1, scenes.colour + 1], 2)  # (N, 2 things, kind and colour); 0: no such thing

    parts = [told(sample_scenes(5 * count, split="train", seed=4_000 + things, things=things)) for things in (1, 2)]
    vectors, truth = (torch.cat(each) for each in zip(*parts))
    torch.manual_seed(0)
    model = Reader(vectors.shape[2])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    kinds = len(KINDS) + 1
    for _ in range(steps):
        rows = torch.randint(len(truth), (256,))
        logits = model(vectors[rows]).flatten(0, 1)
        kind, colour = truth[rows].flatten(0, 1).unbind(1)
        loss = F.cross_entropy(logits[:, :kinds], kind) + F.cross_entropy(logits[:, kinds:], colour)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    shares = {}
    for split, things in SPLITS:
        vectors, truth = told(sample_scenes(count, split=split, seed=5_000 + things, things=things))
        with torch.no_grad():
            logits = model(vectors)
        found = torch.stack([logits[..., :kinds].argmax(2), logits[..., kinds:].argmax(2)], 2)
        shares[f"{split} {things}"] = (found == truth).flatten(1).all(1).float().mean().item()
    return shares


class Ideal(nn.Module):
    """No text: a learned vector for each sky, ground and light, and for kind and colour at each of the three places."""

    SIZES = (3, 4, 3, *[len(KINDS) + 1] * 3, *[len(COLOURS) + 1] * 3)

    def __init__(self, width: int = 128):
        super().__init__()
        self.vectors = nn.Embedding(sum(self.SIZES) + 1, width)  # the last stands for "nothing was said"

    @classmethod
    def codes(cls, scenes: Scenes) -> torch.Tensor:
        """(N, 9) ids."""
        seen = attributes(scenes)
        columns = [seen["sky"], seen["ground"], seen["light"], *(seen["kind"] + 1).unbind(1), *(seen["colour"] + 1).unbind(1)]
        starts = torch.tensor(cls.SIZES).cumsum(0) - torch.tensor(cls.SIZES)
        return torch.stack(columns, 1) + starts

    @property
    def nothing(self) -> torch.Tensor:
        return torch.full((1, len(self.SIZES)), sum(self.SIZES))

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sequence=self.vectors(ids))


class Both(nn.Module):
    """A UNet and the vectors that are trained along with it; called like the UNet, with ids in the context's place."""

    def __init__(self, config: ConditionalUNetConfig):
        super().__init__()
        self.unet, self.text = ConditionalUNet(config), Ideal(config.cross_attention_dim)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.unet(x, timesteps, self.text(context).sequence)


def ideal(
    latents: torch.Tensor, vae: AutoencoderKL, steps: int, count: int, batch_size: int, pick: Callable, guidance: float
) -> dict[str, float]:
    """`measure` for a UNet that reads ideal vectors and was trained with the timesteps that `pick` picks."""
    half = len(latents) // 2  # as `load_pairs` draws them
    codes = torch.cat([Ideal.codes(sample_scenes(half, split="train", seed=things - 1, things=things)) for things in (1, 2)])
    settings = read_scheduler(POSTCARDS_CONFIG["scheduler"])
    torch.manual_seed(0)
    model = Both(ConditionalUNetConfig(**POSTCARDS_CONFIG["unet"]))

    def as_they_are(ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sequence=ids)  # `Both` looks the vectors up itself

    loss_fn = text_loss(settings.schedule, settings.prediction_type, as_they_are, model.text.nothing, pick_timesteps=pick)
    options = {"batch_size": batch_size, "lr": 3e-3, "optimizer": "muon", "warmup": 50, "ema_decay": 0.998}
    model = train(model, loss_fn, (latents, codes[:, None]), steps=steps, **options).model.eval()
    shares = {}
    for split, things in SPLITS:
        scenes = sample_scenes(count, split=split, seed=1_000 + things, things=things)
        denoiser = Denoiser(model, settings.schedule, settings.prediction_type)
        guided = Guided(denoiser, guidance, {"context": model.text.nothing})
        noise = torch.randn(count, *latents.shape[1:], generator=torch.Generator().manual_seed(1_000))
        with torch.no_grad():
            drawn = dpmpp_2m(guided, noise, settings.path(25), progress=False, context=Ideal.codes(scenes))
            pictures = torch.cat([vae.decode(part) for part in drawn.split(64)])
        shares[f"{split} {things}"] = caption_accuracy(pictures.clamp(-1, 1), list(captions(scenes, seed=1_000)))
    return shares


def say(what: str, shares: dict[str, float]) -> None:
    print(f"{what:8}", "   ".join(f"{name} {share:6.1%}" for name, share in shares.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", nargs="?", default="clip", help="a CLIP, shipped or in a folder; or 'ideal' (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=POSTCARDS_CONFIG["text_layers"], help="of its text encoder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="of a UNet (default: none is trained)")
    parser.add_argument("--count", type=int, default=512, help="sentences for each share (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=20_000, help="that the UNet is trained on (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="of the UNet's training (default: %(default)s)")
    parser.add_argument("--centre", type=float, help="ideal: of the timesteps, t / T = sigmoid(centre) (default: as in `latent_timesteps`)")
    parser.add_argument("--guidance", type=float, default=POSTCARDS_CONFIG["guidance"], help="scale to draw with (default: %(default)s)")
    parser.add_argument("--vae", default="vae", help="an autoencoder, shipped or in a folder (default: %(default)s)")
    options = parser.parse_args()
    if options.clip == "ideal" and not options.steps:
        parser.error("ideal vectors are trained along with a UNet: say how long, with --steps.")
    if options.clip != "ideal" and options.centre is not None:
        parser.error("--centre is for ideal vectors.")
    if options.clip != "ideal":
        clip, tokenizer = load_clip(options.clip, "cpu")
        encoder = text_part(clip.text, options.layers)
        say("twins", twins(clip, tokenizer, options.count))
        layers = range(1, clip.text.config.num_hidden_layers + 1)
        say("own", {f"layer {layer}": own_share(text_part(clip.text, layer), tokenizer) for layer in layers})
        say("reader", reader(encoder, tokenizer, options.count))
    if options.steps:
        images, texts = load_pairs(options.pictures, size=64)
        vae = load_vae(options.vae, "cpu")
        latents = encode_pictures(vae, images)
        del images
        start = time.perf_counter()
        if options.clip == "ideal":
            pick = latent_timesteps if options.centre is None else partial(middle_timesteps, centre=options.centre)
            shares = ideal(latents, vae, options.steps, options.count, options.batch_size, pick, options.guidance)
        else:
            unet = train_latent(latents, texts, options.steps, encoder, tokenizer, device="cpu", batch_size=options.batch_size).model
            shares = measure(join(unet, vae, encoder, tokenizer, POSTCARDS_CONFIG | {"guidance": options.guidance}), options.count)
        say("UNet", shares)
        print(f"         {options.steps} steps and measuring took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
