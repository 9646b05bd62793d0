"""Scenes drawn by lot, and sentences about them."""

from collections import Counter
from dataclasses import fields

import pytest
import torch

from minisd import captions as grammar
from minisd.postcards import (
    COLOURS,
    GROUNDS,
    KINDS,
    LIGHTS,
    NOVEL_PAIRS,
    PLACES,
    SKIES,
    SPLITS,
    attributes,
    boxes,
    caption_matches,
    captions,
    parse_caption,
    sample_scenes,
)

N = 3000


def pairs(scenes):
    """For each scene the list of its (kind, colour) names."""
    return [
        [(KINDS[k], COLOURS[c]) for k, c in zip(kinds, colours) if k >= 0]
        for kinds, colours in zip(scenes.kind.tolist(), scenes.colour.tolist())
    ]


def same(a, b):
    return all(torch.equal(getattr(a, field.name).nan_to_num(9), getattr(b, field.name).nan_to_num(9)) for field in fields(a))


# Scenes


@pytest.mark.parametrize("split", SPLITS)
def test_same_arguments_same_scenes(split):
    torch.manual_seed(1)
    first = sample_scenes(100, split, seed=3)
    state = torch.get_rng_state()
    assert same(first, sample_scenes(100, split, seed=3))
    assert torch.equal(state, torch.get_rng_state()), "sample_scenes must leave the global generator alone"
    assert same(first[:40], sample_scenes(40, split, seed=3)), "a smaller n gives the first scenes of a larger one"
    assert not same(first, sample_scenes(100, split, seed=4))


def test_splits_share_no_scene():
    textures = [sample_scenes(N, split, seed=seed).texture for split in SPLITS for seed in (0, 1)]
    for number, texture in enumerate(textures):
        assert (texture % 3 == number // 2).all()


def test_every_value_occurs_in_its_range():
    scenes = sample_scenes(N)
    for values, names in ((scenes.sky, SKIES), (scenes.ground, GROUNDS), (scenes.light, LIGHTS)):
        assert values.shape == (N,) and values.dtype == torch.int64
        assert set(values.tolist()) == set(range(len(names)))
    there = scenes.kind >= 0
    for values, names in ((scenes.kind, KINDS), (scenes.colour, COLOURS), (scenes.place, PLACES)):
        assert values.shape == (N, 2) and values.dtype == torch.int64
        assert torch.equal(values >= 0, there)
        assert set(values[there].tolist()) == set(range(len(names)))
    for values in (scenes.x, scenes.y, scenes.size):
        assert torch.equal(values.isnan(), ~there)
    assert 0.45 < there[:, 1].float().mean() < 0.55


def test_no_sun_at_night():
    scenes = sample_scenes(N)
    night = scenes.sky == SKIES.index("night")
    assert not (scenes.light[night] == LIGHTS.index("sun")).any()
    assert (scenes.light[night] == LIGHTS.index("moon")).float().mean() > 0.4


@pytest.mark.parametrize("things", [1, 2])
def test_number_of_things(things):
    assert ((sample_scenes(200, things=things).kind >= 0).sum(1) == things).all()


def test_novel_pairs_are_one_for_each_kind():
    assert Counter(kind for kind, _ in NOVEL_PAIRS) == Counter(KINDS)
    uses = Counter(colour for _, colour in NOVEL_PAIRS)
    assert set(uses) == set(COLOURS) and max(uses.values()) <= 2


@pytest.mark.parametrize("things", [1, 2, None])
def test_novel_pairs_only_in_novel(things):
    for split in ("train", "valid"):
        seen = Counter(pair for scene in pairs(sample_scenes(N, split, things=things)) for pair in scene)
        assert not NOVEL_PAIRS & set(seen)
        assert len(seen) == 40 and min(seen.values()) > 0.4 * max(seen.values())
    novel = pairs(sample_scenes(N, "novel", things=things))
    assert all(NOVEL_PAIRS & set(scene) for scene in novel)
    assert {pair for scene in novel for pair in scene} >= NOVEL_PAIRS


def test_two_things_differ():
    assert all(a != b for a, b in pairs(sample_scenes(N, "novel", things=2)))
    assert all(a != b for a, b in pairs(sample_scenes(N, "train", things=2)))


def test_places_are_apart_and_in_order():
    scenes = sample_scenes(N)
    left, middle, right = (scenes.x[scenes.place == place] for place in range(3))
    assert left.max() < 0.33 and 0.43 < middle.min() and middle.max() < 0.57 and right.min() > 0.67
    two = scenes.kind[:, 1] >= 0
    assert (scenes.place[two, 0] < scenes.place[two, 1]).all()


def test_boxes_lie_inside_and_hardly_overlap():
    scenes = sample_scenes(N)
    found = boxes(scenes)
    there = scenes.kind >= 0
    assert found.shape == (N, 2, 4)
    assert torch.equal(found.isnan().any(-1), ~there)
    assert found[there].min() >= 0 and found[there].max() <= 1
    first, second = found[there[:, 1]].unbind(1)
    assert (first[:, 2] - second[:, 0]).max() < 0.005
    height = (found[..., 3] - found[..., 1])[there]
    assert height.min() * 32 > 7 and height.median() * 32 > 10


def test_scenes_can_be_indexed():
    scenes = sample_scenes(10)
    assert len(scenes) == 10 and len(scenes[3]) == 1 and len(scenes[-1]) == 1 and len(scenes[2:5]) == 3
    assert same(scenes[-1], scenes[9:])
    assert same(scenes[torch.tensor([4, 2])][0], scenes[4])
    assert len(scenes[scenes.sky == 0]) == int((scenes.sky == 0).sum())
    assert len(list(scenes)) == 10
    with pytest.raises(IndexError, match="only 10"):
        scenes[10]


def test_attributes_by_place():
    scenes = sample_scenes(N)
    found = attributes(scenes)
    assert found["kind"].shape == found["colour"].shape == (N, 3)
    assert torch.equal((found["kind"] >= 0).sum(1), (scenes.kind >= 0).sum(1))
    for i in range(200):
        for slot in range(2):
            if scenes.kind[i, slot] >= 0:
                place = scenes.place[i, slot]
                assert found["kind"][i, place] == scenes.kind[i, slot] and found["colour"][i, place] == scenes.colour[i, slot]


@pytest.mark.parametrize(
    "arguments, words", [({"split": "test"}, "train, valid, novel"), ({"things": 3}, "1, 2 or None"), ({"n": -1}, "at least 0")]
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        sample_scenes(**{"n": 4, **arguments})


# Captions


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("seed", [0, 1])
def test_parsing_inverts_the_grammar(split, seed):
    scenes = sample_scenes(N, split, seed=seed)
    texts = captions(scenes, seed)
    stated = [parse_caption(text) for text in texts]
    truth = attributes(scenes)
    wrong = [text for text, right in zip(texts, caption_matches(stated, truth)) if not right]
    assert not wrong, wrong[:5]
    for i, one in enumerate(stated):
        assert one["sky"] == SKIES[scenes.sky[i]] and one["ground"] == GROUNDS[scenes.ground[i]]
        assert one["light"] in (None, LIGHTS[scenes.light[i]])
        assert sorted((thing["kind"], thing["colour"]) for thing in one["things"]) == sorted(pairs(scenes[i])[0])
        if len(one["things"]) == 2:  # which is where is always said
            assert [one["things"][index]["kind"] for index in one["order"]] == [KINDS[kind] for kind in scenes.kind[i]]
        else:
            assert one["order"] is None


def test_captions_vary_and_leave_things_out():
    scenes = sample_scenes(N)
    texts = captions(scenes)
    assert all(text == text.lower() and "  " not in text and " ," not in text and "{" not in text for text in texts)
    stated = [parse_caption(text) for text in texts]
    lights = sum(one["light"] is not None for one in stated) / N
    alone = [one["things"][0]["place"] for one in stated if len(one["things"]) == 1]
    by_place = [one for one in stated if len(one["things"]) == 2 and one["things"][0]["place"] is not None]
    two = sum(len(one["things"]) == 2 for one in stated)
    assert 0.4 < lights < 0.6
    assert 0.3 < sum(place is not None for place in alone) / len(alone) < 0.8
    assert 0.3 < len(by_place) / two < 0.7
    assert len(set(captions(sample_scenes(1)[torch.zeros(50, dtype=torch.long)]))) == 1
    one_scene = sample_scenes(1)
    assert len({captions(one_scene, seed)[0] for seed in range(50)}) > 30


def test_captions_depend_on_the_scene_alone():
    scenes = sample_scenes(50)
    texts = captions(scenes, seed=2)
    assert texts == captions(scenes, seed=2)
    assert texts[10:20] == captions(scenes[10:20], seed=2)
    assert texts != captions(scenes, seed=3)


def test_no_phrase_means_two_things():
    tables = [grammar.SAY_KIND, grammar.SAY_COLOUR, grammar.SAY_SKY, grammar.SAY_GROUND, grammar.SAY_LIGHT, grammar.SAY_PLACE]
    phrases = [phrase for table in tables for names in table.values() for phrase in names] + grammar.SAY_LEFT_OF + grammar.SAY_RIGHT_OF
    assert len(phrases) == len(set(phrases))
    for table, names in zip(tables, (KINDS, COLOURS, SKIES, GROUNDS, LIGHTS, PLACES)):
        assert tuple(table) == names


@pytest.mark.parametrize("name", ["sky", "ground", "light", "kind", "colour"])
def test_a_wrong_attribute_does_not_match(name):
    scenes = sample_scenes(1000)
    stated = [parse_caption(text) for text in captions(scenes)]
    wrong = {key: values.clone() for key, values in attributes(scenes).items()}
    count = {"sky": 3, "ground": 4, "light": 3, "kind": 8, "colour": 6}[name]
    wrong[name] = torch.where(wrong[name] >= 0, (wrong[name] + 1) % count, -1)
    said = torch.tensor([name != "light" or one["light"] is not None for one in stated])
    assert torch.equal(caption_matches(stated, wrong), ~said)


def test_swapped_missing_and_extra_things_do_not_match():
    scenes = sample_scenes(500, things=2)
    texts, truth = captions(scenes), attributes(scenes)
    swapped = dict(truth)
    swapped["colour"] = truth["colour"].clone().scatter_(1, scenes.place, scenes.colour.flip(1))
    different = scenes.colour[:, 0] != scenes.colour[:, 1]
    assert torch.equal(caption_matches(texts, swapped), ~different), "colours belong to their things"
    missing = {key: values.clone() for key, values in truth.items()}
    missing["kind"].scatter_(1, scenes.place[:, :1], -1)
    assert not caption_matches(texts, missing).any()
    extra = {key: values.clone() for key, values in truth.items()}
    extra["kind"][extra["kind"] < 0] = 0
    assert not caption_matches(texts, extra).any()


def thing(kind, colour=None, place=None):
    return {"kind": kind, "colour": colour, "place": place}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a red house on snow at night", {"sky": "night", "ground": "snow", "things": [thing("house", "red")]}),
        ("A Red HOUSE, on\nsnow!", {"ground": "snow", "things": [thing("house", "red")]}),
        ("a blue tree right of a red house", {"things": [thing("tree", "blue"), thing("house", "red")], "order": [1, 0]}),
        (
            "a red house to the left of a blue tree on the beach",
            {"ground": "sand", "things": [thing("house", "red"), thing("tree", "blue")], "order": [0, 1]},
        ),
        (
            "on the right a violet spaceship, on the left a white cottage",
            {"things": [thing("rocket", "purple", "right"), thing("house", "white", "left")], "order": [1, 0]},
        ),
        ("a snowman with neither sun nor moon", {"light": "none", "things": [thing("snowman")]}),
        ("a big green hot-air balloon in the middle, under the sun", {"light": "sun", "things": [thing("balloon", "green", "middle")]}),
        ("a treehouse for sandra, reddish", {}),
        ("left of", {}),
        ("", {}),
    ],
)
def test_parse_caption(text, expected):
    assert parse_caption(text) == {"sky": None, "ground": None, "light": None, "things": [], "order": None} | expected


def test_caption_matches_wants_one_caption_per_picture():
    with pytest.raises(ValueError, match="one caption per picture"):
        caption_matches(["a red house"], attributes(sample_scenes(2)))
