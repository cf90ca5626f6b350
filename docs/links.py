"""Automatic links from types in signatures and from code spans that are names.

A name is looked up first in this site, then in the inventories of other projects.
"""

import inspect
import re
from types import GenericAlias, UnionType
from typing import get_origin

from docutils import nodes
from sphinx import addnodes
from sphinx.ext.intersphinx import InventoryAdapter
from sphinx.util.inspect import stringify_signature
from sphinx.util.typing import stringify_annotation

# The module of each prefix that the library writes.
HEADS = {
    "": "",
    "jnp": "jax.numpy",
    "lax": "jax.lax",
    "nnx.Optimizer": "flax.nnx.optimizer.Optimizer",
    "np": "numpy",
}
ROOMS = ("", "typing.", "collections.abc.", "jax.sharding.", "jax.typing.")
NAME = re.compile(r"(?P<name>[A-Za-z_][\w.]*)(\(.*\))?", re.DOTALL)
SPANS = re.compile(r"^\s*(?:>>>|\.\.\.) .*$|(?P<link>`[^`]+`_)|`(?P<code>[^`]+)`|(?P<bar>\|)", re.M)


def indent_raises(app, what, name, obj, options, lines):
    """Indents continuation lines of `Raises:`, which would otherwise be exceptions themselves."""
    inside = False
    for i, line in enumerate(lines):
        inside = (inside or line == "Raises:") and bool(line)
        if inside and not re.match(r"Raises:|  [A-Z]\w+: ", line):
            lines[i] = f"  {line}"


def escape_markup(app, what, name, obj, options, lines):
    """Turns backticks into code, and escapes bars: |x| is a modulus, not a substitution."""

    def replace(found):
        if found["code"]:
            return f"``{found['code']}``"
        return r"\|" if found["bar"] else found[0]

    text = SPANS.sub(replace, "\n".join(lines))
    # In fields that share a description, Sphinx would take the first name for the type of the last.
    lines[:] = re.sub(r"(?<=:ivar )[\w, ]+(?=:)", _join_names, text).split("\n")


def _join_names(found):
    return found[0].replace(" ", "\u200b")


def write_signature(app, what, name, obj, options, signature, returns):
    """Writes the signature with the documented aliases of the source, not what they stand for."""
    if what == "class" and hasattr(obj, "_fields"):
        return "", None  # the fields are described one by one
    if signature is None or isinstance(obj, property):
        return None
    found = inspect.signature(obj.__init__ if what == "class" else obj)
    if what in ("class", "method"):
        found = found.replace(parameters=list(found.parameters.values())[1:])
    written = stringify_signature(_spell_out(found, obj), unqualified_typehints=True)
    arguments, _, result = written.rpartition(" -> ")
    return (arguments, result) if arguments else (written, None)


def _spell_out(signature, obj):
    """Replaces aliases that have no entry by the types that they stand for."""
    inside = inspect.unwrap(obj)
    scope = getattr(inside, "__globals__", {})

    def spell(annotation):
        if not isinstance(annotation, str):
            return annotation
        names = re.compile(r"(?<![\w.])[A-Z]\w*")
        return names.sub(lambda found: _resolve_alias(scope, found[0]), annotation)

    parameters = [p.replace(annotation=spell(p.annotation)) for p in signature.parameters.values()]
    returned = spell(signature.return_annotation)
    return signature.replace(parameters=parameters, return_annotation=returned)


def _resolve_alias(scope, name):
    value = scope.get(name)
    own = scope.get("__name__", "").startswith("optaxclip.") and name not in DOCUMENTED
    is_alias = get_origin(value) is not None or isinstance(value, GenericAlias | UnionType)
    if not (own and is_alias):
        return name
    # The module that defines JAX's array is private.
    return re.sub(r"[\w.]*\._jax\.Array", "jax.Array", stringify_annotation(value))


DOCUMENTED = {
    *("Action", "AxisNames", "Candidates", "Exclude", "Feed", "Label", "Log", "Nonfinite"),
    *("Recorded", "Threshold", "View", "ArrayLike"),
}


def find(env, name):
    """Finds the entry of a name: (page, anchor), (address,), or None."""
    own = env.domains.python_domain.objects
    name = name.removeprefix("optaxclip.")
    entry = own.get(f"optaxclip.{name}")
    # A type may be written without its module.
    inside = [key for key in own if key.endswith(f".{name}") and name[:1].isupper()]
    entry = entry or (own[inside[0]] if len(inside) == 1 else None)
    if entry:
        return entry.docname, entry.node_id
    head, dot, rest = name.partition(".")
    full = HEADS.get(name) or HEADS.get(head, head) + dot + rest
    for kind, items in InventoryAdapter(env).main_inventory.items():
        if kind.startswith("py:"):
            for room in ROOMS:
                if room + full in items:
                    return (items[room + full].uri,)
    return None


def _link(app, page, place, inner):
    if len(place) == 1:
        return nodes.reference("", "", inner, internal=False, refuri=place[0])
    address = f"{app.builder.get_relative_uri(page, place[0])}#{place[1]}"
    return nodes.reference("", "", inner, internal=True, refuri=address)


def link_type(app, env, node, inner):
    """Links a type in a signature that Sphinx does not find by itself."""
    if node.get("refdomain") != "py":
        return None
    place = find(env, node["reftarget"])
    return place and _link(app, node["refdoc"], place, inner)


def link_spans(app, doctree, page):
    """Links code spans that are a name or a call."""
    for span in list(doctree.findall(nodes.literal)):
        above = span.parent
        if isinstance(above, nodes.reference | nodes.title | addnodes.pending_xref):
            continue
        found = NAME.fullmatch(span.astext())
        place = found and find(app.env, found["name"])
        if place:
            above.replace(span, _link(app, page, place, span))


def setup(app):
    """Registers the extension."""
    app.connect("autodoc-process-docstring", indent_raises, priority=400)  # before Napoleon
    app.connect("autodoc-process-docstring", escape_markup, priority=600)  # after Napoleon
    app.connect("autodoc-process-signature", write_signature)
    app.connect("missing-reference", link_type)
    app.connect("doctree-resolved", link_spans)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
