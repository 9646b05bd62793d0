"""What one model can do: from a picture, into a picture, between prompts, on other canvases, towards a goal. Lesson 11."""

from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch

from minisd.applications import (
    as_images,
    as_mask,
    beside_denoiser,
    down_again,
    edit,
    encode_images,
    img2img,
    inpaint,
    invert,
    last_part,
    way_up,
)
from minisd.clip import load_clip
from minisd.conditional_unet import ConditionalUNet, ConditionalUNetConfig
from minisd.latent_diffusion import POSTCARDS_CONFIG, join
from minisd.pipeline import StableDiffusion
from minisd.plots import to_pil
from minisd.samplers import SAMPLERS, noise_source
from minisd.steering import clip_distance, colourfulness, guided_by_loss, interpolate, mix, panorama
from minisd.text_encoder import TextConfig, TextEncoder
from minisd.vae import AutoencoderKL
from minisd.wrapping import LossGuided, Masked, Windowed, offsets
from tests.real_models import FAMILY_NAMES, save_reference

CLIP, TOKENIZER = load_clip("clip", "cpu")
QUIET = {"progress": False}


def tiny_pipe(in_channels=4):
    """A pipeline with random weights that draws 16x16 pictures from 4x4 latents, in float32."""
    torch.manual_seed(0)
    sizes = dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, heads=(2, 2), depths=(1, 1), cross_attention_dim=16)
    unet = ConditionalUNet(ConditionalUNetConfig(in_channels=in_channels, sample_size=4, **sizes))
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    vae = AutoencoderKL(block_out_channels=(4, 8, 8), layers_per_block=1, norm_num_groups=1, sample_size=16, scaling_factor=0.9)
    text = TextConfig(
        vocab_size=TOKENIZER.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENIZER.length,
    )
    pipe = join(unet, vae, TextEncoder(text).eval().requires_grad_(False), TOKENIZER, POSTCARDS_CONFIG)
    pipe.dtype = torch.float32
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipe()


def a_picture(seed=0, size=(16, 16)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def a_mask(size=(16, 16)):
    mask = torch.zeros(size)
    mask[:, size[1] // 2 :] = 1  # the right half
    return mask


def pixels(pictures):
    return torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures])


# Pictures in any form


def test_pictures_in_any_form_become_one_batch(pipe):
    picture = a_picture()
    batch = as_images(pipe, [picture, picture])
    assert batch.shape == (2, 3, 16, 16) and batch.min() >= -1 and batch.max() <= 1
    assert torch.equal(as_images(pipe, picture)[0], batch[0]) and torch.equal(as_images(pipe, batch), batch)
    assert torch.equal(as_images(pipe, picture.convert("RGBA")), batch[:1])


@pytest.mark.parametrize(
    ("pictures", "complaint"),
    [
        ([], "a PIL picture, a list of them"),
        (["boat.png"], "a PIL picture, a list of them"),
        ([a_picture(), a_picture(size=(16, 32))], "one size"),
        (torch.zeros(3, 16, 16), r"shape \(B, 3, H, W\)"),
        (torch.zeros(1, 4, 16, 16), r"got \(1, 4, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "uint8"),
        (a_picture(size=(20, 16)), "multiples of 8"),
    ],
)
def test_pictures_that_cannot_be_used_are_refused(pipe, pictures, complaint):
    with pytest.raises(ValueError, match=complaint):
        as_images(pipe, pictures)


# img2img


def test_strength_picks_the_last_part_of_the_path():
    path = [900, 600, 300, 0, -1]
    assert last_part(path, 1) == path and last_part(path, 0.5) == [300, 0, -1] and last_part(path, 0) == [-1]
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="strength"):
            last_part(path, wrong)


def test_img2img_walks_only_its_part_and_begins_nearer_with_less_strength(pipe):
    picture, gaps = a_picture(), []
    latents = encode_images(pipe, as_images(pipe, picture))
    for strength in (0.2, 0.6, 1.0):
        seen = []
        img2img(pipe, picture, "a boat", strength, steps=10, callback=lambda t, x, x0, s=seen: s.append(x), **QUIET)
        assert len(seen) == round(10 * strength)
        gaps.append((seen[0] - latents).abs().mean().item())
    assert gaps[0] < gaps[1] < gaps[2]
    through = pixels(img2img(pipe, picture, "a boat", 0.0, **QUIET))
    assert torch.equal(through, pixels(to_pil(pipe.decode(latents))))


def test_one_picture_serves_many_prompts_and_one_prompt_many_pictures(pipe):
    assert len(img2img(pipe, a_picture(), ["a boat", "a house"], steps=2, **QUIET)) == 2
    assert len(img2img(pipe, [a_picture(0), a_picture(1)], "a boat", steps=2, seed=[0, 1], **QUIET)) == 2
    with pytest.raises(ValueError, match="as many prompts as pictures"):
        img2img(pipe, [a_picture(0), a_picture(1)], ["a", "b", "c"], steps=2, **QUIET)


def test_unknown_sampler_and_wrong_seeds_are_named(pipe):
    with pytest.raises(ValueError, match="Unknown sampler 'best'; known are ddpm"):
        img2img(pipe, a_picture(), "a boat", steps=2, sampler="best", **QUIET)
    with pytest.raises(ValueError, match="3 seeds for 1 pictures"):
        img2img(pipe, a_picture(), "a boat", steps=2, seed=[1, 2, 3], **QUIET)


def after_one_draw(seed, shape):
    """A generator that has given the noise to begin with; what it gives next is the fresh noise of the steps."""
    generator = torch.Generator().manual_seed(seed)
    torch.randn(shape, generator=generator)
    return generator


def test_img2img_gives_the_picture_of_diffusers(pipe, tmp_path):
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe.save(tmp_path / "model")
    theirs = StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path / "model", safety_checker=None, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    images = as_images(pipe, a_picture(3))
    latents = encode_images(pipe, images)
    noise = noise_source(latents.shape, 7)()
    path = last_part(pipe.scheduler.path(10), 0.6)
    theirs.prepare_latents = lambda *_, **__: pipe.scheduler.schedule.add_noise(latents, noise, path[0])  # the same noise
    asked = dict(strength=0.6, num_inference_steps=10, guidance_scale=3.0, output_type="np")
    wanted = theirs("a red boat", image=images, generator=after_one_draw(7, latents.shape), **asked).images
    got = pixels(img2img(pipe, images, "a red boat", 0.6, steps=10, guidance=3.0, seed=7, **QUIET))
    assert (got / 255 - torch.from_numpy(wanted)).abs().max() < 0.6 / 255


# Inversion


def test_inverted_noise_draws_the_picture_again(pipe):
    images = as_images(pipe, a_picture())
    noise = invert(pipe, images, "a boat", steps=30, iterations=6, **QUIET)
    again = down_again(pipe, noise, way_up(pipe, 30, 1.0), "a boat", **QUIET)
    latents = encode_images(pipe, images)
    assert (again - latents).abs().mean() < 0.06 * latents.abs().mean()
    same = edit(pipe, images, "a boat", "a boat", guidance=1, steps=30, iterations=6, **QUIET)
    other = edit(pipe, images, "a house", "a boat", guidance=5, steps=30, iterations=6, **QUIET)
    plain = pixels(img2img(pipe, images, "a boat", 0.0, **QUIET)).float()
    assert (pixels(same).float() - plain).abs().mean() < 1 < (pixels(other).float() - plain).abs().mean()


def test_edit_with_no_strength_is_the_autoencoder_alone(pipe):
    picture = a_picture()
    unchanged = pixels(edit(pipe, picture, "a house", "a boat", strength=0, steps=4, **QUIET))
    assert torch.equal(unchanged, pixels(img2img(pipe, picture, "a house", 0, **QUIET)))


# Inpainting


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_pixels_outside_the_mask_are_unchanged_to_the_bit(channels, sampler):
    pipe, picture = tiny_pipe(channels), a_picture()
    (painted,) = inpaint(pipe, picture, a_mask(), "a boat", steps=3, sampler=sampler, **QUIET)
    before, after = pixels([picture])[0], pixels([painted])[0]
    assert torch.equal(before[:, :8], after[:, :8]) and not torch.equal(before[:, 8:], after[:, 8:])
    (raw,) = inpaint(pipe, picture, a_mask(), "a boat", steps=3, sampler=sampler, paste=False, **QUIET)
    assert torch.equal(pixels([raw])[0][:, 8:], after[:, 8:]) and not torch.equal(pixels([raw])[0][:, :8], after[:, :8])


def test_masks_in_any_form_are_the_same_mask(pipe):
    images = as_images(pipe, a_picture())
    mask = a_mask()
    forms = [mask, mask[None], mask[None, None], mask.bool(), PIL.Image.fromarray((255 * mask).byte().numpy())]
    for form in forms:
        assert torch.equal(as_mask(form, images), mask[None, None])


@pytest.mark.parametrize(
    ("mask", "complaint"),
    [
        (torch.zeros(8, 16), "the mask is 16x8 pixels and the picture 16x16"),
        (torch.zeros(1, 3, 16, 16), "a mask is a black and white"),
        (torch.zeros(16), "a mask is a black and white"),
        ("mask.png", "a mask is a black and white"),
    ],
)
def test_masks_that_do_not_fit_are_refused(pipe, mask, complaint):
    with pytest.raises(ValueError, match=complaint):
        inpaint(pipe, a_picture(), mask, "a boat", steps=2, **QUIET)


def test_a_unet_with_other_inputs_cannot_inpaint():
    with pytest.raises(ValueError, match="4 or 9 input channels, and this one has 7"):
        inpaint(tiny_pipe(7), a_picture(), a_mask(), "a boat", steps=2, **QUIET)


def test_a_masked_denoiser_puts_the_noised_picture_outside_the_mask_at_every_step(pipe):
    """What Lugmayr et al. do by hand after each step comes out by itself."""
    schedule, path = pipe.scheduler.schedule, pipe.scheduler.path(6)
    known = encode_images(pipe, as_images(pipe, a_picture()))
    mask = torch.nn.functional.max_pool2d(a_mask()[None, None], pipe.vae.factor)
    noise = noise_source(known.shape, 0)()
    seen = []
    masked = Masked(pipe.denoiser(3), known, mask)
    start = schedule.add_noise(known, noise, path[0])
    for name in ("ddim", "dpmpp_2m", "euler"):
        final = SAMPLERS[name](masked, start, path, callback=lambda t, x, x0: seen.append((t, x)), **QUIET, **pipe.encode("a boat"))
        outside = (mask == 0).expand_as(known)
        assert torch.allclose(final[outside], known[outside], atol=1e-5)
        assert len(seen) == 6
        for t, x in seen:
            assert torch.allclose(x[outside], schedule.add_noise(known, noise, t)[outside], atol=1e-4)
        seen.clear()


def test_a_mask_of_everything_is_text_to_image_and_one_of_nothing_the_autoencoder(pipe):
    picture = a_picture()
    everything = pixels(inpaint(pipe, picture, torch.ones(16, 16), "a boat", steps=4, seed=3, **QUIET))
    assert torch.equal(everything, pixels(pipe("a boat", steps=4, seed=3, **QUIET)))
    nothing = pixels(inpaint(pipe, picture, torch.zeros(16, 16), "a boat", steps=4, paste=False, **QUIET)).float()
    assert (nothing - pixels(img2img(pipe, picture, "a boat", 0, **QUIET)).float()).abs().max() <= 1


def test_inpainting_with_nine_channels_gives_the_picture_of_diffusers(tmp_path):
    from diffusers import StableDiffusionInpaintPipeline

    pipe = tiny_pipe(9)
    pipe.save(tmp_path / "model")
    theirs = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "model", safety_checker=None, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    images, mask = as_images(pipe, a_picture(3)), a_mask()[None, None]
    theirs.vae.encode = lambda x, encode=theirs.vae.encode: Certain(encode(x))  # the most likely latents, as ours
    noise = noise_source((1, 4, 4, 4), 7)()
    asked = dict(height=16, width=16, num_inference_steps=6, guidance_scale=3.0, output_type="np", latents=noise)
    wanted = theirs("a red boat", image=images, mask_image=mask, generator=after_one_draw(7, noise.shape), **asked).images
    got = pixels(inpaint(pipe, images, mask, "a red boat", steps=6, guidance=3.0, seed=7, paste=False, **QUIET))
    assert (got / 255 - torch.from_numpy(wanted)).abs().max() < 0.6 / 255


class Certain:
    """An encoder's answer whose draws are its mean."""

    def __init__(self, output):
        self.latent_dist = self
        self.mean = output.latent_dist.mean

    def sample(self, *_):
        return self.mean

    mode = sample


def test_what_lies_beside_goes_into_both_halves_of_guidance():
    pipe = tiny_pipe(9)
    x, beside, told = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 4, 4), pipe.encode(["a boat", "a house"])
    guided = beside_denoiser(pipe, 3, "")(x, 500, beside=beside, **told)[0]
    plain = beside_denoiser(pipe, 1, "")
    with_text, without = plain(x, 500, beside=beside, **told)[0], plain(x, 500, beside=beside, **pipe.encode(["", ""]))[0]
    assert torch.allclose(guided, without + 3 * (with_text - without), atol=1e-4)


# Between prompts and noises


def test_mixing_on_numbers_that_can_be_checked_by_hand():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    half = 0.5**0.5
    assert torch.allclose(mix(a, b, 0.5), torch.tensor([[0.5, 0.5]]))
    assert torch.allclose(mix(a, b, 0.5, "slerp"), torch.tensor([[half, half]]))
    assert torch.allclose(mix(a, b, 1 / 3, "slerp"), torch.tensor([[3**0.5 / 2, 0.5]]), atol=1e-6)  # 30 degrees of 90
    for way in ("lerp", "slerp"):
        assert torch.allclose(mix(a, b, 0.0, way), a, atol=1e-6) and torch.allclose(mix(a, b, 1.0, way), b, atol=1e-6)
        assert torch.allclose(mix(a, 3 * a, 0.5, way), 2 * a) and torch.isfinite(mix(a, -a, 0.5, way)).all()
        assert torch.isfinite(mix(a, torch.zeros_like(a), 0.5, way)).all()
    with pytest.raises(ValueError, match="Unknown way 'arc'"):
        mix(a, b, 0.5, "arc")
    with pytest.raises(ValueError, match="one shape"):
        mix(a, torch.zeros(1, 3), 0.5)


def test_only_the_arc_keeps_the_length_of_noise():
    noises = noise_source((2, 4, 8, 8), [0, 1])()
    a, b = noises[:1], noises[1:]
    assert mix(a, b, 0.5, "slerp", (1, 2, 3)).std() == pytest.approx(1, abs=0.06)
    assert mix(a, b, 0.5, "lerp").std() == pytest.approx(0.5**0.5, abs=0.06)


def test_a_film_begins_and_ends_with_its_prompts(pipe):
    film = interpolate(pipe, ["a boat", "a house", "a tree"], frames=5, steps=3, seed=[4, 5, 6], batch_size=2, **QUIET)
    ends = pipe(["a boat", "a house", "a tree"], steps=3, seed=[4, 5, 6], sampler="dpmpp_2m", **QUIET)
    assert len(film) == 5
    for frame, end in zip(film[::2], ends):
        assert (pixels([frame]).int() - pixels([end]).int()).abs().max() <= 1
    assert not torch.equal(pixels(film)[1], pixels(film)[0])
    one_noise = interpolate(pipe, ["a boat", "a house"], frames=2, steps=3, seed=4, **QUIET)
    ends = pipe(["a boat", "a house"], steps=3, seed=[4, 4], sampler="dpmpp_2m", **QUIET)
    assert (pixels(one_noise).int() - pixels(ends).int()).abs().max() <= 1
    fresh = interpolate(pipe, ["a boat", "a house"], frames=2, steps=3, seed=4, sampler="ddpm", **QUIET)
    assert not torch.equal(pixels(fresh), pixels(one_noise))  # asked for, a sampler with fresh noise is taken


@pytest.mark.parametrize(("prompt", "frames"), [("a boat", 4), (["a boat"], 4), (["a boat", "a house"], 1)])
def test_a_film_needs_two_ends(pipe, prompt, frames):
    with pytest.raises(ValueError, match="from one prompt to another"):
        interpolate(pipe, prompt, frames, steps=2, **QUIET)


# Other canvases


def test_windows_cover_the_canvas():
    assert offsets(8, 8, 4) == [0] and offsets(20, 8, 4) == [0, 4, 8, 12] and offsets(19, 8, 5) == [0, 5, 10, 11]
    for length in range(4, 20):
        for stride in range(1, 5):
            covered = {place for start in offsets(length, 4, stride) for place in range(start, start + 4)}
            assert covered == set(range(length))


def test_one_window_is_the_model_itself_and_many_are_their_mean(pipe):
    x, told = torch.randn(1, 4, 4, 12), pipe.encode("a boat")
    plain = pipe.denoiser(3)
    assert torch.allclose(Windowed(plain, 4, 4)(x[..., :4], 500, **told)[0], plain(x[..., :4], 500, **told)[0])
    wide = Windowed(plain, 4, 2)(x, 500, **told)[0]
    halves = [plain(x[..., left : left + 4], 500, **told)[0] for left in (0, 2, 4)]
    assert torch.allclose(wide[..., :2], halves[0][..., :2], atol=1e-5)
    assert torch.allclose(wide[..., 2:4], (halves[0][..., 2:] + halves[1][..., :2]) / 2, atol=1e-5)
    (picture,) = panorama(pipe, "a boat", (16, 48), steps=2, **QUIET)
    assert picture.size == (48, 16)


def test_windows_that_leave_gaps_are_refused(pipe):
    with pytest.raises(ValueError, match="leave gaps"):
        Windowed(pipe.denoiser(), 4, 5)
    with pytest.raises(ValueError, match="overlap"):
        panorama(pipe, "a boat", (16, 48), overlap=1.0, steps=2, **QUIET)
    with pytest.raises(ValueError, match="multiples of 8"):
        panorama(pipe, "a boat", (16, 50), steps=2, **QUIET)


# Towards a goal


def test_guidance_by_a_loss_lowers_it(pipe):
    def darkness(pictures):
        return pictures.mean((1, 2, 3))

    free = guided_by_loss(pipe, ["a boat", "a house"], darkness, scale=0, steps=5, **QUIET)
    assert torch.equal(pixels(free), pixels(pipe(["a boat", "a house"], steps=5, **QUIET)))
    dark = guided_by_loss(pipe, ["a boat", "a house"], darkness, scale=0.5, steps=5, **QUIET)
    assert (pixels(dark).float().mean((1, 2, 3)) < pixels(free).float().mean((1, 2, 3))).all()


def test_the_push_is_downhill_and_of_the_length_asked_for(pipe):
    pushed = LossGuided(pipe.denoiser(3), pipe.vae.decode, lambda pictures: pictures.mean((1, 2, 3)), scale=0.2)
    x0 = torch.randn(2, 4, 4, 4)
    moved = pushed.change(x0, 999) - x0
    noise_scale = pipe.scheduler.schedule.noise_scale[999]
    assert torch.allclose(moved.square().mean((1, 2, 3)).sqrt(), 0.2 * noise_scale.expand(2), rtol=1e-3)
    with torch.no_grad():
        assert (pipe.vae.decode(x0 + moved).mean((1, 2, 3)) < pipe.vae.decode(x0).mean((1, 2, 3))).all()


def test_colourfulness_knows_grey_from_colour():
    grey = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    colours = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert colourfulness(grey).item() < 1e-4 < 0.1 < colourfulness(colours).item()
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert colourfulness(red).item() == pytest.approx(0.3 * 1.25**0.5, abs=1e-4)  # rg = 1, yb = 0.5, no spread


def test_clip_distance_is_one_minus_the_cosine():
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    texts = ["a red boat at night", "a blue house on grass by day"]
    with torch.no_grad():
        cosine = (CLIP.encode_image(images) * CLIP.encode_text(TOKENIZER(texts))).sum(1)
        assert torch.allclose(clip_distance(CLIP, TOKENIZER, texts)(images), 1 - cosine, atol=1e-6)
    assert clip_distance(CLIP, TOKENIZER, texts[0])(images).shape == (2,)


def test_no_application_changes_the_pipeline(pipe):
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    inpaint(pipe, a_picture(), a_mask(), "a boat", steps=2, **QUIET)
    guided_by_loss(pipe, "a boat", colourfulness, steps=2, **QUIET)
    assert all(torch.equal(tensor, pipe.unet.state_dict()[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in (*pipe.unet.parameters(), *pipe.vae.parameters()))
    assert replace(pipe) == replace(pipe)


# The published families, at reduced width


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_applications_work_with_the_published_families(family, tmp_path):
    pipe = StableDiffusion.load(save_reference(family, tmp_path / "model"), torch.float32, "cpu")
    picture, mask = a_picture(size=(64, 64)), a_mask((64, 64))
    asked = {"steps": 2, "guidance": 3.0, "progress": False}
    assert img2img(pipe, picture, "a boat", 0.5, **asked)[0].size == (64, 64)
    (painted,) = inpaint(pipe, picture, mask, "a boat", **asked)
    assert torch.equal(pixels([painted])[0][:, :32], pixels([picture])[0][:, :32])
    assert edit(pipe, picture, "a house", "a boat", 0.5, iterations=1, **asked)[0].size == (64, 64)
    assert len(interpolate(pipe, ["a boat", "a house"], frames=3, size=64, **asked)) == 3
    assert panorama(pipe, "a boat", (64, 128), window=64, **asked)[0].size == (128, 64)
    assert guided_by_loss(pipe, "a boat", colourfulness, size=64, **asked)[0].size == (64, 64)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_published_inpainting_models_are_painted_with_as_such(family, tmp_path):
    pipe = StableDiffusion.load(save_reference(family, tmp_path / "model", in_channels=9), torch.float32, "cpu")
    picture, mask = a_picture(size=(64, 64)), a_mask((64, 64))
    (painted,) = inpaint(pipe, picture, mask, "a boat", steps=2, **QUIET)
    assert torch.equal(pixels([painted])[0][:, :32], pixels([picture])[0][:, :32])
    with pytest.raises(ValueError, match="such as a picture to paint into"):
        pipe("a boat", steps=2, size=64)
