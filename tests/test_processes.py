"""Several processes train as one does: the same parameters, and a killed run resumes bit for bit
where it was.
"""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "multi_host.py"


def run(folder, name, *options, steps=50, fails=False):
    """The example in a process of its own, or several: what process 0 wrote in the end."""
    out = folder / f"{name}.npz"
    command = [
        sys.executable,
        str(SCRIPT),
        "--checkpoints",
        str(folder / name),
        "--out",
        str(out),
        *options,
    ]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu"
    }  # compiled as quickly as the other tests, see conftest.py
    done = subprocess.run(
        [*command, "--steps", str(steps)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return None if fails else (dict(np.load(out)), done.stdout)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The parameters that one process with four devices trains."""
    params, said = run(tmp_path_factory.mktemp("alone"), "alone")
    assert "skipped 1" in said  # the bad step was left out
    return params


TWO = ["--simulate", "2", "--every", "16"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What two processes train that nothing kills."""
    return run(tmp_path_factory.mktemp("whole"), "whole", *TWO)


def check_near(params, said, alone):
    assert params.keys() == alone.keys() and "skipped 1" in said
    for name, leaf in alone.items():
        np.testing.assert_allclose(params[name], leaf, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_match_one(alone, whole):
    check_near(*whole, alone)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--simulate", "4", "--layout", "data"]])
def test_several_processes_match_one(alone, tmp_path, options):
    check_near(*run(tmp_path, "several", *options), alone)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(whole, tmp_path):
    """Killed between two checkpoints, after the bad step: the statistics of the clip come back,
    too.
    """
    run(tmp_path, "killed", *TWO, "--die-after", "39", fails=True)
    resumed, said = run(tmp_path, "killed", *TWO)
    assert "step 48" in said and "step 32" not in said and "skipped 1" in said
    for name, leaf in whole[0].items():
        np.testing.assert_array_equal(resumed[name], leaf)
