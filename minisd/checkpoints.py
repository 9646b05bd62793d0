"""Published Stable Diffusions on the disk: what a file or folder holds, every tensor accounted for, and its parts loaded one by one."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minisd.conditional_unet import ConditionalUNet
from minisd.config import FAMILIES, Family, family_of, read_text_config, read_unet_config, read_vae_config
from minisd.detection import TASKS, check_parts, count_from, find, lookup, said_prediction, single_family, sort_leftovers
from minisd.folders import PLAIN_FIRST, Variants, weight_file
from minisd.layouts import LDM_TEXT, LDM_UNET, PARTS, TEXT, TEXT_2, UNET, VAE, Place, Places, diffusers_places, ema_name, ldm_places
from minisd.sizes import infer_text, infer_unet, infer_vae
from minisd.tensor_files import TensorFile, open_tensors, read_json
from minisd.text_encoder import TextEncoder
from minisd.vae import AutoencoderKL

READERS: dict[str, Callable[[dict], Any]] = {UNET: read_unet_config, VAE: read_vae_config, TEXT: read_text_config, TEXT_2: read_text_config}
# What our own single files have in their metadata, and others lack; and a file in our own folders.
OUR_CONFIG, OUR_SCHEDULER, OUR_GUIDANCE, OUR_FILE = "minisd.config", "minisd.scheduler", "minisd.guidance", "minisd.json"

__all__ = [
    "READERS",
    "OUR_CONFIG",
    "OUR_SCHEDULER",
    "OUR_GUIDANCE",
    "OUR_FILE",
    "build",
    "Part",
    "without_ones",
    "Checkpoint",
    "open_checkpoint",
    "open_folder",
    "open_single",
    "read_single",
    "infer_configs",
]


def build(part: str, config: Any) -> nn.Module:
    """An empty model for a part, on the meta device: names and shapes, but no memory for the numbers."""
    with torch.device("meta"):
        if part == UNET:
            return ConditionalUNet(config)
        return AutoencoderKL(**asdict(config)) if part == VAE else TextEncoder(config)


@dataclass
class Part:
    """One of the models in a checkpoint: its sizes, and where each of its tensors lies, as `locate` finds them."""

    name: str
    config: Any  # ConditionalUNetConfig, VAEConfig or TextConfig
    file: TensorFile
    where: str  # for messages
    places: dict[str, Place] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)

    def locate(self, places: Places) -> "Part":
        """Find every tensor. Raises `ValueError` naming the first that is missing, or has another shape than the model's."""
        self.shapes = {name: tensor.shape for name, tensor in build(self.name, self.config).state_dict().items()}
        found = {name: find(self.file, places(name)) for name in self.shapes}
        if missing := [name for name, place in found.items() if place is None]:
            first = places(missing[0])[0].name
            raise ValueError(f"{self.where}: {len(missing)} of {len(found)} tensors of the {self.name} are missing (first: {first}).")
        self.places = found
        shape_of = lookup(self.file, places)
        for name, wanted in self.shapes.items():
            if (shape := without_ones(shape_of(name))) != without_ones(wanted):
                raise ValueError(
                    f"{self.where}: {found[name].name} has shape {shape}, and a {self.name} of these sizes needs {tuple(wanted)}."
                )
            if not self.file.entries[found[name].name].dtype.is_floating_point:
                raise ValueError(f"{self.where}: {found[name].name} holds {self.file.entries[found[name].name].dtype}, not fractions.")
        return self

    @property
    def used(self) -> set[str]:
        """The names in the file that this part reads."""
        return {place.name for place in self.places.values()}

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(shape.numel() for shape in self.shapes.values())

    def dtypes(self) -> Counter:
        """How many of its tensors the file keeps in which dtype."""
        return Counter(str(self.file.entries[name].dtype).removeprefix("torch.") for name in self.used)

    def tensor(
        self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", channels_last: bool = False
    ) -> torch.Tensor:
        """One tensor of the model; a view of the file where nothing had to be changed. Raises `ValueError` if it holds NaN or infinity.

        `channels_last`: lay out the weights of a convolution so that the numbers of one place stand together.
        """
        place = self.places[name]
        stored = self.file.read(place.name)
        tensor = place.cut(stored, self.shapes[name]).to(device, dtype)
        if channels_last and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        checked = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # eight bits know no smallest and largest
        if tensor.numel() and not torch.stack(torch.aminmax(checked)).isfinite().all():
            why = f" in {tensor.dtype}".replace("torch.", "") if tensor.dtype != stored.dtype and stored.isfinite().all() else ""
            raise ValueError(f"{self.where}: {place.name} holds NaN or infinity{why}: the file is damaged, or its training had failed.")
        if tensor.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr():  # copied: the file's pages are not needed any more
            self.file.release(place.name)
        return tensor

    def load(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> nn.Module:
        """The model with its weights, one tensor after another, in evaluation mode. `dtype`: default is the file's.

        Convolutions get the layout channels_last, in which they run fastest (`benchmarks/stable_diffusion.py`).
        """
        model = build(self.name, self.config)
        model.load_state_dict({name: self.tensor(name, dtype, device, channels_last=True) for name in self.shapes}, assign=True)
        return model.eval()


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the ones at its end: a 1x1 convolution (C, C, 1, 1) and a linear layer (C, C) hold the same numbers."""
    shape = tuple(shape)
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


@dataclass
class Checkpoint:
    """A Stable Diffusion on the disk, understood but not loaded.

    `layout`: "diffusers" (a folder) or "ldm" (a single file). `ignored`: the rules under which tensors are left out, and their names.
    `prediction_type`: None where the file does not say. `scheduler`: the contents of scheduler_config.json. `zero_negative`: whether
    "no negative prompt" means zeros instead of the empty text. `guidance`: the scale to draw with by default. `aside`: what a pickle
    holds besides tensors. `notes`: sentences for whoever loads it.
    """

    path: Path
    layout: str
    family: Family
    parts: dict[str, Part]
    prediction_type: str | None
    scheduler: dict[str, Any] = field(default_factory=dict)
    zero_negative: bool = False
    guidance: float = 7.5
    ignored: dict[str, list[str]] = field(default_factory=dict)
    aside: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """The family's short name: "sd1", "sd2" or "sdxl"."""
        return next(key for key, family in FAMILIES.items() if family is self.family)

    @property
    def task(self) -> str:
        """What its UNet is for, if not for plain drawing: "inpainting" or ""."""
        return TASKS[self.parts[UNET].config.in_channels]

    def describe(self) -> str:
        """What `python -m minisd info` prints."""
        lines = [f"{self.path.name}: {' '.join([self.family.name, self.task]).strip()}, {self.layout} layout"]
        for part in self.parts.values():
            kinds = ", ".join(f"{number} {dtype}" for dtype, number in part.dtypes().most_common())
            lines.append(f"  {part.name:15} {part.parameters:13,} numbers in {len(part.shapes):4} tensors   in the file: {kinds}")
        unet = self.parts[UNET].config
        lines.append(f"  widths {unet.block_out_channels}, heads {unet.heads}, transformers {unet.depths} and {unet.middle_depth}")
        lines.append(f"  text {unet.cross_attention_dim} wide; predicts {self.prediction_type or 'epsilon or v: the file does not say'}")
        for rule, names in self.ignored.items():
            lines.append(f"  ignored: {len(names)} x {rule} (such as {names[0]})")
        if self.aside:
            lines.append(f"  ignored: beside the weights, {', '.join(self.aside)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def open_checkpoint(path: str | Path, variants: Variants = PLAIN_FIRST, ema: bool = False) -> Checkpoint:
    """Look into a diffusers folder or a single file: its family, sizes, and where every tensor is. Nothing is loaded yet.

    `variants`: of the weights in a folder, in the order in which they are tried. `ema`: take the UNet's averaged copy of a single file.
    Raises `FileNotFoundError` or `ValueError` with one sentence that says what the path holds and what was expected.
    """
    path = Path(path)
    if path.is_dir():
        return open_folder(path, variants)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}.")
    return open_single(path, ema)


def open_folder(path: Path, variants: Variants = PLAIN_FIRST) -> Checkpoint:
    """`open_checkpoint` for a folder in the layout of diffusers."""
    index = read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    if not (path / UNET).is_dir():
        kind = index.get("_class_name", "")
        singles = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".ckpt"))
        hint = f"; did you mean the file {singles[0]} in it?" if singles else "."
        raise ValueError(
            f"{path.name} is a {kind}, not a Stable Diffusion with a UNet."
            if kind
            else f"{path.name} is no model: it has no folder unet{hint}"
        )
    parts, ignored = {}, {}
    for name in PARTS:
        if not (path / name).is_dir():
            if name == TEXT_2:
                continue
            raise FileNotFoundError(f"{path.name} has no folder {name}; a model has unet, vae and text_encoder.")
        if not (path / name / "config.json").is_file():
            raise FileNotFoundError(f"{path.name}/{name} has no config.json.")
        config = READERS[name](read_json(path / name / "config.json"))
        weights = weight_file(path, name, variants)
        file = open_tensors(weights)
        parts[name] = Part(name, config, file, f"{path.name}/{name}/{weights.name}").locate(diffusers_places(name))
        for rule, names in sort_leftovers(file.entries.keys() - parts[name].used, parts[name].where).items():
            ignored.setdefault(rule, []).extend(f"{name}/{each}" for each in names)
    key = family_of(parts[UNET].config)
    check_parts(key, {name: part.config for name, part in parts.items()}, path.name)
    settings = path / "scheduler" / "scheduler_config.json"
    scheduler = read_json(settings) if settings.is_file() else {}
    prediction_type = scheduler.get("prediction_type") or ("epsilon" if scheduler or key != "sd2" else None)
    zero_negative = bool(index.get("force_zeros_for_empty_prompt", key == "sdxl"))
    ours = read_json(path / OUR_FILE) if (path / OUR_FILE).is_file() else {}
    guidance = float(ours.get("guidance", FAMILIES[key].guidance))
    return Checkpoint(path, "diffusers", FAMILIES[key], parts, prediction_type, scheduler, zero_negative, guidance, ignored)


def open_single(path: Path, ema: bool = False) -> Checkpoint:
    """`open_checkpoint` for a single file in the original layout."""
    file = open_tensors(path)
    try:
        return read_single(path, file, ema)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(path.name) else f"{path.name}: {message}") from None


def read_single(path: Path, file: TensorFile, ema: bool) -> Checkpoint:
    """Which tensors of an opened file are which."""
    key = single_family(file.entries, path.name)
    copies = sum(name.startswith("model_ema.diffusion_model") for name in file.entries)
    if ema and copies < 100:
        raise ValueError(f"{path.name} holds no averaged copy of the UNet (ema=True asks for it); without ema=True it loads.")
    prefix = ema_name if ema else (lambda name: LDM_UNET + name)
    configs = {name: READERS[name](settings) for name, settings in json.loads(file.metadata.get(OUR_CONFIG, "{}")).items()}
    configs = configs or infer_configs(file, key, prefix, ema)
    check_parts(key, configs, path.name)
    unet, vae = configs[UNET], configs[VAE]
    attends = [depth > 0 for depth in unet.depths]
    places = {name: ldm_places(name, key, unet.layers_per_block, attends, len(vae.block_out_channels), ema) for name in configs}
    parts = {name: Part(name, configs[name], file, path.name).locate(places[name]) for name in configs}
    leftovers = file.entries.keys() - set().union(*(part.used for part in parts.values()))
    ignored = sort_leftovers(leftovers, path.name, ema)
    prediction_type, notes = said_prediction(file, key)
    scheduler = json.loads(file.metadata.get(OUR_SCHEDULER, "{}"))
    guidance = float(file.metadata.get(OUR_GUIDANCE, FAMILIES[key].guidance))
    return Checkpoint(path, "ldm", FAMILIES[key], parts, prediction_type, scheduler, key == "sdxl", guidance, ignored, file.aside, notes)


def infer_configs(file: TensorFile, key: str, prefix: Callable[[str], str], ema: bool) -> dict[str, Any]:
    """The sizes of all parts of a single file, off its shapes. `prefix`: makes a UNet's LDM name the name in the file."""
    layers = count_from(file, lambda i: prefix(f"input_blocks.{i + 1}.0.in_layers.2.weight"))
    levels = 1 + count_from(file, lambda i: prefix(f"input_blocks.{(i + 1) * (layers + 1)}.0.op.weight"))
    configs = {UNET: infer_unet(lookup(file, ldm_places(UNET, key, layers, (), ema=ema)), levels, layers)}
    configs[VAE] = infer_vae(lookup(file, ldm_places(VAE, key)), FAMILIES[key].scaling_factor)
    for name, activation, used in zip(LDM_TEXT[key], FAMILIES[key].activations, FAMILIES[key].layers):
        configs[name] = infer_text(lookup(file, ldm_places(name, key)), activation, used, projected=name == TEXT_2)
    return configs
