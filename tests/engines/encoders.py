"""Encoder models with random weights, small enough to be written for one test: nothing is downloaded.

The architecture is `bert`, the vocabulary WordPiece: `▁` begins a word, everything else goes on with one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?!-'"
WORDS = (*(f"▁{letter}" for letter in LETTERS), *LETTERS, "▁the", "▁cat", "▁dog", "▁king", "▁queen", "▁fish", "ing")
VOCABULARY = (*SPECIAL, *WORDS)
CLS, SEP = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")


@dataclass(frozen=True)
class Encoder:
    """What to write. `pooling` None leaves it unsaid; `num_classes` gives the model a ranking head."""

    pooling: gguf.PoolingType | None = gguf.PoolingType.MEAN
    num_layers: int = 2
    num_embd: int = 32
    num_heads: int = 2
    num_ff: int = 64
    num_ctx: int = 64
    num_classes: int = 0
    num_spare_tokens: int = 0
    seed: int = 1


def write_encoder(path: Path, encoder: Encoder = Encoder()) -> Path:  # frozen
    """Write the GGUF and return its path."""
    writer = gguf.GGUFWriter(str(path), "bert")
    writer.add_name("tiny encoder")
    writer.add_context_length(encoder.num_ctx)
    writer.add_embedding_length(encoder.num_embd)
    writer.add_feed_forward_length(encoder.num_ff)
    writer.add_block_count(encoder.num_layers)
    writer.add_head_count(encoder.num_heads)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    if encoder.pooling is not None:
        writer.add_pooling_type(encoder.pooling)
    if encoder.num_classes > 1:
        writer.add_classifier_output_labels([f"class {number}" for number in range(encoder.num_classes)])
    _add_vocabulary(writer, encoder.num_spare_tokens)
    for name, values in _weights(encoder).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, num_spare: int) -> None:
    spare = tuple(f"▁spare{number}" for number in range(num_spare))
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(WORDS) + num_spare)
    kinds[SPECIAL.index("[UNK]")] = gguf.TokenType.UNKNOWN
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*VOCABULARY, *spare])
    writer.add_token_types(kinds)
    writer.add_token_type_count(2)
    writer.add_bos_token_id(CLS)
    writer.add_sep_token_id(SEP)
    writer.add_unk_token_id(SPECIAL.index("[UNK]"))
    writer.add_pad_token_id(SPECIAL.index("[PAD]"))
    writer.add_mask_token_id(SPECIAL.index("[MASK]"))


def _weights(encoder: Encoder) -> dict[str, np.ndarray]:
    random = np.random.default_rng(encoder.seed)
    embd, ff = encoder.num_embd, encoder.num_ff

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.normal(0, 0.3, (rows, columns)).astype(np.float32)

    def norm(name: str) -> dict[str, np.ndarray]:
        return {f"{name}.weight": np.ones(embd, np.float32), f"{name}.bias": np.zeros(embd, np.float32)}

    weights = {
        "token_embd.weight": matrix(len(VOCABULARY) + encoder.num_spare_tokens, embd),
        "token_types.weight": matrix(2, embd),
        "position_embd.weight": matrix(encoder.num_ctx, embd),
        **norm("token_embd_norm"),
    }
    for layer in range(encoder.num_layers):
        block = f"blk.{layer}"
        weights |= {f"{block}.{name}.weight": matrix(embd, embd) for name in ("attn_q", "attn_k", "attn_v")}
        weights |= {f"{block}.{name}.bias": np.zeros(embd, np.float32) for name in ("attn_q", "attn_k", "attn_v")}
        weights |= {f"{block}.attn_output.weight": matrix(embd, embd)}
        weights |= {f"{block}.ffn_up.weight": matrix(ff, embd), f"{block}.ffn_down.weight": matrix(embd, ff)}
        weights |= norm(f"{block}.attn_output_norm") | norm(f"{block}.layer_output_norm")
    if encoder.num_classes:
        weights |= {"cls.weight": matrix(embd, embd), "cls.bias": np.zeros(embd, np.float32)}
        weights |= {"cls.output.weight": matrix(encoder.num_classes, embd)}
    return weights
