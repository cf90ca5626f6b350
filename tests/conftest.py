"""Strict JAX for all tests: eight devices, no silent promotion. Programs are compiled quickly and
kept between runs.
"""

import contextlib
import gc
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("MPLBACKEND", "Agg")

# XLA runs simulated devices on a pool with one thread per device, and a collective waits for all of
# its devices. On a mesh with two axes collectives may start in any order, so all threads can wait
# for collectives for which no thread is left: a deadlock.
os.environ.setdefault("NPROC", "64")

import jax
import jax.export
import pytest

# Tests spend most of their time in XLA. Programs are compiled without LLVM's optimizations and in
# one piece: parallel pieces take twice the CPU time, and CI has two cores. Up to JAX 0.10 there are
# also older emitters, which are four times as fast; later versions crash on their flag. Tests of
# costs, and of numbers that must be exact, use `AS_USERS` to compile as users do.
AS_USERS: dict = {}
if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
    AS_USERS["xla_backend_optimization_level"] = 3
    quick = "--xla_cpu_parallel_codegen_split_count=1 --xla_backend_optimization_level=0"
    if jax.__version_info__ < (0, 11):
        AS_USERS["xla_cpu_use_fusion_emitters"] = True
        quick = f"{quick} --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"

# JAX 0.7 has it elsewhere, in a place where later versions no longer have it.
if not hasattr(jax, "enable_x64"):
    from jax.experimental import enable_x64

    jax.enable_x64 = enable_x64


def allow(dtype: str):
    """The context in which a dtype exists."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def set_promotion(dtypes: str, ranks: str) -> None:
    jax.config.update("jax_numpy_dtype_promotion", dtypes)
    jax.config.update("jax_numpy_rank_promotion", ranks)


@pytest.fixture
def as_users():
    """JAX's own promotion, as users have it: Optax's transformations promote dtypes and ranks."""
    set_promotion("standard", "allow")
    yield
    set_promotion("strict", "raise")


@pytest.fixture
def mixed_dtypes():
    """Promotion of dtypes, but not of ranks."""
    with jax.numpy_dtype_promotion("standard"):
        yield


jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
# Eight devices. CI also runs the laws on one device, which is what most users have.
jax.config.update("jax_num_cpu_devices", int(os.environ.get("OPTAXCLIP_TEST_DEVICES", "8")))
jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".jax_cache")
)
# Small programs too: the processes of a run have most of their thousands in common.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
set_promotion("strict", "raise")

# With Python's default thresholds, garbage collection took 5% of the CPU time of 357 tests in one
# process.
gc.freeze()
gc.set_threshold(100_000, 50, 100)
