"""Strict JAX for all tests: eight devices, no silent promotion; programs are compiled quickly and
kept between runs.
"""

import gc
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("MPLBACKEND", "Agg")

# XLA runs simulated devices on a pool of as many threads, each waiting in a collective for the
# others; where a mesh has two axes, and so collectives that may come in any order, all can wait for
# ones that find no thread: a deadlock.
os.environ.setdefault("NPROC", "64")

import jax
import jax.export
import pytest

# Most of a test's time is XLA's. Programs are compiled without LLVM's optimizations, each as one
# piece: in parallel pieces it takes twice the CPU time, and CI has two cores. JAX 0.10 has older
# emitters, too, which are four times as fast; a later one dies of their flag. Tests of costs, and
# of numbers that must be exact, are compiled as users have it, by `AS_USERS`.
AS_USERS: dict = {}
if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
    AS_USERS["xla_backend_optimization_level"] = 3
    quick = "--xla_cpu_parallel_codegen_split_count=1 --xla_backend_optimization_level=0"
    if jax.__version_info__ < (0, 11):
        AS_USERS["xla_cpu_use_fusion_emitters"] = True
        quick = f"{quick} --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"

# In JAX 0.7 it lies elsewhere, where later versions have it no more.
if not hasattr(jax, "enable_x64"):
    from jax.experimental import enable_x64

    jax.enable_x64 = enable_x64


def set_promotion(dtypes: str, ranks: str) -> None:
    jax.config.update("jax_numpy_dtype_promotion", dtypes)
    jax.config.update("jax_numpy_rank_promotion", ranks)


@pytest.fixture
def as_users():
    """JAX's own promotion, as users have it: Optax's transformations promote dtypes and ranks."""
    set_promotion("standard", "allow")
    yield
    set_promotion("strict", "raise")


jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
# Eight devices; CI runs the laws on one, too, which is what most users have.
jax.config.update("jax_num_cpu_devices", int(os.environ.get("OPTAXCLIP_TEST_DEVICES", "8")))
jax.config.update(
    "jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".jax_cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
set_promotion("strict", "raise")

# By Python's own thresholds, 5% of the CPU time of 357 tests in one process went into the search
# for garbage.
gc.freeze()
gc.set_threshold(100_000, 50, 100)
