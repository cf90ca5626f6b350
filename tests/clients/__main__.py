"""Tries the clips in projects that nobody here wrote, each in an environment of its own.

    uv run --python 3.12 python -m tests.clients                # all; half an hour
    uv run --python 3.12 python -m tests.clients sbx_ppo ...    # some
    uv run --python 3.12 python -m tests.clients --into docs/in-your-project.md

What cannot be installed, on this Python or at all, is skipped with its reason. Environments lie in
`.clients/`, up to 5 GB each (sbx needs PyTorch), and go after the test unless `--keep` is given.
pytest collects none of this.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
from typing import Any

from tests.benchmarks.reporting import publish, table

FOLDER = pathlib.Path(__file__).parent
ROOT = FOLDER.parent.parent
NAMES = sorted(path.stem for path in FOLDER.glob("[a-z]*.py") if path.stem != "common")
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg"}
# What a client needs stands at its head, in the form of PEP 723.
HEAD = re.compile(r"^# /// script\n((?:# .*\n)+)# ///$", re.MULTILINE)
HEADER = ["client", "versions", "losses", "apart", "steps", "clipped", "`metrics` from"]


class SkippedError(Exception):
    """What a project needs cannot be installed here."""


def needs(name: str) -> list[str]:
    """The packages that a client needs, from its head."""
    found = HEAD.search((FOLDER / f"{name}.py").read_text())
    if not found:
        raise ValueError(f"{name}.py has no head that says what it needs.")
    return tomllib.loads(re.sub("^# ", "", found[1], flags=re.MULTILINE))["dependencies"]


def install(name: str) -> pathlib.Path:
    """The Python of an environment with what the client needs; one that is there is used again."""
    folder = ROOT / ".clients" / name
    python = folder / "bin" / "python"
    for command in (
        ["venv", "--allow-existing", "--python", sys.executable, folder],
        ["pip", "install", "--python", python, *needs(name)],
    ):
        done = subprocess.run(["uv", *command, "--quiet"], capture_output=True, text=True)
        if done.returncode:
            raise SkippedError(" ".join(done.stderr.split()))
    return python


def train(name: str, python: pathlib.Path) -> dict[str, Any]:
    """What a client tells of its trainings."""
    # In float32 sums in another order are other losses after some steps of a chaotic training.
    environment = os.environ | ENVIRONMENT | {"JAX_ENABLE_X64": "1"}
    # Without -P `import flowjax` could find a client of that name.
    command = [python, "-P", "-m", f"tests.clients.{name}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def describe(name: str, facts: dict[str, Any]) -> list[str]:
    """The row of a table."""
    return [
        f"`{name}`",
        f"{needs(name)[0].replace('==', ' ')}, jax {facts['jax']}",
        f"{facts['losses']}",
        f"{facts['apart']:.0e}",
        f"{facts['steps']:.0f}",
        f"{facts['clipped']:.0%}",
        "a report" if facts["reports"] else "the state",
    ]


def try_all(names: list[str], keep: bool) -> tuple[list[list[str]], bool]:
    """The rows of all that were tried, and whether none failed."""
    rows, good = [], True
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            rows.append(describe(name, train(name, install(name))))
        except SkippedError as reason:
            rows.append([f"`{name}`", f"skipped: {reason}"[:200], *[""] * (len(HEADER) - 2)])
        except RuntimeError as failure:
            print(failure, file=sys.stderr)
            rows.append([f"`{name}`", "FAILED", *[""] * (len(HEADER) - 2)])
            good = False
        if not keep:
            shutil.rmtree(ROOT / ".clients" / name, ignore_errors=True)
    return rows, good


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="client", help=", ".join(NAMES))
    parser.add_argument("--keep", action="store_true", help="leave the environments for next time")
    parser.add_argument("--into", help="a document with a pair of marks for the table")
    args = parser.parse_args()
    unknown = set(args.names) - set(NAMES)
    if unknown:
        parser.error(f"no client is called {', '.join(sorted(unknown))}: {', '.join(NAMES)}")
    rows, good = try_all(args.names or NAMES, args.keep)
    publish(table(HEADER, rows), args.into, "clients")
    sys.exit(not good)


if __name__ == "__main__":
    main()
