"""Runs every example in docstrings, README and docs as a test, under JAX's defaults, as a user would."""

from sybil import Sybil
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.markdown import PythonCodeBlockParser

from tests import conftest as strict


def _as_users(namespace):
    strict.set_promotion("standard", "allow")


def _as_tests(namespace):
    strict.set_promotion("strict", "raise")


pytest_collect_file = (
    Sybil(parsers=[DocTestParser()], patterns=["*.py"], path="optaxclip", setup=_as_users, teardown=_as_tests)
    + Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"], setup=_as_users, teardown=_as_tests)
).pytest()
