"""All parts in one object: shapes, prompts, seeds, saving and loading, the same picture as diffusers, bad input. Lesson 10."""

import copy
import os
import signal
import subprocess
import sys
import textwrap
import warnings

import PIL.Image
import pytest
import torch

import minisd
from minisd.clip import load_clip
from minisd.conditional_unet import ConditionalUNet, ConditionalUNetConfig
from minisd.latent_diffusion import POSTCARDS_CONFIG, join, text_part
from minisd.pipeline import StableDiffusion
from minisd.plots import to_pil
from minisd.samplers import SAMPLERS
from minisd.vae import AutoencoderKL
from minisd.vae_training import VAE_CONFIG, psnr

TINY_UNET = POSTCARDS_CONFIG["unet"] | {"block_out_channels": (16, 32), "heads": (2, 4)}
TINY_VAE = VAE_CONFIG | {"block_out_channels": (8, 8, 16, 16), "scaling_factor": 0.9}
RUN = {"steps": 3, "progress": False}


def tiny_pipeline() -> StableDiffusion:
    """The course's pipeline with few channels and random weights; what starts at zero is random too, so that the text matters."""
    torch.manual_seed(0)
    clip, tokenizer = load_clip(device="cpu")
    unet = ConditionalUNet(ConditionalUNetConfig(**TINY_UNET))
    for weight in unet.parameters():
        if not weight.abs().sum():
            torch.nn.init.normal_(weight, std=0.1)
    config = POSTCARDS_CONFIG | {"guidance": 3.0}
    pipe = join(unet, AutoencoderKL(**TINY_VAE), text_part(clip.text, config["text_layers"]), tokenizer, config)
    pipe.dtype = torch.float32
    return pipe


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return tiny_pipeline()


def latents_of(pipe, prompt, **options):
    return pipe.sample(prompt, **RUN | options)


def tensors(pipe: StableDiffusion) -> dict[str, torch.Tensor]:
    parts = {"unet": pipe.unet, "vae": pipe.vae, **{f"text {i}": encoder for i, encoder in enumerate(pipe.text_encoders)}}
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}


def equal(one: StableDiffusion, other: StableDiffusion) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


# Drawing


def test_one_prompt_gives_a_list_of_one_picture(pipe):
    pictures = pipe("a red boat at night", **RUN)
    assert len(pictures) == 1 and isinstance(pictures[0], PIL.Image.Image) and pictures[0].size == (64, 64) and pictures[0].mode == "RGB"


def test_a_list_of_prompts_gives_as_many(pipe):
    assert [picture.size for picture in pipe(["a red boat", "a tent", ""], **RUN)] == [(64, 64)] * 3
    assert latents_of(pipe, ("a red boat", "a tent")).shape == (2, 4, 8, 8)


def test_shapes_of_the_parts(pipe):
    assert pipe.encode_prompt("a red boat").shape == (1, 40, 128) and pipe.encode_prompt(["a", "b"]).shape == (2, 40, 128)
    latents = latents_of(pipe, "a red boat")
    pictures = pipe.decode(latents)
    assert pictures.shape == (1, 3, 64, 64) and pictures.dtype == torch.float32 and pictures.abs().max() <= 1
    many = pipe.decode(latents.expand(5, -1, -1, -1), batch_size=2)
    assert torch.allclose(many, pictures.expand(5, -1, -1, -1), atol=1e-5)


def test_a_call_is_sample_and_decode(pipe):
    (picture,) = pipe("a red boat", seed=3, **RUN)
    expected = to_pil(pipe.decode(latents_of(pipe, "a red boat", seed=3)))[0]
    assert picture.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("size", "latent"), [(64, (8, 8)), (96, (12, 12)), ((64, 128), (8, 16)), ([32, 48], (4, 6))])
def test_sizes(pipe, size, latent):
    assert latents_of(pipe, "a red boat", size=size).shape == (1, 4, *latent)
    height, width = (size, size) if isinstance(size, int) else size
    assert pipe("a red boat", size=size, **RUN)[0].size == (width, height)


@pytest.mark.parametrize("size", [60, 8, 0, -64, (64, 60), (64,), (64, 64, 64), 64.0, "64"])
def test_sizes_that_cannot_be_halved_are_refused(pipe, size):
    with pytest.raises(ValueError, match="multiples of 16 pixels"):
        latents_of(pipe, "a red boat", size=size)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_sampler_draws_finite_pictures(pipe, sampler):
    assert latents_of(pipe, "a red boat", sampler=sampler).isfinite().all()


# Seeds and noise


def test_the_same_seed_gives_the_same_picture_and_another_another(pipe):
    first = latents_of(pipe, "a red boat", seed=5)
    assert torch.equal(first, latents_of(pipe, "a red boat", seed=5))
    assert not torch.allclose(first, latents_of(pipe, "a red boat", seed=6), atol=0.1)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_with_a_list_of_seeds_no_picture_depends_on_its_neighbours(pipe, sampler):
    prompts, seeds = ["a red boat", "a blue tent at night", "a tree"], [11, 12, 13]
    together = latents_of(pipe, prompts, seed=seeds, sampler=sampler)
    for i in range(3):
        assert torch.allclose(together[i : i + 1], latents_of(pipe, prompts[i], seed=[seeds[i]], sampler=sampler), atol=1e-4)
    turned = latents_of(pipe, prompts[::-1], seed=seeds[::-1], sampler=sampler)
    assert torch.allclose(together, turned.flip(0), atol=1e-4)


def test_drawing_does_not_touch_the_global_generator(pipe):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    latents_of(pipe, "a red boat", sampler="euler_ancestral")
    assert torch.equal(before, torch.get_rng_state())


def test_latents_are_where_it_begins(pipe):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    same = [latents_of(pipe, "a red boat", sampler="dpmpp_2m", **how) for how in ({"latents": noise, "seed": 99}, {"seed": 5})]
    assert torch.equal(*same)
    kept = noise.clone()
    latents_of(pipe, "a red boat", latents=noise)
    assert torch.equal(noise, kept)
    with pytest.raises(ValueError, match=r"must be \(1, 4, 8, 8\), got \(2, 4, 8, 8\)"):
        latents_of(pipe, "a red boat", latents=torch.randn(2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"must be \(1, 4, 12, 12\)"):
        latents_of(pipe, "a red boat", latents=noise, size=96)


@pytest.mark.parametrize(
    ("seed", "message"), [([1, 2], "got 2 seeds for 1 pictures"), ("7", "whole number"), (1.5, "whole number"), (None, "whole number")]
)
def test_bad_seeds(pipe, seed, message):
    with pytest.raises(ValueError, match=message):
        latents_of(pipe, "a red boat", seed=seed)


def test_the_callback_sees_every_step(pipe):
    seen = []
    latents_of(pipe, ["a", "b"], callback=lambda t, latents, clean: seen.append((t, latents.shape, clean.shape)))
    assert [t for t, _, _ in seen] == pipe.scheduler.path(3)[:-1] and {shapes[1:] for shapes in seen} == {((2, 4, 8, 8),) * 2}


# Guidance and negative prompts


def test_guidance_defaults_to_the_models_own(pipe):
    assert torch.equal(latents_of(pipe, "a red boat"), latents_of(pipe, "a red boat", guidance=3.0))
    assert not torch.allclose(latents_of(pipe, "a red boat"), latents_of(pipe, "a red boat", guidance=5.0), atol=1e-3)


def count_rows(pipe, prompt, **options) -> set[int]:
    rows = set()
    hook = pipe.unet.register_forward_pre_hook(lambda module, inputs: rows.add(len(inputs[0])))
    try:
        latents_of(pipe, prompt, **options)
    finally:
        hook.remove()
    return rows


def test_guidance_1_asks_once_and_all_others_twice(pipe):
    assert count_rows(pipe, ["a", "b"], guidance=1) == {2}
    assert count_rows(pipe, ["a", "b"], guidance=1.0) == {2}
    assert count_rows(pipe, ["a", "b"], guidance=2) == {4}
    with pytest.raises(ValueError, match="a negative prompt needs guidance other than 1"):
        latents_of(pipe, "a", negative="b", guidance=1)


def test_guidance_formula(pipe):
    x, told, empty = torch.randn(1, 4, 8, 8), pipe.encode("a red boat"), pipe.encode("")
    plain = pipe.denoiser(1)
    with_, without = plain(x, 500, **told)[0], plain(x, 500, **empty)[0]
    assert torch.allclose(pipe.denoiser(4.0)(x, 500, **told)[0], without + 4 * (with_ - without), atol=1e-4)


def test_negative_prompts(pipe):
    prompts = ["a red boat", "a blue tent"]
    plain, one, both = (latents_of(pipe, prompts, seed=[1, 2], negative=text) for text in ("", "at night", ["at night", "on snow"]))
    assert not torch.allclose(plain, one, atol=1e-3)
    assert torch.allclose(one[0], both[0], atol=1e-5) and not torch.allclose(one[1], both[1], atol=1e-3)
    assert torch.allclose(one, latents_of(pipe, prompts, seed=[1, 2], negative=["at night"]), atol=1e-5)
    assert torch.allclose(plain, latents_of(pipe, prompts, seed=[1, 2], negative=["", ""]), atol=1e-5)
    with pytest.raises(ValueError, match="got 3 negative prompts for 2 prompts"):
        latents_of(pipe, prompts, negative=["a", "b", "c"])


def test_to_push_away_from_the_prompt_itself_is_to_say_nothing(pipe):
    same = latents_of(pipe, "a red boat", negative="a red boat", guidance=7)
    assert torch.allclose(same, latents_of(pipe, "a red boat", guidance=1), atol=1e-3)


# Prompts


def test_a_prompt_that_is_too_long_warns_and_says_what_was_cut(pipe):
    words = " ".join(["red"] * 38)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = pipe.encode_prompt(words)
    with pytest.warns(UserWarning, match="longer than the 38 tokens that fit; cut off: 'boat'"):
        cut = pipe.encode_prompt(f"{words} boat")
    assert torch.equal(fits, cut)


@pytest.mark.parametrize("prompt", [[], 3, None, ["a", 3], [["a"]], ["a", None]])
def test_prompts_that_are_none(pipe, prompt):
    with pytest.raises(ValueError, match="a prompt is one text or a list of texts"):
        latents_of(pipe, prompt)
    with pytest.raises(ValueError, match="a prompt is one text or a list of texts"):
        pipe.encode_prompt(prompt)


@pytest.mark.parametrize("negative", [3, ["a", 3]])
def test_negative_prompts_that_are_none(pipe, negative):
    with pytest.raises(ValueError, match="a prompt is one text or a list of texts|negative prompts for"):
        latents_of(pipe, ["a", "b"], negative=negative)


def test_the_prompt_matters(pipe):
    assert not torch.allclose(latents_of(pipe, "a red boat"), latents_of(pipe, "a blue tent at night"), atol=1e-3)


# Other bad input


def test_unknown_names_list_what_is_known(pipe):
    with pytest.raises(ValueError, match="Unknown sampler 'plms'; known are ddpm"):
        latents_of(pipe, "a", sampler="plms")
    for steps in (0, -1, 1001, 2.5, "ten"):
        with pytest.raises(ValueError, match="steps must be a whole number between 1 and the schedule's 1000"):
            pipe.sample("a", steps=steps, progress=False)


def test_a_unet_for_inpainting_is_refused(pipe):
    painter = copy.copy(pipe)
    painter.unet = ConditionalUNet(ConditionalUNetConfig(**TINY_UNET | {"in_channels": 9}))
    with pytest.raises(ValueError, match="takes 9 channels"):
        latents_of(painter, "a")


def test_latents_of_another_shape_cannot_be_decoded(pipe):
    with pytest.raises(ValueError, match=r"latents must be floats of shape \(B, 4, h, w\)"):
        pipe.decode(torch.randn(1, 3, 8, 8))


# Saving and loading


def test_a_folder_is_read_back_bit_for_bit(pipe, tmp_path):
    folder = pipe.save(tmp_path / "model")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["scheduler", "text_encoder", "tokenizer", "unet", "vae"]
    assert (folder / "model_index.json").is_file()
    again = StableDiffusion.load(folder, device="cpu")
    assert equal(pipe, again) and again.scheduler_config == pipe.scheduler_config and again.guidance == 3.0 and not again.notes
    again.dtype = torch.float32
    drawn = latents_of(again, "a red boat", negative="snow")
    assert torch.allclose(latents_of(pipe, "a red boat", negative="snow"), drawn, atol=1e-3)  # weights lie in memory in another order
    twice = again.save(tmp_path / "again")
    third = StableDiffusion.load(twice, device="cpu")
    third.dtype = torch.float32
    assert torch.equal(drawn, latents_of(third, "a red boat", negative="snow"))
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (twice / path.relative_to(folder)).read_bytes(), path.name


def test_a_single_file_is_read_back_bit_for_bit(pipe, tmp_path):
    folder, path = pipe.save(tmp_path / "model"), pipe.save(tmp_path / "model.safetensors")
    assert path.is_file()
    again = StableDiffusion.load(path, device="cpu", tokenizer=folder / "tokenizer")
    assert equal(pipe, again) and again.scheduler_config == pipe.scheduler_config and again.guidance == 3.0
    again.dtype = torch.float32
    assert torch.allclose(latents_of(pipe, "a red boat"), latents_of(again, "a red boat"), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(tmp_path, dtype):
    pipe = tiny_pipeline()
    for part in (pipe.unet, pipe.vae, *pipe.text_encoders):
        part.to(dtype)
    again = StableDiffusion.load(pipe.save(tmp_path / "model"), dtype=dtype, device="cpu")
    assert equal(pipe, again)


def test_a_folder_that_holds_a_model_is_left_alone(pipe, tmp_path):
    folder = pipe.save(tmp_path / "model")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="holds a model already"):
        pipe.save(folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError):
        pipe.save(tmp_path / "file")
    other = tmp_path / "notes"
    other.mkdir()
    (other / "mine.txt").write_text("kept")
    pipe.save(other)
    assert (other / "mine.txt").read_text() == "kept" and (other / "model_index.json").is_file()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("name", ["model", "model.safetensors"])
def test_killed_in_the_middle_of_a_save(tmp_path, name):
    """The process dies while weights are being written: nothing of that name is there, and saving again works."""
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import minisd.tensor_files as files
        from test_pipeline import tiny_pipeline
        pipe, calls, real = tiny_pipeline(), [0], os.write
        import minisd.checkpoints, minisd.conversion
        def tensor(self, *args, original=minisd.checkpoints.Part.tensor):
            calls[0] += 1
            if calls[0] == 200:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *args)
        minisd.checkpoints.Part.tensor = tensor
        pipe.save({str(tmp_path / name)!r})
        sys.exit("the save was not interrupted")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr[-500:]
    assert not (tmp_path / name).exists()
    again = tiny_pipeline()
    again.save(tmp_path / name)
    options = {"tokenizer": again.save(tmp_path / "beside") / "tokenizer"} if name.endswith("safetensors") else {}
    assert equal(again, StableDiffusion.load(tmp_path / name, device="cpu", **options))


def test_a_disk_that_is_full_leaves_nothing_behind(pipe, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minisd.conversion.write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        pipe.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# Beside diffusers


@pytest.fixture(scope="module")
def theirs(pipe, tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    folder = pipe.save(tmp_path_factory.mktemp("theirs") / "model")
    model = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    model.set_progress_bar_config(disable=True)
    return model


@pytest.mark.parametrize(("steps", "guidance", "negative"), [(5, 3.0, ""), (8, 7.5, "on snow at night"), (3, 1.0, "")])
def test_diffusers_opens_the_folder_and_draws_the_same(pipe, theirs, steps, guidance, negative):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = ["a red boat at night", "a blue house left of a white tree, on grass by day"]
    ours = pipe.decode(pipe.sample(prompts, negative, steps, guidance, seed=2, latents=noise, progress=False))
    asked = {"negative_prompt": [negative] * 2, "num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
    drawn = theirs(prompts, latents=noise, generator=torch.Generator().manual_seed(2), **asked)  # of the fresh noise
    assert psnr(ours, drawn.images * 2 - 1).min() >= 45
    assert ours.std() > 0.05  # not two grey pictures


def test_diffusers_draws_in_the_right_size_by_itself(theirs):
    assert theirs("a red boat", num_inference_steps=2).images[0].size == (64, 64)


# The package


def test_the_name_is_there_without_importing_everything():
    script = "import sys, minisd; assert 'torch' not in sys.modules; minisd.StableDiffusion; assert 'diffusers' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-500:]
    with pytest.raises(AttributeError, match="StableDifusion"):
        minisd.StableDifusion  # noqa: B018


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder 'no-such-model'"):
        StableDiffusion.load("no-such-model")
    with pytest.raises(ValueError, match="'clip' is a part of the course"):
        StableDiffusion.load("clip")
    with pytest.raises((FileNotFoundError, ValueError)):
        StableDiffusion.load(tmp_path)
