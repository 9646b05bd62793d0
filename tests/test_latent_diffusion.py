"""Training on latents: encoding once, the part of CLIP that is read, exact resuming, all parts joined, the shipped model. Lesson 10."""

import json
import math
import shutil

import pytest
import torch

import minisd.latent_diffusion
from minisd.cli_train import TRAINING_STEPS
from minisd.clip import load_clip
from minisd.conditional_unet import ConditionalUNet, ConditionalUNetConfig
from minisd.latent_diffusion import (
    CLIP_OPTIONS,
    POSTCARDS_CONFIG,
    POSTCARDS_STEPS,
    allowed,
    encode_pictures,
    join,
    latent_timesteps,
    load_shipped,
    load_twins,
    measure,
    text_part,
    train_latent,
    train_postcards,
)
from minisd.metrics import read_attributes
from minisd.pipeline import StableDiffusion
from minisd.postcards import caption_matches, parse_caption, sample_scenes
from minisd.scenes import NOVEL_PAIRS
from minisd.text_to_image import load_pairs
from minisd.train import load_checkpoint
from minisd.vae import AutoencoderKL
from minisd.vae_training import VAE_CONFIG
from minisd.weights import model_folder, read_model, shipped_models

TINY = {"unet": POSTCARDS_CONFIG["unet"] | {"block_out_channels": (16, 32), "heads": (2, 4)}}
RUN = {"batch_size": 4, "device": "cpu", "dtype": torch.float32, "progress": False}


@pytest.fixture(scope="module")
def clip():
    return load_clip(device="cpu")


@pytest.fixture(scope="module")
def data(clip):
    generator = torch.Generator().manual_seed(0)
    texts = [("a red boat", "a boat that is red"), ("a tent", "one tent"), ("", "nothing"), ("a tree at night", "by night a tree")] * 3
    return torch.randn(12, 4, 8, 8, generator=generator), texts


def tiny_vae(**config) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**VAE_CONFIG | {"block_out_channels": (8, 8, 8, 8), "scaling_factor": 0.5} | config).eval()


# Encoding


def test_encoding_gives_the_means_scaled_in_order():
    vae, images = tiny_vae(), torch.rand(7, 3, 64, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = encode_pictures(vae, images, batch_size=3)
    assert latents.shape == (7, 4, 8, 4) and latents.dtype == torch.float32 and not latents.requires_grad
    with torch.no_grad():
        expected = 0.5 * vae.posterior(images).mean
    assert torch.allclose(latents, expected, atol=0.05 * expected.abs().max().item())  # products may be in bfloat16
    assert torch.equal(latents, encode_pictures(vae, images, batch_size=3))
    with pytest.raises(ValueError, match="multiples of 8"):
        encode_pictures(vae, torch.zeros(2, 3, 60, 64))


# The part of the text encoder that is read


@pytest.mark.parametrize("layers", [1, 2, 3])
@torch.no_grad()
def test_text_part_is_that_layer_normalised(clip, layers):
    model, tokenizer = clip
    ids = tokenizer(["a red boat at night", "a tent", ""])
    part, whole = text_part(model.text, layers), model.text(ids)
    expected = model.text.text_model.final_layer_norm(whole.hidden_states[layers])
    assert torch.allclose(part(ids).sequence, expected, atol=1e-5)
    assert part.text_projection is None and not part.training and not any(p.requires_grad for p in part.parameters())
    assert len(part.text_model.encoder.layers) == layers


def test_text_part_is_a_copy(clip):
    model, _ = clip
    before = {name: tensor.clone() for name, tensor in model.text.state_dict().items()}
    part = text_part(model.text, 2)
    with torch.no_grad():
        for weight in part.parameters():
            weight += 1
    assert all(torch.equal(before[name], tensor) for name, tensor in model.text.state_dict().items())


@pytest.mark.parametrize("layers", [0, 4, -1])
def test_layers_that_are_not_there(clip, layers):
    with pytest.raises(ValueError, match="layers must be between 1 and 3"):
        text_part(clip[0].text, layers)


def test_clips_loss_reaches_the_end_token_alone_in_the_last_layer(clip):
    """Why the last layer but one is read."""
    model, tokenizer = clip
    ids = tokenizer(["a red boat at night"])
    with torch.enable_grad():
        states = model.text.requires_grad_(True)(ids)
        gradients = torch.autograd.grad(states.pooled.sum(), states.hidden_states)
    model.text.requires_grad_(False)
    end = int(ids[0].argmax())
    reached = [(gradient[0].norm(dim=1) > 0).tolist() for gradient in gradients]
    assert reached[3] == [i == end for i in range(40)] and reached[2] == [i <= end for i in range(40)]


# Training


def test_timesteps_of_latents_lie_where_their_shapes_are_decided(data, clip, monkeypatch):
    drawn = latent_timesteps(20_000, 1000, torch.Generator().manual_seed(0))
    assert 0 <= drawn.min() and drawn.max() <= 999 and 0.1 < (drawn > 500).float().mean() < 0.3 and 270 < drawn.median() < 330
    asked = []

    def spy(count, num_timesteps, generator):
        asked.append(count)
        return latent_timesteps(count, num_timesteps, generator)

    monkeypatch.setattr(minisd.latent_diffusion, "latent_timesteps", spy)
    train_tiny(data, clip, 3)
    assert asked == [4, 4, 4]  # a batch at each step


def train_tiny(data, clip, steps, **options):
    model, tokenizer = clip
    return train_latent(*data, steps, text_part(model.text, 2), tokenizer, **RUN | {"config": TINY} | options)


def test_training_learns_and_leaves_the_text_encoder_alone(data, clip):
    model, tokenizer = clip
    encoder = text_part(model.text, 2)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    trained = train_latent(*data, 30, encoder, tokenizer, config=TINY, **RUN)
    assert sum(trained.losses[-5:]) < sum(trained.losses[:5])
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


def test_a_stopped_training_goes_on_to_the_same_weights(data, clip, tmp_path):
    straight = train_tiny(data, clip, 6)

    class Stop(Exception):
        pass

    def stop(step, model):
        if step == 4:
            raise Stop

    with pytest.raises(Stop):
        train_tiny(data, clip, 6, out=tmp_path, save_every=2, callback=stop, callback_every=4)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] in (2, 4)
    resumed = train_tiny(data, clip, 6, out=tmp_path, resume=True, save_every=2)
    assert len(resumed.losses) == 6 and resumed.losses == straight.losses
    ours, theirs = resumed.model.state_dict(), straight.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_what_a_training_keeps(data, clip, tmp_path):
    trained = train_tiny(data, clip, 2, out=tmp_path, seed=3)
    config, weights = read_model(tmp_path)
    weights = {name.removeprefix("unet."): tensor for name, tensor in weights.items() if name.startswith("unet.")}
    assert config["seed"] == 3 and config["steps"] == 2 and config["text_layers"] == POSTCARDS_CONFIG["text_layers"]
    assert json.loads(json.dumps(config)) == config and config["scheduler"] == POSTCARDS_CONFIG["scheduler"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trained.model.state_dict().items())
    with pytest.raises(FileExistsError, match="already holds a run"):
        train_tiny(data, clip, 2, out=tmp_path)
    with pytest.raises(ValueError, match="cannot resume"):
        train_tiny(data, clip, 3, out=tmp_path, resume=True)


def test_a_trained_folder_is_a_pipeline(data, clip, tmp_path):
    trained = train_tiny(data, clip, 2, out=tmp_path, config=TINY | {"vae": "vae"})
    pipe = load_shipped(tmp_path, device="cpu")
    ours, theirs = pipe.unet.state_dict(), trained.model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    ids = clip[1](["a red boat at night"])
    assert torch.equal(pipe.tokenizers[0](["a red boat at night"]), ids)
    with torch.no_grad():
        assert torch.allclose(pipe.text_encoders[0](ids).sequence, text_part(clip[0].text, 2)(ids).sequence, atol=1e-6)


def test_another_seed_another_model(data, clip):
    first, second = (train_tiny(data, clip, 1, seed=seed).model.state_dict() for seed in (0, 1))
    assert not torch.equal(first["conv_in.weight"], second["conv_in.weight"])


@pytest.mark.parametrize(
    "texts", [[("a",)] * 11, [("a",)] * 6 + [("a", "b")] * 6, ["aa"] * 12, [()] * 12], ids=["fewer", "unequal", "plain", "empty"]
)
def test_texts_that_do_not_fit(data, clip, texts):
    with pytest.raises(ValueError, match="12 images need 12 lists of phrasings"):
        train_tiny((data[0], texts), clip, 1)


def test_latents_that_are_not_finite_stop_the_training_with_the_step(data, clip):
    with pytest.raises(FloatingPointError, match="step"):
        train_tiny((data[0] * math.nan, data[1]), clip, 2)


# Near twins


def test_half_are_postcards_as_they_come_and_half_are_twins():
    images, texts = load_twins(64, phrasings=2, size=64)
    assert images.shape == (64, 3, 64, 64) and len(texts) == 64 and all(len(each) == 2 for each in texts)
    seen = read_attributes(images)
    for k in range(2):
        right = caption_matches([parse_caption(each[k]) for each in texts], seen)
        assert right.float().mean() > 0.95  # the probe errs now and then
    stated = [parse_caption(text) for text, _ in texts]
    assert {len(one["things"]) for one in stated[:32]} == {1}  # as they come: of all kinds, on all grounds
    assert len({one["things"][0]["kind"] for one in stated[:32]}) >= 6 and len({one["ground"] for one in stated[:32]}) == 4
    for i in range(32, 64, 4):  # two things: exchanged, colours exchanged, kinds exchanged
        assert len({text for text, _ in texts[i : i + 4]}) == 4
        assert len({frozenset(each["kind"] for each in one["things"]) for one in stated[i : i + 4]}) == 1
        assert len({frozenset(each["colour"] for each in one["things"]) for one in stated[i : i + 4]}) == 1
        assert all(len({one[name] for one in stated[i : i + 4]}) == 1 for name in ("sky", "ground", "light"))


def test_no_twin_shows_a_pair_that_is_kept_for_novel():
    _, texts = load_twins(400, phrasings=1, size=8)
    pairs = {(each["kind"], each["colour"]) for (text,) in texts for each in parse_caption(text)["things"]}
    assert len(pairs) > 30 and not pairs & NOVEL_PAIRS


def test_scenes_of_one_kind_or_one_colour_have_no_twins():
    scenes = sample_scenes(500, split="train", seed=1, things=2)
    same = (scenes.kind[:, 0] == scenes.kind[:, 1]) | (scenes.colour[:, 0] == scenes.colour[:, 1])
    assert same.any() and not allowed(scenes)[same].any() and allowed(scenes).float().mean() > 0.2


@pytest.mark.parametrize("count", [0, 4, 20, -8])
def test_twins_come_in_eights(count):
    with pytest.raises(ValueError, match="twins come in eights"):
        load_twins(count)
    assert len(load_twins(8, phrasings=1, size=8)[0]) == 8


# Joined


def test_join_makes_a_pipeline_that_draws(data, clip):
    model, tokenizer = clip
    trained = train_tiny(data, clip, 2)
    pipe = join(trained.model, tiny_vae(), text_part(model.text, 2), tokenizer, POSTCARDS_CONFIG | TINY)
    assert pipe.guidance == POSTCARDS_CONFIG["guidance"] and not pipe.unet.training
    assert not any(p.requires_grad for part in (pipe.unet, pipe.vae, *pipe.text_encoders) for p in part.parameters())
    assert pipe("a red boat", steps=2, progress=False)[0].size == (64, 64)


def test_measure_asks_each_sort_and_repeats_itself(data, clip):
    model, tokenizer = clip
    torch.manual_seed(0)
    unet = ConditionalUNet(ConditionalUNetConfig(**TINY["unet"]))
    pipe = join(unet, tiny_vae(), text_part(model.text, 2), tokenizer, POSTCARDS_CONFIG | TINY)
    shares = measure(pipe, count=5, steps=2, batch_size=2)
    assert shares == measure(pipe, count=5, steps=2, batch_size=2)
    assert list(shares) == ["valid 1", "novel 1", "valid 2", "novel 2"] and all(0 <= share <= 1 for share in shares.values())


def test_the_whole_training_in_one_call(tmp_path):
    told = []
    run = {"pictures": 40, "steps": {"unet": 2}, "vae": "vae", "text_encoder": "clip", "batch_size": 4, "progress": False, "device": "cpu"}
    pipe = train_postcards(tmp_path / "model", report=told.append, **run)
    assert told[0] == "drawing 40 postcards" and len(told) == 2 and told[1].startswith("UNet: 2 steps")
    again = StableDiffusion.load(tmp_path / "model", device="cpu")
    in_training = StableDiffusion.load(tmp_path / "model" / "training" / "unet", device="cpu")
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, again.unet.state_dict()[name]) and torch.equal(tensor, in_training.unet.state_dict()[name])
    with pytest.raises(FileExistsError, match="holds a finished model"):
        train_postcards(tmp_path / "model", resume=True, **run)


def test_a_given_autoencoder_is_found_from_any_folder(tmp_path, monkeypatch):
    shutil.copytree(model_folder("vae"), tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    run = {"pictures": 40, "steps": {"unet": 1}, "text_encoder": "clip", "batch_size": 4, "progress": False, "device": "cpu"}
    pipe = train_postcards("out", vae="mine", **run)
    monkeypatch.chdir(tmp_path.parent)
    again = StableDiffusion.load(tmp_path / "out" / "training" / "unet", device="cpu")
    assert torch.equal(pipe.vae.quant_conv.weight, again.vae.quant_conv.weight)


def test_the_whole_training_trains_clip_with_twins_and_loud_words(tmp_path, monkeypatch):
    """The options reach `train_clip`, and what the caller asks for goes before them."""
    seen = {}

    class Stop(Exception):
        pass

    def stand_in(images, texts, steps, out, **options):
        seen.update(options, count=len(images), steps=steps)
        raise Stop

    monkeypatch.setattr(minisd.latent_diffusion, "train_clip", stand_in)
    with pytest.raises(Stop):
        train_postcards(tmp_path, pictures=17, vae="vae", progress=False, lr=1e-4)
    assert seen | CLIP_OPTIONS | {"lr": 1e-4, "count": 16, "steps": POSTCARDS_STEPS["clip"]} == seen
    assert TRAINING_STEPS["postcards"] == POSTCARDS_STEPS["unet"]  # the default of the command line


def test_pictures_that_are_measured_are_not_those_of_training():
    _, texts = load_pairs(200, phrasings=1, size=8)
    train = sample_scenes(200, split="train", seed=0, things=1)
    fresh = sample_scenes(200, split="valid", seed=1_001, things=1)
    assert len(texts) == 200 and not set(train.texture.tolist()) & set(fresh.texture.tolist())


# The shipped model

shipped = pytest.mark.skipif("postcards" not in shipped_models(), reason="not shipped yet")


@pytest.fixture(scope="module")
def postcards() -> StableDiffusion:
    return load_shipped("postcards", device="cpu")


@shipped
def test_the_shipped_model_loads_by_its_name(postcards):
    again = StableDiffusion.load("postcards", device="cpu")
    assert torch.equal(again.unet.conv_in.weight, postcards.unet.conv_in.weight)
    assert postcards.unet.conv_in.weight.dtype == torch.float32 and postcards.guidance > 1
    assert again.sample("a red boat", steps=2, progress=False).shape == (1, 4, 8, 8)


@shipped
def test_the_shipped_model_draws_what_is_asked_on_fresh_seeds(postcards):
    """A quick look; `python benchmarks/shipped.py postcards` measures with 512 prompts each."""
    shares = measure(postcards, count=48, seed=40_404)
    bars = {"valid 1": 0.93, "novel 1": 0.8, "valid 2": 0.85, "novel 2": 0.6}
    assert all(shares[which] >= bar for which, bar in bars.items()), shares


def test_names_that_are_no_latent_diffusion_model():
    with pytest.raises(ValueError, match="'vae' is a part of the course, but no latent diffusion model"):
        load_shipped("vae")
    with pytest.raises(FileNotFoundError, match="no model in 'no-such-model'"):
        load_shipped("no-such-model")
