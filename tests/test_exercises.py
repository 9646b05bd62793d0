"""Every exercise is sound, and the grading that an instructor does works from end to end."""

import json
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tools import exercises

ROOT = Path(__file__).resolve().parent.parent
ANSWER = "def double(x):\n    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION"
TEST = (
    "assert double(2) == 4, 'did you forget to double?'\n"
    "### BEGIN HIDDEN TESTS\nassert double(5) == 10, 'right for 2 alone: did you square?'\n### END HIDDEN TESTS"
)


@pytest.mark.parametrize("check", exercises.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", exercises.names())
def test_assignment(name, check):
    problems = check(name)
    assert not problems, "\n".join(problems)


def test_every_lesson_has_an_assignment_of_five_to_eight_exercises():
    assert exercises.names() == sorted(path.stem for path in (ROOT / "lessons").glob("*.ipynb"))
    released = sorted(path.name for path in (ROOT / "exercises" / "release").iterdir() if path.is_dir())
    assert released == exercises.names(), "run `make exercises`"
    for name in exercises.names():
        notebook = nbformat.read(ROOT / "exercises" / "source" / name / f"{name}.ipynb", as_version=4)
        assert 5 <= len(exercises.graded(notebook)) <= 8, name


def cell(source: str, grade_id: str, **mark) -> nbformat.NotebookNode:
    """A cell as nbgrader marks it."""
    mark = {"schema_version": 3, "grade_id": grade_id, "grade": False, "solution": False, "locked": False, "task": False, **mark}
    return new_code_cell(source, id=grade_id, metadata={"nbgrader": mark})


def course(folder: Path, answer: str = ANSWER, test: str = TEST, points: int = 2) -> Path:
    """A course with one assignment of one exercise, and its student version."""
    cells = [cell(answer, "ex1_answer", solution=True), cell(test, "ex1_test", grade=True, locked=True, points=points)]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3 (ipykernel)"}}
    (folder / "source" / "demo").mkdir(parents=True)
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder / "source" / "demo" / "demo.ipynb")
    exercises.write("demo", folder)
    return folder


def test_student_version_has_no_solution_and_is_the_same_each_time(tmp_path):
    folder = course(tmp_path)
    text = (folder / "release" / "demo" / "demo.ipynb").read_text()
    assert "return 2 * x" not in text and "square" not in text and "forget to double" in text
    assert exercises.outdated("demo", folder) == [] and not exercises.write("demo", folder)
    source = folder / "source" / "demo" / "demo.ipynb"
    source.write_text(source.read_text().replace("forget to double", "forget to"))
    (problem,) = exercises.outdated("demo", folder)
    assert "release/demo/demo.ipynb" in problem and "make exercises" in problem


def test_sound_exercise_has_nothing_to_report(tmp_path):
    folder = course(tmp_path)
    assert [check("demo", folder) for check in exercises.CHECKS] == [[], [], [], []]


def test_wrong_solution_and_test_that_tests_nothing_are_found(tmp_path):
    folder = course(tmp_path, answer=ANSWER.replace("2 * x", "x * x"), test=TEST.replace("double(2) == 4", "True"))
    (problem,) = exercises.solutions_fail("demo", folder)
    assert "'ex1_test'" in problem and "did you square" in problem
    (problem,) = exercises.blanks_pass("demo", folder)
    assert "'ex1_test' passes without an answer" in problem


def test_forgotten_marks_are_found(tmp_path):
    folder = course(tmp_path, test=TEST.split("\n")[0], points=0)
    problems = "\n".join(exercises.malformed("demo", folder))
    assert "'ex1_test' gives no points" in problems and "'ex1_test' has no hidden tests" in problems


@pytest.mark.filterwarnings("ignore:Object of type:sqlalchemy.exc.SAWarning")
def test_round_trip_of_an_instructor(tmp_path):
    """generate_assignment, two submissions (one right, one that only passes what it can see), autograde, generate_feedback."""
    folder = course(tmp_path)
    api = exercises.nbgrader(folder)
    assert api.generate_assignment("demo")["success"]
    for student, line in {"ada": "return x + x", "bob": "return x * x"}.items():
        notebook = nbformat.read(folder / "release" / "demo" / "demo.ipynb", as_version=4)
        notebook.cells[0].source = f"def double(x):\n    {line}"
        notebook.cells[1].source = "pass  # a student who edits the test"
        (folder / "submitted" / student / "demo").mkdir(parents=True)
        nbformat.write(notebook, folder / "submitted" / student / "demo" / "demo.ipynb")
        for step in (api.autograde, api.generate_feedback):
            result = step("demo", student)
            assert result["success"], json.dumps(result, indent=1)
    with api.gradebook as gradebook:
        scores = {each.student.id: each.score for each in gradebook.assignment_submissions("demo")}
    assert scores == {"ada": 2.0, "bob": 0.0}
    feedback = {student: (folder / "feedback" / student / "demo" / "demo.html").read_text() for student in scores}
    assert "right for 2 alone: did you square?" in feedback["bob"] and "AssertionError" in feedback["bob"]
    assert "AssertionError" not in feedback["ada"]
