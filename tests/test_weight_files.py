"""Files of weights: safetensors, shards and pickles opened without loading; what is damaged or dangerous, in one sentence; the Hub."""

import builtins
import json
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import types
from collections import OrderedDict, defaultdict
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minisd.checkpoints import open_checkpoint
from minisd.folders import needed_files, weight_file
from minisd.loading import find_source, load, variant_order
from minisd.tensor_files import DTYPES, Entry, open_tensors, write_safetensors
from tests.real_models import save_reference, small_tokenizer

CPU = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "c": torch.randn(2, 2, 3, generator=generator).half(),
        "d": torch.arange(5),
        "e": torch.tensor(2.5),
        "f": torch.zeros(0, 4),
    }


@pytest.fixture
def file(tensors, tmp_path):
    save_file(tensors, tmp_path / "x.safetensors", {"note": "hello"})
    return tmp_path / "x.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_reference("sd1", tmp_path_factory.mktemp("sd1") / "model")


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def message_of(path: Path) -> str:
    """What `open_tensors` says of a file that it does not open: one sentence that names it."""
    with pytest.raises(ValueError) as caught:
        open_tensors(path)
    message = str(caught.value)
    assert path.name in message and "\n" not in message and len(message) < 250
    return message


# Safetensors


def test_safetensors(file, tensors):
    opened = open_tensors(file)
    assert same({name: opened.read(name) for name in opened.entries}, tensors)
    assert {name: entry.dtype for name, entry in opened.entries.items()} == {name: tensor.dtype for name, tensor in tensors.items()}
    assert opened.metadata == {"note": "hello"} and opened.aside == []
    opened.release("a")
    assert torch.equal(opened.read("a"), tensors["a"])


def test_a_tensor_that_is_changed_does_not_change_the_file(file, tensors):
    opened = open_tensors(file)
    opened.read("a").zero_()
    assert same(load_file(file), tensors)


def test_a_file_whose_numbers_lie_at_odd_places(tmp_path):
    """Old files did not pad the header."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * ((3 - len(header)) % 4)
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.5, -2.0))
    assert open_tensors(tmp_path / "x").read("a").tolist() == [1.5, -2.0]


def test_written_files_are_those_of_safetensors(tensors, tmp_path):
    entries = {name: Entry(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "ours", entries, tensors.__getitem__, {"note": "hello"})
    assert same(load_file(tmp_path / "ours"), tensors)
    assert open_tensors(tmp_path / "ours").metadata == {"format": "pt", "note": "hello"}


def test_all_dtypes(tmp_path):
    tensors = {name: torch.ones(3).to(dtype) for name, dtype in DTYPES.items()}
    save_file(tensors, tmp_path / "x")
    opened = open_tensors(tmp_path / "x")
    assert all(
        opened.read(name).dtype == tensor.dtype and opened.read(name).float().tolist() == [1, 1, 1] for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99])
def test_half_downloaded_files(file, share):
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    assert "half there" in message_of(file) or "has only" in message_of(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has only 0 bytes"),
        (b"abc", "has only 3 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167536\n", "git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page, not weights"),
        (b"\n<html lang='en'>" + b" " * 600, "a web page, not weights"),
        (b"GGUF\x03\x00\x00\x00" + b"\x00" * 600, "a GGUF file"),
        (b"just some text, quite a lot of it, in fact", "neither safetensors nor a file of torch.save"),
        (struct.pack("<Q", 10) + b"{not json}" + b"\x00" * 10, "header cannot be read"),
        (struct.pack("<Q", 2**40) + b"{" + b"\x00" * 100, "half there"),
    ],
)
def test_files_of_something_else(tmp_path, data, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    assert re.search(message, message_of(path))


def test_headers_that_lie(tmp_path):
    def written(entry):
        header = json.dumps({"a": entry}).encode()
        (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
        return message_of(tmp_path / "x")

    assert "do not agree" in written({"dtype": "F32", "shape": [4], "data_offsets": [0, 8]})
    assert "numbers of type 'F4'" in written({"dtype": "F4", "shape": [4], "data_offsets": [0, 16]})
    assert "header cannot be read" in written([1, 2])
    assert "half there" in written({"dtype": "F32", "shape": [400], "data_offsets": [0, 1600]})


def test_the_name_does_not_matter(tensors, tmp_path):
    """A pickle called .safetensors, and safetensors called .ckpt."""
    torch.save(tensors, tmp_path / "x.safetensors")
    save_file(tensors, tmp_path / "x.ckpt")
    for name in ("x.safetensors", "x.ckpt"):
        opened = open_tensors(tmp_path / name)
        assert same({name: opened.read(name) for name in opened.entries}, tensors)


# Folders: variants, shards, old names


def test_variants_and_shards(folder, tmp_path):
    """The fp16 variant, shards with an index, and .bin, each alone in a folder."""
    expected = load(folder, **CPU).unet.state_dict()
    weights = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    names = sorted(weights)
    halves = {1: names[: len(names) // 2], 2: names[len(names) // 2 :]}

    def only(root, write):
        root = copied(folder, root)
        (root / "unet/diffusion_pytorch_model.safetensors").unlink()
        write(root / "unet")
        return root

    def sharded(shard, index):
        def write(unet):
            for number, part in halves.items():
                save_file({name: weights[name] for name in part}, unet / shard.format(number))
            where = {name: shard.format(number) for number, part in halves.items() for name in part}
            (unet / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))

        return write

    def old_style(unet):
        torch.save(weights, unet / "diffusion_pytorch_model.bin")

    ways = {
        "bin": old_style,
        "legacy bin": lambda unet: torch.save(weights, unet / "diffusion_pytorch_model.bin", _use_new_zipfile_serialization=False),
        "fp16": lambda unet: save_file(weights, unet / "diffusion_pytorch_model.fp16.safetensors"),
        "shards": sharded("diffusion_pytorch_model-0000{}-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
        "fp16 shards": sharded(
            "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"
        ),
        "older fp16 shards": sharded(
            "diffusion_pytorch_model-0000{}-of-00002.fp16.safetensors", "diffusion_pytorch_model.safetensors.fp16.index.json"
        ),
    }
    for name, write in ways.items():
        root = only(tmp_path / name, write)
        assert same(dict(load(root, **CPU).unet.state_dict()), dict(expected)), name
        listing = [str(path.relative_to(root).as_posix()) for path in root.rglob("*") if path.is_file()]
        assert set(needed_files(listing)) == set(listing), name  # nothing of it is left on the Hub


def test_plain_weights_come_first_and_float16_asks_for_the_variant(folder, tmp_path):
    root = copied(folder, tmp_path / "x")
    weights = load_file(root / "unet/diffusion_pytorch_model.safetensors")
    save_file({name: tensor.half() for name, tensor in weights.items()}, root / "unet/diffusion_pytorch_model.fp16.safetensors")
    torch.save({}, root / "unet/diffusion_pytorch_model.bin")
    names = {dtype: weight_file(root, "unet", variant_order(None, dtype)).name for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    plain = "diffusion_pytorch_model.safetensors"
    assert names == {torch.float32: plain, torch.bfloat16: plain, torch.float16: "diffusion_pytorch_model.fp16.safetensors"}
    with pytest.raises(
        FileNotFoundError, match="no weights in x/vae: it has config.json, diffusion_pytorch_model.safetensors, and neither"
    ):
        load(root, variant="fp16", **CPU)


def test_shards_that_are_not_there(folder, tmp_path):
    root = copied(folder, tmp_path / "x")
    weights = root / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(root / "unet/one.safetensors")
    index = root / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "one.safetensors", "conv_in.bias": "two.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"index.json names 2 shards, and two.safetensors is not there"):
        open_checkpoint(root)
    index.write_text(json.dumps({"weight_map": {"nowhere": "one.safetensors"}}))
    with pytest.raises(ValueError, match="says that nowhere is in one.safetensors, but it is not"):
        open_checkpoint(root)
    index.write_text("{}")
    with pytest.raises(ValueError, match="no index of shards: it has no weight_map"):
        open_checkpoint(root)


def test_folders_that_are_none(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file or folder 'nowhere'"):
        open_checkpoint("nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"empty is no model: it has no folder unet\.$"):
        open_checkpoint(empty)
    (empty / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="did you mean the file model.safetensors in it"):
        open_checkpoint(empty)
    (empty / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="empty is a FluxPipeline, not a Stable Diffusion with a UNet"):
        open_checkpoint(empty)
    root = copied(folder, tmp_path / "x")
    (root / "vae/config.json").unlink()
    with pytest.raises(FileNotFoundError, match="x/vae has no config.json"):
        open_checkpoint(root)
    shutil.rmtree(root / "vae")
    with pytest.raises(FileNotFoundError, match="x has no folder vae"):
        open_checkpoint(root)
    (root / "unet/config.json").write_text("{")
    with pytest.raises(ValueError, match="unet/config.json is not readable as JSON"):
        open_checkpoint(root)


def test_a_tokenizer_of_another_model(folder, tmp_path):
    root = copied(folder, tmp_path / "x")
    shutil.rmtree(root / "tokenizer")
    from minisd.tokenizer import Tokenizer

    Tokenizer.train(["a b"], 514).save(root / "tokenizer")
    with pytest.raises(ValueError, match="the tokenizer has 514 symbols, and the text_encoder a vector for each of 600"):
        load(root, **CPU)


# Pickles


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_pickles_are_unwrapped(tensors, tmp_path, zipped, depth):
    content = dict(tensors)
    for number in range(depth):
        content = {"state_dict": content, "global_step": 470_000 + number, "epoch": 3}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    opened = open_tensors(tmp_path / "x.ckpt")
    assert same({name: opened.read(name) for name in opened.entries}, tensors)
    assert opened.aside == ["global_step", "epoch"] * depth


@pytest.fixture
def lightning(monkeypatch):
    """A stand-in for the training library, so that its classes can be pickled; gone when the file is opened."""
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    modules = {name: types.ModuleType(name) for name in (*names, "pytorch_lightning.utilities.parsing")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def define(class_name, module, base=object):
        kind = type(class_name, (base,), {"__module__": module})
        setattr(modules[module], class_name, kind)
        return kind

    checkpoint = define("ModelCheckpoint", names[2])
    attributes = define("AttributeDict", "pytorch_lightning.utilities.parsing", dict)
    yield checkpoint, attributes
    for name in modules:
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_bookkeeping_of_the_training_library_is_replaced(tensors, lightning, tmp_path, monkeypatch):
    checkpoint, attributes = lightning
    callback = checkpoint()
    callback.best_model_score, callback.dirpath = np.float64(0.25), Path("somewhere")
    content = {
        "state_dict": dict(tensors),
        "callbacks": {checkpoint: {"best": callback, "counts": defaultdict(int, {"a": 1})}},
        "hyper_parameters": attributes(lr=1e-4, nested=attributes(x=[1, 2])),
        "global_step": 470_000,
    }
    torch.save(content, tmp_path / "x.ckpt")
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    opened = open_tensors(tmp_path / "x.ckpt")
    assert same({name: opened.read(name) for name in opened.entries}, tensors)
    assert opened.aside == ["callbacks", "hyper_parameters", "global_step"]
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


class Call:
    """Pickles as "call this function with these arguments"."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def dangers(mark: str) -> dict[str, tuple[object, str]]:
    """Ways to run `mark`, a command that leaves a file behind; and the name that gives each away."""
    touch = f"open({mark!r}, 'w').close()"
    nested = {"deep": [OrderedDict(a=(1, {"b": [Call(os.system, f"touch {mark}")]}))]}
    return {
        "os.system": (Call(os.system, f"touch {mark}"), "system"),
        "eval": (Call(builtins.eval, touch), "eval"),
        "exec": (Call(builtins.exec, touch), "exec"),
        "subprocess": (Call(subprocess.check_call, ["touch", mark]), "check_call"),
        "getattr of a module": (Call(getattr, Call(__import__, "os"), "system"), "getattr|__import__"),
        "nested in dictionaries": (nested, "system"),
        "reduce within reduce": (Call(builtins.eval, Call(str, touch)), "eval|str"),
        "a pickle within a pickle": (Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {mark}"))), "loads"),
        "torch.load": (Call(torch.load, mark), "torch.serialization.load"),
        "numpy": (Call(np.load, mark, None, True), "load"),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", list(dangers("")))
@pytest.mark.parametrize("wrapped", [True, False])
def test_pickles_with_code_are_refused_and_nothing_of_them_runs(tensors, tmp_path, zipped, kind, wrapped):
    """With tensors beside it, and as Lightning would wrap it, so that the rest of the file looks right."""
    mark = tmp_path / "ran"
    danger, name = dangers(str(mark))[kind]
    content = {"state_dict": dict(tensors), "callbacks": danger} if wrapped else {**tensors, "z": danger}
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    message = message_of(tmp_path / "model.ckpt")
    assert "it was refused, and nothing of it ran" in message
    assert any(part in message for part in name.split("|")), message
    assert not mark.exists()


def test_code_beside_bookkeeping_is_refused(lightning, tmp_path):
    """Stand-ins open no door: what is on the list of bookkeeping is replaced, and the call beside it is refused all the same."""
    mark = tmp_path / "ran"
    content = {"state_dict": {"a": torch.zeros(1)}, "callbacks": {lightning[0]: Call(os.system, f"touch {mark}")}}
    torch.save(content, tmp_path / "model.ckpt")
    assert "nothing of it ran" in message_of(tmp_path / "model.ckpt") and not mark.exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("zipped", [True, False])
def test_half_downloaded_pickles(tmp_path, share, zipped):
    path = tmp_path / "x.ckpt"
    torch.save({"a": torch.randn(1000)}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    message = message_of(path)
    assert "half there" in message or "refused" in message


def test_pickles_without_weights(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "x.pt")
    assert "holds a list, not a dictionary of weights" in message_of(tmp_path / "x.pt")


# Memory


MEMORY = """
import sys
import torch
from minisd.checkpoints import open_checkpoint

part = open_checkpoint(sys.argv[1]).parts["text_encoder"]
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
torch.ones(1).to(torch.bfloat16).float()
open("/proc/self/clear_refs", "w").write("5")
before = peak()
model = part.load(getattr(torch, sys.argv[2]))
size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
print(size, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_hardly_more_memory_than_the_model(folder, tmp_path, dtype):
    """A part of 130 MB: the peak, file pages included, stays below 1.1 times the model's size in its dtype."""
    from transformers import CLIPTextConfig, CLIPTextModel

    root = copied(folder, tmp_path / "x")
    shutil.rmtree(root / "text_encoder")
    shutil.rmtree(root / "unet")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 8, "vocab_size": 600}
    CLIPTextModel(CLIPTextConfig(**sizes)).save_pretrained(root / "text_encoder")
    from tests.real_models import reference_unet

    reference_unet("sd1", cross_attention_dim=512).save_pretrained(root / "unet")
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, str(root), dtype], capture_output=True, text=True, check=True, cwd=Path.cwd()
    ).stdout
    size, extra = map(int, out.split())
    assert size > (60_000_000 if dtype == "bfloat16" else 120_000_000)
    assert extra <= 1.1 * size + 3_000_000  # the code that is loaded meanwhile


# The Hub


@pytest.fixture
def hub(folder, monkeypatch, tmp_path):
    """A Hub that has "somebody/model" in many variants, and says which files it was asked for."""
    files = [str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file()]
    extra = ["README.md", "v1-5.ckpt", "v1-5.safetensors", "safety_checker/model.safetensors", "unet/diffusion_pytorch_model.bin"]
    extra += [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "text_encoder/flax_model.msgpack",
    ]
    asked = []

    def listing(*names):
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=name) for name in names])

    def model_info(self, repo_id, timeout):
        if repo_id == "somebody/single":
            return listing("README.md", "model.safetensors")
        if repo_id != "somebody/model":
            response = types.SimpleNamespace(headers={}, request=None, status_code=404)
            raise huggingface_hub.errors.RepositoryNotFoundError("404", response=response)
        return listing(*files, *extra)

    def snapshot_download(repo_id, allow_patterns=None, local_files_only=False):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        asked.extend(allow_patterns)
        for name in allow_patterns:
            target = tmp_path / "snapshot" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, target)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return files, asked


def test_hub_gives_only_the_files_that_are_needed(hub, folder):
    files, asked = hub
    loaded = load("somebody/model", **CPU)
    assert sorted(asked) == sorted(files)
    assert same(dict(loaded.unet.state_dict()), dict(load(folder, **CPU).unet.state_dict()))
    asked.clear()
    with pytest.raises(FileNotFoundError, match="fp16"):  # the copy here has no such file; that it was asked for is the point
        load("somebody/model", torch.float16, "cpu")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in asked and "unet/diffusion_pytorch_model.safetensors" not in asked


def test_hub_says_what_it_does_not_have(hub):
    with pytest.raises(FileNotFoundError, match="no file or folder 'somebody/nothing', and no model of that name on the Hub"):
        load("somebody/nothing", **CPU)
    with pytest.raises(
        FileNotFoundError, match="'somebody/single' on the Hub is no model in the layout of diffusers.*download model.safetensors"
    ):
        load("somebody/single", **CPU)
    with pytest.raises(FileNotFoundError, match="no file or folder 'a/b/c', and it is no name on the Hub either"):
        find_source("a/b/c", (None,))
    with pytest.raises(FileNotFoundError, match="no file or folder 'models/sd.ckpt'"):
        find_source("models/sd.ckpt", (None,))


def test_hub_without_network(monkeypatch, tmp_path):
    """The real client, on a computer that finds no address, and in offline mode."""

    def nobody_answers(*arguments, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody_answers)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(ConnectionError, match="the Hub cannot be reached, and 'somebody/model' is not in its cache") as caught:
            load("somebody/model", **CPU)
        assert "\n" not in str(caught.value)


def test_hub_lost_in_the_middle(hub, monkeypatch):
    def lost(*arguments, **options):
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lost)
    with pytest.raises(ConnectionError, match="the connection to the Hub broke while 'somebody/model' was downloaded"):
        load("somebody/model", **CPU)


def test_a_folder_of_that_name_wins(folder, tmp_path, monkeypatch):
    copied(folder, tmp_path / "somebody/model")
    monkeypatch.chdir(tmp_path)
    assert find_source("somebody/model", (None,)) == Path("somebody/model")


def test_small_tokenizer_has_the_published_layout():
    tokenizer = small_tokenizer("!")
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.end_id, tokenizer.length) == (600, 0, 599, 77)
