# /// script
# dependencies = ["flax==0.12.12", "jax==0.12.0.1", "optax==0.2.8", "matplotlib", "pip"]
# ///
"""Flax: its own nnx example of data parallelism on eight devices, from its source archive."""

import contextlib
import functools
import io
import pathlib
import re
import runpy
import subprocess
import sys
import tarfile
import tempfile
from unittest import mock

import flax
import numpy as np
import optax

from tests.clients.common import Trained, check

PATH = f"flax-{flax.__version__}/examples/nnx_toy_examples/04_data_parallel_with_jit.py"


@functools.cache
def example():
    folder = pathlib.Path(tempfile.mkdtemp())
    command = ["pip", "download", "--no-deps", "--no-binary", "flax", f"flax=={flax.__version__}"]
    subprocess.run([sys.executable, "-m", *command, "-q", "-d", folder], check=True)
    with tarfile.open(folder / f"flax-{flax.__version__}.tar.gz") as archive:
        archive.extract(PATH, folder, filter="data")
    return folder / PATH


def train(optimizer):
    np.random.seed(0)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), mock.patch("optax.adamw", return_value=optimizer):
        done = runpy.run_path(str(example()))
    losses = re.findall(r"loss=(\S+)", said.getvalue())
    return Trained([float(loss) for loss in losses], done["optimizer"].opt_state)


check(train, optax.sgd(0.01), bound=0.5, rtol=1e-4)
