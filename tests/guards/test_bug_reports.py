"""Public bug reports of neighbouring projects, tried here: what failed there gives the right value.

Reports that cannot exist here, or need what a CPU has not, and where their kind is tested:

- fla-org/flash-linear-attention#640 and #984 (wrong code of a compiler at 64-wide tiles on Hopper):
  compiled kernels alone; ``test_random_calls.py`` compares them with the oracle on a GPU.
- Dao-AILab/flash-attention#2756 (a backward that reads lse too early in some launches): a race
  between launches of a GPU; the same test calls kernels twice.
- NVIDIA/cudnn-frontend#676 (empty rows hang): nothing waits for another block here.
- pytorch/pytorch#141010 (a second GPU) and #186775 (dynamic shapes), vllm-project/vllm#27178
  (silently eager at the recompile limit): ``test_distributed.py`` and ``test_compile.py``.
- thu-ml/SageAttention#386 and sgl-project/sglang#20389 (32-bit offsets): PyTorch counts in 64 bits
  on a CPU; ``test_triton_torch.py`` has the lengths at which kernels would wrap.
- thu-ml/SageAttention#392 and #371, NVIDIA/TensorRT-LLM#16290 (recorded graphs): CUDA graphs alone;
  ``test_decoding_gpu.py`` replays them with new values.
- ROCm/ATOM#1379 (an indexer without rotary positions): selectors read the attention's own queries
  and keys, after rotary positions.
- nishide-dev/unturtle#177 (a 4-bit base): bitsandbytes runs on a GPU; the half of the report about
  upcast hidden states is below.
- NVIDIA/Megatron-LM#3674 with two processes: ``test_distributed.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch import (
    AdaptiveConfig,
    BlockPattern,
    BlockSparseAdaptive,
    BlockSparseFixed,
    MultiheadAdaptiveAttention,
    SelectorState,
    block_sparse_attention,
    block_sparse_decode,
)
from tiny_models import tiny_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ON_GPU = torch.cuda.is_available()
# Interpreted without a GPU.
BACKENDS = ["gather", "reference", "cpp", *([] if ON_GPU else ["triton"])]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(n: int, m: int | None = None, h: int = 2, d: int = 16, b: int = 1) -> list[Tensor]:
    lengths = (n, n if m is None else m, n if m is None else m)
    return [draw(b, length, h, d, seed=seed) for seed, length in enumerate(lengths)]


def pattern_of(kept: list[list[int]], n: int, m: int, size: int | tuple[int, int]) -> BlockPattern:
    return BlockPattern.from_dense(
        torch.tensor(kept).bool(), q_len=n, kv_len=m, block_size=(size, size) if
        isinstance(size, int) else size,
    )  # fmt: skip


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | None = None) -> Tensor:
    """Masked softmax attention in float64; ``seen`` broadcasts to ``(b, h, n, m)``."""
    query, key, value = (x.double().transpose(1, 2) for x in (q, k, v))
    logits = query @ key.transpose(2, 3) * q.shape[3] ** -0.5
    if bias is not None:
        logits = logits + bias
    return (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def spread(kept: list[list[int]], n: int, m: int, sizes: tuple[int, int]) -> Tensor:
    """Tiles as pairs of tokens."""
    tiles = torch.tensor(kept).bool()
    return tiles.repeat_interleave(sizes[0], 0)[:n].repeat_interleave(sizes[1], 1)[:, :m]


def with_gradients(run: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = run(*leaves)
    weight = draw(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def assert_same(found: list[Tensor], wanted: list[Tensor], limit: float = 1e-4) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=limit, rtol=limit)


# Key block 1 is read by nobody, block 0 by all, block 3 by the last row alone.
UNEVEN = [[1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0], [1, 0, 1, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_key_blocks_that_nobody_or_everybody_reads_have_right_gradients(backend: str) -> None:
    """Dao-AILab/flash-attention#2623, NVIDIA/cudnn-frontend#385: gradients off 150 to 1e11 times.

    There the lists of the backward pass lacked some key blocks, or several queries chose one.
    """
    pattern, seen = pattern_of(UNEVEN, 61, 61, 16), spread(UNEVEN, 61, 61, (16, 16))
    inputs = qkv(61, d=64)
    found = with_gradients(lambda *x: block_sparse_attention(*x, pattern, backend=backend), inputs)
    assert_same(found, with_gradients(lambda *x: dense(*x, seen), inputs))
    # Of keys and values that nobody reads.
    assert not found[2][:, 16:32].any()
    assert not found[3][:, 16:32].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_list_that_every_row_shares_is_no_dense_mask(backend: str) -> None:
    """Dao-AILab/flash-attention#2897: blocks (128, 64), all keep block 0: dense was returned."""
    kept, (q, k, v) = [[1, 0, 0], [1, 0, 0]], qkv(150, d=16)
    pattern = pattern_of(kept, 150, 150, (128, 64))
    out = block_sparse_attention(q, k, v, pattern, backend=backend)
    assert_same([out], [dense(q, k, v, spread(kept, 150, 150, (128, 64)))])
    assert_same([out], [dense(q, k[:, :64], v[:, :64], torch.tensor(True))])


@pytest.mark.parametrize("entry", [-1, 4, 2**31 - 1])
def test_indices_out_of_range_are_refused_or_unread(entry: int) -> None:
    """NVIDIA/cudnn-frontend#676: -1 or out-of-range indices gave NaN."""
    pattern, inputs = pattern_of(UNEVEN, 61, 61, 16), qkv(61)
    unused, used = pattern.kv_indices.clone(), pattern.kv_indices.clone()
    unused[~pattern.slot_used()] = entry
    used[0, 0, 3, 2] = entry
    with pytest.raises(ValueError, match="kv_indices"):
        replace(pattern, kv_indices=used)
    odd = replace(pattern, kv_indices=unused)
    found, wanted = (
        with_gradients(lambda *x, p=p: block_sparse_attention(*x, p), inputs)
        for p in (odd, pattern)
    )
    assert_same(found, wanted, 0.0)


def test_half_precision_with_a_bias_at_an_odd_length_has_finite_gradients() -> None:
    """pytorch/pytorch#153799: bfloat16, 1,025 tokens with a bias: NaN in the backward pass."""
    n, blocks = 1025, 17
    kept = (torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.3).tril()
    kept |= torch.eye(blocks, dtype=torch.bool)
    pattern = BlockPattern.from_dense(kept, q_len=n, kv_len=n)
    bias = draw(*pattern.kv_indices.shape, seed=5).bfloat16()
    # A tile that the bias hides, in a row with others.
    bias[0, 0, -1, 0] = -torch.inf
    inputs = [*(x.bfloat16() for x in qkv(n, h=1)), bias]
    found = with_gradients(
        lambda q, k, v, b: block_sparse_attention(q, k, v, pattern, causal=True, block_bias=b),
        inputs,
    )
    assert all(bool(x.isfinite().all()) for x in found)
    of_tiles = torch.zeros(blocks, blocks)
    used = pattern.slot_used()[0, 0]
    for row in range(blocks):
        of_tiles[row, pattern.kv_indices[0, 0, row][used[row]].long()] = bias[0, 0, row][
            used[row]
        ].float()
    seen = spread(kept.tolist(), n, n, (64, 64)).tril()
    per_token = of_tiles.repeat_interleave(64, 0)[:n].repeat_interleave(64, 1)[:, :n]
    assert_same(found[:1], [dense(*inputs[:3], seen, per_token)], 3e-2)


@pytest.mark.parametrize("n", [65_537, 99_991])
def test_awkward_lengths_take_no_minutes(n: int) -> None:
    """pytorch/pytorch#182060: minutes to make a mask at some lengths."""
    start = time.process_time()
    layer = BlockSparseFixed("sink_local", 1, 1, base_sparsity=0.99, block_size=128)
    q, k, v = qkv(n, h=1, d=1)
    out, info = layer(q, k, v, is_causal=True, return_pattern=True)
    info["pattern"].transpose()
    assert_same([out[:, 0]], [v[:, 0]])
    assert time.process_time() - start < 5


def choosing(**changes: Any) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    config = AdaptiveConfig(**{"block_size": 16, "base_sparsity": 0.5, **changes})
    return BlockSparseAdaptive(None, None, 2, 16, config)


def test_training_replays_what_inference_chose() -> None:
    """vllm-project/vllm#49555: indices are returned, so that training replays the choice."""
    layer, inputs = choosing(), qkv(90)
    with torch.no_grad():
        wanted, info = layer.eval()(*inputs, is_causal=True, return_pattern=True)
    leaves = [x.requires_grad_() for x in inputs]
    out, again = layer.train()(
        *leaves, is_causal=True, pattern=info["pattern"], return_pattern=True
    )
    assert torch.equal(again["pattern"].to_dense(), info["pattern"].to_dense())
    torch.testing.assert_close(out, wanted)
    out.sum().backward()
    assert all(bool(x.grad.isfinite().all()) and bool(x.grad.any()) for x in leaves)


def test_training_without_noise_chooses_what_evaluation_does() -> None:
    """fla-org/flash-linear-attention#1228: other tokens were routed in training's forward pass."""
    layer, inputs = choosing(hard_sparsity=True), qkv(90)
    chosen = [
        layer.train(training)(*inputs, is_causal=True, return_pattern=True)[1]["pattern"].to_dense()
        for training in (False, True)
    ]
    assert torch.equal(*chosen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_a_fused_projection(backend: str) -> None:
    """thu-ml/SageAttention#386: views of a fused QKV were read at wrong places."""
    pattern, fused = pattern_of(UNEVEN, 61, 61, 16), draw(2, 61, 3, 2, 16)

    def run(x: Tensor) -> Tensor:
        return block_sparse_attention(*x.unbind(2), pattern, causal=True, backend=backend)

    def want(x: Tensor) -> Tensor:
        return dense(*x.unbind(2), spread(UNEVEN, 61, 61, (16, 16)).tril())

    assert_same(with_gradients(run, [fused]), with_gradients(want, [fused]))


@pytest.mark.parametrize("batch", [17, 33])
def test_decoding_of_more_than_16_samples(batch: int) -> None:
    """NVIDIA/TensorRT-LLM#16290: a buffer of each call was too small for more than 16 samples."""
    q, k, v = qkv(1, 64, b=batch)
    counts = torch.arange(batch).remainder(4).int().view(batch, 1, 1) + 1
    lists = torch.arange(4).int().expand(batch, 1, 1, 4)
    out = block_sparse_decode(q, k, v, counts, lists, block_size=16)
    for sample in range(batch):
        own = slice(sample, sample + 1)
        m = 16 * int(counts[sample])
        assert_same([out[own]], [dense(q[own], k[own, :m], v[own, :m], torch.tensor(True))])


# In a model: what generation and padding broke in others.
PAST = AdaptiveConfig(base_sparsity=0.6, block_size=8, query_scope="past")


def left_padded() -> tuple[Tensor, Tensor]:
    ids, mask = tokens(length=60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :21] = 0
    return ids, mask


@pytest.fixture
def adapted() -> Iterator[Any]:
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    from dilated_attention_pytorch.hf.adapt import adapt

    model = tiny_model()
    torch.manual_seed(1)
    with adapt(model, PAST) as handle:
        yield handle


def test_left_padding_as_booleans_or_numbers(adapted: Any) -> None:
    """huggingface/transformers#48363: a boolean mask was taken for numbers that are added."""
    ids, mask = left_padded()
    with torch.no_grad():
        wanted, found = (adapted.model(ids, attention_mask=x).logits for x in (mask, mask.bool()))
        odd = ids.masked_fill(mask == 0, 5)
        unread = adapted.model(odd, attention_mask=mask.bool()).logits
    assert torch.equal(found, wanted)
    torch.testing.assert_close(unread[mask.bool()], wanted[mask.bool()])
    square = torch.zeros(2, 1, 60, 60).masked_fill(torch.ones(60, 60).triu(1).bool(), -torch.inf)
    with pytest.raises(ValueError, match="attention_mask must be"):
        adapted.model(ids, attention_mask=square)


def test_left_padded_generation_is_the_same_with_every_cache(adapted: Any) -> None:
    """huggingface/transformers#48363, #46132: cached and uncached differed, static and dynamic."""
    ids, mask = left_padded()
    found = [
        adapted.model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **x)
        for x in (
            {"use_cache": False}, {},
            {"cache_implementation": "static", "disable_compile": True},
        )
    ]  # fmt: skip
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_without_its_mask_function_a_model_stays_causal_or_says_so(adapted: Any) -> None:
    """huggingface/transformers#45811: custom attention without a mask function saw the future."""
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    from dilated_attention_pytorch.hf.attention import ATTENTION_NAME
    from dilated_attention_pytorch.hf.mask import compact_mask

    ids = tokens(length=60)
    other = torch.cat([ids[:, :40], 2 + ids[:, 40:].remainder(60)], 1)
    with torch.no_grad():
        before, after = (adapted.model(x).logits for x in (ids, other))
        torch.testing.assert_close(before[:, :40], after[:, :40])
        assert not torch.allclose(before[:, 40:], after[:, 40:])
        for function in (sdpa_mask, lambda *_, **__: None):
            try:
                AttentionMaskInterface.register(ATTENTION_NAME, function)
                with pytest.raises(ValueError, match="attention_mask must be"):
                    adapted.model(ids)
            finally:
                AttentionMaskInterface.register(ATTENTION_NAME, compact_mask)


def test_two_documents_of_one_block_each() -> None:
    """pytorch/torchtitan#4801: of two packed documents of 64 tokens, query 64 saw key 63."""
    torch.manual_seed(0)
    layer = BlockSparseAdaptive(None, None, 2, 16, AdaptiveConfig(block_size=64)).eval()
    q, k, v = qkv(128)
    edges = torch.tensor([0, 64, 128])
    for run in (
        lambda q, k, v, e: block_sparse_attention(
            q, k, v, BlockPattern.dense(len(q[0]), len(q[0])), causal=True, cu_seqlens=e
        ),
        lambda q, k, v, e: layer(q, k, v, is_causal=True, cu_seqlens=e),
    ):
        together = run(q, k, v, edges)
        alone = run(q[:, 64:], k[:, 64:], v[:, 64:], torch.tensor([0, 64]))
        assert_same([together[:, 64:]], [alone], 1e-5)
        # The first token of a document has itself alone.
        assert_same([together[:, 64]], [v[:, 64]], 1e-5)
        other = k.clone()
        other[:, 63] = torch.nan
        assert torch.equal(run(q, other, v, edges)[:, 64:], together[:, 64:])


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_reads_the_choice_of_its_own_micro_batch(reentrant: bool) -> None:
    """NVIDIA/Megatron-LM#7010: recomputation read another micro-batch's choice."""

    def step(recompute: bool) -> list[Tensor]:
        layer = choosing(base_sparsity=0.7).train()
        # Far from what is asked, budgets move from pass to pass.
        torch.nn.init.zeros_(layer.budget_gain)
        torch.manual_seed(1)
        micro = [[x.requires_grad_() for x in qkv(length)] for length in (400, 300)]
        micro[1] = [(-3 * x).detach().requires_grad_() for x in micro[1]]
        run = lambda *x: layer(*x, is_causal=True)  # noqa: E731
        outs = [
            checkpoint(run, *x, use_reentrant=reentrant) if recompute else run(*x) for x in micro
        ]
        # Pipelines run the backward passes when other forward passes have come between.
        for out in outs:
            out.square().sum().backward()
        leaves = [*micro[0], *micro[1], *layer.parameters()]
        return [x.grad.clone() for x in leaves if x.grad is not None]

    assert_same(step(True), step(False), 1e-6)


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("torch is built without distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def heads(**changes: Any) -> MultiheadAdaptiveAttention:
    torch.manual_seed(0)
    config = AdaptiveConfig(block_size=16, base_sparsity=0.5, hard_sparsity=True, **changes)
    return MultiheadAdaptiveAttention(32, 2, adaptive_config=config)


def gradients_of(layer: Any, x: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    # Each pass moves the budgets of those that follow.
    held = [state for name, state in layer.named_buffers() if name.endswith("budget_state")]
    before = [state.clone() for state in held]
    layer(x, x, x, is_causal=True)[0].square().mean().backward()
    for state, was in zip(held, before, strict=True):
        state.copy_(was)
    return {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}


def test_a_selector_without_weight_does_not_break_ddp(one_process: None) -> None:
    """NVIDIA/Megatron-LM#5809: a coefficient of 0 gave None gradients, which broke DDP."""
    layer = DistributedDataParallel(heads(selector_weight=0.0))
    # The second step fails if the first one left a parameter without gradient.
    found = [gradients_of(layer, draw(2, 80, 32)) for _ in range(2)]
    scorer = {n: g for n, g in found[1].items() if "scorer" in n}
    assert len(found[1]) == len(list(layer.parameters()))
    assert scorer
    assert not any(bool(g.any()) for g in scorer.values())


def test_the_selectors_gradient_is_that_of_the_whole_batch(one_process: None) -> None:
    """NVIDIA/Megatron-LM#3674: the selector's loss was divided by the ranks once too often.

    A rank's gradient is that of its half of the batch, whether there are other ranks or not, and
    the mean over the ranks that of the whole.
    """
    layer, x = DistributedDataParallel(heads()), draw(4, 80, 32)
    whole, *halves = (gradients_of(layer, part) for part in (x, x[:2], x[2:]))
    assert any("scorer" in name and bool(g.any()) for name, g in whole.items())
    for name, gradient in whole.items():
        mean = (halves[0][name] + halves[1][name]) / 2
        torch.testing.assert_close(mean, gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("sizes", [(40, 23, 1, 26), (16, 16, 58), (1, 89)])
def test_chunks_of_a_prompt_are_causal_and_equal_the_whole(sizes: tuple[int, ...]) -> None:
    """ROCm/ATOM#1379: a prompt in chunks was not causal."""
    layer, (q, k, v) = choosing(query_scope="past").eval(), qkv(90)
    with torch.no_grad():
        whole = layer(q, k, v, is_causal=True)
        # What comes later is in the cache's memory already, and spoilt.
        for junk in (0.0, torch.nan):
            cache = [torch.full_like(x, junk) for x in (k, v)]
            state, done, out = SelectorState(), 0, []
            for size in sizes:
                now = slice(done, done + size)
                cache[0][:, now], cache[1][:, now] = k[:, now], v[:, now]
                if done:
                    out.append(layer.decode(q[:, now], *cache, state))
                else:
                    out.append(layer.prefill(q[:, now], k[:, now], v[:, now], state))
                done += size
            assert_same([torch.cat(out, 1)], [whole], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_masks_of_fewer_queries_than_keys(backend: str, causal: bool) -> None:
    """baidu/vLLM-Kunlun#357: the mask was wrong where kv_len and q_len differ."""
    kept, (q, k, v) = [[1, 0, 1, 1], [1, 1, 0, 1]], qkv(20, 53)
    seen = spread(kept, 20, 53, (16, 16))
    seen = seen.tril(53 - 20) if causal else seen
    pattern = pattern_of(kept, 20, 53, 16)
    found = with_gradients(
        lambda *x: block_sparse_attention(*x, pattern, causal=causal, backend=backend), [q, k, v]
    )
    assert_same(found, with_gradients(lambda *x: dense(*x, seen), [q, k, v]))


def test_a_view_of_a_cache_and_its_unwritten_tail() -> None:
    """vllm-project/vllm-ascend#13391, baidu/vLLM-Kunlun#357: tails were read, views misread."""
    q, k, v = qkv(2, 41, h=2)
    # Keys and values of all layers in one tensor, with room behind the tokens and more heads.
    room = torch.full((1, 3, 2, 64, 4, 16), torch.nan)
    room[:, 1, 0, :41, 1:3], room[:, 1, 1, :41, 1:3] = k, v
    cache = [room[:, 1, x, :, 1:3] for x in range(2)]
    counts, lists = torch.tensor([[[2]]]).int(), torch.tensor([[[[0, 2]]]]).int()
    seen = torch.ones(2, 41, dtype=torch.bool).tril(39)
    seen[:, 16:32] = False
    for backend in ("gather", "reference"):
        out = block_sparse_decode(
            q, *cache, counts, lists, lengths=torch.tensor([41]), block_size=16, backend=backend
        )
        assert_same([out], [dense(q, k, v, seen)])
    pattern = pattern_of([[1, 0, 1]], 2, 41, 16)
    views = [x[:, :41] for x in cache]
    assert_same([block_sparse_attention(q, *views, pattern, causal=True)], [dense(q, k, v, seen)])


@pytest.mark.parametrize("lengths", [(90, 33, 61), (17, 90, 33)])
def test_low_rank_changes_train_with_batches_of_any_length(
    lengths: tuple[int, ...], adapted: Any
) -> None:
    """ml-explore/mlx-lm#1452: LoRA failed at the first batch longer than top-k."""
    peft = pytest.importorskip("peft", reason="needs peft")

    wrapped = peft.get_peft_model(
        adapted.model, peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"])
    ).train()
    parameters = [p for n, p in wrapped.named_parameters() if "lora_" in n]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step, length in enumerate(lengths):
        ids = tokens(length=length, seed=step)
        optimizer.zero_grad()
        loss = wrapped(ids, labels=ids).loss
        loss.backward()
        grads = [p.grad for p in parameters]
        assert bool(loss.isfinite())
        assert all(bool(g.isfinite().all()) for g in grads)
        assert all(bool(g.any()) for n, g in enumerate(grads) if n % 2)
        optimizer.step()


def test_hidden_states_that_peft_upcasts(adapted: Any) -> None:
    """nishide-dev/unturtle#177: PEFT upcast hidden states, and the kernel path refused them."""
    peft = pytest.importorskip("peft", reason="needs peft")

    model, ids = adapted.model, tokens(length=60)
    exact = model(ids).logits.detach()
    model.bfloat16()
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"])
    ).train()
    # As prepare_model_for_kbit_training does with all that is not quantised.
    for name, module in model.named_modules():
        if "norm" in name:
            module.float()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            logits = wrapped.eval()(ids).logits
        loss = wrapped.train()(ids, labels=ids).loss
    loss.backward()
    grads = [p.grad for n, p in wrapped.named_parameters() if "lora_B" in n]
    assert grads
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in grads)
    assert float((logits.float() - exact).abs().mean()) < 0.2 * float(exact.abs().mean())
