"""Numbers computed by the original system, where a folder of them is at hand."""

import os
from pathlib import Path

import numpy as np
import pytest

_FOLDER = Path(
    os.environ.get("MOE_JAX_GOLDEN", Path(__file__).parents[1].parent / "shared" / "golden")
)


def load(name):
    """The arrays of one file, and its parameters by their names in the original."""
    path = _FOLDER / name
    if not path.exists():
        pytest.skip(f"{path} is absent; MOE_JAX_GOLDEN names the folder of reference numbers")
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    params = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
    return {k: v for k, v in arrays.items() if not k.startswith("param/")}, params
