"""The site is complete: every name, every algorithm and every page is listed, and it builds
without a warning.
"""

import html.parser
import inspect
import operator
import os
import pathlib
import re
import subprocess
import sys

import pytest

import optaxclip

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = sorted(page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md"))
API = sorted(page for page in PAGES if page.startswith("api/") and page != "api/index")
NAMESPACES = {
    name: value
    for name, value in vars(optaxclip).items()
    if inspect.ismodule(value) and name in optaxclip.__all__
}
ENTRY = re.compile(r"^\.\. (currentmodule|autofunction|autoclass|py:data):: (\S+)$", re.MULTILINE)
ALGORITHMS = [
    name
    for name, value in vars(optaxclip).items()
    if name in optaxclip.__all__
    and inspect.isroutine(value)
    and value.__module__.startswith(("optaxclip.clips", "optaxclip.wrappers"))
    and name != "global_norm"  # which changes nothing
]


def text_of(page):
    return (DOCS / f"{page}.md").read_text()


def documented(page):
    """The full names of all entries on a page, without the members that Sphinx lists by itself."""
    names, module = [], ""
    for directive, name in ENTRY.findall(text_of(page)):
        if directive == "currentmodule":
            module = name
        else:
            names.append(name if name.startswith("optaxclip.") else f"{module}.{name}")
    if page == "api/plots":
        names += [f"optaxclip.plots.{name}" for name in optaxclip.plots.__all__]
    return names


def everything_documented():
    return [name for page in API for name in documented(page)]


def public():
    """The full names of everything public, types included."""
    yield from (f"optaxclip.{name}" for name in optaxclip.__all__ if name not in NAMESPACES)
    for room, module in NAMESPACES.items():
        types = [name for name, value in vars(module).items() if hasattr(value, "_fields")]
        yield from (f"optaxclip.{room}.{name}" for name in getattr(module, "__all__", types))


def find(name):
    # Not `pydoc.locate`: in `wrappers` functions have the names of their files, and Python 3.12
    # finds the files.
    return operator.attrgetter(name.removeprefix("optaxclip."))(optaxclip)


def test_the_api_names_everything_public_once():
    entries = [id(find(name)) for name in everything_documented()]
    assert len(set(entries)) == len(entries)
    assert [name for name in public() if id(find(name)) not in entries] == []


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_its_row(name):
    rows = [
        line.split(" | ")[:2]
        for line in (DOCS / "algorithms.md").read_text().splitlines()
        if line.startswith("|")
    ]
    assert any(re.search(rf"`{name}\b", cell) for row in rows for cell in row)


def contents(page):
    lists = re.findall(r"```\{toctree\}\n(?::.*\n)*\n((?:.+\n)+)```", text_of(page))
    return "".join(lists).split()


def test_every_page_is_in_the_contents_once():
    inside = [f"api/{name}" for name in contents("api/index")]
    assert sorted([*contents("index"), *inside, "index"]) == PAGES


def test_the_overview_of_the_api_lists_every_function_under_the_page_that_has_it():
    for section in text_of("api/index").split("\n## ")[1:]:
        page = re.search(r"\((\S+)\.md\)", section)[1]
        listed = {
            f"optaxclip.{name}" for name in re.findall(r"^   (\w\S*)$", section, re.MULTILINE)
        }
        entries = {name: find(name) for name in documented(f"api/{page}")}
        functions = {name for name, value in entries.items() if inspect.isroutine(value)}
        assert functions <= listed <= entries.keys(), page


def test_the_stated_versions_are_those_of_the_project():
    text = {name: (DOCS.parent / name).read_text() for name in ("README.md", "CHANGELOG.md")}
    needed = re.findall(r'"(jax|optax)>=([\d.]+)"', (DOCS.parent / "pyproject.toml").read_text())
    for name, version in needed:
        for said in text.values():
            assert re.search(rf"\b{name} {re.escape(version)}\b", said, re.IGNORECASE)
    assert f"\nversion: {optaxclip.__version__}\n" in (DOCS.parent / "CITATION.cff").read_text()


class Page(html.parser.HTMLParser):
    """The targets and the links of a page."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links = set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids.add(found.get("id"))
        self.links |= {found[key] for key in ("href", "src") if found.get(key)}


def assert_links_lead_somewhere(root, pages):
    """Every link within the site resolves, including its fragment."""
    for page, content in pages.items():
        for link in content.links:
            path, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            path = path.partition("?")[0]
            target = (root / page).parent / path if path else root / page
            assert target.exists(), f"{page} links to {link}"
            known = pages.get(pathlib.Path(os.path.relpath(target, root)).as_posix())
            assert not anchor or not known or anchor in known.ids, f"{page} links to {link}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_every_link_leads_somewhere(tmp_path):
    for extension in ("sphinx", "myst_nb", "sphinx_copybutton", "sphinxext.opengraph"):
        pytest.importorskip(extension)
    # Another test runs the notebooks, one process each.
    options = ["-W", "--keep-going", "-q", "-D", "nb_execution_mode=off", "-b", "html"]
    places = ["-d", tmp_path / "doctrees", DOCS, tmp_path / "html"]
    command = [sys.executable, "-m", "sphinx", *options, *map(str, places)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=DOCS.parent)
    assert done.returncode == 0, done.stderr
    root = tmp_path / "html"
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.html")]
    pages = {name: Page(root / name) for name in names if not name.startswith("_")}
    assert {f"{page}.html" for page in PAGES} <= pages.keys()
    assert_links_lead_somewhere(root, pages)
    for page in API:
        assert set(documented(page)) <= pages[f"{page}.html"].ids
