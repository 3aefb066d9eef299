"""adapt: makes the attention of a pretrained model sparse, and undoes it exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from dilated_attention_pytorch.config import AdaptiveConfig, check_sparsity
from dilated_attention_pytorch.hf.attention import (
    SELECTOR,
    DenseBelow,
    hand_over_cache,
    register,
    takes_cache,
)
from dilated_attention_pytorch.hf.sites import AttentionSite, find_attention
from dilated_attention_pytorch.nn.adaptive import BlockSparseAdaptive
from dilated_attention_pytorch.nn.baselines import BlockSparseTrainingFree, TrainingFreeConfig
from dilated_attention_pytorch.nn.block_sparse import BlockSparseLayer
from dilated_attention_pytorch.selection.layer_shares import SparsityCosts, costs_near

Selector = BlockSparseAdaptive | BlockSparseTrainingFree
SelectorConfig = AdaptiveConfig | TrainingFreeConfig


class AdaptedModel:
    """A model whose attention layers hold selectors; :func:`adapt` makes it.

    As a context manager it undoes the adaptation at the end.

    Attributes:
        model: The model, changed in place.
        sites: Its attention layers.
        configs: Settings by layer number; layers that are missing attend densely.
        costs: What sparsity costs in each layer, measured by
            :func:`~dilated_attention_pytorch.hf.layer_shares.measure_costs`
            at one or more lengths: by them a mean sparsity is shared among the layers at lengths
            near those. Empty: every layer has the same.
    """

    costs: tuple[SparsityCosts, ...] = ()

    def __init__(
        self, model: Any, sites: list[AttentionSite], configs: dict[int, SelectorConfig]
    ) -> None:
        self.model, self.sites, self.configs = model, sites, configs
        self._attention_before = model.config._attn_implementation
        self._frozen: dict[nn.Parameter, bool] = {}
        self._hooks = [
            site.module.register_forward_pre_hook(hand_over_cache, with_kwargs=True)
            for site in sites
            if site.number in configs and takes_cache(site.module)
        ]
        self._undone = False
        self._own: dict[int, BlockSparseLayer] = {}
        self._replacements: list[dict[int, BlockSparseLayer]] = []

    @property
    def selectors(self) -> dict[int, BlockSparseLayer]:
        """The selectors by layer number."""
        found = {site.number: site.module._modules.get(SELECTOR) for site in self.sites}
        return {n: s for n, s in found.items() if isinstance(s, BlockSparseLayer)}

    @property
    def dense_below(self) -> DenseBelow:
        """Below how many tokens the model attends densely; to be set, :class:`DenseBelow`."""
        return DenseBelow.of(next(iter(self.selectors.values())))

    @dense_below.setter
    def dense_below(self, value: DenseBelow) -> None:
        if not isinstance(value, DenseBelow):
            raise TypeError(f"dense_below must be a DenseBelow, got {type(value).__name__}.")
        for selector in self.selectors.values():
            value.tell(selector)

    def selector_parameters(self) -> list[nn.Parameter]:
        """All parameters of the selectors."""
        return [p for selector in self.selectors.values() for p in selector.parameters()]

    def freeze_base(self) -> AdaptedModel:
        """Leaves the selectors alone trainable; :meth:`undo` gives every flag back."""
        own = {id(p) for p in self.selector_parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in own:
                self._frozen.setdefault(parameter, parameter.requires_grad)
                parameter.requires_grad_(False)
        return self

    def layer_sparsities(self, mean: float, length: int | None = None) -> dict[int, float]:
        """The sparsity of each adapted layer, at a mean over all of them.

        Args:
            mean: In [0, 1).
            length: Tokens of a sequence: they share by :attr:`costs` of a length near it, and have
                the same sparsity without. None: by the costs of the longest.

        Raises:
            ValueError: If the mean is not in [0, 1), or costs are of other layers.
        """
        check_sparsity("mean", mean)
        if length is not None:
            costs = costs_near(self.costs, length)
        else:
            costs = max(self.costs, key=lambda one: one.length, default=None)
        if costs is None:
            return dict.fromkeys(self.selectors, mean)
        shares = costs.allot(mean)
        if set(shares) != set(self.selectors):
            raise ValueError(
                f"costs must be those of the adapted layers {sorted(self.selectors)}, got "
                f"{sorted(shares)}."
            )
        return shares

    def set_base_sparsity(self, value: float, length: int | None = None) -> None:
        """Sets the mean sparsity over all selectors; the arguments are :meth:`layer_sparsities`'.

        Raises:
            ValueError: If it is not in [0, 1).
        """
        for number, sparsity in self.layer_sparsities(value, length).items():
            selector = self.selectors[number]
            if isinstance(selector, Selector):
                selector.set_base_sparsity(sparsity)

    @contextmanager
    def replaced(self, selectors: Mapping[int, BlockSparseLayer]) -> Iterator[None]:
        """Other layers in the place of the selectors, while open.

        Args:
            selectors: By layer number; the layers that are missing keep theirs.
        """
        if not self._replacements:
            self._own = self.selectors
        # A copy, to be found again by what it is.
        mine = dict(selectors)
        self._replacements.append(mine)
        try:
            self._install()
            yield
        finally:
            self._replacements = [other for other in self._replacements if other is not mine]
            self._install()

    def _install(self) -> None:
        """Puts the selectors in, or what stands in for them last; whoever is undone has none."""
        now = self._own
        for replacement in self._replacements:
            now = {**now, **replacement}
        for site in self.sites:
            _put(site.module, None if self._undone else now.get(site.number))

    def undo(self) -> Any:
        """Takes the selectors out and restores what the model was; calling it again is harmless.

        Returns:
            The model: its modules, its configuration, its flags and its outputs as before.
        """
        if self._undone:
            return self.model
        for site in self.sites:
            _put(site.module, None)
        for hook in self._hooks:
            hook.remove()
        self.model.set_attn_implementation(self._attention_before)
        for parameter, flag in self._frozen.items():
            parameter.requires_grad_(flag)
        self._frozen.clear()
        self._undone = True
        return self.model

    def __enter__(self) -> AdaptedModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def adapt(
    model: Any,
    config: SelectorConfig | Mapping[int, SelectorConfig] | None = None,
    *,
    layers: Iterable[int] | None = None,
    backend: str = "auto",
) -> AdaptedModel:
    """Attaches one selector to every attention layer of a pretrained model, in place.

    The model then computes the chosen blocks alone, in training, evaluation and ``generate``, which
    keeps block summaries beside the cache. Layers with a sliding window, and layers that are not
    named, attend as PyTorch does; layers without attention, such as those of Mamba, stay as they
    are. Dropout of the weights and ``output_attentions`` are refused when
    they are used.

    Args:
        model: A causal language model of transformers whose attention layers call its attention
            interface, such as ``LlamaForCausalLM``. Two passes of eight tokens show whether
            block-sparse attention computes what they ask for.
        config: :class:`AdaptiveConfig` for learned selectors (untrained until they are fitted,
            tuned or loaded) or :class:`TrainingFreeConfig`; or a mapping from layer numbers to
            them. None: ``AdaptiveConfig()``.
        layers: Numbers of the layers to make sparse, counted from 0; None: all without a sliding
            window. Not with a mapping, which names its layers.
        backend: What computes attention: ``"auto"``, or a name in ``BACKENDS``.

    Returns:
        A handle; ``handle.undo()``, or leaving it as a context manager, restores the model.

    Raises:
        TypeError: If ``model`` or ``config`` are something else.
        ValueError: If the architecture is not supported, the model is adapted already, or a layer
            does not exist or has a sliding window.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**size, num_hidden_layers=2, vocab_size=64))
        >>> with adapt(model, AdaptiveConfig(base_sparsity=0.5, block_size=16)) as adapted:
        ...     logits = model(torch.arange(64)[None]).logits
        ...     sorted(adapted.selectors)
        [0, 1]
    """
    sites = find_attention(model)
    if isinstance(config, Mapping):
        if layers is not None:
            raise ValueError("layers excludes a mapping of configs, which names its layers.")
        configs = dict(config)
    else:
        chosen = [site.number for site in sites if not site.dense] if layers is None else layers
        configs = dict.fromkeys(chosen, AdaptiveConfig() if config is None else config)
    return attach(model, sites, configs, backend)


def attach(
    model: Any, sites: list[AttentionSite], configs: dict[int, SelectorConfig], backend: str
) -> AdaptedModel:
    """Adapts a model whose attention layers are known; the errors are those of :func:`adapt`."""
    if any(SELECTOR in site.module._modules for site in sites):
        raise ValueError("model is adapted already; call undo() on its handle first.")
    _check_layers(sites, configs)
    selectors = {
        site.number: build_selector(site, configs[site.number], backend)
        for site in sites
        if site.number in configs
    }
    adapted = AdaptedModel(model, sites, configs)
    try:
        name = register()
        for site in sites:
            if site.number in selectors:
                _put(site.module, selectors[site.number])
        model.set_attn_implementation(name)
    except BaseException:
        # Half adapted is not what it was before.
        adapted.undo()
        raise
    return adapted


def build_selector(
    site: AttentionSite, config: SelectorConfig, backend: str = "auto"
) -> BlockSparseLayer:
    """The selector of one attention layer, on its device, in float32 and in its mode.

    Raises:
        TypeError: If ``config`` is neither an AdaptiveConfig nor a TrainingFreeConfig.
    """
    # What is made in inference mode could not be trained, nor would it count its changes, by which
    # a cache knows that its summaries are those of other weights.
    with torch.inference_mode(False):
        selector = make_selector(site, config, backend)
        # Half precision would lose most of a selector's small updates.
        return selector.to(site.device, torch.float32).train(site.module.training)


def make_selector(
    site: AttentionSite, config: SelectorConfig, backend: str = "auto"
) -> BlockSparseLayer:
    """The selector of one attention layer as its class makes it; the errors are the same."""
    if isinstance(config, AdaptiveConfig):
        return BlockSparseAdaptive(
            None, None, site.num_heads, site.head_dim, config,
            num_kv_heads=site.num_kv_heads, scale=site.scale, backend=backend,
        )  # fmt: skip
    if isinstance(config, TrainingFreeConfig):
        return BlockSparseTrainingFree(
            config, site.num_heads, site.head_dim,
            num_kv_heads=site.num_kv_heads, scale=site.scale, backend=backend,
        )  # fmt: skip
    raise TypeError(
        "config must be an AdaptiveConfig, a TrainingFreeConfig or a mapping from layer "
        f"numbers to them, got {type(config).__name__}."
    )


def _check_layers(sites: list[AttentionSite], configs: Mapping[int, SelectorConfig]) -> None:
    numbers = {site.number for site in sites}
    unknown = sorted(set(configs) - numbers)
    if unknown:
        raise ValueError(f"layers must lie in 0 to {max(numbers)}, got {unknown}.")
    for reason in sorted({site.dense for site in sites if site.dense}):
        named = [site.number for site in sites if site.dense == reason and site.number in configs]
        if named:
            raise ValueError(f"layers {named} {reason} and stay as they are; leave them out.")
    if not configs:
        reasons = sorted({f"attention layers {site.dense}" for site in sites if site.dense})
        raise ValueError(
            f"no layer is left to make sparse: {'; '.join(reasons) or 'layers is empty'}."
        )


def _put(module: nn.Module, selector: nn.Module | None) -> None:
    """Sets or removes the selector of an attention layer, leaving no trace."""
    if selector is None:
        module._modules.pop(SELECTOR, None)
    else:
        module._modules[SELECTOR] = selector
