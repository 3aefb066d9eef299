"""The page on the architecture says what is there, and the ways that it draws are short."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dilated_attention_pytorch
from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive, SelectorState
from dilated_attention_pytorch.ops.block_sparse_attention import interface as attention
from dilated_attention_pytorch.ops.block_sparse_decode import interface as decoding

ROOT = Path(__file__).parents[1]
PACKAGE = Path(dilated_attention_pytorch.__file__).parent
PAGE = ROOT / "docs" / "architecture.md"


def test_the_tree_on_the_page_is_the_tree() -> None:
    spec = importlib.util.spec_from_file_location("tree", ROOT / "docs" / "tree.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert PAGE.read_text() == module.page(), "run python docs/tree.py"


def test_what_the_page_names_exists() -> None:
    words = PAGE.read_text().split("<!-- tree -->")[0]
    found = re.findall(r"`?((?:\w+/)*\w+\.py)`?(?::((?: `[\w.]+`,?)+))?", words)
    assert len(found) > 40
    folder = ""
    for path, names in found:
        if "/" in path:
            folder = path.rpartition("/")[0]
        places = [ROOT / path, PACKAGE / path, PACKAGE / folder / path]
        place = next((p for p in places if p.exists()), None)
        assert place is not None, path
        for name in re.findall(r"`([\w.]+)`", names):
            assert re.search(rf"\b(def|class) {name.split('.')[-1]}\b", place.read_text()), name


def on_the_stack() -> list[str]:
    """The package's files that the running call came through."""
    files, frame = [], sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        files.append(Path(frame.f_code.co_filename))
    inside = [str(f.relative_to(PACKAGE)) for f in files if f.is_relative_to(PACKAGE)]
    return list(dict.fromkeys(reversed(inside)))


@contextmanager
def way(module: Any, backends: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The files between a call and the backend that computes it."""
    found: list[str] = []
    original = getattr(module, backends)["gather"]

    def watched(arguments: Any) -> Any:
        found.extend(on_the_stack())
        return original(arguments)

    monkeypatch.setitem(getattr(module, backends), "gather", watched)
    yield found


def make() -> tuple[BlockSparseAdaptive, Tensor]:
    config = AdaptiveConfig(block_size=16, query_scope="past")
    layer = BlockSparseAdaptive(num_heads=2, head_dim=16, adaptive_config=config, backend="gather")
    return layer.eval(), torch.randn(1, 130, 2, 16)


def test_the_way_of_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make()
    with way(attention, "BACKENDS", monkeypatch) as files:
        layer(x, x, x, is_causal=True)
    assert files == ["nn/block_sparse.py", "ops/block_sparse_attention/interface.py"]


@torch.no_grad()
def test_the_way_of_a_generated_token(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make()
    state = SelectorState()
    layer.prefill(x[:, :128], x[:, :128], x[:, :128], state)
    with way(decoding, "BACKENDS", monkeypatch) as files:
        layer.decode(x[:, 128:129], x, x, state)
    assert len(files) <= 8, files
    assert files[-1] == "ops/block_sparse_decode/interface.py"


@torch.no_grad()
def test_the_way_of_a_token_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    from dilated_attention_pytorch.hf import adapt
    from tiny_models import tiny_model, tokens

    model = tiny_model()
    config = AdaptiveConfig(block_size=16, query_scope="past", base_sparsity=0.5)
    with adapt(model, config), way(decoding, "BACKENDS", monkeypatch) as files:
        model.generate(tokens(1, 64), max_new_tokens=2, do_sample=False)
    once = list(dict.fromkeys(files))
    assert once
    assert len(once) <= 8, once
