"""The loss, the denoiser and the sampler of lesson 03."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from minisd.ddpm import Denoiser, Folded, diffusion_loss, load_ddpm, sample_ddpm, train_ddpm, weigh_as_v
from minisd.noise import SCHEDULES, NoiseSchedule


class Toy(nn.Module):
    """A network stand-in that uses its input and its timestep."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, timesteps):
        return torch.tanh(self.weight * x + timesteps.view(-1, 1, 1, 1) / 1000)


class Knows(nn.Module):
    """Answers perfectly for data that is one constant picture: the sampler must end there."""

    def __init__(self, x0, schedule):
        super().__init__()
        self.x0 = nn.Parameter(x0)
        self.schedule = schedule

    def forward(self, x, timesteps):
        return self.schedule.predict_noise(x, self.x0.expand_as(x), timesteps, "sample")


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_denoiser_gives_picture_and_noise_whatever_the_model_predicts(prediction_type):
    schedule = NoiseSchedule("linear")
    denoiser = Denoiser(Toy(), schedule, prediction_type, dtype=torch.float32)
    x_t = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x0, noise = denoiser(x_t, 400)
    assert torch.allclose(schedule.add_noise(x0, noise, 400), x_t, atol=1e-5)
    assert not torch.allclose(x0, noise)


def test_clipped_denoiser_stays_in_range_and_consistent():
    schedule = NoiseSchedule("linear")
    denoiser = Denoiser(Toy(), schedule, "epsilon", clip=1.0, dtype=torch.float32)
    x_t = 3 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x0, noise = denoiser(x_t, 600)
    assert x0.abs().max() == 1
    assert torch.allclose(schedule.add_noise(x0, noise, 600), x_t, atol=1e-5)


@pytest.mark.parametrize("schedule_name", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_steps_equal_the_reference_scheduler(schedule_name, prediction_type):
    """Every step from noise to picture against diffusers' DDPMScheduler, given the same network and the same noise."""
    schedule = NoiseSchedule(schedule_name)
    options = {"linear": {}, "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012}, "cosine": {}}[schedule_name]
    reference = DDPMScheduler(
        beta_schedule={"cosine": "squaredcos_cap_v2"}.get(schedule_name, schedule_name),
        prediction_type=prediction_type,
        clip_sample=True,
        variance_type="fixed_small",
        **options,
    )
    # The reference keeps its tables in float32, where 1 - alphas_cumprod loses its digits at small t. It gets the same numbers in float64.
    assert torch.allclose(reference.betas, schedule.betas, atol=1e-6)
    reference.betas = SCHEDULES[schedule_name](1000)
    reference.alphas = 1 - reference.betas
    reference.alphas_cumprod = reference.alphas.cumprod(0)
    model = Toy()
    seen = []
    ours = sample_ddpm(
        Denoiser(model, schedule, prediction_type, clip=1.0, dtype=torch.float32),
        (2, 3, 8, 8),
        seed=7,
        progress=False,
        callback=lambda t, x_t, x0: seen.append((t, x_t)),
    )
    assert [t for t, _ in seen] == list(range(999, -1, -1))
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    with torch.no_grad():
        for t, x_t in seen:
            assert torch.allclose(x, x_t, atol=1e-4), f"apart at t = {t}"
            output = model(x, torch.full((2,), t))
            x = reference.step(output, t, x, generator=generator).prev_sample.float()
    assert torch.allclose(x, ours, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_perfect_network_leads_to_the_data(steps):
    schedule = NoiseSchedule("cosine")
    x0 = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    # the dtype of the model's answer is float32; clip only tidies rounding where almost nothing of the signal is left
    sample = sample_ddpm(Denoiser(Knows(x0, schedule), schedule, "epsilon", dtype=torch.float32), (5, 3, 8, 8), steps=steps, progress=False)
    assert torch.allclose(sample, x0.expand(5, -1, -1, -1), atol=0.02)


def test_same_seed_same_picture_other_seed_other_picture():
    denoiser = Denoiser(Toy(), NoiseSchedule("linear"), clip=1.0)
    a, b, c = (sample_ddpm(denoiser, (2, 3, 8, 8), steps=10, seed=seed, progress=False) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_bad_number_of_steps(steps):
    with pytest.raises(ValueError, match=f"between 1 and the schedule's 1000, got {steps}"):
        sample_ddpm(Denoiser(Toy(), NoiseSchedule("linear")), (1, 3, 8, 8), steps=steps)


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="'noise'.*epsilon"):
        Denoiser(Toy(), NoiseSchedule("linear"), "noise")


def test_loss_of_a_perfect_and_of_a_silent_network():
    schedule = NoiseSchedule("linear")
    images = torch.rand(16, 3, 8, 8) * 2 - 1

    class Silent(Toy):
        def forward(self, x, timesteps):
            return 0 * self.weight * x

    generator = torch.Generator().manual_seed(0)
    assert diffusion_loss(schedule)(Silent(), images, generator).item() == pytest.approx(1.0, abs=0.1)  # the variance of the noise itself
    x0 = images[:1]
    perfect = diffusion_loss(schedule)(Knows(x0, schedule), x0.expand(16, -1, -1, -1), torch.Generator().manual_seed(0))
    assert perfect.item() < 1e-5


@pytest.mark.parametrize("fold", [1, 2, 4])
def test_folding_only_moves_numbers(fold):
    seen = []

    class Echo(nn.Module):
        def forward(self, x, timesteps, **conditions):
            seen.append((x, conditions))
            return x

    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(Folded(Echo(), fold)(x, torch.tensor([1, 2]), labels=5), x)
    folded, conditions = seen[0]
    assert folded.shape == (2, 3 * fold**2, 8 // fold, 8 // fold) and conditions == {"labels": 5}
    for row, column in ((0, 0), (1, 0), (8 // fold - 1, 8 // fold - 1)):  # a place holds the pixels of its square, and no others
        square = x[:, :, row * fold : (row + 1) * fold, column * fold : (column + 1) * fold]
        assert torch.equal(folded[:, :, row, column], square.flatten(1))


def test_trained_model_comes_back_from_its_folder(tmp_path):
    images = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    trained = train_ddpm(images, steps=2, out=tmp_path, progress=False)
    denoiser = load_ddpm(tmp_path, device="cpu")
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor.cpu(), denoiser.model.state_dict()[name]), name
    assert denoiser.size == 32


def test_shipped_model_draws_postcards():
    """Measured again on a fresh seed: the probe finds exactly one thing in most samples, and all kinds and grounds appear."""
    from minisd.metrics import read_attributes

    samples = sample_ddpm(load_ddpm(device="cpu"), (64, 3, 32, 32), steps=50, seed=20_261, progress=False)
    assert samples.shape == (64, 3, 32, 32)
    assert samples.abs().max() <= 1
    seen = read_attributes(samples)
    things = (seen["kind"] >= 0).sum(1)
    assert (things == 1).float().mean() > 0.85
    assert len(seen["kind"].max(1).values.unique()) >= 7
    assert len(seen["ground"].unique()) == 4


def test_weighed_error_of_x0_is_the_error_of_v():
    """Where the limit is not reached: a model that answers x0, and the one that says the same in v, have the same loss."""
    schedule = NoiseSchedule("cosine")
    images = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noisy_end = lambda count, total, generator: torch.randint(400, total, (count,), generator=generator)  # noqa: E731

    class Half(torch.nn.Module):
        """Believes that x0 is half of what it sees."""

        def __init__(self, as_v):
            super().__init__()
            self.as_v, self.unused = as_v, torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, timesteps):
            signal, noise = schedule.scales(timesteps, x)
            return (signal * x - x / 2) / noise if self.as_v else x / 2

    as_x0 = diffusion_loss(schedule, "sample", noisy_end, weigh_as_v)(Half(False), images, torch.Generator().manual_seed(1))
    as_v = diffusion_loss(schedule, "v_prediction", noisy_end)(Half(True), images, torch.Generator().manual_seed(1))
    assert abs(as_x0.item() - as_v.item()) < 1e-4 * as_v.item()
    assert weigh_as_v(schedule, torch.tensor([0])).item() == 5.0
