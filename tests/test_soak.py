"""A few random compositions of all parts; `python -m tests.soak` runs as many as one likes."""

import pytest
from hypothesis import given, settings

from tests.soak.laws import hold
from tests.soak.parts import Composition, compositions


@pytest.mark.usefixtures("as_users")  # Optax's parts promote dtypes
def test_random_compositions_keep_the_laws():
    @settings(max_examples=6, derandomize=True, deadline=None, database=None)
    @given(compositions(wide=False, meshes={"op by op": 1}))
    def run(parts: Composition):
        hold(parts)

    run()
