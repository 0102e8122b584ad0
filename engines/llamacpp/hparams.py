"""The shape of a model as its GGUF header tells it: what its layers keep of what they read, and how wide they are.

The keys, their defaults and which layers are which follow llama.cpp (llama-hparams.cpp, llama-model.cpp, models/*.cpp
of the version that llama-cpp-python 0.3.36 carries). Headers come from strangers: a number that no model can have is a
GGUFParseError here, before llama.cpp, which asserts such things, can end the process over it. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from engines.errors import GGUFParseError
from engines.store.gguf import GGUFHeader

MAX_LAYERS = 512  # llama-hparams.h LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # llama-hparams.h LLAMA_MAX_EXPERTS
_MAX_WIDTH = 1 << 22
_MAX_CONTEXT = 1 << 28

_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
_HYBRID = frozenset(
    {
        "jamba", "falcon-h1", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe", "qwen3next",
        "kimi-linear", "bailingmoe3", "kimi-k3", "glm5-next", "qwen35", "qwen35moe", "qwen4exp", "deepseek4",
        "minimax-01",
    }
)  # fmt: skip
_INTERVAL = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4, "minimax-01": 8}
"""Hybrids of which every n-th layer attends, where the header does not say otherwise."""

_WITHOUT_CACHE = frozenset(
    {
        "bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert",
        "wavtokenizer-dec", "modern-bert", "gemma-embedding", "dream", "llada", "llada-moe", "rnd1",
    }
)  # fmt: skip
_SLIDING = {
    "gemma2": 4096, "gemma3": 0, "gemma3n": 0, "gemma4": 0, "gpt-oss": 0, "cohere2": 0, "cohere2moe": 0, "olmo2": 0,
    "exaone4": 4096, "exaone-moe": 128, "afmoe": 0, "plamo3": 0, "smallthinker": 0, "llama4": 8192, "lfm2": 0,
    "mellum": 0, "mimo2": 0, "step35": 0, "granite_swa": 0, "laguna": 0, "maple": 0, "muse-glimmer": 0, "spark2_5": 0,
}  # fmt: skip
"""Architectures whose sliding window llama.cpp honours, and the window of those that need not say it."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer keeps: so many elements of K and of V in every cell, so many floats for every sequence."""

    key_width: int = 0
    value_width: int = 0
    state_width: int = 0


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """The numbers that memory depends on.

    Attributes:
        num_ctx: the window it was trained with; 0 when unknown.
        num_heads, query_width, ff_width: the largest of any layer; `ff_width` is what one token passes through, all
            its experts together.
        inner_width, scan_width: of recurrent layers: a token's row, and a sequence's state as the graph copies it.
    """

    architecture: str
    num_ctx: int
    num_embd: int
    num_vocab: int
    num_heads: int
    query_width: int
    ff_width: int
    inner_width: int
    scan_width: int
    layers: tuple[Layer, ...]
    has_window: bool
    has_experts: bool

    @property
    def is_recurrent(self) -> bool:
        """Whether its memory is, in part at least, one state a sequence, of which no prefix can be copied."""
        return self.architecture in _RECURRENT or self.architecture in _HYBRID


def read_hyperparameters(header: GGUFHeader) -> Hyperparameters:
    """The shape that a header describes. Raises GGUFParseError for numbers that no model can have."""
    return _Reader(header).read()


class _Reader:
    def __init__(self, header: GGUFHeader) -> None:
        self._header = header
        self._architecture = header.architecture
        self._num_layers = self.number("block_count", MAX_LAYERS, at_least=1)

    def number(self, name: str, limit: int, default: int = 0, *, at_least: int = 0) -> int:
        """The architecture's own number of that name."""
        return self._checked(name, self._value(name, default), limit, at_least)

    def each(self, name: str, limit: int, default: list[int]) -> list[int]:
        """A number for every layer, where one may stand for all."""
        value = self._value(name, None)
        if value is None:
            return default
        if not isinstance(value, list):
            return [self._checked(name, value, limit)] * self._num_layers
        if len(value) < self._num_layers:
            raise GGUFParseError(f"{self._architecture}.{name} has {len(value)} values for {self._num_layers} layers")
        return [self._checked(name, item, limit) for item in value[: self._num_layers]]

    def _value(self, name: str, default: int | None) -> object:
        value = self._header.metadata.get(f"{self._architecture}.{name}", default)
        return default if value is None else value

    def _checked(self, name: str, value: object, limit: int, at_least: int = 0) -> int:
        if not isinstance(value, int) or not at_least <= value <= limit:
            said = repr(value)[:80]
            raise GGUFParseError(f"{self._architecture}.{name} is {said}, but must be from {at_least} to {limit}")
        return int(value)

    def read(self) -> Hyperparameters:
        num_embd = self.number("embedding_length", _MAX_WIDTH, at_least=1)
        heads = self.each("attention.head_count", _MAX_WIDTH, [0] * self._num_layers)
        if not any(heads) and self._architecture not in _RECURRENT | _HYBRID:
            raise GGUFParseError(f"{self._architecture}.attention.head_count is 0")
        key = self._head_width("key_length", num_embd, heads)
        value = self._head_width("value_length", num_embd, heads)
        conv_width, state_width, inner_width = self._state(num_embd, max(heads))
        return Hyperparameters(
            architecture=self._architecture,
            num_ctx=self.number("context_length", _MAX_CONTEXT),
            num_embd=num_embd,
            num_vocab=self._num_vocab(),
            num_heads=max(heads),
            query_width=max(heads) * max(key, value),
            ff_width=self._ff_width(),
            inner_width=inner_width,
            scan_width=conv_width + state_width,
            layers=self._layers(heads, key, value, conv_width + state_width),
            has_window=self._window > 0,
            has_experts=self.number("expert_count", MAX_EXPERTS) > 0,
        )

    def _head_width(self, name: str, num_embd: int, heads: list[int]) -> int:
        first = next((count for count in heads if count), 0)
        return self.number(f"attention.{name}", _MAX_WIDTH, num_embd // first) if first else 0

    @property
    def _window(self) -> int:
        default = _SLIDING.get(self._architecture)
        return 0 if default is None else self.number("attention.sliding_window", _MAX_CONTEXT, default)

    def _layers(self, heads: list[int], key: int, value: int, state: int) -> tuple[Layer, ...]:
        """What every layer keeps; layers of the draft head keep nothing (llama_model::create_memory)."""
        kv_heads = self.each("attention.head_count_kv", _MAX_WIDTH, heads)
        if self._architecture in _WITHOUT_CACHE:
            return (Layer(),) * self._num_layers
        if self._architecture in _RECURRENT:
            return (Layer(state_width=state),) * self._num_layers
        attends, recurs = self._attends(kv_heads), self._recurs(kv_heads)
        num_cached = self._num_cached_layers()
        layers = []
        for index, count in enumerate(kv_heads):
            key_width, value_width = self._cell_widths(index, key, value)
            keeps = index < num_cached
            layers.append(
                Layer(
                    key_width=count * key_width if keeps and attends[index] else 0,
                    value_width=count * value_width if keeps and attends[index] else 0,
                    state_width=state if keeps and recurs[index] else 0,
                )
            )
        return tuple(layers)

    def _cell_widths(self, index: int, key: int, value: int) -> tuple[int, int]:
        """Elements of K and V of one head in one cell of a layer."""
        if self.number("attention.key_length_mla", _MAX_WIDTH) and self.number(
            "attention.value_length_mla", _MAX_WIDTH
        ):
            return key, 0  # compressed: V is a view into K
        if self._is_windowed(index):
            key = self.number("attention.key_length_swa", _MAX_WIDTH, key)
            value = self.number("attention.value_length_swa", _MAX_WIDTH, value)
        return key, value

    def _is_windowed(self, index: int) -> bool:
        pattern = self._header.metadata.get(f"{self._architecture}.attention.sliding_window_pattern")
        return isinstance(pattern, list) and index < len(pattern) and bool(pattern[index])

    def _num_cached_layers(self) -> int:
        """The rest reuses the cells of earlier layers, or belongs to the draft head."""
        if self._architecture == "gemma3n":
            return min(20, self._num_layers)
        shared = self.number("attention.shared_kv_layers", MAX_LAYERS) if self._architecture == "gemma4" else 0
        draft = self.number("nextn_predict_layers", MAX_LAYERS)
        return max(self._num_layers - shared - draft, 0)

    def _recurs(self, kv_heads: list[int]) -> list[bool]:
        """Which layers keep a state."""
        if self._architecture not in _HYBRID:
            return [False] * self._num_layers
        if self._architecture == "falcon-h1":
            return [True] * self._num_layers
        if self._architecture in _INTERVAL:
            said = self._header.metadata.get(f"{self._architecture}.attention.recurrent_layers")
            if isinstance(said, list) and len(said) >= self._num_layers:
                return [bool(item) for item in said[: self._num_layers]]
            interval = self.number("full_attention_interval", MAX_LAYERS, _INTERVAL[self._architecture], at_least=1)
            return [(index + 1) % interval != 0 for index in range(self._num_layers)]
        ff_widths = self.each("feed_forward_length", _MAX_WIDTH, [0] * self._num_layers)
        is_nemotron = self._architecture.startswith("nemotron_h")  # whose layers do one thing each
        return [count == 0 and not (is_nemotron and ff) for count, ff in zip(kv_heads, ff_widths, strict=True)]

    def _attends(self, kv_heads: list[int]) -> list[bool]:
        """Which layers keep K and V."""
        if self._architecture in _INTERVAL:
            return [not recurs for recurs in self._recurs(kv_heads)]
        return [count > 0 for count in kv_heads]

    def _state(self, num_embd: int, num_heads: int) -> tuple[int, int, int]:
        """Floats that one recurrent layer keeps for a sequence: of its convolution, and of the rest; a token's width.

        llama_hparams::n_embd_r and n_embd_s.
        """
        if self._architecture not in _RECURRENT and self._architecture not in _HYBRID:
            return 0, 0, 0
        if head_size := self.number("wkv.head_size", _MAX_WIDTH):
            return self.number("token_shift_count", 16, 2) * num_embd, num_embd * head_size, num_embd
        if cache := self.number("shortconv.l_cache", 4096):
            return num_embd * (cache - 1), 0, num_embd
        kernel = self.number("ssm.conv_kernel", 4096)
        if head_size := self.number("kda.head_dim", 65536):
            width = num_heads * head_size
            return 3 * (kernel - 1 if kernel else 3) * width, head_size * width, width
        inner, state = self.number("ssm.inner_size", _MAX_WIDTH), self.number("ssm.state_size", 65536)
        groups = self.number("ssm.group_count", 65536)
        return max(kernel - 1, 0) * (inner + 2 * groups * state), state * inner, inner + groups * state

    def _ff_width(self) -> int:
        dense = max(self.each("feed_forward_length", _MAX_WIDTH, [0]))
        used = max(self.each("expert_used_count", MAX_EXPERTS, [0]))
        experts = self.number("expert_count", MAX_EXPERTS)
        if not experts or not used:
            return dense
        width = max(self.each("expert_feed_forward_length", _MAX_WIDTH, [dense]))
        return used * width + self.number("expert_shared_feed_forward_length", _MAX_WIDTH)

    def _num_vocab(self) -> int:
        shapes = [tensor.shape for tensor in self._header.tensors if tensor.name == "token_embd.weight"]
        if shapes and len(shapes[0]) == 2:
            return min(shapes[0][1], 1 << 24)
        return self.number("vocab_size", 1 << 24)
