"""allot as a command: what it writes, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tiny_models import save_tiny

pytest.importorskip("rich", reason="needs the extra [cli]")
pytest.importorskip("transformers", reason="needs the extra [hf]")

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.cli.main import main
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.adapter import (
    SelectorAdapter,
    save_adapter,
)
from dilated_attention_pytorch.hf.calibration import calibrate
from dilated_attention_pytorch.hf.layer_shares import SPARSITIES
from dilated_attention_pytorch.hf.model_folder import load_model
from dilated_attention_pytorch.selection import layer_shares as shares_of_layers
from tiny_models import tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the adapter of it, and text."""
    folder = tmp_path_factory.mktemp("allot")
    save_tiny(folder / "model")
    config = AdaptiveConfig(block_size=8, budget="threshold", base_sparsity=0.6)
    with adapt(load_model(folder / "model"), config) as adapted:
        calibrate(adapted, tokens(1, 300)[0], 0.6, lengths=(64,))
        save_adapter(adapted, folder / "adapter")
    for name in ("a", "b"):
        words = "".join(f"line {n} of {name}, as every line here.\n" for n in range(200))
        (folder / "texts").mkdir(exist_ok=True)
        (folder / "texts" / f"{name}.txt").write_text(words)
    return folder


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        "allot", "--model", str(folder / "model"), "--adapter", str(folder / "adapter"),
        "--text", str(folder / "texts"), "--out", str(out), "--lengths", "512", "256",
        "--windows", "1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def allotted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "run"
    assert main(command(folder, out)) == 0
    return out


def test_writes_costs_and_an_adapter_that_holds_them(allotted: Path) -> None:
    state = json.loads((allotted / "costs.json").read_text())["costs"]
    adapter = SelectorAdapter.read(allotted / "adapter")
    assert [costs.length for costs in adapter.costs] == [512, 256]
    for costs in adapter.costs:
        assert costs.sparsities == SPARSITIES
        assert {str(n): list(x) for n, x in costs.costs.items()} == state[str(costs.length)]
    assert adapter.tensors["0.thresholds"][:2, 0].tolist() == [256, 512]
    shares = adapter.costs[0].allot(0.6)
    assert float(adapter.tensors["0.base_sparsity"]) == pytest.approx(shares[0])
    # 0.6 is the mean that the adapter was made for.
    assert sum(shares.values()) / 2 == pytest.approx(0.6)


def test_a_killed_measurement_goes_on_exactly(
    folder: Path, allotted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dilated_attention_pytorch.hf import layer_shares

    measure = layer_shares.measure_costs

    def fail(*args: Any, **options: Any) -> Iterator[tuple[int, tuple[float, ...]]]:
        for number, found in enumerate(measure(*args, **options)):
            if number == 1:
                raise MemoryError("killed on purpose")
            yield found

    monkeypatch.setattr(layer_shares, "measure_costs", fail)
    with pytest.raises(MemoryError):
        main(command(folder, tmp_path / "run"))
    found = json.loads((tmp_path / "run" / "costs.json").read_text())["costs"]
    assert {length: list(layers) for length, layers in found.items()} == {"512": ["0"], "256": []}
    monkeypatch.setattr(layer_shares, "measure_costs", measure)
    assert main(command(folder, tmp_path / "run")) == 0
    for name in ("costs.json", "adapter/adapter.json"):
        assert (tmp_path / "run" / name).read_text() == (allotted / name).read_text()
    weights = "adapter/selectors.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (allotted / weights).read_bytes()


def test_prints_the_shares(
    folder: Path, allotted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # All is measured already: it writes the adapter and says what it holds.
    assert main(command(folder, allotted, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["sparsity"] == pytest.approx(0.6)
    assert set(printed["layers"]) == {"512", "256"}
    # Two layers say nothing of the noise.
    assert printed["noise"] == {"512": 0, "256": 0}
    assert main(command(folder, allotted)) == 0
    words = capsys.readouterr().out
    assert "512 tokens" in words
    assert "adapter is in" in words
    assert "Noise" not in words


def test_says_how_far_costs_are_noise(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    monkeypatch.setattr(shares_of_layers, "FEWEST", 2)
    found = command(folder, out)
    found[found.index("512") : found.index("256") + 1] = ["256"]
    assert main(found) == 0
    costs = SelectorAdapter.read(out / "adapter").costs[0]
    assert costs.noise > 0
    words = capsys.readouterr().out
    assert f"Noise of a cost (nats): {costs.noise:.5f} at 256 tokens" in words


def test_says_where_nothing_can_be_chosen(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = command(folder, tmp_path / "run")
    found[found.index("512") : found.index("256") + 1] = ["256", "16"]
    assert main(found) == 0
    errors = " ".join(capsys.readouterr().err.split())
    # Two blocks of 8, of whose three tiles two hold the diagonal.
    assert "nothing is left to choose at sparsity 0.6: in 16 tokens" in errors
    assert "in 256 tokens" not in errors


def test_another_job_in_the_same_folder_is_refused(
    folder: Path, allotted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (allotted / "costs.json").read_text()
    assert main(command(folder, allotted, "--max-bytes", "9000")) == 1
    assert "another job: max_bytes is None there and 9000 here" in capsys.readouterr().err
    assert (allotted / "costs.json").read_text() == before


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        (["--lengths", "0"], 2, "lengths must be positive, got (0,)"),
        (["--lengths", "64", "64"], 2, "lengths must differ"),
        (["--windows", "0"], 2, "windows must be at least 1, got 0"),
        (["--lengths", "100000"], 1, "too little text"),
        (["--adapter", "nowhere"], 1, "nowhere is no adapter"),
    ],
)
def test_bad_input_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str],
    code: int, words: str,
) -> None:  # fmt: skip
    assert main(command(folder, tmp_path, *changes)) == code
    assert words in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_what_was_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from dilated_attention_pytorch.hf import layer_shares

    def interrupted(*args: Any, **options: Any) -> Iterator[tuple[int, tuple[float, ...]]]:
        yield 0, (0.0,) * len(SPARSITIES)
        os.kill(os.getpid(), signal.SIGINT)
        yield 1, (0.1,) * len(SPARSITIES)
        raise AssertionError("went on after Ctrl-C")

    monkeypatch.setattr(layer_shares, "measure_costs", interrupted)
    assert main(command(folder, tmp_path / "run")) == 130
    assert "Stopped after 2 of 4 measurements" in capsys.readouterr().err.replace("\n", " ")
    found = json.loads((tmp_path / "run" / "costs.json").read_text())["costs"]
    assert list(found["512"]) == ["0", "1"]
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: "",
        lambda s: s[: len(s) // 2],
        lambda s: "[]",
        lambda s: "[" * 100_000,
        lambda s: json.dumps(json.loads(s) | {"costs": 3}),
        lambda s: json.dumps(
            json.loads(s) | {"costs": {"512": {"0": [float("nan")] * len(SPARSITIES)}}}
        ),
        lambda s: json.dumps(json.loads(s) | {"costs": {"77": {}, "x": {"0": ["a"]}}}),
    ],
)
def test_damaged_costs_are_named(
    folder: Path, allotted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    state = tmp_path / "costs.json"
    state.write_text(damage((allotted / "costs.json").read_text()))
    assert main(command(folder, tmp_path)) == 1
    error = capsys.readouterr().err
    assert "costs.json" in error
    assert "Remove it to measure anew" in error
    assert "Traceback" not in error
