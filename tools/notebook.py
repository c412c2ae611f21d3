# SPDX-License-Identifier: Apache-2.0
"""Run a notebook and store its outputs: `python tools/notebook.py notebooks/quickstart.ipynb`, as `make notebook` does.

Other than `jupyter execute`, it joins the pieces in which a stream arrives, stores no times, and refuses outputs that
name a path of this machine.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


def execute(path: Path) -> None:
    """Run all cells in the notebook's folder. SystemExit if an output names a path; the file is then unchanged."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of an earlier run
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, record_timing=False, resources=place).execute()
    for cell in notebook.cells:
        outputs: list = []
        for output in cell.get("outputs", ()):
            if outputs and output.output_type == "stream" and outputs[-1].get("name") == output.name:
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        if cell.cell_type == "code":
            cell.outputs = outputs
        for output in outputs:
            for root in (str(ROOT), sys.prefix, sys.base_prefix):
                if root in output.get("text", ""):
                    raise SystemExit(f"{path}: cell {cell.execution_count} prints {root}, a path of this machine")
    nbformat.write(notebook, path)


if __name__ == "__main__":
    execute(Path(sys.argv[1]))
