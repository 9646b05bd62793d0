"""Model folders: written whole, read strictly, and every kind of damage named."""

import json

import pytest
import torch
from torch import nn

from minisd.weights import load_into, read_model, save_model, shipped_models


def test_round_trip(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    save_model(tmp_path, model, {"width": 4})
    config, weights = read_model(tmp_path)
    assert config == {"width": 4}
    again = load_into(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), weights, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert not again.training


def test_half_precision_takes_half_the_space_and_comes_back_as_float32(tmp_path):
    model = nn.Linear(200, 200)
    full = (save_model(tmp_path / "full", model, {}) / "model.safetensors").stat().st_size
    half = (save_model(tmp_path / "half", model, {}, torch.float16) / "model.safetensors").stat().st_size
    assert half < 0.55 * full
    weights = read_model(tmp_path / "half")[1]
    assert weights["weight"].dtype == torch.float32
    assert torch.allclose(weights["weight"], model.weight, atol=1e-4)


def test_missing_folder_names_the_shipped_models(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'no-such-model'.*config\.json.*probe"):
        read_model("no-such-model")
    save_model(tmp_path, nn.Linear(2, 2), {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html></html>", "damaged or only half there"),
        (b"", "damaged or only half there"),
        (None, "damaged or only half there"),
    ],
)
def test_damaged_weights(tmp_path, content, message):
    path = save_model(tmp_path, nn.Linear(20, 20), {}) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=message):
        read_model(tmp_path)


def test_damaged_config(tmp_path):
    save_model(tmp_path, nn.Linear(2, 2), {})
    (tmp_path / "config.json").write_text('{"size": ')
    with pytest.raises(ValueError, match=r"config\.json is not readable as JSON"):
        read_model(tmp_path)


def test_weights_that_do_not_fit_are_named():
    weights = nn.Linear(2, 3).state_dict()
    with pytest.raises(ValueError, match=r"weight has shape \(3, 2\), expected \(4, 2\)"):
        load_into(nn.Linear(2, 4, bias=False), {"weight": weights["weight"]}, "x")
    with pytest.raises(ValueError, match=r"1 tensors are missing \(first: bias\)"):
        load_into(nn.Linear(2, 3), {"weight": weights["weight"]}, "x")
    with pytest.raises(ValueError, match=r"1 tensors are not known \(first: bias\)"):
        load_into(nn.Linear(2, 3, bias=False), weights, "x")


def test_shipped_weights_are_small_and_have_cards():
    from minisd.weights import PRETRAINED

    sizes = {name: (PRETRAINED / name / "model.safetensors").stat().st_size for name in shipped_models()}
    assert {"probe", "ddpm"} <= sizes.keys()
    assert sizes["text"] <= 9_000_000  # lesson 05's UNet and four spatial transformers
    assert max(size for name, size in sizes.items() if name != "text") <= 8_000_000
    assert sum(sizes.values()) <= 40_000_000
    for name in sizes:
        card = (PRETRAINED / name / "README.md").read_text()
        for word in ("Command", "Commit", "Steps", "Time", "Seed", "Measured"):
            assert word in card, f"the card of {name} does not say: {word}"
        assert json.loads((PRETRAINED / name / "config.json").read_text())
