"""Turns what a trained selector reads on average into fixed patterns."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.analysis.recording import Recording
from dilated_attention_pytorch.files import read_tensor_file, write_tensor_file
from dilated_attention_pytorch.foreign_text import short_repr
from dilated_attention_pytorch.nn.baselines import BlockSparseDistilled
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer

_FILE_FORMAT = "dilated_attention_pytorch.distilled_patterns"
_LARGEST_BLOCK = 2**20
# The first has no digest of its content.
_FILE_VERSIONS = ("1", "2")


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
            out.set_submodule(name, fixed.to(near), strict=True)
        return out

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file (needs the ``safetensors`` package): whole, or not at all."""
        tensors = {f"frequency.{name}": x for name, x in self.frequency.items()}
        tensors |= {f"mean_count.{name}": x for name, x in self.mean_count.items()}
        about = json.dumps({"block_size": self.block_size})
        metadata = {"format": _FILE_FORMAT, "version": _FILE_VERSIONS[-1], "about": about}
        write_tensor_file(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> DistilledPatterns:
        """Reads a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or something else.
        """
        tensors, about = read_tensor_file(
            path,
            kind="distilled patterns",
            file_format=_FILE_FORMAT,
            versions=_FILE_VERSIONS,
        )

        size = about.get("block_size")
        if type(size) is not int or not 1 <= size <= _LARGEST_BLOCK or len(about) != 1:
            raise ValueError(
                f"{path} must say a block_size from 1 to {_LARGEST_BLOCK}, and nothing else, got "
                f"{short_repr(about)}."
            )
        frequency, mean_count = (
            {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            for prefix in ("frequency.", "mean_count.")
        )
        if set(frequency) != set(mean_count) or len(tensors) != 2 * len(frequency):
            raise ValueError(
                f"{path} must hold a frequency and a mean_count of every layer, got "
                f"{short_repr(sorted(tensors))}."
            )
        for name, values in frequency.items():
            _check_layer(f"layer {short_repr(name)} in {path}", values, mean_count[name])
        return cls(frequency, mean_count, size)


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


def _check_layer(what: str, frequency: Tensor, mean_count: Tensor) -> None:
    """Raises ValueError unless these are shares of samples, and numbers of tiles."""
    if frequency.dim() != 3 or mean_count.shape != frequency.shape[:2]:
        raise ValueError(
            f"{what} must hold a frequency (h, i, j) and a mean_count (h, i), got "
            f"{tuple(frequency.shape)} and {tuple(mean_count.shape)}."
        )
    most = float(frequency.shape[2])
    for name, values, high in (("frequency", frequency, 1.0), ("mean_count", mean_count, most)):
        if not values.is_floating_point() or bool((~((values >= 0) & (values <= high))).any()):
            raise ValueError(
                f"{what} must hold a {name} of floating-point numbers in [0, {high:g}]."
            )


def _layer(model: nn.Module, name: str) -> BlockSparseLayer:
    if isinstance(model, BlockSparseLayer):
        return model
    found = dict(model.named_modules()).get(name)
    if not isinstance(found, BlockSparseLayer):
        kind = type(found).__name__
        raise ValueError(f"model must hold a block-sparse layer {name!r}, got {kind}.")
    return found
