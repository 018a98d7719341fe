"""Executes every notebook, and fails if one of them does."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path) -> None:
    """Runs a notebook from top to bottom, without saving the results."""
    start, notebook = time.monotonic(), nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    """Executes `notebooks/*.ipynb`, two at a time: each keeps about one core busy."""
    paths = Path(__file__).parents[1].glob("notebooks/*.ipynb")
    with ThreadPoolExecutor(2) as pool:
        # The two longest are the last by name: if they started last, one core would
        # wait. Reading the results raises the error of a notebook.
        list(pool.map(execute, sorted(paths, reverse=True)))


if __name__ == "__main__":
    main()
