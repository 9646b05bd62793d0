"""Put a trained model into the package as half-precision weights: python tools/ship.py RUN_FOLDER NAME.

Afterwards measure it (`python benchmarks/shipped.py NAME`) and write the numbers into minisd/pretrained/NAME/README.md.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from minisd.tokenizer import Tokenizer
from minisd.train import save_atomically
from minisd.weights import PRETRAINED, read_model


def ship(run: Path, name: str) -> Path:
    """Copy `run`'s weights, as float16, and its configuration into `minisd/pretrained/name`."""
    config, weights = read_model(run)
    halves = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in weights.items()}
    if not all(tensor.isfinite().all() for tensor in halves.values()):
        raise ValueError(f"{run}: a weight does not fit into float16.")
    folder = PRETRAINED / name
    save_atomically(lambda path: save_file(halves, path), folder / "model.safetensors")
    save_atomically(lambda path: path.write_text(json.dumps(config, indent=2) + "\n"), folder / "config.json")
    if (run / "merges.txt").is_file():  # a model that reads text has its tokenizer beside it
        Tokenizer.load(run).save(folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with torch.no_grad():
        target = ship(Path(sys.argv[1]), sys.argv[2])
    print(f"{(target / 'model.safetensors').stat().st_size / 1e6:.1f} MB in {target.relative_to(PRETRAINED.parent.parent)}")
