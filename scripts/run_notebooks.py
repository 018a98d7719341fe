"""Executes every notebook, and fails if one of them does."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main() -> None:
    """Runs `notebooks/*.ipynb` from top to bottom, without saving the results."""
    for path in sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb")):
        print(f"{path.name} ...", flush=True)
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, kernel_name="python3").execute()


if __name__ == "__main__":
    main()
