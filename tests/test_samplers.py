"""Samplers: parity with diffusers step by step, what must hold for every sampler, orders of convergence, inversion, bad input.

Where diffusers and we differ on purpose, and what the parity tests do about it:

- It computes in float32, and its Euler family in x / signal. With the cosine schedule, whose largest sigma is 20,000, that puts its Euler
  off by 5e-3 and its Heun by 0.1. It gets float64 samples and tables, and its files find float64 wherever they say float32 (`Float64`):
  our float32 is measured against the exact value.
- Its DDIM steps from t to t - T // steps, which is not the next timestep of the list for trailing and linspace, and neither its DDIM nor
  its DDPM knows fractional timesteps. Both run on a schedule made of the levels of our path and of nothing else, one timestep for each.
- Its Euler and Heun keep fractions in linspace, its DPM-Solver cuts linspace and leading into steps + 1 pieces and drops the last, and
  rounds the timesteps (not the sigmas) of Karras; its Karras in Euler and Heun starts and ends where the spacing does, not at the
  schedule's ends. All of them get the timesteps and sigmas of our path.
- Between two timesteps it interpolates sigma in a straight line, we log(sigma); for the same reason it gets our sigmas.
- Its Euler ancestral refuses "sample": it gets the noise that the answer implies.
- One step of linspace is at t = 0 in numpy, at T - 1 here: sampling starts from noise. Where T (steps - i) / steps or its like ends in
  exactly .5, numpy's rounding errors decide up or down, so single timesteps may be one apart; for 64 of the numbers of steps (61, 103, …)
  its trailing has one timestep too many, -1.
"""

import math
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import nn

from minisd.ddpm import Denoiser
from minisd.noise import PREDICTION_TYPES, SCHEDULES, NoiseSchedule
from minisd.samplers import (
    CLEAN,
    SAMPLERS,
    SPACINGS,
    STOCHASTIC,
    ddim,
    ddim_invert,
    karras_timesteps,
    level,
    make_path,
    noise_source,
    sample,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own, with numpy 2

SHAPE = (2, 3, 4, 4)
THEIRS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}
VARIANTS = {"ddim, eta 0.5": ("ddim", {"eta": 0.5}), "ddim, eta 1": ("ddim", {"eta": 1.0})} | {name: (name, {}) for name in SAMPLERS}
WAYS = {spacing: (spacing, 0) for spacing in SPACINGS} | {"leading, offset 1": ("leading", 1)}
each_sampler = pytest.mark.parametrize("name", SAMPLERS)
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_way = pytest.mark.parametrize("way", WAYS)


class Toy(nn.Module):
    """A network stand-in: bounded, smooth in x and t, different for each channel."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]).view(1, 3, 1, 1))

    def forward(self, x, timesteps, shift=None):
        answer = torch.tanh(self.weight * x + timesteps.view(-1, 1, 1, 1) / 1000 - 0.3)
        return answer if shift is None else answer + shift


def toy_denoiser(schedule="scaled_linear", prediction_type="epsilon", clip=None):
    return Denoiser(Toy(), NoiseSchedule(schedule), prediction_type, clip=clip, dtype=torch.float32)


class Oracle:
    """The best possible denoiser for data N(mean, std²), each number on its own; std 0: it knows the picture."""

    device = torch.device("cpu")

    def __init__(self, mean, std, schedule="scaled_linear"):
        self.mean, self.std, self.schedule = mean, std, NoiseSchedule(schedule)

    def __call__(self, x_t, t):
        _, signal, noise = level(self.schedule, t)
        share = self.std**2 * signal / (self.std**2 * signal**2 + noise**2)
        x0 = self.mean + share * (x_t - signal * self.mean)
        return x0, (x_t - signal * x0) / noise

    def exact(self, x, start, end):
        """Where the ODE takes x at timestep `start` when it has reached `end`: sigma-space distances to the mean shrink with the spread."""
        spread = [math.hypot(self.std, self.schedule.sigma(t)) for t in (start, end)]
        signals = [level(self.schedule, t).signal for t in (start, end)]
        return signals[1] * (self.mean + spread[1] / spread[0] * (x / signals[0] - self.mean))


# --- parity


class Float64:
    """`torch`, in which float32 is float64: what diffusers' files see during the comparison."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextmanager
def exact_diffusers(scheduler, draw):
    """Let a scheduler class of diffusers compute in float64, with fresh noise from `draw`."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch(f"{scheduler.__module__}.torch", Float64()))
        if scheduler in (DDPMScheduler, EulerAncestralDiscreteScheduler):
            stack.enter_context(mock.patch(f"{scheduler.__module__}.randn_tensor", lambda *_, **__: draw()))
        yield


def their_samples(name, denoiser, path, x, draw, eta=0.0):
    """x at every level of `path` from the scheduler of diffusers, in float64 and in our scale."""
    levels = [level(denoiser.schedule, t) for t in path]
    signals = torch.tensor([one.signal for one in levels], dtype=torch.float64)
    sigmas = torch.tensor([one.sigma for one in levels], dtype=torch.float64)
    steps, kind = len(path) - 1, denoiser.prediction_type
    samples = [x.double()]

    @torch.no_grad()
    def ask(x, t):
        return denoiser.model(x.float(), torch.full((len(x),), t)).double()

    with exact_diffusers(THEIRS[name], draw):
        if name in ("ddpm", "ddim"):
            theirs = THEIRS[name](num_train_timesteps=steps, prediction_type=kind, clip_sample=False)
            theirs.set_timesteps(steps)
            theirs.alphas_cumprod = signals[:-1].flip(0) ** 2
            theirs.final_alpha_cumprod = signals[-1] ** 2
            for i, t in enumerate(theirs.timesteps):
                options = {"eta": eta, "variance_noise": draw()} if eta and sigmas[i + 1] > 0 else {}
                samples.append(theirs.step(ask(samples[-1], path[i]), t, samples[-1], **options).prev_sample)
            return samples
        implied = name == "euler_ancestral" and kind == "sample"
        options = {"prediction_type": "epsilon" if implied else kind}
        if name == "dpmpp_2m":
            options |= {"final_sigmas_type": "zero" if path[-1] == CLEAN else "sigma_min", "lower_order_final": path[-1] == CLEAN}
        theirs = THEIRS[name](**options)
        theirs.set_timesteps(steps)
        times = torch.tensor(path[:-1], dtype=torch.float64)
        if name == "heun":  # every level but the first is met twice: as the end of a trial step, and as the start of the next
            theirs.timesteps = torch.cat([times[:1], times[1:].repeat_interleave(2)])
            theirs.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
        else:
            theirs.timesteps, theirs.sigmas = times, sigmas
        scaled = name != "dpmpp_2m"  # Euler's family works with x / signal
        y = samples[0] / signals[0] if scaled else samples[0]
        at = 0
        for i, t in enumerate(theirs.timesteps):
            x = theirs.scale_model_input(y, t)
            output = ask(x, path[at + 1] if name == "heun" and i % 2 else path[at])
            if implied:
                output = (x - signals[at] * output) / (signals[at] * sigmas[at])
            y = theirs.step(output, t, y).prev_sample
            if name != "heun" or i % 2 or i == len(theirs.timesteps) - 1:
                at += 1
                samples.append(y * signals[at] if scaled else y)
    assert len(samples) == len(path)
    return samples


def largest_difference(variant, schedule, prediction_type, path):
    """Over all levels of a path: how far our samples are from theirs, as a share of the largest number where that is over 1."""
    name, options = VARIANTS[variant]
    denoiser = toy_denoiser(schedule, prediction_type)
    draw = noise_source(SHAPE, 7, "cpu")
    ours = []
    last = SAMPLERS[name](denoiser, draw(), path, draw=draw, callback=lambda t, x, x0: ours.append(x), progress=False, **options)
    draw = noise_source(SHAPE, 7, "cpu")
    theirs = their_samples(name, denoiser, path, draw(), draw, **options)
    ours, theirs = torch.stack([*ours, last]).double(), torch.stack(theirs)
    assert ours.shape == theirs.shape and ours.isfinite().all()
    largest = theirs.abs().amax((1, 2, 3, 4))
    return ((ours - theirs).abs().amax((1, 2, 3, 4)) / largest.clamp(min=1)).max().item()


@each_variant
@each_way
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_step_agrees_with_diffusers(variant, way, prediction_type):
    for schedule in SCHEDULES:
        for steps in (1, 2, 5, 20, 50):
            path = make_path(NoiseSchedule(schedule), steps, *WAYS[way])
            assert largest_difference(variant, schedule, prediction_type, path) < 1e-4, (schedule, steps)


@each_variant
@each_way
def test_hundreds_of_steps_agree_with_diffusers(variant, way):
    turn = list(VARIANTS).index(variant) + list(WAYS).index(way)  # every sampler meets every schedule, prediction type, spacing and number
    schedule, prediction_type = list(SCHEDULES)[turn % 3], PREDICTION_TYPES[turn // 3 % 3]
    steps = (
        999 if turn % 2 or way == "leading, offset 1" else 1000
    )  # with the offset 1000 would begin at 1000, and the last timestep is 999
    path = make_path(NoiseSchedule(schedule), steps, *WAYS[way])
    assert largest_difference(variant, schedule, prediction_type, path) < 1e-4


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("ddpm", "heun")])  # theirs always end clean
def test_paths_that_stop_before_the_clean_end_agree_too(variant):
    for way in WAYS.values():
        path = make_path(NoiseSchedule("scaled_linear"), 10, *way)
        assert largest_difference(variant, "scaled_linear", "v_prediction", [t for t in path if t > 0.5] + [0]) < 1e-4, way
        assert largest_difference(variant, "scaled_linear", "epsilon", path[2:6]) < 1e-4, way


# --- paths


def one_apart_at_most(ours, theirs):
    """Equal but for single timesteps that numpy rounds the other way, at exactly .5."""
    ours, theirs = np.array(ours), np.array(theirs)
    return ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1 and (ours != theirs).mean() < 0.1


def test_timesteps_are_those_of_diffusers():
    schedule = NoiseSchedule("scaled_linear")
    for spacing, offset in WAYS.values():
        if spacing == "karras":
            continue
        theirs = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
        for steps in range(1, 1001):
            theirs.set_timesteps(steps)
            expected = theirs.timesteps.tolist()
            if spacing == "trailing" and len(expected) > steps:
                assert expected.pop() == -1
            ours = make_path(schedule, steps, spacing, offset)
            assert len(ours) == steps + 1 and ours[-1] == CLEAN and all(isinstance(t, int) for t in ours)
            if spacing == "leading":
                assert ours[:-1] == expected
            elif (spacing, steps) == ("linspace", 1):
                assert (ours[:-1], expected) == ([999], [0])
            else:
                assert one_apart_at_most(ours[:-1], expected), (spacing, steps)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [2, 5, 20, 50, 999])
def test_each_scheduler_of_diffusers_has_these_timesteps(name, steps):
    schedule = NoiseSchedule("scaled_linear")
    for spacing, offset in WAYS.values():
        if spacing == "karras":
            continue
        theirs = THEIRS[name](timestep_spacing=spacing, steps_offset=offset)
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.double().round().tolist()  # Euler and Heun: fractions in linspace
        if name == "heun":
            expected = expected[:1] + expected[1::2]
        ours = make_path(schedule, steps, spacing, offset)[:-1]
        if name == "dpmpp_2m" and spacing != "trailing":
            ours = make_path(schedule, steps + 1, spacing, offset)[:-2]
        assert one_apart_at_most(ours, expected), spacing


@pytest.mark.parametrize("steps", [2, 5, 20, 50, 999])
def test_karras_levels_are_those_of_diffusers(steps):
    schedule = NoiseSchedule("scaled_linear")
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    ours = make_path(schedule, steps, "karras")
    sigmas = torch.tensor([schedule.sigma(t) for t in ours])
    for name, scheduler in (("euler", EulerDiscreteScheduler), ("dpmpp_2m", DPMSolverMultistepScheduler)):
        theirs = scheduler(use_karras_sigmas=True, **betas)
        theirs.set_timesteps(steps)
        torch.testing.assert_close(sigmas, theirs.sigmas, rtol=1e-4, atol=0)
        rounded = 0.5 if name == "dpmpp_2m" else 0
        assert (torch.tensor(ours[:-1]) - theirs.timesteps).abs().max() < rounded + 0.01


def test_karras_by_hand():
    schedule = NoiseSchedule("linear")
    largest, smallest = schedule.sigmas[-1].item(), schedule.sigmas[0].item()
    timesteps = karras_timesteps(schedule, 3)
    middle = ((largest ** (1 / 7) + smallest ** (1 / 7)) / 2) ** 7  # equation 5 with i = 1 of 3
    assert [schedule.sigma(t) for t in timesteps] == pytest.approx([largest, middle, smallest], rel=1e-9)
    assert timesteps[0] == pytest.approx(999) and timesteps[2] == pytest.approx(0)


def test_karras_begins_at_sigma_80_where_the_schedule_goes_further():
    cosine, linear = NoiseSchedule("cosine"), NoiseSchedule("linear")
    assert cosine.sigma(make_path(cosine, 5, "karras")[0]) == pytest.approx(80)  # 20,000 otherwise: steps that nothing would be left for
    assert cosine.sigma(make_path(cosine, 5, "karras", sigma_max=30)[0]) == pytest.approx(30)
    assert karras_timesteps(cosine, 5)[0] == pytest.approx(999)
    assert linear.sigma(make_path(linear, 5, "karras")[0]) == pytest.approx(80)
    assert NoiseSchedule("scaled_linear").sigma(make_path(NoiseSchedule("scaled_linear"), 5, "karras")[0]) == pytest.approx(
        14.6146, rel=1e-4
    )


@each_way
def test_paths_fall_from_noise_to_clean(way):
    for total in (1, 10, 1000):
        schedule = NoiseSchedule("cosine", total)
        for steps in {1, 2, 3, total // 2, total - 1} & set(range(1, total)):
            path = make_path(schedule, steps, *WAYS[way])
            assert len(path) == steps + 1 and path[-1] == CLEAN
            assert all(before > after for before, after in zip(path, path[1:])) and path[0] <= total - 1
    schedule = NoiseSchedule("scaled_linear")
    assert make_path(schedule, np.int64(4), *WAYS[way]) == make_path(schedule, 4, *WAYS[way])
    assert make_path(schedule, 4, *WAYS[way], end=0)[-1] == 0


def test_spacings_by_hand():
    schedule = NoiseSchedule("linear", 10)
    assert make_path(schedule, 3, "leading") == [6, 3, 0, -1]
    assert make_path(schedule, 3, "leading", offset=1, end=0) == [7, 4, 1, 0]
    assert make_path(schedule, 3, "trailing") == [9, 6, 2, -1]
    assert make_path(schedule, 4, "linspace") == [9, 6, 3, 0, -1]
    for spacing in SPACINGS:
        assert make_path(schedule, 10, spacing)[0] == pytest.approx(9)


def test_levels():
    schedule = NoiseSchedule("scaled_linear")
    assert level(schedule, CLEAN) == (CLEAN, 1.0, 0.0) and level(schedule, CLEAN).sigma == 0
    for t in (0, 1, 500, 999):
        now = level(schedule, t)
        assert now.signal == pytest.approx(schedule.signal_scale[t].item(), rel=1e-6)
        assert now.noise == pytest.approx(schedule.noise_scale[t].item(), rel=1e-6)
        assert now.sigma == pytest.approx(schedule.sigmas[t].item(), rel=1e-12)
        assert level(schedule, float(t)) == now


# --- what holds for every sampler


@each_sampler
def test_same_seed_same_picture_other_seed_other_picture(name):
    denoiser = toy_denoiser()
    a, b, c = (sample(denoiser, SHAPE, name, steps=5, seed=seed, progress=False) for seed in (3, 3, 4))
    assert a.shape == SHAPE and a.dtype == torch.float32
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@each_sampler
def test_with_its_own_seed_a_picture_does_not_depend_on_its_neighbours(name):
    denoiser = toy_denoiser("cosine", clip=1.0)
    together = sample(denoiser, (3, 3, 4, 4), name, steps=6, seed=[5, 9, 5], progress=False)
    assert torch.equal(together[0], together[2])
    for picture, seed in zip(together, (5, 9)):
        assert torch.equal(picture, sample(denoiser, (1, 3, 4, 4), name, steps=6, seed=[seed], progress=False)[0])


def test_noise_is_that_of_the_seed():
    draw = noise_source(SHAPE, 11, "cpu")
    generator = torch.Generator().manual_seed(11)
    for _ in range(2):
        assert torch.equal(draw(), torch.randn(SHAPE, generator=generator))
    assert torch.equal(noise_source(SHAPE, np.int64(11), "cpu")(), noise_source(SHAPE, 11, "cpu")())
    assert torch.equal(noise_source(SHAPE, (1, 2), "cpu")()[1], noise_source((1, 3, 4, 4), [2], "cpu")()[0])


@each_sampler
def test_callback_sees_each_step_before_it_is_taken(name):
    denoiser, seen = toy_denoiser(), []
    path = make_path(denoiser.schedule, 7, "karras")
    last = sample(denoiser, SHAPE, name, timesteps=path, seed=2, callback=lambda *state: seen.append(state), progress=False)
    assert [t for t, _, _ in seen] == path[:-1]
    assert torch.equal(seen[0][1], noise_source(SHAPE, 2, "cpu")())
    for t, x, x0 in seen:
        assert torch.equal(x0, denoiser(x, t)[0])
    assert torch.allclose(last, seen[-1][2], atol=1e-5)  # the last step goes all the way to the clean picture


@each_sampler
def test_nothing_given_is_changed(name):
    denoiser = toy_denoiser()
    x, shift = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), torch.full(SHAPE, 0.1)
    path = make_path(denoiser.schedule, 5)
    copies, kept = [x.clone(), shift.clone()], list(path)
    seen = []
    draw = noise_source(SHAPE, 1, "cpu")
    SAMPLERS[name](
        denoiser, x, path, draw=draw, callback=lambda t, x, x0: seen.append((x, x.clone(), x0, x0.clone())), progress=False, shift=shift
    )
    assert torch.equal(x, copies[0]) and torch.equal(shift, copies[1]) and path == kept
    for x, x_then, x0, x0_then in seen:  # what the callback was shown stays as it was: a film needs no copies
        assert torch.equal(x, x_then) and torch.equal(x0, x0_then)


@each_sampler
def test_conditions_reach_the_network_at_every_call(name):
    class Counting(Toy):
        calls = []

        def forward(self, x, timesteps, shift=None):
            self.calls.append((timesteps.tolist(), shift))
            return super().forward(x, timesteps, shift)

    Counting.calls = []
    denoiser = Denoiser(Counting(), NoiseSchedule("linear"), dtype=torch.float32)
    shift = torch.full(SHAPE, 0.2)
    shifted = sample(denoiser, SHAPE, name, steps=6, progress=False, shift=shift)
    assert len(Counting.calls) == (11 if name == "heun" else 6)  # the price of Heun's second look; the last step needs none
    assert all(given is shift for _, given in Counting.calls)
    assert all(len(set(timesteps)) == 1 and len(timesteps) == 2 for timesteps, _ in Counting.calls)
    assert not torch.allclose(shifted, sample(denoiser, SHAPE, name, steps=6, progress=False))


@each_way
def test_ddim_is_euler_and_ddpm_is_their_noisy_brother(way):
    path = make_path(NoiseSchedule("scaled_linear"), 25, *WAYS[way])

    def run(name, prediction_type, **options):
        denoiser = toy_denoiser("scaled_linear", prediction_type)
        return sample(denoiser, SHAPE, name, timesteps=path, seed=4, progress=False, **options)

    for kind in PREDICTION_TYPES:
        calm, noisy = run("ddim", kind), run("ddpm", kind)
        assert (calm - run("euler", kind)).abs().max() < 1e-5 * calm.abs().max().clamp(min=1)
        for other in (run("ddim", kind, eta=1.0), run("euler_ancestral", kind)):
            assert (noisy - other).abs().max() < 1e-5 * noisy.abs().max().clamp(min=1)
        assert (calm - noisy).abs().max() > 1e-3


@each_sampler
def test_a_path_can_be_walked_in_two_parts(name):
    denoiser = toy_denoiser("linear", "v_prediction")
    path = make_path(denoiser.schedule, 10, "trailing")
    draw = noise_source(SHAPE, 8, "cpu")
    start = draw()
    whole = SAMPLERS[name](denoiser, start, path, draw=draw, progress=False)
    draw = noise_source(SHAPE, 8, "cpu")
    middle = SAMPLERS[name](denoiser, draw(), path[:5], draw=draw, progress=False)
    parts = SAMPLERS[name](denoiser, middle, path[4:], draw=draw, progress=False)
    if name == "dpmpp_2m":  # it remembers one step, so the second part begins with a first-order one
        assert 1e-6 < (whole - parts).abs().max() < 0.05
    else:
        assert torch.equal(whole, parts)


@each_sampler
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_perfect_denoiser_leads_to_the_data_in_any_number_of_steps(name, schedule):
    x0 = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for steps in (1, 2, 7, 50, 1000):
        for spacing in ("trailing", "karras") if steps < 1000 else ("linspace",):
            found = sample(Oracle(x0, 0.0, schedule), SHAPE, name, steps=steps, spacing=spacing, progress=False)
            assert torch.allclose(found, x0, atol=1e-5), (steps, spacing)


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral"])
def test_noisy_samplers_reach_the_right_spread(name):
    samples = sample(Oracle(0.3, 0.5, "cosine"), (200, 1, 10, 10), name, steps=200, progress=False)
    assert samples.mean().item() == pytest.approx(0.3, abs=0.02)
    assert samples.std().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name, order", [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_order_of_convergence(name, order, schedule):
    """Twice the steps, half the error for a sampler of order 1, a quarter for one of order 2: against the exact answer for a Gaussian."""
    oracle = Oracle(0.3, 0.5, schedule)
    x = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (40, 80, 160):
        path = karras_timesteps(oracle.schedule, steps + 1)  # not to the clean end: its last step is the same for any number of steps
        found = SAMPLERS[name](oracle, x, path, progress=False)
        errors.append((found - oracle.exact(x, path[0], path[-1])).abs().max().item())
    for coarse, fine in zip(errors, errors[1:]):
        assert coarse / fine == pytest.approx(2**order, rel=0.15), errors


def test_inversion_and_back():
    x0 = torch.rand(SHAPE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    for denoiser in (Oracle(0.1, 0.6), toy_denoiser("scaled_linear", "v_prediction"), toy_denoiser("linear", "v_prediction")):
        errors = []
        for steps in (10, 20, 50):
            path = make_path(denoiser.schedule, steps)
            noise = ddim_invert(denoiser, x0, path, progress=False)
            errors.append((ddim(denoiser, noise, path, progress=False) - x0).abs().max().item())
        assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01, errors
    path = make_path(NoiseSchedule("scaled_linear"), 20)
    by_iterations = []
    for iterations in (1, 2, 4, 8):
        noise = ddim_invert(Oracle(0.1, 0.6), x0, path, iterations=iterations, progress=False)
        by_iterations.append((ddim(Oracle(0.1, 0.6), noise, path, progress=False) - x0).abs().max().item())
    assert all(after < before for before, after in zip(by_iterations, by_iterations[1:])), by_iterations


def test_inversion_shows_its_steps_and_passes_conditions():
    denoiser, seen = toy_denoiser(), []
    path, shift = make_path(denoiser.schedule, 6), torch.full(SHAPE, 0.2)
    x0 = torch.zeros(SHAPE)
    noise = ddim_invert(denoiser, x0, path, callback=lambda t, x, x0: seen.append(t), progress=False, shift=shift)
    assert len(seen) == 6 and torch.equal(x0, torch.zeros(SHAPE))
    assert not torch.allclose(noise, ddim_invert(denoiser, x0, path, progress=False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_sampler
def test_same_picture_on_the_gpu(name):
    here = toy_denoiser("scaled_linear", "v_prediction")
    there = Denoiser(Toy().cuda(), here.schedule, "v_prediction", dtype=torch.float32)
    picture = sample(there, SHAPE, name, steps=10, seed=1, progress=False)
    assert picture.is_cuda
    assert torch.allclose(picture.cpu(), sample(here, SHAPE, name, steps=10, seed=1, progress=False), atol=1e-4)


# --- progress bar


def test_progress_bar_is_silent_in_fast_mode_and_on_request(monkeypatch, capfd):
    def bar(**options):
        capfd.readouterr()
        sample(toy_denoiser(), SHAPE, steps=3, **options)
        return capfd.readouterr().err

    monkeypatch.setenv("MINISD_FAST", "1")
    assert bar() == "" and bar(progress=False) == ""
    assert "3/3" in bar(progress=True)
    monkeypatch.setenv("MINISD_FAST", "0")
    assert "3/3" in bar() and bar(progress=False) == ""


# --- bad input


@pytest.mark.parametrize("steps", [0, -1, 1001, 10**9])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_bad_number_of_steps(steps, spacing):
    with pytest.raises(ValueError, match=f"between 1 and the schedule's 1000, got {steps}"):
        sample(toy_denoiser(), SHAPE, steps=steps, spacing=spacing)


@pytest.mark.parametrize("steps", [2.5, 20.0, "20", None, float("nan"), True])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_steps_that_are_not_whole_numbers(steps, spacing):
    with pytest.raises(ValueError, match=r"steps must be .*between 1 and the schedule's 1000, got "):
        make_path(NoiseSchedule(), steps, spacing)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="'pndm'; known are ddpm, ddim, euler, euler_ancestral, heun, dpmpp_2m"):
        sample(toy_denoiser(), SHAPE, "pndm")
    with pytest.raises(ValueError, match="'uniform'; known are leading, trailing, linspace, karras"):
        sample(toy_denoiser(), SHAPE, spacing="uniform")


@each_sampler
@pytest.mark.parametrize("path", [[100, 500, -1], [500, 500, -1], [500, 0, 0], [500], [], [-1, 500]])
def test_timesteps_out_of_order(name, path):
    with pytest.raises(ValueError, match="timesteps must fall from noise to clean"):
        sample(toy_denoiser(), SHAPE, name, timesteps=path)
    with pytest.raises(ValueError, match="timesteps must fall from noise to clean"):
        ddim_invert(toy_denoiser(), torch.zeros(SHAPE), path)


@pytest.mark.parametrize("path", [[1000, 500, -1], [500, -2], [500, -0.5], [999.5, -1], [float("nan"), -1], [500, float("nan"), -1]])
def test_timesteps_outside_the_schedule(path):
    with pytest.raises(ValueError, match=r"timesteps must be in 0 \.\.\. 999"):
        sample(toy_denoiser(), SHAPE, timesteps=path)


def test_leading_steps_that_do_not_fit_above_the_offset():
    with pytest.raises(ValueError):
        sample(toy_denoiser(), SHAPE, timesteps=make_path(NoiseSchedule(), 1000, "leading", offset=1))


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3], []])
def test_wrong_number_of_seeds(seeds):
    with pytest.raises(ValueError, match=f"got {len(seeds)} seeds for 2 pictures"):
        sample(toy_denoiser(), SHAPE, seed=seeds)


@pytest.mark.parametrize("seed", [1.5, None])
def test_seeds_are_whole_numbers(seed):
    with pytest.raises(ValueError, match="seed"):
        sample(toy_denoiser(), SHAPE, seed=seed)


@pytest.mark.parametrize("variant", ["ddpm", "euler_ancestral", "ddim, eta 0.5"])
def test_noisy_samplers_ask_for_a_source_of_noise(variant):
    name, options = VARIANTS[variant]
    with pytest.raises(ValueError, match="draw"):
        SAMPLERS[name](toy_denoiser(), torch.zeros(SHAPE), [500, 100, -1], progress=False, **options)


@pytest.mark.parametrize("eta", [-0.5, 1.5, float("nan")])
def test_eta_is_between_0_and_1(eta):
    with pytest.raises(ValueError, match=f"eta must be .*got {eta}"):
        sample(toy_denoiser(), SHAPE, "ddim", eta=eta)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_list_of_stochastic_samplers_is_right(name):
    """They need `draw`, and another draw gives another picture; the others neither need nor hear it."""
    denoiser, path = toy_denoiser(), [900, 600, 300, CLEAN]
    start = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ends = [SAMPLERS[name](denoiser, start, path, draw=noise_source(start.shape, seed), progress=False) for seed in (1, 2)]
    assert torch.equal(*ends) == (name not in STOCHASTIC)
    if name in STOCHASTIC:
        with pytest.raises(ValueError, match="this sampler adds fresh noise"):
            SAMPLERS[name](denoiser, start, path, progress=False)
    else:
        assert torch.equal(SAMPLERS[name](denoiser, start, path, progress=False), ends[0])
