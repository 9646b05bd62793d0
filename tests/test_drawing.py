"""Pictures and segmentation maps of scenes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minisd.drawing import BASE, DARK_TONE, FIRST_THING, GROUND, LIGHT, PALE_TONE, SKY, render, segment
from minisd.landscape import MOON_RADIUS, SUN_RADIUS
from minisd.postcards import COLOURS, GROUNDS, KINDS, LIGHTS, SKIES, boxes, sample_scenes


def all_things(size=0.34):
    """One scene for each kind, colour, sky and ground, with the thing in the middle."""
    index = torch.cartesian_prod(*(torch.arange(len(names)) for names in (KINDS, COLOURS, SKIES, GROUNDS)))
    scenes = sample_scenes(len(index), things=1, seed=5)
    kind, colour, sky, ground = index.T
    absent = torch.full_like(kind, -1)
    return replace(
        scenes,
        sky=sky,
        ground=ground,
        light=torch.zeros_like(sky),
        kind=torch.stack([kind, absent], 1),
        colour=torch.stack([colour, absent], 1),
        x=torch.full_like(scenes.x, 0.5),
        y=torch.full_like(scenes.y, 0.8),
        size=torch.full_like(scenes.size, size),
    )


@pytest.mark.parametrize("size", [1, 7, 32, 50, 64])
def test_shapes_and_ranges(size):
    scenes = sample_scenes(40)
    images, labels = render(scenes, size), segment(scenes, size)
    assert images.shape == (40, 3, size, size) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1 and images.isfinite().all()
    assert labels.shape == (40, size, size) and labels.dtype == torch.uint8
    assert labels.max() < FIRST_THING + len(KINDS)


def test_no_scenes():
    scenes = sample_scenes(0)
    assert render(scenes).shape == (0, 3, 64, 64) and segment(scenes).shape == (0, 64, 64)


def test_pictures_do_not_depend_on_their_neighbours():
    scenes = sample_scenes(300)
    images, labels = render(scenes), segment(scenes)
    parts = torch.cat([render(scenes[start : start + 7]) for start in range(0, 300, 7)])
    torch.testing.assert_close(parts, images, rtol=0, atol=1e-6)
    state = torch.get_rng_state()
    chosen = torch.tensor([299, 5, 130, 131, 7])
    torch.testing.assert_close(render(scenes[chosen]), images[chosen], rtol=0, atol=1e-6)
    torch.testing.assert_close(render(scenes[77]), images[77:78], rtol=0, atol=1e-6)
    assert torch.equal(segment(scenes[chosen]), labels[chosen])
    assert torch.equal(torch.get_rng_state(), state), "render must leave the global generator alone"


@pytest.mark.parametrize("small, factor", [(32, 8), (50, 4), (64, 4)])
def test_same_picture_at_every_size(small, factor):
    scenes = sample_scenes(64, seed=2)
    shrunk = F.avg_pool2d(render(scenes, small * factor), factor)
    difference = (render(scenes, small) - shrunk).abs()
    assert difference.mean() < 0.02
    assert difference.mean(dim=(1, 2, 3)).max() < 0.035
    large, labels = segment(scenes, small * factor), segment(scenes, small)
    agree = labels == large[:, factor // 2 :: factor, factor // 2 :: factor]
    assert agree.float().mean() > 0.97


def test_boxes_are_tight():
    scenes = sample_scenes(200, things=1, seed=1)
    size = 256
    labels, found = segment(scenes, size), boxes(scenes)[:, 0] * size
    for i in range(len(scenes)):
        rows, columns = (labels[i] == FIRST_THING + scenes.kind[i, 0]).nonzero().T
        drawn = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        error = (drawn - found[i]).abs().max() / size
        assert error < 0.015, f"{KINDS[scenes.kind[i, 0]]}: {error:.3f}"


def test_both_things_are_seen():
    scenes = sample_scenes(300, things=2, seed=1)
    labels, found = segment(scenes, 64), boxes(scenes)
    for i in range(len(scenes)):
        for slot in range(2):
            left, top, right, bottom = (found[i, slot] * 64).round().int().tolist()
            share = (labels[i, top:bottom, left:right] == FIRST_THING + scenes.kind[i, slot]).float().mean()
            assert share > 0.3, f"{KINDS[scenes.kind[i, slot]]}: {share:.2f}"


def test_the_light_is_never_hidden():
    scenes = sample_scenes(600, seed=4)
    share = (segment(scenes, 128) == LIGHT).float().mean(dim=(1, 2))
    none, sun, moon = (share[scenes.light == light] for light in range(len(LIGHTS)))
    assert (none == 0).all()
    assert (sun - torch.pi * SUN_RADIUS**2).abs().max() < 0.002
    assert moon.min() > 0.35 * torch.pi * MOON_RADIUS**2 and moon.max() - moon.min() < 0.002


def test_sky_above_ground_below():
    scenes = sample_scenes(200, things=1, seed=6)
    labels = segment(scenes, 64)
    assert not (labels[:, :10] == GROUND).any()
    assert not (labels[:, 44:] == SKY).any()


def test_background_does_not_depend_on_the_things():
    scenes = sample_scenes(100, things=1)
    other = replace(scenes, colour=(scenes.colour + 1).clamp_max(5))
    apart = segment(scenes) < FIRST_THING
    changed = (render(scenes) - render(other)).abs().amax(1) > 0.02
    changed = changed & (F.max_pool2d((~apart).float(), 5, 1, 2) == 0)  # away from the thing's soft edge
    assert changed.float().mean() < 0.002  # a boat's reflection is all that may change


def test_colour_words_are_true():
    """Of a thing's pixels at 32 x 32 most are nearer to a tone of its own colour than to any other colour's."""
    scenes = all_things()
    images, labels = render(scenes, 32), segment(scenes, 32)
    tones = torch.cat([BASE, DARK_TONE, PALE_TONE]).flatten(1)  # (18, 3)
    distance = (images[:, None] - tones[None, :, :, None, None]).square().sum(2)  # (N, 18, S, S)
    nearest = distance.argmin(1) % len(COLOURS)
    thing = labels >= FIRST_THING
    votes = torch.stack([((nearest == colour) & thing).flatten(1).sum(1) for colour in range(len(COLOURS))], 1)
    wrong = (votes.argmax(1) != scenes.colour[:, 0]).nonzero()[:, 0].tolist()
    names = [(KINDS[scenes.kind[i, 0]], COLOURS[scenes.colour[i, 0]], votes[i].tolist()) for i in wrong]
    assert not wrong, names[:10]


def test_things_stand_out():
    """Every thing on every background differs from the same picture without it."""
    scenes = all_things()
    without = replace(scenes, kind=torch.full_like(scenes.kind, -1))
    difference = (render(scenes, 32) - render(without, 32)).square().sum(1).sqrt()
    thing = segment(scenes, 32) >= FIRST_THING
    mean = (difference * thing).sum((1, 2)) / thing.sum((1, 2))
    weakest = mean.argmin()
    assert mean.min() > 0.25, (
        KINDS[scenes.kind[weakest, 0]],
        COLOURS[scenes.colour[weakest, 0]],
        GROUNDS[scenes.ground[weakest]],
        mean.min(),
    )


def test_white_is_shaded():
    """Even a white thing on snow by day has an edge that can be seen."""
    scenes = all_things()
    white_on_snow = (
        (scenes.colour[:, 0] == COLOURS.index("white")) & (scenes.ground == GROUNDS.index("snow")) & (scenes.sky == SKIES.index("day"))
    )
    images, labels = render(scenes[white_on_snow], 64), segment(scenes[white_on_snow], 64)
    for image, label in zip(images, labels):
        thing = F.max_pool2d((label >= FIRST_THING).float()[None], 3, 1, 1)[0] > 0  # with its outline
        grey = image.mean(0)
        assert grey[thing].quantile(0.1) < 0.62 < 0.68 < grey[44:][~thing[44:]].quantile(0.1)


@pytest.mark.parametrize("size", [0, -3])
def test_bad_size(size):
    for draw in (render, segment):
        with pytest.raises(ValueError, match="at least 1 pixel"):
            draw(sample_scenes(1), size)
