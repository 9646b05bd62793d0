"""Draw the README's picture: python tools/poster.py."""

from pathlib import Path

from minisd.drawing import render
from minisd.plots import make_grid
from minisd.postcards import sample_scenes

if __name__ == "__main__":
    target = Path(__file__).resolve().parent.parent / "assets" / "postcards.png"
    target.parent.mkdir(exist_ok=True)
    poster = make_grid(render(sample_scenes(21, seed=194), 128), columns=7, gap=6)
    poster.quantize(256).save(target, optimize=True)
    print(f"{target.name}: {poster.width} x {poster.height} pixels, {target.stat().st_size / 1000:.0f} kB")
