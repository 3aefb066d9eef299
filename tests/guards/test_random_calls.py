"""Some hundred random calls against the oracle; ``guards.random_calls`` runs any number."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from dilated_attention_pytorch.ops.block_sparse_attention.interface import BACKENDS
from guards import draws
from guards.random_calls import add_report, command_of, parse, report_of, run_seeds

pytestmark = [
    # NumPy says so where numbers are not finite, as many here are meant to be.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    # Said where fresh memory is filled with NaN: what a GPU cannot repeat bit for bit.
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),
]
ON_GPU = torch.cuda.is_available()


def mismatches(*arguments: str) -> list[str]:
    report = run_seeds(parse(list(arguments)))
    assert report["calls"] >= int(arguments[1])
    return [f"--only {x['seed']}: {x['wrong']} {x['about']}" for x in report["mismatches"]]


@pytest.mark.parametrize("first", range(0, 50_000, 10_000))
def test_every_backend_equals_the_oracle(first):
    assert not mismatches("--calls", "140", "--seed", str(first))


def last_tile_left_out(args):
    pattern = args.pattern
    full = pattern.kv_num_blocks == pattern.kv_indices.shape[3]
    counts = (pattern.kv_num_blocks - full.int()).clamp(min=0)
    return replace(args, pattern=replace(pattern, kv_num_blocks=counts, check_values=False))


def scale_slightly_off(args):
    return replace(args, scale=args.scale * (1 + 1e-5))


def one_later_key_seen(args):
    offset = args.mask.query_offset
    return replace(args, mask=replace(args.mask, query_offset=offset + 1))


@pytest.mark.parametrize("spoil", [last_tile_left_out, scale_slightly_off, one_later_key_seen])
def test_what_is_wrong_is_noticed(monkeypatch, spoil):
    gather = BACKENDS["gather"]
    monkeypatch.setitem(BACKENDS, "gather", lambda args: gather(spoil(args)))
    arguments = ("--calls", "40", "--kind", "attention", "--backend", "gather")
    assert len(mismatches(*arguments)) >= 3


def test_reports_of_several_processes_are_added(tmp_path):
    """Each part is the call of its own command line; one that crashed is a mismatch."""
    options = parse(["--calls", "9", "--jobs", "2", "--kind", "misuse", "--seed", "5"])
    again = parse(command_of(options, seed=12)[3:])
    assert vars(again) == {**vars(options), "jobs": 1, "seed": 12}
    alone, *parts = (
        run_seeds(parse(["--calls", calls, "--kind", "misuse", "--seed", seed]))
        for calls, seed in (("9", "5"), ("4", "5"), ("5", "9"))
    )
    path = tmp_path / "report.json"
    path.write_text(json.dumps(parts[1]))
    add_report(parts[0], report_of(subprocess.Popen([sys.executable, "-c", ""]), path, 9))
    assert parts[0].pop("seeds") == [[5, 8], [9, 13]]
    for report in (alone, parts[0]):
        report.pop("seconds")
    assert parts[0] == {name: value for name, value in alone.items() if name != "seeds"}
    crash = "import os; os.kill(os.getpid(), 9)"
    found = report_of(subprocess.Popen([sys.executable, "-c", crash]), tmp_path / "none", 3)
    assert "-9" in found["mismatches"][0]["wrong"]


def test_calls_of_one_form_need_the_same_kernels():
    """On a GPU lengths, masks' values and numbers differ, and little that is compiled for."""
    options = {"blocks": draws.GPU_BLOCKS, "longest": 300, "most_pairs": 1_200_000}
    shapes, forms = set(), set()
    for seed in range(3, 3 + 12 * draws.GPU_FORMS, draws.GPU_FORMS):
        case = draws.draw(seed, **options, forms=draws.GPU_FORMS)
        shapes.add((case.query.shape, case.key.shape))
        given = frozenset(name for name, x in case.options.items() if isinstance(x, torch.Tensor))
        forms.add(
            (case.query.dtype, case.query.shape[2:], case.key.shape[2:], case.pattern.block_size,
             case.options["causal"], given, frozenset(x for x, y in case.needs.items() if y))
        )  # fmt: skip
    assert len(shapes) > 6
    assert len(forms) == 1


@pytest.mark.skipif(ON_GPU, reason="on a GPU the kernels run there")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_interpreted_kernels_equal_the_oracle():
    assert not mismatches("--calls", "12", "--seed", "0", "--backend", "triton")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
# Most calls compile kernels of their own: in parts that processes share.
@pytest.mark.parametrize("first", range(0, 80_000, 10_000))
def test_compiled_kernels_equal_the_oracle(first):
    assert not mismatches("--calls", "40", "--seed", str(first), "--device", "cuda")
