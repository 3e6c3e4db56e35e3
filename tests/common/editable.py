"""Tokenizers and small models for weight edits, made in the test."""

from __future__ import annotations

from typing import Any

import torch
from small import small_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from hybrid_sleep.parametric.facts import Fact, Relation

FIRST = ("Ada", "Bo", "Cy", "Dee")
LAST = ("Byron", "Chan", "Diaz", "Engel")
PLACES = ("Lisbon", "Oslo", "Rome", "Quito", "Turin")
WORDS = (
    *FIRST, *LAST, *PLACES, "lives", "in", "is", "The", "home", "of", "Where", "does", "live", "?",
    "New", "York", "Question", ":", "Answer", "Today", ".",
)  # fmt: skip
LIVES = Relation(
    "lives in",
    statements=("{} lives in", "The home of {} is"),
    questions=("Where does {} live ?",),
)


def word_tokenizer() -> Any:
    """A token a word; texts begin with <s>."""
    vocab = {word: i for i, word in enumerate(("<unk>", "<s>", "</s>", *WORDS))}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_tokenizer(*merges: tuple[str, str]) -> Any:
    """A token a byte, except for pairs that are one; a space is written Ġ. No special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, *map("".join, merges)])}
    made = Tokenizer(models.BPE(vocab, list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


VOCAB = len(WORDS) + 3


def tiny_hybrid(**changes: Any) -> Any:
    """Our own model in fp64, all of whose windows hold a context."""
    kinds = ["full_attention", "linear_attention", "full_attention"]
    kinds = kinds[:2] * 2 if "distinct_layers" in changes else kinds
    return small_model(**{"vocab_size": VOCAB, "window": 64, "layer_types": kinds, **changes})


def _made(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return kind(config).double().eval()


def tiny_llama(**changes: Any) -> Any:
    """A llama in fp64."""
    config = {
        "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3, **changes,
    }  # fmt: skip
    return _made(LlamaForCausalLM, LlamaConfig(**config))


def tiny_gpt2(**changes: Any) -> Any:
    """A GPT-2 in fp64, whose weights lie transposed."""
    config = {
        "vocab_size": VOCAB, "n_embd": 12, "n_layer": 3, "n_head": 2, "n_positions": 32,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3, **changes,
    }  # fmt: skip
    return _made(GPT2LMHeadModel, GPT2Config(**config))


def tiny_opt(**changes: Any) -> Any:
    """An OPT in fp64, which flattens rows in front of its MLP."""
    config = {
        "vocab_size": VOCAB, "hidden_size": 12, "ffn_dim": 20, "num_hidden_layers": 3,
        "word_embed_proj_dim": 12, "num_attention_heads": 2, "max_position_embeddings": 32,
        "init_std": 0.3, **changes,
    }  # fmt: skip
    return _made(OPTForCausalLM, OPTConfig(**config))


def people(count: int) -> list[Fact]:
    """`count` facts, at most 16."""
    return [
        Fact(f"{FIRST[i % 4]} {LAST[(i // 4 + i) % 4]}", "lives in", PLACES[i % 5])
        for i in range(count)
    ]
