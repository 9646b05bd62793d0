"""Scheduler settings in a diffusers folder (scheduler_config.json): read into what our samplers need, and written for diffusers to open."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minisd.noise import NoiseSchedule, check_prediction_type
from minisd.samplers import CLEAN, SAMPLERS, SPACINGS, karras_timesteps, make_path


class Known(NamedTuple):
    """A scheduler class of diffusers: which sampler of ours does the same, or takes its place, and which settings it reads."""

    sampler: str
    same: bool
    levels: str  # "whole" timesteps; "fractions" kept in linspace; "cut": one timestep more than asked for, the last dropped
    end: str  # the setting that says where the last step goes (one of ENDS)
    karras: bool = False  # whether it reads use_karras_sigmas
    defaults: Mapping[str, Any] = {}  # where they differ from DEFAULTS


PLAIN, STABLE = {"beta_start": 0.0001, "beta_end": 0.02}, {"beta_start": 0.00085, "beta_end": 0.012}
LEADING = {"timestep_spacing": "leading", "clip_sample": True}
KNOWN = {
    "DDPMScheduler": Known("ddpm", True, "whole", "", False, LEADING),
    "DDIMScheduler": Known("ddim", True, "whole", "set_alpha_to_one", False, LEADING),
    "EulerDiscreteScheduler": Known("euler", True, "fractions", "final_sigmas_type", True),
    "EulerAncestralDiscreteScheduler": Known("euler_ancestral", True, "fractions", ""),
    "HeunDiscreteScheduler": Known("heun", True, "fractions", "", True, STABLE),
    "DPMSolverMultistepScheduler": Known("dpmpp_2m", True, "cut", "final_sigmas_type", True),
    "PNDMScheduler": Known("dpmpp_2m", False, "whole", "set_alpha_to_one", False, LEADING | {"set_alpha_to_one": False}),
    "LMSDiscreteScheduler": Known("dpmpp_2m", False, "fractions", "", True),
    "UniPCMultistepScheduler": Known("dpmpp_2m", False, "cut", "final_sigmas_type", True),
    "DEISMultistepScheduler": Known("dpmpp_2m", False, "cut", "final_sigmas_type", True, {"final_sigmas_type": "sigma_min"}),
}
DEFAULTS = PLAIN | {"num_train_timesteps": 1000, "beta_schedule": "linear", "trained_betas": None, "prediction_type": "epsilon"}
DEFAULTS |= {"timestep_spacing": "linspace", "steps_offset": 0, "use_karras_sigmas": False, "set_alpha_to_one": True}
DEFAULTS |= {"final_sigmas_type": "zero", "clip_sample": False, "clip_sample_range": 1.0}
ENDS = {"": {None: CLEAN}, "set_alpha_to_one": {True: CLEAN, False: 0}, "final_sigmas_type": {"zero": CLEAN, "sigma_min": 0}}
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
CLIPPING = ("ddpm", "ddim", "heun")  # whose classes read clip_sample
# Settings that are not built here, with the values that leave them off; those that make the DPM-Solver another than dpmpp_2m.
OFF = dict.fromkeys(["rescale_betas_zero_snr", "thresholding", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"], False)
OFF |= {"use_flow_sigmas": False, "interpolation_type": "linear", "timestep_type": "discrete", "lambda_min_clipped": -math.inf}
OFF |= {"sigma_min": None, "sigma_max": None}
SOLVER = {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"}


@dataclass(frozen=True)
class SchedulerSettings:
    """How a model is sampled, in our words: `sample(denoiser, shape, settings.sampler, timesteps=settings.path(25))`.

    `clip`: for `Denoiser`. `karras`: Karras levels, between the first and the last timestep of `spacing`. `levels`: see `Known`.
    `note`: one sentence where our sampler stands in for another, else "".
    """

    schedule: NoiseSchedule
    prediction_type: str
    sampler: str
    spacing: str
    offset: int
    end: int
    clip: float | None
    karras: bool
    levels: str
    note: str

    def path(self, steps: int) -> list[float]:
        """The timesteps that diffusers takes in `steps` steps, then `end`; a level that is `end` already needs no step and is left out."""
        total = self.schedule.num_timesteps
        if self.levels == "cut" and self.spacing != "trailing" and steps == total:
            raise ValueError(f"this scheduler takes at most {total - 1} steps with {self.spacing} spacing, got {steps}.")
        timesteps = make_path(self.schedule, steps, self.spacing, self.offset)[:-1]
        if self.karras and self.levels == "cut":
            timesteps = karras_timesteps(self.schedule, steps)
        elif self.karras:  # on a schedule that has only the levels from the first to the last
            signals = 1 / (1 + self.schedule.sigmas[timesteps[-1] : timesteps[0] + 1] ** 2)
            part = NoiseSchedule(1 - signals / torch.cat([signals.new_ones(1), signals[:-1]]))
            timesteps = [timesteps[-1] + t for t in karras_timesteps(part, steps)]
        elif self.levels == "fractions" and self.spacing == "linspace":
            timesteps = torch.linspace(total - 1, 0, steps, dtype=torch.float64).tolist()
        elif self.levels == "cut" and self.spacing != "trailing":
            timesteps = make_path(self.schedule, steps + 1, self.spacing, self.offset)[:-2]
        return [t for t in timesteps if t > self.end + 1e-6] + [self.end]


def read_scheduler(folder_or_config: str | Path | Mapping[str, Any]) -> SchedulerSettings:
    """Read a folder that holds scheduler_config.json, or that file's contents as a dict; absent settings get the defaults of diffusers.

    Raises `FileNotFoundError` without such a file, `ValueError` for a class or a setting that is not built here.
    """
    given = folder_or_config if isinstance(folder_or_config, Mapping) else read_json(Path(folder_or_config))
    name = given.get("_class_name")
    known = KNOWN[one_of("scheduler", name, KNOWN)]
    config = DEFAULTS | known.defaults | {key: value for key, value in given.items() if value is not None}
    off = OFF | ({"variance_type": "fixed_small"} if name == "DDPMScheduler" else {})
    for key in off:
        if config.get(key, off[key]) != off[key]:
            raise ValueError(f"{name} with {key} {config[key]!r} is not built here; known is {off[key]!r}.")
    check_prediction_type(config["prediction_type"])
    other = [f"{key} {config[key]}" for key, same in SOLVER.items() if known.same and config.get(key, same) != same]
    called = name.removesuffix("Scheduler") + (f" with {', '.join(other)}" if other else "")
    return SchedulerSettings(
        schedule=read_schedule(config),
        prediction_type=config["prediction_type"],
        sampler=known.sampler,
        spacing=one_of("timestep_spacing", config["timestep_spacing"], ("leading", "trailing", "linspace")),
        offset=config["steps_offset"],
        end=ENDS[known.end][one_of(known.end, config.get(known.end), ENDS[known.end])],
        clip=config["clip_sample_range"] if known.sampler in CLIPPING and config["clip_sample"] else None,
        karras=known.karras and config["use_karras_sigmas"],
        levels=known.levels,
        note=""
        if known.same and not other
        else f"{called} is not built here; {known.sampler} takes its place, with the same noise levels.",
    )


def one_of(what: str, value: Any, known: Iterable[Any]) -> Any:
    """`value`, if it is one of `known`; raises `ValueError` that lists them."""
    if value not in known:
        raise ValueError(f"Unknown {what} {value!r}; known are {', '.join(map(str, known))}.")
    return value


def read_json(folder: Path) -> dict[str, Any]:
    """The contents of `folder`/scheduler_config.json."""
    path = folder / "scheduler_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no scheduler in {str(folder)!r}: it has no scheduler_config.json.")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder.name}/scheduler_config.json holds no settings in JSON: {error}.") from error


def read_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """The noise schedule of a complete config, made in float64."""
    if config["trained_betas"] is not None:
        return NoiseSchedule(torch.tensor(config["trained_betas"], dtype=torch.float64))
    name, total = one_of("beta_schedule", config["beta_schedule"], BETA_SCHEDULES.values()), config["num_train_timesteps"]
    if name == "squaredcos_cap_v2":
        return NoiseSchedule("cosine", total)
    power = 2 if name == "scaled_linear" else 1
    start, end = config["beta_start"] ** (1 / power), config["beta_end"] ** (1 / power)
    return NoiseSchedule(torch.linspace(start, end, total, dtype=torch.float64) ** power)


def scheduler_config(
    schedule: NoiseSchedule,
    prediction_type: str = "epsilon",
    sampler: str = "dpmpp_2m",
    spacing: str = "trailing",
    offset: int = 0,
    end: int = CLEAN,
    clip: float | None = None,
) -> dict[str, Any]:
    """What scheduler_config.json must say for diffusers to walk `make_path(schedule, steps, spacing, offset, end)` with `sampler`.

    The timesteps are equal for "trailing"; else its DPM-Solver divides finer, its linspace keeps fractions for Euler and Heun, and its
    Karras levels begin at the schedule's largest, however large. Offsets are for "leading".
    Raises `ValueError` for what diffusers cannot say.
    """
    check_prediction_type(prediction_type)
    one_of("sampler", sampler, SAMPLERS)
    name, known = next((name, known) for name, known in KNOWN.items() if known.same and known.sampler == sampler)
    one_of(f"spacing for {name}", spacing, SPACINGS if known.karras else [each for each in SPACINGS if each != "karras"])
    one_of(f"end for {name}", end, ENDS[known.end].values())
    if clip is not None and sampler not in CLIPPING:
        raise ValueError(f"{name} cannot clip; {', '.join(CLIPPING)} can.")
    betas = schedule.betas.cpu()
    config = {"_class_name": name, "num_train_timesteps": len(betas), "prediction_type": prediction_type, "steps_offset": offset}
    config |= {"trained_betas": betas.tolist()}
    for ours, theirs in BETA_SCHEDULES.items():
        if torch.equal(NoiseSchedule(ours, len(betas)).betas, betas):
            config |= {"beta_schedule": theirs, "trained_betas": None} | (STABLE if ours == "scaled_linear" else PLAIN)
    config |= {"timestep_spacing": "linspace", "use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    if known.end:
        config[known.end] = next(value for value, where in ENDS[known.end].items() if where == end)
    if sampler in CLIPPING:
        config |= {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    return config
