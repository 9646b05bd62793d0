"""A whole Stable Diffusion from the disk, against diffusers' pipelines: the same latents after guided steps, and the same picture.

Small here; at the published sizes, with random weights, under the marker `full` (`make test-full`).
"""

import gc
import json
import time
from pathlib import Path

import diffusers
import pytest
import torch

from minisd.checkpoints import open_checkpoint
from minisd.conversion import convert, model_index, write_json
from minisd.loading import load
from minisd.pipeline import StableDiffusion
from tests.real_models import FAMILY_NAMES, off, reference_unet, reference_vae, save_reference, small_tokenizer

CPU = {"dtype": torch.float32, "device": "cpu"}
PROMPT, NEGATIVE = "a red boat at night", "snow"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer().save(tmp_path_factory.mktemp("tokenizer"))


def drawn(pipe: StableDiffusion, latents: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
    """What our parts make of the latents: the picture, in [-1, 1]."""
    asked = {"steps": steps, "guidance": guidance, "latents": latents, "size": 8 * latents.shape[-1]}
    return pipe.decode(pipe.sample(PROMPT, NEGATIVE, **asked, progress=False))


def opened_by_diffusers(family: str, folder: Path) -> diffusers.DiffusionPipeline:
    """Diffusers' pipeline, in float32."""
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    pipeline = kind.from_pretrained(folder, low_cpu_mem_usage=False, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn_by_diffusers(pipeline, latents: torch.Tensor, steps: int, guidance: float) -> torch.Tensor:
    """The same with diffusers."""
    size = 8 * latents.shape[-1]
    asked = {"num_inference_steps": steps, "guidance_scale": guidance, "latents": latents, "output_type": "pt"}
    return pipeline(PROMPT, negative_prompt=NEGATIVE, height=size, width=size, **asked).images * 2 - 1


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_same_picture_as_diffusers(family, prediction_type, tokenizer, tmp_path):
    """From the same latents, guidance 7.5, five steps; from the folder and from the single file that `convert` makes of it."""
    saved = save_reference(family, tmp_path / "saved", prediction_type)
    convert(saved, tmp_path / "x.safetensors")
    convert(saved, tmp_path / "folder")  # with an index, which diffusers wants
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = drawn_by_diffusers(opened_by_diffusers(family, tmp_path / "folder"), latents.clone(), 5, 7.5)
    for source in (tmp_path / "folder", tmp_path / "x.safetensors"):
        loaded = load(source, **CPU, tokenizer=tokenizer)
        assert loaded.scheduler.prediction_type == prediction_type
        assert off(drawn(loaded, latents.clone(), 5, 7.5), expected) <= 1e-4


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_is_saved_comes_back(family, tokenizer, tmp_path):
    """`save` in both layouts: the same weights bit for bit, the same schedule, guidance and words; and a folder is not overwritten."""
    pipe = load(save_reference(family, tmp_path / "saved", "v_prediction"), **CPU)
    pipe.guidance = 3.25
    pipe.save(tmp_path / "folder")
    pipe.save(tmp_path / "x.safetensors")
    for source in (tmp_path / "folder", tmp_path / "x.safetensors"):
        again = StableDiffusion.load(source, **CPU, tokenizer=tokenizer)
        models = [(getattr(one, name) for one in (pipe, again)) for name in ("unet", "vae")]
        for ours, back in [*models, *zip(pipe.text_encoders, again.text_encoders)]:
            assert ours.config == back.config
            assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in ours.state_dict().items())
        assert (again.scheduler_config, again.guidance, again.zero_negative) == (pipe.scheduler_config, 3.25, pipe.zero_negative)
        assert all(torch.equal(one(PROMPT), other(PROMPT)) for one, other in zip(pipe.tokenizers, again.tokenizers))
    with pytest.raises(FileExistsError, match="holds a model already"):
        pipe.save(tmp_path / "folder")


def test_small_models_keep_float32_weights(tmp_path):
    """Where no dtype is asked for, only the products get faster; where one is asked for, the weights have it too."""
    folder = save_reference("sd1", tmp_path / "saved")
    assert load(folder, device="cpu").unet.conv_in.weight.dtype == torch.float32
    half = load(folder, torch.bfloat16, "cpu")
    assert {part.dtype for model in (half.unet, half.vae) for part in model.parameters()} == {torch.bfloat16}
    picture = half.decode(half.sample(PROMPT, steps=2, size=64, progress=False))
    assert picture.dtype == torch.float32 and picture.shape == (1, 3, 64, 64) and picture.isfinite().all()


# The published sizes


FULL_UNETS = {
    "sd1": {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "cross_attention_dim": 768},
    "sd2": {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def save_full(family: str, folder: Path) -> Path:
    """A folder with the published sizes, one part after another; SDXL's stored in float16, to fit."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def save(model, name):
        (model.half() if family == "sdxl" else model).save_pretrained(folder / name)
        del model
        gc.collect()

    save_reference(family, folder)  # tokenizers, scheduler
    save(reference_unet(family, **FULL_UNETS[family]), "unet")
    save(reference_vae(family, (128, 256, 512, 512)), "vae")
    encoders = {
        "sd1": [(768, 3072, 12, 12, "quick_gelu", CLIPTextModel)],
        "sd2": [(1024, 4096, 23, 16, "gelu", CLIPTextModel)],
        "sdxl": [(768, 3072, 12, 12, "quick_gelu", CLIPTextModel), (1280, 5120, 32, 20, "gelu", CLIPTextModelWithProjection)],
    }[family]
    for name, (width, hidden, layers, heads, activation, kind) in zip(("text_encoder", "text_encoder_2"), encoders):
        sizes = {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
        save(kind(CLIPTextConfig(**sizes, hidden_act=activation, projection_dim=width, vocab_size=600, eos_token_id=599)), name)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    write_json(folder / "model_index.json", model_index(open_checkpoint(folder), scheduler["_class_name"]))
    return folder


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_published_sizes(family, tmp_path, tokenizer):
    """UNet, VAE, texts and a picture against diffusers in float32, from the folder and from a single file.

    Only the vocabulary is small, and the latents are 16x16. One side is in memory at a time.
    """
    folder, start = save_full(family, tmp_path / "folder"), time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 4, 16, 16, generator=generator), torch.tensor([801])
    context = torch.randn(1, 77, FULL_UNETS[family]["cross_attention_dim"], generator=generator)
    pictures = torch.rand(1, 3, 128, 128, generator=generator) * 2 - 1
    pooled, time_ids = torch.randn(1, 1280, generator=generator), torch.tensor([[1024.0, 1024, 0, 64, 1024, 1024]])
    more = {"pooled": pooled, "time_ids": time_ids} if family == "sdxl" else {}
    added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}} if family == "sdxl" else {}
    tokens, expected = small_tokenizer()(PROMPT), {}
    pipeline = opened_by_diffusers(family, folder)
    with torch.no_grad():
        expected["unet"] = pipeline.unet(x, t, encoder_hidden_states=context, **added).sample
        expected["encode"] = pipeline.vae.encode(pictures).latent_dist.mean * pipeline.vae.config.scaling_factor
        expected["decode"] = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
        encoders = [pipeline.text_encoder, pipeline.text_encoder_2] if family == "sdxl" else [pipeline.text_encoder]
        answers = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
        expected["context"] = torch.cat([answer.hidden_states[-2] for answer in answers], 2) if len(answers) > 1 else answers[0][0]
        expected["picture"] = drawn_by_diffusers(pipeline, x.clone(), 5, 7.5)
    del pipeline, encoders
    gc.collect()
    convert(folder, tmp_path / "x.safetensors")
    for source in (folder, tmp_path / "x.safetensors"):
        pipe = load(source, **CPU, tokenizer=tokenizer, prediction_type="epsilon")
        with torch.no_grad():
            found = {"unet": pipe.unet(x, t, context, **more), "encode": pipe.vae.encode(pictures), "decode": pipe.vae.decode(x)}
            told = [encoder(tokens) for encoder in pipe.text_encoders]
            found["context"] = torch.cat([each.hidden_states[-2] for each in told], 2) if len(told) > 1 else told[0].sequence
            found["picture"] = drawn(pipe, x.clone(), 5, 7.5)
        errors = {name: off(found[name], expected[name]) for name in expected}
        said = json.dumps({name: f"{error:.1e}" for name, error in errors.items()})
        print(family, source.suffix or "folder", said, f"{time.perf_counter() - start:.0f} s")
        assert max(errors.values()) <= 1e-4, errors
        del pipe
        gc.collect()
