"""Runs every example as a user would, and puts its tables and its picture into the document.

uv run python -m tests.benchmarks.gallery
    --into docs/examples.md --pictures docs/images
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


def tables(name: str, picture: pathlib.Path, options: list[str]) -> str:
    """What an example prints, without where its picture is."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--out", str(picture), *options]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return "\n".join(line for line in printed.splitlines() if not line.startswith("The picture"))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument(
        "--into", required=True, help="a document with a pair of marks for each example"
    )
    parser.add_argument(
        "--pictures", required=True, type=pathlib.Path, help="the folder for the pictures"
    )
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args(argv)
    for name in args.only:
        options = ["--steps", "2", "--seeds", "1"] if args.small else []
        put_into(args.into, name, tables(name, args.pictures / f"{name}.png", options))


if __name__ == "__main__":
    main()
