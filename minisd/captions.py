"""Sentences about scenes, and back: a small grammar and its inverse.

A caption names every thing with its colour, the sky and the ground. A caption of two things also says which is where, by places
("on the left") or by order ("left of"). The light, and the place of a thing that is alone, are sometimes left out.
Everything is lower case. No word or phrase of the grammar means two things, so `parse_caption` needs no more than a table.
"""

import random
import re
from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from minisd.scenes import COLOURS, GROUNDS, KINDS, LIGHTS, PLACES, SKIES, Scenes

# What is said for each value, most usual first.
SAY_KIND = {
    **{kind: [kind] for kind in KINDS},
    "house": ["house", "cottage"],
    "boat": ["boat", "sailboat", "sailing boat"],
    "rocket": ["rocket", "spaceship"],
    "balloon": ["balloon", "hot-air balloon"],
}
SAY_COLOUR = {**{colour: [colour] for colour in COLOURS}, "purple": ["purple", "violet"]}
SAY_SKY = {
    "day": ["by day", "in the daytime", "on a bright day", "in broad daylight"],
    "sunset": ["at sunset", "at dusk", "in the evening glow", "in the evening"],
    "night": ["at night", "by night", "after dark", "under a starry sky"],
}
SAY_GROUND = {
    "grass": ["on grass", "on the grass", "in a meadow", "in the meadow"],
    "sand": ["on sand", "on the sand", "on the beach", "in the desert"],
    "snow": ["on snow", "in the snow", "in a snowy field"],
    "sea": ["on the sea", "at sea", "on the water", "on the waves"],
}
SAY_LIGHT = {
    "none": ["without sun or moon", "with neither sun nor moon"],
    "sun": ["in the sunshine", "under the sun", "with the sun in the sky"],
    "moon": ["in the moonlight", "under the moon", "with the moon in the sky"],
}
SAY_PLACE = {
    "left": ["on the left", "at the left", "on the left side"],
    "middle": ["in the middle", "in the centre"],
    "right": ["on the right", "at the right", "on the right side"],
}
SAY_LEFT_OF = ["left of", "to the left of"]
SAY_RIGHT_OF = ["right of", "to the right of"]

ONE_THING = [
    "{thing} {ground} {sky} {light}",
    "{thing} {ground} {sky} {light}",
    "{thing} {place} {ground} {sky} {light}",
    "{thing} {place}, {ground} {sky} {light}",
    "{thing}, {ground}, {sky} {light}",
    "{place} {thing}, {ground} {sky} {light}",
    "{sky} {light}, {thing} {ground}",
    "{sky}, {thing} {place} {ground} {light}",
    "{ground} {sky} {light}, {thing} {place}",
    "{ground}, {thing} {sky} {light}",
    "a postcard of {thing} {ground} {sky} {light}",
    "a picture of {thing} {place}, {ground} {sky} {light}",
]
THINGS_BY_PLACE = [
    "{a} {place_a} and {b} {place_b}",
    "{a} {place_a}, {b} {place_b}",
    "{place_a} {a}, {place_b} {b}",
    "{place_a} {a} and {place_b} {b}",
]
THINGS_BY_ORDER = ["{left} {left_of} {right}", "{right} {right_of} {left}"]
TWO_THINGS = [
    "{things}, {ground} {sky} {light}",
    "{things}, {ground} {sky} {light}",
    "{things}, {ground}, {sky} {light}",
    "{sky} {light}, {things}, {ground}",
    "{ground} {sky} {light}, {things}",
    "{ground}, {things}, {sky} {light}",
    "a postcard of {things}, {ground} {sky} {light}",
]

# Single words that a person may type and the grammar does not use alone.
LOOSE_WORDS = {
    "sky": {
        "day": "day",
        "daylight": "day",
        "sunset": "sunset",
        "dusk": "sunset",
        "evening": "sunset",
        "night": "night",
        "starry": "night",
        "dark": "night",
    },
    "ground": {
        "grass": "grass",
        "meadow": "grass",
        "sand": "sand",
        "beach": "sand",
        "desert": "sand",
        "snow": "snow",
        "snowy": "snow",
        "sea": "sea",
    },
    "light": {"sun": "sun", "sunshine": "sun", "moon": "moon", "moonlight": "moon"},
    "place": {"left": "left", "middle": "middle", "centre": "middle", "center": "middle", "right": "right"},
}


def captions(scenes: Scenes, seed: int = 0) -> list[str]:
    """One caption for each scene. It depends on the scene and the seed only, not on its neighbours; another seed, other phrasings."""
    return [_caption(scenes, i, random.Random(seed * (1 << 25) + int(scenes.texture[i]))) for i in range(len(scenes))]


def parse_caption(text: str) -> dict:
    """What a caption states. The inverse of `captions`, and forgiving: words it does not know are ignored.

    Returns {"sky": name or None, "ground": ..., "light": ..., "things": [...], "order": ...} with None for what is not said
    ("none" for `light` if the text says that there is none). Each thing is {"kind", "colour", "place"}, in the order of the text, with
    None for what is not said. `order` lists the indices of two things from left to right where the text says so, by "left of" or by places.
    """
    stated = {"sky": None, "ground": None, "light": None, "things": [], "order": None}
    colour = place = turn = None
    places_first = None  # "on the left a red house" against "a red house on the left"
    for match in PHRASE.finditer(text.lower()):
        slot, value = MEANING[re.sub(r"\s+", " ", match.group())]
        if slot in ("sky", "ground", "light"):
            stated[slot] = stated[slot] or value
        elif slot == "colour":
            colour = value
        elif slot == "order":
            turn = (len(stated["things"]), value)
        elif slot == "place":
            places_first = not stated["things"] if places_first is None else places_first
            if places_first:
                place = value
            elif stated["things"][-1]["place"] is None:
                stated["things"][-1]["place"] = value
        else:
            stated["things"].append({"kind": value, "colour": colour, "place": place})
            colour = place = None
    stated["order"] = _order(stated["things"], turn)
    return stated


def caption_matches(stated: Sequence[str | dict], attributes: dict[str, Tensor]) -> Tensor:
    """Whether all that each caption states is true of its picture: (N,) bool.

    `stated`: N captions or results of `parse_caption`; `attributes`: true or observed ones, as from `minisd.postcards.attributes`.
    Every thing must be there with its own colour, at its place or in the stated order, and no others.
    """
    if len(stated) != len(attributes["sky"]):
        raise ValueError(
            f"{len(stated)} captions cannot be compared with {len(attributes['sky'])} pictures: one caption per picture is needed"
        )
    observed = {name: values.tolist() for name, values in attributes.items()}
    results = []
    for i, caption in enumerate(stated):
        caption = parse_caption(caption) if isinstance(caption, str) else caption
        results.append(_matches(caption, {name: values[i] for name, values in observed.items()}))
    return torch.tensor(results, dtype=torch.bool)


def _phrases() -> dict[str, tuple[str, str]]:
    """Every phrase of the grammar with what it means: {"at night": ("sky", "night"), ...}."""
    tables = {"kind": SAY_KIND, "colour": SAY_COLOUR, "sky": SAY_SKY, "ground": SAY_GROUND, "light": SAY_LIGHT, "place": SAY_PLACE}
    tables["order"] = {"left of": SAY_LEFT_OF, "right of": SAY_RIGHT_OF}
    meaning = {word: (slot, value) for slot, words in LOOSE_WORDS.items() for word, value in words.items()}
    meaning |= {phrase: (slot, value) for slot, table in tables.items() for value, phrases in table.items() for phrase in phrases}
    return meaning


MEANING = _phrases()
# Longer phrases first: "without sun or moon" must not be read as "sun". A space in a phrase stands for any white space.
PHRASE = re.compile(r"\b(?:" + "|".join(re.escape(p).replace(r"\ ", r"\s+") for p in sorted(MEANING, key=len, reverse=True)) + r")\b")


def _caption(scenes: Scenes, i: int, lot: random.Random) -> str:
    def thing(slot: int) -> str:
        colour, kind = COLOURS[scenes.colour[i, slot]], KINDS[scenes.kind[i, slot]]
        return f"a {_say(SAY_COLOUR[colour], lot)} {_say(SAY_KIND[kind], lot)}"

    def place(slot: int) -> str:
        return lot.choice(SAY_PLACE[PLACES[scenes.place[i, slot]]])

    light = lot.choice(SAY_LIGHT[LIGHTS[scenes.light[i]]]) if lot.random() < 0.5 else ""
    words = {"sky": lot.choice(SAY_SKY[SKIES[scenes.sky[i]]]), "ground": lot.choice(SAY_GROUND[GROUNDS[scenes.ground[i]]]), "light": light}
    if scenes.kind[i, 1] < 0:
        text = lot.choice(ONE_THING).format(thing=thing(0), place=place(0), **words)
    else:
        a, b = lot.choice([(0, 1), (1, 0)])
        by_place = {"a": thing(a), "b": thing(b), "place_a": place(a), "place_b": place(b)}
        by_order = {"left": thing(0), "right": thing(1), "left_of": lot.choice(SAY_LEFT_OF), "right_of": lot.choice(SAY_RIGHT_OF)}
        things = lot.choice(lot.choice([THINGS_BY_PLACE, THINGS_BY_ORDER])).format(**by_place, **by_order)
        text = lot.choice(TWO_THINGS).format(things=things, **words)
    return re.sub(r" +", " ", text).replace(" ,", ",").strip()


def _say(names: list[str], lot: random.Random) -> str:
    """The usual name three times in four, else a synonym."""
    return names[0] if len(names) == 1 or lot.random() < 0.75 else lot.choice(names[1:])


def _order(things: list[dict], turn: tuple[int, str] | None) -> list[int] | None:
    if len(things) != 2:
        return None
    if turn is not None and turn[0] == 1:  # said between the two things
        return [0, 1] if turn[1] == "left of" else [1, 0]
    places = [thing["place"] for thing in things]
    if None in places or places[0] == places[1]:
        return None
    return sorted((0, 1), key=lambda index: PLACES.index(places[index]))


def _matches(stated: dict, observed: dict) -> bool:
    """One parsed caption against the attributes of one picture."""
    for name, names in (("sky", SKIES), ("ground", GROUNDS), ("light", LIGHTS)):
        if stated[name] is not None and stated[name] != names[observed[name]]:
            return False
    seen = [(PLACES[p], KINDS[k], COLOURS[c]) for p, (k, c) in enumerate(zip(observed["kind"], observed["colour"])) if k >= 0]
    if len(seen) != len(stated["things"]):
        return False
    if stated["order"] is not None:
        return all(_same(stated["things"][index], thing) for index, thing in zip(stated["order"], seen))
    return any(all(_same(thing, other) for thing, other in zip(stated["things"], way)) for way in permutations(seen))


def _same(thing: dict, seen: tuple[str, str, str]) -> bool:
    return all(thing[name] in (None, value) for name, value in zip(("place", "kind", "colour"), seen))
