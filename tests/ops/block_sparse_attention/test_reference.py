"""The oracle itself, against loops over tokens."""

import pytest
import torch

from dilated_attention_pytorch import BlockPattern, block_sparse_attention


@pytest.mark.parametrize("pattern_heads", [1, 2, 4])
def test_output_lse_and_mass_equal_loops(pattern_heads):
    generator = torch.Generator().manual_seed(0)
    b, n, m, h, g, d, size = 2, 10, 13, 4, 2, 5, 4

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = randn(b, n, h, d).requires_grad_(), randn(b, m, g, d), randn(b, m, g, d)
    dense = torch.rand(b, pattern_heads, 3, 4, generator=generator) < 0.6
    pattern = BlockPattern.from_dense(dense, q_len=n, kv_len=m, block_size=size)
    bias = randn(*pattern.kv_indices.shape)
    probe = torch.zeros_like(bias, requires_grad=True)
    out, lse = block_sparse_attention(
        q, k, v, pattern, causal=True, block_bias=bias, mass_probe=probe, backend="reference",
        return_lse=True,
    )  # fmt: skip
    weight = randn(*out.shape)
    (out * weight).sum().backward()

    mass = torch.zeros_like(bias)
    norms = torch.zeros(b, pattern_heads, 3, dtype=torch.float64)
    for sample in range(b):
        for head in range(h):
            shared = head // (h // pattern_heads)
            for row in range(n):
                logits, slots, columns = [], [], []
                for slot in range(int(pattern.kv_num_blocks[sample, shared, row // size])):
                    block = int(pattern.kv_indices[sample, shared, row // size, slot])
                    for column in range(block * size, min(block * size + size, m)):
                        if column <= row + m - n:
                            logit = q[sample, row, head] @ k[sample, column, head // 2] * d**-0.5
                            logits.append(logit + bias[sample, shared, row // size, slot])
                            slots.append(slot)
                            columns.append(column)
                norm = weight[sample, row, head].norm()
                if not logits:
                    assert float(lse[sample, head, row].detach()) == -torch.inf
                    assert not out[sample, row, head].any()
                    continue
                # Rows that read nothing have no part in the mean.
                norms[sample, shared, row // size] += norm
                scores = torch.stack(logits).detach()
                torch.testing.assert_close(lse[sample, head, row].detach(), scores.logsumexp(0))
                p = scores.softmax(0)
                expected = p @ v[sample, columns, head // 2]
                torch.testing.assert_close(out[sample, row, head].detach(), expected)
                for slot, share in zip(slots, p, strict=True):
                    mass[sample, shared, row // size, slot] += norm * share
    torch.testing.assert_close(probe.grad, mass / norms[..., None].clamp(min=1e-30))
