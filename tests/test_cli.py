"""The command line, as a user types it."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from minisd.cli import main
from minisd.clip import load_clip
from minisd.postcards import KINDS


def test_generate_writes_a_grid(tmp_path, capsys):
    out = tmp_path / "grid.png"
    assert main(["generate", "--model", "ddpm", "-n", "4", "--steps", "2", "--seed", "1", "--out", str(out), "--scale", "2"]) == 0
    assert Image.open(out).size == (2 * (2 * 32 + 2), 2 * (2 * 32 + 2))
    assert "4 pictures in" in capsys.readouterr().out


def test_same_seed_same_file(tmp_path):
    for name in ("a", "b"):
        main(["generate", "-n", "2", "--steps", "2", "--seed", "5", "--out", str(tmp_path / f"{name}.png")])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("name", ["sampler", "steps", "spacing"])
def test_generate_has_the_defaults_of_sample(name, monkeypatch, tmp_path, capsys):
    """What the user leaves out is left to `sample`, and the help says what that is."""
    import minisd.samplers

    handed_on = {}

    def spy(denoiser, shape, **options):
        handed_on.update(options)
        return torch.zeros(shape)

    default = inspect.signature(minisd.samplers.sample).parameters[name].default
    monkeypatch.setattr(minisd.samplers, "sample", spy)
    out = ["-n", "1", "--out", str(tmp_path / "grid.png")]
    assert main(["generate", *out]) == 0
    assert name not in handed_on
    assert main(["generate", *out, f"--{name}", "7"]) == 0
    assert str(handed_on[name]) == "7"
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    helped = " ".join(capsys.readouterr().out.split()).split(f"--{name} {name.upper()}")[-1]
    assert helped.split("(default: ")[1].split(")")[0] == str(default)


def test_train_resume_and_generate(tmp_path, capsys):
    out = tmp_path / "run"
    train = ["train", "ddpm", "--steps", "4", "--pictures", "64", "--save-every", "2", "--out", str(out)]
    assert main(train) == 0
    assert main(train) == 1
    assert "already holds a run" in capsys.readouterr().err
    capsys.readouterr()
    assert main([*train, "--resume"]) == 0
    assert "nothing to resume" not in capsys.readouterr().out
    assert main([*train[:-1], str(tmp_path / "other"), "--resume"]) == 0
    assert f"nothing to resume in {tmp_path / 'other'} yet: starting at the first step" in capsys.readouterr().out
    assert main(["generate", "--model", str(out), "-n", "1", "--steps", "1", "--out", str(tmp_path / "one.png")]) == 0


def test_train_clip(tmp_path, capsys):
    assert main(["train", "clip", "--pictures", "5", "--steps", "1", "--out", str(tmp_path)]) == 0
    assert "training on 5 pictures with 4 captions each" in capsys.readouterr().out
    model, tokenizer = load_clip(tmp_path)
    assert model.encode_text(tokenizer(["a red boat"])).shape == (1, 128)


def test_asks_for_a_kind_with_any_sampler(tmp_path, capsys):
    out = tmp_path / "boats.png"
    ask = [
        "generate",
        "--model",
        "class",
        "--label",
        "boat",
        "--guidance",
        "3",
        "--sampler",
        "ddim",
        "--spacing",
        "leading",
        "--steps",
        "3",
    ]
    assert main([*ask, "-n", "4", "--scale", "1", "--out", str(out)]) == 0
    assert Image.open(out).size == (2 * 32 + 2, 2 * 32 + 2)
    first = out.read_bytes()
    for other in (["--negative", "house"], ["--guidance", "1"], ["--sampler", "heun"], ["--label", "tree"]):
        assert main([*ask, "-n", "4", "--scale", "1", "--out", str(out), *other]) == 0
        assert out.read_bytes() != first, other


def test_without_a_label_every_kind_in_turn(tmp_path):
    out = tmp_path / "kinds.png"
    assert main(["generate", "--model", "class", "-n", "16", "--steps", "2", "--scale", "1", "--out", str(out)]) == 0
    assert Image.open(out).size == (8 * 34 - 2, 2 * 34 - 2)  # a column for each of the eight kinds


def test_the_example_of_lesson_05(tmp_path):
    from minisd.metrics import read_attributes

    out = tmp_path / "boats.png"
    ask = ["generate", "--model", "class", "--label", "boat", "--guidance", "3", "--sampler", "dpmpp_2m", "--steps", "20"]
    assert main([*ask, "-n", "16", "--scale", "1", "--out", str(out)]) == 0
    grid = torch.from_numpy(np.asarray(Image.open(out)).copy()).permute(2, 0, 1) / 127.5 - 1  # (3, 134, 134)
    pictures = torch.stack([grid[:, 34 * r : 34 * r + 32, 34 * c : 34 * c + 32] for r in range(4) for c in range(4)])
    assert ((read_attributes(pictures)["kind"] == KINDS.index("boat")).sum(1) == 1).float().mean() > 0.8


def test_train_class_on_a_folder_and_generate(tmp_path, capsys):
    for name, colour in (("cats", "orange"), ("dogs", "brown")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 40), colour).save(tmp_path / "pets" / name / f"{i}.png")
    out = tmp_path / "run"
    train = ["train", "class", "--steps", "3", "--save-every", "2", "--data", str(tmp_path / "pets"), "--out", str(out)]
    assert main(train) == 0
    assert main([*train, "--resume"]) == 0
    grid = str(tmp_path / "grid.png")
    assert main(["generate", "--model", str(out), "--label", "dogs", "-n", "1", "--steps", "1", "--out", grid]) == 0
    capsys.readouterr()
    assert main(["generate", "--model", str(out), "--label", "boat", "-n", "1", "--steps", "1", "--out", grid]) == 1
    assert "knows cats, dogs" in capsys.readouterr().err
    assert main([*train[:-1], str(tmp_path / "other"), "--data", str(tmp_path / "pets" / "cats")]) == 1
    assert "has no classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "class", "--label", "ship"], "unknown label 'ship'; class knows house, tree, boat"),
        (["generate", "--model", "class", "--negative", "ship"], "unknown label 'ship'"),
        (["generate", "--model", "class", "--negative", "boat", "--guidance", "1"], "--negative needs guidance"),
        (["generate", "--model", "ddpm", "--guidance", "3"], "--guidance needs a model with classes, such as 'class'; ddpm has none"),
        (["generate", "--model", "ddpm", "--label", "boat"], "--label needs a model with classes"),
        (["generate", "--sampler", "lms"], "Unknown sampler 'lms'; known are ddpm, ddim"),
        (["generate", "--spacing", "even"], "Unknown spacing 'even'; known are leading"),
        (["generate", "--model", "nowhere"], "no model in 'nowhere'"),
        (["generate", "--model", "probe"], "holds no diffusion model"),
        (["generate", "--out", "picture.txt"], "must end in .png"),
        (["generate", "--out", "no/such/folder/grid.png"], "does not exist"),
        (["generate", "--steps", "2000"], "between 1 and the schedule's 1000"),
    ],
)
def test_mistakes_end_with_one_sentence(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "arguments",
    [["generate", "-n", "0"], ["generate", "-n", "x"], ["generate", "--guidance", "nan"], ["train", "gan", "--out", "x"], ["paint"], []],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "minisd" in capsys.readouterr().err


def test_module_runs_and_shows_its_help():
    result = subprocess.run([sys.executable, "-m", "minisd", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "generate" in result.stdout


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """A text model, its CLIP and the class model that it began with, all hardly trained, by the command line."""
    from minisd.guidance import CLASS_CONFIG, build_class_model
    from minisd.text_to_image import load_pairs, train_text
    from minisd.weights import save_model

    folder = tmp_path_factory.mktemp("text")
    assert main(["train", "clip", "--steps", "1", "--pictures", "200", "--out", str(folder / "clip")]) == 0
    save_model(folder / "class", build_class_model(CLASS_CONFIG), CLASS_CONFIG)
    train_text(*load_pairs(4), 1, folder / "run", start=folder / "class", text_encoder=folder / "clip", progress=False)
    return folder


def test_draws_a_sentence(text_folder, tmp_path, capsys):
    out = tmp_path / "boats.png"
    ask = [
        "generate",
        "a red boat at night",
        "--model",
        str(text_folder / "run"),
        "-n",
        "4",
        "--steps",
        "2",
        "--scale",
        "1",
        "--out",
        str(out),
    ]
    assert main(ask) == 0
    assert Image.open(out).size == (2 * 32 + 2, 2 * 32 + 2)
    assert main([*ask, "--guidance", "1"]) == 0
    assert main([*ask, "--negative", "a house"]) == 0
    assert main([*ask, "--negative", "a house", "--guidance", "1"]) == 1
    assert "--negative needs guidance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], 'say one: minisd generate "a red boat at night"'),
        (["a boat", "--label", "boat"], "--label needs a model with classes"),
        (["a boat", "--model", "ddpm"], "ddpm takes no sentence; a model that does is 'text'."),
        (["a boat", "--model", "class"], "class takes no sentence; a model that does is 'text'."),
    ],
)
def test_mistakes_with_sentences(text_folder, changes, message, capsys):
    assert main(["generate", "--model", str(text_folder / "run"), "-n", "1", *changes]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_trains_text_on_captions_of_ones_own(text_folder, tmp_path, capsys, monkeypatch):
    import minisd.text_to_image

    handed_on = {}

    def spy(images, texts, **options):
        handed_on.update(options, images=images, texts=texts)
        raise ValueError("seen")

    monkeypatch.setattr(minisd.text_to_image, "train_text", spy)
    pets = tmp_path / "pets"
    pets.mkdir()
    for name in ("cat", "dog"):
        Image.new("RGB", (40, 40), "orange").save(pets / f"{name}.png")
    train = ["train", "text", "--steps", "1", "--data", str(pets), "--out", str(tmp_path / "run")]
    assert main(train) == 1
    assert "has no captions" in capsys.readouterr().err
    lines = [f'{{"file_name": "{name}.png", "caption": "a {name}"}}\n' for name in ("cat", "dog")]
    (pets / "metadata.jsonl").write_text("".join(lines))
    assert main([*train, "--text-encoder", "there"]) == 1
    assert sorted(handed_on["texts"]) == [("a cat",), ("a dog",)] and handed_on["images"].shape == (2, 3, 32, 32)
    assert handed_on["text_encoder"] == "there" and handed_on["steps"] == 1
    assert main(["train", "clip", "--text-encoder", "there", "--out", str(tmp_path / "run")]) == 1
    assert "--text-encoder belongs to the models text and postcards" in capsys.readouterr().err
