"""BlockPattern: checks, conversions, transpose, files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dilated_attention_pytorch import BlockPattern
from dilated_attention_pytorch.pattern import pack_ascending


def random_pattern(b, h, i, j, size=(16, 8), seed=0, keep=0.4):
    dense = torch.rand(b, h, i, j, generator=torch.Generator().manual_seed(seed)) < keep
    lengths = {"q_len": i * size[0] - 3, "kv_len": j * size[1] - 1}
    return dense, BlockPattern.from_dense(dense, block_size=size, **lengths)


@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 6), st.integers(1, 7), st.integers(0, 99)
)
def test_dense_and_lists_are_the_same_tiles(b, h, i, j, seed):
    dense, pattern = random_pattern(b, h, i, j, seed=seed)
    assert torch.equal(pattern.to_dense(), dense)
    pattern.validate()
    assert float(pattern.sparsity) == pytest.approx(1 - float(dense.float().mean()))
    per_head = 1 - dense.double().mean((-1, -2))
    torch.testing.assert_close(pattern.sparsity_per_head, per_head)


def test_it_shows_itself_in_a_line():
    _, pattern = random_pattern(2, 3, 4, 5, keep=2.0)
    assert repr(pattern) == "BlockPattern(2 x 3 heads, 4 x 5 blocks of 16 x 8, sparsity 0.00)"
    dense = torch.eye(4, dtype=torch.bool).expand(1, 2, 4, 4)
    pattern = BlockPattern.from_dense(dense, block_size=16, q_len=64, kv_len=64)
    assert repr(pattern) == "BlockPattern(1 x 2 heads, 4 x 4 blocks of 16, sparsity 0.75)"
    nowhere = replace(
        pattern, kv_num_blocks=pattern.kv_num_blocks.to("meta"),
        kv_indices=pattern.kv_indices.to("meta"), kv_num_allowed=None, check_values=False,
    )  # fmt: skip
    assert repr(nowhere) == "BlockPattern(1 x 2 heads, 4 x 4 blocks of 16)"


@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 99))
def test_transpose_lists_every_tile_once_by_key_block(i, j, seed):
    dense, pattern = random_pattern(2, 2, i, j, seed=seed)
    transpose, width = pattern.transpose(), pattern.kv_indices.shape[-1]
    assert pattern.transpose() is transpose
    for b in range(2):
        for h in range(2):
            for key in range(j):
                low, high = transpose.offsets[b, h, key : key + 2].tolist()
                slots = transpose.slots[b, h, low:high].tolist()
                rows = [slot // width for slot in slots]
                assert rows == dense[b, h, :, key].nonzero().flatten().tolist()
                assert all(
                    pattern.kv_indices[b, h, slot // width, slot % width] == key for slot in slots
                )


def test_sparsity_counts_against_what_the_mask_allows():
    dense = torch.eye(4, dtype=torch.bool)
    allowed = torch.arange(1, 5, dtype=torch.int32).view(1, 1, 4)
    pattern = BlockPattern.from_dense(dense, q_len=256, kv_len=256, kv_num_allowed=allowed)
    assert float(pattern.sparsity) == pytest.approx(1 - 4 / 10)
    assert pattern.allowed_tiles.tolist() == [[10]]


def test_heads_and_devices():
    dense, pattern = random_pattern(2, 2, 3, 4)
    heads = pattern.heads(4)
    assert len(heads) == 4
    for number, head in enumerate(heads):
        assert torch.equal(head.to_dense(), dense[:, number // 2 : number // 2 + 1])
    assert torch.equal(pattern.to("cpu").to_dense(), dense)
    with pytest.raises(ValueError, match="multiple"):
        pattern.heads(3)
    with pytest.raises(ValueError, match=r"head must lie in \[0, 1\]"):
        pattern.head(2)


def test_block_mask_there_and_back():
    dense, pattern = random_pattern(1, 2, 3, 4, size=(32, 16))
    block_mask = pattern.to_block_mask()
    assert torch.equal(block_mask.to_dense().bool(), dense)
    back = BlockPattern.from_block_mask(block_mask)
    assert torch.equal(back.to_dense(), dense)
    assert (back.q_len, back.kv_len, back.block_size) == (pattern.q_len, pattern.kv_len, (32, 16))


def test_block_mask_of_lists_wider_than_the_key_blocks():
    index = torch.tensor([[[[0, 1, -1, 7], [1, 9, 9, 9]]]], dtype=torch.int32)
    pattern = BlockPattern(torch.tensor([[[2, 1]]]).int(), index, 8, 8, (4, 4))
    dense = pattern.to_block_mask().to_dense().bool()
    assert dense.tolist() == [[[[True, True], [False, True]]]]


def test_pack_ascending_cuts_at_the_width():
    chosen = torch.tensor([[True, False, True, True], [False] * 4])
    assert pack_ascending(chosen, 2).tolist() == [[0, 2], [0, 0]]
    assert pack_ascending(chosen, 3, torch.tensor([5, 6, 7, 9])).tolist() == [[5, 7, 9], [0, 0, 0]]


def make(count, index, **changes):
    settings = {"q_len": 128, "kv_len": 256} | changes
    tensors = [torch.tensor(x, dtype=torch.int32) for x in (count, index)]
    return BlockPattern(*tensors, **settings)


@pytest.mark.parametrize(
    ("count", "index", "changes", "words"),
    [
        ([[[3, 0]]], [[[[0, 1], [0, 0]]]], {}, "kv_num_blocks must lie in"),
        ([[[-1, 0]]], [[[[0, 1], [0, 0]]]], {}, "kv_num_blocks must lie in"),
        ([[[1, 1]]], [[[[4], [0]]]], {}, "kv_indices must lie in"),
        ([[[1, 1]]], [[[[-1], [0]]]], {}, "kv_indices must lie in"),
        ([[[2, 0]]], [[[[1, 0], [0, 0]]]], {}, "ascend strictly"),
        ([[[2, 0]]], [[[[1, 1], [0, 0]]]], {}, "ascend strictly"),
        ([[[1, 1]]], [[[[1], [0]]]], {"q_len": 129}, "query blocks"),
        ([[[1, 1]]], [[[[1], [0]]]], {"block_size": (0, 64)}, "block_size"),
        ([[[1]]], [[[[1], [0]]]], {}, "must be"),
    ],
)
def test_bad_lists(count, index, changes, words):
    with pytest.raises(ValueError, match=words):
        make(count, index, **changes)


def test_unused_entries_do_not_count():
    pattern = make([[[1, 0]]], [[[[3, -7], [99, 1]]]])
    assert pattern.to_dense().sum() == 1


def test_bad_dtypes_and_masks():
    with pytest.raises(TypeError, match="int32"):
        BlockPattern(torch.ones(1, 1, 2).long(), torch.ones(1, 1, 2, 1).int(), 128, 128)
    with pytest.raises(TypeError, match="dense must hold booleans"):
        BlockPattern.from_dense(torch.ones(2, 2), q_len=128, kv_len=128)
    with pytest.raises(ValueError, match="2, 3 or 4 dimensions"):
        BlockPattern.from_dense(torch.ones(2).bool(), q_len=128, kv_len=128)
    with pytest.raises(ValueError, match=r"end in \(2, 2\)"):
        BlockPattern.from_dense(torch.ones(2, 3).bool(), q_len=128, kv_len=128)


def test_files(tmp_path):
    dense, pattern = random_pattern(2, 2, 3, 4)
    pattern.save(tmp_path / "a.safetensors")
    loaded = BlockPattern.load(tmp_path / "a.safetensors")
    assert torch.equal(loaded.to_dense(), dense)
    assert (loaded.q_len, loaded.kv_len, loaded.block_size) == (45, 31, (16, 8))
    assert loaded.kv_num_allowed is None


def metadata(**changes):
    about = {"q_len": 128, "kv_len": 128, "block_size": [64, 64]}
    return {
        "format": "dilated_attention_pytorch.block_pattern",
        "version": "1",
        "about": json.dumps(about),
    } | changes


@pytest.mark.parametrize(
    ("tensors", "about", "words"),
    [
        (("kv_num_blocks", "kv_indices"), {"version": "2"}, "version"),
        (("kv_num_blocks", "kv_indices"), {"format": "other"}, "must be a block pattern"),
        (("kv_num_blocks", "kv_indices"), {"about": "{"}, "missing or unreadable"),
        (("kv_num_blocks", "kv_indices"), {"about": '{"q_len": 128}'}, "missing or unreadable"),
        (("kv_num_blocks", "kv_indices"), {"about": "[]"}, "missing or unreadable"),
        (("kv_num_blocks",), {}, "missing or unreadable"),
    ],
)
def test_bad_files(tmp_path, tensors, about, words):
    content = {
        "kv_num_blocks": torch.ones(1, 1, 2, dtype=torch.int32),
        "kv_indices": torch.zeros(1, 1, 2, 1, dtype=torch.int32),
    }
    path = tmp_path / "x.safetensors"
    save_file({name: content[name] for name in tensors}, path, metadata=metadata(**about))
    with pytest.raises(ValueError, match=words):
        BlockPattern.load(path)


def test_no_file_and_no_safetensors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pattern file"):
        BlockPattern.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        BlockPattern.load(tmp_path / "text")


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    base = torch.tensor([[[1, 2, 2, 1]]], dtype=torch.int32)
    index = torch.tensor([0, 1], dtype=torch.int32).expand(1, 1, 4, 2)
    pattern = BlockPattern(base, index, 4, 4, (1, 1), kv_num_allowed=base)
    # One tensor twice, views of one, and one that repeats itself.
    for allowed in (base, base[..., :1], base.expand(1, 1, 4)):
        replace(pattern, kv_num_allowed=allowed).save(tmp_path / "pattern.safetensors")
        read = BlockPattern.load(tmp_path / "pattern.safetensors")
        assert torch.equal(read.kv_num_blocks, base)
        assert torch.equal(read.kv_indices, index)
        assert torch.equal(read.kv_num_allowed, allowed)


def test_a_copy_with_other_values_is_checked_and_has_its_own_transpose() -> None:
    """Of a pattern that the library made without checking, and has transposed already."""
    pattern = BlockPattern.from_dense(
        torch.tensor([[1, 0], [1, 0]]).bool(), q_len=8, kv_len=8, block_size=4
    )
    pattern.transpose()
    other = replace(pattern, kv_indices=pattern.kv_indices + 1)
    assert pattern.transpose().offsets.flatten().tolist() == [0, 2, 2]
    assert other.transpose().offsets.flatten().tolist() == [0, 0, 2]
    with pytest.raises(ValueError, match="kv_indices"):
        replace(pattern, kv_indices=pattern.kv_indices - 1)
