"""Sphinx: pages are MyST Markdown, the API comes from docstrings. No network is needed."""

import os
import pathlib
import sys

import optaxclip

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for links.py

project = "optaxclip"
author = "the optaxclip authors"
version = release = optaxclip.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxext.opengraph",
    "links",
]
exclude_patterns = ["_build"]
nitpicky = True
# This type is public, but has no entry in Optax's docs.
nitpick_ignore = [("py:class", "optax.ScalarOrSchedule")]

myst_heading_anchors = 3
autosummary_generate = False
autodoc_preserve_defaults = True
napoleon_attr_annotations = False  # the text describes the fields, and the types are long
napoleon_use_ivar = True
maximum_signature_line_length = 80

# Without a network, a short list of the names that are used replaces the inventory of a project.
_sites = {
    "flax": "https://flax.readthedocs.io/en/latest/",
    "jax": "https://docs.jax.dev/en/latest/",
    "numpy": "https://numpy.org/doc/stable/",
    "optax": "https://optax.readthedocs.io/en/latest/",
    "python": "https://docs.python.org/3/",
}
intersphinx_mapping = {
    name: (site, (None, f"inventories/{name}.inv")) for name, site in _sites.items()
}
intersphinx_timeout = 5

nb_execution_mode = "cache"
nb_render_markdown_format = "myst"  # with tables
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_show_tb = True

copybutton_exclude = ".linenos, .gp, .go"
# The address of the site, for previews of shared links, which need the full address of the picture.
ogp_site_url = html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "")
ogp_image = "_static/card.png"
ogp_enable_meta_description = True

html_theme = "sphinx_book_theme"
html_title = "optaxclip"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {
    "navbar_persistent": [],
    "use_download_button": False,
    "use_fullscreen_button": False,
}
