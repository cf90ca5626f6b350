"""Several processes train the same parameters as one, and a killed run resumes bit for bit."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "multi_host.py"


def run(folder, name, *options, steps=50, fails=False):
    """Runs the example in one or more processes: the parameters, and what it prints."""
    out = folder / f"{name}.npz"
    command = [sys.executable, str(SCRIPT), "--checkpoints", str(folder / name), *options]
    command += ["--out", str(out), "--steps", str(steps)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    captured = {"env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, **captured)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return None if fails else (dict(np.load(out)), done.stdout)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The parameters that one process with four devices trains."""
    params, printed = run(tmp_path_factory.mktemp("alone"), "alone")
    assert "skipped 1" in printed  # the bad step
    return params


TWO = ["--simulate", "2", "--every", "16"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The parameters and the output of two processes that nothing kills."""
    return run(tmp_path_factory.mktemp("whole"), "whole", *TWO)


def check_near(params, printed, alone):
    assert params.keys() == alone.keys() and "skipped 1" in printed
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
    """It is killed between two checkpoints, after the bad step. The statistics come back, too."""
    run(tmp_path, "killed", *TWO, "--die-after", "39", fails=True)
    resumed, printed = run(tmp_path, "killed", *TWO)
    assert "step 48" in printed and "step 32" not in printed and "skipped 1" in printed
    for name, leaf in whole[0].items():
        np.testing.assert_array_equal(resumed[name], leaf)
