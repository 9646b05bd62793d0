"""Opening PyTorch's pickles (.ckpt, .pt, .bin) so that nothing in them can run.

A pickle is a small program: "take the function f of module m, call it with these arguments". `torch.load(weights_only=True)` knows a short
list of harmless ones, such as the function that puts a tensor together, and refuses all others. Early checkpoints of Stable Diffusion also
hold objects of the training library, which that list does not know. They become empty stand-ins here; any other name is refused.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

# What a training leaves behind and nobody needs: names that start like this are replaced by stand-ins.
BOOKKEEPING = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.core.multiarray.scalar", "numpy.dtype")
BOOKKEEPING += ("numpy._core.multiarray.scalar", "pathlib.", "argparse.Namespace", "typing.Any", "collections.defaultdict")
KINDS = ("int", "float", "complex", "bool", "str", "unicode", "bytes", "tuple", "list", "dict", "set", "frozenset", "slice", "object")
KINDS = {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in KINDS}  # Python's own, named beside bookkeeping
DICTIONARIES = ("AttributeDict",)  # classes that a pickle fills like a dictionary


class StandIn:
    """Takes the place of an object of bookkeeping: accepts whatever it is given and does nothing with it."""

    def __new__(cls, *arguments: Any, **options: Any) -> "StandIn":
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def empty_dictionary(*arguments: Any) -> dict:
    """Takes the place of `defaultdict(factory)`."""
    return {}


def stand_in(name: str) -> tuple[Any, str]:
    """What stands for a name of bookkeeping, as `torch.serialization.safe_globals` wants it."""
    if name.endswith(DICTIONARIES):
        return OrderedDict, name
    return (empty_dictionary if name == "collections.defaultdict" else StandIn), name


def open_pickle(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(the innermost `state_dict`, the names that stood beside it on the way) of a file of `torch.save`, its tensors mapped where possible.

    Raises `ValueError` in one sentence when the file is damaged, holds no dictionary, or asks for anything but tensors and bookkeeping:
    then nothing of it has run.
    """
    zipped = zipfile.is_zipfile(path)
    with open(path, "rb") as file:
        if not zipped and file.read(2) == b"PK":  # a zip file whose end is missing
            raise ValueError(f"{path.name} is damaged or only half there: download it again.")
    content = load_safely(path, names_asked_for(path) if zipped else [], mapped=zipped)
    aside: list[str] = []
    while isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        aside += [str(name) for name in content if name != "state_dict"]
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, not a dictionary of weights.")
    return content, aside


def names_asked_for(path: Path) -> list[str]:
    """The names in the pickle that are not on PyTorch's list, all of them bookkeeping. The pickle is read like a text, not run."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no pickle of torch.save, or one with commands that none needs: the safe load says what is wrong
        return []
    if strangers := sorted(name for name in names if not name.startswith(BOOKKEEPING) and name not in KINDS):
        raise ValueError(refusal(path, strangers[0]))
    return sorted(names)


def load_safely(path: Path, bookkeeping: list[str], mapped: bool) -> Any:
    """`torch.load(weights_only=True)`, where the names in `bookkeeping` mean stand-ins."""
    try:
        with torch.serialization.safe_globals([stand_in(name) for name in bookkeeping]), open(path, "rb") as file:
            misnamed = path.suffix == ".safetensors"  # torch.load goes by the name there; an open file has none
            return torch.load(file if misnamed else path, map_location="cpu", weights_only=True, mmap=mapped and not misnamed)
    except pickle.UnpicklingError as error:
        message = str(error)
        for start in ("GLOBAL ", "function ", "class "):
            if start in message:
                raise ValueError(refusal(path, message.split(start)[1].split(" ")[0])) from None
        raise ValueError(refusal(path, "something that no file of weights needs")) from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"{path.name} is damaged or only half there ({type(error).__name__}): download it again.") from None


def refusal(path: Path, name: str) -> str:
    """The sentence for a pickle that wants more than weights."""
    return f"{path.name} asks for {name} while it is opened, which could run any program; it was refused, and nothing of it ran."
