"""Runs every example in docstrings, README and docs as a test."""

from sybil import Sybil
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.markdown import PythonCodeBlockParser

from tests import conftest as _strict  # noqa: F401 - the same JAX settings, whatever is collected first

pytest_collect_file = (
    Sybil(parsers=[DocTestParser()], patterns=["*.py"], path="optaxclip")
    + Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"])
).pytest()
