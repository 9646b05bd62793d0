"""The autoencoder: equal to diffusers with the same random weights, padding, tiles, loss, training, the shipped model, bad input.

The published size is marked `full`: `make test-full`. Everywhere else the same comparisons run at a reduced width.
"""

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minisd.cli import main
from minisd.drawing import render
from minisd.plots import to_pil
from minisd.postcards import sample_scenes
from minisd.probe import load_probe, probe_accuracy
from minisd.vae import AutoencoderKL, Gaussian, decode_tiles
from minisd.vae_parts import Halve, Norm
from minisd.vae_training import (
    VAE_CONFIG,
    decoder_loss,
    exchange_channels,
    load_vae,
    perceptual_distance,
    psnr,
    scaling_factor,
    train_vae,
    vae_loss,
)
from minisd.weights import read_model, shipped_models
from tests.real_models import shake

SMALL = {"block_out_channels": (16, 32, 48, 48), "layers_per_block": 2, "norm_num_groups": 8}
FULL = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
SIZES = [pytest.param(SMALL, 40, 56, id="small"), pytest.param(FULL, 256, 192, id="full", marks=pytest.mark.full)]
OURS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 2}  # f = 2, quick


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def from_diffusers(config: dict, levels: int = 4):
    """diffusers' autoencoder with random weights, and ours on the very same memory."""
    from diffusers import AutoencoderKL as Theirs

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    theirs = shake(Theirs(**config, **blocks))
    with torch.device("meta"):
        ours = AutoencoderKL(**config)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours.eval(), theirs


def tiny(**config) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**OURS | config).eval()


@pytest.mark.parametrize(("config", "height", "width"), SIZES)
@torch.no_grad()
def test_equal_to_diffusers(config, height, width):
    ours, theirs = from_diffusers(config)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(1 if height > 64 else 2, 3, height, width, generator=generator) * 2 - 1
    mine, other = ours.posterior(images), theirs.encode(images).latent_dist
    assert off(mine.mean, other.mean) <= 1e-4 and off(mine.log_variance, other.logvar) <= 1e-4
    assert torch.allclose(mine.kl().sum((1, 2, 3)), other.kl(), rtol=1e-4)
    assert torch.allclose(mine.sample(torch.Generator().manual_seed(2)), other.sample(torch.Generator().manual_seed(2)), atol=1e-4)
    latents = torch.randn(mine.mean.shape, generator=generator)
    assert off(ours.decode(latents), theirs.decode(latents / 0.18215).sample) <= 1e-4
    assert off(ours.encode(images), 0.18215 * other.mode()) <= 1e-4


def test_names_and_numbers_of_the_published_size():
    with torch.device("meta"):
        model = AutoencoderKL()
    count = [
        sum(p.numel() for part in parts for p in part.parameters())
        for parts in ((model.encoder, model.quant_conv), (model.decoder, model.post_quant_conv))
    ]
    assert count == [34_163_664, 49_490_199] and len(model.state_dict()) == 248 and model.factor == 8
    assert {"encoder.down_blocks.2.downsamplers.0.conv.weight", "decoder.up_blocks.0.upsamplers.0.conv.bias"} <= model.state_dict().keys()
    assert {"encoder.mid_block.attentions.0.to_out.0.bias", "decoder.mid_block.attentions.0.group_norm.weight"} <= model.state_dict().keys()
    assert all(module.eps == 1e-6 for module in model.modules() if isinstance(module, nn.GroupNorm))


@pytest.mark.parametrize(("levels", "factor"), [(1, 1), (3, 4), (5, 16)])
@torch.no_grad()
def test_other_depths_agree_with_diffusers_too(levels, factor):
    ours, theirs = from_diffusers({"block_out_channels": (8,) * levels, "layers_per_block": 1, "norm_num_groups": 2}, levels)
    images = torch.randn(1, 3, 32, 16).clamp(-1, 1)
    assert ours.factor == factor and ours.encode(images).shape == (1, 4, 32 // factor, 16 // factor)
    assert off(ours.posterior(images).mean, theirs.encode(images).latent_dist.mean) <= 1e-4


# Padding


@torch.no_grad()
def test_halving_sees_rows_2i_to_2i_plus_2():
    layer = Halve(1)
    nn.init.ones_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)
    for axis in (2, 3):
        sees = []
        for row in range(8):
            x = torch.zeros(1, 1, 8, 8)
            x.select(axis, row).fill_(1)
            sees.append(layer(x).sum(5 - axis)[0, 0])  # which rows (columns) of the result notice
        table = torch.stack(sees)  # (8 rows in, 4 rows out)
        for i in range(4):
            assert table[:, i].nonzero()[:, 0].tolist() == [row for row in (2 * i, 2 * i + 1, 2 * i + 2) if row < 8]


def test_halving_has_the_shapes_that_symmetric_padding_has():
    """Why the mistake is so easily made: only the numbers differ."""
    layer, x = Halve(3), torch.randn(1, 3, 10, 12)
    wrong = nn.functional.conv2d(x, layer.conv.weight, layer.conv.bias, stride=2, padding=1)
    assert layer(x).shape == wrong.shape == (1, 3, 5, 6) and not torch.allclose(layer(x), wrong, atol=0.1)


# Distribution


def test_gaussian_by_hand():
    posterior = Gaussian(torch.tensor([[[[0.0, 2.0]]]]), torch.tensor([[[[0.0, math.log(0.25)]]]]))
    assert torch.allclose(posterior.kl(), torch.tensor([[[[0.0, 0.5 * (4 + 0.25 - 1 + math.log(4))]]]]))
    assert torch.equal(posterior.mode(), posterior.mean)
    draws = torch.stack([posterior.sample(torch.Generator().manual_seed(i)) for i in range(4000)])
    assert torch.allclose(draws.mean(0), posterior.mean, atol=0.07) and torch.allclose(draws.std(0), torch.tensor([1.0, 0.5]), atol=0.05)
    again = [posterior.sample(torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)


def test_log_variance_is_clamped():
    model = tiny()
    with torch.no_grad():
        model.quant_conv.bias[4:] = torch.tensor([100.0, -100.0, 0.0, 0.0])
        log_variance = model.posterior(torch.zeros(1, 3, 8, 8)).log_variance
    assert (log_variance[:, 0] == 20).all() and (log_variance[:, 1] == -30).all() and log_variance[:, 2:].abs().max() < 20


@torch.no_grad()
def test_encode_is_the_scaled_mean_or_with_a_generator_a_draw():
    model, images = tiny(scaling_factor=0.5), torch.randn(2, 3, 8, 8).clamp(-1, 1)
    posterior = model.posterior(images)
    assert torch.equal(model.encode(images), 0.5 * posterior.mean)
    drawn = model.encode(images, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, 0.5 * posterior.sample(torch.Generator().manual_seed(1))) and not torch.equal(drawn, model.encode(images))
    output, same = model(images, torch.Generator().manual_seed(1))
    assert torch.allclose(output, model.decode(drawn), atol=1e-5) and torch.equal(same.mean, posterior.mean)


# Tiles


@torch.no_grad()
def test_tiles_are_as_the_whole_when_no_norm_looks_at_the_picture():
    """With the norms told the same numbers, pieces with enough margin are the whole picture, whatever the weights."""
    model = shake(tiny())
    norms = [module for module in model.decoder.up_blocks.modules() if isinstance(module, Norm)] + [model.decoder.conv_norm_out]
    for norm in norms:
        norm.measure = lambda x: (torch.full((len(x), 2), 0.1), torch.full((len(x), 2), 0.7))
        norm.given = norm.measure(torch.zeros(1))
    latents = torch.randn(1, 4, 21, 34, generator=torch.Generator().manual_seed(0))
    whole = model.decode(latents)
    inside = model.post_quant_conv(latents / model.config.scaling_factor)
    tiled = decode_tiles(model.decoder, inside, tile=8, factor=2, margin=8)
    assert whole.shape == tiled.shape == (1, 3, 42, 68) and torch.allclose(whole, tiled, atol=1e-5)
    assert not torch.allclose(whole, decode_tiles(model.decoder, inside, tile=8, factor=2, margin=0), atol=1e-3)


@torch.no_grad()
def test_tiles_leave_the_norms_as_they_were_even_when_interrupted(monkeypatch):
    model, latents = tiny(), torch.randn(1, 4, 12, 12)
    before = model.decode(latents)
    model.decode(latents, tile=5)
    assert torch.equal(model.decode(latents), before)
    calls = []

    def fails(x):
        calls.append(x)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return type(model.decoder).grow(model.decoder, x)

    monkeypatch.setattr(model.decoder, "grow", fails)
    with pytest.raises(KeyboardInterrupt):
        model.decode(latents, tile=5)
    monkeypatch.undo()
    assert torch.equal(model.decode(latents), before)


@torch.no_grad()
def test_small_latents_are_not_cut():
    model, latents = tiny(), torch.randn(1, 4, 6, 6)
    assert torch.equal(model.decode(latents, tile=6), model.decode(latents))
    with pytest.raises(ValueError, match="a tile needs at least one place, got tile=0"):
        model.decode(latents, tile=0)


# Measures and loss


def test_psnr_by_hand():
    images = torch.zeros(3, 3, 4, 4)
    others = torch.stack([torch.full((3, 4, 4), value) for value in (0.2, 0.02, 0.0)])
    assert psnr(images, others).tolist() == pytest.approx([20, 40, 106.02], abs=0.01)
    assert psnr(images + 5, images + 1)[0] > 100  # both are white
    with pytest.raises(ValueError, match="pictures of the same shape"):
        psnr(images, others[:1])


def test_perceptual_distance_is_zero_for_equals_and_grows_with_the_blur():
    probe, images = load_probe(), render(sample_scenes(4, "valid", seed=1), 64)
    blurred = [nn.functional.interpolate(nn.functional.avg_pool2d(images, k), scale_factor=k, mode="bilinear") for k in (2, 4, 8)]
    with torch.no_grad():
        distances = [perceptual_distance(probe, images, others).mean().item() for others in (images, *blurred)]
    assert distances[0] == 0 and sorted(distances) == distances and len(set(distances)) == 4


def test_loss_is_the_sum_of_its_terms():
    model, images = tiny(), render(sample_scenes(2, seed=0), 64)
    probe = load_probe()
    with torch.no_grad():
        output, posterior = model(images, torch.Generator().manual_seed(5))
        distance = (output - images).square().mean()
        loss = vae_loss(0.0, exchange=0)(model, images, torch.Generator().manual_seed(5))
        assert torch.isclose(loss, distance, atol=1e-6)
        loss = vae_loss(0.5, 2.0, probe, exchange=0)(model, images, torch.Generator().manual_seed(5))
        assert torch.isclose(
            loss, distance + 0.5 * posterior.kl().mean() + 2 * perceptual_distance(probe, output, images).mean(), rtol=1e-5
        )
    with pytest.raises(ValueError, match="needs a probe"):
        vae_loss(perceptual_weight=1.0)


def test_about_half_of_the_pictures_get_channels_drawn_by_lot():
    images = torch.rand(2700, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    changed = exchange_channels(images, torch.Generator().manual_seed(1))
    same = (changed == images).flatten(1).all(1)
    assert 0.48 < same.float().mean() < 0.56 and torch.equal(images, before)  # a half, and one draw of 27 changes nothing
    assert sum(torch.equal(images[0][list(picks)], changed[0]) for picks in itertools.product(range(3), repeat=3)) == 1
    assert torch.equal(changed, exchange_channels(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(changed, exchange_channels(images, torch.Generator().manual_seed(2)))
    assert torch.equal(exchange_channels(images, torch.Generator().manual_seed(1), share=0), images)
    every = exchange_channels(images, torch.Generator().manual_seed(1), share=1)
    drawn = (every[:, :, None] == images[:, None]).all(-1).all(-1)  # (N, new channel, old channel)
    assert (drawn.sum(2) == 1).all() and (drawn.float().mean(0) - 1 / 3).abs().max() < 0.04
    grey = (every == every[:, :1]).flatten(1).all(1).float().mean()
    assert 0.08 < grey < 0.15  # three draws of 27
    with pytest.raises(ValueError, match="share must lie between 0 and 1, got 1.5"):
        exchange_channels(images, torch.Generator(), share=1.5)


@torch.no_grad()
def test_losses_exchange_channels_unless_told_not_to():
    model, images = tiny(), render(sample_scenes(6, seed=0), 16)
    for make in (lambda exchange: vae_loss(exchange=exchange), decoder_loss):
        generator = torch.Generator().manual_seed(4)
        changed = exchange_channels(images, generator, 0.7)
        assert make(0.7)(model, images, torch.Generator().manual_seed(4)) == make(0)(model, changed, generator)
        assert not torch.equal(changed, images)
        assert make(0.7)(model, images, torch.Generator().manual_seed(4)) != make(0)(model, images, torch.Generator().manual_seed(4))
    with pytest.raises(ValueError, match="exchange is a share of the pictures"):
        vae_loss(exchange=-1)


def test_decoder_loss_is_the_squared_error_and_leaves_the_encoder_alone():
    model, images = tiny(), render(sample_scenes(4, seed=0), 16)
    loss = decoder_loss(exchange=0)(model, images, torch.Generator().manual_seed(5))
    with torch.no_grad():
        output, _ = model(images, torch.Generator().manual_seed(5))
    assert torch.isclose(loss, (output - images).square().mean(), rtol=1e-5)
    loss.backward()
    assert all(weight.grad is None for part in (model.encoder, model.quant_conv) for weight in part.parameters())
    assert all(weight.grad is not None for part in (model.decoder, model.post_quant_conv) for weight in part.parameters())


def test_scaling_factor_brings_latents_to_standard_deviation_1():
    model, images = tiny(), render(sample_scenes(40, seed=0), 16)
    factor = scaling_factor(model, images, batch_size=7)
    with torch.no_grad():
        drawn = model.posterior(images).sample(torch.Generator().manual_seed(9))
    assert (factor * drawn).std() == pytest.approx(1, rel=0.02)


# Training and files


def stop(step, model):
    raise KeyboardInterrupt


def test_trained_model_comes_back_and_a_stopped_run_goes_on(tmp_path):
    images = render(sample_scenes(12, seed=3), 16)
    options = {"progress": False, "save_every": 2, "batch_size": 4, "device": "cpu", "config": OURS}
    whole = train_vae(images, 4, out=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train_vae(images, 4, tmp_path / "part", callback=stop, callback_every=3, **options)
    resumed = train_vae(images, 4, tmp_path / "part", resume=True, **options)
    back = load_vae(tmp_path / "whole", device="cpu")
    assert whole.losses == resumed.losses and not any(weight.requires_grad for weight in back.parameters())
    assert back.config == whole.model.config and back.config.scaling_factor != 0.18215
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
        assert torch.equal(tensor.cpu(), back.state_dict()[name]), name


def test_decoder_only_leaves_the_latents_as_they_are_to_the_bit(tmp_path):
    images = render(sample_scenes(12, seed=3), 16)
    options = {"progress": False, "batch_size": 4, "device": "cpu"}
    first = train_vae(images, 3, tmp_path / "first", config=OURS, **options).model
    second = train_vae(images, 3, tmp_path / "second", start=tmp_path / "first", decoder_only=True, **options).model
    moved = {name: not torch.equal(weight, second.state_dict()[name]) for name, weight in first.state_dict().items()}
    assert not any(moves for name, moves in moved.items() if name.startswith(("encoder.", "quant_conv.")))
    assert all(moves for name, moves in moved.items() if name.startswith(("decoder.", "post_quant_conv.")) and name.endswith("weight"))
    back = load_vae(tmp_path / "second", device="cpu")
    assert back.config == second.config == first.config and torch.equal(back.encode(images), first.encode(images))
    assert read_model(tmp_path / "second")[0] == read_model(tmp_path / "first")[0] | {"decoder_steps": 3}
    assert all(weight.requires_grad for weight in second.parameters())
    whole = train_vae(images, 3, start=tmp_path / "first", **options).model
    assert not torch.equal(whole.encoder.conv_in.weight, first.encoder.conv_in.weight)
    with pytest.raises(ValueError, match="give config or start, not both"):
        train_vae(images, 1, start=tmp_path / "first", config=OURS)
    with pytest.raises(ValueError, match="decoder_only needs an autoencoder"):
        train_vae(images, 1, decoder_only=True)


def test_a_few_steps_learn(tmp_path):
    images = render(sample_scenes(16, seed=3), 16)
    run = train_vae(images, 60, config=OURS, batch_size=8, warmup=5, device="cpu", progress=False)
    assert sum(run.losses[-5:]) < 0.5 * sum(run.losses[:5])


def test_command_line_trains_on_postcards_and_on_a_folder(tmp_path, capsys):
    assert main(["train", "vae", "--steps", "1", "--pictures", "5", "--out", str(tmp_path / "a")]) == 0
    assert load_vae(tmp_path / "a", device="cpu").config.sample_size == 64
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(to_pil(render(sample_scenes(3, seed=1), 80))):
        picture.save(folder / f"{i}.png")
    assert main(["train", "vae", "--steps", "1", "--data", str(folder), "--out", str(tmp_path / "b")]) == 0
    assert "training on 3 pictures" in capsys.readouterr().out
    further = ["train", "vae", "--steps", "1", "--data", str(folder), "--start", str(tmp_path / "a"), "--out", str(tmp_path / "c")]
    assert main([*further, "--decoder-only"]) == 0
    first, second = (load_vae(tmp_path / name, device="cpu") for name in "ac")
    assert torch.equal(first.encoder.conv_in.weight, second.encoder.conv_in.weight) and first.config == second.config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vae", "--decoder-only"], "--decoder-only needs --start"),
        (["ddpm", "--start", "vae"], "--start and --decoder-only belong to the model vae"),
        (["vae", "--start", "ddpm", "--pictures", "2"], "'ddpm' holds no autoencoder"),
    ],
)
def test_command_line_says_what_does_not_fit(arguments, message, tmp_path, capsys):
    assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_folders_that_hold_no_autoencoder(tmp_path):
    with pytest.raises(ValueError, match="'ddpm' holds no autoencoder"):
        load_vae("ddpm")
    with pytest.raises(FileNotFoundError, match="no model in"):
        load_vae(tmp_path / "nowhere")
    folder = tmp_path / "vae"
    train_vae(render(sample_scenes(4, seed=3), 16), 1, folder, config=OURS, batch_size=4, device="cpu", progress=False)
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if name != "quant_conv.bias"}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit AutoencoderKL: 1 tensors are missing .*quant_conv.bias"):
        load_vae(folder)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 9, 8), "height and width must be multiples of 2, got 9x8"),
        (torch.zeros(1, 1, 8, 8), r"\(B, 3, H, W\) in \[-1, 1\], got \(1, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"got \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "got .* torch.uint8"),
        (torch.zeros(1, 3, 0, 8), "got 0x8"),
    ],
)
def test_pictures_that_do_not_fit(images, message):
    with pytest.raises(ValueError, match=message):
        tiny().encode(images)


@pytest.mark.parametrize("latents", [torch.zeros(1, 3, 8, 8), torch.zeros(4, 8, 8), torch.zeros(1, 4, 8, 8, dtype=torch.long)])
def test_latents_that_do_not_fit(latents):
    with pytest.raises(ValueError, match=r"latents must be floats of shape \(B, 4, h, w\)"):
        tiny().decode(latents)


def test_configurations_that_do_not_fit():
    with pytest.raises(ValueError, match="norm_num_groups=32 must divide every width in block_out_channels, but it does not divide 48"):
        AutoencoderKL(block_out_channels=(32, 48))
    with pytest.raises(ValueError, match="at least one level"):
        AutoencoderKL(block_out_channels=())


# The shipped model

needs_weights = pytest.mark.skipif("vae" not in shipped_models(), reason="the weights are not there")


@needs_weights
@torch.no_grad()
@pytest.mark.parametrize("split", ["valid", "novel"])
def test_shipped_model_brings_fresh_postcards_back(split):
    model, probe = load_vae(device="cpu"), load_probe()
    scenes = sample_scenes(200, split, seed=20_266)
    images = render(scenes, 64)
    latents = torch.cat([model.encode(part) for part in images.split(50)])
    back = torch.cat([model.decode(part) for part in latents.split(50)])
    assert psnr(images, back).mean() >= 29
    noisy = torch.cat(
        [model.decode(part) for part in (latents + 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))).split(50)]
    )
    assert psnr(images, noisy).mean() >= 28  # neighbours of a latent mean nearly the same picture
    assert abs(latents.std().item() - 1) < 0.05 and latents.mean().abs() < 0.5
    assert probe_accuracy(probe, scenes, back.clamp(-1, 1))["all"] >= probe_accuracy(probe, scenes, images)["all"] - 0.03


@needs_weights
@torch.no_grad()
def test_shipped_model_has_no_seams_at_other_sizes():
    model = load_vae(device="cpu")
    assert {name: t.shape for name, t in model.state_dict().items()} == {
        name: t.shape for name, t in AutoencoderKL(**VAE_CONFIG).state_dict().items()
    }
    images = render(sample_scenes(2, "valid", seed=5), 384)
    latents = model.encode(images)
    whole, tiled = model.decode(latents), model.decode(latents, tile=16)
    assert psnr(whole, tiled).min() >= 28
    steps = (tiled - whole)[..., 1:] - (tiled - whole)[..., :-1]  # how the difference changes from a column to the next
    at_seams = steps[..., 127::128].abs().mean()  # columns 127 | 128 and 255 | 256
    assert at_seams < 2 * steps.abs().mean()
