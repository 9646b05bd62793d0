"""The command line for latent models: `train postcards`, and `generate` with the whole of it."""

import shutil

import pytest
import torch
from PIL import Image

import minisd.latent_diffusion
from minisd.cli import main
from minisd.pipeline import StableDiffusion
from minisd.weights import shipped_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All parts trained for a step or two, with the command."""
    out = tmp_path_factory.mktemp("runs") / "postcards"
    patch = pytest.MonkeyPatch()
    patch.setattr(minisd.latent_diffusion, "POSTCARDS_STEPS", {"vae": 1, "clip": 1, "unet": 2})
    patch.setenv("MINISD_FAST", "1")
    try:
        assert main(["train", "postcards", "--steps", "2", "--pictures", "131", "--count", "4", "--out", str(out)]) == 0
    finally:
        patch.undo()
    return out


def test_trains_all_parts_and_measures(folder, capsys):
    assert {path.name for path in folder.iterdir()} >= {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "training"}
    pipe = StableDiffusion.load(folder, device="cpu")
    assert pipe.guidance == 2.0 and pipe.unet.config.sample_size == 8
    assert main(["train", "postcards", "--steps", "2", "--out", str(folder)]) == 1
    assert "holds a finished model" in capsys.readouterr().err


def test_the_unet_finds_its_autoencoder_wherever_the_run_lies(folder, tmp_path, monkeypatch):
    moved = shutil.copytree(folder / "training", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    ours, theirs = (StableDiffusion.load(each, device="cpu") for each in (moved / "unet", folder))
    assert torch.equal(ours.vae.quant_conv.weight, theirs.vae.quant_conv.weight)
    shutil.rmtree(moved / "vae")
    with pytest.raises(FileNotFoundError, match="no model in"):
        StableDiffusion.load(moved / "unet", device="cpu")


def test_generates_with_a_folder(folder, tmp_path, capsys):
    ask = ["generate", "a red boat", "--model", str(folder), "--steps", "2"]
    assert main([*ask, "--out", str(tmp_path / "one.png")]) == 0
    assert "1 picture in" in capsys.readouterr().out
    assert Image.open(tmp_path / "one.png").size == (256, 256)  # 64 pixels, each enlarged four times
    assert main([*ask, "-n", "4", "--scale", "1", "--size", "64", "128", "--negative", "snow", "--out", str(tmp_path / "four.png")]) == 0
    assert Image.open(tmp_path / "four.png").size == (2 * 128 + 2, 2 * 64 + 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--label", "boat"], "--label belongs to models of pixels"),
        (["--spacing", "karras"], "--spacing belongs to models of pixels"),
        (["--size", "60"], "in multiples of 16 pixels, got 60"),
        (["--size", "64", "64", "64"], "--size takes a side, or height and width; got 3 numbers"),
        (["--sampler", "plms"], "Unknown sampler 'plms'"),
        (["--guidance", "1", "--negative", "snow"], "a negative prompt needs guidance other than 1"),
    ],
)
def test_mistakes_end_with_one_sentence(folder, changes, message, capsys, tmp_path):
    assert main(["generate", "a red boat", "--model", str(folder), "--out", str(tmp_path / "x.png"), *changes]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_prompt_is_needed_and_parts_must_be_named_where_they_belong(folder, capsys, tmp_path):
    assert main(["generate", "--model", str(folder), "--out", str(tmp_path / "x.png")]) == 1
    assert "draws what a sentence says; say one" in capsys.readouterr().err
    assert main(["train", "vae", "--vae", "vae", "--out", str(tmp_path / "x")]) == 1
    assert "--vae belongs to the model postcards" in capsys.readouterr().err
    assert main(["train", "postcards", "--data", "elsewhere", "--out", str(tmp_path / "x")]) == 1
    assert "postcards trains on postcards" in capsys.readouterr().err
    assert main(["generate", "--size", "64", "--out", str(tmp_path / "x.png")]) == 1
    assert "--size belongs to latent models" in capsys.readouterr().err


@pytest.mark.skipif("postcards" not in shipped_models(), reason="not shipped")
def test_a_prompt_alone_asks_the_shipped_model(tmp_path, capsys):
    assert main(["generate", "a red house on snow at night", "--steps", "2", "--out", str(tmp_path / "x.png")]) == 0
    assert Image.open(tmp_path / "x.png").size == (256, 256)
