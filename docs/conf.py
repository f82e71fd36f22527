"""Sphinx configuration: ``nox -s docs`` builds the pages and runs their examples."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
# No page may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

project = "Sylva and hmatrix"
author = "The Sylva developers"
copyright = "The Sylva developers, Apache-2.0"
release = version = metadata.version("sylva-train")

extensions = [
    "matplotlib.sphinxext.plot_directive",
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx_design",
    "command_line",
    "mathml",
    "measurements",
]
exclude_patterns = ["_build", "_ext"]
templates_path = ["_templates"]
# `name` in a docstring is a Python object where there is one, else code.
default_role = "py:obj"

html_theme = "furo"
html_math_renderer = "mathml"
html_title = "Sylva and hmatrix"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
# Blocks without a language are commands.
highlight_language = "none"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autosummary_imported_members = True
autodoc_member_order = "groupwise"
autodoc_typehints = "none"
autodoc_default_options = {"show-inheritance": False}
# Members are listed by the class template, from autodoc itself.
numpydoc_show_class_members = False

# Pictures are drawn when the pages are built, by the code that stands above them.
plot_formats = ["svg"]
plot_include_source = True
plot_html_show_formats = False
plot_html_show_source_link = False

# Examples run from the pages and from the docstrings, each page in a folder of its own.
doctest_global_setup = """
import os, tempfile, torch
from hmatrix import ClusterTree, LowRank  # their own docstrings name them so
_folder = tempfile.TemporaryDirectory()
_before = os.getcwd()
os.chdir(_folder.name)
torch.set_num_threads(1)
"""
doctest_global_cleanup = """
os.chdir(_before)
_folder.cleanup()
"""
trim_doctest_flags = True
