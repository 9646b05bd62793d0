"""minisd: Stable Diffusion built from pure noise to the published weights. The notebooks in `lessons/` are its source.

`minisd.StableDiffusion.load("postcards")` is the whole of it, trained on postcards; with the path of published weights it is Stable
Diffusion 1.x, 2.x or XL. The parts: `minisd.data` loads pictures, `minisd.noise` adds noise to them, `minisd.unet` is the network that
removes it, `minisd.train` trains it, `minisd.samplers` draws with it, `minisd.clip` reads sentences, `minisd.vae` makes pictures small.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minisd.pipeline import StableDiffusion

__version__ = "0.1.0"
__all__ = ["StableDiffusion"]


def __getattr__(name: str) -> Any:
    """`minisd.StableDiffusion`, imported when it is first asked for: the parts can be used without the whole."""
    if name == "StableDiffusion":
        from minisd.pipeline import StableDiffusion

        return StableDiffusion
    raise AttributeError(f"module 'minisd' has no attribute {name!r}")
