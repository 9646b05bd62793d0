"""Where the tensors of a model lie in a file: the names of the diffusers layout and those of the original single files (LDM layout)."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

UNET, VAE, TEXT, TEXT_2 = PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")  # a folder's subfolders
LDM_UNET, LDM_VAE = "model.diffusion_model.", "first_stage_model."
LDM_TEXT = {
    "sd1": {TEXT: "cond_stage_model.transformer."},
    "sd2": {TEXT: "cond_stage_model.model."},
    "sdxl": {TEXT: "conditioner.embedders.0.transformer.", TEXT_2: "conditioner.embedders.1.model."},
}


class Place(NamedTuple):
    """Where a tensor of a model lies in a file."""

    name: str
    third: int | None = None  # which third of the rows: OpenCLIP keeps queries, keys and values in one tensor
    transposed: bool = False

    def cut(self, tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """From the file's tensor to the model's: its third, turned, without or with the ones of a 1x1 convolution."""
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        return (tensor.T if self.transposed else tensor).reshape(shape)


__all__ = [
    "UNET",
    "VAE",
    "TEXT",
    "TEXT_2",
    "PARTS",
    "LDM_UNET",
    "LDM_VAE",
    "LDM_TEXT",
    "RESNET",
    "UNET_ENDS",
    "MIDDLE",
    "VAE_NAMES",
    "OLD_ATTENTION",
    "OPEN_CLIP",
    "OPEN_CLIP_ENDS",
    "Places",
    "Place",
    "ldm_unet_name",
    "inside",
    "ldm_vae_name",
    "open_clip_place",
    "diffusers_places",
    "ldm_places",
    "ema_name",
]


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"conv_shortcut": "skip_connection"}
UNET_ENDS = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
UNET_ENDS |= {f"time_embedding.linear_{i}": f"time_embed.{2 * i - 2}" for i in (1, 2)}
UNET_ENDS |= {f"add_embedding.linear_{i}": f"label_emb.0.{2 * i - 2}" for i in (1, 2)}
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}


def ldm_unet_name(name: str, layers: int, attends: Sequence[bool]) -> str:
    """The LDM name of a UNet's tensor. `layers`: residual blocks of a level; `attends`: whether each level, from the top, has attention.

    LDM counts what stands on the way down, and on the way up, without regard to levels: the residual block with its transformer is one
    number, a halving is another. On the way up the doubling shares the number of the block before it.
    """
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    if name.startswith("mid_block."):
        _, kind, number, rest = name.split(".", 3)
        return f"middle_block.{MIDDLE[f'{kind}.{number}']}.{inside(kind, rest)}"
    way, level, kind, number, rest = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name).groups()
    level, number = int(level), int(number)
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":  # behind the transformer, where there is one
        return f"output_blocks.{level * (layers + 1) + layers}.{2 if attends[-1 - level] else 1}.{rest}"
    block = level * (layers + 1) + number
    where = f"input_blocks.{block + 1}" if way == "down" else f"output_blocks.{block}"
    return f"{where}.{int(kind == 'attentions')}.{inside(kind, rest)}"


def inside(kind: str, rest: str) -> str:
    """The name within a block: other in a residual block, the same in a transformer."""
    if kind == "attentions":
        return rest
    layer, number = rest.rsplit(".", 1)
    return f"{RESNET[layer]}.{number}"


VAE_NAMES = {"mid_block.resnets.0.": "mid.block_1.", "mid_block.resnets.1.": "mid.block_2.", "conv_norm_out.": "norm_out."}
VAE_NAMES |= {"mid_block.attentions.0.group_norm.": "mid.attn_1.norm.", "mid_block.attentions.0.to_out.0.": "mid.attn_1.proj_out."}
VAE_NAMES |= {f"mid_block.attentions.0.to_{letter}.": f"mid.attn_1.{letter}." for letter in "qkv"}
VAE_NAMES |= {"conv_shortcut.": "nin_shortcut.", "downsamplers.0.": "downsample.", "upsamplers.0.": "upsample.", "resnets.": "block."}
OLD_ATTENTION = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}  # early diffusers


def ldm_vae_name(name: str, levels: int) -> str:
    """The LDM name of an autoencoder's tensor. LDM counts the decoder's levels from the other end."""
    for ours, theirs in VAE_NAMES.items():
        name = name.replace(ours, theirs)
    name = name.replace("encoder.down_blocks.", "encoder.down.")
    return re.sub(r"decoder\.up_blocks\.(\d+)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", name)


OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc"}
OPEN_CLIP |= {"mlp.fc2": "mlp.c_proj"}
OPEN_CLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}


def open_clip_place(name: str) -> Place:
    """Where OpenCLIP keeps a text encoder's tensor. It multiplies by the projection from the other side: square, so no shape tells."""
    if name == "text_projection.weight":
        return Place("text_projection", transposed=True)
    if name in OPEN_CLIP_ENDS:
        return Place(OPEN_CLIP_ENDS[name])
    layer, rest = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", name).groups()
    block = f"transformer.resblocks.{layer}."
    if found := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", rest):
        return Place(f"{block}attn.in_proj_{found[2]}", third="qkv".index(found[1]))
    rest, kind = rest.rsplit(".", 1)
    return Place(f"{block}{OPEN_CLIP[rest]}.{kind}")


Places = Callable[[str], list[Place]]  # all places where a tensor, by its diffusers name, may lie; the usual one first


def diffusers_places(part: str) -> Places:
    """Places in the files of a diffusers folder, each part in its own."""

    def places(name: str) -> list[Place]:
        if part == VAE and ".attentions." in name:
            head, tail = name.rsplit("attentions.0.", 1)
            for new, old in OLD_ATTENTION.items():
                if tail.startswith(new):
                    return [Place(name), Place(f"{head}attentions.0.{old}{tail[len(new) :]}")]
        return [Place(name), Place(name.removeprefix("text_model."))]  # transformers leaves it out since 5.6

    return places


def ldm_places(part: str, family: str, layers: int = 0, attends: Sequence[bool] = (), levels: int = 0, ema: bool = False) -> Places:
    """Places in a single file. `layers`, `attends`: see `ldm_unet_name`; `levels`: of the autoencoder; `ema`: the UNet's averaged copy."""

    def places(name: str) -> list[Place]:
        if part == UNET:
            name = ldm_unet_name(name, layers, attends)
            return [Place(ema_name(name) if ema else LDM_UNET + name)]
        if part == VAE:
            return [Place(LDM_VAE + ldm_vae_name(name, levels))]
        prefix = LDM_TEXT[family][part]
        if prefix.endswith(".model."):
            place = open_clip_place(name)
            return [place._replace(name=prefix + place.name)]
        return [Place(prefix + name), Place(prefix + name.removeprefix("text_model."))]  # some early fine-tunes leave it out

    return places


def ema_name(name: str) -> str:
    """The name of a UNet's tensor in the averaged copy that training keeps: all dots taken out."""
    return "model_ema." + ("diffusion_model." + name).replace(".", "")
