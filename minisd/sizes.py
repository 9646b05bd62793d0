"""The sizes of a model's parts, read off the shapes of its tensors, where no configuration is at hand."""

from dataclasses import replace

from minisd.conditional_unet import TIME_IDS, ConditionalUNetConfig
from minisd.config import ShapeOf, family_of
from minisd.text_encoder import TextConfig
from minisd.vae import VAEConfig

HEAD = 64  # channels of a head in all published models but SD 1's UNet, which has 8 heads on every level
WAVES = 256  # for each of the six sizes that SDXL is told


def count(shape_of: ShapeOf, pattern: str) -> int:
    """How many of `pattern.format(0)`, `pattern.format(1)`, ... there are, without a gap."""
    number = 0
    while shape_of(pattern.format(number)) is not None:
        number += 1
    return number


def size(shape_of: ShapeOf, name: str, axis: int) -> int:
    """One number of a tensor's shape. Raises `ValueError` naming the tensor if there is none."""
    shape = shape_of(name)
    if shape is None or len(shape) <= axis:
        raise ValueError(f"the tensor {name}, which tells a size of the model, is missing or of another shape.")
    return shape[axis]


def infer_unet(shape_of: ShapeOf, levels: int, layers: int) -> ConditionalUNetConfig:
    """The sizes of a UNet from the shapes of its tensors.

    Shapes do not tell the number of heads, that of groups, and the size it was trained on: SD 1 has 8 heads on every level, the others
    heads of 64 channels; the groups are 32 in all published models.
    """
    widths = tuple(size(shape_of, f"down_blocks.{level}.resnets.0.conv1.weight", 0) for level in range(levels))
    block = "attentions.0.transformer_blocks.{}.attn2.to_k.weight"
    depths = tuple(count(shape_of, f"down_blocks.{level}.{block}") for level in range(levels))
    added = shape_of("add_embedding.linear_1.weight")
    pooled = {"pooled_dim": added[1] - TIME_IDS * WAVES, "time_ids_dim": WAVES} if added else {}
    config = ConditionalUNetConfig(
        in_channels=size(shape_of, "conv_in.weight", 1),
        out_channels=size(shape_of, "conv_out.weight", 0),
        block_out_channels=widths,
        layers_per_block=layers,
        heads=(8,) * levels,
        depths=depths,
        middle_depth=count(shape_of, f"mid_block.{block}"),
        cross_attention_dim=size(shape_of, "mid_block." + block.format(0), 1),
        linear_projection=len(shape_of("mid_block.attentions.0.proj_in.weight") or ()) == 2,
        sample_size=128 if pooled else 64,
        **pooled,
    )
    return config if family_of(config) == "sd1" else with_heads_of(config, HEAD)


def with_heads_of(config: ConditionalUNetConfig, channels: int) -> ConditionalUNetConfig:
    """The same with heads of so many channels on every level."""
    return replace(config, heads=tuple(max(1, width // channels) for width in config.block_out_channels))


def infer_vae(shape_of: ShapeOf, scaling_factor: float) -> VAEConfig:
    """The sizes of an autoencoder from the shapes of its tensors; the scaling factor is its family's."""
    levels = count(shape_of, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    return VAEConfig(
        in_channels=size(shape_of, "encoder.conv_in.weight", 1),
        out_channels=size(shape_of, "decoder.conv_out.weight", 0),
        latent_channels=size(shape_of, "decoder.conv_in.weight", 1),
        block_out_channels=tuple(size(shape_of, f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 0) for level in range(levels)),
        layers_per_block=count(shape_of, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        scaling_factor=scaling_factor,
    )


def infer_text(shape_of: ShapeOf, hidden_act: str, layers: int, projected: bool) -> TextConfig:
    """The sizes of a text encoder from the shapes of its tensors. Of its layers at most `layers` are used."""
    width = size(shape_of, "text_model.embeddings.token_embedding.weight", 1)
    found = count(shape_of, "text_model.encoder.layers.{}.mlp.fc1.weight")
    return TextConfig(
        vocab_size=size(shape_of, "text_model.embeddings.token_embedding.weight", 0),
        hidden_size=width,
        intermediate_size=size(shape_of, "text_model.encoder.layers.0.mlp.fc1.weight", 0),
        num_hidden_layers=min(found, layers),
        num_attention_heads=max(1, width // HEAD),
        max_position_embeddings=size(shape_of, "text_model.embeddings.position_embedding.weight", 0),
        hidden_act=hidden_act,
        projection_dim=size(shape_of, "text_projection.weight", 0) if projected else None,
    )


__all__ = ["HEAD", "WAVES", "count", "size", "infer_unet", "with_heads_of", "infer_vae", "infer_text"]
