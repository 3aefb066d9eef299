"""Turns what a trained selector reads on average into fixed patterns."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.analysis.recording import Recording
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.nn.distilled import BlockSparseDistilled
from dilated_attention_pytorch.tensor_file import read_tensor_file

_FILE_FORMAT = "dilated_attention_pytorch.distilled_patterns"
_FILE_VERSION = "1"


@dataclass(frozen=True, eq=False)
class DistilledPatterns:
    """Fixed patterns of a model's layers.

    Attributes:
        frequency: By layer name: ``(h, i, j)``, the share of the samples that read a tile.
        mean_count: By layer name: ``(h, i)``, the mean number of tiles that a row read.
        block_size: Tokens per block.
    """

    frequency: dict[str, Tensor]
    mean_count: dict[str, Tensor]
    block_size: int

    def apply(self, model: nn.Module) -> nn.Module:
        """A copy of a model whose layers read the fixed patterns.

        Args:
            model: Holds a block-sparse layer of every name, of this block size.

        Raises:
            ValueError: If a layer is missing or has another block size.
        """
        out = copy.deepcopy(model)
        for name in self.frequency:
            layer = _layer(out, name)
            if layer.block_size != self.block_size:
                raise ValueError(
                    f"layer {name!r} must have block_size={self.block_size}, got "
                    f"{layer.block_size}."
                )
            fixed = BlockSparseDistilled(
                self.frequency[name],
                self.mean_count[name],
                num_heads=layer.num_heads,
                head_dim=layer.head_dim,
                num_kv_heads=layer.num_kv_heads,
                block_size=self.block_size,
                scale=layer.scale,
                backend=layer.backend,
            ).train(layer.training)
            # A layer with a fixed pattern has no parameter that tells its device.
            near = next((p.device for p in [*layer.parameters(), *out.parameters()]), "cpu")
            if layer is out:
                return fixed.to(near)
            parent, _, own = name.rpartition(".")
            setattr(out.get_submodule(parent), own, fixed.to(near))
        return out

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file (needs the ``safetensors`` package)."""
        from safetensors.torch import save_file

        tensors = {f"frequency.{name}": x.contiguous() for name, x in self.frequency.items()}
        tensors |= {f"mean_count.{name}": x.contiguous() for name, x in self.mean_count.items()}
        about = json.dumps({"block_size": self.block_size})
        metadata = {"format": _FILE_FORMAT, "version": _FILE_VERSION, "about": about}
        save_file(tensors, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> DistilledPatterns:
        """Reads a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is something else.
        """
        tensors, metadata = read_tensor_file(
            path,
            kind="distilled patterns",
            file_format=_FILE_FORMAT,
            version=_FILE_VERSION,
        )

        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): x
                for name, x in tensors.items()
                if name.startswith(prefix)
            }

        size = int(json.loads(metadata["about"])["block_size"])
        return cls(part("frequency."), part("mean_count."), size)


def distill_to_fixed(recording: Recording) -> DistilledPatterns:
    """Averages the patterns of a recording, by layer and head.

    Every row keeps, on average, as many tiles as before: those that were read in most samples.
    What a head reads because of the content is lost; how much that costs has to be measured.

    Args:
        recording: Samples of one length, the more the better.

    Returns:
        The patterns; :meth:`DistilledPatterns.apply` puts them into a model.

    Raises:
        ValueError: If the samples differ in length, or query and key blocks in size.

    Example:
        >>> from dilated_attention_pytorch import BlockSparseAdaptive
        >>> from dilated_attention_pytorch.analysis import record
        >>> layer = BlockSparseAdaptive(num_heads=2, head_dim=16)
        >>> fixed = distill_to_fixed(record(layer, [torch.randn(8, 512, 2, 16)]))
        >>> fixed.apply(layer)
        BlockSparseDistilled(num_heads=2, head_dim=16, block_size=64, blocks=(8, 8))
    """
    frequency, mean_count = {}, {}
    shapes = {
        (layer.pattern.q_len, layer.pattern.kv_len, layer.pattern.block_size)
        for sample in recording.samples
        for layer in sample.layers
    }
    size = next(iter(shapes))[2]
    if len(shapes) != 1 or size[0] != size[1]:
        raise ValueError(
            f"samples must have one length and square blocks of one size, got {sorted(shapes)}."
        )
    for number, name in enumerate(recording.layer_names):
        kept = torch.stack([record.kept() for record in recording.layer(number)]).float()
        frequency[name] = kept.mean(0)
        mean_count[name] = kept.sum(-1).mean(0)
    return DistilledPatterns(frequency, mean_count, size[0])


def _layer(model: nn.Module, name: str) -> BlockSparseLayer:
    if isinstance(model, BlockSparseLayer):
        return model
    found = dict(model.named_modules()).get(name)
    if not isinstance(found, BlockSparseLayer):
        kind = type(found).__name__
        raise ValueError(f"model must hold a block-sparse layer {name!r}, got {kind}.")
    return found
