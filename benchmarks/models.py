"""Models to measure with: the true shape and size of known ones, random weights, nothing downloaded.

Speed depends on shapes and quantization, not on what the weights say. Two surprises. Byte and control tokens have an
embedding so faint that greedy decoding never chooses them, so an answer ends at its token limit and is made of whole
words. And a word is four letters, so that a text of n words of `benchmarks.prompts` is n tokens.
"""

from __future__ import annotations

import itertools
import string
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from engines.chat.jinja import CHATML

OUT = Path(__file__).parent / "out"
RECIPE = 2
"""Part of the file's name: a model that was made in another way is not used again."""

BYTES = 256
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BERT_CONTROL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FAINT = 0.05  # of an ordinary row's scale; the best of 150 000 random logits is some 4 times the scale

_BLOCK = 32  # weights of a block of Q8_0 or Q4_0, behind its 2 bytes of scale (ggml-common.h)
_Q8_0_STD = 73.3  # of the integers from -127 to 127
_Q4_0_STD = 4.61  # of the integers from -8 to 7

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that decide how fast a model is.

    Attributes:
        quantization: of every matrix, `Q8_0` or `Q4_0`. architecture: `qwen2`, or `nomic-bert` for embeddings.
        pooling: what makes one vector of a text, where the model is there for that.
    """

    name: str
    num_layers: int
    num_embd: int
    num_heads: int
    num_kv_heads: int
    num_ff: int
    num_vocab: int
    num_ctx: int = 32768
    quantization: str = "Q8_0"
    architecture: str = "qwen2"
    pooling: gguf.PoolingType | None = None

    @property
    def head_dim(self) -> int:
        """Length of one attention head."""
        return self.num_embd // self.num_heads

    @property
    def miniature(self) -> Shape:
        """A model of the same kind that costs next to nothing, to try things out with."""
        num_kv_heads = 2 if self.num_kv_heads == self.num_heads else 1
        small = replace(self, num_layers=2, num_embd=128, num_heads=2, num_kv_heads=num_kv_heads, num_ff=256)
        return replace(small, name=f"{self.name}-miniature", num_vocab=2048)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen2.5-0.5b", 24, 896, 14, 2, 4864, 151936),
        Shape("smollm-135m", 30, 576, 9, 3, 1536, 49152),
        Shape("llama-3.2-1b", 16, 2048, 32, 8, 8192, 128256, quantization="Q4_0"),
        Shape("long-4m", 4, 256, 4, 1, 768, 4096, num_ctx=1 << 17),
        Shape("nomic-137m", 12, 768, 12, 12, 3072, 30522, 2048, "Q8_0", "nomic-bert", gguf.PoolingType.MEAN),
        Shape("smollm-135m-embed", 30, 576, 9, 3, 1536, 49152, 8192, pooling=gguf.PoolingType.LAST),
    )
}
"""Real ones, and `long-4m`, which costs next to nothing and so shows what the server's own work costs."""


def ensure_model(shape: Shape, directory: Path = OUT) -> Path:
    """The GGUF of that shape, written first if it is not there (0.5 GB and some seconds for 0.5 B parameters)."""
    path = directory / f"{shape.name}-{shape.quantization.lower()}-v{RECIPE}.gguf"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        _write(shape, partial)
        partial.replace(path)
    return path


def _write(shape: Shape, path: Path) -> None:
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_name(f"{shape.name} with random weights")
    _add_hyperparameters(writer, shape)
    tensors = _Tensors(writer, shape)
    if shape.architecture == "nomic-bert":
        _add_bert_vocabulary(writer, shape)
        _add_bert_tensors(tensors, shape)
    else:
        _add_vocabulary(writer, shape)
        _add_decoder_tensors(tensors, shape)
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
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{shape.quantization}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if shape.pooling is not None:
        writer.add_pooling_type(shape.pooling)


def _add_vocabulary(writer: gguf.GGUFWriter, shape: Shape) -> None:
    tokens = make_vocabulary(shape.num_vocab)
    kinds = [gguf.TokenType.NORMAL] * (shape.num_vocab - len(CONTROL)) + [gguf.TokenType.CONTROL] * len(CONTROL)
    ids = {token: index for index, token in enumerate(tokens)}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")  # takes a word that is in the vocabulary as it is, without any merges
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{tokens[0xFE]} {tokens[0xFF]}"])  # one is required; these bytes are in no UTF-8 text
    writer.add_bos_token_id(ids["<|endoftext|>"])
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_pad_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)


def _add_bert_vocabulary(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """WordPiece as llama.cpp keeps it: what begins a word is marked, not what goes on with it."""
    words = make_words(shape.num_vocab - len(BERT_CONTROL))
    kinds = [gguf.TokenType.CONTROL] * len(BERT_CONTROL) + [gguf.TokenType.NORMAL] * len(words)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*BERT_CONTROL, *(f"\u2581{word}" for word in words)])
    writer.add_token_types(kinds)
    writer.add_token_type_count(2)
    for add, token in (
        (writer.add_pad_token_id, "[PAD]"),
        (writer.add_unk_token_id, "[UNK]"),
        (writer.add_bos_token_id, "[CLS]"),
        (writer.add_sep_token_id, "[SEP]"),
        (writer.add_mask_token_id, "[MASK]"),
    ):
        add(BERT_CONTROL.index(token))
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)


def make_words(count: int) -> list[str]:
    """The first words of four letters, of which there are 456,976."""
    return ["".join(word) for word in itertools.islice(itertools.product(string.ascii_lowercase, repeat=4), count)]


def make_vocabulary(num_vocab: int) -> list[str]:
    """Every byte in GPT-2's notation, words of four letters each with a space before it, and the control tokens."""
    words = make_words(num_vocab - BYTES - len(CONTROL))
    return [*_byte_tokens(), *(f"\u0120{word}" for word in words), *CONTROL]


def _byte_tokens() -> list[str]:
    """GPT-2's notation: a printable byte is its own Latin-1 character, the n-th of the others is U+0100 + n."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte if byte in printable else next(others)) for byte in range(BYTES)]


class _Tensors:
    """Adds tensors to a file, the same ones for the same shape every time."""

    def __init__(self, writer: gguf.GGUFWriter, shape: Shape) -> None:
        self._writer = writer
        self._random = np.random.default_rng(0)
        self._type = gguf.GGMLQuantizationType[shape.quantization]
        self._quantized = {"Q8_0": random_q8_0, "Q4_0": random_q4_0}[shape.quantization]

    def matrix(self, name: str, rows: int, columns: int, gain: Array | float = 1.0) -> None:
        """Quantized, and keeping the variance of what it multiplies, times `gain`."""
        data = self._quantized(self._random, rows, columns, gain)
        self._writer.add_tensor(f"{name}.weight", data, raw_dtype=self._type)

    def table(self, name: str, rows: int, columns: int) -> None:
        """Not quantized, and small beside 1."""
        self._writer.add_tensor(f"{name}.weight", self._random.normal(0, 0.1, (rows, columns)).astype(np.float32))

    def norm(self, name: str, size: int, *, has_bias: bool = False) -> None:
        """One that scales by 1, and shifts by 0."""
        self._writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))
        if has_bias:
            self._writer.add_tensor(f"{name}.bias", np.zeros(size, np.float32))

    def bias(self, name: str, size: int) -> None:
        """A small one."""
        self._writer.add_tensor(f"{name}.bias", self._random.normal(0, 0.1, size).astype(np.float32))


def _add_decoder_tensors(tensors: _Tensors, shape: Shape) -> None:
    gain = np.ones((shape.num_vocab, 1), np.float32)
    gain[:BYTES] = gain[-len(CONTROL) :] = FAINT
    tensors.matrix("token_embd", shape.num_vocab, shape.num_embd, gain)  # there is no output.weight, so the output too
    tensors.norm("output_norm", shape.num_embd)
    num_kv = shape.head_dim * shape.num_kv_heads
    for layer in (f"blk.{index}." for index in range(shape.num_layers)):
        tensors.norm(f"{layer}attn_norm", shape.num_embd)
        for name, rows in (("q", shape.num_embd), ("k", num_kv), ("v", num_kv)):
            tensors.matrix(f"{layer}attn_{name}", rows, shape.num_embd)
            tensors.bias(f"{layer}attn_{name}", rows)
        tensors.matrix(f"{layer}attn_output", shape.num_embd, shape.num_embd)
        tensors.norm(f"{layer}ffn_norm", shape.num_embd)
        tensors.matrix(f"{layer}ffn_gate", shape.num_ff, shape.num_embd)
        tensors.matrix(f"{layer}ffn_up", shape.num_ff, shape.num_embd)
        tensors.matrix(f"{layer}ffn_down", shape.num_embd, shape.num_ff)


def _add_bert_tensors(tensors: _Tensors, shape: Shape) -> None:
    tensors.matrix("token_embd", shape.num_vocab, shape.num_embd)
    tensors.table("token_types", 2, shape.num_embd)
    tensors.norm("token_embd_norm", shape.num_embd, has_bias=True)
    for layer in (f"blk.{index}." for index in range(shape.num_layers)):
        tensors.matrix(f"{layer}attn_qkv", 3 * shape.num_embd, shape.num_embd)
        tensors.matrix(f"{layer}attn_output", shape.num_embd, shape.num_embd)
        tensors.norm(f"{layer}attn_output_norm", shape.num_embd, has_bias=True)
        tensors.matrix(f"{layer}ffn_up", shape.num_ff, shape.num_embd)
        tensors.matrix(f"{layer}ffn_gate", shape.num_ff, shape.num_embd)
        tensors.matrix(f"{layer}ffn_down", shape.num_embd, shape.num_ff)
        tensors.norm(f"{layer}layer_output_norm", shape.num_embd, has_bias=True)


def random_q8_0(random: np.random.Generator, rows: int, columns: int, gain: Array | float) -> npt.NDArray[np.uint8]:
    """A matrix that keeps the variance of what it multiplies, times `gain`, as Q8_0 bytes: 34 for 32 weights."""
    blocks = np.empty((rows, columns // _BLOCK, 2 + _BLOCK), np.uint8)
    blocks[..., :2] = _random_scales(random, rows, columns, gain, _Q8_0_STD)
    blocks[..., 2:] = random.integers(-127, 128, (*blocks.shape[:2], _BLOCK), np.int8).view(np.uint8)
    return blocks.reshape(rows, -1)


def random_q4_0(random: np.random.Generator, rows: int, columns: int, gain: Array | float) -> npt.NDArray[np.uint8]:
    """As `random_q8_0`, as Q4_0 bytes: 18 for 32 weights, two of them in each byte, 8 meaning 0."""
    blocks = np.empty((rows, columns // _BLOCK, 2 + _BLOCK // 2), np.uint8)
    blocks[..., :2] = _random_scales(random, rows, columns, gain, _Q4_0_STD)
    blocks[..., 2:] = random.integers(0, 256, (*blocks.shape[:2], _BLOCK // 2), np.uint8)
    return blocks.reshape(rows, -1)


def _random_scales(
    random: np.random.Generator, rows: int, columns: int, gain: Array | float, std: float
) -> npt.NDArray[np.uint8]:
    scales = random.uniform(0.5, 1.5, (rows, columns // _BLOCK)) * gain / (std * columns**0.5)
    halves: npt.NDArray[np.float16] = scales.astype(np.float16)[..., np.newaxis]
    return halves.view(np.uint8)
