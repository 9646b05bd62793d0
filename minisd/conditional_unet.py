"""The UNet of Stable Diffusion 1, 2 and XL: lesson 02's U with lesson 08's transformers, and for XL a door for sizes and pooled text."""

from dataclasses import dataclass

import torch
from torch import nn

from minisd.attention import SpatialTransformer
from minisd.unet import TimeEmbedding, UNet, timestep_embedding

TIME_IDS = 6  # height and width of the original, top and left of the crop, height and width to draw

__all__ = ["TIME_IDS", "ConditionalUNetConfig", "ConditionalUNet"]


@dataclass(frozen=True)
class ConditionalUNetConfig:
    """All numbers needed to build a published UNet; the defaults are SD 1's.

    `heads` and `depths` have an entry for each level, from the top down: heads of each attention, transformer blocks in each seat (0: the
    seat stays empty). The middle of the U has `middle_depth` blocks, with the heads of the last level.
    """

    in_channels: int = 4  # 9 for inpainting: the latent, the mask, the latent of what may be seen
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    heads: tuple[int, ...] = (8, 8, 8, 8)
    depths: tuple[int, ...] = (1, 1, 1, 0)
    middle_depth: int = 1
    cross_attention_dim: int = 768  # width of a token's vector
    linear_projection: bool = False  # how files keep proj_in and proj_out: as (C, C), or as the 1x1 convolution (C, C, 1, 1)
    pooled_dim: int | None = None  # XL: numbers of the pooled text
    time_ids_dim: int | None = None  # XL: waves for each of the six sizes
    sample_size: int = 64  # side of the latents it was trained on

    def __post_init__(self):
        levels = len(self.block_out_channels)
        if not levels == len(self.heads) == len(self.depths):
            raise ValueError(f"{levels} levels need {levels} heads and {levels} depths, got {self.heads} and {self.depths}.")
        if (self.pooled_dim is None) != (self.time_ids_dim is None):
            raise ValueError(f"pooled_dim and time_ids_dim belong together, got {self.pooled_dim} and {self.time_ids_dim}.")


class ConditionalUNet(UNet):
    """The UNet of Stable Diffusion. Podell et al. 2023 (arXiv:2307.01952), section 2.2, for what XL adds.

    Names and arithmetic are those of diffusers' UNet2DConditionModel.
    """

    def __init__(self, config: ConditionalUNetConfig):
        def attention(channels: int, level: int) -> nn.Module | None:
            depth = config.middle_depth if level == -1 else config.depths[level]
            if depth == 0:
                return None
            return SpatialTransformer(channels, config.cross_attention_dim, config.heads[level], depth, config.norm_num_groups)

        sizes = (config.in_channels, config.out_channels, config.block_out_channels, config.layers_per_block, config.norm_num_groups)
        super().__init__(*sizes, attention=attention)
        self.config = config
        self.add_embedding = None
        if config.pooled_dim is not None:
            self.add_embedding = TimeEmbedding(config.pooled_dim + TIME_IDS * config.time_ids_dim, self.time_channels)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor | int,
        context: torch.Tensor,
        pooled: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict from noisy latents (B, in_channels, h, w) and a text (B, tokens, cross_attention_dim): (B, out_channels, h, w).

        The answer has the dtype of `x`, whatever that of the weights.
        XL also needs `pooled` (B, pooled_dim) and `time_ids` (B, 6); one row of either serves the whole batch.
        Raises `ValueError` for a wrong shape, and for a vector that this UNet has no door for, or misses.
        """
        asked, embedding = x.dtype, None
        x, context = x.to(self.conv_in.weight.dtype), context.to(self.conv_in.weight.dtype)
        if self.add_embedding is not None:
            embedding = self.add_embedding(self.added(pooled, time_ids, x))
        elif pooled is not None or time_ids is not None:
            raise ValueError("this UNet takes no pooled text and no time_ids; those of SDXL do.")
        return super().forward(x, timesteps, context, embedding).to(asked)

    def added(self, pooled: torch.Tensor | None, time_ids: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """What `add_embedding` reads: the pooled text, then the waves of the six sizes. (B, pooled_dim + 6 time_ids_dim)."""
        count, wanted = len(x), {"pooled": (pooled, self.config.pooled_dim), "time_ids": (time_ids, TIME_IDS)}
        for name, (rows, width) in wanted.items():
            if rows is None or rows.ndim != 2 or rows.shape[1] != width or len(rows) not in (1, count):
                got = "nothing" if rows is None else tuple(rows.shape)
                raise ValueError(f"this UNet needs {name} of shape ({count}, {width}), got {got}.")
        waves = timestep_embedding(time_ids.to(x.device).flatten(), self.config.time_ids_dim)  # (B 6, time_ids_dim)
        waves = waves.reshape(len(time_ids), -1).expand(count, -1).to(x.dtype)
        return torch.cat([pooled.to(x).expand(count, -1), waves], dim=1)
