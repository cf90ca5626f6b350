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
html_theme_options = {
    "navbar_persistent": [],
    "use_download_button": False,
    "use_fullscreen_button": False,
}


PIECES = re.compile(
    r"^\s*(?:>>>|\.\.\.) .*$"  # an example
    r"|`[^`]+`_"  # a link
    r"|`(?P<code>[^`]+)`"
    r"|(?P<bar>\|)",  # |x| is a modulus; to reStructuredText it is a substitution
    re.MULTILINE,
)


def _is_public(name):
    """Whether a name is documented: at the top level, or in one of its namespaces."""
    room, _, own = name.rpartition(".")
    if not room:
        return name in optaxclip.__all__
    inside = getattr(optaxclip, room, None) if room in optaxclip.__all__ else None
    return own in getattr(inside, "__all__", ())


def as_written(app, what, name, obj, options, lines):
    """Backticks in docstrings as code, or as a link if they hold a public name; bars as bars."""

    def piece(found):
        if found["code"]:
            name = found["code"].removeprefix("optaxclip.")
            if _is_public(name):
                return f":py:obj:`{name} <optaxclip.{name}>`"
            return f"``{found['code']}``"
        return r"\|" if found["bar"] else found[0]

    lines[:] = PIECES.sub(piece, "\n".join(lines)).split("\n")


def setup(app):
    app.connect("autodoc-process-docstring", as_written)
