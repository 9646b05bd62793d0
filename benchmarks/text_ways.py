"""Four ways to let a text into the UNet, on the same data and budget: python benchmarks/text_ways.py --out FOLDER (80 minutes of one core).

added      the text's one vector, through a linear layer, is added to the time embedding, as in GLIDE
token      the one vector is a single token that cross-attention reads
planes     the one vector is concatenated to the input: each of its numbers fills a plane of its own
sequence   cross-attention over a vector for each token: the course's model
Two more tell who does the work; they are trained only when asked for by name:
words      cross-attention over plain word vectors: what enters CLIP's text encoder, before any layer of it has run
learned    the same from random vectors, which learn together with the UNet

All start from the class model with its doors open and have the same spatial transformers. `added` and `planes` give these one constant
token that says nothing. What differs in size is the first layer that the vector meets. Each finished run is a line in
FOLDER/results.jsonl; a stopped command goes on when it is given again. `--table` prints the lines that are there.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from minisd.clip import load_clip
from minisd.ddpm import Denoiser, Folded
from minisd.guidance import Guided
from minisd.metrics import read_attributes
from minisd.noise import NoiseSchedule
from minisd.postcards import COLOURS, KINDS, caption_matches, captions, parse_caption, sample_scenes
from minisd.samplers import sample
from minisd.text_to_image import TEXT_CONFIG, load_pairs, open_doors, text_loss
from minisd.text_ways import Added, Planes, Pooled
from minisd.train import save_atomically, train

FRESH = 555_000  # seeds of the prompts that are asked and of the noise; no training uses them


class Words(nn.Module):
    """Plain word vectors in the place of the sequence: token and position, before any layer. (B, L, D)"""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: torch.Tensor):
        features = self.encoder(ids)
        words = features.hidden_states[0]
        return features._replace(sequence=nn.functional.layer_norm(words.float(), words.shape[-1:]))


class TokenIds(nn.Module):
    """No encoder at all: hands the ids on, (B, L, 1), to a model that has its own vectors for them."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: torch.Tensor):
        return self.encoder(ids)._replace(sequence=ids[:, :, None].float())


class Learned(nn.Module):
    """The model's own vector for each token and each position, read through cross-attention."""

    def __init__(self, net: Folded, width: int, tokens: int, length: int):
        super().__init__()
        self.net = net
        self.token = nn.Embedding(tokens, width)
        self.position = nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        ids = context[:, :, 0].long()
        return self.net(x, timesteps, context=self.norm(self.token(ids) + self.position.weight[: ids.shape[1]]))


WAYS = {
    "added": (Pooled, lambda net, clip: Added(net, clip.projection_dim)),
    "token": (Pooled, lambda net, clip: net),
    "planes": (Pooled, lambda net, clip: Planes(net, clip.projection_dim)),
    "sequence": (nn.Identity, lambda net, clip: net),
    "words": (Words, lambda net, clip: net),
    "learned": (TokenIds, lambda net, clip: Learned(net, clip.hidden_size, clip.vocab_size, clip.max_position_embeddings)),
}


def two_things(captions_asked: Sequence[str], seen: dict[str, torch.Tensor]) -> dict[str, int]:
    """How often each thing that a caption of two things says is true: counts over the pictures.

    kinds: exactly two things, of the two kinds asked for. colours there: besides, the two colours asked for, on whichever.
    colours: each thing has its own colour. sides: the kinds asked for stand on the sides asked for (of one kind twice: the colours do).
    """
    counts = dict.fromkeys(("kinds", "colours there", "colours", "sides"), 0)
    for i, caption in enumerate(captions_asked):
        stated = parse_caption(caption)
        asked = [(stated["things"][j]["kind"], stated["things"][j]["colour"]) for j in stated["order"]]  # from left to right
        found = [(KINDS[k], COLOURS[c]) for k, c in zip(seen["kind"][i], seen["colour"][i]) if k >= 0]
        if sorted(kind for kind, _ in found) != sorted(kind for kind, _ in asked):
            continue
        counts["kinds"] += 1
        counts["colours there"] += sorted(colour for _, colour in found) == sorted(colour for _, colour in asked)
        counts["colours"] += sorted(found) == sorted(asked)
        kinds = [[kind for kind, _ in things] for things in (asked, found)]
        counts["sides"] += found == asked if kinds[0][0] == kinds[0][1] else kinds[0] == kinds[1]
    return counts


@torch.no_grad()
def measure(denoiser: Denoiser, encode, count: int, guidance: float) -> dict[str, dict[str, float]]:
    """Counts of what is right in `count` pictures for fresh captions: one and two things, known and novel pairs."""
    empty, results = encode([""]), {}
    for split in ("valid", "novel"):
        for things in (1, 2):
            scenes = sample_scenes(count, split=split, seed=FRESH, things=things)
            asked = captions(scenes, seed=FRESH)
            guided = Guided(denoiser, guidance, {"context": empty})
            pictures = [
                sample(guided, (len(part), 3, 32, 32), seed=FRESH + i, progress=False, context=encode(asked[64 * i : 64 * i + 64]))
                for i, part in enumerate(torch.arange(count).split(64))
            ]
            seen = read_attributes(torch.cat(pictures).cpu())
            right = int(caption_matches(asked, seen).sum())
            results[f"{things} {split}"] = {"count": count, "all": right} | (two_things(asked, seen) if things == 2 else {})
    return results


def run(way: str, seed: int, data: tuple, options: argparse.Namespace) -> dict:
    """Train one way and measure it."""
    images, texts = data
    clip, tokenizer = load_clip(options.clip, options.device)
    wrap, build = WAYS[way]
    reader = (clip.text if wrap is nn.Identity else wrap(clip.text)).eval()
    ids = tokenizer([text for phrasings in texts for text in phrasings]).reshape(len(images), -1, tokenizer.length)
    config = TEXT_CONFIG | {"context_dim": clip.text.config.hidden_size}
    torch.manual_seed(seed)
    model = build(open_doors(config, options.start), clip.text.config)
    loss_fn = text_loss(NoiseSchedule(config["schedule"]), config["prediction_type"], reader, tokenizer([""]))
    folder = options.out / f"{way}-{seed}"
    trained = train(
        model, loss_fn, (images, ids), steps=options.steps, batch_size=32, lr=options.lr, optimizer="muon", seed=seed,
        device=options.device, out=folder, resume=True, progress=options.progress,
    )  # fmt: skip
    denoiser = Denoiser(trained.model, NoiseSchedule(config["schedule"]), config["prediction_type"], clip=1.0, size=32)

    def encode(prompts: Sequence[str]) -> torch.Tensor:
        with torch.no_grad():
            return reader(tokenizer(prompts).to(denoiser.device)).sequence

    result = {"way": way, "seed": seed, "steps": options.steps, "lr": options.lr, "pictures": len(images)}
    result["parameters"] = sum(p.numel() for p in trained.model.parameters())
    result["loss"] = sum(trained.losses[-200:]) / len(trained.losses[-200:])
    result["seconds"] = round(trained.seconds, 1)  # of the last piece, if the run was stopped in between
    return result | {"right": measure(denoiser, encode, options.count, options.guidance)}


def read_results(folder: Path) -> list[dict]:
    """The finished runs of a folder."""
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def share(hits: int, count: int) -> tuple[float, float]:
    """A share and its standard error."""
    p = hits / count
    return p, math.sqrt(p * (1 - p) / count)


def print_table(results: list[dict]) -> None:
    """For each way: every share over all its seeds, with the standard error, and the single seeds behind it."""
    columns = [("1 valid", "all"), ("1 novel", "all"), ("2 valid", "all"), ("2 novel", "all")]
    columns += [("2 valid", what) for what in ("kinds", "colours there", "colours", "sides")]
    for way in [name for name in WAYS if any(result["way"] == name for result in results)]:
        runs = [result for result in results if result["way"] == way]
        steps = ", ".join(sorted({str(result["steps"]) for result in runs}))
        print(f"{way}: {len(runs)} seeds, {steps} steps, {runs[0]['parameters'] / 1e6:.2f} M parameters")
        for which, what in columns:
            hits, counts = [result["right"][which][what] for result in runs], [result["right"][which]["count"] for result in runs]
            p, error = share(sum(hits), sum(counts))
            each = " ".join(f"{100 * hit / count:.1f}" for hit, count in zip(hits, counts))
            print(f"    {which:8} {what:14} {100 * p:5.1f} % ± {100 * error:.1f}    each seed: {each}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["added", "token", "planes", "sequence"])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and results.jsonl")
    parser.add_argument("--clip", default="clip", help="name or folder of the CLIP (default: the shipped one)")
    parser.add_argument("--start", default="class", help="name or folder of the class model (default: the shipped one)")
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--count", type=int, default=256, help="pictures for each of the four shares")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--device", default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--table", action="store_true", help="only print the finished runs")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if not options.table:
        data = None
        for seed in options.seeds:  # all ways with one seed first, so that a stopped experiment can be read too
            for way in options.ways:
                results = read_results(options.out)
                if any((one["way"], one["seed"], one["steps"]) == (way, seed, options.steps) for one in results):
                    continue
                data = load_pairs(options.pictures) if data is None else data
                results.append(run(way, seed, data, options))
                lines = "".join(json.dumps(one) + "\n" for one in results)
                save_atomically(lambda path, lines=lines: path.write_text(lines), options.out / "results.jsonl")
                print(json.dumps(results[-1]), flush=True)
    print_table(read_results(options.out))


if __name__ == "__main__":
    main()
