"""What a file of weights is: which family, which tensors may be left out and why, and what else people mistake for a Stable Diffusion."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from minisd.config import FAMILIES, ShapeOf
from minisd.layouts import LDM_TEXT, LDM_UNET, LDM_VAE, TEXT, TEXT_2, UNET, VAE, Place, Places
from minisd.tensor_files import TensorFile

# Why a tensor of a file may be left where it is.
RULES = {
    "schedule, computed anew": r"(betas|alphas_cumprod(_prev)?|sqrt_.+|log_one_minus_.+|posterior_.+|lvlb_weights|denoiser\.(log_)?sigmas)",
    "positions 0 to 76, never read: merged files hold corrupted ones": r".*embeddings\.position_ids",
    "averaged copy of the UNet (ema=True takes it)": r"model_ema\.diffusion_model.+",
    "bookkeeping of the averaging": r"model_ema\.(decay|num_updates)",
    "CLIP's temperature": r"(.*\.)?logit_scale",
    "projection that this family does not use": r"(cond_stage_model|conditioner\.embedders\.0)(\.\w+)?\.text_projection(\.weight)?",
    "last layer that SD 2 does not use": r"cond_stage_model\.model\.transformer\.resblocks\.23\..+",
    "causal mask, computed anew": r".*\.attn_mask",
    "marker": r"(v_pred|ztsnr)",
    "what only training needs": r"((first_stage_model\.)?loss|embedding_manager)\..+",
}
PLAIN_COPY = "plain copy of the UNet (ema=True takes the averaged one)"
# Files that hold something else, by what their names contain.
STRANGERS = {
    r"lora_|\.lora[._]|\.(lora_)?(up|down|alpha)$|\.hada_": "a LoRA: small changes to a model, not a model",
    r"control_model\.|controlnet_|input_hint_block": "a ControlNet, which steers a model and is none itself",
    r"double_blocks\.|single_blocks\.|single_transformer_blocks\.": "a Flux model",
    r"joint_blocks\.": "a Stable Diffusion 3 model",
    r"depth_model\.": "a depth-guided model",
    r"string_to_param|emb_params|clip_[lg]$": "a textual inversion: vectors for a few new words, not a model",
    r"edm_vpred\.": "a model trained by another rule (EDM), such as CosXL",
}
TASKS = {4: "", 9: "inpainting"}  # what a UNet with so many input channels is for
OTHER_TASKS = {8: "an instruct-pix2pix model", 5: "a depth-guided model", 7: "an upscaler"}

__all__ = [
    "RULES",
    "PLAIN_COPY",
    "STRANGERS",
    "TASKS",
    "OTHER_TASKS",
    "lookup",
    "find",
    "count_from",
    "sort_leftovers",
    "single_family",
    "lone_part",
    "check_parts",
    "said_prediction",
]


def lookup(file: TensorFile, places: Places) -> ShapeOf:
    """The shape of a tensor by its diffusers name, wherever it lies in the file."""

    def shape_of(name: str) -> tuple[int, ...] | None:
        place = find(file, places(name))
        if place is None:
            return None
        shape = file.entries[place.name].shape
        shape = shape[::-1] if place.transposed else shape
        return (shape[0] // 3, *shape[1:]) if place.third is not None else shape

    return shape_of


def find(file: TensorFile, places: list[Place]) -> Place | None:
    """The first of the places that the file has."""
    return next((place for place in places if place.name in file.entries), None)


def count_from(file: TensorFile, name: Callable[[int], str]) -> int:
    """How many of `name(0)`, `name(1)`, ... the file has, without a gap."""
    number = 0
    while name(number) in file.entries:
        number += 1
    return number


def sort_leftovers(names: set[str], where: str, ema: bool = False) -> dict[str, list[str]]:
    """The tensors that no part wants, by the rule that explains them. Raises `ValueError` for those that none does."""
    rules = (RULES | {PLAIN_COPY: re.escape(LDM_UNET) + ".+"}) if ema else RULES
    ignored: dict[str, list[str]] = {}
    for name in sorted(names):
        rule = next((rule for rule, pattern in rules.items() if re.fullmatch(pattern, name)), None)
        ignored.setdefault(rule, []).append(name)
    if strange := ignored.pop(None, []):
        raise ValueError(
            f"{where} holds {len(strange)} tensors that no part of the model wants and no rule explains (first: {strange[0]})."
        )
    return {rule: ignored[rule] for rule in rules if rule in ignored}


def single_family(names: Iterable[str], where: str) -> str:
    """The family of a single file, by its tensors' names: "sd1", "sd2" or "sdxl".

    Raises `ValueError` in one sentence for anything else, saying what it is.
    """
    names = list(names)

    def has(start: str | tuple[str, ...]) -> bool:
        return any(name.startswith(start) for name in names)

    for pattern, what in STRANGERS.items():
        if any(re.search(pattern, name) for name in names):
            raise ValueError(f"{where} is {what}; expected is a Stable Diffusion 1, 2 or XL with UNet, VAE and text encoders.")
    parts = {"a UNet": has(LDM_UNET), "a VAE": has(LDM_VAE), "text encoders": has(("cond_stage_model.", "conditioner."))}
    if not all(parts.values()):
        inside = [what for what, there in parts.items() if there] or lone_part(names)
        holds = (
            f"holds {' and '.join(inside)} only"
            if inside
            else f"holds {len(names)} tensors of something else (first: {min(names, default='none')})"
        )
        raise ValueError(f"{where} {holds}; expected is a Stable Diffusion 1, 2 or XL with UNet, VAE and text encoders.")
    if has("conditioner.embedders.0.model.") and not has("conditioner.embedders.1."):
        raise ValueError(f"{where} is the refiner of SDXL, which only finishes the pictures of another model; expected is SDXL base.")
    for family, prefixes in LDM_TEXT.items():
        if all(has(prefix) for prefix in prefixes.values()):
            return family
    raise ValueError(f"{where} has text encoders of a kind that no Stable Diffusion 1, 2 or XL has.")


def lone_part(names: list[str]) -> list[str]:
    """What a file holds whose names have no prefix, or those of one part in the diffusers layout."""
    signs = {"a UNet": r"(unet\.)?(input_blocks|down_blocks)\.0\.", "a VAE": r"(vae\.)?(encoder|decoder)\.(conv_in|mid)"}
    signs["a text encoder"] = r"(text_encoder\.)?(text_model\.)?(embeddings\.token|encoder\.layers\.0|transformer\.resblocks\.0)"
    return [what for what, pattern in signs.items() if any(re.match(pattern, name) for name in names)]


def check_parts(family: str, configs: dict[str, Any], where: str) -> None:
    """Raise `ValueError` where the parts do not make a Stable Diffusion that can be drawn with."""
    unet, vae = configs[UNET], configs[VAE]
    latent = vae.latent_channels
    if unet.in_channels not in TASKS or unet.out_channels != latent or latent != 4:
        strange = f"a UNet of {unet.in_channels} and {unet.out_channels} channels over latents of {latent}"
        what = OTHER_TASKS.get(unet.in_channels, strange)
        raise ValueError(f"{where} is {what}, which is not built here; known are 4 channels, and 9 for inpainting.")
    texts = [configs[name] for name in (TEXT, TEXT_2) if name in configs]
    if len(texts) != len(FAMILIES[family].pads):
        raise ValueError(f"{where} has {len(texts)} text encoders, and {FAMILIES[family].name} has {len(FAMILIES[family].pads)}.")
    width = sum(text.hidden_size for text in texts)
    if width != unet.cross_attention_dim:
        raise ValueError(f"{where}: the UNet hears texts {unet.cross_attention_dim} wide, but the text encoders make {width}.")
    if unet.pooled_dim is not None and unet.pooled_dim != texts[1].projection_dim:
        raise ValueError(f"{where}: the UNet's pooled text has {unet.pooled_dim} numbers, the text encoder's {texts[1].projection_dim}.")


def said_prediction(file: TensorFile, family: str) -> tuple[str | None, list[str]]:
    """What a single file says about its prediction type, if it says anything, and notes.

    SD 1 predicts epsilon, and so does XL unless a marker says otherwise. SD 2 does either, and no tensor says which; some tools write
    it into the metadata (`modelspec.prediction_type`).
    """
    notes = []
    if "ztsnr" in file.entries:
        notes.append("trained for a schedule that ends in pure noise (zero terminal SNR), which is not built here; SDXL's own is used.")
    said = file.metadata.get("modelspec.prediction_type", "")
    if "v_pred" in file.entries or said.startswith("v"):
        return "v_prediction", notes
    return (None if family == "sd2" and not said else said if said == "sample" else "epsilon"), notes
