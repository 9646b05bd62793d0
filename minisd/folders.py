"""The files of a diffusers folder: which of the many names its weights have, and what else a model needs."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

from minisd.layouts import PARTS, TEXT, TEXT_2

Variants = Sequence[str | None]  # in the order in which they are tried; None: the plain names
PLAIN_FIRST: Variants = (None, "fp16")
# What a model needs besides the weights of its parts, as far as it has them. Safety checkers and the like stay where they are.
SMALL_FILES = ["model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in PARTS)]
SMALL_FILES += [
    f"{folder}/{name}"
    for folder in ("tokenizer", "tokenizer_2")
    for name in ("merges.txt", "vocab.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
]


def weight_names(part: str, variants: Variants = PLAIN_FIRST) -> list[str]:
    """The names that a part's weights may have in its folder, in the order in which they are tried: safetensors first."""
    base, old = ("model", "pytorch_model") if part in (TEXT, TEXT_2) else ("diffusion_pytorch_model",) * 2
    names = []
    for stem, ending in ((base, "safetensors"), (old, "bin")):
        for variant in variants:
            dotted = f".{variant}" if variant else ""
            names += [f"{stem}{dotted}.{ending}", f"{stem}.{ending}.index{dotted}.json"]
            names += [f"{stem}.{ending}{dotted}.index.json"] * bool(variant)  # as older versions of diffusers called it
    return names


def weight_file(folder: Path, part: str, variants: Variants = PLAIN_FIRST) -> Path:
    """The file, or the index of shards, that holds a part's weights. Raises `FileNotFoundError` in one sentence if there is none."""
    for name in weight_names(part, variants):
        if (folder / part / name).is_file():
            return folder / part / name
    there = ", ".join(sorted(path.name for path in (folder / part).iterdir())) or "nothing"
    wanted = weight_names(part, variants)[0]
    raise FileNotFoundError(f"no weights in {folder.name}/{part}: it has {there}, and neither {wanted} nor another known name.")


def needed_files(listing: Collection[str], variants: Variants = PLAIN_FIRST) -> list[str]:
    """Of all files of a repository those that loading its model needs: one set of weights for each part, and the small files."""
    needed = [name for name in SMALL_FILES if name in listing]
    for part in PARTS:
        chosen = next((name for name in weight_names(part, variants) if f"{part}/{name}" in listing), None)
        if chosen is None:
            continue
        needed.append(f"{part}/{chosen}")
        if chosen.endswith(".json"):
            needed += [name for name in listing if is_shard(name, part, chosen)]
    return needed


def is_shard(name: str, part: str, index: str) -> bool:
    """Whether a file is one of those that the index is about: `model-00001-of-00002.safetensors`, with the index's variant if any."""
    path = PurePosixPath(name)
    return path.parent.as_posix() == part and "-of-" in path.name and words(path.name) == words(index)


def words(name: str) -> set[str]:
    """The parts of a name of weights, wherever they stand, without numbers: {"model", "fp16", "safetensors"}."""
    return {word for word in re.split("[.-]", name) if not word.isdigit() and word not in ("of", "index", "json")}
