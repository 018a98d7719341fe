"""What the site has in addition to its pages: notebooks, numbers, links, signatures.

MkDocs calls the functions whose names begin with `on_`, and mkdocstrings the extension.
"""

import inspect
import re
import sys
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

import nodegrad


ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import benchmark_tables


_PUBLIC = [name for name in dir(nodegrad) if not name.startswith("_")]
_CODE_OR_NAME = re.compile(
    rf"^ *```.*?^ *```|(?<!\[)`nodegrad\.({'|'.join(_PUBLIC)})`", re.M | re.S
)


def linked(markdown: str) -> str:
    """`markdown` with a link from every public name in backticks to its reference."""

    def replacement(match: re.Match) -> str:
        # Code blocks match as well, and stay as they are.
        name = match[1]
        return match[0] if name is None else f"[`nodegrad.{name}`][nodegrad.{name}]"

    return _CODE_OR_NAME.sub(replacement, markdown)


@event_priority(100)  # Before mkdocs-jupyter looks for notebooks.
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the notebooks, which are not in the folder of the documentation."""
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """Fills in tables of results, and links names to the reference."""
    del kwargs
    # Links are those of the repository, where notebooks have a folder of their own.
    markdown = markdown.replace("](../notebooks/", "](notebooks/")
    # Most pages show no table.
    if "{{ " in markdown:
        results = benchmark_tables.load()
        tables, rates = benchmark_tables.tables(results), benchmark_tables.error_rates()
        markdown = markdown.replace("{{ tables }}", tables)
        markdown = markdown.replace("{{ error_rates }}", rates)
        markdown = benchmark_tables.filled(markdown, results)
    return linked(markdown)


class PublicObjects(griffe.Extension):
    """Completes what griffe reads from the source: links, generated signatures."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        """Visits every public object."""
        del kwargs
        for name in _PUBLIC:
            thing = pkg[name]
            thing = thing.final_target if thing.is_alias else thing
            if thing.docstring is not None:
                thing.docstring.value = linked(thing.docstring.value)
            if isinstance(thing, griffe.Class) and "__init__" not in thing.members:
                _add_signature(thing, getattr(nodegrad, name))
            if isinstance(thing, griffe.Function):
                _write_out_defaults(thing)


def _add_signature(cls: griffe.Class, runtime: type) -> None:
    """Gives `cls` the `__init__` that Equinox or `NamedTuple` makes of its fields."""
    found = inspect.signature(runtime).parameters.values()
    if not found:
        return
    kind = griffe.ParameterKind.positional_or_keyword
    parameters = [griffe.Parameter("self", kind=kind)]
    for parameter in found:
        has_default = parameter.default is not parameter.empty
        default = repr(parameter.default) if has_default else None
        parameters.append(griffe.Parameter(parameter.name, kind=kind, default=default))
    init = griffe.Function("__init__", parameters=griffe.Parameters(*parameters))
    cls.set_member("__init__", init)


def _write_out_defaults(function: griffe.Function) -> None:
    """Replaces the names of private constants by what these are."""
    constants = function.module.members
    for parameter in function.parameters:
        default = str(parameter.default)
        if default.startswith("_") and default in constants:
            parameter.default = str(constants[default].value)
