"""Tiny random models of every supported family, with grouped heads and distinct logits."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 64


def tiny_model(family: str = "llama", **changes: Any) -> Any:
    """A causal language model with 4 query and 2 KV heads of 16; gemma3 has one full layer of 2."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }
    names = {
        "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral",
        "gemma3": "Gemma3",
    }  # fmt: skip
    if family == "qwen2":
        # Its heads always have hidden_size / num_attention_heads numbers.
        sizes.pop("head_dim")
        sizes["hidden_size"] = 64
    if family == "mistral":
        sizes["sliding_window"] = None
    if family == "gemma3":
        sizes |= {
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
            # Not head_dim, so that the logits' factor is one of its own.
            "query_pre_attn_scalar": 8,
        }
    name = names[family]
    text = "Text" if family == "gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")(**{**sizes, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # The usual small weights make attention uniform, which would hide mistakes.
                parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
    return model.eval()


def tokens(batch: int = 2, length: int = 90, seed: int = 0) -> torch.Tensor:
    """Random token numbers without the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


def byte_pair_tokenizer(text: str, size: int) -> Any:
    """Merges of bytes learned from a text, as GPT-2, Llama 3 and Qwen have; 256: single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentence_piece_tokenizer() -> Any:
    """Letters with a mark for spaces, and bytes for the rest, as Llama 2 and Mistral have."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = "▁abcdefghijklmnopqrstuvwxyzD,!"
    pieces = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), *letters]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def save_tiny(folder: Any, family: str = "llama", **changes: Any) -> Any:
    """Saves a tiny model with a tokenizer of single bytes; returns the folder."""
    tiny_model(family, vocab_size=256, **changes).save_pretrained(folder)
    byte_pair_tokenizer("", 256).save_pretrained(folder)
    return folder
