"""`minisd generate --image in.png --strength 0.6` and `--mask`; `minisd train inpainting` and the other variants that are kept."""

import argparse

import numpy as np
import PIL.Image
import pytest

from minisd.cli import main
from minisd.cli_picture import add_picture_flags, check_picture_flags, draw_from_picture, open_picture
from minisd.pipeline import StableDiffusion
from minisd.plots import to_pil
from minisd.weights import load_into, read_model
from tests.test_applications import a_mask, a_picture, pixels, tiny_pipe


def options_for(*flags):
    parser = argparse.ArgumentParser()
    add_picture_flags(parser)
    return argparse.Namespace(
        **vars(parser.parse_args([str(flag) for flag in flags])), prompt="a boat", n=None, seed=0, size=None, model="m"
    )


def test_a_picture_is_drawn_anew_or_painted_into(tmp_path):
    pipe = tiny_pipe()
    a_picture().save(tmp_path / "in.png")
    PIL.Image.fromarray((255 * a_mask()).byte().numpy()).save(tmp_path / "mask.png")
    anew = draw_from_picture(pipe, options_for("--image", tmp_path / "in.png", "--strength", 0.5), steps=2, progress=False)
    assert anew.shape == (1, 3, 16, 16)
    painted = draw_from_picture(pipe, options_for("--image", tmp_path / "in.png", "--mask", tmp_path / "mask.png"), steps=2, progress=False)
    before, after = np.array(a_picture()), pixels(to_pil(painted))[0].numpy()
    assert (before[:, :8] == after[:, :8]).all() and (before[:, 8:] != after[:, 8:]).any()


@pytest.mark.parametrize("strength", ["1.2", "-0.1", "much", "nan"])
def test_a_strength_that_is_no_share_is_refused(strength, capsys):
    with pytest.raises(SystemExit):
        options_for("--strength", strength)
    assert "is not a number from 0 to 1" in capsys.readouterr().err


def test_flags_that_do_not_go_together():
    with pytest.raises(ValueError, match="--mask needs a picture: --image FILE"):
        check_picture_flags(options_for("--mask", "m.png"), latent=True)
    with pytest.raises(ValueError, match="--image belongs to latent models; m draws in pixels"):
        check_picture_flags(options_for("--image", "i.png"), latent=False)
    sized = options_for("--image", "i.png")
    sized.size = [64]
    with pytest.raises(ValueError, match="--size does not go with --image"):
        check_picture_flags(sized, latent=True)
    check_picture_flags(options_for(), latent=False)


def test_files_that_are_no_pictures(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no picture"):
        open_picture(tmp_path / "no.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match="is no picture that can be opened"):
        open_picture(tmp_path / "text.png")


def test_a_model_and_its_flags(tmp_path):
    a_picture().save(tmp_path / "in.png")
    with pytest.raises(ValueError, match="m paints into a picture; say where: --mask FILE"):
        draw_from_picture(tiny_pipe(9), options_for("--image", tmp_path / "in.png"))
    with pytest.raises(ValueError, match="--strength belongs to models that draw a picture anew or paint into it; m does neither"):
        draw_from_picture(tiny_pipe(17), options_for("--image", tmp_path / "in.png", "--strength", 0.5))
    with pytest.raises(ValueError, match="7 input channels and was not trained for enlarging"):
        draw_from_picture(tiny_pipe(7), options_for("--image", tmp_path / "in.png"))


# From the command to the picture


@pytest.fixture(scope="module")
def postcard(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "in.png"
    a_picture(size=(64, 64)).save(path)
    PIL.Image.fromarray((255 * a_mask((64, 64))).byte().numpy()).save(path.with_name("mask.png"))
    return path


def test_generate_with_a_picture_and_a_mask(postcard, tmp_path, capsys):
    ask = ["generate", "a red boat at night", "--image", str(postcard), "--steps", "2", "--out", str(tmp_path / "out.png")]
    assert main(ask) == 0
    assert PIL.Image.open(tmp_path / "out.png").size == (64, 64)  # not enlarged
    assert main([*ask, "--mask", str(postcard.with_name("mask.png"))]) == 0
    before, after = (np.array(PIL.Image.open(path)) for path in (postcard, tmp_path / "out.png"))
    assert (before[:, :32] == after[:, :32]).all() and (before[:, 32:] != after[:, 32:]).any()  # to the bit, in the file too
    assert main([*ask, "--size", "64"]) == 1 and "--size does not go with --image" in capsys.readouterr().err
    assert main([*ask, "--image", "nowhere.png"]) == 1 and "there is no picture 'nowhere.png'" in capsys.readouterr().err
    assert main(["generate", "--image", str(postcard), "--out", str(tmp_path / "x.png")]) == 1
    assert "--image belongs to latent models; ddpm draws in pixels" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "channels"), [("inpainting", 9), ("super-resolution", 17), ("segmentation", 48)])
def test_a_variant_is_trained_kept_and_opened_again(name, channels, postcard, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MINISD_FAST", "1")
    out = tmp_path / "run"
    assert main(["train", name, "--steps", "1", "--pictures", "7", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "training on 7 pictures" in said and "1 steps" in said
    pipe = StableDiffusion.load(out, device="cpu")
    assert pipe.unet.config.in_channels == channels and name in pipe.checkpoint.describe()
    ask = ["generate", "a red boat", "--model", str(out), "--steps", "1", "--out", str(tmp_path / "out.png")]
    assert main(ask) == 1 and f"takes {channels} channels: it must see more than latents" in capsys.readouterr().err
    if name == "super-resolution":
        assert main([*ask, "--image", str(postcard)]) == 0
        assert PIL.Image.open(tmp_path / "out.png").size == (256, 256)
    assert main(["train", name, "--steps", "1", "--pictures", "7", "--out", str(out)]) == 1
    assert "holds a finished model" in capsys.readouterr().err


def test_mistakes_with_variants(tmp_path, capsys):
    assert main(["train", "inpainting", "--data", "elsewhere", "--out", str(tmp_path / "x")]) == 1
    assert "inpainting is trained on postcards only, not on elsewhere" in capsys.readouterr().err
    (tmp_path / "half" / "training").mkdir(parents=True)
    assert main(["train", "inpainting", "--out", str(tmp_path / "half")]) == 1
    assert "already holds a run: resume it (--resume)" in capsys.readouterr().err
    assert main(["train", "probe", "--start", "postcards", "--out", str(tmp_path / "x")]) == 1
    assert "--start also to inpainting, super-resolution, segmentation" in capsys.readouterr().err


def test_train_segmenter(tmp_path, capsys):
    from minisd.segmenter import Segmenter

    assert main(["train", "segmenter", "--steps", "2", "--out", str(tmp_path)]) == 0
    assert "2 steps" in capsys.readouterr().out
    config, weights = read_model(tmp_path)
    assert config["model"] == "segmenter" and load_into(Segmenter(), weights, tmp_path)
