"""Importing the package loads torch alone, changes nothing, and goes one way."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dilated_attention_pytorch

PACKAGE = "dilated_attention_pytorch"
ROOT = Path(dilated_attention_pytorch.__file__).parent
# Later rooms may import earlier ones and their own.
ROOMS = [
    ("config", "files", "foreign_text", "mask", "runtime"),
    ("pattern",),
    ("candidates", "scoring", "selection"),
    ("ops",),
    ("documents",),
    ("nn",),
    ("models",),
    ("analysis", "hf", "tasks", "train"),
    ("cli",),
]
RANK = {name: rank for rank, room in enumerate(ROOMS) for name in room}
# Optional packages, and where alone they may be imported.
OPTIONAL = {
    "triton": (
        "ops.triton_device",
        "ops.block_selection.newest",
        *(
            f"ops.block_selection.{name}"
            for name in (
                "budgets",
                "choice",
                "lattice",
                "low_rank",
                "scores",
                "summaries",
                "threshold",
                "transpose",
            )
        ),
        *(
            f"ops.block_sparse_attention.{name}"
            for name in ("triton_backward", "triton_by_products", "triton_forward", "triton_tiles")
        ),
        "ops.block_sparse_decode.triton_decode",
    ),
    "flash_attn": ("ops",),
    "transformers": ("hf", "train.hf_trainer"),
    "huggingface_hub": ("hf",),
    "peft": ("hf",),
    "lightning": ("train.lightning",),
    "matplotlib": ("analysis",),
    "numpy": (),
    "rich": ("cli",),
    "safetensors": ("files", "hf.model_folder"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, *, types: bool = False) -> Iterator[str]:
    """Names of imported modules, inside functions too; those for types alone only if asked for."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            if node.module.startswith(PACKAGE):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imported(node, types=types)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def own_imports(name: str) -> set[str]:
    """Modules of the package that a module imports."""
    tree = ast.parse(MODULES[name].read_text())
    names = imported(tree, types=True)
    inside = {x.removeprefix(PACKAGE).lstrip(".") for x in names if x.startswith(PACKAGE)}
    return {x for x in inside if x in MODULES}


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_imports_go_one_way(name: str) -> None:
    room = name.split(".")[0]
    assert room in RANK, f"{room} has no place in ROOMS"
    for other in own_imports(name):
        assert other, "nothing inside imports the package itself"
        assert RANK[other.split(".")[0]] <= RANK[room], f"{name} imports {other}"


def test_there_is_no_cycle_between_modules() -> None:
    """Imports for types alone and those of an __init__ counted."""
    graph = {name: own_imports(name) - {name} for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_house_fits_into_a_head() -> None:
    sizes = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert len(sizes) <= 115
    assert max(sizes.values()) <= 700, max(sizes, key=sizes.__getitem__)


@pytest.mark.parametrize("package", OPTIONAL)
def test_optional_packages_stay_in_their_rooms(package: str) -> None:
    for name, path in MODULES.items():
        if any(x.split(".")[0] == package for x in imported(ast.parse(path.read_text()))):
            allowed = OPTIONAL[package]
            assert any(name == room or name.startswith(f"{room}.") for room in allowed), name


SCRIPT = """
import os, sys, torch
before, environment = set(sys.modules), dict(os.environ)
settings = lambda: (torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().sum(),
                    torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
was = settings()
import dilated_attention_pytorch as package
assert all(hasattr(package, name) for name in package.__all__)
assert settings() == was and dict(os.environ) == environment
new = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(sorted(new), [name for name in %r if name in sys.modules and name not in before])
"""


def test_importing_loads_torch_alone_and_changes_nothing() -> None:
    """In a process of its own, with every warning an error."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT % list(OPTIONAL)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"['{PACKAGE}'] []"


def test_public_names_are_sorted_and_documented() -> None:
    names = dilated_attention_pytorch.__all__
    assert names == sorted(names)
    for name in names:
        assert getattr(dilated_attention_pytorch, name).__doc__, name
