"""One form for every notebook in the repository, so that a diff shows what a person changed."""

import argparse
import copy
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
CELL_METADATA = ("nbgrader", "tags", "deletable", "editable", "jupyter", "slideshow")  # all other keys are left behind by editors


def tidy(notebook: nbformat.NotebookNode, outputs: bool = True) -> nbformat.NotebookNode:
    """A copy with only the metadata that means something; `outputs=False` also clears outputs and execution counts."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({key: value for key, value in cell.metadata.items() if key in CELL_METADATA})
        if cell.cell_type == "code" and not outputs:
            cell.outputs, cell.execution_count = [], None
    return notebook


def read(path: Path) -> nbformat.NotebookNode:
    """The notebook in a file, as nbformat 4."""
    return nbformat.read(path, as_version=4)


def text(notebook: nbformat.NotebookNode) -> str:
    """The notebook as it is written to its file: the same on every machine."""
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT).rstrip("\n") + "\n"


def write(notebook: nbformat.NotebookNode, path: Path) -> bool:
    """Write the notebook beside its place, then rename; returns whether the file changed."""
    new = text(notebook)
    if path.exists() and path.read_text(encoding="utf-8") == new:
        return False
    part = path.with_name(path.name + ".part")
    part.write_text(new, encoding="utf-8", newline="\n")
    os.replace(part, path)
    return True


def execute(
    notebook: nbformat.NotebookNode, folder: Path, fast: bool, allow_errors: bool = False, cell_seconds: int = 600
) -> nbformat.NotebookNode:
    """Run a copy top to bottom in a fresh kernel that works in `folder`; returns it with outputs.

    `fast`: whether the kernel has MINISD_FAST=1. `allow_errors`: go on after a cell that raises.
    Raises nbclient's CellExecutionError or CellTimeoutError otherwise.
    """
    notebook = copy.deepcopy(notebook)
    client = NotebookClient(
        notebook,
        timeout=cell_seconds,
        kernel_name="python3",
        allow_errors=allow_errors,
        store_widget_state=False,
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=40"],  # errors only
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env={**os.environ, "MINISD_FAST": "1" if fast else "0"})
    return notebook


def main() -> None:
    """Tidy every lesson, and every exercise source (those without outputs)."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()  # so that --help, or a mistake, changes nothing
    root = Path(__file__).resolve().parent.parent
    for path in [*sorted((root / "lessons").glob("*.ipynb")), *sorted((root / "exercises" / "source").glob("*/*.ipynb"))]:
        if write(tidy(read(path), outputs=path.parent.name == "lessons"), path):
            print(f"tidied {path.relative_to(root)}")


if __name__ == "__main__":
    main()
