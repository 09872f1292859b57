"""How the site is built: `make docs`. Warnings are errors; pages that can be made from the code are made from it."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402

import oto  # noqa: E402

project, release, copyright = "oto", oto.__version__, "the oto developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"oto {oto.__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_made/extra"]
exclude_patterns = ["_made/extra"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # the signatures are in the docstrings' words
autodoc_member_order = "bysource"
suppress_warnings = ["myst.xref_missing"]  # the tables of benchmarks/ and the matrix name files of the repository

generate.everything(HERE / "_made")
