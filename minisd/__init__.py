"""minisd: Stable Diffusion built from pure noise to the published weights. The notebooks in `lessons/` are its source.

`minisd.data` loads pictures, `minisd.noise` adds noise to them, `minisd.unet` is the network that removes it, `minisd.train` and
`minisd.ddpm` train it and sample from it, `minisd.metrics` says how good the samples are.
"""

__version__ = "0.1.0"
