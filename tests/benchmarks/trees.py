"""The trees that the benchmarks clip: the shapes of real models, by name of the leaf."""

import jax
import jax.numpy as jnp
import numpy as np


def gpt2(
    width: int = 768, layers: int = 12, words: int = 50257, length: int = 1024
) -> dict[str, tuple[int, ...]]:
    """GPT-2 small: 124 M parameters in 148 leaves."""
    norms = {"ln_f/scale": (width,), "ln_f/bias": (width,)}
    shapes = {"wte": (words, width), "wpe": (length, width)} | norms
    for i in range(layers):
        dense = {"qkv": (width, 3 * width), "out": (width, width)}
        dense |= {"up": (width, 4 * width), "down": (4 * width, width)}
        for name, shape in dense.items():
            shapes |= {f"h{i}/{name}/kernel": shape, f"h{i}/{name}/bias": shape[1:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h{i}/{name}/scale": (width,), f"h{i}/{name}/bias": (width,)}
    return shapes


def resnet50(width: int = 64) -> dict[str, tuple[int, ...]]:
    """ResNet-50: 25.6 M parameters in 161 leaves."""
    shapes = {"stem/kernel": (7, 7, 3, width), "stem/scale": (width,), "stem/bias": (width,)}
    inputs = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner, outputs = width * 2**stage, 4 * width * 2**stage
        for block in range(blocks):
            convs = [(1, inputs, inner), (3, inner, inner), (1, inner, outputs)]
            convs += [(1, inputs, outputs)] if block == 0 else []
            for i, (size, a, b) in enumerate(convs):
                name = f"stage{stage}/{block}/{i}"
                shapes |= {f"{name}/kernel": (size, size, a, b)}
                shapes |= {f"{name}/scale": (b,), f"{name}/bias": (b,)}
            inputs = outputs
    return shapes | {"head/kernel": (inputs, 1000), "head/bias": (1000,)}


def lora(width: int = 4096, rank: int = 16, layers: int = 64) -> dict[str, tuple[int, ...]]:
    """Low-rank adapters of queries and values: 16.8 M parameters in 256 leaves."""
    shapes = {}
    for name in (f"h{i}/{part}" for i in range(layers) for part in "qv"):
        shapes |= {f"{name}/a": (width, rank), f"{name}/b": (rank, width)}
    return shapes


def small_leaves(count: int) -> dict[str, tuple[int, ...]]:
    """Many small vectors, of 20 lengths from 100 to 10,000."""
    return {f"leaf{i}": (round(100 * 100 ** (i % 20 / 19)),) for i in range(count)}


TREES = {"GPT-2 small": gpt2, "ResNet-50": resnet50, "LoRA": lora}


def to_structs(tree: dict, dtype=jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Turns shapes into `ShapeDtypeStruct`s."""
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in tree.items()}


def draw_numbers(tree: dict, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Draws normal numbers in these shapes. Their norm is far over 1."""
    rng = np.random.default_rng(0)
    drawn = {name: rng.standard_normal(shape, np.float32) for name, shape in tree.items()}
    return {name: jnp.asarray(x).astype(dtype) for name, x in drawn.items()}
