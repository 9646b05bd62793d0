"""Every check of the project, one after the other (make test). All of them run, even after one failed; one summary at the end.

The last line is `N passed, N failed`: every pytest test counts as one, and so does each of the other checks.
"""

import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "test"
CELL_SECONDS = 600

PYTEST = ["-m", "pytest", "-q"]
STAGES = {
    "ruff check": ["-m", "ruff", "check", "."],
    "ruff format": ["-m", "ruff", "format", "--check", "."],
    "in sync": [*PYTEST, "tests/test_sync.py", "tests/test_environment.py"],
    "unit tests": [*PYTEST, "tests", *(f"--ignore=tests/test_{name}.py" for name in ("sync", "environment", "exercises"))],
    "lessons": [*PYTEST, "--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={CELL_SECONDS}", "lessons"],
    "exercises": [*PYTEST, "tests/test_exercises.py"],
}


@dataclass
class Result:
    """How one stage ended. `parts`: seconds for each file in it."""

    name: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    parts: dict[str, float]


def environment() -> dict[str, str]:
    """Variables that keep the tests offline, in fast mode, on two threads, and out of the home folder."""
    folders = {
        "MINISD_CACHE": "cache",
        "HF_HOME": "huggingface",
        "HF_DATASETS_CACHE": "huggingface/datasets",
        "MPLCONFIGDIR": "matplotlib",
        "IPYTHONDIR": "ipython",
        "JUPYTER_CONFIG_DIR": "jupyter/config",
        "JUPYTER_DATA_DIR": "jupyter/data",
        "JUPYTER_RUNTIME_DIR": "jupyter/runtime",
    }
    settings = {"MINISD_FAST": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "2"}
    return {**settings, **{name: str(BUILD / folder) for name, folder in folders.items()}}


def run(name: str, arguments: list[str]) -> Result:
    """Run one stage and read its counts from pytest's report; a check without a report counts as one test."""
    print(f"\n===== {name}: python {' '.join(arguments)}", flush=True)
    report = BUILD / f"{name.replace(' ', '_')}.xml"
    is_pytest = "pytest" in arguments
    command = [sys.executable, *arguments, *([f"--junitxml={report}"] if is_pytest else [])]
    start = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment()}, stdin=subprocess.DEVNULL).returncode
    seconds = time.perf_counter() - start
    if not is_pytest:
        return Result(name, int(code == 0), int(code != 0), 0, seconds, {})
    passed = failed = skipped = 0
    parts: dict[str, float] = defaultdict(float)
    if report.exists():
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            outcomes = {child.tag for child in case}
            failed += bool(outcomes & {"failure", "error"})
            skipped += outcomes & {"failure", "error", "skipped"} == {"skipped"}
            passed += not outcomes & {"failure", "error", "skipped"}
            parts[case.get("classname") or case.get("name")] += float(case.get("time") or 0)
    if code and not failed:
        failed = 1  # pytest itself stopped: nothing collected, or it crashed
    return Result(name, passed, failed, skipped, seconds, dict(parts))


def main() -> int:
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    results = [run(name, arguments) for name, arguments in STAGES.items()]

    print(f"\n{'stage':<28}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for result in results:
        print(f"{result.name:<28}{result.passed:>8}{result.failed:>8}{result.skipped:>9}{result.seconds:>9.1f}")
        if result.name in ("lessons", "exercises"):
            for part, seconds in result.parts.items():
                print(f"  {part:<51}{seconds:>9.1f}")
    counts = f"{sum(result.passed for result in results)} passed, {sum(result.failed for result in results)} failed"
    (BUILD / "summary.txt").write_text(counts + "\n")
    print(f"\n{counts}", flush=True)
    return 1 if any(result.failed for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
