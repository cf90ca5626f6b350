"""Runs every example as a user would, and writes its tables and its picture into the docs.

uv run python -m tests.benchmarks.gallery --into docs/examples.md --pictures docs/images
"""

import argparse
import pathlib
import subprocess
import sys

from tests.benchmarks.reporting import put_into

EXAMPLES = pathlib.Path(__file__).parent.parent.parent / "examples"
NAMES = (
    "char_rnn",
    "transformer",
    "cnn_agc",
    "cartpole",
    "ctc_speech",
    "private_digits",
    "federated",
    "tune_threshold",
    "sharded",
)


def run_example(name: str, picture: pathlib.Path, options: list[str]) -> str:
    """Runs an example and returns what it prints, except where its picture is."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--out", str(picture), *options]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return "\n".join(line for line in printed.splitlines() if not line.startswith("The picture"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--into", required=True, help="document with marks for each example")
    parser.add_argument("--pictures", required=True, type=pathlib.Path, help="folder for pictures")
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args(argv)
    options = ["--steps", "2", "--seeds", "1"] if args.small else []
    for name in args.only:
        text = run_example(name, args.pictures / f"{name}.png", options)
        put_into(args.into, name, text)


if __name__ == "__main__":
    main()
