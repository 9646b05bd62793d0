"""minisd.sources: folders of all kinds of pictures."""

import json
import socket
import warnings

import datasets
import numpy as np
import PIL.Image
import pytest

from minisd import sources
from minisd.data import load_images, to_tensor


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Each test starts with an empty cache, and none reaches the network."""
    monkeypatch.setenv("MINISD_CACHE", str(tmp_path / "cache"))

    def refuse(*args, **options):
        raise AssertionError("a test went to the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def paint(path, colour=(200, 30, 90), size=(12, 10), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, colour).save(path, **options)
    return path


def colour_of(dataset, row=0):
    """The mean colour of a picture, 0 to 255."""
    return ((to_tensor(dataset)[row].mean((1, 2)) + 1) * 127.5).round().int().tolist()


# ---- folders


def test_black_is_minus_one_and_white_is_one(tmp_path):
    paint(tmp_path / "p" / "a.png", (0, 0, 0))
    paint(tmp_path / "p" / "b.png", (255, 255, 255))
    tensor = to_tensor(load_images(tmp_path / "p", size=4))
    assert (tensor[0] == -1).all() and (tensor[1] == 1).all()


def test_folder_of_pictures(tmp_path):
    paint(tmp_path / "p" / "b.png", (10, 200, 30))
    paint(tmp_path / "p" / "a.JPG", (200, 30, 90), quality=95)
    (tmp_path / "p" / "notes.txt").write_text("not a picture")
    paint(tmp_path / "p" / ".hidden.png")
    dataset = load_images(tmp_path / "p", size=8)
    assert len(dataset) == 2 and dataset["caption"][:] == ["", ""] and dataset.features["label"].names == ["unlabelled"]
    assert np.allclose(colour_of(dataset, 0), (200, 30, 90), atol=3)  # in the order of the names
    assert colour_of(dataset, 1) == [10, 200, 30]
    assert load_images(str(tmp_path / "p"), size=8).to_dict() == dataset.to_dict()


@pytest.mark.parametrize("name", ["my [best] pictures", "what? *", "Köln 夏"])
def test_folders_with_odd_names(tmp_path, name):
    paint(tmp_path / name / "test_1.png")
    assert len(load_images(tmp_path / name, size=8)) == 1


def test_class_folders_agree_with_imagefolder(tmp_path):
    for kind in ("cat", "dog", "bird"):
        for i in range(3):
            paint(tmp_path / "p" / kind / f"{i}.png", (80 * i, 10, 20))
    dataset = load_images(tmp_path / "p", size=8)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "p"), split="train", cache_dir=str(tmp_path / "hf"))
    assert dataset.features["label"].names == theirs.features["label"].names == ["bird", "cat", "dog"]
    assert dataset["label"][:] == theirs["label"][:]
    assert [colour_of(dataset, i) for i in range(9)] == [list(picture.getpixel((0, 0))) for picture in theirs["image"]]


@pytest.mark.parametrize("column", ["text", "caption"])
def test_metadata_agrees_with_imagefolder(tmp_path, column):
    names = ["x.png", "sub/y.png", "z.png"]
    for i, name in enumerate(names):
        paint(tmp_path / "p" / name, (80 * i, 10, 20))
    lines = [{"file_name": name, column: f"the {name} – schön"} for name in names[::-1]]
    (tmp_path / "p" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    dataset = load_images(tmp_path / "p", size=8)
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "p"), split="train", cache_dir=str(tmp_path / "hf"))
    assert dataset["caption"][:] == theirs[column][:] == [f"the {name} – schön" for name in names[::-1]]
    assert [colour_of(dataset, i) for i in range(3)] == [list(picture.getpixel((0, 0))) for picture in theirs["image"]]


def test_metadata_and_class_folders_together(tmp_path):
    rows = []
    for kind in ("cat", "dog"):
        paint(tmp_path / "p" / kind / "0.png")
        rows.append({"file_name": f"{kind}/0.png", "text": f"a {kind}"})
    paint(tmp_path / "p" / "cat" / "unlisted.png")
    (tmp_path / "p" / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f'{row["file_name"]},"{row["text"]}, here"\n' for row in rows)
    )
    with pytest.warns(UserWarning, match="^metadata.csv does not list 1 of 3 pictures; they were left out.$"):
        dataset = load_images(tmp_path / "p", size=8)
    assert dataset["caption"][:] == ["a cat, here", "a dog, here"]
    assert dataset.features["label"].names == ["cat", "dog"] and dataset["label"][:] == [0, 1]


def test_metadata_in_parquet_with_labels(tmp_path):
    for name in ("a", "b"):
        paint(tmp_path / "p" / f"{name}.png")
    table = datasets.Dataset.from_dict({"file_name": ["a.png", "b.png"], "label": ["tree", "house"], "about": ["A", "B"]})
    table.to_parquet(str(tmp_path / "p" / "metadata.parquet"))
    dataset = load_images(tmp_path / "p", size=8, caption_column="about")
    assert dataset["caption"][:] == ["A", "B"] and dataset.features["label"].int2str(dataset["label"][:]) == ["tree", "house"]


def test_splits_are_sub_folders(tmp_path):
    for split, count in (("train", 3), ("validation", 2)):
        for i in range(count):
            paint(tmp_path / "p" / split / f"{i}.png")
    assert len(load_images(tmp_path / "p", size=8)) == 3
    assert len(load_images(tmp_path / "p", size=8, split="valid")) == 2
    with pytest.raises(ValueError, match="no split 'novel', only .*train"):
        load_images(tmp_path / "p", size=8, split="novel")


def test_n_draws_by_lot(tmp_path):
    for i in range(30):
        paint(tmp_path / "p" / f"{i:02}.png", (8 * i, 0, 0))
    rows = [[colour_of(load_images(tmp_path / "p", size=4, n=5, seed=seed), row)[0] // 8 for row in range(5)] for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert rows[0] != [0, 1, 2, 3, 4] and len(set(rows[0])) == 5
    assert len(load_images(tmp_path / "p", size=4, n=99)) == 30


def test_changed_folder_is_read_again(tmp_path):
    paint(tmp_path / "p" / "a.png", (1, 2, 3))
    assert colour_of(load_images(tmp_path / "p", size=4)) == [1, 2, 3]
    paint(tmp_path / "p" / "a.png", (200, 100, 50), size=(64, 64))
    paint(tmp_path / "p" / "b.png")
    dataset = load_images(tmp_path / "p", size=4)
    assert len(dataset) == 2 and colour_of(dataset) == [200, 100, 50]


def test_things_are_for_postcards_only(tmp_path):
    with pytest.raises(ValueError, match="`things` counts the things in a postcard"):
        load_images(tmp_path, things=1)


# ---- folders that are wrong


def test_sources_that_are_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder 'holiday'; other sources: 'postcards', or a data set of the Hub"):
        load_images("holiday")
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_images(tmp_path / "missing")
    with pytest.raises(NotADirectoryError, match="is a file; give the folder"):
        load_images(paint(tmp_path / "a.png"))


def test_folder_without_pictures(tmp_path):
    (tmp_path / "p").mkdir()
    with pytest.raises(ValueError, match="no pictures in the folder .* it holds nothing"):
        load_images(tmp_path / "p")
    for i in range(3):
        (tmp_path / "p" / f"{i}.HEIC").write_bytes(b"")
    with pytest.raises(ValueError, match=r"it holds 3 x \.heic, and pictures end in .*\.jpg"):
        load_images(tmp_path / "p")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png"', "line 2 of metadata.jsonl is not JSON"),
        ('{"text": "x"}', "row 2 of metadata.jsonl has no 'file_name'"),
        ("3", "row 2"),
    ],
)
def test_broken_metadata(tmp_path, line, message):
    paint(tmp_path / "p" / "a.png")
    (tmp_path / "p" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / "p")


def test_missing_caption_column(tmp_path):
    paint(tmp_path / "p" / "a.png")
    (tmp_path / "p" / "metadata.jsonl").write_text('{"file_name": "a.png", "title": "T"}\n')
    assert load_images(tmp_path / "p", size=4)["caption"][:] == [""]
    assert load_images(tmp_path / "p", size=4, caption_column="title")["caption"][:] == ["T"]
    with pytest.raises(ValueError, match="no column 'txt' for the captions; there are file_name, title"):
        load_images(tmp_path / "p", size=4, caption_column="txt")


def test_unreadable_pictures_are_named_and_skipped(tmp_path):
    for i in range(4):
        paint(tmp_path / "p" / f"good{i}.jpg")
    whole = paint(tmp_path / "p" / "half.jpg", size=(300, 300)).read_bytes()
    (tmp_path / "p" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "p" / "empty.png").write_bytes(b"")
    (tmp_path / "p" / "text.png").write_text("this is no picture")
    message = r"Skipped 3 of 7 pictures in the folder 'p': empty.png \(unreadable\), half.jpg \(unreadable\), text.png \(unreadable\)"
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match=message) as caught:
            dataset = load_images(tmp_path / "p", size=8)
        assert len(caught) == 1 and len(dataset) == 4
    with pytest.raises(ValueError, match="empty.png in the folder 'p' cannot be used: unreadable"):
        load_images(tmp_path / "p", size=8, strict=True)


def test_listed_picture_that_is_missing(tmp_path):
    paint(tmp_path / "p" / "a.png")
    (tmp_path / "p" / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"file_name": "gone.png"}\n')
    with pytest.warns(UserWarning, match=r"Skipped 1 of 2 .*gone.png \(missing\)"):
        assert len(load_images(tmp_path / "p", size=8)) == 1


def test_no_picture_can_be_read(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="none of the 1 pictures in the folder 'p' can be used: a.png"):
        load_images(tmp_path / "p")


# ---- kinds of pictures


def test_middle_square_is_cut_out(tmp_path):
    picture = PIL.Image.new("RGB", (90, 30), (255, 0, 0))
    picture.paste((0, 255, 0), (30, 0, 60, 30))
    (tmp_path / "p").mkdir()
    picture.save(tmp_path / "p" / "wide.png")
    picture.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "p" / "tall.png")
    dataset = load_images(tmp_path / "p", size=10)
    assert colour_of(dataset, 0) == colour_of(dataset, 1) == [0, 255, 0]


def test_scaling_down_is_smooth(tmp_path):
    stripes = np.zeros((96, 96, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than the small picture can show: grey
    (tmp_path / "p").mkdir()
    PIL.Image.fromarray(stripes).save(tmp_path / "p" / "a.png")
    assert to_tensor(load_images(tmp_path / "p", size=16))[0].abs().max() < 0.1


def test_pictures_are_turned_upright(tmp_path):
    picture = PIL.Image.new("RGB", (40, 40), (0, 0, 255))
    picture.paste((255, 0, 0), (0, 0, 40, 20))  # the upper half is red
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to show": the left half was up
    (tmp_path / "p").mkdir()
    picture.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "p" / "a.jpg", exif=exif, quality=95)
    tensor = to_tensor(load_images(tmp_path / "p", size=8))[0]
    assert (tensor[0, :3] > 0.8).all() and (tensor[2, 5:] > 0.8).all()


def expected_grey(value):
    return [value] * 3


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("grey.png", lambda: PIL.Image.new("L", (9, 9), 77), expected_grey(77)),
        ("grey.jpg", lambda: PIL.Image.new("L", (9, 9), 77), expected_grey(77)),
        ("bits.png", lambda: PIL.Image.new("1", (9, 9), 1), expected_grey(255)),
        ("16bit.png", lambda: PIL.Image.fromarray(np.full((9, 9), 77 * 257, np.uint16)), expected_grey(77)),
        ("float.tiff", lambda: PIL.Image.fromarray(np.full((9, 9), 0.6, np.float32)), expected_grey(153)),
        (
            "palette.gif",
            lambda: PIL.Image.new("RGB", (9, 9), (10, 200, 30)).convert("P", palette=PIL.Image.Palette.ADAPTIVE),
            [10, 200, 30],
        ),
        ("cmyk.jpg", lambda: PIL.Image.new("CMYK", (9, 9), (0, 255, 255, 0)), [255, 0, 0]),
        ("clear.png", lambda: PIL.Image.new("RGBA", (9, 9), (10, 20, 30, 0)), expected_grey(255)),
        ("half.png", lambda: PIL.Image.new("RGBA", (9, 9), (0, 0, 0, 128)), expected_grey(127)),
        ("greyalpha.png", lambda: PIL.Image.new("LA", (9, 9), (0, 0)), expected_grey(255)),
        ("photo.webp", lambda: PIL.Image.new("RGB", (9, 9), (200, 30, 90)), [200, 30, 90]),
        ("one.bmp", lambda: PIL.Image.new("RGB", (1, 1), (200, 30, 90)), [200, 30, 90]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_kind_of_picture_becomes_rgb(tmp_path, name, make, expected):
    (tmp_path / "p").mkdir()
    make().save(tmp_path / "p" / name)
    dataset = load_images(tmp_path / "p", size=8)
    assert dataset[0]["image"].mode == "RGB" and dataset[0]["image"].size == (8, 8)
    assert np.allclose(colour_of(dataset), expected, atol=4)


def test_palette_with_a_transparent_colour(tmp_path):
    picture = PIL.Image.new("P", (9, 9), 0)
    picture.putpalette([10, 20, 30])
    (tmp_path / "p").mkdir()
    picture.save(tmp_path / "p" / "a.png", transparency=0)
    assert colour_of(load_images(tmp_path / "p", size=8)) == [255, 255, 255]


def test_huge_pictures(tmp_path, monkeypatch):
    """A huge JPEG is decoded at a fraction of its size; other huge files are named with their size. (Lower limits keep the test quick.)"""
    monkeypatch.setattr(sources, "MAX_PIXELS", 1_000_000)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100_000)  # PIL's own protection refuses twice this number
    paint(tmp_path / "p" / "a.jpg", size=(2000, 1600))
    paint(tmp_path / "p" / "b.png", size=(2000, 1600))
    with pytest.warns(UserWarning, match=r"Skipped 1 of 2 .*: b.png \(2,000 x 1,600 pixels, more than 1 million\)"):
        assert len(load_images(tmp_path / "p", size=16)) == 1
    assert PIL.Image.MAX_IMAGE_PIXELS == 100_000


def test_photographs(tmp_path):
    """Crops of the photograph among matplotlib's sample data."""
    from matplotlib.cbook import get_sample_data

    photograph = PIL.Image.open(get_sample_data("grace_hopper.jpg"))  # 512 x 600
    (tmp_path / "p").mkdir()
    for i in range(6):
        photograph.crop((40 * i, 60 * i, 40 * i + 300, 60 * i + 250)).save(tmp_path / "p" / f"{i}.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = to_tensor(load_images(tmp_path / "p", size=32))
    assert tensor.shape == (6, 3, 32, 32) and 0.2 < tensor.std() < 0.9
