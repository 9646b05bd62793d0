"""Model folders: `model.safetensors` beside `config.json`; the shipped ones lie in `minisd/pretrained/`."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from minisd.train import save_atomically

PRETRAINED = Path(__file__).parent / "pretrained"


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in PRETRAINED.glob("*/config.json"))


def save_model(folder: str | Path, model: nn.Module, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """Write `model`'s weights as `dtype`, and `config` (anything JSON can hold). Each file is written beside, then renamed."""
    folder = Path(folder)
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_atomically(lambda path: save_file(tensors, path), folder / "model.safetensors")
    save_atomically(lambda path: path.write_text(json.dumps(config, indent=2) + "\n"), folder / "config.json")
    return folder


def model_folder(name_or_folder: str | Path) -> Path:
    """Where a shipped model lies, by its name; any other path is itself."""
    return PRETRAINED / name_or_folder if str(name_or_folder) in shipped_models() else Path(name_or_folder)


def read_model(name_or_folder: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(config, weights as float32) of a folder that `save_model` wrote, or of a shipped model by its name.

    Raises `FileNotFoundError` or `ValueError` with one sentence that says what is missing or damaged.
    """
    folder = model_folder(name_or_folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            shipped = ", ".join(shipped_models())
            raise FileNotFoundError(f"no model in {str(name_or_folder)!r}: it has no {name} (shipped models: {shipped}).")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder.name}/config.json is not readable as JSON: {error}.") from error
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        if path.read_bytes()[:8] == b"version ":
            raise ValueError(f"{folder.name}/model.safetensors is a git-lfs pointer, not the weights: run `git lfs pull`.") from error
        raise ValueError(f"{folder.name}/model.safetensors is damaged or only half there ({error}).") from error
    return config, {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def load_into(model: nn.Module, weights: dict[str, torch.Tensor], source: str | Path) -> nn.Module:
    """Put `weights` into `model`, strictly; returns the model in evaluation mode. Raises `ValueError` naming what does not fit."""
    wanted = model.state_dict()
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    shapes = [n for n in wanted.keys() & weights.keys() if wanted[n].shape != weights[n].shape]
    problems = [f"{len(missing)} tensors are missing (first: {missing[0]})"] if missing else []
    problems += [f"{len(extra)} tensors are not known (first: {extra[0]})"] if extra else []
    if shapes:
        name = min(shapes)
        problems += [f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(wanted[name].shape)}"]
    if problems:
        raise ValueError(f"the weights in {str(source)!r} do not fit {type(model).__name__}: {'; '.join(problems)}.")
    model.load_state_dict(weights)
    return model.eval()
