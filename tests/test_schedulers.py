"""Scheduler settings: the real configs of SD 1.5, 2.1 and XL, every class of diffusers that we know, both directions, bad input.

Everything here runs the schedulers of diffusers as they are, in float32; tests/test_samplers.py compares the arithmetic itself.
Its Euler and Heun begin with noise of size noise_scale, not 1, for linspace and trailing; both sides get the same beginning.
"""

import dataclasses
import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from minisd.ddpm import Denoiser
from minisd.noise import PREDICTION_TYPES, SCHEDULES, NoiseSchedule
from minisd.samplers import CLEAN, SAMPLERS, SPACINGS, make_path, noise_source, sample
from minisd.schedulers import KNOWN, read_scheduler, scheduler_config

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own, with numpy 2

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "trained_betas": None}
OLD = LATENT | {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False}
SD_15 = OLD | {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0"}
SD_21_BASE = OLD | {"_class_name": "PNDMScheduler", "_diffusers_version": "0.10.0.dev0", "prediction_type": "epsilon"}
SD_21 = OLD | {"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "prediction_type": "v_prediction"}
SD_21_DPM = LATENT | {
    **{"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "v_prediction", "algorithm_type": "dpmsolver++", "solver_order": 2},
    **{"solver_type": "midpoint", "thresholding": False, "lower_order_final": True, "dynamic_thresholding_ratio": 0.995},
    **{"sample_max_value": 1.0},
}
SDXL = OLD | {
    **{"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "interpolation_type": "linear"},
    **{"prediction_type": "epsilon", "sample_max_value": 1.0, "timestep_spacing": "leading", "use_karras_sigmas": False},
}
SAME = {name: known for name, known in KNOWN.items() if known.same}
each_class = pytest.mark.parametrize("name", KNOWN)
# LMSDiscreteScheduler needs scipy in diffusers, which no check here installs: it is read, but not set beside theirs.
each_comparable_class = pytest.mark.parametrize("name", [name for name in KNOWN if name != "LMSDiscreteScheduler"])


def of(name, **settings):
    return LATENT | {"_class_name": name, "clip_sample": False} | settings


class Toy(nn.Module):
    """A network stand-in: bounded, smooth in x and t."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]).view(1, 3, 1, 1))

    def forward(self, x, timesteps):
        return torch.tanh(self.weight * x + timesteps.view(-1, 1, 1, 1) / 1000 - 0.3)


def open_in_diffusers(config, **changes):
    """The scheduler that diffusers makes of a config."""
    return getattr(diffusers, config["_class_name"]).from_config(config | changes)


def walk_in_diffusers(theirs, model, x, steps, draw):
    """Sample with a scheduler of diffusers in the way that its pipelines do, from x in our scale."""
    theirs.set_timesteps(steps)
    by_sigma = type(theirs).__name__.startswith(("Euler", "Heun"))
    y = x * (theirs.sigmas[0] ** 2 + 1).sqrt() if by_sigma else x
    options = inspect.signature(theirs.step).parameters
    for t in theirs.timesteps:
        with torch.no_grad():
            output = model(theirs.scale_model_input(y, t), t.expand(len(x)))
        y = theirs.step(output, t, y, **({"generator": draw} if "generator" in options else {})).prev_sample
    if by_sigma:
        y = y / (theirs.sigmas[-1] ** 2 + 1).sqrt()
    return y


def assert_same_samples(config, steps, tolerance=1e-4, model=None, **changes):
    """Our sampler on the settings read from `config` against diffusers' scheduler made of the same config."""
    settings, model, shape = read_scheduler(config), model or Toy(), (2, 3, 4, 4)
    denoiser = Denoiser(model, settings.schedule, settings.prediction_type, clip=settings.clip, dtype=torch.float32)
    ours = sample(denoiser, shape, settings.sampler, timesteps=settings.path(steps), seed=3, progress=False)
    generator = torch.Generator().manual_seed(3)
    theirs = walk_in_diffusers(open_in_diffusers(config, **changes), model, torch.randn(shape, generator=generator), steps, generator)
    assert (ours - theirs).abs().max() < tolerance * max(1, theirs.abs().max())


# --- the published configs


def test_stable_diffusion_1_5():
    settings = read_scheduler(SD_15)
    assert (settings.sampler, settings.prediction_type, settings.spacing, settings.offset) == ("dpmpp_2m", "epsilon", "leading", 1)
    assert settings.note == "PNDM is not built here; dpmpp_2m takes its place, with the same noise levels."
    assert settings.clip is None and not settings.karras
    torch.testing.assert_close(settings.schedule.betas, NoiseSchedule("scaled_linear").betas, rtol=1e-6, atol=0)
    path = settings.path(50)
    assert path[:2] == [981, 961] and path[-2:] == [1, 0] and len(path) == 51
    theirs = open_in_diffusers(SD_15)
    theirs.set_timesteps(50)
    assert path[:-1] == theirs.timesteps.unique().flip(0).tolist()  # 51 calls of the network: PNDM asks twice at 961
    assert read_scheduler(SD_21_BASE).path(50) == path


def test_pndm_and_what_takes_its_place_end_near_each_other():
    settings, model, x = read_scheduler(SD_15), Toy(), noise_source((2, 3, 4, 4), 3, "cpu")()
    denoiser = Denoiser(model, settings.schedule, dtype=torch.float32)
    ours = sample(denoiser, x.shape, settings.sampler, timesteps=settings.path(50), seed=3, progress=False)
    theirs = walk_in_diffusers(open_in_diffusers(SD_15), model, x, 50, None)
    apart = (ours - theirs).norm() / theirs.norm()
    assert apart < 0.01


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_stable_diffusion_2_1(steps):
    settings = read_scheduler(SD_21)
    assert (settings.sampler, settings.prediction_type, settings.end, settings.note) == ("ddim", "v_prediction", 0, "")
    assert settings.path(50)[:2] == [981, 961] and settings.path(50)[-2:] == [1, 0]
    assert_same_samples(SD_21, steps)
    assert read_scheduler(SD_21_DPM).sampler == "dpmpp_2m"
    assert_same_samples(SD_21_DPM, steps)


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_stable_diffusion_xl(steps):
    settings = read_scheduler(SDXL)
    assert (settings.sampler, settings.prediction_type, settings.end, settings.note) == ("euler", "epsilon", CLEAN, "")
    assert settings.path(25)[:2] == [961, 921] and settings.path(25)[-2:] == [1, CLEAN]
    assert_same_samples(SDXL, steps)


# --- every class that we know


@each_comparable_class
def test_absent_settings_are_those_of_diffusers(name, tmp_path):
    theirs = getattr(diffusers, name)()
    theirs.save_config(tmp_path)
    assert len(json.loads((tmp_path / "scheduler_config.json").read_text())) > 5  # diffusers writes every setting
    bare, full = read_scheduler({"_class_name": name}), read_scheduler(tmp_path)
    torch.testing.assert_close(bare.schedule.betas, theirs.betas, rtol=1e-5, atol=0)
    for field in dataclasses.fields(bare):
        if field.name != "schedule":
            assert getattr(bare, field.name) == getattr(full, field.name), field.name
    assert bare.path(7) == full.path(7)
    assert bool(bare.note) == (not KNOWN[name].same)


@each_class
def test_null_is_absent(name):
    bare = read_scheduler({"_class_name": name})
    nulls = dict.fromkeys(
        ("beta_start", "beta_end", "prediction_type", "timestep_spacing", "steps_offset", "clip_sample", "set_alpha_to_one")
    )
    read = read_scheduler({"_class_name": name, "final_sigmas_type": None, "num_train_timesteps": None, **nulls})
    assert torch.equal(read.schedule.betas, bare.schedule.betas)
    assert dataclasses.replace(read, schedule=bare.schedule) == bare


@each_comparable_class
@pytest.mark.parametrize("spacing, offset", [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])
@pytest.mark.parametrize("karras", [False, True])
def test_paths_are_those_of_diffusers(name, spacing, offset, karras):
    config = of(name, timestep_spacing=spacing, steps_offset=offset, use_karras_sigmas=karras, skip_prk_steps=True)
    if karras and not KNOWN[name].karras:  # diffusers does not read it either
        assert read_scheduler(config).path(7) == read_scheduler(config | {"use_karras_sigmas": False}).path(7)
        return
    theirs, settings = open_in_diffusers(config), read_scheduler(config)
    for steps in (2, 3, 10, 30, 50):
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.double()
        if name == "HeunDiscreteScheduler":
            expected = torch.cat([expected[:1], expected[1::2]])
        elif name == "PNDMScheduler":
            expected = torch.from_numpy(theirs._timesteps[::-1].astype(float))  # without the extra calls
        path = settings.path(steps)
        ours = torch.tensor(path[: len(expected)], dtype=torch.float64)
        if len(path) - 1 == len(expected):
            rounded = karras and KNOWN[name].levels == "cut"
            assert (ours - expected).abs().max() < (0.51 if rounded else 0.02), steps
        else:  # their last step begins where it ends
            assert path[-1] == 0 and len(path) == len(expected) and expected[-1].round() == 0
        if hasattr(theirs, "sigmas") and name != "HeunDiscreteScheduler" and len(path) - 1 == len(expected):
            ours = torch.tensor([settings.schedule.sigma(t) for t in path])
            between = not karras and KNOWN[name].levels == "fractions" and spacing == "linspace"  # they draw a straight line there
            torch.testing.assert_close(ours, theirs.sigmas.float(), rtol=2e-2 if between else 1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("spacing, offset", [("leading", 1), ("trailing", 0)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_sampling_is_that_of_diffusers(name, spacing, offset, prediction_type):
    for steps in (4, 25):
        assert_same_samples(of(name, timestep_spacing=spacing, steps_offset=offset, prediction_type=prediction_type), steps)


@pytest.mark.parametrize("name", SAME)
def test_sampling_between_whole_timesteps(name):
    """Fractional timesteps: diffusers draws a straight line between two sigmas, we one between their logarithms."""
    if name != "DDIMScheduler":  # it steps to t - T // steps: another path than its own timesteps
        assert_same_samples(of(name, timestep_spacing="linspace"), 25, tolerance=2e-3)


@pytest.mark.parametrize("name", [name for name, known in SAME.items() if known.karras])
def test_sampling_on_karras_levels(name):
    class Timeless(Toy):  # diffusers' DPM-Solver tells the network rounded timesteps, with the exact levels
        def forward(self, x, timesteps):
            return super().forward(x, 0 * timesteps)

    for spacing in ("leading", "linspace"):
        assert_same_samples(of(name, timestep_spacing=spacing, steps_offset=1, use_karras_sigmas=True), 20, model=Timeless())


@pytest.mark.parametrize(
    "settings",
    [
        {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "steps_offset": 0},  # its last step begins and ends at 0
        {"_class_name": "DDIMScheduler", "set_alpha_to_one": True, "steps_offset": 1},
        {"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"},
        {"_class_name": "DPMSolverMultistepScheduler", "final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"},
        {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "linear", "timestep_spacing": "trailing"},
        {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
        {"_class_name": "DDPMScheduler", "trained_betas": np.linspace(1e-4, 0.05, 200).tolist(), "num_train_timesteps": 200},
        {"_class_name": "DDPMScheduler", "clip_sample": True, "clip_sample_range": 0.7},
        {"_class_name": "HeunDiscreteScheduler", "clip_sample": True, "timestep_spacing": "trailing"},
    ],
    ids=str,
)
def test_sampling_with_other_settings(settings):
    assert_same_samples(LATENT | {"clip_sample": False} | settings, 20)


def test_other_kinds_of_dpm_solver_are_replaced_with_a_note():
    settings = read_scheduler(of("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", solver_order=3))
    assert settings.sampler == "dpmpp_2m"
    assert settings.note.startswith(
        "DPMSolverMultistep with solver_order 3, algorithm_type sde-dpmsolver++ is not built here; dpmpp_2m takes"
    )
    assert read_scheduler(of("UniPCMultistepScheduler", solver_type="bh2")).note.startswith("UniPCMultistep is not built here; dpmpp_2m")


# --- back


def ways_to_save():
    for sampler in SAMPLERS:
        for spacing in SPACINGS:
            if spacing != "karras" or sampler in ("euler", "heun", "dpmpp_2m"):
                for end in (CLEAN, 0) if sampler in ("ddim", "euler", "dpmpp_2m") else (CLEAN,):
                    yield sampler, spacing, end


@pytest.mark.parametrize("sampler, spacing, end", list(ways_to_save()))
def test_what_we_write_opens_in_diffusers_and_reads_back(sampler, spacing, end, tmp_path):
    own = NoiseSchedule(torch.linspace(0.001, 0.03, 300, dtype=torch.float64))
    for i, schedule in enumerate([*map(NoiseSchedule, SCHEDULES), NoiseSchedule("cosine", 500), own]):
        clip = 1.0 if i == 1 and sampler in ("ddpm", "ddim", "heun") else None
        kind, offset = PREDICTION_TYPES[i % 3], int(spacing == "leading")
        config = scheduler_config(schedule, kind, sampler, spacing, offset=offset, end=end, clip=clip)
        (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
        scheduler = getattr(diffusers, config["_class_name"])
        assert set(config) - {"_class_name"} <= set(inspect.signature(scheduler.__init__).parameters)  # nothing that it would not know
        theirs = scheduler.from_pretrained(tmp_path)
        torch.testing.assert_close(theirs.betas, schedule.betas, rtol=1e-4, atol=1e-7)
        settings = read_scheduler(tmp_path)
        assert (settings.sampler, settings.prediction_type, settings.end, settings.clip, settings.note) == (sampler, kind, end, clip, "")
        assert settings.karras == (spacing == "karras") and settings.offset == offset
        torch.testing.assert_close(settings.schedule.betas, schedule.betas, rtol=1e-6, atol=0)
        theirs.set_timesteps(10)
        if spacing == "trailing":
            path = make_path(schedule, 10, spacing, end=end)
            assert settings.path(10) == path
            assert theirs.timesteps.unique().flip(0).tolist() == path[:-1]


def test_a_folder_that_diffusers_saved_again_reads_the_same(tmp_path):
    for config in (SD_21, SDXL, SD_21_DPM, SD_15):
        open_in_diffusers(config).save_config(tmp_path)
        again, first = read_scheduler(tmp_path), read_scheduler(config)
        assert again.path(30) == first.path(30) and again.sampler == first.sampler and again.note == first.note


# --- bad input


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "LCMScheduler", "", None, "DDIM"])
def test_unknown_class_lists_the_known(name):
    with pytest.raises(ValueError, match=r"Unknown scheduler .*; known are DDPMScheduler, DDIMScheduler, .*DEISMultistepScheduler\."):
        read_scheduler(of(name))
    with pytest.raises(ValueError, match="Unknown scheduler None"):
        read_scheduler({})


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True is not built here"),
        ({"thresholding": True}, "thresholding True is not built here"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas True is not built here"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas True is not built here"),
        ({"interpolation_type": "log_linear"}, "interpolation_type 'log_linear' is not built here; known is 'linear'"),
        ({"timestep_type": "continuous"}, "timestep_type 'continuous' is not built here"),
        ({"sigma_max": 700.0}, "sigma_max 700.0 is not built here"),
        ({"lambda_min_clipped": -5.1}, "lambda_min_clipped -5.1 is not built here"),
        ({"prediction_type": "flow_prediction"}, "'flow_prediction'; known are epsilon, sample, v_prediction"),
        ({"beta_schedule": "sigmoid"}, "'sigmoid'; known are linear, scaled_linear, squaredcos_cap_v2"),
        ({"timestep_spacing": "karras"}, "'karras'; known are leading, trailing, linspace"),
        ({"final_sigmas_type": "max"}, "'max'; known are zero, sigma_min"),
        ({"trained_betas": [0.1, 1.5]}, "betas must be"),
        ({"num_train_timesteps": 0}, "betas must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_are_not_built_here(settings, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        read_scheduler(of("EulerDiscreteScheduler") | settings)
    assert str(caught.value).count("\n") == 0 and str(caught.value).endswith(".")


def test_variance_that_is_not_built_here():
    with pytest.raises(ValueError, match="variance_type 'fixed_large' is not built here; known is 'fixed_small'"):
        read_scheduler(of("DDPMScheduler", variance_type="fixed_large"))


def test_bad_numbers_of_steps():
    settings = read_scheduler(SD_21_DPM)
    with pytest.raises(ValueError, match="at most 999 steps with linspace spacing, got 1000"):
        settings.path(1000)
    for scheduler in (settings, read_scheduler(SDXL), read_scheduler(of("EulerDiscreteScheduler", use_karras_sigmas=True))):
        for steps in (0, -3, 1001):
            with pytest.raises(ValueError, match=f"between 1 and the schedule's 1000, got {steps}"):
                scheduler.path(steps)


def test_folders_without_readable_settings(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no scheduler_config.json"):
        read_scheduler(tmp_path)
    for text in ("{", "[1, 2]", '"euler"', "3"):
        (tmp_path / "scheduler_config.json").write_text(text)
        with pytest.raises(ValueError, match="scheduler_config.json holds no settings in JSON"):
            read_scheduler(str(tmp_path))


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"sampler": "pndm"}, "'pndm'; known are ddpm, ddim"),
        ({"spacing": "uniform"}, "'uniform'; known are leading, trailing, linspace, karras"),
        ({"sampler": "ddim", "spacing": "karras"}, "DDIMScheduler 'karras'; known are leading, trailing, linspace"),
        ({"sampler": "ddpm", "end": 0}, "end for DDPMScheduler 0; known are -1"),
        ({"end": 500}, "end for DPMSolverMultistepScheduler 500; known are -1, 0"),
        ({"clip": 1.0}, "DPMSolverMultistepScheduler cannot clip; ddpm, ddim, heun can"),
        ({"prediction_type": "eps"}, "'eps'; known are epsilon"),
    ],
    ids=str,
)
def test_what_cannot_be_written(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        scheduler_config(NoiseSchedule(), **settings)
