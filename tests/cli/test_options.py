"""What ``train`` takes where nothing is named: block size and sparsity that leave a choice."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest

from dilated_attention_pytorch.cli.console import UsageError
from dilated_attention_pytorch.cli.main import main
from dilated_attention_pytorch.cli.options import build_settings


def config(**options: Any) -> Any:
    return build_settings(options)[0].config


def test_block_size_and_sparsity_go_by_the_length() -> None:
    """With blocks of 32 at 512 bytes more than half of the rows chose nothing."""
    found = [config(seq_len=n) for n in (128, 256, 512, 1024, 2048, 8192, 16384)]
    assert [c.block_size for c in found] == [16, 16, 16, 16, 16, 32, 64]
    # Never 0.95, which costs more loss than it saves time.
    assert [c.base_sparsity for c in found] == [0.15, 0.5, 0.75, 0.85, 0.9, 0.9, 0.9]
    assert config() == config(seq_len=512)
    assert {c.num_local_blocks for c in found} == {1}
    # Among many blocks training tries others, too.
    assert [c.num_explore_blocks for c in found] == [0, 0, 0, 0, 0, 1, 1]
    assert {c.query_scope for c in found} == {"past"}


def test_what_is_named_stays() -> None:
    assert config(block_size=32).block_size == 32
    # A row chooses as much as it must read: 0.8 would leave a third.
    assert config(block_size=32).base_sparsity == 0.5
    assert config(base_sparsity=0.85).base_sparsity == 0.85
    assert config(num_local_blocks=0).base_sparsity == 0.8
    long = config(seq_len=8192, num_local_blocks=0, num_explore_blocks=2)
    assert (long.num_local_blocks, long.num_explore_blocks) == (0, 2)
    # A fixed pattern is all that it reads, and leaves out as much, so that the two compare.
    fixed = config(attention="local")
    assert (fixed.num_local_blocks, fixed.base_sparsity) == (0, config().base_sparsity)


@pytest.mark.parametrize(
    "options", [{"base_sparsity": 0.95}, {"block_size": 128, "base_sparsity": 0.7}]
)
def test_settings_that_leave_nothing_are_refused_by_their_arithmetic(options: Any) -> None:
    with pytest.raises(UsageError, match=r"nothing is left .* may read .* always read\. Take "):
        build_settings(options)
    # Of fixed patterns what is always read is the pattern.
    assert build_settings({**options, "attention": "local"})


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "--attention", "adaptiv"], "Did you mean 'adaptive'?"),
        (["train", "--sequence-len", "4"], "Did you mean --seq-len?"),
        (["wholly", "other"], "diagnose)."),
    ],
)
def test_what_was_meant_is_named(
    typed: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(typed)
    assert ended.value.code == 2
    shown = capsys.readouterr().err.strip()
    assert shown.endswith(meant)
    assert len(shown.splitlines()[-1]) < 300


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    import dilated_attention_pytorch

    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    installed = version("dilated_attention_pytorch")
    assert capsys.readouterr().out == f"dilated-attention {installed}\n"
    assert dilated_attention_pytorch.__version__ == installed
    public = {*dilated_attention_pytorch.__all__, "__version__"}
    assert set(dir(dilated_attention_pytorch)) == public
