"""Decoding at the published size beside diffusers, same random weights: python benchmarks/vae.py [--side 512] [--tile 32] [--calls 2]

Seconds of the fastest call, and the most memory the process held above what it held before the call. Each line is a process of its own.
The last column is the largest difference to diffusers' whole picture in float32, as a share of its largest value.
"""

import argparse
import multiprocessing
import resource
import sys
import time

import torch

from minisd.utils import processor_name
from minisd.vae import AutoencoderKL

WAYS = ("minisd, whole", "minisd, tiles", "diffusers, whole", "diffusers, tiles")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def build(ours: bool) -> torch.nn.Module:
    """The autoencoder of SD 1 with random weights that are the same for both."""
    from diffusers import AutoencoderKL as Theirs

    config = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    torch.manual_seed(0)
    theirs = Theirs(**config, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=256)
    if not ours:
        return theirs.eval()
    with torch.device("meta"):
        model = AutoencoderKL(**config)
    model.load_state_dict(theirs.state_dict(), assign=True)
    return model.eval()


@torch.no_grad()
def measure(way: str, kind: str, side: int, tile: int, calls: int, threads: int, answer) -> None:
    """Put (seconds, bytes, a part of the picture) into the queue `answer`."""
    torch.set_num_threads(threads)
    ours, tiles = way.startswith("minisd"), way.endswith("tiles")
    model = build(ours).to(TYPES[kind]).to(memory_format=torch.channels_last)
    latents = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(1)).to(TYPES[kind])
    if ours:
        decode = lambda: model.decode(latents * model.config.scaling_factor, tile=tile if tiles else None)  # noqa: E731
    else:
        if tiles:
            model.enable_tiling()
            model.tile_sample_min_size, model.tile_latent_min_size = 8 * tile, tile
        decode = lambda: model.decode(latents).sample  # noqa: E731
    before, best = peak_bytes(), float("inf")
    for _ in range(calls):
        start = time.perf_counter()
        picture = decode()
        best = min(best, time.perf_counter() - start)
    answer.put((best, peak_bytes() - before, picture[..., ::4, ::4].float().numpy()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="of the picture, in pixels (default: 512)")
    parser.add_argument("--tile", type=int, default=32, help="side of a tile, in places of the latent (default: 32)")
    parser.add_argument("--calls", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--types", nargs="+", choices=list(TYPES), default=list(TYPES))
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {processor_name()}, {options.threads} threads")
    print(f"{options.side}x{options.side} pixels, tiles of {options.tile}x{options.tile} places")
    context, reference = multiprocessing.get_context("spawn"), None
    for kind in options.types:
        for way in sorted(WAYS, key=lambda way: way != "diffusers, whole"):
            answer = context.Queue()
            work = context.Process(target=measure, args=(way, kind, options.side, options.tile, options.calls, options.threads, answer))
            work.start()
            seconds, size, picture = answer.get()
            work.join()
            picture = torch.from_numpy(picture)
            reference = picture if reference is None else reference
            off = ((picture - reference).abs().max() / reference.abs().max()).item()
            print(f"{kind:9} {way:17} {seconds:7.2f} s {size / 1e6:7.0f} MB   {off:.1e}", flush=True)


if __name__ == "__main__":
    main()
