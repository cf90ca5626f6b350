"""Rules for the code: layers, sizes, words, and the number of calls in one update."""

import ast
import inspect
import operator
import pathlib
import re
import sys

import jax.numpy as jnp
import pytest

import optaxclip

HOUSE = pathlib.Path(optaxclip.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))
ROOMS = {str(f.relative_to(HOUSE)): f for f in FILES}
# A module imports only modules of a lower number; imports inside a folder are not restricted.
LAYERS = {
    "base": 0, "closures": 0, "compat": 0, "validate": 1, "trees": 2, "states": 3, "xla": 3,
    "norms": 4, "scopes": 4, "actions": 4, "feeds": 4, "thresholds": 5, "record": 5,
    "engine": 6, "core": 7, "clips": 8, "wrappers": 9, "per_example": 9, "aggregation": 9,
    "monitoring": 10, "tuning": 11, "checking": 11, "plots": 12,
}  # fmt: skip


def imports(path):
    """Our own modules that a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "optaxclip":
            inside = node.module.split(".")[1:]
            found |= {tuple(inside)} if inside else {(alias.name,) for alias in node.names}
    return found


@pytest.mark.parametrize("name", [name for name in ROOMS if name != "__init__.py"])
def test_a_module_imports_only_lower_layers(name):
    own = name.split("/")[0].removesuffix(".py")
    for module in imports(ROOMS[name]):
        if module[0] != own:
            assert LAYERS[module[0]] < LAYERS[own], f"{name} imports {'.'.join(module)}"


def test_imports_have_no_cycles():
    modules = {
        n.removesuffix(".py").removesuffix("/__init__").replace("/", "."): f
        for n, f in ROOMS.items()
    }
    edges = {
        m: {".".join(i) for i in imports(f)} & modules.keys()
        for m, f in modules.items()
        if m != "__init__"
    }
    seen, way = set(), []

    def walk(module):
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in seen:
            way.append(module)
            for other in edges.get(module, ()):
                walk(other)
            seen.add(way.pop())

    for module in edges:
        walk(module)


@pytest.mark.parametrize("name", ROOMS)
def test_a_file_is_short_and_imports_nothing_private_and_nothing_late(name):
    text = ROOMS[name].read_text()
    lines = text.splitlines()
    assert len(lines) <= 260 and max(map(len, lines), default=0) <= 100, max(lines, key=len)
    assert not re.search(r"(jax|optax|flax)\._src", text)
    assert not re.search(r"jax\.(default_backend|devices|device_count|local_device\w*)\(", text)
    late = [
        node.lineno
        for function in ast.walk(ast.parse(text))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optaxclip")
    ]
    assert not late, f"imports inside functions at lines {late}"


def test_at_most_fifty_names_at_the_top():
    names = [n for n in optaxclip.__all__ if not inspect.ismodule(getattr(optaxclip, n))]
    assert len(names) <= 50
    assert sorted(optaxclip.__all__) == optaxclip.__all__


@pytest.mark.parametrize("name", [n for n in optaxclip.__all__ if callable(getattr(optaxclip, n))])
def test_a_signature_can_be_read(name):
    signature = f"{name}{inspect.signature(getattr(optaxclip, name))}"
    assert len(signature) < 600 and " at 0x" not in signature


NAMESPACES = (
    *("actions", "aggregation", "norms", "per_example", "scopes", "thresholds", "wrappers"),
    *("tuning", "plots", "monitoring"),
)


def test_every_public_function_that_checks_its_arguments_is_named_in_errors():
    rooms = [optaxclip, *(getattr(optaxclip, name) for name in NAMESPACES)]
    public = {getattr(room, name) for room in rooms for name in room.__all__}
    functions = [f for f in public if inspect.isfunction(f)]
    bare = [f.__name__ for f in functions if "validate" in f.__code__.co_names]
    assert bare == [] and len(functions) > 60


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("leaf", "write optaxclip.scopes.leaf"),
        ("zscore", "write optaxclip.thresholds.zscore"),
        ("clip_grad_norm_", "did you mean optaxclip.clip_by_global_norm"),
        ("clip_by_globalnorm", "did you mean optaxclip.clip_by_global_norm"),
        ("scopes.leafs", "did you mean optaxclip.scopes.leaf"),
        ("base.ClipStates", "did you mean optaxclip.base.ClipState"),
        ("thresholds.zclip", "write optaxclip.zclip"),
        ("scopes.l2", "write optaxclip.norms.l2"),
    ],
)
def test_a_misspelt_name_suggests_the_nearest(name, advice):
    with pytest.raises(AttributeError, match=advice):
        operator.attrgetter(name)(optaxclip)


def run_through(call):
    """The functions and files of ours that a call runs through, comprehensions not counted."""
    functions = set()

    def see(frame, event, _):
        code = frame.f_code
        if event == "call" and str(HOUSE) in code.co_filename and not code.co_name.startswith("<"):
            functions.add((code.co_filename, code.co_qualname))

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return functions


def test_the_path_of_an_update_is_short():
    """Of the mathematics; how sums are written for compilers is in the room `xla`, which with
    `compat` is traced at the first update only.
    """
    tx = optaxclip.clip_by_global_norm(1.0)
    grads = {"a": jnp.ones(2), "b": jnp.ones(3), "no other test has this one": jnp.ones((7, 1))}
    state = tx.init(grads)
    for call in ("first", "next"):
        seen = run_through(lambda: tx.update(grads, state))
        mathematics = {x for x in seen if not re.search("xla|compat", x[0])}
        assert len(mathematics) <= 29, (call, sorted(name for _, name in mathematics))
    assert len(seen) <= 28, sorted(name for _, name in seen)


# Full-line comments per 100 other lines that are not blank, docstrings included.
COMMENTS = {
    "base": 5, "closures": 5, "compat": 5, "validate": 5, "trees": 5, "states": 5, "xla": 5,
    "norms": 5, "scopes": 5,
    "actions": 5, "feeds": 5, "thresholds": 5, "record": 5, "engine": 5, "core": 5, "clips": 5,
    "wrappers": 5, "per_example": 5, "aggregation": 5, "monitoring": 4,
    "tuning": 4, "checking": 5, "plots": 4,
}  # fmt: skip


@pytest.mark.parametrize("room", LAYERS)
def test_comments_say_why(room):
    files = [f for name, f in ROOMS.items() if name.split("/")[0].removesuffix(".py") == room]
    text = [line for f in files for line in f.read_text().splitlines() if line.strip()]
    comments = sum(line.strip().startswith("#") for line in text)
    assert 100 * comments / (len(text) - comments) >= COMMENTS[room]
