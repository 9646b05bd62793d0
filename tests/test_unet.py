"""The UNet: equal to diffusers' by name and number, each part as its formula says, bad input refused in one sentence."""

import copy
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minisd.unet import Downsample, ResnetBlock, TimeEmbedding, UNet, Upsample, timestep_embedding


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, so that nothing hides behind a zero-initialised layer."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (
            0.5 if parameter.ndim < 2 else 1 / parameter[0].numel() ** 0.5
        )
    return model


def small(**changes) -> UNet:
    return randomise(UNet(**{"block_out_channels": (8, 16), "norm_num_groups": 4, **changes}))


# The time embedding


def test_timestep_embedding_by_hand():
    waves = timestep_embedding(torch.tensor([0, 1, 100]), 4)  # frequencies 1 and 0.01
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.01], [100.0, 1.0]])
    torch.testing.assert_close(waves, torch.cat([angles.cos(), angles.sin()], dim=1))


def test_timestep_embedding_starts_with_ones_then_zeros():
    waves = timestep_embedding(torch.tensor([0]), 320)
    assert torch.equal(waves, torch.cat([torch.ones(1, 160), torch.zeros(1, 160)], dim=1))


@pytest.mark.parametrize("channels", [2, 32, 320])
def test_timestep_embedding_equals_diffusers(channels):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.tensor([0, 1, 17, 500, 999])
    expected = embeddings.get_timestep_embedding(t, channels, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, channels), expected, rtol=0, atol=1e-6)


def test_timestep_embedding_is_float32_and_takes_fractions():
    assert timestep_embedding(torch.tensor([3]), 8).dtype == torch.float32
    assert timestep_embedding(torch.tensor([3.0], dtype=torch.float64), 8).dtype == torch.float32
    between = timestep_embedding(torch.tensor([3.5]), 8)
    assert not torch.allclose(between, timestep_embedding(torch.tensor([3]), 8))


def test_similarity_of_timesteps_depends_on_their_distance_only():
    e = timestep_embedding(torch.arange(1000), 64)
    torch.testing.assert_close(e[100] @ e[130], e[700] @ e[730], rtol=1e-3, atol=1e-3)
    assert e[500] @ e[501] > e[500] @ e[520] > e[500] @ e[800]


def test_timestep_embedding_refuses_odd_width():
    with pytest.raises(ValueError, match="even number"):
        timestep_embedding(torch.tensor([1]), 7)


# The parts


def test_resnet_block_is_its_formula():
    block = randomise(ResnetBlock(8, 16, 12, groups=4))
    x, emb = torch.randn(2, 8, 6, 6), torch.randn(2, 12)
    w = dict(block.named_parameters())
    h = F.conv2d(F.silu(F.group_norm(x, 4, w["norm1.weight"], w["norm1.bias"], 1e-5)), w["conv1.weight"], w["conv1.bias"], padding=1)
    h = h + (F.silu(emb) @ w["time_emb_proj.weight"].T + w["time_emb_proj.bias"]).reshape(2, 16, 1, 1)
    h = F.conv2d(F.silu(F.group_norm(h, 4, w["norm2.weight"], w["norm2.bias"], 1e-5)), w["conv2.weight"], w["conv2.bias"], padding=1)
    expected = F.conv2d(x, w["conv_shortcut.weight"], w["conv_shortcut.bias"]) + h
    torch.testing.assert_close(block(x, emb), expected, rtol=1e-5, atol=1e-5)


def test_fresh_resnet_block_changes_nothing():
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(ResnetBlock(8, 8, 12, groups=4)(x, torch.randn(1, 12)), x)


def test_downsample_visits_even_pixels():
    down = Downsample(1)
    nn.init.zeros_(down.conv.bias)
    nn.init.zeros_(down.conv.weight)
    down.conv.weight.data[0, 0, 1, 1] = 1
    x = torch.arange(48.0).reshape(1, 1, 6, 8)
    assert torch.equal(down(x), x[:, :, ::2, ::2])


def test_upsample_follows_its_weights():
    """Without gradients the kernel is kept, but never longer than the weights stay as they are."""
    up, x = randomise(Upsample(4)), torch.randn(1, 4, 3, 3)

    def agrees() -> bool:
        with torch.no_grad():
            expected = F.conv2d(F.interpolate(x, scale_factor=2), up.conv.weight.float(), up.conv.bias.float(), padding=1)
            return torch.allclose(up(x.to(up.conv.weight.dtype)).float(), expected, atol=0.1 if x.dtype != up.conv.weight.dtype else 1e-5)

    assert agrees()
    with torch.no_grad():
        assert up.kernel() is up.kernel()
        up.conv.weight.mul_(-2)
    assert agrees()
    up.load_state_dict({name: 2 * tensor for name, tensor in up.state_dict().items()})
    assert agrees()
    up.load_state_dict({name: -tensor for name, tensor in up.state_dict().items()}, assign=True)
    assert agrees()
    up.conv.weight.data = up.conv.weight.data.flip(2)
    assert agrees()
    up = copy.deepcopy(up).to(memory_format=torch.channels_last)
    up.conv.weight.data[:] = 1
    up.to(torch.bfloat16)
    assert agrees()
    assert up.state_dict().keys() == {"conv.weight", "conv.bias"}
    weight = up.float().conv.weight
    assert torch.autograd.grad(up(x).sum(), weight)[0].abs().sum() > 0


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_upsample_is_nearest_neighbour_then_convolution(shape, memory_format):
    up = randomise(Upsample(6)).to(memory_format=memory_format).double()
    x = torch.randn(2, 6, *shape, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    expected = up.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(up(x), expected)
    parameters = [x, up.conv.weight, up.conv.bias]
    gradients = torch.autograd.grad(up(x).square().sum(), parameters)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), parameters))


# The whole U


def diffusers_twin(widths, layers, groups, **changes):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DModel(
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=groups,
        norm_eps=1e-5,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        add_attention=False,
        **changes,
    )


@pytest.mark.parametrize(
    ("widths", "layers", "groups"),
    [((8,), 1, 4), ((8, 16), 1, 4), ((16, 8, 24), 1, 8), ((16, 32, 32), 2, 4), ((8, 8, 16, 16), 2, 2), ((32, 64), 3, 32)],
)
def test_diffusers_weights_load_by_name_and_give_the_same_answers(widths, layers, groups):
    theirs = randomise(diffusers_twin(widths, layers, groups))
    ours = UNet(3, 3, widths, layers, groups)
    ours.load_state_dict(theirs.state_dict())  # strict: every name and shape fits
    x, t = torch.randn(3, 3, 16, 24), torch.tensor([0, 411, 999])
    with torch.no_grad():
        expected = theirs(x, t).sample
        difference = (ours(x, t) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5


def test_other_channel_counts_match_diffusers():
    theirs = randomise(diffusers_twin((8, 16), 1, 4, in_channels=4, out_channels=8))
    ours = UNet(4, 8, (8, 16), 1, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, 7), theirs(x, 7).sample, rtol=1e-4, atol=1e-4)


def test_fresh_unet_answers_zero():
    assert not UNet(block_out_channels=(8, 16))(torch.randn(1, 3, 8, 8), 500).any()


def test_config_rebuilds_the_model():
    model = small(in_channels=4, out_channels=8, layers_per_block=2, block_out_channels=[8, 16, 24])
    twin = UNet(**asdict(model.config))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(model(x, 3), twin(x, 3))
    assert model.config.block_out_channels == (8, 16, 24)


def test_one_timestep_serves_all_pictures():
    model, x = small(), torch.randn(3, 3, 8, 8)
    expected = model(x, torch.tensor([40, 40, 40]))
    for t in (40, torch.tensor(40), torch.tensor([40])):
        assert torch.equal(model(x, t), expected)


def test_pictures_of_a_batch_do_not_influence_each_other():
    model, x, t = small(), torch.randn(3, 3, 8, 8), torch.tensor([1, 500, 999])
    together = model(x, t)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_time_and_embedding_reach_the_answer():
    model, x = small(), torch.randn(1, 3, 8, 8)
    vector = torch.randn(1, model.time_channels)
    assert (model(x, 10) - model(x, 20)).abs().max() > 1e-3
    assert (model(x, 10, embedding=vector) - model(x, 10)).abs().max() > 1e-3
    torch.testing.assert_close(model(x, 10, embedding=torch.zeros(1, model.time_channels)), model(x, 10))


def test_every_skip_and_every_parameter_matters():
    model = small(block_out_channels=(8, 16, 16))
    model(torch.randn(2, 3, 16, 16), torch.tensor([10, 900])).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (12, 20)])
def test_answer_has_the_size_of_the_picture(size):
    model = small(block_out_channels=(8, 8, 8))
    assert model(torch.randn(2, 3, *size), 5).shape == (2, 3, *size)


def test_channels_last_and_bfloat16_give_nearly_the_same():
    model, x, t = small(), torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    expected = model(x, t)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x, t), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, t)
    assert (rough.float() - expected).abs().mean() < 0.03 * expected.abs().mean()


class Scale(nn.Module):
    """Stands in for attention: multiplies by a learned number, and by what the context says."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        return x * self.factor * (1 if context is None else context.mean())


def test_attention_builder_fills_the_seats_of_the_published_layout():
    asked = []

    def attention(channels: int, level: int) -> nn.Module | None:
        asked.append((channels, level))
        return None if level == 0 else Scale()

    model = small(block_out_channels=(8, 16, 24), layers_per_block=2, attention=attention)
    assert asked == [(8, 0)] * 2 + [(16, 1)] * 2 + [(24, 2)] * 2 + [(24, -1)] + [(24, 2)] * 3 + [(16, 1)] * 3 + [(8, 0)] * 3
    seats = sorted(name.removesuffix(".factor") for name, _ in model.named_parameters() if name.endswith("factor"))
    downs = [f"down_blocks.{i}.attentions.{j}" for i in (1, 2) for j in (0, 1)]
    ups = [f"up_blocks.{i}.attentions.{j}" for i in (0, 1) for j in (0, 1, 2)]
    assert seats == sorted([*downs, "mid_block.attentions.0", *ups])

    x, context = torch.randn(1, 3, 8, 8), torch.full((1, 4, 5), 2.0)
    model(x, 3, context).square().sum().backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if name.endswith("factor"))
    assert not torch.allclose(model(x, 3, context), model(x, 3))


def test_no_attention_leaves_no_trace():
    assert [name for name in small(attention=lambda channels, level: None).state_dict() if "attentions" in name] == []


# Bad input


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 10, 8), "divisible by 4 .* got 10x8"),
        ((2, 3, 8, 30), "divisible by 4 .* got 8x30"),
        ((2, 1, 8, 8), r"\(batch, 3, height, width\), got \(2, 1, 8, 8\)"),
        ((3, 8, 8), r"\(batch, 3, height, width\), got \(3, 8, 8\)"),
    ],
)
def test_wrong_pictures_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        small(block_out_channels=(8, 8, 8))(torch.randn(shape), 5)


def test_wrong_number_of_timesteps_is_refused():
    with pytest.raises(ValueError, match="2 timesteps for 3 pictures"):
        small()(torch.randn(3, 3, 8, 8), torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_num_groups": 3}, "norm_num_groups=3 must divide"),
        ({"block_out_channels": (8, 10)}, "does not divide 10"),
        ({"block_out_channels": ()}, "at least one level"),
        ({"layers_per_block": 0}, "at least one level"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_time_embedding_shape():
    assert TimeEmbedding(8, 32)(torch.randn(5, 8)).shape == (5, 32)
