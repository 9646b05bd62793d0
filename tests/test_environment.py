"""pyproject.toml, environment.yml and requirements.lock say the same."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))

# What `make` may meet: the lock has to hold on each of them.
PLATFORMS = [("linux", "Linux", "x86_64", "posix"), ("darwin", "Darwin", "arm64", "posix"), ("win32", "Windows", "AMD64", "nt")]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def ranges(lines: list[str]) -> dict[str, tuple[SpecifierSet, str]]:
    """Requirement lines as name -> (range, marker)."""
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(each.name): (each.specifier, str(each.marker or "")) for each in parsed}


def declared(*extras: str) -> list[str]:
    """The requirement lines of pyproject.toml, with those of some extras."""
    return PROJECT["project"]["dependencies"] + [line for extra in extras for line in PROJECT["project"]["optional-dependencies"][extra]]


def locked(python: str, platform: tuple[str, str, str, str]) -> dict[str, str]:
    """What the lock installs there: name -> version."""
    system, name, machine, os_name = platform
    place = {"python_version": python, "python_full_version": f"{python}.5", "sys_platform": system, "platform_system": name}
    place |= {
        "platform_machine": machine,
        "os_name": os_name,
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    found: dict[str, str] = {}
    for line in LOCK.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            each = Requirement(line)
            if each.marker is None or each.marker.evaluate(place):
                name = canonicalize_name(each.name)
                assert name not in found, f"the lock pins {name} twice on Python {python}, {system}"
                found[name] = re.fullmatch(r"==([\w.+!]+)", str(each.specifier)).group(1)
    return found


def test_conda_environment_says_the_same_as_pyproject():
    pip = next(entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict))
    assert "-e ." in pip
    assert ranges([line for line in pip if not line.startswith("-")]) == ranges(declared("lab", "test"))
    assert CONDA["channels"] == ["conda-forge"]


def test_conda_python_is_one_that_the_package_takes():
    (python,) = (entry.split("=")[1] for entry in CONDA["dependencies"] if isinstance(entry, str) and entry.startswith("python="))
    assert python in SpecifierSet(PROJECT["project"]["requires-python"])


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda platform: platform[0])
@pytest.mark.parametrize("python", PYTHONS)
def test_lock_holds_every_dependency_within_its_range(python, platform):
    pins = locked(python, platform)
    for name, (specifier, marker) in ranges(declared("lab", "test")).items():
        if marker and python != "3.10":
            continue
        assert name in pins, f"requirements.lock has no {name}; run `make lock`"
        assert specifier.contains(pins[name], prereleases=True), f"requirements.lock has {name} {pins[name]}, pyproject.toml {specifier}"


def test_lock_has_the_matching_pair_and_the_build_backend():
    pins = locked("3.11", PLATFORMS[0])
    for line in PROJECT["tool"]["uv"]["constraint-dependencies"]:
        each = Requirement(line)
        assert each.specifier.contains(pins[each.name])
    for line in PROJECT["build-system"]["requires"]:  # `make` builds without isolation, so that it downloads nothing more
        each = Requirement(line)
        assert each.specifier.contains(pins[each.name])


def test_lock_names_no_index_no_host_and_no_path():
    assert not re.search(
        r"://|^\s*-|\s@\s|/", "\n".join(line for line in LOCK.splitlines() if not line.startswith("#")), flags=re.MULTILINE
    )
