"""Attention: equal to diffusers' classes by name and number, `record` leaves no trace, and the text model begins as the class model."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minisd import attention as module
from minisd.attention import (
    GEGLU,
    Attention,
    FeedForward,
    SpatialTransformer,
    TransformerBlock,
    attend,
    attend_in_pieces,
    attention_weights,
    record,
    spatial_transformers,
)
from minisd.guidance import CLASS_CONFIG, Guided, build_class_model, load_class
from minisd.noise import NoiseSchedule
from minisd.samplers import sample
from minisd.text_encoder import TextFeatures
from minisd.text_to_image import TEXT_CONFIG, build_text_model, load_pairs, load_text, open_doors, text_loss, train_text
from minisd.text_ways import Added, Planes, Pooled
from minisd.unet import UNet
from minisd.weights import save_model, shipped_models


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, so that nothing hides behind a zero-initialised layer."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (
            0.5 if parameter.ndim < 2 else 1 / parameter[0].numel() ** 0.5
        )
    return model.eval()


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The arithmetic


def test_weights_by_hand():
    queries, keys = torch.tensor([[2.0, 0, 0, 2]]), torch.tensor([[1.0, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0]])
    powers = torch.tensor([[math.e**2, math.e, 1.0]])
    torch.testing.assert_close(attention_weights(queries, keys), powers / powers.sum())


def test_weights_of_each_query_sum_to_one_over_the_keys():
    weights = attention_weights(numbers(2, 3, 5, 4), numbers(2, 3, 7, 4, seed=2))
    assert weights.shape == (2, 3, 5, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_attend_is_the_formula_and_so_is_its_gradient(dtype, training):
    q, k, v = (numbers(2, 3, n, 4, seed=n).to(dtype).requires_grad_(training) for n in (5, 7, 7))
    with torch.set_grad_enabled(training):
        ours, formula = attend(q, k, v), attention_weights(q, k) @ v
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(ours, formula, **tolerance)
    if training:
        for one, other in zip(torch.autograd.grad(ours.sum(), (q, k, v)), torch.autograd.grad(formula.sum(), (q, k, v))):
            torch.testing.assert_close(one, other, rtol=tolerance["rtol"], atol=2 * tolerance["atol"])


def test_attend_takes_the_plain_way_only_where_the_fused_backward_is_slow(monkeypatch):
    fused = []
    true = F.scaled_dot_product_attention
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", lambda *rows: fused.append(1) or true(*rows))
    for dtype, places, training, expected in [
        (torch.bfloat16, 64, True, 0),
        (torch.bfloat16, 64, False, 1),
        (torch.float32, 64, True, 1),
        (torch.bfloat16, 1024, True, 1),
        (torch.bfloat16, 1024, False, 0),  # in pieces
        (torch.float32, 1024, False, 1),
    ]:
        fused.clear()
        rows = torch.zeros(1, 1, places, 2, dtype=dtype, requires_grad=training)
        attend(rows, rows, rows)
        assert len(fused) == expected, (dtype, places, training)
    with torch.no_grad():
        fused.clear()
        attend(rows[..., :8, :].bfloat16(), rows[..., :8, :].bfloat16(), rows[..., :8, :].bfloat16())
    assert len(fused) == 1


@pytest.mark.parametrize("common", [0.0, 8.0])
@pytest.mark.parametrize("piece", [1, 200, 10_000])
def test_large_tables_are_finished_in_pieces(monkeypatch, common, piece):
    """As exact as two plain products, and more so where all keys have much in common, which bfloat16 cannot hold beside what differs."""
    monkeypatch.setattr(module, "PIECE", piece)
    q, k, v = (numbers(2, 3, n, 8, seed=n).bfloat16() for n in (50, 70, 70))
    q, k = q + common / 4, k + common
    exact = attention_weights(q.double(), k.double()) @ v.double()
    ours, plain = attend_in_pieces(q, k, v), attention_weights(q, k) @ v
    assert ours.shape == exact.shape and ours.dtype == torch.bfloat16
    ours_off, plain_off = (ours - exact).square().mean(), (plain - exact).square().mean()
    assert ours_off < (0.1 * plain_off if common else 1.2 * plain_off)
    assert torch.equal(attend_in_pieces(q[0, 0], k[0, 0], v[0, 0]), ours[0, 0])


def test_heads_work_each_on_their_own_numbers():
    layer, x, context = randomise(Attention(6, 5, heads=3)), numbers(1, 4, 6), numbers(1, 3, 5, seed=2)
    q, k, v = layer.to_q(x)[0], layer.to_k(context)[0], layer.to_v(context)[0]
    answers = torch.cat([(q[:, p] @ k[:, p].T / 2**0.5).softmax(1) @ v[:, p] for p in (slice(0, 2), slice(2, 4), slice(4, 6))], 1)
    torch.testing.assert_close(layer(x, context)[0], layer.to_out[0](answers))


def test_cross_attention_ignores_the_order_of_the_tokens_and_takes_one_context_for_all():
    layer, x, context = randomise(Attention(8, 6, heads=2)), numbers(3, 4, 8), numbers(1, 5, 6, seed=2)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(layer(x, context), layer(x, context[:, order]))
    torch.testing.assert_close(layer(x, context), layer(x, context.repeat(3, 1, 1)))


def test_geglu_by_hand():
    layer = GEGLU(1, 2)
    with torch.no_grad():
        layer.proj.weight.zero_()
        layer.proj.bias.copy_(torch.tensor([1.0, 3.0, 0.0, 10.0]))  # values, then gates
    torch.testing.assert_close(layer(torch.zeros(1)), torch.tensor([0.0, 30.0]))


# Equal to diffusers


@pytest.mark.parametrize("context_dim", [None, 10])
def test_attention_equals_diffusers(context_dim):
    theirs = pytest.importorskip("diffusers.models.attention_processor").Attention
    theirs = randomise(theirs(query_dim=16, cross_attention_dim=context_dim, heads=4, dim_head=4, bias=False))
    ours = Attention(16, context_dim, heads=4)
    ours.load_state_dict(theirs.state_dict())
    x, context = numbers(2, 9, 16), None if context_dim is None else numbers(2, 5, 10, seed=2)
    torch.testing.assert_close(ours(x, context), theirs(x, context), rtol=1e-4, atol=1e-5)


def test_feed_forward_equals_diffusers():
    theirs = randomise(pytest.importorskip("diffusers.models.attention").FeedForward(16, activation_fn="geglu"))
    ours = FeedForward(16)
    ours.load_state_dict(theirs.state_dict())
    x = numbers(2, 9, 16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_transformer_block_equals_diffusers():
    theirs = pytest.importorskip("diffusers.models.attention").BasicTransformerBlock
    theirs = randomise(theirs(16, num_attention_heads=4, attention_head_dim=4, cross_attention_dim=10, activation_fn="geglu"))
    ours = TransformerBlock(16, 10, heads=4)
    ours.load_state_dict(theirs.state_dict())
    x, context = numbers(2, 9, 16), numbers(2, 5, 10, seed=2)
    torch.testing.assert_close(ours(x, context), theirs(x, encoder_hidden_states=context), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("linear", [True, False], ids=["linear projection (SD 2, XL)", "1x1 convolution (SD 1)"])
@pytest.mark.parametrize("depth", [1, 2])
def test_spatial_transformer_equals_diffusers(linear, depth):
    theirs = pytest.importorskip("diffusers").Transformer2DModel
    theirs = randomise(
        theirs(
            num_attention_heads=4,
            attention_head_dim=4,
            in_channels=16,
            num_layers=depth,
            norm_num_groups=8,
            cross_attention_dim=10,
            use_linear_projection=linear,
        )
    )
    ours = SpatialTransformer(16, 10, heads=4, depth=depth, groups=8)
    weights = theirs.state_dict()
    assert linear or weights["proj_in.weight"].shape == (16, 16, 1, 1)
    ours.load_state_dict({name: tensor.reshape(tensor.shape[:2]) if tensor.ndim == 4 else tensor for name, tensor in weights.items()})
    x, context = numbers(2, 16, 3, 5), numbers(2, 7, 10, seed=2)
    expected = theirs(x, encoder_hidden_states=context).sample
    torch.testing.assert_close(ours(x, context), expected, rtol=1e-4, atol=1e-5)
    assert (expected - x).abs().max() > 0.1


def test_a_fresh_spatial_transformer_changes_nothing_and_keeps_the_layout():
    layer, x = SpatialTransformer(8, 6, heads=2, groups=4), numbers(2, 8, 4, 6).to(memory_format=torch.channels_last)
    assert torch.equal(layer(x, numbers(2, 3, 6)), x)


def test_all_seats_of_the_unet_are_taken():
    unet = UNet(block_out_channels=(8, 16), norm_num_groups=4, attention=spatial_transformers(6, 4, 4))
    seats = [layer for layer in unet.modules() if isinstance(layer, SpatialTransformer)]
    assert [seat.transformer_blocks[0].attn2.heads for seat in seats] == [2, 4, 4, 4, 4, 2, 2]


def test_seats_of_chosen_levels_only():
    unet = UNet(block_out_channels=(8, 16), norm_num_groups=4, attention=spatial_transformers(6, 4, 4, levels=(0, -1)))
    names = [name for name, layer in unet.named_modules() if isinstance(layer, SpatialTransformer)]
    assert sorted(names) == ["down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]


# record


@pytest.fixture
def layer() -> SpatialTransformer:
    return randomise(SpatialTransformer(8, 6, heads=2, groups=4))


def test_record_keeps_the_weights_of_each_call(layer):
    x, context = numbers(2, 8, 3, 5), numbers(2, 7, 6, seed=2)
    plain = layer(x, context)
    with record(layer) as recording:
        torch.testing.assert_close(layer(x, context), plain)
        layer(x[:1], context[:1])
    (maps,) = recording.maps.values()
    assert list(recording.maps) == ["transformer_blocks.0.attn2"] and [tuple(one.shape) for one in maps] == [(2, 15, 7), (1, 15, 7)]
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 15))
    assert not maps[0].requires_grad


def test_record_says_what_the_model_used(layer):
    x, context = numbers(1, 8, 1, 1), numbers(1, 3, 6, seed=2)
    block = layer.transformer_blocks[0]
    with record(layer) as recording:
        layer(x, context)
    rows = layer.proj_in(layer.norm(x).flatten(2).transpose(1, 2))
    rows = block.norm2(rows + block.attn1(block.norm1(rows)))
    attn = block.attn2
    expected = attention_weights(attn.split(attn.to_q(rows)), attn.split(attn.to_k(context))).mean(1)
    torch.testing.assert_close(recording.maps["transformer_blocks.0.attn2"][0], expected)


def test_record_over_places_and_both(layer):
    x, context = numbers(1, 8, 2, 2), numbers(1, 3, 6)
    with record(layer, "attn1") as places, record(layer, "") as both:
        layer(x, context)
    assert [tuple(maps[0].shape) for maps in places.maps.values()] == [(1, 4, 4)]
    assert len(both.maps) == 2


def test_nested_recordings_end_each_on_its_own(layer):
    x, context = numbers(1, 8, 2, 2), numbers(1, 3, 6)
    with record(layer) as outer:
        with record(layer) as inner:
            layer(x, context)
        layer(x, context)
    layer(x, context)
    assert [len(*one.maps.values()) for one in (outer, inner)] == [2, 1]


def test_record_ends_with_an_exception_and_keeps_what_it_has(layer):
    with pytest.raises(RuntimeError, match="enough"), record(layer) as recording:
        layer(numbers(1, 8, 2, 2), numbers(1, 3, 6))
        raise RuntimeError("enough")
    assert module.RECORDINGS == [] and len(recording.maps) == 1


def test_record_leaves_other_models_alone(layer):
    other = randomise(SpatialTransformer(8, 6, heads=2, groups=4), seed=3)
    with record(layer) as recording:
        other(numbers(1, 8, 2, 2), numbers(1, 3, 6))
    assert recording.maps == {}


def test_nothing_is_computed_when_nobody_records(layer, monkeypatch):
    monkeypatch.setattr(module, "attention_weights", lambda *rows: pytest.fail("weights were computed"))
    with torch.no_grad():
        layer(numbers(1, 8, 2, 2), numbers(1, 3, 6))


# Bad input


@pytest.mark.parametrize("heads", [3, 0])
def test_heads_must_divide_the_width(heads):
    with pytest.raises(ValueError, match=f"the number of heads must divide the width 8, and {heads} does not."):
        Attention(8, heads=heads)


@pytest.mark.parametrize("shape", [(2, 3, 7), (3, 3, 6), (3, 6)])
def test_a_context_that_does_not_fit_is_refused(layer, shape):
    with pytest.raises(ValueError, match=r"the context of 2 pictures must be \(2, tokens, 6\), got "):
        layer(numbers(2, 8, 2, 2), numbers(*shape))


def test_a_missing_context_is_refused(layer):
    with pytest.raises(ValueError, match="told what to draw in words: give it context="):
        layer(numbers(2, 8, 2, 2), None)


def test_record_refuses_a_model_without_attention():
    with pytest.raises(ValueError, match="Linear has no attention whose name ends in 'attn2'"), record(nn.Linear(2, 2)):
        pass


# The text model


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP that has hardly been trained."""
    from minisd.clip import train_clip

    folder = tmp_path_factory.mktemp("clip")
    texts = [["a red boat at night", "at night, a red boat"], ["a blue tree by day", "by day, a blue tree"]] * 2
    train_clip(numbers(4, 3, 32, 32), texts, steps=1, out=folder, progress=False, device="cpu", batch_size=2)
    return folder


@pytest.fixture(scope="module")
def class_folder(tmp_path_factory):
    """A class model with random weights."""
    return save_model(tmp_path_factory.mktemp("class"), randomise(build_class_model(CLASS_CONFIG)), CLASS_CONFIG)


TEXTS = [["a red boat at night", "at night, a red boat"], ["a blue tree by day", "by day, a blue tree"]]


@pytest.fixture(scope="module")
def options(clip_folder, class_folder):
    return {"text_encoder": clip_folder, "start": class_folder, "progress": False, "device": "cpu", "batch_size": 2}


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory):
    """(folder, its `Trained`) of a text model after two steps."""
    folder = tmp_path_factory.mktemp("text") / "run"
    return folder, train_text(numbers(2, 3, 32, 32), TEXTS, 2, folder, **options)


@pytest.mark.parametrize("source", ["random", "shipped"])
def test_with_closed_doors_it_draws_as_the_class_model(source, class_folder):
    start = class_folder if source == "random" else "class"
    told = load_class(start, device="cpu").model
    model = open_doors(TEXT_CONFIG, start)
    x, timesteps = numbers(2, 3, 32, 32), torch.tensor([300, 900])
    with torch.no_grad():
        expected = told(x, timesteps)  # told no class
        for seed in (1, 2):
            torch.testing.assert_close(model(x, timesteps, context=numbers(2, 40, 128, seed=seed)), expected, rtol=0, atol=1e-4)
    assert expected.abs().max() > 0.5


@pytest.mark.parametrize("way", [Added, Planes])
def test_other_ways_begin_as_the_class_model_and_then_listen(way, class_folder):
    told = load_class(class_folder, device="cpu").model
    model = way(open_doors(TEXT_CONFIG, class_folder), 128).eval()
    x, timesteps, vectors = numbers(2, 3, 32, 32), torch.tensor([300, 900]), numbers(2, 1, 128, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(model(x, timesteps, context=vectors), told(x, timesteps), rtol=0, atol=1e-4)
        entrance = model.linear if way is Added else model.net.unet.conv_in
        entrance.weight += 0.1
        assert (model(x, timesteps, context=vectors) - model(x, timesteps, context=-vectors)).abs().max() > 1e-3


def test_the_one_vector_is_a_sequence_of_one_with_mean_square_one(clip_folder):
    from minisd.clip import load_clip

    clip, tokenizer = load_clip(clip_folder, device="cpu")
    ids = tokenizer(["a red boat at night", "a tree"])
    features, one = clip.text(ids), Pooled(clip.text)(ids).sequence
    assert one.shape == (2, 1, 128)
    torch.testing.assert_close(one.square().mean(2), torch.ones(2, 1))
    torch.testing.assert_close(F.cosine_similarity(one[:, 0], features.pooled), torch.ones(2))


def test_the_first_gradient_reaches_the_last_layer_of_each_door_only(class_folder):
    model = open_doors(TEXT_CONFIG, class_folder)
    model(numbers(2, 3, 32, 32), torch.tensor([300, 900]), context=numbers(2, 40, 128)).square().mean().backward()
    heard = {name for name, p in model.named_parameters() if ".attentions." in name and p.grad is not None and p.grad.abs().max() > 0}
    assert len(heard) == 8 and all(".proj_out." in name for name in heard)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"unet": CLASS_CONFIG["unet"] | {"block_out_channels": (56, 112)}},
            r"its block_out_channels is \[56, 112\], .* needs \[112, 112\]",
        ),
        ({"prediction_type": "epsilon"}, "its prediction_type is 'epsilon', and this model needs"),
        ({"schedule": "linear"}, "its schedule is 'linear', and this model needs 'cosine'"),
    ],
)
def test_open_doors_refuses_a_start_that_was_trained_otherwise(tmp_path, changes, message):
    config = CLASS_CONFIG | changes
    save_model(tmp_path, build_class_model(config), config)
    with pytest.raises(ValueError, match=message):
        open_doors(TEXT_CONFIG, tmp_path)


def test_the_loss_reads_one_phrasing_or_the_empty_text():
    read = []

    class Spy(nn.Module):
        def forward(self, ids):
            read.append(ids)
            return TextFeatures(torch.zeros(len(ids), 2, 4), None, ())

    model = UNet(3, 3, (8,), 1, 4, attention=spatial_transformers(4, 4, 4))
    images, ids = numbers(400, 3, 4, 4), torch.tensor([[1, 2], [3, 4]]).expand(400, 2, 2)
    loss_fn = text_loss(NoiseSchedule("cosine"), "v_prediction", Spy(), torch.tensor([[9, 9]]), dropout=0.25)
    assert loss_fn(model, (images, ids), torch.Generator().manual_seed(0)).isfinite()
    counts = {row: read[0].tolist().count(list(row)) for row in ((1, 2), (3, 4), (9, 9))}
    assert sum(counts.values()) == 400 and 60 < counts[9, 9] < 140 and min(counts.values()) > 60


def test_text_loss_asks_for_its_timesteps():
    asked, generator = [], torch.Generator().manual_seed(0)

    def early(count, num_timesteps, given):
        asked.append((count, num_timesteps, given is generator))
        return torch.arange(count)

    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x, timesteps, context):
            asked.append(timesteps.tolist())
            return self.weight * x

    encoder = nn.Module()
    encoder.forward = lambda ids: TextFeatures(torch.zeros(len(ids), 2, 4), None, ())
    loss_fn = text_loss(NoiseSchedule("cosine"), "sample", encoder, torch.tensor([[9, 9]]), pick_timesteps=early)
    assert loss_fn(Told(), (numbers(6, 3, 4, 4), torch.ones(6, 1, 2, dtype=torch.long)), generator).isfinite()
    assert asked == [(6, 1000, True), [0, 1, 2, 3, 4, 5]]


def test_a_trained_model_loads_and_draws(trained):
    folder, run = trained
    config = json.loads((folder / "config.json").read_text())
    assert config["steps"] == 2 and config["guidance"] == CLASS_CONFIG["guidance"] and "classes" not in config
    denoiser, encode = load_text(folder, device="cpu")
    for (name, ours), theirs in zip(run.model.state_dict().items(), denoiser.model.state_dict().values()):
        assert torch.equal(ours, theirs), name
    context = encode(["a red boat at night", "a blue tree by day"])
    assert context.shape == (2, 40, 128) and torch.equal(encode("a red boat at night"), context[:1])
    guided = Guided(denoiser, 3, {"context": encode([""])})
    drawn = sample(guided, (2, 3, 32, 32), steps=2, seed=[1, 2], progress=False, context=context)
    alone = sample(guided, (1, 3, 32, 32), steps=2, seed=[2], progress=False, context=context[1:])
    assert drawn.shape == (2, 3, 32, 32) and drawn.isfinite().all()
    torch.testing.assert_close(drawn[1:], alone, rtol=0, atol=0.1)  # products in bfloat16 may differ with the size of the batch


def test_recording_a_guided_sampler(trained):
    denoiser, encode = load_text(trained[0], device="cpu")
    guided = Guided(denoiser, 3, {"context": encode([""])})
    with record(denoiser.model) as recording:
        sample(guided, (1, 3, 32, 32), steps=3, progress=False, context=encode("a red boat"))
    assert len(recording.maps) == 4 and {len(maps) for maps in recording.maps.values()} == {3}
    assert sorted({tuple(maps[0].shape) for maps in recording.maps.values()}) == [(2, 16, 40), (2, 64, 40)]


def test_training_goes_on_where_it_stopped(trained, options, tmp_path):

    def stop(step, model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_text(numbers(2, 3, 32, 32), TEXTS, 2, tmp_path, save_every=1, callback=stop, callback_every=1, **options)
    resumed = train_text(numbers(2, 3, 32, 32), TEXTS, 2, tmp_path, resume=True, **options)
    for name, tensor in trained[1].model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("texts", [[["a"]], [["a"], ["a", "b"]], [[], []], ["a boat", "a tent"]])
def test_texts_must_fit_the_images(texts):
    with pytest.raises(ValueError, match="2 images need 2 lists of phrasings, equally long and not empty; got"):
        train_text(numbers(2, 3, 32, 32), texts, 1)


@pytest.mark.parametrize("prompts", [3, None, [], ["a", 3], b"a"])
def test_prompts_must_be_texts(trained, prompts):
    _, encode = load_text(trained[0], device="cpu")
    with pytest.raises(ValueError, match="prompts are one text or a list of texts, got"):
        encode(prompts)


def test_a_folder_of_another_model_is_refused():
    with pytest.raises(ValueError, match="'class' holds no text-conditioned model: its config.json has no 'text_encoder'"):
        load_text("class", device="cpu")


def test_pairs_are_halves_of_one_and_of_two_things():
    from minisd.postcards import parse_caption

    images, texts = load_pairs(6, phrasings=2)
    assert images.shape == (6, 3, 32, 32) and images.abs().max() <= 1
    assert [[len(parse_caption(text)["things"]) for text in pair] for pair in texts] == [[1, 1]] * 3 + [[2, 2]] * 3
    assert [len(load_pairs(count)[1]) for count in (1, 5)] == [1, 5]


def test_the_size_of_the_model():
    assert sum(p.numel() for p in build_text_model(TEXT_CONFIG).parameters()) == 4_469_856


def test_the_counts_of_the_benchmark(monkeypatch):
    """What `benchmarks/text_ways.py` counts, on true attributes and on wrong ones."""
    from pathlib import Path

    from minisd.postcards import attributes, captions, sample_scenes

    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    monkeypatch.delitem(sys.modules, "text_ways", raising=False)
    from text_ways import two_things

    scenes = sample_scenes(200, split="valid", seed=3, things=2)
    asked, truth = captions(scenes, seed=3), attributes(scenes)
    assert two_things(asked, truth) == {"kinds": 200, "colours there": 200, "colours": 200, "sides": 200}
    mirrored = {name: values.flip(1) if values.ndim == 2 else values for name, values in truth.items()}
    counts = two_things(asked, mirrored)
    assert (counts["kinds"], counts["colours there"], counts["colours"]) == (200, 200, 200) and counts["sides"] == 0
    crossed = {**truth, "colour": truth["colour"].clone()}
    for row in crossed["colour"]:
        there = (row >= 0).nonzero()[:, 0]
        row[there] = row[there.flip(0)]
    counts = two_things(asked, crossed)
    same_colour = int((scenes.colour[:, 0] == scenes.colour[:, 1]).sum())
    same_kind = int((scenes.kind[:, 0] == scenes.kind[:, 1]).sum())
    assert counts["kinds"] == counts["colours there"] == 200 and counts["colours"] == same_colour + same_kind
    assert counts["sides"] == 200 - same_kind


# The shipped model


@pytest.mark.skipif("text" not in shipped_models(), reason="not shipped yet")
def test_the_shipped_model_draws_what_is_said():
    from minisd.metrics import caption_accuracy
    from minisd.postcards import captions, sample_scenes

    denoiser, encode = load_text(device="cpu")
    guided = Guided(denoiser, 3, {"context": encode([""])})
    scenes = sample_scenes(32, split="valid", seed=123_456, things=1)
    asked = captions(scenes, seed=123_456)
    drawn = sample(guided, (32, 3, 32, 32), steps=12, seed=7, progress=False, context=encode(asked))
    assert caption_accuracy(drawn, asked) > 0.6
