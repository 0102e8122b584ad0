"""Models to measure with: the true shape and size of known ones, random weights, nothing downloaded.

Speed depends on shapes and quantization, not on what the weights say. Two surprises. Byte and control tokens have an
embedding so faint that greedy decoding never chooses them, so an answer ends at its token limit and is made of whole
words. And no merge ever applies, so a text of n bytes is n tokens.
"""

from __future__ import annotations

import itertools
import string
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from engines.chat.jinja import CHATML

OUT = Path(__file__).parent / "out"
RECIPE = 1
"""Part of the file's name: a model that was made in another way is not used again."""

BYTES = 256
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FAINT = 0.05  # of an ordinary row's scale; the best of 150 000 random logits is some 4 times the scale

_BLOCK = 32  # weights of a Q8_0 block, behind its 2 bytes of scale (ggml-common.h block_q8_0)
_UNIFORM_STD = 73.3  # of the integers from -127 to 127


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that decide how fast a model of the `qwen2` architecture is."""

    name: str
    num_layers: int
    num_embd: int
    num_heads: int
    num_kv_heads: int
    num_ff: int
    num_vocab: int
    num_ctx: int = 32768

    @property
    def head_dim(self) -> int:
        """Length of one attention head."""
        return self.num_embd // self.num_heads


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen2.5-0.5b", 24, 896, 14, 2, 4864, 151936),
        Shape("smollm-135m", 30, 576, 9, 3, 1536, 49152),
    )
}


def ensure_model(shape: Shape, directory: Path = OUT) -> Path:
    """The GGUF of that shape, written first if it is not there (0.5 GB and some seconds for 0.5 B parameters)."""
    path = directory / f"{shape.name}-q8_0-v{RECIPE}.gguf"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        _write(shape, partial)
        partial.replace(path)
    return path


def _write(shape: Shape, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name(f"{shape.name} with random weights")
    _add_hyperparameters(writer, shape)
    _add_vocabulary(writer, shape)
    _add_tensors(writer, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_hyperparameters(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(shape.num_ctx)
    writer.add_embedding_length(shape.num_embd)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.num_ff)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_vocabulary(writer: gguf.GGUFWriter, shape: Shape) -> None:
    tokens = make_vocabulary(shape.num_vocab)
    kinds = [gguf.TokenType.NORMAL] * (shape.num_vocab - len(CONTROL)) + [gguf.TokenType.CONTROL] * len(CONTROL)
    ids = {token: index for index, token in enumerate(tokens)}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{tokens[0xFE]} {tokens[0xFF]}"])  # one is required; these bytes are in no UTF-8 text
    writer.add_bos_token_id(ids["<|endoftext|>"])
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_pad_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)


def make_vocabulary(num_vocab: int) -> list[str]:
    """Every byte in GPT-2's notation, words of four letters each with a space before it, and the control tokens."""
    words = itertools.product(string.ascii_lowercase, repeat=4)
    num_words = num_vocab - BYTES - len(CONTROL)
    return [*_byte_tokens(), *("Ġ" + "".join(word) for word in itertools.islice(words, num_words)), *CONTROL]


def _byte_tokens() -> list[str]:
    """GPT-2's notation: a printable byte is its own Latin-1 character, the n-th of the others is U+0100 + n."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(BYTES)]


def _add_tensors(writer: gguf.GGUFWriter, shape: Shape) -> None:
    random = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int, gain: npt.NDArray[np.float32] | float = 1.0) -> None:
        data = random_q8_0(random, rows, columns, gain)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape.num_embd, np.float32))

    gain = np.ones((shape.num_vocab, 1), np.float32)
    gain[:BYTES] = gain[-len(CONTROL) :] = FAINT
    matrix("token_embd", shape.num_vocab, shape.num_embd, gain)  # also the output matrix: there is no output.weight
    norm("output_norm")
    num_kv = shape.head_dim * shape.num_kv_heads
    for layer in (f"blk.{index}." for index in range(shape.num_layers)):
        norm(f"{layer}attn_norm")
        for name, rows in (("q", shape.num_embd), ("k", num_kv), ("v", num_kv)):
            matrix(f"{layer}attn_{name}", rows, shape.num_embd)
            writer.add_tensor(f"{layer}attn_{name}.bias", random.normal(0, 0.1, rows).astype(np.float32))
        matrix(f"{layer}attn_output", shape.num_embd, shape.num_embd)
        norm(f"{layer}ffn_norm")
        matrix(f"{layer}ffn_gate", shape.num_ff, shape.num_embd)
        matrix(f"{layer}ffn_up", shape.num_ff, shape.num_embd)
        matrix(f"{layer}ffn_down", shape.num_embd, shape.num_ff)


def random_q8_0(
    random: np.random.Generator, rows: int, columns: int, gain: npt.NDArray[np.float32] | float
) -> npt.NDArray[np.uint8]:
    """A matrix that keeps the variance of what it multiplies, times `gain`, as Q8_0 bytes: 34 for 32 weights."""
    blocks = np.empty((rows, columns // _BLOCK, 2 + _BLOCK), np.uint8)
    scales = random.uniform(0.5, 1.5, blocks.shape[:2]) * gain / (_UNIFORM_STD * columns**0.5)
    blocks[..., :2] = scales.astype(np.float16)[..., np.newaxis].view(np.uint8)
    weights = random.integers(-127, 128, (*blocks.shape[:2], _BLOCK), np.int8)
    blocks[..., 2:] = weights.view(np.uint8)
    return blocks.reshape(rows, -1)
