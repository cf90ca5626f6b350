"""Plants mistakes in the library, one at a time, and counts how many of them the tests detect.

    uv run --group mutation python -m tests.mutation [--sample 300] [--seed 0] [--log FILE]

The mistakes are those of cosmic-ray (another operator, number or comparison; a removed decorator
...), at places drawn at random, each of which counts once. Cosmic-ray itself would start JAX again
for each; here a process that has already imported it forks. (mutmut 3 forks, too, but leaves out
all functions with a decorator, such as the public ones.) The mistakes in the table `EQUIVALENT`
were reviewed and change nothing. This is run by hand; `--log` resumes where its file ended.
"""

import argparse
import ast
import functools
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import random
import signal
import sys
import time
from typing import NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from tests.mutation_tables import EQUIVALENT, TESTS

ROOT = pathlib.Path(__file__).parent.parent
HOUSE = ROOT / "optaxclip"
SECONDS = 900


class Mutant(NamedTuple):
    """One mistake: the file, and which operator of cosmic-ray at which of its places."""

    path: str
    operator: str
    occurrence: int
    line: int

    @property
    def text(self) -> str:
        code = (HOUSE / self.path).read_text()
        return mutate_code(code, get_operator(self.operator)(), self.occurrence) or code


def main(argv=None) -> int:
    """Prints the score, and the mistakes that no test detected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only files whose path begins so")
    parser.add_argument("--log", type=pathlib.Path, default=pathlib.Path("mutation.jsonl"))
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    warm_up()
    args.log.touch()
    known = map(json.loads, args.log.read_text().splitlines())
    done = {Mutant(*row["mutant"]): row["killed"] for row in known}
    everything = [m for m in mutants() if m.path.startswith(args.only)]
    chosen = draw(everything, args.sample, args.seed)
    print(f"{len(chosen)} of {len({(m.path, m.line) for m in everything})} lines with mistakes")
    for i, mutant in enumerate(chosen):
        if mutant not in done:
            start = time.monotonic()
            done[mutant] = run_tests(mutant)
            seconds = round(time.monotonic() - start, 1)
            row = {"mutant": mutant, "killed": done[mutant], "seconds": seconds}
            with args.log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{i + 1}: {'killed' if done[mutant] else show(mutant)} {seconds} s", flush=True)
    survivors = [m for m in chosen if not done[m] and change(m)[2] not in EQUIVALENT]
    print(f"{sum(map(done.get, chosen))} of {len(chosen)} killed; neither these nor equivalent:")
    print(*map(show, survivors), sep="\n")
    return 0


def warm_up() -> None:
    """Imports what takes long, but starts no backend: its threads would not survive a fork."""
    for name in ("chex", "equinox", "flax", "hypothesis", "optax", "pytest", "sybil", "xdist"):
        importlib.import_module(name)


def mutants() -> list[Mutant]:
    """All mistakes."""
    # Operators with arguments replace variables, which would have to be named.
    named = ("VariableReplacer", "VariableInserter", "NoOp")
    names = [name for name in operator_names() if not name.endswith(named)]
    found = []
    for path in files():
        text = (HOUSE / path).read_text()
        nodes = list(ast_nodes(get_ast(text)))
        for name in names:
            operator = get_operator(name)()
            places = [place for node in nodes for place in operator.mutation_positions(node)]
            found += [Mutant(path, name, i, start[0]) for i, (start, _) in enumerate(places)]
    return found


def files() -> list[str]:
    paths = [str(path.relative_to(HOUSE)) for path in sorted(HOUSE.rglob("*.py"))]
    rooms = (*(set(TESTS) - {"wrappers/"}), "wrappers/skip.py", "wrappers/steps.py")
    return [p for p in paths if p.startswith(rooms) and not p.endswith("__init__.py")]


@functools.cache
def bare(text: str) -> str:
    """The program without what does nothing in a program that is right; "" for what is none.

    That is annotations, `strict=True`, and which arguments go by name: cosmic-ray takes the star
    for a product.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            node.args = [*node.posonlyargs, *node.args, *node.kwonlyargs]
            node.defaults = [*node.defaults, *filter(None, node.kw_defaults)]
            node.posonlyargs = node.kwonlyargs = node.kw_defaults = []
        if isinstance(node, ast.Call):
            node.keywords = [k for k in node.keywords if k.arg != "strict"]
        for field in ("annotation", "returns"):
            if getattr(node, field, None):
                setattr(node, field, ast.Constant(0))
    return ast.dump(tree)


def draw(found: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """A sample: lines at random, and of each line one mistake.

    But not in what `bare` leaves out.
    """
    rng, lines, chosen = random.Random(seed), {}, []
    for mutant in found:
        lines.setdefault((mutant.path, mutant.line), []).append(mutant)
    for path, line in rng.sample(sorted(lines), len(lines)):
        plain, rows = bare((HOUSE / path).read_text()), lines[path, line]
        mutant = next(
            (m for m in rng.sample(rows, len(rows)) if bare(m.text) not in ("", plain)), None
        )
        chosen += [mutant] if mutant else []
        if len(chosen) == count:
            break
    return chosen


def run_tests(mutant: Mutant) -> bool:
    """Whether a test fails or hangs, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        os._exit(run_pytest(mutant))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            assert code != 5, f"no tests for {mutant.path}"
            return code != 0
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def plant(mutant: Mutant) -> None:
    """Makes later imports of the module return the one with the mistake."""
    name = "optaxclip." + mutant.path.removesuffix(".py").replace("/", ".")
    path, text = str(HOUSE / mutant.path), mutant.text

    class Loader(importlib.machinery.SourceFileLoader):
        def get_code(self, fullname):
            return compile(text, path, "exec")

    class Finder:
        @staticmethod
        def find_spec(fullname, _path, _target=None):
            if fullname == name:
                loader = Loader(name, path)
                return importlib.util.spec_from_file_location(name, path, loader=loader)
            return None

    sys.meta_path.insert(0, Finder)


def run_pytest(mutant: Mutant) -> int:
    import jax
    import pytest

    class Plugin:
        # Not before: pytest would put its own import hook in front.
        @staticmethod
        def pytest_sessionstart():
            plant(mutant)

        # Also the smallest programs: most tests of most mutants run the same ones.
        @staticmethod
        def pytest_collection_finish():
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    tests = next(tests for room, tests in TESTS.items() if mutant.path.startswith(room))
    options = ["-x", "-q", "-m", "not slow", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    options += ["-p", "no:cacheprovider", "-p", "no:xdist", f"optaxclip/{mutant.path}"]
    return int(pytest.main([*options, *tests], plugins=[Plugin]))


def change(mutant: Mutant) -> tuple[int, str, str]:
    """The number of the line, the line, and what it became."""
    old, new = (HOUSE / mutant.path).read_text().splitlines(), mutant.text.splitlines()
    at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0)
    return at + 1, old[at].strip(), new[at].strip()


def show(mutant: Mutant) -> str:
    line, old, new = change(mutant)
    return f"optaxclip/{mutant.path}:{line}\n  - {old}\n  + {new}"


if __name__ == "__main__":
    sys.exit(main())
