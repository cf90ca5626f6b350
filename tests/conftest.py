"""Strict JAX for all tests: eight devices, no silent promotion, compiled programs kept between runs."""

import gc
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax


def set_promotion(dtypes: str, ranks: str) -> None:
    jax.config.update("jax_numpy_dtype_promotion", dtypes)
    jax.config.update("jax_numpy_rank_promotion", ranks)


jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
set_promotion("strict", "raise")

# JAX keeps millions of small objects; to look through all of them for garbage again and again takes longer than a test.
gc.freeze()
gc.set_threshold(100_000, 50, 100)
