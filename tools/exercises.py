"""The exercises: student versions made from the sources by nbgrader, and the proof that both are sound.

python tools/exercises.py generate [NAME ...]    write exercises/release/ (make exercises)
python tools/exercises.py check [NAME ...]       the student version is up to date, every solution passes, every blank fails
"""

import argparse
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import nbformat
from nbclient.exceptions import CellTimeoutError
from nbgrader.apps import NbGraderAPI
from nbgrader.coursedir import CourseDirectory
from traitlets.config import PyFileConfigLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs as a script too
from tools import notebooks

ROOT = Path(__file__).resolve().parent.parent
COURSE = ROOT / "exercises"


class GenerateError(Exception):
    """nbgrader refused a source notebook; the message holds its log."""


def names(course: Path = COURSE) -> list[str]:
    """The assignments, in order: one folder each in source/, with a notebook of the same name."""
    return sorted(path.parent.name for path in (course / "source").glob("*/*.ipynb") if path.stem == path.parent.name)


def nbgrader(course: Path) -> NbGraderAPI:
    """nbgrader on the course in a folder, with the settings of this course and the gradebook in that folder."""
    scripts = sysconfig.get_path("scripts")  # nbgrader calls `alembic` by its bare name
    if scripts not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = scripts + os.pathsep + os.environ["PATH"]
    config = PyFileConfigLoader("nbgrader_config.py", path=str(COURSE)).load_config()
    config.CourseDirectory.root = str(course)
    config.CourseDirectory.db_url = f"sqlite:///{course / 'gradebook.db'}"
    return NbGraderAPI(CourseDirectory(config=config), config=config)


def generate(name: str, course: Path = COURSE) -> dict[Path, bytes]:
    """The student version of an assignment: file (relative to its folder) to content. Nothing is written under `course`."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        shutil.copytree(course / "source" / name, work / "source" / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        api = nbgrader(work)
        api.config.GenerateAssignment.no_database = True  # the files are all that is wanted, and the database takes seconds
        api.config.SaveCells.enabled = False
        result = api.generate_assignment(name)
        if not result["success"]:
            raise GenerateError(f"nbgrader cannot make the student version of {name}:\n{result.get('log') or result.get('error')}")
        release = work / "release" / name
        for path in release.rglob("*.ipynb"):
            path.write_text(notebooks.text(notebooks.tidy(notebooks.read(path), outputs=False)), encoding="utf-8", newline="\n")
        return {path.relative_to(release): path.read_bytes() for path in sorted(release.rglob("*")) if path.is_file()}


def present(name: str, course: Path = COURSE) -> dict[Path, bytes]:
    """The student version of an assignment as it is now: file (relative to its folder) to content."""
    folder = course / "release" / name
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path: content for path, content in files.items() if ".ipynb_checkpoints" not in path.parts}


def write(name: str, course: Path = COURSE) -> bool:
    """Bring release/NAME up to date; returns whether anything changed."""
    wanted, folder = generate(name, course), course / "release" / name
    if wanted == present(name, course):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in wanted.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return True


def outdated(name: str, course: Path = COURSE) -> list[str]:
    """The files of release/NAME that differ from what nbgrader makes of the source now."""
    try:
        wanted, there = generate(name, course), present(name, course)
    except GenerateError as error:
        return [str(error)]
    return [
        f"exercises/release/{name}/{path.as_posix()} is not what nbgrader makes of its source; `make exercises` writes it again."
        for path in sorted(wanted.keys() | there.keys())
        if wanted.get(path) != there.get(path)
    ]


def graded(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells that nbgrader grades by running them."""
    marks = [(cell, cell.metadata.get("nbgrader", {})) for cell in notebook.cells]
    return [cell for cell, mark in marks if cell.cell_type == "code" and mark.get("grade") and not mark.get("solution")]


def malformed(name: str, course: Path = COURSE) -> list[str]:
    """What is wrong with the source of an assignment before it is run."""
    notebook = notebooks.read(course / "source" / name / f"{name}.ipynb")
    problems, seen = [], set()
    for cell in notebook.cells:
        mark = cell.metadata.get("nbgrader", {})
        if "BEGIN SOLUTION" in cell.source and not mark.get("solution"):
            problems.append(f"a cell holds a solution and is not marked as one: {cell.source[:60]!r}")
        if "BEGIN HIDDEN TESTS" in cell.source and not mark.get("grade"):
            problems.append(f"a cell holds hidden tests and is not graded: {cell.source[:60]!r}")
        if mark.get("solution") and "BEGIN SOLUTION" not in cell.source:
            problems.append(f"solution cell {mark['grade_id']!r} has no ### BEGIN SOLUTION, so nbgrader would blank all of it")
        if mark.get("solution") or mark.get("grade"):
            if mark["grade_id"] in seen:
                problems.append(f"grade_id {mark['grade_id']!r} is used twice")
            seen.add(mark["grade_id"])
    for cell in graded(notebook):
        mark = cell.metadata.nbgrader
        if not mark.get("points"):
            problems.append(f"test cell {mark['grade_id']!r} gives no points")
        if "### BEGIN HIDDEN TESTS" not in cell.source:
            problems.append(f"test cell {mark['grade_id']!r} has no hidden tests")
        if not mark.get("locked"):
            problems.append(f"test cell {mark['grade_id']!r} is not locked")
    if not graded(notebook):
        problems.append("no cell is graded")
    return [f"exercises/source/{name}: {problem}." for problem in problems]


def failure(cell: nbformat.NotebookNode) -> str | None:
    """The error a cell ended with, in one line, or None."""
    errors = [f"{output.ename}: {output.evalue}" for output in cell.get("outputs", []) if output.output_type == "error"]
    return errors[0].strip().splitlines()[0] if errors else None


def solutions_fail(name: str, course: Path = COURSE) -> list[str]:
    """The cells of the source that raise; empty when every solution passes every test."""
    folder = course / "source" / name
    try:
        done = notebooks.execute(notebooks.read(folder / f"{name}.ipynb"), folder, fast=True, allow_errors=True, cell_seconds=180)
    except CellTimeoutError as error:
        return [f"exercises/source/{name}: a cell takes more than 180 s: {str(error).splitlines()[0]}"]
    failures = [(cell, failure(cell)) for cell in done.cells if cell.cell_type == "code"]
    return [f"exercises/source/{name}, cell {label(cell)}: {error}" for cell, error in failures if error]


def blanks_pass(name: str, course: Path = COURSE) -> list[str]:
    """The tests of the untouched student version that do not fail; empty when every one fails."""
    folder = course / "release" / name
    try:
        done = notebooks.execute(notebooks.read(folder / f"{name}.ipynb"), folder, fast=True, allow_errors=True, cell_seconds=180)
    except CellTimeoutError as error:
        return [f"exercises/release/{name}: a cell takes more than 180 s: {str(error).splitlines()[0]}"]
    return [f"exercises/release/{name}, test {label(cell)} passes without an answer." for cell in graded(done) if not failure(cell)]


def label(cell: nbformat.NotebookNode) -> str:
    """A name for a cell: its grade_id, or its first words."""
    return repr(cell.metadata.get("nbgrader", {}).get("grade_id") or cell.source.strip()[:50])


CHECKS = (malformed, outdated, solutions_fail, blanks_pass)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["generate", "check"])
    parser.add_argument("names", nargs="*", metavar="NAME", help="assignments, for example 01_noise; all of them without")
    options = parser.parse_args()
    chosen = [Path(name).stem for name in options.names] or names()
    if unknown := sorted(set(chosen) - set(names())):
        parser.error(f"no such assignment: {', '.join(unknown)}; there are {', '.join(names()) or 'none'}")
    problems = []
    if options.action == "generate":
        for name in chosen:
            try:
                print(f"{name}: {'written' if write(name) else 'was up to date'}")
            except GenerateError as error:
                problems.append(str(error))
        if not options.names:
            for folder in sorted((COURSE / "release").glob("*")):
                if folder.is_dir() and folder.name not in chosen:
                    shutil.rmtree(folder)
                    print(f"{folder.name}: deleted, it has no source any more")
    else:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        for name in chosen:
            for check in CHECKS:
                found = check(name)
                print(f"{name:<24} {check.__name__:<16} {'ok' if not found else len(found)}", flush=True)
                problems += found
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
