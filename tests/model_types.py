"""Every causal language model of transformers, tiny and random: adapted, or refused with a reason.

``python tests/model_types.py`` (with ``src`` on the path) checks all types and writes the table of
``docs/models.md``; with names it shows those alone.
"""

from __future__ import annotations

import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch import AdaptiveConfig
from dilated_attention_pytorch.hf.adapt import adapt
from dilated_attention_pytorch.hf.adapter import load_adapter, save_adapter

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
DENSE = AdaptiveConfig(base_sparsity=0.0, block_size=8, budget="fixed")
LENGTH, PADDING, NEW = 40, 13, 4
LARGEST = 4_000_000

# A configuration gets those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("decoder_layers",), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("attention_heads", "decoder_attention_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 256),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    "qk_nope_head_dim": 16, "v_head_dim": 16, "vocab_size": 64, "vocab_size_per_layer_input": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
# What single types need besides.
_ONE_OF_EACH = ["sliding_attention", "full_attention"]
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cpmant": {"dim_ff": 64, "dim_head": 16},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}},
    "deepseek_v4": {"sliding_window": 16},
    "gemma3n_text": {
        "layer_types": _ONE_OF_EACH, "sliding_window": 16, "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "kimi_linear": {"linear_num_heads": 4, "num_experts_per_token": 2},
    "laguna": {"layer_types": _ONE_OF_EACH, "sliding_window": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"n_routed_experts": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 32},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "ministral": {"layer_types": _ONE_OF_EACH, "sliding_window": 16},
    "moshi": {"sliding_window": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
        "indexer_compress_ratio": 4, "layer_types": ["linear_attention", "qwen_sparse_attention"],
    },
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": 64, "shape_vocab_size": 64,
                 "pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "xlm": {"emb_dim": 64},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"layers_block_type": ["mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What became of a model type: its attention, or why it is refused or was not built."""

    kind: str
    result: str
    detail: str

    @property
    def row(self) -> str:
        return f"| `{self.kind}` | {self.result} | {self.detail} |"


def model_types() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: str) -> Any:
    """A small configuration; of layers of two kinds there is one each."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    make = CONFIG_MAPPING[kind]
    default = make().to_dict()
    if isinstance(default.get("text_config"), dict):
        text = default["text_config"]["model_type"]
        if text in CONFIG_MAPPING and text != kind:
            return make(text_config=tiny_config(text).to_dict())
    settings = {name: value for name, value in SIZES.items() if name in default}
    if "qk_rope_head_dim" in default:
        # Multi-head latent attention: as many keys as queries, of a size of their own.
        settings.pop("head_dim", None)
        settings["num_key_value_heads"] = 4
    kinds = list(dict.fromkeys(default.get("layer_types") or []))
    if len(kinds) > 1:
        full = next((k for k in kinds if "full" in k or k == "attention"), kinds[-1])
        settings["layer_types"] = [next(k for k in kinds if k != full), full]
    if "sliding_window" in default:
        windows = any("sliding" in k for k in settings.get("layer_types", kinds))
        settings["sliding_window"] = 16 if windows else None
    if "is_decoder" in default and not default.get("is_encoder_decoder"):
        settings["is_decoder"] = True
    return make(**{**settings, **EXCEPTIONS.get(kind, {})})


def build(kind: str) -> Any:
    """A model with random weights; on the meta device if it stays large."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        return model.eval()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Not what Mamba decays by.
            if parameter.dim() == 2 and "A_log" not in name:
                # The usual small weights make attention uniform, which would hide mistakes.
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def prompt() -> tuple[Tensor, Tensor]:
    """Two samples; the second begins with padding."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(4, 64, (2, LENGTH), generator=generator), torch.ones(2, LENGTH).long()
    ids[1, :PADDING], mask[1, :PADDING] = 0, 0
    return ids, mask


def results(model: Any) -> dict[str, Tensor]:
    """Logits of a plain and of a padded batch, a gradient through all layers, generated tokens."""
    ids, mask = prompt()
    whole = model(ids[:1], use_cache=False)[0]
    weight = model.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(whole.float().log_softmax(-1)[..., 7].mean(), weight)
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, use_cache=False)[0]
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    return {
        "logits": whole.detach(), "padded logits": padded[mask.bool()], "gradient": gradient,
        "generated tokens": made.sequences, "scores": torch.stack(made.scores),
    }  # fmt: skip


def verdict(kind: str) -> Verdict:
    """Builds, adapts and compares; raises AssertionError if an adapted model differs."""
    try:
        model = build(kind)
    except Exception as error:
        return Verdict(kind, "not built", _line(error))
    try:
        adapted = adapt(model, DENSE)
    except ValueError as error:
        if "meta device" in str(error) or "ended in an error" in str(error):
            return Verdict(kind, "not built", "stays too large, or cannot run")
        return Verdict(kind, "refused", _line(error))
    with adapted:
        sparse, own = list(adapted.selectors), [site.number for site in adapted.sites]
    if any(p.is_meta for p in model.parameters()):
        return Verdict(kind, "not built", "stays too large")
    dense = results(model)
    with adapt(model, DENSE) as adapted:
        found = results(model)
        adapted.set_base_sparsity(0.7)
        with torch.no_grad(), TemporaryDirectory() as folder:
            fewer = model(prompt()[0][:1], use_cache=False)[0]
            save_adapter(adapted, folder)
            adapted.undo()
            with load_adapter(model, folder):
                again = model(prompt()[0][:1], use_cache=False)[0]
    for name, value in dense.items():
        assert value.isfinite().all() or name == "scores", f"{kind}: {name} are not finite"
        scale = float(value[value.isfinite()].abs().double().max()) if value.numel() else 1.0
        torch.testing.assert_close(
            found[name], value, atol=2e-4 * max(scale, 1e-6), rtol=2e-4,
            msg=lambda text, name=name: f"{kind}: {name} differ. {text}",
        )  # fmt: skip
    assert not torch.allclose(fewer, dense["logits"], rtol=1e-4), f"{kind}: nothing is sparse"
    assert torch.equal(again, fewer), f"{kind}: a saved adapter is another"
    notes = []
    if len(own) < model.config.num_hidden_layers:
        notes.append("layers without attention stay as they are")
    if sparse != own:
        notes.append("layers with a window stay as they are")
    return Verdict(kind, "adapted", "; ".join(notes))


def _line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
    text = re.sub(r"^model of type '.*?' is not supported: ", "", text)
    return text.replace("|", "/")[:200]


def write_page(rows: list[Verdict]) -> None:
    """Writes the table and its numbers; the text before them stays."""
    import transformers

    counts = [sum(row.result == result for row in rows) for result in RESULTS]
    numbers = (
        f"transformers {transformers.__version__}: {len(rows)} in all, of which {counts[0]} are "
        f"adapted, {counts[1]} are refused and {counts[2]} were not built."
    )
    text = PAGE.read_text(encoding="utf-8")
    text = re.sub(r"transformers [\d.]+: .* were not built\.", numbers, text)
    text = text[: text.index(TABLE)] + TABLE
    rows = sorted(rows, key=lambda row: (RESULTS.index(row.result), row.kind))
    PAGE.write_text(text + "".join(f"{row.row}\n" for row in rows), encoding="utf-8")


RESULTS = ["adapted", "refused", "not built"]
TABLE = "| type | result | |\n|---|---|---|\n"


def main(kinds: list[str]) -> int:
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows, different = [], 0
    for kind in kinds or model_types():
        try:
            rows.append(verdict(kind))
            print(rows[-1].row, flush=True)
        except Exception as error:
            different += 1
            print(f"{kind} is different: {type(error).__name__} {str(error)[:300]!r}", flush=True)
    if not kinds and not different:
        write_page(rows)
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
