"""Rings hold the latest tokens, in whichever way they are appended."""

import pytest
import torch

from dilated_attention_pytorch.nn.state import append_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("backend", ["index", "triton"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_rings_hold_the_latest_tokens(backend, cached, left):
    if backend == "triton":
        pytest.importorskip("triton", reason="the triton package is not installed")
    torch.manual_seed(0)
    ring, total = 6, 25
    q, k = (torch.randn(2, h, total, 5).to(DEVICE).transpose(1, 2) for h in (4, 2))
    queries, keys = (torch.zeros(2, ring, h, 5, device=DEVICE) for h in (4, 2))
    lengths = torch.tensor([0, 3], device=DEVICE)
    starts = torch.tensor([2, 1], device=DEVICE) if left else None
    done = lengths.clone()
    for new in (1, 3, 6, 1, 2, 1):
        rows = [slice(int(n), int(n) + new) for n in done]
        query = torch.stack([q[b, row] for b, row in enumerate(rows)])
        key = torch.stack([k[b, row] for b, row in enumerate(rows)])
        if cached:
            key = k
            if left:
                key = torch.stack([k[b].roll(int(starts[b]), 0) for b in range(2)])
        append_tokens(
            queries, keys, lengths, query, key, cached=cached, starts=starts, backend=backend
        )
        done += new
        assert torch.equal(lengths, done)
        for b in range(2):
            first = 0 if b == 0 else 3
            for token in range(max(first, int(done[b]) - ring), int(done[b])):
                assert torch.equal(queries[b, token % ring], q[b, token])
                assert torch.equal(keys[b, token % ring], k[b, token])


@pytest.mark.parametrize("cached", [False, True])
def test_a_length_that_the_host_knows_changes_nothing(cached):
    torch.manual_seed(0)
    ring, total = 4, 11
    q, k = (torch.randn(2, total, h, 5, device=DEVICE) for h in (4, 2))
    lengths = torch.zeros(2, dtype=torch.long, device=DEVICE)
    twice = [
        [torch.zeros(2, ring, h, 5, device=DEVICE) for h in (4, 2)] + [lengths.clone()]
        for _ in range(2)
    ]
    for done in range(total):
        new = slice(done, done + 1)
        for known, state in enumerate(twice):
            append_tokens(
                *state, q[:, new], k if cached else k[:, new], cached=cached,
                tokens=done if known else None, backend="index",
            )  # fmt: skip
        for one, other in zip(*twice, strict=True):
            assert torch.equal(one, other)
    assert twice[1][2].tolist() == [total] * 2
