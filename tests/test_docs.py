"""The site is whole: every name, every algorithm and every page has its place, and it builds
without a warning.
"""

import html.parser
import inspect
import pathlib
import pydoc
import re
import subprocess
import sys

import pytest

import optaxclip

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = sorted(page.stem for page in DOCS.glob("*.md"))
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


def documented():
    """The full names of all entries of the API, with the members that Sphinx lists by itself."""
    names, module = [], ""
    for directive, name in ENTRY.findall((DOCS / "api.md").read_text()):
        if directive == "currentmodule":
            module = name
        else:
            names.append(name if name.startswith("optaxclip.") else f"{module}.{name}")
    return names + [f"optaxclip.plots.{name}" for name in optaxclip.plots.__all__]


def public():
    """The full names of what is public, those of types included."""
    yield from (f"optaxclip.{name}" for name in optaxclip.__all__ if name not in NAMESPACES)
    for room, module in NAMESPACES.items():
        types = [name for name, value in vars(module).items() if hasattr(value, "_fields")]
        yield from (f"optaxclip.{room}.{name}" for name in getattr(module, "__all__", types))


def test_the_api_names_everything_public_once():
    entries = [id(pydoc.locate(name)) for name in documented()]
    assert id(None) not in entries
    assert len(set(entries)) == len(entries)
    assert [name for name in public() if id(pydoc.locate(name)) not in entries] == []


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_its_row(name):
    rows = [
        line.split(" | ")[:2]
        for line in (DOCS / "algorithms.md").read_text().splitlines()
        if line.startswith("|")
    ]
    assert any(re.search(rf"`{name}\b", cell) for row in rows for cell in row)


def test_every_page_is_in_the_contents_once():
    contents = re.findall(
        r"```\{toctree\}\n(?::.*\n)*\n((?:.+\n)+)```", (DOCS / "index.md").read_text()
    )
    assert sorted([*"".join(contents).split(), "index"]) == PAGES


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


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_every_link_leads_somewhere(tmp_path):
    pytest.importorskip("sphinx")
    build = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        "-d",
        str(tmp_path / "doctrees"),
    ]
    done = subprocess.run(
        [*build, str(DOCS), str(tmp_path / "html")], capture_output=True, text=True, cwd=DOCS.parent
    )
    assert done.returncode == 0, done.stderr
    pages = {
        path.relative_to(tmp_path / "html").as_posix(): Page(path)
        for path in (tmp_path / "html").glob("*.html")
    }
    assert {f"{page}.html" for page in PAGES} <= pages.keys()
    for page, content in pages.items():
        for link in content.links:
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            path = path.partition("?")[0] or page
            assert (tmp_path / "html" / path).exists(), f"{page} links to {link}"
            assert not anchor or path not in pages or anchor in pages[path].ids, (
                f"{page} links to {link}"
            )
    api = pages["api.html"].ids
    assert set(documented()) - api == set()
