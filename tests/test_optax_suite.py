"""Optax's own tests of its clips, run on ours.

Optax ships them in its wheel. They reach the functions under test as attributes of the module `_clipping`: the name is
bound to a stand-in that holds ours, and the tests run as they are.
"""

import importlib.util
import pathlib
import types
import unittest

import optax
import pytest

import optaxclip
from tests import conftest as strict

SOURCE = pathlib.Path(optax.__file__).parent / "transforms" / "_clipping_test.py"
SHARED = (
    "adaptive_grad_clip",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "unitwise_clip",
    "unitwise_norm",
)


@pytest.fixture
def _as_optax():
    """Optax tests itself under JAX's defaults."""
    strict.set_promotion("standard", "allow")
    yield
    strict.set_promotion("strict", "raise")


def suite(clips):
    """Optax's test cases, with these functions in place of its own."""
    if not SOURCE.exists():
        pytest.skip("this Optax ships no tests of its clips")
    spec = importlib.util.spec_from_file_location("optax_clipping_test", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._clipping = clips
    return unittest.defaultTestLoader.loadTestsFromModule(module)


def ours():
    return types.SimpleNamespace(**{name: getattr(optaxclip, name) for name in SHARED})


def test_every_clip_that_optax_has_is_here():
    named = {name for name in dir(optax) if ("clip" in name or "unitwise" in name) and callable(getattr(optax, name))}
    assert named == set(SHARED)


@pytest.mark.usefixtures("_as_optax")
def test_optax_tests_pass_on_our_clips():
    result = unittest.TestResult()
    suite(ours()).run(result)
    assert result.testsRun >= 9
    assert not result.skipped
    assert result.wasSuccessful(), "\n".join(text for _, text in result.failures + result.errors)


@pytest.mark.usefixtures("_as_optax")
@pytest.mark.parametrize("name", [name for name in SHARED if name != "unitwise_clip"])
def test_the_suite_does_run_what_it_is_given(name):
    """Each function, put out of order, makes Optax's tests fail: so these do reach it."""
    broken = ours()

    def out_of_order(*args, **kwargs):
        raise RuntimeError("reached")

    setattr(broken, name, out_of_order)
    result = unittest.TestResult()
    suite(broken).run(result)
    assert any("RuntimeError: reached" in text for _, text in result.errors)
