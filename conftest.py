"""Runs every example in docstrings, README and docs as a test, under JAX's defaults, as a user
would.
"""

import pytest
from sybil import Sybil
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.markdown import PythonCodeBlockParser
from xdist.scheduler import LoadScopeScheduling

from tests import conftest as strict


def _as_users(namespace):
    strict.set_promotion("standard", "allow")


def _as_tests(namespace):
    strict.set_promotion("strict", "raise")


pytest_collect_file = (
    Sybil(
        parsers=[DocTestParser()],
        patterns=["*.py"],
        path="optaxclip",
        setup=_as_users,
        teardown=_as_tests,
    )
    + Sybil(
        parsers=[PythonCodeBlockParser()], patterns=["*.md"], setup=_as_users, teardown=_as_tests
    )
).pytest()


class _PageAtOnce(LoadScopeScheduling):
    """Gives the examples of one page to one process: a later example uses the names of an earlier
    one.

    Also the tests of a module whose fixture takes long.
    """

    def _split_scope(self, nodeid):
        module = nodeid.split("::")[0]
        return (
            module
            if "::line:" in nodeid or module.endswith(("test_meshes.py", "test_processes.py"))
            else nodeid
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return _PageAtOnce(config, log)
