"""The same clip outside JAX: in C, about as fast as the memory allows, and PyTorch's."""

import ctypes
import functools
import math
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable

import numpy as np

SOURCE = """
#include <math.h>
float norm(const float *x, long n) {
  double sum = 0;
  #pragma omp parallel for reduction(+:sum)
  for (long start = 0; start < n; start += 4096) {
    long end = start + 4096 < n ? start + 4096 : n;
    float part = 0;
    for (long i = start; i < end; i++) part += x[i] * x[i];
    sum += part;
  }
  return sqrt(sum);
}
void scale(float *x, long n, float factor) {
  #pragma omp parallel for
  for (long i = 0; i < n; i++) x[i] *= factor;
}
"""


@functools.cache
def _compile_library() -> ctypes.CDLL | None:
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "clip.c").write_text(SOURCE)
    # Not -ffast-math: loading a library linked with it makes the whole process flush subnormal
    # numbers to zero.
    sums = ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
    flags = ["-O3", "-march=native", *sums, "-fopenmp", "-shared", "-fPIC"]
    built = subprocess.run(
        [compiler, *flags, "clip.c", "-o", "clip.so", "-lm"], cwd=folder, capture_output=True
    )
    if built.returncode:
        return None
    # Otherwise its waiting threads compete with XLA's for the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    library = ctypes.CDLL(str(folder / "clip.so"))
    library.norm.restype = ctypes.c_float
    library.norm.argtypes = [ctypes.c_void_p, ctypes.c_long]
    library.scale.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_float]
    return library


def make_c_clip(shapes: dict[str, tuple[int, ...]], scales: bool) -> Callable[[], float] | None:
    """Makes a clip in C that reads one array after the other, and writes them if it `scales`.

    None without a C compiler.
    """
    library = _compile_library()
    if library is None:
        return None
    arrays = [np.ones(math.prod(shape), np.float32) for shape in shapes.values()]

    def run():
        norm = math.sqrt(sum(library.norm(x.ctypes.data, x.size) ** 2 for x in arrays))
        for x in arrays if scales else []:
            library.scale(x.ctypes.data, x.size, 0.999)
        return norm

    return run


def make_torch_clip(
    shapes: dict[str, tuple[int, ...]], scales: bool
) -> Callable[[], object] | None:
    """Makes a call of `clip_grad_norm_` with `foreach`, which multiplies even if it does not clip.

    None without PyTorch.
    """
    try:
        import torch
    except ImportError:
        return None
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes.values()]
    for param in params:
        param.grad = torch.ones_like(param)
    bound = [math.sqrt(sum(param.numel() for param in params))]

    def run():
        bound[0] *= 0.99 if scales else 1.01
        torch.nn.utils.clip_grad_norm_(params, bound[0], foreach=True)

    return run
