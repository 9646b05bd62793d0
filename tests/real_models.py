"""Small Stable Diffusions, made and saved by the reference libraries: what the tests of lesson 12 open.

They have the names, shapes and layouts of the published ones; only the widths are smaller, and the vocabulary.
"""

from functools import cache
from pathlib import Path

import torch
from torch import nn

from minisd.conversion import convert
from minisd.tokenizer import Tokenizer

# What changes from family to family in diffusers' UNet2DConditionModel; text widths are multiples of 64, so that a head has 64 channels.
UNETS = {
    "sd1": {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": 8, "cross_attention_dim": 64},
    "sd2": {
        "block_out_channels": (64, 64, 128, 128),
        "attention_head_dim": (1, 1, 2, 2),
        "cross_attention_dim": 64,
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (64, 64, 128),
        "attention_head_dim": (1, 1, 2),
        "cross_attention_dim": 64 + 128,
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 128 + 6 * 256,
    },
}
FAMILY_NAMES = list(UNETS)
VOCABULARY = 600


def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random numbers for what starts as 0 or 1, so that no bias and no norm can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return module.eval()


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def reference_unet(family: str, **changes) -> nn.Module:
    """A UNet2DConditionModel."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return shake(UNet2DConditionModel(sample_size=8, **(UNETS[family] | changes)))


def reference_vae(family: str, widths: tuple[int, ...] = (32, 32, 64, 64)) -> nn.Module:
    """An AutoencoderKL of diffusers."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    kinds = [("DownEncoderBlock2D",) * len(widths), ("UpDecoderBlock2D",) * len(widths)]
    scaling = 0.13025 if family == "sdxl" else 0.18215
    return shake(AutoencoderKL(3, 3, *kinds, widths, 2, scaling_factor=scaling))


def reference_text(kind: str, layers: int, width: int) -> nn.Module:
    """A text encoder of transformers: "L" (CLIP), "H" (OpenCLIP) or "bigG" (OpenCLIP with a projection)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(2)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    ids = {"vocab_size": VOCABULARY, "bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1}
    config = CLIPTextConfig(**sizes, **ids, projection_dim=width, hidden_act="quick_gelu" if kind == "L" else "gelu")
    return shake((CLIPTextModelWithProjection if kind == "bigG" else CLIPTextModel)(config))


def reference_texts(family: str) -> dict[str, nn.Module]:
    """The text encoders of a family, by their folders. That of SD 2 has 23 layers, as in the published folders."""
    if family == "sdxl":
        return {"text_encoder": reference_text("L", 3, 64), "text_encoder_2": reference_text("bigG", 4, 128)}
    return {"text_encoder": reference_text("L", 3, 64) if family == "sd1" else reference_text("H", 23, 64)}


@cache
def small_tokenizer(pad: str = "<|endoftext|>") -> Tokenizer:
    """A tokenizer of 600 symbols, with 77 places."""
    from minisd.postcards import captions, sample_scenes

    return Tokenizer.train(captions(sample_scenes(200, seed=0)), VOCABULARY, pad=pad)


def save_reference(family: str, folder: Path, prediction_type: str = "epsilon", **changes) -> Path:
    """A folder as diffusers saves it: all parts, tokenizers, scheduler, index."""
    import diffusers

    unet, vae, texts = reference_unet(family, **changes), reference_vae(family), reference_texts(family)
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    for name, encoder in texts.items():
        encoder.save_pretrained(folder / name)
    pads = {"sd1": ["<|endoftext|>"], "sd2": ["!"], "sdxl": ["<|endoftext|>", "!"]}[family]
    for name, pad in zip(("tokenizer", "tokenizer_2"), pads):
        small_tokenizer(pad).save(folder / name)
    kind = diffusers.EulerDiscreteScheduler if family == "sdxl" else diffusers.DDIMScheduler
    common = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    ends = {} if family == "sdxl" else {"clip_sample": False, "set_alpha_to_one": False}
    kind(**common, **ends, timestep_spacing="leading", prediction_type=prediction_type).save_pretrained(folder / "scheduler")
    return folder


def open_clip_tower(width: int, layers: int) -> nn.Module:
    """A text tower of open_clip, whose own names are those of the single files."""
    from open_clip.transformer import TextTransformer

    torch.manual_seed(3)
    heads = width // 64
    return shake(TextTransformer(vocab_size=VOCABULARY, width=width, heads=heads, layers=layers, output_dim=width, output_tokens=True))


def write_single(family: str, folder: Path, path: Path) -> dict[str, torch.Tensor]:
    """A single file with the parts of `folder`, all that published ones carry besides, and the texts of open_clip's own towers.

    Returns its tensors. UNet and VAE are named by `convert`; `test_diffusers_reads_the_single_file` compares those names.
    """
    from safetensors.torch import load_file, save_file

    convert(folder, path)
    tensors = load_file(path)
    prefix = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}.get(family)
    if prefix:
        tower = open_clip_tower(64, 24) if family == "sd2" else open_clip_tower(128, 4)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        tensors |= {prefix + name: tensor for name, tensor in tower.state_dict().items() if name != "attn_mask"}
        tensors[prefix + "logit_scale"] = torch.tensor(4.6)
    if family != "sd2":
        clip = "conditioner.embedders.0" if family == "sdxl" else "cond_stage_model"
        tensors[f"{clip}.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if family != "sdxl":
        tensors |= {name: torch.zeros(1000) for name in ("betas", "alphas_cumprod", "sqrt_alphas_cumprod", "posterior_variance")}
    else:
        tensors["denoiser.sigmas"] = torch.zeros(1000)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return tensors


def averaged_copy(tensors: dict[str, torch.Tensor], seed: int = 9) -> dict[str, torch.Tensor]:
    """The EMA copy that training keeps of a UNet, under its names without dots; other numbers than the plain copy."""
    generator = torch.Generator().manual_seed(seed)
    start = "model.diffusion_model."
    plain = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    copies = {
        "model_ema.diffusion_model" + name.replace(".", ""): tensor + torch.randn(tensor.shape, generator=generator)
        for name, tensor in plain.items()
    }
    return copies | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
