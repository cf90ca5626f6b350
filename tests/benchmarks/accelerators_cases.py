"""What is compiled, and for which devices: models, how a mesh cuts them, and the suites."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import PartitionSpec as P

from tests.benchmarks.accelerators_targets import Target
from tests.benchmarks.trees import gpt2, resnet50

TARGETS = {
    "H100": Target("gpu", "h100"),
    "v5e": Target("tpu", "v5e:2x2"),
    "v5e 2x2": Target("tpu", "v5e:2x2", (2, 2)),
    "v5e 4x4": Target("tpu", "v5e:4x4", (4, 4)),
    "v5p 8x8x8": Target("tpu", "v5p:8x8x8", (64, 8)),
}


def llama(layers: int = 80) -> dict[str, tuple[int, ...]]:
    """Llama 3 of 70 billion parameters, its layers stacked for a scan: 12 leaves."""
    width, inner, words, keys = 8192, 28672, 128256, 1024
    dense = {"q": (width, width), "k": (width, keys), "v": (width, keys), "o": (width, width)}
    dense |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    shapes = {"embed": (words, width), "head": (width, words), "norm": (1, width)}
    shapes |= {f"layers/{name}": (layers, *shape) for name, shape in dense.items()}
    return shapes | {f"layers/{name}": (layers, width) for name in ("norm_1", "norm_2")}


def stack(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same model with its layers stacked for a scan: `h0/qkv/kernel` and so on are one leaf."""
    layers = len({path.partition("/")[0] for path in shapes if re.match(r"h\d+/", path)})
    return {
        re.sub(r"^h\d+/", "h/", path): (layers, *shape) if re.match(r"h\d+/", path) else shape
        for path, shape in shapes.items()
    }


# The vocabulary padded to a multiple of 128, as those do who cut it over devices.
MODELS = {
    "gpt2": lambda: gpt2(words=50304),
    "gpt2-2": lambda: gpt2(layers=2, words=50304),
    "gpt2-stacked": lambda: stack(gpt2(words=50304)),
    "gpt2-2-stacked": lambda: stack(gpt2(layers=2, words=50304)),
    "gpt2-xl": lambda: gpt2(1600, 48, words=50304),
    "resnet50": resnet50,
    "70b": llama,
}
# Over x, over y, over both and over none: a form may hold for one of these and gather for another.
CUTS = {
    r"qkv/kernel": P("x", "y"),
    r"out/kernel": P("y", "x"),
    r"up/kernel": P(None, "y"),
    r"up/bias": P("y"),
    r"down/kernel": P("y"),
    r"wte": P("x"),
    r"layers/(q|k|v|gate|up)": P(None, "x", "y"),
    r"layers/(o|down)": P(None, "y", "x"),
    r"embed": P("y", "x"),
    r"head": P("x", "y"),
}


def is_stacked(model: str) -> bool:
    """Whether a model stacks its layers."""
    return model == "70b" or model.endswith("-stacked")


class Case(NamedTuple):
    """One table: what is compiled, for what, and how it is written."""

    suite: str
    target: str
    model: str
    grads: str = "float32"
    params: str = "float32"
    hosts: int = 1
    form: str = "auto"

    def __str__(self) -> str:
        kinds = f"{self.grads} gradients"
        if self.params != "float32":
            kinds += f" and {self.params} parameters"
        parts = [self.target, self.model, kinds]
        if self.hosts > 1:
            parts.append(f"traced on a host with {self.hosts} devices")
        if self.form != "auto":
            parts.append(
                {"explicit": "AxisType.Explicit", "fsdp": "fully sharded"}.get(self.form, self.form)
            )
        return ", ".join(parts)


BFLOAT16 = {"grads": "bfloat16"}
SUITES = {
    "gpu": [
        Case("gpu", "H100", "gpt2"),
        Case("gpu", "H100", "gpt2", hosts=8),
        Case("gpu", "H100", "gpt2", **BFLOAT16),
        Case("gpu", "H100", "gpt2", **BFLOAT16, params="bfloat16"),
        Case("gpu", "H100", "resnet50"),
        Case("gpu", "H100", "gpt2-xl"),
        Case("gpu", "H100", "gpt2-stacked"),
    ],
    "tpu": [
        Case("tpu", "v5e", "gpt2-2"),
        Case("tpu", "v5e", "gpt2-2", hosts=8),
        Case("tpu", "v5e", "gpt2-2", **BFLOAT16),
        Case("tpu", "v5e", "gpt2"),
        Case("tpu", "v5e", "gpt2-stacked"),
    ],
    "mesh": [
        Case("mesh", "v5e 4x4", "gpt2-2"),
        Case("mesh", "v5e 4x4", "gpt2-2", hosts=16),
        Case("mesh", "v5e 4x4", "gpt2-2", form="explicit"),
        Case("mesh", "v5e 4x4", "gpt2-2", form="fsdp"),
        Case("mesh", "v5e 4x4", "gpt2-2", form="shard_map"),
        Case("mesh", "v5e 4x4", "gpt2-2-stacked"),
    ],
    "pod": [Case("pod", "v5p 8x8x8", "70b"), Case("pod", "v5p 8x8x8", "70b", hosts=8)],
    "examples": [Case("examples", "H100", "block"), Case("examples", "v5e", "block")],
    "scan": [Case("scan", "H100", "mlp"), Case("scan", "H100", "mlp, 64 seeds")],
}
SMALL = {"gpu": [Case("gpu", "H100", "gpt2-2")], "mesh": [Case("mesh", "v5e 2x2", "gpt2-2")]}
FEW = ("clip_by_global_norm", "clip_by_leaf_norm", "zclip", "adaptive_grad_clip", "clip")
BY_LAYER = ("clip_by_leaf_norm, stacked", "clip_by_group_norm, stacked")


WIDE = (SUITES["gpu"][0], SUITES["tpu"][0], SUITES["mesh"][0], SMALL["gpu"][0])


def choose_rows(
    case: Case, clips: Sequence[str] | None, everything: Sequence[str]
) -> Sequence[str]:
    """Those of our clips that a case has a row for: in most cases the few that differ in form."""
    names = clips or (everything if case in WIDE else (*FEW, *BY_LAYER))
    if not is_stacked(case.model):
        names = [name for name in names if name not in BY_LAYER]
    # Of Optax's for stacked layers there is but one axis for all leaves, and a vector lacks it.
    if case.model.endswith("-stacked"):
        names = [name for name in names if name != "adaptive_grad_clip"]
    # In `shard_map` a device keeps the norms of its own units: no spec of a state says that.
    return [name for name in names if case.form != "shard_map" or name != "adaptive_grad_clip"]


def cut(path: str, shape: tuple[int, ...], form: str, devices: int) -> P:
    """Over which axes of the mesh a leaf is cut."""
    if form != "fsdp":
        spec = next((spec for rule, spec in CUTS.items() if re.search(f"{rule}$", path)), P())
        return P(None, *spec) if path.startswith("h/") else spec
    largest = max(range(len(shape)), key=shape.__getitem__)
    if shape[largest] % devices:
        return P()
    return P(*[None] * largest, "x")


def count_local(shape: tuple[int, ...], spec: P, sizes: dict[str, int]) -> int:
    """How many elements of a leaf one device of a mesh holds."""
    parts = math.prod(sizes[axis] for axis in spec if axis) if sizes else 1
    return math.prod(shape) // parts
