"""GGUFs of several architectures with random weights, small enough to write in a test and large enough to measure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

NUM_VOCAB = 8192
_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Shape:
    """What a model looks like; fields of other architectures are ignored."""

    architecture: str
    num_layers: int = 4
    num_embd: int = 512
    num_heads: int = 8
    num_kv_heads: tuple[int, ...] = (4,)
    head_dim: int = 64
    num_ff: int = 1024
    num_ctx: int = 8192
    window: int = 0
    num_experts: int = 0
    num_vocab: int = NUM_VOCAB

    @property
    def kv_heads(self) -> list[int]:
        """Of each layer."""
        return [self.num_kv_heads[index % len(self.num_kv_heads)] for index in range(self.num_layers)]


SHAPES = {
    "llama": Shape("llama", num_layers=8),
    "qwen2": Shape("qwen2", num_layers=6, num_kv_heads=(2,)),
    "mixture": Shape("llama", num_experts=8, num_ff=256),
    "gemma3": Shape("gemma3", num_layers=12, num_heads=4, num_kv_heads=(1,), head_dim=256, window=512),
    "mamba": Shape("mamba", num_layers=8),
    "lfm2": Shape("lfm2", num_layers=8, num_kv_heads=(0, 0, 8)),
    "deepseek2": Shape("deepseek2", num_layers=6),
}


def write_model(shape: Shape, path: Path) -> Path:
    """Write the model; half-precision weights, which no machine repacks."""
    writer = _Writer(shape, path)
    writer.write()
    return path


class _Writer:
    def __init__(self, shape: Shape, path: Path) -> None:
        self.shape = shape
        self.random = np.random.default_rng(0)
        self.file = gguf.GGUFWriter(path, shape.architecture)

    def write(self) -> None:
        file = self.file
        self.vocabulary()
        file.add_context_length(self.shape.num_ctx)
        file.add_embedding_length(self.shape.num_embd)
        file.add_block_count(self.shape.num_layers)
        file.add_layer_norm_rms_eps(1e-6)
        file.add_file_type(1)
        self.matrix("token_embd", self.shape.num_vocab, self.shape.num_embd)
        self.ones(
            "token_embd_norm.weight" if self.shape.architecture == "lfm2" else "output_norm.weight", self.shape.num_embd
        )
        {"mamba": self.mamba, "deepseek2": self.deepseek2}.get(self.shape.architecture, self.attention)()
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()

    def vocabulary(self) -> None:
        printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
        others = iter(range(0x100, 0x200))
        letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
        words = [f"Ġ{number}" for number in range(self.shape.num_vocab - 256 - len(_CONTROL))]
        self.file.add_tokenizer_model("gpt2")
        self.file.add_tokenizer_pre("qwen2")
        self.file.add_token_list([*letters, *words, *_CONTROL])
        self.file.add_token_types([1] * (self.shape.num_vocab - len(_CONTROL)) + [3] * len(_CONTROL))
        self.file.add_token_merges([f"{letters[0xFE]} {letters[0xFF]}"])
        self.file.add_bos_token_id(self.shape.num_vocab - 3)
        self.file.add_eos_token_id(self.shape.num_vocab - 1)
        self.file.add_add_bos_token(False)

    def matrix(self, name: str, *shape: int) -> None:
        self.file.add_tensor(f"{name}.weight", self.random.normal(0, 0.02, shape).astype(np.float16))

    def ones(self, name: str, *shape: int) -> None:
        self.file.add_tensor(name, np.ones(shape, np.float32))

    def mamba(self) -> None:
        width = self.shape.num_embd
        inner, state, kernel, rank = 2 * width, 16, 4, width // 16
        self.file.add_ssm_conv_kernel(kernel)
        self.file.add_ssm_inner_size(inner)
        self.file.add_ssm_state_size(state)
        self.file.add_ssm_time_step_rank(rank)
        self.file.add_feed_forward_length(0)
        self.file.add_head_count(0)
        for block in (f"blk.{index}." for index in range(self.shape.num_layers)):
            self.ones(f"{block}attn_norm.weight", width)
            self.matrix(f"{block}ssm_in", 2 * inner, width)
            self.ones(f"{block}ssm_conv1d.weight", inner, kernel)
            self.ones(f"{block}ssm_conv1d.bias", inner)
            self.matrix(f"{block}ssm_x", rank + 2 * state, inner)
            self.ones(f"{block}ssm_dt.weight", inner, rank)
            self.ones(f"{block}ssm_dt.bias", inner)
            self.file.add_tensor(f"{block}ssm_a", -np.ones((inner, state), np.float32))
            self.ones(f"{block}ssm_d", inner)
            self.matrix(f"{block}ssm_out", width, inner)

    def attention(self) -> None:
        shape, file = self.shape, self.file
        heads, head_dim = shape.num_heads, shape.head_dim
        file.add_feed_forward_length(shape.num_ff)
        file.add_head_count(heads)
        file.add_head_count_kv(shape.kv_heads if len(shape.num_kv_heads) > 1 else shape.num_kv_heads[0])
        file.add_key_length(head_dim)
        file.add_value_length(head_dim)
        file.add_rope_dimension_count(head_dim)
        if shape.window:
            file.add_sliding_window(shape.window)
        if shape.architecture == "lfm2":
            file.add_shortconv_l_cache(3)
        for index, kv_heads in enumerate(shape.kv_heads):
            block = f"blk.{index}."
            self.ones(f"{block}attn_norm.weight", shape.num_embd)
            if kv_heads:
                for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                    self.matrix(f"{block}attn_{name}", rows * head_dim, shape.num_embd)
                    if shape.architecture == "qwen2":
                        self.ones(f"{block}attn_{name}.bias", rows * head_dim)
                self.matrix(f"{block}attn_output", shape.num_embd, heads * head_dim)
            else:
                self.ones(f"{block}shortconv.conv.weight", shape.num_embd, 3)
                self.matrix(f"{block}shortconv.in_proj", 3 * shape.num_embd, shape.num_embd)
                self.matrix(f"{block}shortconv.out_proj", shape.num_embd, shape.num_embd)
            if shape.architecture in ("gemma3", "lfm2") and kv_heads:
                self.ones(f"{block}attn_q_norm.weight", head_dim)
                self.ones(f"{block}attn_k_norm.weight", head_dim)
            if shape.architecture == "gemma3":
                self.ones(f"{block}post_attention_norm.weight", shape.num_embd)
                self.ones(f"{block}post_ffw_norm.weight", shape.num_embd)
            self.feed_forward(block)
        if shape.num_experts:
            file.add_expert_count(shape.num_experts)
            file.add_expert_used_count(2)

    def feed_forward(self, block: str) -> None:
        shape, experts = self.shape, self.shape.num_experts
        self.ones(f"{block}ffn_norm.weight", shape.num_embd)
        if experts:
            self.ones(f"{block}ffn_gate_inp.weight", experts, shape.num_embd)
            self.matrix(f"{block}ffn_gate_exps", experts, shape.num_ff, shape.num_embd)
            self.matrix(f"{block}ffn_up_exps", experts, shape.num_ff, shape.num_embd)
            self.matrix(f"{block}ffn_down_exps", experts, shape.num_embd, shape.num_ff)
        else:
            self.matrix(f"{block}ffn_gate", shape.num_ff, shape.num_embd)
            self.matrix(f"{block}ffn_up", shape.num_ff, shape.num_embd)
            self.matrix(f"{block}ffn_down", shape.num_embd, shape.num_ff)

    def deepseek2(self) -> None:
        """Compressed attention: one row of `rank` numbers and the rotated part stand for K and V of every head."""
        shape, file = self.shape, self.file
        rank, query_rank, rotated, plain = 256, 192, 32, 64
        file.add_feed_forward_length(shape.num_ff)
        file.add_head_count(shape.num_heads)
        file.add_head_count_kv(1)
        file.add_key_length(rank + rotated)
        file.add_value_length(rank)
        file.add_key_length_mla(plain + rotated)
        file.add_value_length_mla(plain)
        file.add_kv_lora_rank(rank)
        file.add_q_lora_rank(query_rank)
        file.add_rope_dimension_count(rotated)
        file.add_leading_dense_block_count(shape.num_layers)
        file.add_expert_feed_forward_length(64)
        file.add_expert_shared_count(1)
        for block in (f"blk.{index}." for index in range(shape.num_layers)):
            self.ones(f"{block}attn_norm.weight", shape.num_embd)
            self.ones(f"{block}attn_q_a_norm.weight", query_rank)
            self.ones(f"{block}attn_kv_a_norm.weight", rank)
            self.matrix(f"{block}attn_q_a", query_rank, shape.num_embd)
            self.matrix(f"{block}attn_q_b", shape.num_heads * (plain + rotated), query_rank)
            self.matrix(f"{block}attn_kv_a_mqa", rank + rotated, shape.num_embd)
            self.matrix(f"{block}attn_k_b", shape.num_heads, rank, plain)
            self.matrix(f"{block}attn_v_b", shape.num_heads, plain, rank)
            self.matrix(f"{block}attn_output", shape.num_embd, shape.num_heads * plain)
            self.feed_forward(block)


def split_model(path: Path, folder: Path, count: int) -> tuple[Path, ...]:
    """A model as so many files, under names that say nothing of their order."""
    whole = gguf.GGUFReader(path)
    parts = []
    tensors = whole.tensors
    for number in range(count):
        part = folder / f"sha256-{(number * 7 + 3) % 10}"
        writer = gguf.GGUFWriter(part, "llama")
        if number == 0:
            for field in whole.fields.values():
                if field.name.startswith("GGUF.") or field.name == "general.architecture":
                    continue
                kind = field.types[0]
                sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub_type)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(tensors))
        for tensor in tensors[number * len(tensors) // count : (number + 1) * len(tensors) // count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(part)
    return tuple(parts)
