"""What the host knows of a layer's buffers: read anew when they change, and only then."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

from dilated_attention_pytorch import AdaptiveConfig, BlockSparseAdaptive
from dilated_attention_pytorch.nn import buffers
from dilated_attention_pytorch.nn.baselines import BlockSparseTrainingFree, TrainingFreeConfig
from dilated_attention_pytorch.nn.buffers import HostValues
from dilated_attention_pytorch.nn.state import SelectorState
from dilated_attention_pytorch.selection.threshold import (
    MOST_LENGTHS,
    ThresholdTable,
    filled_buffer,
    thresholds_at,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
TABLE = ThresholdTable((64, 128), (0.2, 0.1))


def make(backend: str = "auto", **changes: object) -> BlockSparseAdaptive:
    torch.manual_seed(0)
    config = AdaptiveConfig(**{"block_size": 16, "base_sparsity": 0.5, **changes})
    return BlockSparseAdaptive(None, None, 2, 16, config, backend=backend).eval()


def tokens(length: int = 96) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, length, 2, 16, generator=generator) for _ in "qkv"]


def test_a_device_is_read_when_the_tensor_has_changed_and_only_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(buffers, "_counts_writes", lambda tensor: True)
    values, reads = HostValues(), []

    def read(tensor: Tensor) -> float:
        reads.append(tensor)
        return float(tensor)

    def look(tensor: Tensor) -> float:
        return values.read("x", tensor, read)

    x = torch.tensor(1.0)
    assert [look(x) for _ in range(3)] == [1.0] * 3
    assert len(reads) == 1
    writes = [
        lambda: x.fill_(2.0),
        lambda: x.detach().copy_(torch.tensor(3.0)),
        lambda: torch._foreach_add_([x], 1.0),
        lambda: setattr(x, "data", torch.tensor(5.0)),
    ]
    for count, write in enumerate(writes, start=2):
        write()
        assert look(x) == count
        assert look(x) == count
        assert len(reads) == count
    assert look(torch.tensor(7.0)) == 7.0
    x.fill_(8.0)
    values.note("x", x, 8.0)
    reads.clear()
    assert look(x) == 8.0
    assert not reads
    # A copy counts its writes from 0 and must not take notes about another tensor for its own.
    twin = copy.deepcopy({"values": values, "x": x})
    twin["x"].fill_(9.0)
    assert twin["values"].read("x", twin["x"], read) == 9.0


def test_setters_spare_the_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_counts_writes", lambda tensor: True)
    layer = make(budget="threshold")
    layer.set_base_sparsity(0.9)
    layer.set_thresholds(TABLE)
    for name in ("base_sparsity", "thresholds"):
        assert layer._host._notes[name][0] is getattr(layer, name)
    noted = layer.densest, layer.threshold_table()
    layer._host = HostValues()
    assert (layer.densest, layer.threshold_table()) == noted
    layer.base_sparsity.mul_(0.5)
    assert layer.densest == pytest.approx(0.55)


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_an_average_chooses_with_kernels_as_its_model_does(sparsity: float) -> None:
    layer = make("triton")
    layer.set_base_sparsity(0.9 - sparsity)
    mean = AveragedModel(layer)
    q, k, v = tokens(64)
    mean(q, k, v, is_causal=True)
    layer.set_base_sparsity(sparsity)
    mean.update_parameters(layer)
    with torch.no_grad():
        got, want = (x(q, k, v, is_causal=True, return_pattern=True) for x in (mean, layer))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1]["sparsity"], want[1]["sparsity"])


@torch.no_grad()
@pytest.mark.parametrize("budget", ["adaptive", "threshold"])
def test_decoding_goes_by_the_buffers(budget: str) -> None:
    layer = make(budget=budget, query_scope="past", scorer="low_rank", hidden_dim=8)
    mean = AveragedModel(layer)
    layer.set_base_sparsity(0.0)
    if budget == "threshold":
        layer.set_thresholds(TABLE)
    mean.update_parameters(layer)
    q, k, v = tokens()
    outs = []
    for each in (layer, mean.module):
        state = SelectorState()
        each.prefill(q[:, :64], k[:, :64], v[:, :64], state)
        outs.append(each.decode(q[:, 64:], k, v, state))
    assert torch.equal(*outs)
    parallel = layer(q, k, v, is_causal=True)[:, 64:]
    torch.testing.assert_close(outs[0], parallel, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_compiled_graphs_follow_the_buffers() -> None:
    torch._dynamo.reset()
    layer, inputs = make(), tokens(64)
    # Whether a graph still holds is asked before the compiler.
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for write in (
        lambda: None,
        lambda: layer.base_sparsity.copy_(torch.tensor(0.0)),
        lambda: layer.base_sparsity.data.fill_(0.9),
        lambda: setattr(layer, "base_sparsity", torch.tensor(0.2)),
    ):
        write()
        want = layer(*inputs, is_causal=True)
        assert torch.equal(compiled(*inputs, is_causal=True), want)
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    layer.base_sparsity.fill_(0.21)
    compiled(*inputs, is_causal=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("budget", ["adaptive", "threshold"])
def test_compiled_functional_calls_go_by_what_they_are_given(budget: str) -> None:
    torch._dynamo.reset()
    layer, inputs = make(budget=budget), tokens(64)
    name = "thresholds" if budget == "threshold" else "base_sparsity"
    if budget == "threshold":
        layer.set_thresholds(TABLE)
        given = [ThresholdTable((64,), (x,)).to_buffer() for x in (0.3, 0.02)]
    else:
        given = [torch.tensor(x) for x in (0.9, 0.0)]

    def run(value: Tensor) -> Tensor:
        out = functional_call(layer, {name: value}, tuple(inputs), {"is_causal": True})
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for value in given:
        torch.testing.assert_close(compiled(value), run(value), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_keep_the_sparsity_in_force(strict: bool) -> None:
    layer, inputs = make(), tuple(tokens(64))
    layer.base_sparsity.fill_(0.0)
    program = torch.export.export(layer, inputs, {"is_causal": True}, strict=strict)
    got = program.module()(*inputs, is_causal=True)
    torch.testing.assert_close(got, layer(*inputs, is_causal=True), rtol=1e-5, atol=1e-6)


def test_a_buffer_without_a_sparsity_is_refused() -> None:
    layer, inputs = make(), tokens(32)
    for value in (math.nan, -0.1, 1.5):
        layer.base_sparsity.fill_(value)
        with pytest.raises(ValueError, match="base_sparsity must lie in"):
            layer(*inputs)
    layer.set_base_sparsity(0.999999999)
    layer(*inputs)


def test_shapes_are_known_without_thresholds_that_can_be_read() -> None:
    with torch.device("meta"):
        for budget in ("threshold", "adaptive"):
            layer = make(budget=budget)
            q = torch.empty(1, 96, 2, 16)
            assert layer(q, q, q, is_causal=True).shape == q.shape


def test_nothing_made_of_fake_tensors_stays() -> None:
    layer = BlockSparseTrainingFree(TrainingFreeConfig(base_sparsity=0.5), 2, 16)
    length = 1344
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="scalar"):
        # The number of kept blocks is a value, which fake tensors have not.
        layer(*tokens(length), is_causal=True)
    assert layer(*tokens(length), is_causal=True).isfinite().all()


def test_a_forward_pass_is_judged_by_the_sparsity_it_was_given() -> None:
    layer = make().train()
    layer(*tokens(), is_causal=True)
    before = float(layer.get_sparsity_loss().detach())
    layer.base_sparsity.copy_(torch.tensor(0.1))
    assert float(layer.get_sparsity_loss().detach()) == before


def test_tables_of_other_sizes_load() -> None:
    full = ThresholdTable(tuple(range(1, MOST_LENGTHS + 1)), (0.5,) * MOST_LENGTHS)
    for table in (TABLE, full):
        rows = torch.tensor(table.rows(), dtype=torch.float64)
        for saved in (rows, table.to_buffer()):
            for assign in (False, True):
                layer = make(budget="threshold")
                layer.set_thresholds(ThresholdTable((10, 20, 30), (0.3, 0.2, 0.1)))
                state = {**layer.state_dict(), "thresholds": saved}
                layer.load_state_dict(state, assign=assign)
                assert layer.threshold_table() == table
                assert layer.thresholds.shape == (MOST_LENGTHS, 2)


def test_what_is_no_table_is_refused_and_changes_nothing() -> None:
    config = TrainingFreeConfig(budget="threshold", base_sparsity=0.5)
    layer = BlockSparseTrainingFree(config, 2, 16)
    layer.set_thresholds(TABLE)
    for saved in (torch.zeros(1, 4), torch.zeros(2), torch.zeros(65, 2)):
        with pytest.raises(RuntimeError, match="thresholds"):
            layer.load_state_dict({**layer.state_dict(), "thresholds": saved})
        assert layer.threshold_table() == TABLE


def test_a_mean_of_tables_is_no_table() -> None:
    layer = make(budget="threshold")
    empty = ThresholdTable.empty_buffer()
    for share in (0.1, 0.5, 0.99):
        layer.thresholds.copy_(empty.lerp(TABLE.to_buffer(), share))
        with pytest.raises(ValueError, match=r"thresholds|lengths"):
            layer.threshold_table()


def test_what_does_not_know_its_table_reads_the_same_thresholds() -> None:
    table, lengths = ThresholdTable((100, 400), (0.08, 0.02)), [50, 200, 9000]
    found = thresholds_at(filled_buffer(table.to_buffer()), torch.tensor(lengths))
    assert found.tolist() == pytest.approx([table.at(length) for length in lengths])


@pytest.mark.parametrize(
    ("lengths", "thresholds"),
    [((20, 10), (0.1, 0.2)), ((0,), (0.1,)), ((10,), (0.0,)), ((10,), (math.nan,))],
)
def test_tables_are_checked(lengths: tuple[int, ...], thresholds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        ThresholdTable(lengths, thresholds)
    with pytest.raises(ValueError, match="must be"):
        ThresholdTable(tuple(range(1, MOST_LENGTHS + 2)), (0.1,) * (MOST_LENGTHS + 1))


def test_settings_of_before_stay_where_a_file_has_none() -> None:
    layer = BlockSparseTrainingFree(TrainingFreeConfig(base_sparsity=0.5), 2, 16)
    layer.set_base_sparsity(0.25)
    nn.ModuleDict({"selector": layer}).load_state_dict({})
    assert float(layer.base_sparsity) == 0.25
