"""Run the lessons from their first cell to their last, for real, and store their outputs in place.

    python tools/run_lessons.py [NAME ...] [--cell-seconds N] [--dry-run]    (make course)

Each lesson runs in a fresh kernel, in order. It is stored only if no cell raised, none wrote to stderr, and no output names
a path of this machine. Progress bars and other widgets, which cannot be shown again, are left out. Ends with a table of the times.
"""

import argparse
import base64
import io
import os
import re
import sys
import time
from pathlib import Path

import matplotlib.font_manager  # noqa: F401  (builds matplotlib's font cache here; in a lesson it would write to stderr)
import nbformat
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs as a script too
from minisd.utils import processor_name
from tools import notebooks

ROOT = Path(__file__).resolve().parent.parent
LESSONS = ROOT / "lessons"
MOST_BYTES = 1_500_000
WIDGET = "application/vnd.jupyter.widget-view+json"


def smaller(png: str) -> str:
    """A figure (base64) with a palette of 256 colours, a third of the bytes; as it was where that does not help."""
    data = base64.b64decode(png)
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(file, format="PNG", optimize=True)
    return base64.b64encode(min(data, file.getvalue(), key=len)).decode()


def strip(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The executed notebook as it is stored: no widgets, no addresses of objects, pieces of text joined, counts 1..n, small figures."""
    notebook = notebooks.tidy(notebook)
    for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.execution_count = count
        kept: list[nbformat.NotebookNode] = []
        for output in cell.outputs:
            if WIDGET in output.get("data", {}):
                continue
            if output.output_type == "execute_result":
                output.execution_count = count
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
            if output.output_type == "stream" and kept and kept[-1].output_type == "stream" and kept[-1].name == output.name:
                kept[-1].text += output.text
            else:
                kept.append(output)
        cell.outputs = kept
    return notebook


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """What keeps an executed notebook from being stored."""
    private = re.compile("|".join(re.escape(str(path)) for path in {ROOT, Path.home(), Path(sys.prefix)}))
    found = []
    for number, cell in enumerate(notebook.cells, start=1):
        for output in cell.get("outputs", []):
            data = [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
            words = "\n".join([output.get("text", ""), *output.get("traceback", []), *data])
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"cell {number} writes to stderr: {output.text.strip()[:300]}")
            elif match := private.search(words):
                found.append(f"cell {number} shows a path or name of this machine: {match.group()}")
    size = len(notebooks.text(notebook).encode())
    if size > MOST_BYTES:
        found.append(f"it takes {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6} MB; use fewer or smaller figures")
    return found


def processor() -> str:
    """What this machine calls its processor, and how many cores there are to use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor_name()}, {cores} cores"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="lessons, for example 01_noise; all of them without")
    parser.add_argument("--cell-seconds", type=int, default=1800, help="the most that one cell may take (default 1800)")
    parser.add_argument("--dry-run", action="store_true", help="run and report, store nothing")
    options = parser.parse_args()
    known = {path.stem: path for path in sorted(LESSONS.glob("*.ipynb"))}
    chosen = [Path(name).stem for name in options.names] or list(known)
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"no such lesson: {', '.join(unknown)}; there are {', '.join(known) or 'none'}")
    fast = os.environ.get("MINISD_FAST") == "1"
    if fast and not options.dry_run:
        parser.error("MINISD_FAST=1 is set; stored outputs come from full runs. Unset it, or add --dry-run.")

    rows, failed = [], False
    for name in chosen:
        print(f"{name} ...", flush=True)
        start, problems, notebook = time.perf_counter(), [], None
        try:
            notebook = strip(notebooks.execute(notebooks.read(known[name]), LESSONS, fast=fast, cell_seconds=options.cell_seconds))
            problems = faults(notebook)
        except (CellExecutionError, CellTimeoutError) as error:
            problems = [str(error).strip()[-3000:]]
        seconds = time.perf_counter() - start
        if not problems and not options.dry_run:
            notebooks.write(notebook, known[name])
        for problem in problems:
            print(f"  {name}: {problem}", file=sys.stderr, flush=True)
        failed = failed or bool(problems)
        size = f"{len(notebooks.text(notebook).encode()) / 1000:.0f} kB" if notebook else ""
        minutes = f"{int(seconds) // 60}:{int(seconds) % 60:02} min"
        rows.append((name, minutes, size, "failed, not stored" if problems else "run" if options.dry_run else "stored"))

    print(f"\n{'lesson':<24}{'time':>10}{'size':>10}  result    ({processor()})")
    for name, minutes, size, result in rows:
        print(f"{name:<24}{minutes:>10}{size:>10}  {result}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
