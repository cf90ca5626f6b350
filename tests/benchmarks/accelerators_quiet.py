"""Imports jax without what CUDA's plugin writes to stderr where it finds no driver.

The lines come from C++ before its logging is set up, so that no variable turns them off.
"""

import contextlib
import os
import tempfile


@contextlib.contextmanager
def silence():
    """Keeps what is written to the descriptor of stderr from the terminal."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


with silence():
    import jax  # noqa: F401
