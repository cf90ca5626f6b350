"""Runs every example in the docstrings, the README and the docs as a test, under JAX's defaults."""

import pytest
from sybil import Sybil
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.markdown import PythonCodeBlockParser
from xdist.scheduler import LoadScopeScheduling

from tests import conftest as strict


def _use_defaults(namespace):
    strict.set_promotion("standard", "allow")


def _use_strict_promotion(namespace):
    strict.set_promotion("strict", "raise")


_promotion = {"setup": _use_defaults, "teardown": _use_strict_promotion}
_docstrings = Sybil(parsers=[DocTestParser()], patterns=["*.py"], path="optaxclip", **_promotion)
_pages = Sybil(parsers=[PythonCodeBlockParser()], patterns=["*.md"], **_promotion)
pytest_collect_file = (_docstrings + _pages).pytest()


class _KeepTogether(LoadScopeScheduling):
    """Gives a page to one process, because its later examples use names of earlier ones.

    The same holds for modules with a fixture that takes long.
    """

    def _split_scope(self, nodeid):
        module = nodeid.split("::")[0]
        slow_fixture = module.endswith(("test_meshes.py", "test_processes.py"))
        return module if "::line:" in nodeid or slow_fixture else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return _KeepTogether(config, log)
