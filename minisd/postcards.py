"""Postcards, the data of the course: scenes drawn by lot (`minisd.scenes`) and sentences about them (`minisd.captions`).

`minisd.drawing` turns scenes into pictures.
"""

from minisd.captions import caption_matches, captions, parse_caption
from minisd.scenes import (
    COLOURS,
    GROUNDS,
    KINDS,
    LIGHTS,
    NOVEL_PAIRS,
    PLACES,
    SKIES,
    SPLITS,
    Scenes,
    attributes,
    boxes,
    sample_scenes,
)

__all__ = [
    "COLOURS",
    "GROUNDS",
    "KINDS",
    "LIGHTS",
    "NOVEL_PAIRS",
    "PLACES",
    "SKIES",
    "SPLITS",
    "Scenes",
    "attributes",
    "boxes",
    "caption_matches",
    "captions",
    "parse_caption",
    "sample_scenes",
]
