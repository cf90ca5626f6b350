"""Sphinx: the pages are MyST Markdown, the API comes from the docstrings; nothing is fetched."""

import re

import optaxclip

project = "optaxclip"
author = "the optaxclip authors"
version = release = optaxclip.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
suppress_warnings = ["myst.header"]  # choosing.md: a heading for each task, under a table that has none

myst_heading_anchors = 3
default_role = "py:obj"  # `name` in a docstring is a link if it is a name of ours, else code
autodoc_preserve_defaults = True
autodoc_typehints = "none"
napoleon_use_ivar = True

html_theme = "sphinx_book_theme"
html_title = "optaxclip"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"navbar_persistent": [], "use_download_button": False, "use_fullscreen_button": False}


def keep_bars(app, what, name, obj, options, lines):
    """Leaves |x| in a docstring what it is, a modulus: to reStructuredText it is a substitution."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[i] = re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or r"\|", line)


def setup(app):
    app.connect("autodoc-process-docstring", keep_bars)
