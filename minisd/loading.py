"""A published Stable Diffusion, ready to draw: its models, tokenizers and schedule, from a folder, a file or the Hub."""

from pathlib import Path
from typing import Any

import torch

from minisd.checkpoints import Checkpoint, Part, open_checkpoint
from minisd.conditional_unet import ConditionalUNet
from minisd.config import FAMILIES, Family
from minisd.folders import PLAIN_FIRST, Variants
from minisd.latent_diffusion import load_shipped
from minisd.layouts import TEXT, TEXT_2, UNET, VAE
from minisd.noise import check_prediction_type
from minisd.pipeline import StableDiffusion
from minisd.schedulers import read_scheduler
from minisd.tokenizer import Tokenizer
from minisd.utils import default_device, fast_dtype
from minisd.weights import shipped_models

SMALL = 50_000_000  # a UNet with fewer parameters keeps its weights in float32 where no dtype is asked for

__all__ = [
    "SMALL",
    "PUBLISHED",
    "published_scheduler",
    "probe_prediction",
    "load",
    "variant_order",
    "find_source",
    "load_part",
    "load_tokenizers",
]


PUBLISHED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
PUBLISHED |= {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}


def published_scheduler(family: Family, prediction_type: str) -> dict[str, Any]:
    """What scheduler_config.json says in the published folders of a family; a single file has none."""
    if family is FAMILIES["sdxl"]:
        name = "EulerDiscreteScheduler"
    else:
        name = "DDIMScheduler" if prediction_type == "v_prediction" else "PNDMScheduler"
    steps = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    return {"_class_name": name, **PUBLISHED, **steps, "prediction_type": prediction_type}


@torch.no_grad()
def probe_prediction(unet: ConditionalUNet) -> tuple[str, float]:
    """("epsilon" or "v_prediction", the number that decided) for an SD 2, whose files do not say which.

    The UNet sees a grey latent at the noisiest timestep. One that predicts the noise answers about what it sees. One that predicts v
    answers about minus the clean picture, which is far from it: the mean of answer minus latent falls below -1.
    """
    parameter = unet.conv_in.weight
    x = parameter.new_full((1, unet.config.in_channels, 8, 8), 0.5)
    context = parameter.new_full((1, 2, unet.config.cross_attention_dim), 0.5)
    difference = (unet(x, 999, context) - x[:, : unet.config.out_channels]).float().mean().item()
    return ("v_prediction" if difference < -1 else "epsilon"), difference


def load(
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    prediction_type: str | None = None,
    variant: str | None = None,
    ema: bool = False,
    tokenizer: str | Path = "clip",
) -> StableDiffusion:
    """Load a Stable Diffusion 1.x, 2.x or XL: a diffusers folder, a single .safetensors or .ckpt, the id of a model on the Hub, or a
    model that came with the package ("postcards").

    `dtype`: of weights and products; default: the fastest of the device, float32 or bfloat16 (never float16, in which SDXL's
    autoencoder overflows); where the UNet has less than `SMALL` parameters, the weights stay float32 and only the products get faster.
    `prediction_type`: "epsilon" or "v_prediction"; default: what the source says, and where an SD 2 does not say, what
    `probe_prediction` finds. `variant`: of a folder's weights, such as "fp16"; default: the plain ones if they are there. `ema`: the
    UNet's averaged copy, where a single file holds one. `tokenizer`: CLIP's merges for single files, see `Tokenizer.load`.
    Raises `FileNotFoundError`, `ValueError` or `ConnectionError` with one sentence that says what is wrong and what was expected.
    """
    if prediction_type is not None:
        check_prediction_type(prediction_type)
    device = torch.device(device or default_device())
    if str(source) in shipped_models():
        return load_shipped(str(source), dtype, device)
    variants = variant_order(variant, dtype or fast_dtype(device))
    checkpoint = open_checkpoint(find_source(source, variants), variants, ema)
    products = dtype or fast_dtype(device)
    dtype = dtype or (torch.float32 if checkpoint.parts[UNET].parameters < SMALL else products)
    notes = list(checkpoint.notes)
    tokenizers = load_tokenizers(checkpoint, tokenizer)
    said = checkpoint.prediction_type or "epsilon"
    scheduler = dict(checkpoint.scheduler or published_scheduler(checkpoint.family, said))
    if note := read_scheduler(scheduler).note:
        notes.append(note)
    models = {name: load_part(part, dtype, device, notes) for name, part in checkpoint.parts.items()}
    if prediction_type is None and checkpoint.prediction_type is None:
        prediction_type, difference = probe_prediction(models[UNET])
        notes.append(f"the file does not say what its UNet predicts; a probe says {prediction_type} ({difference:.2f}; v is below -1).")
    if prediction_type is not None:
        scheduler["prediction_type"] = prediction_type
    encoders = tuple(models[name] for name in (TEXT, TEXT_2) if name in models)
    told = {"guidance": checkpoint.guidance, "zero_negative": checkpoint.zero_negative, "dtype": products}
    return StableDiffusion(models[UNET], models[VAE], encoders, tokenizers, scheduler, **told, checkpoint=checkpoint, notes=notes)


def variant_order(variant: str | None, dtype: torch.dtype | None) -> Variants:
    """Which variants of a folder's weights are tried, in which order: for float16 those stored so come first, they are half the size."""
    if variant is not None:
        return (variant,)
    return ("fp16", None) if dtype == torch.float16 else PLAIN_FIRST


def find_source(source: str | Path, variants: Variants) -> Path:
    """A path as it is; what looks like a name on the Hub, and is no path, is fetched from there."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    parts = str(source).split("/")
    if len(parts) == 2 and all(parts) and path.suffix not in (".safetensors", ".ckpt", ".pt", ".bin"):
        from minisd.hub import fetch_model  # imports much; only where it is needed

        return fetch_model(str(source), variants)
    raise FileNotFoundError(f"there is no file or folder {str(source)!r}, and it is no name on the Hub either (OWNER/NAME).")


def load_part(part: Part, dtype: torch.dtype, device: torch.device, notes: list[str]) -> torch.nn.Module:
    """One model in `dtype`; an autoencoder that float16 cannot hold, in float32."""
    if part.name == VAE and dtype == torch.float16 and part.config.scaling_factor == FAMILIES["sdxl"].scaling_factor:
        notes.append("the autoencoder of SDXL overflows in float16; it was loaded in float32.")
        dtype = torch.float32
    return part.load(dtype, device)


def load_tokenizers(checkpoint: Checkpoint, merges: str | Path = "clip") -> tuple[Tokenizer, ...]:
    """One tokenizer for each text encoder: a folder's own; for a single file CLIP's, with its family's padding."""
    tokenizers = []
    for name, pad in zip((TEXT, TEXT_2), checkpoint.family.pads):
        folder = checkpoint.path / name.replace("text_encoder", "tokenizer")
        length = checkpoint.parts[name].config.max_position_embeddings
        if checkpoint.layout == "diffusers":
            tokenizers.append(Tokenizer.load(folder))
        else:
            tokenizers.append(Tokenizer.load(merges, length, pad))
        size = checkpoint.parts[name].config.vocab_size
        if tokenizers[-1].vocab_size != size:
            raise ValueError(f"the tokenizer has {tokenizers[-1].vocab_size:,} symbols, and the {name} a vector for each of {size:,}.")
    return tuple(tokenizers)
