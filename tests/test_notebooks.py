"""The notebooks run, as plain programs, without a warning."""

import pathlib
import re
import subprocess
import sys

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "docs" / "notebooks").glob("*.md"))
CELL = re.compile(r"^```\{code-cell\}\n(?::[^\n]*\n)*(.*?)^```", re.MULTILINE | re.DOTALL)


def cells(path):
    return CELL.findall(path.read_text())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_is_found_and_one_draws(path):
    assert len(cells(path)) == path.read_text().count("```{code-cell}")
    assert any("plots." in cell for cell in cells(path))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    script = tmp_path / "notebook.py"
    script.write_text('import matplotlib\nmatplotlib.use("agg")\n' + "".join(cells(path)))
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
