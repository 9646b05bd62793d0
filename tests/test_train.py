"""The training loop: learning, averaging, saving and resuming."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from minisd.train import (
    EMA,
    Muon,
    learning_rate_factor,
    load_checkpoint,
    make_optimizers,
    orthogonalize,
    pick_batch,
    save_atomically,
    train,
)


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Dropout(0.1), nn.Linear(16, 1))


def loss_fn(model, batch, generator):
    noisy = batch + 0.1 * torch.randn(batch.shape, generator=generator)
    return ((model(noisy)[:, 0] - batch.prod(1)) ** 2).mean()


DATA = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
QUIET = dict(batch_size=32, lr=1e-2, progress=False, device="cpu", dtype=torch.float32)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_loss_falls(optimizer):
    trained = train(make_model(), loss_fn, DATA, steps=300, optimizer=optimizer, **QUIET)
    assert len(trained.losses) == 300
    assert sum(trained.losses[-30:]) < 0.3 * sum(trained.losses[:30])


def test_same_seed_same_weights_other_seed_other_weights():
    one, two = (train(make_model(), loss_fn, DATA, steps=20, seed=3, **QUIET).model for _ in range(2))
    other = train(make_model(), loss_fn, DATA, steps=20, seed=4, **QUIET).model
    assert same_weights(one, two)
    assert not same_weights(one, other)


def test_callers_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = nn.Linear(2, 1)
    torch.manual_seed(5)
    train(model, loss_fn, DATA, steps=3, **QUIET)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_equals_unbroken_run_bit_for_bit(tmp_path, optimizer):
    unbroken = train(make_model(), loss_fn, DATA, steps=60, save_every=20, out=tmp_path / "a", optimizer=optimizer, **QUIET)

    def stops_at_45(model, batch, generator, count=iter(range(1000))):
        if next(count) == 45:
            raise KeyboardInterrupt
        return loss_fn(model, batch, generator)

    with pytest.raises(KeyboardInterrupt):
        train(make_model(), stops_at_45, DATA, steps=60, save_every=20, out=tmp_path / "b", optimizer=optimizer, **QUIET)
    assert load_checkpoint(tmp_path / "b" / "checkpoint.pt")["step"] == 40
    resumed = train(
        make_model(seed=99), loss_fn, DATA, steps=60, save_every=20, out=tmp_path / "b", resume=True, optimizer=optimizer, **QUIET
    )
    assert same_weights(unbroken.model, resumed.model)
    assert unbroken.losses == resumed.losses


KILLED_RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_train import *
def slow(model, batch, generator):
    time.sleep(0.005)
    return loss_fn(model, batch, generator)
train(make_model(), slow, DATA, steps=200, save_every=3, out=Path(sys.argv[2]), resume=True, **QUIET)
print("finished")
"""


def test_killed_at_any_moment_resumes_to_the_same_weights(tmp_path):
    """SIGKILL, again and again at odd moments, often in the middle of a save; the folder is always whole and the end is the same."""
    command = [sys.executable, "-c", KILLED_RUN, os.path.dirname(__file__), str(tmp_path / "run")]
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    kills = 0
    for pause in (0.13, 0.31, 0.07, 0.21):
        before = load_checkpoint(checkpoint)["step"] if checkpoint.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        deadline = time.time() + 60
        while time.time() < deadline and not (checkpoint.exists() and load_checkpoint(checkpoint)["step"] > before):
            time.sleep(0.01)
        time.sleep(pause)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2, "the run was over before it could be killed: the test proves nothing"
    assert subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.strip() == "finished"
    unbroken = train(make_model(), loss_fn, DATA, steps=200, **QUIET)
    ended = load_checkpoint(checkpoint)
    assert ended["step"] == 200
    assert all(torch.equal(tensor, unbroken.model.state_dict()[name]) for name, tensor in ended["ema"].items())
    assert ended["losses"] == unbroken.losses


def test_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    def explodes(model, batch, generator, count=iter(range(100))):
        return loss_fn(model, batch, generator) * (float("nan") if next(count) == 25 else 1)

    with pytest.raises(FloatingPointError, match="loss is not finite at step 25.*checkpoint.pt"):
        train(make_model(), explodes, DATA, steps=60, save_every=10, out=tmp_path, **QUIET)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    assert checkpoint["step"] == 20
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())


def test_gradient_that_is_not_finite_stops_before_the_weights_are_touched():
    def bad_gradient(model, batch, generator):
        return loss_fn(model, batch, generator) + (model[0].weight * 0).sum().sqrt()  # the slope of a root at 0 is infinite

    with pytest.raises(FloatingPointError, match="gradient is not finite at step 0"):
        train(make_model(), bad_gradient, DATA, steps=5, **QUIET)


def test_run_is_never_overwritten_or_mixed(tmp_path):
    train(make_model(), loss_fn, DATA, steps=4, out=tmp_path, **QUIET)
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(make_model(), loss_fn, DATA, steps=4, out=tmp_path, **QUIET)
    with pytest.raises(ValueError, match=r"steps=4 \(now 8\)"):
        train(make_model(), loss_fn, DATA, steps=8, out=tmp_path, resume=True, **QUIET)


@pytest.mark.parametrize("damage", ["half", "empty", "other"])
def test_damaged_checkpoint_is_named_and_left_alone(tmp_path, damage):
    train(make_model(), loss_fn, DATA, steps=4, out=tmp_path, **QUIET)
    path = tmp_path / "checkpoint.pt"
    content = {"half": path.read_bytes()[: path.stat().st_size // 2], "empty": b"", "other": b"<html>not found</html>"}[damage]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint.pt is not a checkpoint of minisd's train, or is damaged"):
        train(make_model(), loss_fn, DATA, steps=4, out=tmp_path, resume=True, **QUIET)
    assert path.read_bytes() == content


def test_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def full_disk(temporary):
        temporary.write_text("ne")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save_atomically(full_disk, path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_every_epoch_shows_every_row_once():
    data = (torch.arange(10), torch.arange(10) * 2)
    rows = torch.cat([pick_batch(data, step, 4, seed=0)[0] for step in range(5)])  # 20 rows: two epochs, one batch lies across both
    assert rows[:10].sort().values.tolist() == rows[10:].sort().values.tolist() == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()
    first, second = pick_batch(data, 3, 4, seed=0)
    assert torch.equal(second, first * 2)


def test_learning_rate_rises_stays_and_falls():
    factors = [learning_rate_factor(step, steps=900, warmup=100, cooldown=1 / 3) for step in range(900)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[99] == factors[599] == 1
    assert factors[750] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.01


def test_ema_follows_its_definition():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema = EMA(model, decay=0.5)
    model.weight.data.fill_(0.0)
    ema.update(model, step=1000)
    assert ema.weights["weight"].item() == pytest.approx(0.5)
    ema.update(model, step=0)  # early: decay is 1/10
    assert ema.weights["weight"].item() == pytest.approx(0.05)


def test_callback_sees_averaged_weights_and_training_goes_on_unharmed():
    seen = []
    plain = train(make_model(), loss_fn, DATA, steps=30, **QUIET)
    watched = train(
        make_model(), loss_fn, DATA, steps=30, callback=lambda step, model: seen.append((step, model.training)), callback_every=10, **QUIET
    )
    assert seen == [(10, False), (20, False), (30, False)]
    assert same_weights(plain.model, watched.model)


def test_data_may_be_several_tensors_or_a_function():
    def pair_loss(model, batch, generator):
        assert isinstance(batch, tuple) and len(batch) == 2
        return ((model(batch[0])[:, 0] - batch[1]) ** 2).mean()

    train(make_model(), pair_loss, (DATA, DATA.prod(1)), steps=3, **QUIET)
    fresh = train(make_model(), loss_fn, lambda step, generator: torch.randn(32, 2, generator=generator), steps=300, **QUIET)
    assert sum(fresh.losses[-30:]) < 0.5 * sum(fresh.losses[:30])


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (DATA, {"steps": 0}, "steps and batch_size must be at least 1"),
        (torch.zeros(0, 2), {"steps": 1}, "non-zero length"),
        ((DATA, DATA[:5]), {"steps": 1}, r"lengths \[300, 5\]"),
    ],
)
def test_bad_input(data, options, message):
    with pytest.raises(ValueError, match=message):
        train(make_model(), loss_fn, data, **(QUIET | options))


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (12, 12)])
def test_orthogonalize_keeps_the_directions_and_makes_them_equally_long(shape):
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    even = orthogonalize(matrices)
    assert even.shape == matrices.shape
    left, lengths, right = torch.linalg.svd(matrices, full_matrices=False)
    long_enough = (lengths / lengths.norm(dim=-1, keepdim=True)) > 0.02
    found = left.mT @ even @ right.mT  # diagonal, where the directions are the same
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    assert (found - torch.diag_embed(diagonal)).abs().max() < 1e-3
    assert diagonal[long_enough].min() > 0.6 and diagonal.max() < 1.25


def test_orthogonalize_equals_the_plain_iteration():
    x = torch.randn(8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = orthogonalize(x)
    x = x / x.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    assert (ours - x).abs().max() < 1e-6


def test_muon_takes_matrices_and_adamw_the_rest():
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "conv": nn.Conv2d(4, 6, 3), "norm": nn.LayerNorm(6), "linear": nn.Linear(6, 2)})
    model["large"] = nn.Linear(300, 257, bias=False)  # too large on both sides
    muon, adamw = make_optimizers(model, "muon", 1e-3, 0.0)
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    of = lambda optimizer: {id(p) for group in optimizer.param_groups for p in group["params"]}  # noqa: E731
    assert of(muon) == {id(model["conv"].weight), id(model["linear"].weight)}
    assert of(muon) | of(adamw) == {id(p) for p in model.parameters()} and not of(muon) & of(adamw)
    (alone,) = make_optimizers(model, "adamw", 1e-3, 0.0)
    assert of(alone) == {id(p) for p in model.parameters()}
    with pytest.raises(ValueError, match="unknown optimizer 'sgd'; known: adamw, muon"):
        make_optimizers(model, "sgd", 1e-3, 0.0)


def test_a_step_of_muon_is_as_long_as_said():
    weight = nn.Parameter(torch.zeros(8, 4, 3, 3))
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=0.01).step()
    lengths = torch.linalg.svdvals(weight.detach().flatten(1)) / (0.01 * 0.2 * 36**0.5)
    assert 0.6 < lengths.min() and lengths.max() < 1.25
