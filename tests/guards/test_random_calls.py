"""Some hundred random calls against the oracle; ``guards.random_calls`` runs as many as you like."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from guards.random_calls import main

# Rows that read what is not finite, and the numbers that interpreted kernels leave out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("first", range(0, 600, 100))
def test_every_cpu_backend_equals_the_oracle(first, tmp_path):
    found = tmp_path / "found.json"
    assert main(["--calls", "1", "--seeds", "100", "--seed", str(first), "--json", str(found)]) == 0
