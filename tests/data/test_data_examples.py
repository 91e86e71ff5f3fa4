import doctest

import pytest

from moe_jax.data import baselines, held_out, provenance, text, windows


@pytest.mark.parametrize("module", [baselines, held_out, provenance, text, windows])
def test_examples_in_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
