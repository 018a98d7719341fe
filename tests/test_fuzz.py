"""A short run of `scripts/fuzz`, with the same structures every time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz.py"


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.exists(), reason="a source distribution has no scripts")
def test_random_solves_agree_with_diffrax(tmp_path):
    output = tmp_path / "summary.json"
    options = ["--solves", "100", "--draws", "50", "--seed", "2", "--output", output]
    command = [sys.executable, "-W", "ignore", SCRIPT, *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    summary = json.loads(output.read_text())
    assert summary["solves"] >= 100 and not summary["mismatches"]
    # Most were compared: they did not fail, and rounding changed no number of steps.
    assert summary["outcomes"]["same"] >= 80
