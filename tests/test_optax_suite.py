"""Optax's own tests of its clips, run on ours.

Optax ships them in its wheel. They access the functions under test as attributes of the module
`_clipping`, so that name is bound to a stand-in that holds ours. The tests run unchanged except for
one digit: seven decimal places near 1 are more than float32 has, and Optax's own
`clip_by_block_rms` does not reach them either. Their loops go through ten bounds, 1 to 1/10,
instead of fifty, because each bound is another clip to compile.
"""

import collections
import functools
import importlib.util
import pathlib
import types
import unittest

import optax
import pytest

import optaxclip

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


def counted(calls):
    """Our functions, with a count of the calls of each."""

    def wrap(name):
        @functools.wraps(getattr(optaxclip, name))
        def call(*args, **kwargs):
            calls[name] += 1
            return getattr(optaxclip, name)(*args, **kwargs)

        return call

    return types.SimpleNamespace(**{name: wrap(name) for name in SHARED})


def suite(clips):
    """Optax's test cases, with these functions in place of its own."""
    if not SOURCE.exists():
        pytest.skip("this Optax ships no tests of its clips")
    spec = importlib.util.spec_from_file_location("optax_clipping_test", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.STEPS == 50
    module._clipping, module.STEPS = clips, 10
    almost = unittest.TestCase.assertAlmostEqual
    module.ClippingTest.assertAlmostEqual = functools.partialmethod(almost, places=6)
    return unittest.defaultTestLoader.loadTestsFromModule(module)


def test_every_clip_that_optax_has_is_here():
    public = set(dir(optax)) | set(dir(optax.transforms))
    assert {
        name for name in public if name[0] != "_" and ("clip" in name or "unitwise" in name)
    } == set(SHARED)
    assert set(SHARED) <= set(optaxclip.__all__)


@pytest.mark.slow
@pytest.mark.usefixtures("as_users")
def test_optax_tests_pass_on_our_clips():
    calls, result = collections.Counter(), unittest.TestResult()
    suite(counted(calls)).run(result)
    assert result.testsRun >= 9
    assert not result.skipped
    assert result.wasSuccessful(), "\n".join(text for _, text in result.failures + result.errors)
    assert set(calls) == set(SHARED) - {"unitwise_clip"}, (
        "the functions that Optax's tests call are ours"
    )
