"""Sphinx: the pages are MyST Markdown, the API comes from the docstrings; nothing is fetched."""

import re

import optaxclip

project = "optaxclip"
author = "the optaxclip authors"
version = release = optaxclip.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_heading_anchors = 3
autodoc_preserve_defaults = True
autodoc_typehints = "none"
napoleon_attr_annotations = False  # the text says what a field is; the types are long
napoleon_use_ivar = True

html_theme = "sphinx_book_theme"
html_title = "optaxclip"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"navbar_persistent": [], "use_download_button": False, "use_fullscreen_button": False}


PIECES = re.compile(
    r"^\s*(?:>>>|\.\.\.) .*$"  # an example
    r"|`[^`]+`_"  # a link
    r"|`(?P<code>[^`]+)`"
    r"|(?P<bar>\|)",  # |x| is a modulus; to reStructuredText it is a substitution
    re.MULTILINE,
)


def as_written(app, what, name, obj, options, lines):
    """Our docstrings' backticks as code, or as a link where they hold a public name, and bars as they are."""

    def piece(found):
        if found["code"]:
            name = found["code"].removeprefix("optaxclip.")
            return f":py:obj:`{name}`" if name in optaxclip.__all__ else f"``{found['code']}``"
        return r"\|" if found["bar"] else found[0]

    lines[:] = PIECES.sub(piece, "\n".join(lines)).split("\n")


def setup(app):
    app.connect("autodoc-process-docstring", as_written)
