"""The examples in the docstrings run as written."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import dilated_attention_pytorch

ROOT = Path(dilated_attention_pytorch.__file__).parent
# The kernels need triton, and the command line rich; they hold no examples.
NAMES = [
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(ROOT.rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str) -> None:
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", dilated_attention_pytorch.__all__)
def test_every_public_name_has_an_example(name: str) -> None:
    item = getattr(dilated_attention_pytorch, name)
    found = [
        x for test in doctest.DocTestFinder(recurse=False).find(item, name) for x in test.examples
    ]
    assert found, f"{name} shows no example"
