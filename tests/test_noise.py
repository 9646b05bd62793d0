"""NoiseSchedule: parity with diffusers and the published tables, round trips, shapes, devices and dtypes, bad input."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from minisd.noise import PREDICTION_TYPES, SCHEDULES, NoiseSchedule

THEIR_SETTINGS = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}
each_schedule = pytest.mark.parametrize("name", SCHEDULES)
each_prediction = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


def example(shape=(32, 3, 8, 8), num_timesteps=1000, seed=0):
    """x0, noise, timesteps; both ends are among the timesteps."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(shape, generator=generator) * 2 - 1
    noise = torch.randn(shape, generator=generator)
    timesteps = torch.randint(num_timesteps, shape[:1], generator=generator)
    timesteps[0], timesteps[1] = 0, num_timesteps - 1
    return x0, noise, timesteps


# --- parity


@each_schedule
@pytest.mark.parametrize("num_timesteps", [1000, 100])
@pytest.mark.parametrize("theirs", [DDPMScheduler, DDIMScheduler])
def test_agrees_with_diffusers(name, num_timesteps, theirs):
    ours, theirs = NoiseSchedule(name, num_timesteps), theirs(num_train_timesteps=num_timesteps, **THEIR_SETTINGS[name])
    x0, noise, timesteps = example(num_timesteps=num_timesteps)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(ours.betas, theirs.betas, **close)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, **close)
    torch.testing.assert_close(ours.add_noise(x0, noise, timesteps), theirs.add_noise(x0, noise, timesteps), **close)
    torch.testing.assert_close(ours.target(x0, noise, timesteps, "v_prediction"), theirs.get_velocity(x0, noise, timesteps), **close)


@each_prediction
@pytest.mark.parametrize("t", [0, 10, 500, 900])
def test_predicted_x0_agrees_with_diffusers(prediction_type, t):
    theirs = DDPMScheduler(prediction_type=prediction_type, clip_sample=False, **THEIR_SETTINGS["scaled_linear"])
    x_t, output, _ = example()
    x0 = NoiseSchedule("scaled_linear").predict_x0(x_t, output, t, prediction_type)
    torch.testing.assert_close(x0, theirs.step(output, t, x_t).pred_original_sample, rtol=1e-5, atol=1e-5)


def test_scaled_linear_is_that_of_the_published_models():
    schedule = NoiseSchedule("scaled_linear")
    # t: beta, alpha-bar, sqrt((1 - alpha-bar) / alpha-bar)
    table = {
        0: (0.00085000, 0.99915000, 0.029167),
        1: (0.00085470, 0.99829603, 0.041314),
        250: (0.00242776, 0.67379263, 0.695799),
        500: (0.00481495, 0.27633268, 1.618279),
        750: (0.00801158, 0.05616985, 4.099164),
        981: (0.01168476, 0.00577550, 13.120411),
        999: (0.01200000, 0.00466010, 14.614641),
    }
    for t, (beta, alpha_bar, sigma) in table.items():
        assert schedule.betas[t].item() == pytest.approx(beta, abs=1e-8)
        assert schedule.alphas_cumprod[t].item() == pytest.approx(alpha_bar, abs=1e-7)
        assert (schedule.noise_scale[t] / schedule.signal_scale[t]).item() == pytest.approx(sigma, rel=1e-5)


def test_linear_is_ddpms_and_cosine_is_clipped():
    linear, cosine = NoiseSchedule("linear"), NoiseSchedule("cosine")
    assert linear.betas[0].item() == pytest.approx(1e-4) and linear.betas[-1].item() == pytest.approx(0.02)
    assert linear.alphas_cumprod[-1].item() == pytest.approx(4.0358e-5, rel=1e-3)
    assert cosine.betas.max().item() == pytest.approx(0.999)
    assert cosine.alphas_cumprod[499].item() == pytest.approx(0.4938, abs=1e-3)  # half of the way, half of the variance


# --- properties


@each_schedule
def test_tables(name):
    schedule = NoiseSchedule(name, 500)
    assert schedule.num_timesteps == 500
    for table in (schedule.betas, schedule.alphas, schedule.alphas_cumprod, schedule.signal_scale, schedule.noise_scale, schedule.snr()):
        assert table.shape == (500,) and table.dtype == torch.float32 and table.isfinite().all()
    assert (schedule.alphas_cumprod.diff() < 0).all() and (schedule.snr().diff() < 0).all()
    torch.testing.assert_close(schedule.signal_scale**2 + schedule.noise_scale**2, torch.ones(500))
    exact = (1 - SCHEDULES[name](500)).cumprod(0)
    torch.testing.assert_close(schedule.snr().double(), exact / (1 - exact), rtol=1e-5, atol=0)


def test_one_step_at_a_time_ends_in_the_same_distribution():
    schedule, generator = NoiseSchedule("linear", 200), torch.Generator().manual_seed(0)
    n, start = 20_000, 1.5
    x = torch.full((n,), start)
    for t in range(200):
        x = schedule.alphas[t].sqrt() * x + schedule.betas[t].sqrt() * torch.randn(n, generator=generator)
        if t in (0, 20, 100, 199):
            noise_scale = schedule.noise_scale[t].item()
            assert x.mean().item() == pytest.approx(start * schedule.signal_scale[t].item(), abs=5 * noise_scale / n**0.5)
            assert x.std().item() == pytest.approx(noise_scale, rel=5 / (2 * n) ** 0.5)


@each_schedule
def test_variance_is_preserved(name):
    schedule = NoiseSchedule(name)
    x0, noise = torch.randn(2, 100_000, 1, generator=torch.Generator().manual_seed(0))
    for t in (0, 300, 700, 999):
        assert schedule.add_noise(x0, noise, t).var().item() == pytest.approx(1, abs=0.03)


@each_schedule
@each_prediction
@pytest.mark.parametrize("shape", [(16, 2), (16,), (16, 3, 8, 8), (16, 4, 2, 8, 8)])
def test_round_trip(name, prediction_type, shape):
    schedule = NoiseSchedule(name)
    x0, noise, timesteps = (tensor.double() if tensor.is_floating_point() else tensor for tensor in example(shape))
    x_t = schedule.add_noise(x0, noise, timesteps)
    output = schedule.target(x0, noise, timesteps, prediction_type)
    # The scales are float32, so for v the squares add up to 1 only to 1e-7; with float64 data the division by a small scale is exact.
    torch.testing.assert_close(schedule.predict_x0(x_t, output, timesteps, prediction_type), x0, rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule.predict_noise(x_t, output, timesteps, prediction_type), noise, rtol=0, atol=1e-6)


def test_targets_by_hand():
    schedule = NoiseSchedule(torch.tensor([0.36]))  # signal scale 0.8, noise scale 0.6
    x0, noise = torch.tensor([2.0]), torch.tensor([1.0])
    assert schedule.add_noise(x0, noise, 0).item() == pytest.approx(2.2)
    assert [schedule.target(x0, noise, 0, name).item() for name in PREDICTION_TYPES] == pytest.approx([1.0, 2.0, -0.4])


def test_each_example_has_its_own_timestep_and_an_integer_serves_all():
    schedule = NoiseSchedule("cosine")
    x0, noise, timesteps = example()
    together = schedule.add_noise(x0, noise, timesteps)
    for i, t in enumerate(timesteps.tolist()):
        alone = schedule.add_noise(x0[i : i + 1], noise[i : i + 1], t)
        assert torch.equal(together[i : i + 1], alone)
        assert torch.equal(alone, schedule.add_noise(x0[i : i + 1], noise[i : i + 1], torch.tensor(t)))
        assert torch.equal(alone, schedule.add_noise(x0[i : i + 1], noise[i : i + 1], torch.tensor([t], dtype=torch.int32)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_keep_the_dtype_of_the_data(dtype):
    schedule = NoiseSchedule("linear")
    x0, noise, timesteps = example()
    x0, noise = x0.to(dtype), noise.to(dtype)
    exact = schedule.add_noise(x0.double(), noise.double(), timesteps)
    for t in (timesteps, 10):
        x_t = schedule.add_noise(x0, noise, t)
        assert x_t.dtype == dtype
        for prediction_type in PREDICTION_TYPES:
            output = schedule.target(x0, noise, t, prediction_type)
            assert output.dtype == dtype
            assert schedule.predict_x0(x_t, output, t, prediction_type).dtype == dtype
            assert schedule.predict_noise(x_t, output, t, prediction_type).dtype == dtype
    relative = torch.finfo(dtype).eps  # computed in float32 or better and rounded once
    torch.testing.assert_close(schedule.add_noise(x0, noise, timesteps).double(), exact, rtol=relative, atol=relative)


def test_inputs_are_not_changed_and_gradients_flow():
    schedule = NoiseSchedule("linear")
    x0, noise, timesteps = example()
    copies = [x0.clone(), noise.clone(), timesteps.clone()]
    output = noise.clone().requires_grad_()
    schedule.predict_x0(schedule.add_noise(x0, noise, timesteps), output, timesteps, "v_prediction").sum().backward()
    torch.testing.assert_close(output.grad, -schedule.noise_scale[timesteps].reshape(-1, 1, 1, 1).expand_as(x0))
    assert all(torch.equal(now, before) for now, before in zip([x0, noise, timesteps], copies))


def test_empty_batch():
    x_t = NoiseSchedule().add_noise(torch.zeros(0, 3, 4, 4), torch.zeros(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64))
    assert x_t.shape == (0, 3, 4, 4)


def test_own_betas():
    schedule = NoiseSchedule(torch.tensor([0.1, 0.5], dtype=torch.float64))
    assert schedule.num_timesteps == 2
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor([0.9, 0.45]))


def test_to_moves_every_table_and_returns_the_schedule():
    schedule = NoiseSchedule("linear", 10)
    tables = [name for name, value in vars(schedule).items() if isinstance(value, torch.Tensor)]
    assert len(tables) == 6
    assert schedule.to("meta") is schedule
    for name in tables:  # `sigmas` serves plain Python numbers and stays: not every device has float64
        assert getattr(schedule, name).device.type == ("cpu" if name == "sigmas" else "meta")
    assert schedule.sigma(3.5) == NoiseSchedule("linear", 10).sigma(3.5)


def test_results_are_where_the_data_is():
    x0, noise, timesteps = example()
    schedule = NoiseSchedule("linear")  # tables and timesteps stay on the CPU
    x_t = schedule.add_noise(x0.to("meta"), noise.to("meta"), timesteps)
    assert x_t.device.type == "meta"
    assert schedule.predict_x0(x_t, noise.to("meta"), 10, "v_prediction").device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tables_on", ["cpu", "cuda"])
@pytest.mark.parametrize("timesteps_on", ["cpu", "cuda"])
def test_same_numbers_on_the_gpu(tables_on, timesteps_on):
    x0, noise, timesteps = example()
    expected = NoiseSchedule("linear").add_noise(x0, noise, timesteps)
    x_t = NoiseSchedule("linear").to(tables_on).add_noise(x0.cuda(), noise.cuda(), timesteps.to(timesteps_on))
    assert x_t.is_cuda
    torch.testing.assert_close(x_t.cpu(), expected, rtol=0, atol=1e-6)


# --- between two timesteps


@each_schedule
def test_sigma_is_noise_for_each_unit_of_signal(name):
    schedule = NoiseSchedule(name)
    exact = (1 - SCHEDULES[name](1000)).cumprod(0)
    assert schedule.sigmas.dtype == torch.float64 and schedule.sigmas.device.type == "cpu"
    torch.testing.assert_close(schedule.sigmas, ((1 - exact) / exact).sqrt(), rtol=1e-12, atol=0)
    for t in (0, 1, 500, 999):
        assert schedule.sigma(t) == pytest.approx(schedule.sigmas[t].item(), rel=1e-12)
        assert schedule.sigma(float(t)) == schedule.sigma(t)
    assert isinstance(schedule.sigma(2.5), float)
    assert schedule.sigma(-1) == schedule.sigma(-1.0) == 0


def test_sigma_between_two_timesteps_by_hand():
    schedule = NoiseSchedule(torch.tensor([0.2, 0.75], dtype=torch.float64))  # alphas_cumprod 0.8 and 0.2: sigmas 1/2 and 2
    assert [schedule.sigma(t) for t in (0, 0.25, 0.5, 1)] == pytest.approx([0.5, 0.5**0.5, 1, 2])  # log(sigma) takes equal steps
    alone = NoiseSchedule(torch.tensor([0.2], dtype=torch.float64))
    assert alone.sigma(0) == pytest.approx(0.5)


@each_schedule
def test_sigma_rises_without_jumps(name):
    schedule = NoiseSchedule(name)
    grid = torch.linspace(0, 999, 5001, dtype=torch.float64).tolist()
    logs = torch.tensor([schedule.sigma(t) for t in grid], dtype=torch.float64).log()
    assert (logs.diff() > 0).all()
    assert logs.diff().max() < schedule.sigmas.log().diff().max() / 5 + 1e-9


@each_schedule
@each_prediction
def test_fractional_timesteps(name, prediction_type):
    schedule = NoiseSchedule(name)
    x0, noise, _ = (tensor.double() for tensor in example())
    for t in (0.0, 0.5, 417.3, 998.9, 999.0):
        signal_scale, noise_scale = schedule.scales(t, like=x0)
        assert signal_scale.shape == noise_scale.shape == (1, 1, 1, 1) and signal_scale.dtype == torch.float32
        assert (signal_scale**2 + noise_scale**2).item() == pytest.approx(1, abs=1e-6)
        assert (noise_scale / signal_scale).item() == pytest.approx(schedule.sigma(t), rel=1e-6)
        x_t = schedule.add_noise(x0, noise, t)
        output = schedule.target(x0, noise, t, prediction_type)
        torch.testing.assert_close(schedule.predict_x0(x_t, output, t, prediction_type), x0, rtol=0, atol=1e-5)
        torch.testing.assert_close(schedule.predict_noise(x_t, output, t, prediction_type), noise, rtol=0, atol=1e-5)
    assert schedule.add_noise(x0.to("meta"), noise.to("meta"), 417.3).device.type == "meta"
    assert schedule.add_noise(x0.bfloat16(), noise.bfloat16(), 417.3).dtype == torch.bfloat16


@each_schedule
def test_a_whole_number_written_as_a_fraction_is_the_same_timestep(name):
    schedule, (x0, noise, _) = NoiseSchedule(name), example()
    for t in (0, 1, 500, 999):
        torch.testing.assert_close(schedule.add_noise(x0, noise, float(t)), schedule.add_noise(x0, noise, t), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [-0.5, 999.5, 1000.0, float("nan"), float("inf")])
def test_fractional_timesteps_out_of_range(bad):
    x = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"timesteps must be in 0 \.\.\. 999"):
        NoiseSchedule().add_noise(x, x, bad)
    with pytest.raises(ValueError, match=r"timesteps must be in 0 \.\.\. 999"):
        NoiseSchedule().sigma(bad)


# --- bad input


@pytest.mark.parametrize("bad", ["squaredcos", "Linear", None, 3, [0.1, 0.2]])
def test_unknown_schedule_lists_the_known(bad):
    with pytest.raises(ValueError, match=r"Unknown schedule .*linear, cosine, scaled_linear"):
        NoiseSchedule(bad)


@pytest.mark.parametrize("bad", [[[0.1]], [], [0.0, 0.1], [0.1, 1.0], [0.1, -0.2], [0.1, float("nan")]])
def test_bad_betas(bad):
    with pytest.raises(ValueError, match="betas must be a"):
        NoiseSchedule(torch.tensor(bad))


@pytest.mark.parametrize("steps", [0, -5])
def test_too_few_timesteps(steps):
    with pytest.raises(ValueError, match=f"num_timesteps is {steps}"):
        NoiseSchedule("linear", steps)


@pytest.mark.parametrize("method", ["target", "predict_x0", "predict_noise"])
def test_unknown_prediction_type_lists_the_known(method):
    x = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="'eps'; known are epsilon, sample, v_prediction"):
        getattr(NoiseSchedule(), method)(x, x, 0, "eps")


@pytest.mark.parametrize("bad", [-1, 1000, torch.tensor([3, 1000]), torch.tensor([-1, 3])])
def test_timesteps_out_of_range(bad):
    x = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"timesteps must be in 0 \.\.\. 999"):
        NoiseSchedule().add_noise(x, x, bad)


@pytest.mark.parametrize("bad", [torch.tensor(0.5), torch.tensor([0.5, 0.5]), torch.tensor([True, False])])
def test_timesteps_that_are_not_integers(bad):
    x = torch.zeros(2, 2)
    with pytest.raises(TypeError, match="timesteps must be integers"):
        NoiseSchedule().add_noise(x, x, bad)


@pytest.mark.parametrize("bad", [torch.tensor([1, 2, 3]), torch.tensor([1]), torch.tensor([[1, 2]])])
def test_timesteps_of_the_wrong_shape(bad):
    x = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"timesteps has shape .* expected one integer or \(2,\)"):
        NoiseSchedule().add_noise(x, x, bad)


def test_shapes_that_do_not_match():
    schedule, x = NoiseSchedule(), torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"x0 has shape \(2, 3, 4, 4\) and noise \(2, 3, 4, 1\)"):
        schedule.add_noise(x, x[..., :1], 0)  # would broadcast without a word
    with pytest.raises(ValueError, match="x_t has shape .* and output"):
        schedule.predict_x0(x, x[:1], 0)


@pytest.mark.parametrize("method", ["add_noise", "target", "predict_x0", "predict_noise"])
def test_bytes_are_not_pictures(method):
    x = torch.zeros(2, 3, 4, 4)
    for first, second in ((x.byte(), x), (x, x.long())):
        with pytest.raises(TypeError, match="must be floating-point"):
            getattr(NoiseSchedule(), method)(first, second, 0)
