"""Runs the soak; see the package."""

import argparse
import sys
import time
import traceback
from collections import Counter

import jax
from hypothesis import Phase, given, seed, settings

import tests.conftest
import tests.soak
from tests.conftest import set_promotion
from tests.soak.laws import hold
from tests.soak.parts import compositions, shrink

AT_ONCE = 200
# Chunks after which compiled programs are dropped: with jax 0.12 more would exceed the number of
# mappings that Linux grants a process.
CLEARED = 8


class Tally:
    """What was run so far."""

    def __init__(self):
        self.count, self.ways, self.structures = 0, Counter(), set()
        self.start, self.last = time.monotonic(), None

    def add(self, parts) -> None:
        self.count += 1
        self.ways[parts.mesh] += 1
        self.structures.add(hash(parts.structure))

    def __str__(self) -> str:
        ways = ", ".join(f"{n} {way}" for way, n in self.ways.most_common())
        return (
            f"{self.count} compositions, {len(self.structures)} without their numbers"
            f" ({ways}), all laws kept, {time.monotonic() - self.start:.0f} s"
        )


def run(first: int, tally: Tally, end: float) -> None:
    """Some compositions, or as many as there is time for."""

    @seed(first)
    @settings(max_examples=AT_ONCE, deadline=None, database=None, phases=[Phase.generate])
    @given(compositions(wide=jax.config.jax_enable_x64))
    def one(parts):
        if time.monotonic() < end:
            tally.last = parts
            hold(parts)
            tally.add(parts)

    one()


def breaks(parts) -> bool:
    """Whether a composition breaks a law."""
    try:
        hold(parts)
    except Exception:
        return True
    return False


def main(argv=None) -> int:
    """Runs until the time is over, and returns the exit code."""
    parser = argparse.ArgumentParser(description=tests.soak.__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    set_promotion("standard", "allow")  # as Optax's parts need it
    end, tally, chunk = time.monotonic() + 60 * args.minutes, Tally(), 0
    while time.monotonic() < end:
        chunk += 1
        try:
            with jax.enable_x64(chunk % 2 == 0):
                run(1_000_000 * args.seed + chunk, tally, end)
        except Exception:
            traceback.print_exc()
            with jax.enable_x64(chunk % 2 == 0):
                print(f"{tally.last} breaks a law, and so does", shrink(tally.last, breaks))
            return 1
        print(tally, flush=True)
        if chunk % CLEARED == 0:
            jax.clear_caches()
    return 0


if __name__ == "__main__":
    sys.exit(main())
