"""Variants of one model: enlarging, maps, boxes, a picture as the prompt, other words; and the segmenter that measures them. Lesson 11."""

import json
import math
from dataclasses import replace

import pytest
import torch

from minisd.applications import inpaint
from minisd.drawing import render, segment
from minisd.latent_diffusion import encode_pictures
from minisd.pipeline import StableDiffusion
from minisd.postcards import KINDS, boxes, captions, sample_scenes
from minisd.segmenter import CLASSES, Segmenter, box_overlap, found_boxes, load_segmenter, overlap, train_segmenter
from minisd.variant_training import (
    layouts_of,
    random_holes,
    train_decoder,
    train_inpainting,
    train_layout,
    train_segmentation,
    train_super_resolution,
    train_variation,
    train_words,
)
from minisd.variants import (
    BoxTokens,
    WithBoxes,
    enlarged,
    faithful_to,
    from_layout,
    from_segmentation,
    label_vectors,
    map_beside,
    pooled_look,
    small_beside,
    super_resolution,
    variation,
    widen,
)
from minisd.weights import shipped_models
from minisd.words import WordTokenizer, WordVectors
from tests.test_applications import CLIP, QUIET, a_mask, a_picture, pixels, tiny_pipe

SHORT = {"steps": 3, "batch_size": 4, "progress": False, "dtype": torch.float32}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipe()


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(8, seed=3)


@pytest.fixture(scope="module")
def images(scenes):
    return render(scenes, 16)


@pytest.fixture(scope="module")
def latents(pipe, images):
    return encode_pictures(pipe.vae, images)


@pytest.fixture(scope="module")
def texts(scenes):
    return list(zip(captions(scenes, 0), captions(scenes, 1)))


def fingerprint(pipe):
    return torch.cat([tensor.flatten() for tensor in pipe.unet.state_dict().values()]).clone()


# More input channels


def test_a_widened_unet_answers_as_before_whatever_lies_beside(pipe):
    wide = widen(pipe.unet, 9)
    x, context = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 16)
    with torch.no_grad():
        assert torch.allclose(wide(torch.cat([x, torch.randn(2, 5, 4, 4)], 1), 300, context), pipe.unet(x, 300, context), atol=1e-6)
    assert wide.config.in_channels == 9 and pipe.unet.config.in_channels == 4
    with pytest.raises(ValueError, match="4 input channels already"):
        widen(pipe.unet, 3)


def test_training_leaves_the_pipeline_that_it_began_with_alone(pipe, images, latents, texts):
    before = fingerprint(pipe)
    nine = train_inpainting(pipe, images, latents, texts, **SHORT)
    assert torch.equal(before, fingerprint(pipe)) and nine.unet.config.in_channels == 9
    assert nine.unet.conv_in.weight[:, 4:].abs().max() > 0  # the new channels have learned
    assert not any(parameter.requires_grad for parameter in nine.unet.parameters())
    (painted,) = inpaint(nine, a_picture(), a_mask(), "a boat", steps=2, **QUIET)
    assert torch.equal(pixels([painted])[0][:, :8], pixels([a_picture()])[0][:, :8])


def test_holes_are_rectangles_inside_the_picture():
    holes = random_holes(200, 32)
    assert holes.shape == (200, 1, 32, 32) and set(holes.unique().tolist()) == {0.0, 1.0}
    rows, columns = holes[:, 0].amax(2), holes[:, 0].amax(1)
    assert torch.equal(holes[:, 0], rows[:, :, None] * columns[:, None, :])
    assert rows.sum(1).min() >= 7 and rows.sum(1).max() > 28 and torch.equal(holes, random_holes(200, 32))


# Enlarging


def test_what_lies_beside_is_the_small_picture_itself():
    small = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    beside = small_beside(small, 2, torch.tensor([0.1, 0.2]))
    assert beside.shape == (2, 13, 2, 2)
    assert beside[0, :4, 0, 0].tolist() == [0, 1, 4, 5]  # the red square in the corner
    assert (beside[1, 12] == 0.2).all()


def test_a_faithful_picture_has_the_small_ones_means():
    small, large = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 32, 32)
    error = (torch.nn.functional.avg_pool2d(faithful_to(large, small, 8), 4) - small).abs().max()
    assert error < 0.01 < (torch.nn.functional.avg_pool2d(enlarged(small, (32, 32)), 4) - small).abs().max()


def test_super_resolution(pipe, texts, scenes):
    able = train_super_resolution(pipe, render(scenes, 32), texts, factor=2, **SHORT)  # this autoencoder's f is 4, so the fold is 2
    assert able.unet.config.in_channels == 4 + 12 + 1
    (picture,) = super_resolution(able, a_picture(), steps=2, **QUIET)
    assert picture.size == (32, 32)
    assert len(super_resolution(able, [a_picture(0), a_picture(1)], noise=0.2, steps=2, faithful=False, **QUIET)) == 2
    with pytest.raises(ValueError, match="from 0 to 0.5"):
        super_resolution(able, a_picture(), noise=0.7, steps=2, **QUIET)
    with pytest.raises(ValueError, match="4 input channels and was not trained for enlarging"):
        super_resolution(pipe, a_picture(), steps=2, **QUIET)


# Maps


def test_a_map_becomes_the_share_of_each_class_in_each_place():
    labels = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])[None]
    assert map_beside(labels, 2, classes=2)[0].tolist() == [[[0.75, 0.0]], [[0.25, 1.0]]]
    fine = map_beside(labels, 2, fold=2, classes=2)
    assert fine.shape == (1, 8, 1, 2) and fine[0, :4, 0, 0].tolist() == [1, 1, 1, 0]


def test_from_segmentation(pipe, latents, texts, scenes):
    able = train_segmentation(pipe, latents, segment(scenes, 16), texts, **SHORT)
    assert able.unet.config.in_channels == 4 + 4 * CLASSES
    assert len(from_segmentation(able, segment(scenes[:2], 16), "at night", steps=2, **QUIET)) == 2
    assert len(from_segmentation(able, segment(scenes[:1], 16)[0], ["at night", "by day"], steps=2, **QUIET)) == 2
    for labels in (torch.full((16, 16), CLASSES), torch.zeros(16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"labels must be|integers in 0"):
            from_segmentation(able, labels, "at night", steps=2, **QUIET)
    with pytest.raises(ValueError, match="not trained for maps of 11 classes"):
        from_segmentation(pipe, segment(scenes[:1], 16), "at night", steps=2, **QUIET)


# Boxes


def test_box_tokens_say_where_and_what_and_nothing_is_a_token_too():
    torch.manual_seed(0)
    tokens = BoxTokens(16)
    here = torch.tensor([[[0.1, 0.2, 0.4, 0.6]]])
    assert torch.equal(tokens(here, torch.ones(1, 1, 16)), torch.ones(1, 1, 16))  # at first a token is its label
    torch.nn.init.normal_(tokens.layers[-1].weight)
    with torch.no_grad():
        assert not torch.allclose(tokens(here, torch.ones(1, 1, 16)), tokens(here + 0.1, torch.ones(1, 1, 16)))
    places = torch.tensor([[[0.1, 0.2, 0.4, 0.6], [math.nan] * 4], [[0.5, 0.2, 0.8, 0.6], [0.1, 0.2, 0.4, 0.6]]])
    labels = torch.randn(2, 2, 16)
    with torch.no_grad():
        out = tokens(places, labels)
        swapped = tokens(places, labels.flip(0))
    assert out.shape == (2, 2, 16) and torch.isfinite(out).all()
    assert torch.equal(out[0, 1], tokens.nothing) and torch.equal(swapped[0, 1], tokens.nothing)
    assert not torch.allclose(out[0, 0], out[1, 0]) and not torch.allclose(out[0, 0], swapped[0, 0])


def test_layouts_of_scenes_are_their_boxes_with_colour_and_kind():
    one = sample_scenes(3, things=1, seed=0)
    rows, names = layouts_of(one)
    assert [len(row) for row in rows] == [1, 1, 1] and names[0][0].split()[2] == KINDS[one.kind[0, 0]]
    assert torch.allclose(torch.tensor(rows[0][0]), boxes(one)[0, 0].clamp(0, 1))


def test_from_layout(pipe, latents, scenes):
    rows, names = layouts_of(scenes)
    able = train_layout(pipe, latents, rows, names, [("on grass", "in a meadow")] * 8, **SHORT)
    assert isinstance(able.unet, WithBoxes)
    torch.nn.init.normal_(able.unet.tokens.layers[-1].weight, std=0.3)  # three steps have hardly moved it from zero
    assert len(from_layout(able, rows[:2], names[:2], "on grass", steps=2, **QUIET)) == 2
    assert len(from_layout(able, [[]], [[]], "on grass", steps=2, **QUIET)) == 1
    left = from_layout(able, [[(0.1, 0.2, 0.4, 0.7)]], [["a red house"]], "on grass", steps=2, **QUIET)
    right = from_layout(able, [[(0.6, 0.2, 0.9, 0.7)]], [["a red house"]], "on grass", steps=2, **QUIET)
    assert not torch.equal(pixels(left), pixels(right))
    with pytest.raises(ValueError, match="as many labels as boxes"):
        from_layout(able, [[(0.1, 0.2, 0.4, 0.7)]], [["a house", "a tree"]], "on grass", steps=2, **QUIET)
    for box in ((0.4, 0.2, 0.1, 0.7), (-0.1, 0, 1, 1), (0, 0, 64, 64)):
        with pytest.raises(ValueError, match=r"from 0 to 1, got"):
            from_layout(able, [[box]], [["a house"]], "on grass", steps=2, **QUIET)
    with pytest.raises(ValueError, match="not trained for boxes"):
        from_layout(pipe, [[]], [[]], "on grass", steps=2, **QUIET)


def test_guidance_without_boxes_is_what_boxes_are_guided_away_from(pipe):
    able = tiny_pipe()
    able.unet = WithBoxes(able.unet)
    boxed = from_layout(able, [[(0.1, 0.2, 0.4, 0.7)]], [["a red house"]], "", guidance=5.0, steps=2, **QUIET)
    plain = from_layout(able, [[(0.1, 0.2, 0.4, 0.7)]], [["a red house"]], "", guidance=1.0, steps=2, **QUIET)
    assert not torch.equal(pixels(boxed), pixels(plain))  # the prompts are equal: only the boxes differ between the two questions


def test_labels_are_read_by_the_text_encoder(pipe):
    vectors = label_vectors(pipe, [["a boat", "a house"], ["a boat"]], 3)
    assert vectors.shape == (2, 3, 16) and torch.equal(vectors[0, 0], vectors[1, 0]) and (vectors[1, 1:] == 0).all()


# A picture as the prompt


def test_variation(pipe, images, latents):
    def look(pictures):
        return torch.nn.functional.adaptive_avg_pool2d(pictures, 4).flatten(1)[:, None, :16]

    able = train_variation(pipe, images, latents, look, **SHORT)
    assert len(variation(able, images[:2], look, steps=2, **QUIET)) == 2
    three = pixels(variation(able, images[:1], look, seed=[0, 1, 2], steps=2, **QUIET))
    assert len(three) == 3 and not torch.equal(three[0], three[1])
    with pytest.raises(ValueError, match=r"look must give \(B, L, 16\), which this UNet reads, got \(1, 1, 128\)"):
        variation(able, images[:1], pooled_look(CLIP.encode_image), steps=2, **QUIET)


def test_a_pooled_look_is_one_token_of_numbers_about_one():
    with torch.no_grad():
        context = pooled_look(CLIP.encode_image)(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert context.shape == (2, 1, 128) and torch.allclose(context.square().mean(2), torch.ones(2, 1), atol=1e-4)


# Other words


def test_words_become_numbers_and_unknown_ones_are_told_apart_from_nothing():
    tokenizer = WordTokenizer.train(["a red boat, at night", "a hot-air balloon"], length=6)
    assert tokenizer.words[:3] == ["", "?", ","] and "hot-air" in tokenizer.words
    ids = tokenizer(["A red zebra", "a boat, a boat, a boat"])
    assert ids.shape == (2, 6) and ids[0, 2] == 1 and (ids[0, 3:] == 0).all() and (ids[1] > 1).all()


def test_a_words_vector_knows_nothing_of_its_neighbours():
    torch.manual_seed(0)
    encoder = WordVectors(10, 16, 6)
    with torch.no_grad():
        features = encoder(torch.tensor([[2, 3, 4], [5, 3, 6]]))
    assert features.sequence.shape == (2, 3, 16) and torch.equal(features.sequence[0, 1], features.sequence[1, 1])


def test_train_words_puts_another_encoder_in_clips_place(pipe, latents, texts):
    other = train_words(pipe, latents, texts, **SHORT)
    assert isinstance(other.text_encoders[0], WordVectors) and pipe.tokenizers[0] is not other.tokenizers[0]
    assert len(other(["a red boat at night", "a blue house"], steps=2, progress=False)) == 2


# Kept on the disk


@pytest.mark.parametrize("channels", [9, 17, 48])
def test_a_variant_with_more_inputs_is_saved_and_opened_again(channels, tmp_path):
    pipe = tiny_pipe(channels)
    again = StableDiffusion.load(pipe.save(tmp_path / "model"), device="cpu")
    single = StableDiffusion.load(pipe.save(tmp_path / "model.safetensors"), device="cpu", tokenizer=tmp_path / "model" / "tokenizer")
    for other in (again, single):
        assert all(torch.equal(tensor, other.unet.state_dict()[name]) for name, tensor in pipe.unet.state_dict().items())
    kind = json.loads((tmp_path / "model" / "model_index.json").read_text())["_class_name"]
    assert kind == ("StableDiffusionInpaintPipeline" if channels == 9 else "StableDiffusionPipeline")


def test_the_parts_of_a_variant_open_in_diffusers(tmp_path):
    from diffusers import UNet2DConditionModel

    tiny_pipe(17).save(tmp_path / "model")
    assert UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet").config.in_channels == 17


def test_parts_that_no_layout_has_a_place_for_are_refused(pipe, tmp_path):
    boxed, worded = replace(pipe, unet=WithBoxes(pipe.unet)), replace(pipe, text_encoders=(WordVectors(10, 16, 6),))
    for strange, message in ((boxed, "the unet is a WithBoxes"), (worded, "the text_encoder is a WordVectors")):
        for name in ("model", "model.safetensors"):
            with pytest.raises(ValueError, match=f"{message}, for which no published layout has a place; minisd.weights.save_model"):
                strange.save(tmp_path / name)
    assert not any(tmp_path.iterdir())


# The segmenter


def test_overlap_on_maps_that_can_be_counted():
    a, b = torch.tensor([[[0, 0], [1, 1]]]), torch.tensor([[[0, 0], [0, 1]]])
    assert overlap(a, a).item() == 1 and overlap(a, b).item() == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_box_overlap():
    a = torch.tensor([0.0, 0.0, 0.5, 1.0])
    others = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.25, 0.0, 0.75, 1.0], [0.5, 0.0, 1.0, 1.0], [math.nan] * 4])
    assert box_overlap(a, others).tolist() == pytest.approx([1, 1 / 3, 0, 0])


def test_boxes_are_found_again_in_the_maps_they_came_from():
    scenes = sample_scenes(64, seed=11)
    found = found_boxes(segment(scenes, 64), scenes.kind)
    single = (scenes.kind[:, 0] != scenes.kind[:, 1])[:, None] & (scenes.kind >= 0)  # two of one kind share a box
    assert box_overlap(found, boxes(scenes))[single].mean() > 0.85
    absent = found_boxes(torch.full((1, 64, 64), 2), torch.tensor([[0, -1]]))
    assert absent.isnan().all()


def test_a_segmenter_learns_in_a_few_steps_and_reads_any_size():
    trained = train_segmenter(30, warmup=5, progress=False, dtype=torch.float32)
    assert trained.losses[-1] < 0.8 * trained.losses[0]
    assert trained.model.read(torch.zeros(2, 3, 32, 32)).shape == (2, 64, 64)
    with pytest.raises(ValueError, match=r"shape \(B, 3, H, W\)"):
        Segmenter()(torch.zeros(3, 64, 64))


def test_a_decoder_learns_alone(pipe, images):
    before = {name: tensor.clone() for name, tensor in pipe.vae.state_dict().items()}
    after = train_decoder(pipe, images, **SHORT).vae.state_dict()
    assert all(torch.equal(tensor, pipe.vae.state_dict()[name]) for name, tensor in before.items())
    changed = {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert "decoder" in changed and changed <= {"decoder", "post_quant_conv"}


@pytest.mark.skipif("segmenter" not in shipped_models(), reason="not shipped")
@pytest.mark.parametrize("split", ["valid", "novel"])
def test_the_shipped_segmenter_reads_fresh_postcards(split):
    fresh = sample_scenes(200, split, seed=24_680)
    pictures, wanted = render(fresh, 64), segment(fresh, 64)
    seen = load_segmenter().read(pictures)
    assert overlap(seen, wanted).mean() >= 0.88 and (seen == wanted).float().mean() >= 0.97
