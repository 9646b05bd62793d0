"""minisd.data: the postcards as a data set, tensors, the cache."""

import subprocess
import sys

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from minisd import data
from minisd.data import load_images, to_maps, to_tensor
from minisd.drawing import render, segment
from minisd.postcards import KINDS, NOVEL_PAIRS, attributes, boxes, caption_matches, captions, parse_caption, sample_scenes


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Each test starts with an empty cache."""
    monkeypatch.setenv("MINISD_CACHE", str(tmp_path / "cache"))


# ---- postcards


def test_postcards_are_the_scenes_painted():
    dataset = load_images(size=32, n=40, seed=3)
    scenes = sample_scenes(40, "train", seed=3)
    assert (to_tensor(dataset) - render(scenes, 32)).abs().max() <= 0.5 / 127.5 + 1e-6
    assert torch.equal(to_maps(dataset), segment(scenes, 32).long())
    assert dataset["caption"][:] == captions(scenes, seed=3)
    assert dataset["label"][:] == scenes.kind[:, 0].tolist()
    for name in ("sky", "ground", "light"):
        assert dataset[name][:] == getattr(scenes, name).tolist()


def test_columns_of_postcards():
    features = load_images(size=16, n=2).features
    assert list(features) == ["image", "caption", "label", "sky", "ground", "light", "things", "segmentation"]
    assert features["label"].names == list(KINDS)
    assert isinstance(features["image"], datasets.Image)


def test_things_of_postcards():
    dataset = load_images(size=16, n=60)
    scenes = sample_scenes(60)
    for things, kind, colour, box in zip(dataset["things"], scenes.kind.tolist(), scenes.colour.tolist(), boxes(scenes)):
        count = sum(value >= 0 for value in kind)
        assert [thing["kind"] for thing in things] == kind[:count]
        assert [thing["colour"] for thing in things] == colour[:count]
        assert torch.allclose(torch.tensor([thing["box"] for thing in things]), box[:count])
    assert {len(things) for things in dataset["things"]} == {1, 2}
    assert {len(things) for things in load_images(size=16, n=20, things=2)["things"]} == {2}


def test_captions_of_the_data_set_are_true():
    dataset = load_images(size=16, n=200, split="valid")
    scenes = sample_scenes(200, "valid")
    assert caption_matches([parse_caption(text) for text in dataset["caption"]], attributes(scenes)).all()


def test_held_out_pairs_are_only_in_novel():
    held_out = {(KINDS.index(kind), data.COLOURS.index(colour)) for kind, colour in NOVEL_PAIRS}
    for split, expected in (("train", False), ("valid", False), ("novel", True)):
        for things in load_images(size=8, n=100, split=split)["things"]:
            assert any((thing["kind"], thing["colour"]) in held_out for thing in things) == expected


def test_default_number_of_postcards(monkeypatch):
    monkeypatch.setattr(data, "DEFAULT_COUNTS", {"train": 7, "valid": 5, "novel": 3})
    assert [len(load_images(size=8, split=split)) for split in ("train", "valid", "novel")] == [7, 5, 3]


@pytest.mark.parametrize(
    "arguments", [{"split": "test"}, {"things": 3}, {"size": 0}, {"n": 0}, {"n": -1}, {"size": 2.5}], ids=lambda arguments: str(arguments)
)
def test_wrong_arguments_for_postcards(arguments):
    with pytest.raises(ValueError):
        load_images(**({"size": 8, "n": 2} | arguments))


# ---- tensors


def test_tensor_is_exact(tmp_path):
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3) * 2
    dataset = datasets.Dataset.from_dict(
        {"image": [PIL.Image.fromarray(p) for p in pixels]}, features=datasets.Features(image=datasets.Image())
    )
    tensor = to_tensor(dataset)
    assert tensor.shape == (2, 3, 4, 4) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert torch.allclose(tensor, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)


def test_what_cannot_become_a_tensor(tmp_path):
    dataset = load_images(size=8, n=3)
    with pytest.raises(ValueError, match="no column 'picture'; it has image, caption"):
        to_tensor(dataset, "picture")
    with pytest.raises(ValueError, match="'caption' holds no pictures"):
        to_tensor(dataset, "caption")
    with pytest.raises(ValueError, match="empty"):
        to_tensor(dataset.select([]))
    mixed = datasets.concatenate_datasets([dataset, load_images(size=9, n=1)])
    with pytest.raises(ValueError, match="different sizes .8 x 8 and 9 x 9"):
        to_tensor(mixed)


# ---- cache


def entries():
    folder = data.cache_dir() / "datasets"
    return sorted(path for path in folder.iterdir()) if folder.exists() else []


def test_second_time_comes_from_the_cache(monkeypatch):
    first = load_images(size=8, n=5)
    monkeypatch.setattr(data, "paint_postcards", None)  # calling it would fail
    assert load_images(size=8, n=5).to_dict() == first.to_dict()


@pytest.mark.parametrize("change", [{"size": 9}, {"n": 6}, {"split": "valid"}, {"seed": 1}, {"things": 1}])
def test_each_argument_has_its_own_entry(change):
    base = {"size": 8, "n": 5, "split": "train", "seed": 0, "things": None}
    load_images(**base)
    load_images(**(base | change))
    assert len(entries()) == 2


def test_new_drawings_are_painted_anew(monkeypatch):
    load_images(size=8, n=5)
    monkeypatch.setattr(data, "DRAWINGS_VERSION", "other")
    load_images(size=8, n=5)
    assert len(entries()) == 2


def test_fingerprint_covers_every_module_that_draws():
    code = "import sys, minisd.drawing, minisd.postcards; print(*sorted(name for name in sys.modules if name.startswith('minisd.')))"
    used = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(used) - {"minisd.postcards"} == {f"minisd.{name}" for name in data.DRAWN_BY}  # minisd.postcards only passes names on


@pytest.mark.parametrize("damage", ["truncate", "empty", "delete", "all"])
def test_damaged_cache_is_built_again(damage):
    expected = load_images(size=8, n=20).to_dict()
    (folder,) = entries()
    (arrow,) = folder.glob("*.arrow")
    content = arrow.read_bytes()
    if damage == "truncate":
        arrow.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        (folder / "dataset_info.json").write_text("")
    elif damage == "delete":
        (folder / "state.json").unlink()
    else:
        for path in folder.iterdir():
            path.unlink()
    assert load_images(size=8, n=20).to_dict() == expected


def test_a_kill_while_writing_leaves_no_half_entry(monkeypatch):
    def killed(self, folder, **options):
        (data.Path(folder) / "half.arrow").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "save_to_disk", killed)
        with pytest.raises(KeyboardInterrupt):
            load_images(size=8, n=5)
    assert entries() == []
    assert len(load_images(size=8, n=5)) == 5


def test_another_process_was_faster(monkeypatch):
    paint_postcards = data.paint_postcards

    def slow(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(data, "paint_postcards", paint_postcards)
            load_images(size=8, n=5)  # the other one, meanwhile
        return paint_postcards(*arguments)

    monkeypatch.setattr(data, "paint_postcards", slow)
    assert len(load_images(size=8, n=5)) == 5
    assert len(entries()) == 1


def test_nothing_is_written_to_the_terminal(capfd):
    load_images(size=8, n=5)
    load_images(size=8, n=5)
    assert capfd.readouterr() == ("", "")
