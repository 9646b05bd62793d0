"""The families of Stable Diffusion, and the sizes of their parts: read from the configurations of diffusers, or off the tensors' shapes."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from minisd.conditional_unet import TIME_IDS, ConditionalUNetConfig
from minisd.text_encoder import ACTIVATIONS, TextConfig
from minisd.vae import VAEConfig

Shape = tuple[int, ...]
ShapeOf = Callable[[str], Shape | None]  # the shape of a tensor by its name in the diffusers layout; None if there is none

__all__ = [
    "Shape",
    "ShapeOf",
    "END",
    "ZERO",
    "FAMILIES",
    "UNET_DEFAULTS",
    "UNET_OFF",
    "VAE_DEFAULTS",
    "VAE_OFF",
    "TEXT_DEFAULTS",
    "Family",
    "family_of",
    "known_settings",
    "for_each_level",
    "read_unet_config",
    "read_vae_config",
    "read_text_config",
    "unet_settings",
    "vae_settings",
    "text_settings",
]


@dataclass(frozen=True)
class Family:
    """What one line of models has in common, besides the sizes of its UNet.

    `pads`: the symbol that fills up a text, for each text encoder. `activations`: of their MLPs. `layers`: how many layers of each are
    used. `scaling_factor`: between the autoencoder's latents and the UNet's. `guidance`: the scale that diffusers proposes.
    """

    name: str
    pads: tuple[str, ...]
    activations: tuple[str, ...]
    layers: tuple[int, ...]
    scaling_factor: float = 0.18215
    guidance: float = 7.5


END, ZERO = "<|endoftext|>", "!"  # the symbols with the ids 49407 and 0
FAMILIES = {
    "sd1": Family("SD 1.x", (END,), ("quick_gelu",), (12,)),
    "sd2": Family("SD 2.x", (ZERO,), ("gelu",), (23,)),  # trained with 24; the last one is not used
    "sdxl": Family("SDXL", (END, ZERO), ("quick_gelu", "gelu"), (12, 32), scaling_factor=0.13025, guidance=5.0),
}


def family_of(unet: ConditionalUNetConfig) -> str:
    """The family of a UNet, by what it is told: "sd1", "sd2" or "sdxl"."""
    if unet.pooled_dim is not None:
        return "sdxl"
    known = {768: "sd1", 1024: "sd2"}  # width of CLIP ViT-L, and of OpenCLIP ViT-H
    return known.get(unet.cross_attention_dim, "sd2" if unet.linear_projection else "sd1")


UNET_DEFAULTS = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "attention_head_dim": 8,
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 1280,
    "use_linear_projection": False,
    "sample_size": 64,
}
# Settings that are not built here, with the values that leave them off.
UNET_OFF: dict[str, Any] = {"act_fn": "silu", "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1}
UNET_OFF |= {"mid_block_type": "UNetMidBlock2DCrossAttn", "resnet_time_scale_shift": "default", "time_embedding_type": "positional"}
UNET_OFF |= dict.fromkeys(["center_input_sample", "only_cross_attention", "dual_cross_attention", "resnet_skip_time_act"], False)
UNET_OFF |= dict.fromkeys(["class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim", "time_embedding_act_fn"], None)
UNET_OFF |= dict.fromkeys(["num_class_embeds", "timestep_post_act", "reverse_transformer_layers_per_block"], None)
UNET_OFF |= dict.fromkeys(["encoder_hid_dim", "cross_attention_norm"], None)
UNET_OFF |= {"conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default"}
UNET_OFF |= {"mid_block_scale_factor": 1, "resnet_out_scale_factor": 1}
VAE_DEFAULTS = asdict(VAEConfig()) | {"block_out_channels": (64,), "layers_per_block": 1}
VAE_OFF: dict[str, Any] = {"act_fn": "silu", "shift_factor": None, "latents_mean": None, "latents_std": None}
VAE_OFF |= {"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True}
TEXT_DEFAULTS = asdict(TextConfig()) | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "projection_dim": 512}


def known_settings(what: str, config: Mapping[str, Any], class_name: str, defaults: Mapping[str, Any], off: Mapping[str, Any]) -> dict:
    """`config` over `defaults`. Raises `ValueError` for another class, or for a setting that is not built here."""
    if config.get("_class_name", class_name) != class_name:
        raise ValueError(f"the {what} is a {config['_class_name']}; known is {class_name}.")
    for key, value in off.items():
        if config.get(key) is not None and config[key] != value:
            raise ValueError(f"a {what} with {key} {config[key]!r} is not built here; known is {value!r}.")
    return {key: default if config.get(key) is None else config[key] for key, default in defaults.items()}


def for_each_level(value: Any, levels: int) -> tuple:
    """One entry for each level; a single number stands for all."""
    return tuple(value) if isinstance(value, list | tuple) else (value,) * levels


def read_unet_config(config: Mapping[str, Any]) -> ConditionalUNetConfig:
    """`unet/config.json` as diffusers writes it. `attention_head_dim` there is the *number* of heads, whatever its name says."""
    found = known_settings("UNet", config, "UNet2DConditionModel", UNET_DEFAULTS, UNET_OFF)
    widths = tuple(found["block_out_channels"])
    kinds = found["down_block_types"]
    names = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
    if strange := [kind for kind in kinds if kind not in names]:
        raise ValueError(f"a UNet with a {strange[0]} is not built here; known are {', '.join(names)}.")
    mirrored = [names[kind] for kind in reversed(kinds)]
    if list(config.get("up_block_types") or mirrored) != mirrored:
        raise ValueError(f"the way up must mirror the way down: {mirrored}, got {list(config['up_block_types'])}.")
    layers, context = set(for_each_level(found["layers_per_block"], 1)), set(for_each_level(found["cross_attention_dim"], 1))
    if len(layers) > 1 or len(context) > 1:
        raise ValueError("a UNet whose levels differ in layers_per_block or cross_attention_dim is not built here.")
    depths = for_each_level(found["transformer_layers_per_block"], len(widths))
    added = {}
    if config.get("addition_embed_type") is not None:
        if config["addition_embed_type"] != "text_time":
            raise ValueError(f"addition_embed_type {config['addition_embed_type']!r} is not built here; known is 'text_time'.")
        waves = config["addition_time_embed_dim"]
        added = {"pooled_dim": config["projection_class_embeddings_input_dim"] - TIME_IDS * waves, "time_ids_dim": waves}
    return ConditionalUNetConfig(
        in_channels=found["in_channels"],
        out_channels=found["out_channels"],
        block_out_channels=widths,
        layers_per_block=layers.pop(),
        norm_num_groups=found["norm_num_groups"],
        heads=for_each_level(config.get("num_attention_heads") or found["attention_head_dim"], len(widths)),
        depths=tuple(depth if kind.startswith("Cross") else 0 for depth, kind in zip(depths, kinds)),
        middle_depth=depths[-1],
        cross_attention_dim=context.pop(),
        linear_projection=found["use_linear_projection"],
        sample_size=for_each_level(found["sample_size"], 1)[0],
        **added,
    )


def read_vae_config(config: Mapping[str, Any]) -> VAEConfig:
    """`vae/config.json` as diffusers writes it."""
    found = known_settings("VAE", config, "AutoencoderKL", VAE_DEFAULTS, VAE_OFF)
    return VAEConfig(**found | {"block_out_channels": tuple(found["block_out_channels"])})


def read_text_config(config: Mapping[str, Any]) -> TextConfig:
    """`text_encoder/config.json` as transformers writes it."""
    kinds = ("CLIPTextModel", "CLIPTextModelWithProjection")
    kind = (config.get("architectures") or kinds)[0]
    if kind not in kinds:
        raise ValueError(f"the text encoder is a {kind}; known are {' and '.join(kinds)}.")
    found = {name: default if config.get(name) is None else config[name] for name, default in TEXT_DEFAULTS.items()}
    if found["hidden_act"] not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"a text encoder with hidden_act {found['hidden_act']!r} is not built here; known are {known}.")
    return TextConfig(**found | {"projection_dim": found["projection_dim"] if kind == kinds[1] else None})


def unet_settings(config: ConditionalUNetConfig) -> dict[str, Any]:
    """`unet/config.json` for diffusers to open."""
    cross = [depth > 0 for depth in config.depths]
    # A level without attention has a depth there too, which is not used; the last entry also serves the middle.
    depths = [depth or (config.middle_depth if level + 1 == len(cross) else 1) for level, depth in enumerate(config.depths)]
    settings = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "norm_eps": 1e-5,
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in cross],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(cross)],
        "attention_head_dim": list(config.heads),
        "transformer_layers_per_block": depths,
        "cross_attention_dim": config.cross_attention_dim,
        "use_linear_projection": config.linear_projection,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "sample_size": config.sample_size,
    }
    if config.pooled_dim is not None:
        settings |= {"addition_embed_type": "text_time", "addition_time_embed_dim": config.time_ids_dim}
        settings["projection_class_embeddings_input_dim"] = config.pooled_dim + TIME_IDS * config.time_ids_dim
    return settings


def vae_settings(config: VAEConfig) -> dict[str, Any]:
    """`vae/config.json` for diffusers to open."""
    levels = len(config.block_out_channels)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return {"_class_name": "AutoencoderKL", **kinds, **asdict(config), "act_fn": "silu"}


def text_settings(config: TextConfig) -> dict[str, Any]:
    """`text_encoder/config.json` for transformers to open."""
    kind = "CLIPTextModel" if config.projection_dim is None else "CLIPTextModelWithProjection"
    settings = {name: getattr(config, name) for name in TextConfig.__dataclass_fields__ if name != "projection_dim"}
    width = config.projection_dim or config.hidden_size
    ids = {"bos_token_id": config.vocab_size - 2, "eos_token_id": config.vocab_size - 1, "pad_token_id": config.vocab_size - 1}
    return {"architectures": [kind], "model_type": "clip_text_model", **settings, **ids, "projection_dim": width}
