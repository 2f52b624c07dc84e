"""Runs a notebook from the top and keeps its outputs: python tools/run_notebook.py FILE."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

LARGEST = 200_000
"""Bytes of a notebook with its outputs."""


def main(file: str) -> int:
    """Execute in an empty folder; 1 if the file has become too large to keep."""
    path = Path(file)
    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONWARNINGS"] = "ignore"  # of libraries about each other
    os.environ["PYTHONPATH"] = str(path.parent.resolve())
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}})
        client.execute()
    for cell in notebook.cells:  # what differs from run to run is not kept
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)
    size = path.stat().st_size
    if size > LARGEST:
        print(f"{path}: {size} bytes, at most {LARGEST}", file=sys.stderr)
    return int(size > LARGEST)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
