"""What `optaxclip.watch` costs on an H100, as XLA compiles it. No GPU is needed.

    uv run --group accelerators python -m tests.benchmarks.watching_gpu [--small]
        [--into docs/watching.md]

Prints a Markdown table: kernels and bytes of a step of a clip and AdamW on GPT-2, with and without
a watch in front of the clip. This is not part of `watching`, because the compilers are installed in
an environment without Flax.
"""

import argparse

from tests.benchmarks.accelerators import compile_case, name_versions
from tests.benchmarks.accelerators_cases import Case
from tests.benchmarks.reporting import publish, table

ROWS = {
    "no clip": "no clip",
    "clip_by_global_norm": "clip by global norm",
    "watch": "watch, then clip by global norm",
    "watch, histogram": "watch with histogram, then clip by global norm",
    "clip_by_leaf_norm": "clip by leaf norm",
    "watch, by leaf": "watch, then clip by leaf norm",
}


def main(argv=None) -> None:
    """Compiles each row and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="GPT-2 with 2 layers")
    parser.add_argument("--into", help="document to write the table into")
    args = parser.parse_args(argv)
    found = compile_case(Case("gpu", "H100", "gpt2-2" if args.small else "gpt2"), list(ROWS))
    lines = []
    for name, label in ROWS.items():
        lines.append([label, str(found[name]["kernels"]), f"{found[name]['bytes']:.2f}"])
    text = f"{table(['', 'kernels', 'bytes per parameter'], lines)}\n{name_versions('gpu')}.\n"
    publish(text, args.into, "watching gpu")


if __name__ == "__main__":
    main()
