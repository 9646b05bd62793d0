"""The lessons as they are stored: outputs of one clean run, links that lead somewhere, a size that a laptop downloads."""

import re
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tools import notebooks, run_lessons

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "lessons").glob("*.ipynb"))
SOURCES = sorted((ROOT / "exercises" / "source").glob("*/*.ipynb"))


def by_name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("path", LESSONS, ids=by_name)
def test_outputs_come_from_one_clean_run(path):
    notebook = notebooks.read(path)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), f"run it again: make course LESSONS={path.stem}"
    assert run_lessons.faults(notebook) == []
    assert not [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "error"]


@pytest.mark.parametrize("path", [*LESSONS, *SOURCES], ids=by_name)
def test_notebook_is_in_the_form_of_the_repository(path):
    tidy = notebooks.text(notebooks.tidy(notebooks.read(path), outputs=path in LESSONS))
    same = path.read_text(encoding="utf-8") == tidy  # outside the assert: pytest would print both notebooks
    assert same, "run `make format`"


@pytest.mark.parametrize("path", [ROOT / "README.md", *LESSONS, *SOURCES], ids=by_name)
def test_local_links_lead_somewhere(path):
    if path.suffix == ".md":
        text = path.read_text(encoding="utf-8")
    else:
        text = "\n\n".join(cell.source for cell in notebooks.read(path).cells if cell.cell_type == "markdown")
    text = re.sub(r"```.*?```|`[^`\n]+`|\$\$.*?\$\$|\$[^$\n]+\$", "", text, flags=re.DOTALL)  # code and formulas hold no links
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"#]+)', text)
    assert [link for link in links if not re.match(r"[a-z]+:", link) and not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", LESSONS, ids=by_name)
def test_lesson_opens_and_closes_as_all_do(path):
    cells = notebooks.read(path).cells
    first = cells[0].source
    assert re.match(rf"# {path.stem[:2]} · \S", first), f"the first cell starts with {first.splitlines()[0]!r}"
    assert "TIME_FULL" not in first
    for words in ("**You build**", "**You need**", "**Time**", "**At the end you can**"):
        assert words in first, f"the first cell has no {words}"
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for heading in ("## Exercises", "## Recap", "## Papers"):
        assert heading in text.splitlines(), f"no section {heading}"


def test_widgets_are_left_out_and_printed_text_is_joined():
    widget = new_output("display_data", {run_lessons.WIDGET: {}, "text/plain": "0%"})
    cell = new_code_cell("1", outputs=[new_output("stream", text="a"), widget, new_output("stream", text="b")], execution_count=7)
    stored = run_lessons.strip(new_notebook(cells=[cell])).cells[0]
    assert [output.text for output in stored.outputs] == ["ab"] and stored.execution_count == 1


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        (new_output("stream", name="stderr", text="UserWarning: careful"), "writes to stderr: UserWarning"),
        (new_output("stream", text=f"saved {ROOT}/x.png"), "a path"),
        (new_output("error", ename="E", evalue="", traceback=[f"File {Path.home()}/x.py"]), "a path"),
        (new_output("display_data", {"image/png": "A" * 1_600_000}), "MB"),
    ],
)
def test_outputs_that_do_not_belong_in_the_repository_are_found(output, complaint):
    (fault,) = run_lessons.faults(new_notebook(cells=[new_code_cell("1", outputs=[output])]))
    assert complaint in fault
