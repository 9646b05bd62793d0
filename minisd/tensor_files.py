"""Files of weights, looked into without loading them: safetensors (whole or in shards) and PyTorch's pickles; and writing safetensors.

What a file is, its first bytes say, not its name.
"""

import json
import math
import mmap
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minisd.pickles import open_pickle
from minisd.train import save_atomically

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
POINTER = b"version https://git-lfs"
# First bytes of files that people save as weights by mistake.
STRANGERS = {
    POINTER: "a git-lfs pointer, not the weights: run `git lfs pull` in its folder",
    b"<!doctype": "a web page, not weights: the download link led to a page, perhaps one that asks you to log in",
    b"<html": "a web page, not weights: the download link led to a page, perhaps one that asks you to log in",
    b"gguf": "a GGUF file (llama.cpp, stable-diffusion.cpp), which is not read here; expected are safetensors or a PyTorch file",
    b"\x89hdf": "an HDF5 file (Keras), which is not read here; expected are safetensors or a PyTorch file",
    b"\x1f\x8b": "gzip-compressed; unpack it first",
}


class Entry(NamedTuple):
    """A tensor that waits in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.count * self.dtype.itemsize


class TensorFile(ABC):
    """Tensors by name. `entries` says what there is; `read(name)` gives one, `release(name)` says that its bytes are not needed any more.

    `metadata`: what the file says about itself. `aside`: what it holds besides tensors, by name (training state).
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]
    aside: list[str]

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """The tensor, if possible as a view of the file in memory: copy it before you change it."""

    def release(self, name: str) -> None:  # noqa: B027 (not every kind of file can)
        """Let the operating system take back the memory behind a tensor that has been copied."""


class SafetensorsFile(TensorFile):
    """A safetensors file: eight bytes that say how long the header is, the header in JSON, the numbers. Mapped, not read."""

    def __init__(self, path: Path):
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, LONGEST_HEADER):
                raise ValueError(half_there(path))
            try:
                header = json.loads(file.read(length))
                self.metadata = header.pop("__metadata__", {})
                self.entries = {name: Entry(tuple(entry["shape"]), DTYPES[entry["dtype"]]) for name, entry in header.items()}
                self.offsets = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
            except KeyError as error:
                raise ValueError(f"{path.name} holds numbers of type {error}; known are {', '.join(DTYPES)}.") from None
            except (ValueError, AttributeError, TypeError):
                raise ValueError(f"{path.name} is damaged: its header cannot be read.") from None
            self.start, self.aside = 8 + length, []
            expected = self.start + max((end for _, end in self.offsets.values()), default=0)
            if size < expected:
                raise ValueError(half_there(path, size, expected))
            if any(end - begin != self.entries[name].bytes for name, (begin, end) in self.offsets.items()):
                raise ValueError(f"{path.name} is damaged: in its header, sizes and places of the tensors do not agree.")
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writing to a tensor would not reach the file

    def read(self, name: str) -> torch.Tensor:
        entry, begin = self.entries[name], self.start + self.offsets[name][0]
        if entry.count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if begin % entry.dtype.itemsize:  # old files pad nothing
            data = bytearray(self.map[begin : begin + entry.bytes])
            return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)
        return torch.frombuffer(self.map, dtype=entry.dtype, count=entry.count, offset=begin).reshape(entry.shape)

    def release(self, name: str) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            begin, end = (self.start + offset for offset in self.offsets[name])
            begin -= begin % mmap.PAGESIZE
            self.map.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class PickleFile(TensorFile):
    """A file of `torch.save`: .ckpt, .pt, .bin. Opened so that nothing in it can run (see `minisd.pickles`)."""

    def __init__(self, path: Path):
        content, self.aside = open_pickle(path)
        self.tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
        self.aside += [str(name) for name in content.keys() - self.tensors.keys()]
        self.entries = {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}
        self.metadata = {}

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name].detach()


class InMemory(TensorFile):
    """The tensors of a model that is in memory, as if they were in a file."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.entries = {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}
        self.metadata, self.aside = {}, []

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]


class Shards(TensorFile):
    """Several files as one. `index`: the JSON file whose `weight_map` says which tensor is where."""

    def __init__(self, index: Path):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index.name} is no index of shards: it has no weight_map.")
        names = sorted(set(weight_map.values()))
        if missing := [name for name in names if not (index.parent / name).is_file()]:
            raise FileNotFoundError(
                f"{index.parent.name}/{index.name} names {len(names)} shards, and {missing[0]} is not there; all must lie beside it."
            )
        files = {name: open_tensors(index.parent / name) for name in names}
        self.files = {name: files[shard] for name, shard in weight_map.items()}
        if lost := [name for name, file in self.files.items() if name not in file.entries]:
            raise ValueError(f"{index.name} says that {lost[0]} is in {weight_map[lost[0]]}, but it is not.")
        self.entries = {name: file.entries[name] for name, file in self.files.items()}
        self.metadata, self.aside = {}, []

    def read(self, name: str) -> torch.Tensor:
        return self.files[name].read(name)

    def release(self, name: str) -> None:
        self.files[name].release(name)


def half_there(path: Path, size: int | None = None, expected: int | None = None) -> str:
    """The sentence for a file that ends too early."""
    how_much = f" ({size:,} of {expected:,} bytes)" if size is not None else ""
    return f"{path.name} is damaged or only half there{how_much}: download it again."


def open_tensors(path: Path) -> TensorFile:
    """A file of weights, or the index of several, opened but not read. Raises `ValueError` in one sentence when it is something else."""
    if path.name.endswith(".json"):
        return Shards(path)
    with open(path, "rb") as file:
        start = file.read(512)
    for bytes_, what in STRANGERS.items():
        if start.lstrip()[: len(bytes_)].lower() == bytes_.lower():
            raise ValueError(f"{path.name} is {what}.")
    if start[:2] in (b"PK", b"\x80\x02"):
        return PickleFile(path)
    if len(start) > 8 and start[8:9] == b"{":
        return SafetensorsFile(path)
    if len(start) < 9:
        raise ValueError(f"{path.name} has only {len(start)} bytes, no weights: download it again.")
    raise ValueError(f"{path.name} holds no weights that can be read: it is neither safetensors nor a file of torch.save.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `ValueError` in one sentence when the file holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        if path.read_bytes().startswith(POINTER):
            raise ValueError(f"{path.parent.name}/{path.name} is {STRANGERS[POINTER]}.") from None
        raise ValueError(f"{path.parent.name}/{path.name} is not readable as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.parent.name}/{path.name} must hold a JSON object, not a {type(content).__name__}.")
    return content


def write_safetensors(
    path: str | Path, entries: Mapping[str, Entry], read: Callable[[str], torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors one after another, so that only one is in memory: `read(name)` gives it, in the shape and dtype of its entry.

    The file is written beside its place, then renamed.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.bytes
        header[name] = {"dtype": names[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of eight bytes

    def save(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, entry in entries.items():
                tensor = read(name).contiguous()
                assert (tuple(tensor.shape), tensor.dtype) == entry, name
                file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))

    save_atomically(save, path)


def parts_of(entries: Iterable[Entry]) -> dict[torch.dtype, int]:
    """How many numbers there are of each dtype."""
    counts: dict[torch.dtype, int] = {}
    for entry in entries:
        counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.count
    return counts
