"""The README's examples run, and print what it says."""

import pathlib
import re

import jax
import pytest


README = pathlib.Path(__file__).parents[1] / "README.md"
EXAMPLES = [
    code
    for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    if code.startswith("import")
]


@pytest.mark.slow
@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_prints_what_it_says(code, capsys):
    promised = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    # As a user runs it: with JAX's usual rules of promotion.
    with jax.numpy_dtype_promotion("standard"):
        exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(promised) > 0
    for said, got in zip(promised, printed, strict=True):
        if said != "the same":
            number = said
        assert abs(float(got) - float(number)) < 1e-8
