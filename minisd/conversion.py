"""Between the two layouts: a diffusers folder or a single file, written from either, tensor by tensor and bit for bit."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minisd.checkpoints import OUR_CONFIG, OUR_FILE, OUR_GUIDANCE, OUR_SCHEDULER, Checkpoint, Part, open_checkpoint
from minisd.config import FAMILIES, family_of, text_settings, unet_settings, vae_settings
from minisd.layouts import TEXT, TEXT_2, UNET, VAE, Place, diffusers_places, ldm_places
from minisd.loading import find_source, load_tokenizers, probe_prediction, published_scheduler, variant_order
from minisd.noise import check_prediction_type
from minisd.pipeline import StableDiffusion
from minisd.tensor_files import Entry, InMemory, write_safetensors
from minisd.tokenizer import Tokenizer

LIBRARIES = {UNET: ["diffusers", "UNet2DConditionModel"], VAE: ["diffusers", "AutoencoderKL"]}
SETTINGS: dict[str, Callable[[Any], dict]] = {UNET: unet_settings, VAE: vae_settings, TEXT: text_settings, TEXT_2: text_settings}

__all__ = [
    "LIBRARIES",
    "SETTINGS",
    "convert",
    "save_pipeline",
    "stored_shape",
    "stored_dtype",
    "write_single",
    "scheduler_for",
    "write_folder",
    "write_part",
    "model_index",
    "write_json",
]


def convert(
    source: str | Path,
    target: str | Path,
    dtype: torch.dtype | None = None,
    prediction_type: str | None = None,
    variant: str | None = None,
    ema: bool = False,
    tokenizer: str | Path = "clip",
) -> Checkpoint:
    """Write a Stable Diffusion anew: as a single file if `target` ends in .safetensors, else as a folder that diffusers opens.

    `dtype`: default: each tensor keeps its own, and all bits. The other arguments are those of `minisd.loading.load`. What the source
    holds besides its models is left out; the result says so (`ignored`). The target appears when it is complete; a file of that name is
    replaced, a folder is not. Raises as `load` does, and `FileExistsError`.
    """
    if prediction_type is not None:
        check_prediction_type(prediction_type)
    target, variants = Path(target), variant_order(variant, dtype)
    checkpoint = open_checkpoint(find_source(source, variants), variants, ema)
    prediction_type = prediction_type or checkpoint.prediction_type or probe_prediction(checkpoint.parts[UNET].load())[0]
    if target.suffix == ".safetensors":
        write_single(checkpoint, target, dtype, prediction_type)
    else:
        write_folder(checkpoint, target, dtype, prediction_type, load_tokenizers(checkpoint, tokenizer))
    return checkpoint


def save_pipeline(pipe: StableDiffusion, target: str | Path) -> Path:
    """Write a model from memory: as a single file if `target` ends in .safetensors, else as a folder that diffusers opens.

    Each tensor keeps its dtype. Raises `FileExistsError` where the folder holds a model already.
    """
    target = Path(target)
    named = zip((TEXT, TEXT_2), pipe.text_encoders)
    models = {UNET: pipe.unet, VAE: pipe.vae, **dict(named)}
    parts = {
        name: Part(name, model.config, InMemory(model.state_dict()), f"this {name}").locate(diffusers_places(name))
        for name, model in models.items()
    }
    family, predicts = FAMILIES[family_of(pipe.unet.config)], pipe.scheduler.prediction_type
    more = {"scheduler": pipe.scheduler_config, "zero_negative": pipe.zero_negative, "guidance": pipe.guidance}
    checkpoint = Checkpoint(target, "diffusers", family, parts, predicts, **more)
    if target.suffix == ".safetensors":
        write_single(checkpoint, target, None, predicts)
    else:
        write_folder(checkpoint, target, None, predicts, pipe.tokenizers)
    return target


def stored_shape(part: Part, name: str, ldm: bool) -> tuple[int, ...]:
    """The shape that files keep a tensor in: where the original has a 1x1 convolution, two ones at the end."""
    shape = tuple(part.shapes[name])
    if len(shape) == 2 and ".attentions." in name:
        projection = part.name == UNET and name.endswith(("proj_in.weight", "proj_out.weight")) and not part.config.linear_projection
        if projection or (part.name == VAE and ldm):
            return (*shape, 1, 1)
    return shape


def stored_dtype(part: Part, name: str, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to write a tensor in: the one asked for, or its own."""
    return dtype or part.file.entries[part.places[name].name].dtype


def write_single(checkpoint: Checkpoint, path: Path, dtype: torch.dtype | None, prediction_type: str) -> None:
    """One file in the original layout. Sizes, schedule and what it predicts go into the metadata: the layout has no place for them."""
    key = checkpoint.key
    unet, vae = checkpoint.parts[UNET].config, checkpoint.parts[VAE].config
    sources: dict[str, list[tuple[Part, str, Place]]] = {}
    for part in checkpoint.parts.values():
        attends = [depth > 0 for depth in unet.depths]
        places = ldm_places(part.name, key, unet.layers_per_block, attends, len(vae.block_out_channels))
        for name in part.shapes:
            place = places(name)[0]
            sources.setdefault(place.name, []).append((part, name, place))
    entries = {}
    for written, pieces in sources.items():
        part, name, place = pieces[0]
        shape = stored_shape(part, name, ldm=True)
        shape = (len(pieces) * shape[0], *shape[1:])
        entries[written] = Entry(shape[::-1] if place.transposed else shape, stored_dtype(part, name, dtype))

    def read(written: str) -> torch.Tensor:
        pieces = sorted(sources[written], key=lambda piece: piece[2].third or 0)  # queries, keys, values
        tensors = [part.tensor(name, entries[written].dtype) for part, name, _ in pieces]
        tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return (tensor.T if pieces[0][2].transposed else tensor).reshape(entries[written].shape)

    metadata = {"modelspec.prediction_type": "v" if prediction_type == "v_prediction" else prediction_type}
    metadata[OUR_CONFIG] = json.dumps({part.name: SETTINGS[part.name](part.config) for part in checkpoint.parts.values()})
    metadata[OUR_SCHEDULER] = json.dumps(scheduler_for(checkpoint, prediction_type))
    metadata[OUR_GUIDANCE] = str(checkpoint.guidance)
    write_safetensors(path, entries, read, metadata)


def scheduler_for(checkpoint: Checkpoint, prediction_type: str) -> dict[str, Any]:
    """What scheduler_config.json shall say: what the source says, or else what the published folders of its family do."""
    return (checkpoint.scheduler or published_scheduler(checkpoint.family, prediction_type)) | {"prediction_type": prediction_type}


def write_folder(
    checkpoint: Checkpoint, target: Path, dtype: torch.dtype | None, prediction_type: str, tokenizers: Sequence[Tokenizer]
) -> None:
    """A folder in the layout of diffusers, made beside its place, then moved there; what makes it a model, model_index.json, comes last."""
    scheduler = scheduler_for(checkpoint, prediction_type)
    settings = {"scheduler/scheduler_config.json": scheduler, "model_index.json": model_index(checkpoint, scheduler["_class_name"])}
    if checkpoint.guidance != checkpoint.family.guidance:
        settings = {OUR_FILE: {"guidance": checkpoint.guidance}} | settings
    folders = [*checkpoint.parts, *("tokenizer", "tokenizer_2")[: len(tokenizers)], "scheduler"]
    if target.exists() and (not target.is_dir() or any((target / name).exists() for name in (*folders, *settings))):
        raise FileExistsError(f"{str(target)!r} holds a model already, or is a file; name a new folder.")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        for part in checkpoint.parts.values():
            write_part(part, temporary / part.name, dtype)
        for name, each in zip(("tokenizer", "tokenizer_2"), tokenizers):
            each.save(temporary / name)
        for name, content in settings.items():
            write_json(temporary / name, content)
        target.mkdir(parents=True, exist_ok=True)
        for name in [*folders, *(each for each in settings if "/" not in each)]:
            os.replace(temporary / name, target / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_part(part: Part, folder: Path, dtype: torch.dtype | None) -> None:
    """One model: config.json and its weights."""
    write_json(folder / "config.json", SETTINGS[part.name](part.config))
    entries = {name: Entry(stored_shape(part, name, ldm=False), stored_dtype(part, name, dtype)) for name in part.shapes}

    def read(name: str) -> torch.Tensor:
        return part.tensor(name, entries[name].dtype).reshape(entries[name].shape)

    base = "diffusion_pytorch_model" if part.name in (UNET, VAE) else "model"
    write_safetensors(folder / f"{base}.safetensors", entries, read)


def model_index(checkpoint: Checkpoint, scheduler: str) -> dict[str, Any]:
    """model_index.json: which class of which library opens which folder."""
    large = TEXT_2 in checkpoint.parts
    kind = f"StableDiffusion{'XL' * large}{'Inpaint' * bool(checkpoint.task)}Pipeline"
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": "0.32.0", **LIBRARIES, "scheduler": ["diffusers", scheduler]}
    index |= {TEXT: ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    if large:
        index |= {TEXT_2: ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2": ["transformers", "CLIPTokenizer"]}
        return index | {"force_zeros_for_empty_prompt": checkpoint.zero_negative}
    return index | {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write settings as people read them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
