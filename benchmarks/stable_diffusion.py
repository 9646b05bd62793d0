"""Stable Diffusion 1.5 at its published size beside diffusers: the same random weights, the same inputs, in turns in one run.

    python benchmarks/stable_diffusion.py                     one guided step of the UNet, VAE, text, in float32 and bfloat16
    python benchmarks/stable_diffusion.py --part unet --dtype bfloat16 --compile
    python benchmarks/stable_diffusion.py --part load         opening a folder from the disk (writes 4.3 GB to --folder)
    python benchmarks/stable_diffusion.py --part picture      a whole picture of 20 guided steps, from such a folder
    python benchmarks/stable_diffusion.py --small             the same at a small size, to see that it runs

Each number is the fastest of --rounds calls; ours and theirs take turns. "of peak" is the share of the rate at which this machine
multiplies two large square matrices, measured in the same run. Memory is what a call needs at its peak, above what is there before it
(the weights); for `load` and `picture`, which run in a fresh process each, above the imported libraries.
"""

import argparse
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from minisd.conditional_unet import ConditionalUNet, ConditionalUNetConfig
from minisd.loading import load
from minisd.text_encoder import TextConfig, TextEncoder
from minisd.tokenizer import Tokenizer
from minisd.utils import processor_name
from minisd.vae import AutoencoderKL

# Multiply-accumulates of one call at the sizes below: a guided step (two latents of 64x64), decoding 512x512, 77 tokens.
MACS = {"unet": 2 * 401.6e9, "decode": 1257.3e9, "encode": 558.3e9, "text": 6.6e9}


def reference_parts(small: bool) -> dict[str, Callable[[], nn.Module]]:
    """The models of diffusers and transformers, made when they are needed."""
    from diffusers import AutoencoderKL as Autoencoder
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    widths = (32, 64, 64, 64) if small else (320, 640, 1280, 1280)
    vae_widths = (32, 32, 64, 64) if small else (128, 256, 512, 512)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1} if small else {}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12} | text
    return {
        "unet": lambda: UNet2DConditionModel(block_out_channels=widths, cross_attention_dim=text["hidden_size"], sample_size=64),
        "vae": lambda: Autoencoder(block_out_channels=vae_widths, layers_per_block=2, **kinds),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**text, eos_token_id=49407)),
    }


def our_part(name: str, reference: nn.Module, channels_last: bool) -> nn.Module:
    """Our class with the weights of theirs, in the same memory where the layout allows."""
    config = reference.config
    with torch.device("meta"):
        if name == "unet":
            sizes = {"block_out_channels": config.block_out_channels, "cross_attention_dim": config.cross_attention_dim}
            ours = ConditionalUNet(ConditionalUNetConfig(**sizes))
        elif name == "vae":
            ours = AutoencoderKL(block_out_channels=config.block_out_channels, layers_per_block=2)
        else:
            names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            ours = TextEncoder(TextConfig(**{name: getattr(config, name) for name in names}))
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    weights = {name if name in shapes else f"text_model.{name}": tensor for name, tensor in reference.state_dict().items()}
    ours.load_state_dict({name: tensor.reshape(shapes[name]) for name, tensor in weights.items()}, assign=True)
    return (ours.to(memory_format=torch.channels_last) if channels_last else ours).eval()


def seconds(call: Callable[[], object]) -> float:
    """How long one call takes; with one thread on a CPU, the processor's time, which other programs disturb less."""
    gpu = torch.cuda.is_available()
    clock = time.process_time if torch.get_num_threads() == 1 and not gpu else time.perf_counter
    synchronise = torch.cuda.synchronize if gpu else (lambda: None)
    synchronise()
    start = clock()
    call()
    synchronise()
    return clock() - start


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The fastest of several rounds for each call; before them each is called once."""
    best = dict.fromkeys(calls, math.inf)
    for number in range(rounds + 1):
        for name, call in calls.items():
            spent = seconds(call)
            if number:
                best[name] = min(best[name], spent)
    return best


def peak_rate(dtype: torch.dtype, device: torch.device, side: int = 2048) -> float:
    """Multiply-accumulates a second of a large square product."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return side**3 / in_turns({"": lambda: a @ b}, 5)[""]


def agreement(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


def memory(reset: bool = False) -> float:
    """GB in use at the peak since the last `reset`: of the GPU, else of this process; nan where the system does not tell."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e9
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not os.access(clear, os.W_OK):
        return math.nan
    if reset:
        clear.write_text("5")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024 / 1e9


def needed(call: Callable[[], object]) -> float:
    """GB that a call needs at its peak, above what is in use before it."""
    gc.collect()
    before = memory(reset=True)
    call()
    return memory() - before


def line(name: str, dtype: str, best: dict[str, float], gigabytes: dict[str, float]) -> str:
    """Both times, their ratio, and the memory of both."""
    ours, theirs = best["minisd"], best["diffusers"]
    times = f"minisd {ours:8.3f} s   diffusers {theirs:8.3f} s   ratio {ours / theirs:.2f}"
    return f"{name:13} {dtype:9} {times}   memory {gigabytes['minisd']:.2f} and {gigabytes['diffusers']:.2f} GB"


@torch.no_grad()
def compare(part: str, dtype: torch.dtype, options: argparse.Namespace) -> None:
    """Ours beside theirs for one model: a line for each of its uses."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    reference = reference_parts(options.small)[part]().to(device, dtype).eval()
    ours = our_part(part, reference, options.channels_last)
    if options.reference_channels_last:
        reference = reference.to(memory_format=torch.channels_last)
    side = 16 if options.small else 64
    latents = torch.randn(2, 4, side, side, device=device).to(dtype)
    if part == "unet":
        context = torch.randn(2, 77, reference.config.cross_attention_dim, device=device).to(dtype)
        t = torch.tensor([801], device=device)
        uses = {"unet": (lambda: ours(latents, t, context), lambda: reference(latents, t, encoder_hidden_states=context).sample)}
    elif part == "vae":
        pictures, scale = torch.rand(1, 3, 8 * side, 8 * side, device=device).to(dtype) * 2 - 1, ours.config.scaling_factor
        uses = {
            "decode": (lambda: ours.decode(latents[:1]), lambda: reference.decode(latents[:1] / scale).sample),
            "encode": (lambda: ours.encode(pictures), lambda: reference.encode(pictures).latent_dist.mean * scale),
        }
    else:
        ids = torch.randint(1, 49000, (1, 77), device=device)
        uses = {"text": (lambda: ours(ids).sequence, lambda: reference(ids)[0])}
    if options.compile:
        ours.compile()
        reference.compile()
    peak = peak_rate(dtype, device)
    for name, (our_call, their_call) in uses.items():
        calls = {"minisd": our_call, "diffusers": their_call}
        difference = agreement(our_call(), their_call())
        best = in_turns(calls, options.rounds)
        gigabytes = {who: needed(call) for who, call in calls.items()}
        share = "" if options.small else f"   {MACS[name] / best['minisd'] / peak:.0%} of peak"
        kind = str(dtype).removeprefix("torch.")
        print(f"{line(name, kind, best, gigabytes)}{share}   largest difference {difference:.1e}", flush=True)


def saved_folder(options: argparse.Namespace) -> Path:
    """A whole Stable Diffusion with random weights, as diffusers saves it; written once."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    folder = options.folder / ("small" if options.small else "sd15")
    if not (folder / "model_index.json").exists():
        torch.manual_seed(0)
        Tokenizer.load("clip").save(folder / "tokenizer")
        parts = {name: make() for name, make in reference_parts(options.small).items()}
        schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1, "clip_sample": False}
        parts |= {"tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"), "scheduler": DDIMScheduler(**schedule)}
        StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None).save_pretrained(folder)
        del parts
        gc.collect()
        os.sync()  # pages that are not on the disk yet cannot be forgotten
    return folder


def forget(folder: Path) -> None:
    """Take the folder's files out of the operating system's cache, so that they are read from the disk again."""
    if hasattr(os, "posix_fadvise"):
        for path in folder.rglob("*.safetensors"):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def opened(who: str, folder: Path, dtype: torch.dtype, options: argparse.Namespace) -> object:
    """The folder, loaded by one of the two; with torch.compile if asked for."""
    if who == "minisd":
        pipe = load(folder, dtype, options.device)
    else:
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None).to(options.device)
        pipe.set_progress_bar_config(disable=True)
        if options.reference_channels_last:
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.vae.to(memory_format=torch.channels_last)
    if options.compile:
        pipe.unet.compile()
        pipe.vae.decoder.compile()
    return pipe


def draw(who: str, pipe: object, steps: int, side: int) -> torch.Tensor:
    """A guided picture (1, 3, H, W) in [-1, 1], from the same latents for both."""
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    asked, size = "a photo of an astronaut riding a horse on mars", 8 * side
    if who == "minisd":
        return pipe.decode(pipe.sample(asked, steps=steps, guidance=7.5, latents=latents, size=size, progress=False))
    latents = latents.to(pipe.device, pipe.unet.dtype)
    told = {"num_inference_steps": steps, "guidance_scale": 7.5, "latents": latents, "height": size, "width": size, "output_type": "pt"}
    return pipe(asked, **told).images.float() * 2 - 1


def child(who: str, options: argparse.Namespace) -> None:
    """What a fresh process does for one of the two; prints its result as JSON."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    part, dtype = options.part[0], getattr(torch, options.dtype[0])
    folder, side = saved_folder(options), 16 if options.small else 64
    torch.ones(8, 8, device=options.device).to(dtype) @ torch.ones(8, 8, device=options.device).to(dtype)  # the libraries are there now
    before = memory(reset=True)
    if part == "picture":
        pipe = opened(who, folder, dtype, options)
        draw(who, pipe, 2, side)  # the first call may compile
        start = time.perf_counter()
        torch.save(draw(who, pipe, options.steps, side).cpu(), options.folder / f"{who}.pt")
    else:
        if part == "load, cold":
            forget(folder)
        start = time.perf_counter()  # waiting for the disk counts
        pipe = opened(who, folder, dtype, options)
    spent = time.perf_counter() - start
    print(json.dumps({"seconds": spent, "gigabytes": memory() - before}))


def compare_processes(part: str, dtype: str, options: argparse.Namespace) -> None:
    """`load` and `picture`: each run in a process of its own, ours and theirs in turns."""
    saved_folder(options)
    command = [sys.executable, __file__, "--part", part, "--dtype", dtype, "--device", options.device, "--folder", str(options.folder)]
    command += ["--threads", str(options.threads), "--steps", str(options.steps)]
    flags = {"--small": options.small, "--compile": options.compile, "--reference-channels-last": options.reference_channels_last}
    command += [flag for flag, given in flags.items() if given]
    best, gigabytes = {}, {}
    for _ in range(1 if part == "picture" else options.rounds):
        for who in ("minisd", "diffusers"):
            out = subprocess.run([*command, "--child", who], capture_output=True, text=True)
            if out.returncode:
                raise SystemExit(out.stderr)
            result = json.loads(out.stdout.splitlines()[-1])
            best[who] = min(best.get(who, math.inf), result["seconds"])
            gigabytes[who] = max(gigabytes.get(who, 0.0), result["gigabytes"])
    difference = ""
    if part == "picture":
        difference = "   largest difference {:.1e}".format(agreement(*(torch.load(options.folder / f"{who}.pt") for who in best)))
    print(line(part, dtype, best, gigabytes) + difference, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["unet", "vae", "text_encoder", "load", "picture", "load, cold"]
    parser.add_argument("--part", choices=parts, action="append", help="(default: the first three; 'load' is measured cold and warm)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], action="append", help="(default: float32 and bfloat16)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of the picture (default: 20)")
    parser.add_argument("--compile", action="store_true", help="torch.compile for both")
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True, help="ours")
    parser.add_argument("--reference-channels-last", action="store_true", help="diffusers, too")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--folder", type=Path, help="for load and picture: where the model is written, and found again")
    parser.add_argument("--child", choices=["minisd", "diffusers"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        return child(options.child, options)
    name = torch.cuda.get_device_name() if options.device == "cuda" else processor_name()
    print(f"torch {torch.__version__}, {name}, {options.threads} threads", flush=True)
    temporary = None if options.folder else Path(tempfile.mkdtemp())
    options.folder = options.folder or temporary
    try:
        for part in options.part or ["unet", "vae", "text_encoder"]:
            for dtype in options.dtype or ["float32", "bfloat16"]:
                if part in ("load", "load, cold"):
                    compare_processes("load, cold", dtype, options)
                    compare_processes("load", dtype, options)
                elif part == "picture":
                    compare_processes(part, dtype, options)
                else:
                    compare(part, getattr(torch, dtype), options)
                    gc.collect()  # one pair of models at a time
    finally:
        if temporary:
            shutil.rmtree(temporary)


if __name__ == "__main__":
    main()
