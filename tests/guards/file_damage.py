"""Damages files of every kind that the library reads: each is a clear error, or harmless.

``python tests/guards/file_damage.py --damages 1000 --seed 0``

A kind is a valid sample and what reads it. Bits are flipped, bytes cut, inserted, moved and
overwritten; JSON is changed by its structure: other types, huge numbers, NaN, deep nesting, keys
that are missing, twice or unknown. After each damage the sample must be refused with its documented
error, by its name, or read as if nothing had happened. *Forged* kinds have a digest that fits what
they were changed to: there another value is no mistake, and the rest holds.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

MAX_SECONDS, MAX_BYTES = 2.0, 300 * 2**20
# Stand for what json.dumps would not write.
RAW = {
    "@nan@": "NaN", "@inf@": "-Infinity", "@huge@": "1e999", "@long@": "9" * 5000,
    "@deep@": "[" * 100_000 + "]" * 100_000, "@deepobject@": '{"a":' * 5000 + "1" + "}" * 5000,
    "@half@": '"\\ud800"',
}  # fmt: skip
ODD = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.5, 7, 64, 10**7, 2**31, 2**53, 2**63, 10**30, 1e-300,
    1e308, "", "x", "1", "NaN", "é" * 20, "a" * 10_000, [], {}, [[]], [1, 2, 3], {"a": 1}, [None],
    *RAW,
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        name: Of the kind.
        files: A valid sample: content by name in a folder.
        target: Which of them is damaged.
        read: Reads it from the folder, to something that compares with :func:`same`.
        errors: What it may raise.
        damage: What is done to the content of the target.
        forged: Whether another value is no mistake.
        named: Whether an error must name the file or its folder.
    """

    name: str
    files: dict[str, bytes]
    target: str
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    damage: Callable[[random.Random, bytes], bytes]
    forged: bool = False
    named: bool = True


@dataclass
class Outcome:
    """What came of the damages of a kind."""

    refused: int = 0
    harmless: int = 0
    mistakes: list[str] = field(default_factory=list)


def same(a: Any, b: Any) -> bool:
    """Whether two results are the same, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and torch.equal(a.contiguous().flatten().view(torch.uint8),
                            b.contiguous().flatten().view(torch.uint8))
        )  # fmt: skip
    if isinstance(a, dict):
        return isinstance(b, dict) and set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def run_kind(kind: Kind, damages: int, seed: int, place: Path) -> Outcome:
    """Reads a sample after each of so many damages."""
    folder = place / kind.name.replace(" ", "-")
    folder.mkdir(parents=True)
    for name, content in kind.files.items():
        (folder / name).write_bytes(content)
    good, out = kind.read(folder), Outcome()
    assert same(good, kind.read(folder)), f"{kind.name} does not read the same twice"
    original = kind.files[kind.target]
    for number in range(damages):
        rng = random.Random(f"{kind.name} {seed} {number}")
        changed = kind.damage(rng, original)
        (folder / kind.target).write_bytes(changed)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        try:
            found = kind.read(folder)
        except kind.errors as error:
            if kind.named and folder.name not in str(error):
                out.mistakes.append(f"{number}: does not name the file: {error!r:.300}")
            elif len(str(error)) > 2000:
                out.mistakes.append(f"{number}: an error of {len(str(error))} characters")
            else:
                out.refused += 1
        except Exception as error:
            out.mistakes.append(f"{number}: {type(error).__name__}: {error!s:.300}")
        else:
            if kind.forged or same(found, good):
                out.harmless += 1
            else:
                out.mistakes.append(f"{number}: other values without an error")
        if (seconds := time.perf_counter() - start) > MAX_SECONDS:
            out.mistakes.append(f"{number}: took {seconds:.1f} s")
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
        if grown > MAX_BYTES:
            out.mistakes.append(f"{number}: took {grown / 2**20:.0f} MiB")
    return out


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """One to three changes of bytes, or a cut."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        a = rng.randrange(len(out) + 1)
        b = min(len(out), a + rng.choice((1, 1, 2, 8, 64, 1000)))
        kind = rng.randrange(8)
        if kind == 0 and a < len(out):
            out[a] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[a:]
        elif kind == 2:
            out[a:a] = rng.randbytes(rng.choice((1, 4, 100)))
        elif kind == 3:
            del out[a:b]
        elif kind == 4:
            c = rng.randrange(len(out) + 1)
            part = out[a:b]
            out[a:b] = out[c : c + len(part)]
            out[c : c + len(part)] = part
        elif kind == 5:
            out[a:b] = bytes([rng.choice((0, 255, 32, 48))]) * (b - a)
        elif kind == 6:
            out[a:a] = out[a:b]
        elif kind == 7:
            out[a:b] = rng.randbytes(b - a)
    if rng.random() < 0.02:
        return rng.choice((b"", b"\xef\xbb\xbf" + content, content * 2, content[:1]))
    return bytes(out)


def damage_tree(rng: random.Random, tree: Any) -> Any:
    """One change of a value of JSON by its structure."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    holder, key = rng.choice(places)
    choice = rng.randrange(6)
    if choice == 0:
        del holder[key]
    elif choice == 1 and isinstance(holder, dict):
        holder[rng.choice(("extra", "digest ", "auto_map", "trust_remote_code", "0", "é"))] = (
            rng.choice(ODD)
        )
    elif choice == 2 and isinstance(holder, dict):
        names = (f"{key} ", "-1", "99999999999", "1_0", "\u0661", key.upper())
        holder[rng.choice(names)] = holder.pop(key)
    elif choice == 3:
        other, place = rng.choice(places)
        holder[key] = copy.deepcopy(other[place])
    elif choice == 4 and isinstance(holder[key], int | float):
        holder[key] = rng.choice((-1, 2, 0.5, 10, 1 + 1e-9)) * holder[key]
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    for key in keys:
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def dump_tree(rng: random.Random, tree: Any) -> bytes:
    """JSON, now and then with a key twice."""
    text = json.dumps(tree, indent=rng.choice((None, 2)))
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    if rng.random() < 0.05 and text.startswith("{"):
        key = next(iter(tree), "x")
        text = f"{{{json.dumps(key)}: 1, {text[1:]}"
    return text.encode()


def damage_json(rng: random.Random, content: bytes) -> bytes:
    """By bytes, or by structure."""
    if rng.random() < 0.4:
        return damage_bytes(rng, content)
    tree = json.loads(content)
    for _ in range(rng.choice((1, 1, 2))):
        if tree:
            tree = damage_tree(rng, tree)
    return dump_tree(rng, tree)


def forge_json(rng: random.Random, content: bytes) -> bytes:
    """By structure, with a digest that fits where one can be made."""
    from dilated_attention_pytorch.foreign_text import sealed
    from dilated_attention_pytorch.hf.adapter_file import _digest

    tree = json.loads(content)
    tree.pop("digest", None)
    tree = damage_tree(rng, tree)
    if _raw(tree):
        return dump_tree(rng, tree)
    try:
        return json.dumps(
            {**tree, "digest": _digest(tree)} if "weights" in tree else sealed(tree)
        ).encode()
    except ValueError:
        return dump_tree(rng, tree)


def _raw(tree: Any) -> bool:
    return any(name in json.dumps(tree) for name in RAW)


def damage_tensors(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file: by bytes, or its header by structure."""
    if rng.random() < 0.6:
        return damage_bytes(rng, content)
    length = int.from_bytes(content[:8], "little")
    tree = damage_tree(rng, json.loads(content[8 : 8 + length]))
    header = dump_tree(rng, tree)
    header += b" " * (-len(header) % 8)
    lie = rng.choice((0, 0, 0, 0, 1, -8, 2**40, 2**63))
    return (len(header) + lie).to_bytes(8, "little", signed=False) + header + content[8 + length :]


def forge_tensors(rng: random.Random, content: bytes) -> bytes:
    """Other tensors in a valid file: shapes, dtypes, values, names."""
    from safetensors.torch import load

    from dilated_attention_pytorch.files import tensor_bytes

    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    metadata.pop("digest", None)
    tensors = load(content)
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    choice = rng.randrange(8)
    if choice == 0:
        del tensors[name]
    elif choice == 1:
        tensors[rng.choice(("extra", f"{name}.x", "9.scorer", "0.", "999999.a"))] = tensors.pop(
            name
        )
    elif choice == 2:
        kind = rng.choice((torch.int8, torch.float16, torch.float64, torch.int64, torch.bool))
        tensors[name] = value.to(kind)
    elif choice == 3:
        tensors[name] = value.flatten()
    elif choice == 4:
        tensors[name] = value.new_zeros(rng.choice(((0,), (), (0, 2), (3, 2), (1, 1, 1, 1))))
    elif choice == 5:
        changed = value.clone().flatten()
        if len(changed) and value.is_floating_point():
            changed[rng.randrange(len(changed))] = rng.choice((float("nan"), float("inf"), -1.0))
        elif len(changed):
            changed[rng.randrange(len(changed))] = rng.choice((-1, 0, 5, 2**31 - 1))
        tensors[name] = changed.view(value.shape)
    elif choice == 6 and "about" in metadata:
        metadata["about"] = dump_tree(rng, damage_tree(rng, json.loads(metadata["about"]))).decode()
    else:
        metadata[rng.choice((*metadata, "x"))] = rng.choice(("", "9", "x" * 10_000))
    return tensor_bytes(tensors, metadata)


def forge_checkpoint(rng: random.Random, content: bytes) -> bytes:
    """Another state in a valid archive."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    places = list(_state_places(state))
    holder, key = rng.choice(places)
    value = holder[key]
    if rng.random() < 0.3 and isinstance(value, torch.Tensor) and value.numel():
        holder[key] = rng.choice((value.to(torch.int8), value.flatten()[:0], value[None], -value))
    elif rng.random() < 0.2:
        del holder[key]
    else:
        odd = [x for x in ODD if not (isinstance(x, str) and x in RAW)]
        odd += [float("nan"), torch.zeros(1).expand(10**9), torch.full((3,), float("nan"))]
        holder[key] = rng.choice(odd)
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def _state_places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    for key in keys:
        if isinstance(tree, dict | list):
            yield tree, key
        if isinstance(tree[key], dict | list) and len(tree[key]):
            yield from _state_places(tree[key])


def pattern_kinds() -> list[Kind]:
    """Pattern files of one layer and of a model."""
    from dilated_attention_pytorch import BlockPattern
    from dilated_attention_pytorch.analysis.distill_to_fixed import DistilledPatterns

    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(1, 2, 4, 5, generator=generator) < 0.5
    allowed = torch.full((4,), 5, dtype=torch.int32)
    pattern = BlockPattern.from_dense(dense, q_len=64, kv_len=75, block_size=16)
    pattern = replace(pattern, kv_num_allowed=allowed)
    kept = {"layers.0": torch.rand(2, 4, 4, generator=generator)}
    fixed = DistilledPatterns(kept, {name: x.sum(-1) for name, x in kept.items()}, 16)

    def read_pattern(folder: Path) -> Any:
        found = BlockPattern.load(folder / "a.safetensors")
        found.to_dense()
        sizes = (found.q_len, found.kv_len, found.block_size)
        return [found.kv_num_blocks, found.kv_indices, found.kv_num_allowed, *sizes]

    def read_fixed(folder: Path) -> Any:
        found = DistilledPatterns.load(folder / "a.safetensors")
        return [found.frequency, found.mean_count, found.block_size]

    kinds = []
    for name, saved, read in (
        ("pattern", pattern, read_pattern), ("distilled patterns", fixed, read_fixed),
    ):  # fmt: skip
        with tempfile.TemporaryDirectory() as place:
            saved.save(Path(place) / "a.safetensors")
            files = {"a.safetensors": (Path(place) / "a.safetensors").read_bytes()}
        kind = Kind(name, files, "a.safetensors", read, (ValueError,), damage_tensors)
        forged = replace(kind, name=f"forged {name}", damage=forge_tensors, forged=True)
        kinds += [kind, forged]
    return kinds


def adapter_kinds() -> list[Kind]:
    """Both files of an adapter, read, and where they are forged applied to a model."""
    from dilated_attention_pytorch import AdaptiveConfig
    from dilated_attention_pytorch.hf import AdapterError, SelectorAdapter, adapt
    from dilated_attention_pytorch.nn.baselines import TrainingFreeConfig
    from dilated_attention_pytorch.selection.layer_shares import SparsityCosts
    from dilated_attention_pytorch.selection.threshold import ThresholdTable
    from tiny_models import tiny_model

    model = tiny_model()
    configs = {
        0: AdaptiveConfig(block_size=16, hidden_dim=4, budget="threshold", scorer="low_rank"),
        1: TrainingFreeConfig(method="mean_pool", block_size=16),
    }
    with adapt(model, configs) as adapted, tempfile.TemporaryDirectory() as place:
        adapted.selectors[0].set_thresholds(ThresholdTable((64, 128), (0.1, 0.05)))
        adapted.costs = (SparsityCosts(128, (0.5, 0.9), {0: (0.0, 0.1), 1: (0.1, 0.2)}),)
        SelectorAdapter.of(adapted)._save_pretrained(Path(place))
        files = {path.name: path.read_bytes() for path in Path(place).iterdir()}
    modules = dict(model.named_modules())
    settings = model.config.to_dict()

    def read(folder: Path) -> Any:
        found = SelectorAdapter.read(folder)
        configs = {number: config.to_dict() for number, config in found.configs.items()}
        costs = [one.to_dict() for one in found.costs]
        # Where the base lies may be corrected by hand.
        base = {**found.base, "name": ""}
        return [configs, found.tensors, base, found.versions, costs]

    def apply(folder: Path) -> Any:
        try:
            SelectorAdapter.read(folder).apply(model).undo()
        finally:
            assert dict(model.named_modules()) == modules, "modules are left"
            assert model.config.to_dict() == settings, "settings are left"
            assert not any(x._forward_pre_hooks for x in modules.values()), "hooks are left"
        return None

    kind = Kind("adapter settings", files, "adapter.json", read, (AdapterError,), damage_json)
    weights = replace(
        kind, name="adapter weights", target="selectors.safetensors", damage=damage_tensors
    )
    forged = replace(
        kind, name="forged adapter settings", read=apply, damage=forge_json, forged=True,
        named=False,
    )  # fmt: skip
    # Earlier ones do not name their weights.
    about = json.loads(files["adapter.json"])
    earlier = {key: own for key, own in about.items() if key not in ("weights", "digest")}
    forged_weights = replace(
        forged, name="forged adapter weights", target="selectors.safetensors",
        damage=forge_tensors, files={**files, "adapter.json": json.dumps(earlier).encode()},
    )  # fmt: skip
    return [kind, weights, forged, forged_weights]


def checkpoint_kinds() -> list[Kind]:
    """Checkpoints, read, and where they are forged taken up by a training."""
    from dilated_attention_pytorch import AdaptiveConfig
    from dilated_attention_pytorch.tasks.text import TextData
    from dilated_attention_pytorch.train.checkpoint import (
        CheckpointError,
        check_loop_state,
        checkpoint_path,
        load_checkpoint,
        save_checkpoint,
    )
    from dilated_attention_pytorch.train.language_model import (
        LanguageModelRun,
        LanguageModelTraining,
    )

    data = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(0)).byte()
    text = TextData(data, data, (), (), "random bytes")
    config = AdaptiveConfig(block_size=16, query_scope="past", hidden_dim=4)
    run = LanguageModelRun(
        config=config, dim=16, num_heads=1, num_layers=1, seq_len=32, batch_size=1, threads=1
    )
    training = LanguageModelTraining(run, text)
    training.step()
    state = {
        "loop": {"run": run.to_dict()}, "fingerprint": text.fingerprint(), "latest": {"x": 1.0},
        "losses": [1.0], "loss_seconds": 0.5, "training": training.state_dict(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        path = save_checkpoint(Path(place), 1, state)
        files = {path.name: path.read_bytes()}
    other = LanguageModelTraining(run, text)
    name = checkpoint_path(Path(), 1).name

    def read(folder: Path) -> Any:
        return load_checkpoint(folder / name)

    def take_up(folder: Path) -> Any:
        found = load_checkpoint(folder / name)
        check_loop_state(found, "loop", folder / name)
        before = copy.deepcopy(other.state_dict())
        try:
            other.load_state_dict(found["training"])
        except CheckpointError:
            assert same(before, other.state_dict()), "half taken up"
            raise
        other.step()

    kind = Kind("checkpoint", files, name, read, (CheckpointError,), damage_bytes)
    return [kind, replace(kind, name="forged checkpoint", read=take_up, damage=forge_checkpoint,
            forged=True, named=False)]  # fmt: skip


def folder_kinds() -> list[Kind]:
    """Files of other libraries' formats, in folders that say what they were."""
    from safetensors.torch import save

    from dilated_attention_pytorch.hf.model_folder import (
        check_sealed,
        local_settings,
        seal_folder,
    )

    weights = save({"layer.lora_A.weight": torch.randn(2, 4)})
    files = {
        "adapter_config.json": json.dumps({"peft_type": "LORA", "r": 2, "x": [1, None]}).encode(),
        "adapter_model.safetensors": weights,
    }
    with tempfile.TemporaryDirectory() as place:
        for name, content in files.items():
            (Path(place) / name).write_bytes(content)
        seal_folder(Path(place))
        files["digests.json"] = (Path(place) / "digests.json").read_bytes()

    def read(folder: Path) -> Any:
        check_sealed(folder)
        settings = local_settings(folder, "adapter_config.json")
        return [settings, (folder / "adapter_model.safetensors").read_bytes()]

    kind = Kind("folder settings", files, "adapter_config.json", read, (ValueError,), damage_json)
    return [
        kind,
        replace(kind, name="folder weights", target="adapter_model.safetensors",
                damage=damage_tensors),
        replace(kind, name="folder digests", target="digests.json"),
    ]  # fmt: skip


def table_kinds() -> list[Kind]:
    """Costs of an allotment, settings, and metrics."""
    from dilated_attention_pytorch import AdaptiveConfig
    from dilated_attention_pytorch.foreign_text import parse_json
    from dilated_attention_pytorch.hf.layer_shares import (
        AllotJob,
        costs_bytes,
        read_costs,
    )
    from dilated_attention_pytorch.train.run_folder import MetricsFile

    job = AllotJob(model="m", adapter="a", text=("t",), lengths=(64, 128), sparsities=(0.5, 0.9))
    identity = {"job": {"model": "m"}, "model": "ab", "text": "cd", "adapter": "ef"}
    units = [0, 1]
    measured = {64: {0: (0.1, 0.2), 1: (0.3, 0.4)}, 128: {0: (0.5, 1.25)}}
    costs = costs_bytes(identity, measured)

    def read_settings(folder: Path) -> Any:
        name = folder / "config.json"
        values = parse_json(name.read_bytes(), str(name))
        found = AdaptiveConfig.from_dict(values).to_dict()
        # Nothing that was given is dropped or changed.
        assert all(found[key] == value for key, value in values.items()), "a value was changed"
        return None

    def read_metrics(folder: Path) -> Any:
        lines = MetricsFile(folder / "metrics.jsonl").read()
        assert all(isinstance(line, dict) for line in lines), "a line is no mapping"
        return None

    lines = b"".join(b'{"step": %d, "loss": 2.5, "layer_sparsity": [0.5]}\n' % n for n in range(9))
    config = AdaptiveConfig(hierarchy=(4,), query_stride=4)
    known = (ValueError, FileExistsError)
    kind = Kind(
        "costs", {"costs.json": costs}, "costs.json",
        lambda folder: read_costs(folder / "costs.json", identity, job, units), known, damage_json,
    )  # fmt: skip
    settings = Kind(
        "settings", {"config.json": json.dumps(config.to_dict()).encode()}, "config.json",
        read_settings, (TypeError, ValueError), damage_json, forged=True, named=False,
    )  # fmt: skip
    metrics = Kind(
        "metrics", {"metrics.jsonl": lines}, "metrics.jsonl", read_metrics, (), damage_bytes,
        forged=True,
    )  # fmt: skip
    return [kind, replace(kind, name="forged costs", damage=forge_json, forged=True, named=False),
            settings, metrics]  # fmt: skip


GROUPS = {
    "patterns": pattern_kinds,
    "adapters": adapter_kinds,
    "checkpoints": checkpoint_kinds,
    "folders": folder_kinds,
    "tables": table_kinds,
}


@contextmanager
def one_thread() -> Iterator[None]:
    """Small tensors are read faster by one, and trainings set their own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> int:
    """Runs all kinds and prints what came of them; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--damages", type=int, default=1000, help="per kind (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--kinds", nargs="+", choices=tuple(GROUPS), default=list(GROUPS))
    options = parser.parse_args()
    wrong, cases, parts = 0, 0, {}
    with one_thread():
        for group in options.kinds:
            for kind in GROUPS[group]():
                start = time.perf_counter()
                with tempfile.TemporaryDirectory() as place:
                    out = run_kind(kind, options.damages, options.seed, Path(place))
                wrong += len(out.mistakes)
                cases += options.damages
                parts[kind.name] = {
                    "refused": out.refused, "harmless": out.harmless, "wrong": len(out.mistakes),
                }  # fmt: skip
                seconds = time.perf_counter() - start
                print(
                    f"{kind.name:24} {out.refused:6} refused {out.harmless:6} harmless "
                    f"{len(out.mistakes):5} wrong   {seconds:.1f} s", flush=True,
                )  # fmt: skip
                for words in out.mistakes[:10]:
                    print(f"    {words}")
    from guards.reports import write_report

    write_report(options.json, cases, wrong, kinds=parts)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
