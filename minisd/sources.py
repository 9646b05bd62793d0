"""Pictures from elsewhere: a folder of one's own, or a data set of the Hugging Face Hub, made square and of one size."""

import csv
import io
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow.parquet
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from tqdm.auto import tqdm

from minisd.utils import fast_mode

PICTURE_ENDINGS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLIT_NAMES = {"train": ("train", "training"), "valid": ("valid", "validation", "val", "dev"), "test": ("test", "testing")}
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description")
UNLABELLED = "unlabelled"
# How `datasets`, `requests` and `httpx` call it when nobody answers; which of the two is used depends on the version of huggingface_hub.
NETWORK_ERRORS = {"ConnectionError", "TimeoutError", "TransportError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}
MAX_PIXELS = 100_000_000  # 10,000 x 10,000: about 400 MB while it is read


class Row(NamedTuple):
    """A picture that waits to be read."""

    name: str  # as it is called in messages
    file: Path | io.BytesIO | None
    caption: str
    label: int


# ---- reading one picture


def open_square(source: str | Path | io.BytesIO, size: int) -> PIL.Image.Image:
    """Read a picture of any kind and make it RGB, `size` x `size`: turned upright, its middle square cut out, scaled smoothly.

    What is transparent becomes white. Raises `ValueError` above MAX_PIXELS, and what PIL raises for a file that it cannot read.
    """
    limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None  # our own limit counts, after `draft`
    try:
        with PIL.Image.open(source) as picture:
            picture.draft(None, (2 * size, 2 * size))  # JPEG only: decoded at 1/2, 1/4 or 1/8 of its size where that is large enough
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width:,} x {picture.height:,} pixels, more than {MAX_PIXELS // 10**6} million")
            picture = to_rgb(PIL.ImageOps.exif_transpose(picture))
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = limit
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return square.resize((size, size), PIL.Image.Resampling.LANCZOS, reducing_gap=3)


def to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Greyscale, 16-bit, palette, CMYK or transparent pictures to RGB; over white where transparent."""
    if picture.mode[0] in "IF":  # one channel of large integers (16 bits) or of floats (0 to 1): PIL would cut them off at 255
        values = np.asarray(picture, dtype=np.float32) * (255 / 65535 if picture.mode[0] == "I" else 255)
        picture = PIL.Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if picture.mode.endswith(("A", "a")) or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def to_png(picture: PIL.Image.Image) -> dict[str, Any]:
    """A picture as the cell of a `datasets.Image` column. Weakly compressed: half the time for a tenth more bytes."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return {"bytes": file.getvalue(), "path": None}


# ---- from rows to a data set


def gather(rows: Iterable[Row], count: int, names: Sequence[str], size: int, strict: bool, where: str) -> Dataset:
    """Read `count` pictures. Those that cannot be read are skipped and named in `info.description`, or raise `ValueError` if `strict`."""
    kept, skipped = [], []
    for row in tqdm(rows, total=count, desc="reading pictures", leave=False, disable=fast_mode() or count < 500):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PIL's remarks on odd metadata
                kept.append((to_png(open_square(row.file, size)), row.caption, row.label))
        except Exception as error:  # a damaged file can make a decoder raise anything
            reason = str(error) if type(error) is ValueError else "missing" if isinstance(error, FileNotFoundError) else "unreadable"
            if strict:
                raise ValueError(f"{row.name} in {where} cannot be used: {reason}.") from error
            skipped.append(f"{row.name} ({reason})")
    listed = ", ".join(skipped[:5]) + (", …" if len(skipped) > 5 else "")
    if not kept:
        raise ValueError(f"none of the {count} pictures in {where} can be used: {listed}.")
    features = Features({"image": Image(), "caption": Value("string"), "label": ClassLabel(names=list(names))})
    dataset = Dataset.from_dict(dict(zip(features, map(list, zip(*kept)))), features=features)
    if skipped:
        dataset.info.description = f"Skipped {len(skipped)} of {count} pictures in {where}: {listed}."
    return dataset


def pick_rows(count: int, n: int | None, seed: int) -> list[int]:
    """All of `count` rows in order, or `n` of them drawn by lot."""
    if n is None or n >= count:
        return list(range(count))
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:n].tolist()


def pick_caption(row: dict[str, Any], column: str | None) -> str:
    """The caption in a row: `column`, or the first of CAPTION_COLUMNS that is there; the first of several; "" where there is none."""
    if column is not None and column not in row:
        raise ValueError(f"there is no column {column!r} for the captions; there are {', '.join(row)}.")
    value = row[column] if column else next((row[name] for name in CAPTION_COLUMNS if row.get(name)), "")
    if isinstance(value, (list, tuple)):
        value = value[0] if value else ""
    return value if isinstance(value, str) else ""


# ---- a folder


def visible_files(folder: Path) -> list[Path]:
    """All files below `folder`, in order, without hidden ones."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts))


def split_folder(folder: Path, split: str) -> Path:
    """Where a split lies: in the sub-folder of that name where all sub-folders are splits, else in `folder` itself ("train")."""
    subfolders = {sub.name.lower(): sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith((".", "__"))}
    known = {name for names in SPLIT_NAMES.values() for name in names} | {split}
    found = subfolders if subfolders and subfolders.keys() <= known else {"train": folder}
    for name in SPLIT_NAMES.get(split, (split,)):
        if name in found:
            return found[name]
    raise ValueError(f"the folder {str(folder)!r} has no split {split!r}, only {', '.join(found)}; splits are sub-folders of such names.")


def read_metadata(path: Path) -> list[dict[str, Any]]:
    """The rows of a metadata file. Raises `ValueError` where a row is not JSON or names no picture."""
    if path.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {number} of {path.name} is not JSON ({error}).") from error
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(f"row {number} of {path.name} has no 'file_name': each row has to name the picture that it describes.")
    return rows


def folder_contents(folder: Path, split: str) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every file of a split: when nothing of this changed, the pictures are the same."""
    root = split_folder(folder, split)
    return [(path.relative_to(root).as_posix(), path.stat().st_size, path.stat().st_mtime_ns) for path in visible_files(root)]


def read_folder(folder: Path, split: str, size: int, n: int | None, seed: int, strict: bool, caption_column: str | None = None) -> Dataset:
    """The pictures of a folder laid out as Hugging Face's imagefolder: class sub-folders, a metadata file, both or neither."""
    root = split_folder(folder, split)
    files = visible_files(root)
    about = {path: {} for path in files if path.suffix.lower() in PICTURE_ENDINGS}
    count, left_out = len(about), 0
    if metadata := [path for path in files if path.name in METADATA]:  # the pictures are those that it lists
        listed = {path.parent / row["file_name"]: row for path in metadata for row in read_metadata(path)}
        left_out, about = len(about.keys() - listed.keys()), listed
    if not about:
        endings = Counter(path.suffix.lower() or "no ending" for path in files).most_common(3)
        holds = ", ".join(f"{count} x {ending}" for ending, count in endings) or "nothing"
        raise ValueError(f"no pictures in the folder {str(root)!r}: it holds {holds}, and pictures end in {', '.join(PICTURE_ENDINGS)}.")
    labels = [row.get("label") for row in about.values()]
    if not all(isinstance(label, str) and label for label in labels):  # then sub-folders are classes, if all pictures are equally deep
        parents = [path.relative_to(root).parts[:-1] for path in about]
        classed = len(set(parents)) > 1 and len({len(parts) for parts in parents}) == 1
        labels = [parts[-1] if classed else UNLABELLED for parts in parents]
    names = sorted(set(labels))
    rows = [
        Row(path.relative_to(root).as_posix(), path, pick_caption(row, caption_column), names.index(label))
        for (path, row), label in zip(about.items(), labels)
    ]
    chosen = [rows[i] for i in pick_rows(len(rows), n, seed)]
    dataset = gather(chosen, len(chosen), names, size, strict, f"the folder {folder.name!r}")
    if left_out:
        left = f"{metadata[0].name} does not list {left_out} of {count} pictures; they were left out."
        dataset.info.description = " ".join(filter(None, (dataset.info.description, left)))
    return dataset


# ---- the Hub


def is_network_error(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a missing network."""
    if error is None:
        return False
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & NETWORK_ERRORS) or is_network_error(error.__cause__)


def open_hub(source: str, split: str, config: str | None) -> Dataset:
    """A split of a data set of the Hub. Raises ConnectionError, FileNotFoundError or ValueError with one sentence that says what to do."""
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().dataset_info(source, timeout=10)  # a missing network shows at once, not after half a minute of retries
        for name in SPLIT_NAMES.get(split, (split,)):
            try:
                return datasets.load_dataset(source, config, split=name)
            except ValueError as error:
                if "Unknown split" not in str(error):
                    raise
                message = str(error)
    except (huggingface_hub.errors.RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"there is no folder {source!r}, and no data set of that name on the Hub (or a private one: `hf auth login`)."
        ) from error
    except Exception as error:
        if not is_network_error(error):
            raise
        raise ConnectionError(
            f"the Hub cannot be reached, so {source!r} cannot be loaded; without a network there are load_images('postcards') and "
            "load_images(FOLDER) with pictures of your own."
        ) from error
    raise ValueError(f"{source!r} has no split {split!r}: {message}")


def read_hub(
    source: str,
    split: str,
    size: int,
    n: int | None,
    seed: int,
    strict: bool,
    image_column: str | None = None,
    caption_column: str | None = None,
    config: str | None = None,
) -> Dataset:
    """A split of a data set of the Hub, with the columns image, caption and label."""
    dataset = open_hub(source, split, config)
    features = dataset.features
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    image_column = image_column or next(iter(images), None)
    if image_column not in images:
        wanted = "" if image_column is None else f" called {image_column!r}"
        raise ValueError(f"{source!r} has no column of pictures{wanted}; its columns are {', '.join(features)}.")
    label_column = next((name for name, feature in features.items() if isinstance(feature, ClassLabel)), None)
    names = features[label_column].names if label_column else [UNLABELLED]
    dataset = dataset.cast_column(image_column, Image(decode=False))

    def row(i: int) -> Row:
        values = dataset[i]
        picture = values.pop(image_column) or {"bytes": None, "path": None}
        file = io.BytesIO(picture["bytes"]) if picture["bytes"] else picture["path"]
        return Row(f"row {i}", file, pick_caption(values, caption_column), values[label_column] if label_column else 0)

    chosen = pick_rows(len(dataset), n, seed)
    return gather(map(row, chosen), len(chosen), names, size, strict, f"{source!r}")
