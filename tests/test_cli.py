"""The command line, as a user types it."""

import subprocess
import sys

import pytest
from PIL import Image

from minisd.cli import main


def test_generate_writes_a_grid(tmp_path, capsys):
    out = tmp_path / "grid.png"
    assert main(["generate", "--model", "ddpm", "-n", "4", "--steps", "2", "--seed", "1", "--out", str(out), "--scale", "2"]) == 0
    assert Image.open(out).size == (2 * (2 * 32 + 2), 2 * (2 * 32 + 2))
    assert "4 pictures in" in capsys.readouterr().out


def test_same_seed_same_file(tmp_path):
    for name in ("a", "b"):
        main(["generate", "-n", "2", "--steps", "2", "--seed", "5", "--out", str(tmp_path / f"{name}.png")])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_train_resume_and_generate(tmp_path, capsys):
    out = tmp_path / "run"
    train = ["train", "ddpm", "--steps", "4", "--pictures", "64", "--save-every", "2", "--out", str(out)]
    assert main(train) == 0
    assert main(train) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert main([*train, "--resume"]) == 0
    assert main(["generate", "--model", str(out), "-n", "1", "--steps", "1", "--out", str(tmp_path / "one.png")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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


@pytest.mark.parametrize("arguments", [["generate", "-n", "0"], ["generate", "-n", "x"], ["train", "gan", "--out", "x"], ["paint"], []])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "minisd" in capsys.readouterr().err


def test_module_runs_and_shows_its_help():
    result = subprocess.run([sys.executable, "-m", "minisd", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "generate" in result.stdout
