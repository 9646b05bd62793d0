"""The verbs `info` and `convert` of the command line: files of published weights."""

import argparse


def run_info(options: argparse.Namespace) -> None:
    """`minisd info`: family, sizes, dtypes, and what is left out and why."""
    from minisd.checkpoints import open_checkpoint
    from minisd.folders import PLAIN_FIRST
    from minisd.loading import find_source

    print(open_checkpoint(find_source(options.path, PLAIN_FIRST), ema=options.ema).describe())


def run_convert(options: argparse.Namespace) -> None:
    """`minisd convert`: published weights in the other layout, or in another dtype."""
    import torch

    from minisd.conversion import convert

    dtype = getattr(torch, options.dtype) if options.dtype else None
    asked = {"prediction_type": options.prediction_type, "variant": options.variant, "ema": options.ema}
    checkpoint = convert(options.source, options.target, dtype, **asked)
    left = sum(len(names) for names in checkpoint.ignored.values())
    print(f"{checkpoint.family.name} in {options.target}" + (f"; {left} tensors were left out, see minisd info" if left else ""))
