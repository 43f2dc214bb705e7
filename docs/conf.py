"""Sphinx configuration. Nothing is fetched while building, and a warning is an error (`make docs`)."""

import re
import sys
from typing import Any

import attnkit

project = "attnkit"
author = "the attnkit authors"
project_copyright = "the attnkit authors, Apache-2.0"
release = version = attnkit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
python_maximum_signature_line_length = 100
smartquotes = False  # defaults in signatures and paths keep their quotes
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_param = False  # one entry may describe several arguments: "cu_seqlens_q, cu_seqlens_k: ..."
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"attnkit {release}"
html_show_sourcelink = False
html_copy_source = False

sys.modules["attnkit.errors"] = attnkit.errors  # a namespace, so that autodoc names exceptions as users do

_TRAILING = re.compile(r"(?<=\w)_(?!\w)")
_NOTE = re.compile(r"(Source|Complexity): ")


def house_style(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn docstrings, which are plain text with sections and code in single backticks, into reStructuredText."""
    if name == "attnkit.errors":  # a tree, drawn with characters
        lines[:] = ["::", "", *(f"    {line}" for line in lines)]
        return
    out: list[str] = []
    example = note = False
    for line in lines:
        example = line.startswith(">>>") or (example and bool(line))
        if example:
            out.append(line)
            continue
        heading = _NOTE.match(line)
        note = bool(heading) or (note and line.startswith("    "))
        if heading:
            out.append("")
            line = f"*{heading[1]}:* {line[heading.end() :]}"
        out.append(_escaped(line.strip() if note else line))
    lines[:] = out


def _escaped(line: str) -> str:
    """Make code spans literal, and let names that end in an underscore be names."""
    parts = re.split(r"(`[^`]+`)", line)
    for index, part in enumerate(parts):
        if index % 2 == 0:
            parts[index] = _TRAILING.sub(r"\\_", part)
        else:
            glue = "\\ " if parts[index + 1][:1].isalnum() else ""
            parts[index] = f"`{part}`{glue}"
    return "".join(parts)


def setup(app: Any) -> None:
    """Run before napoleon reads the sections."""
    app.connect("autodoc-process-docstring", house_style, priority=400)
