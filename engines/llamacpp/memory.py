"""How much memory a worker will take, told from a GGUF's header alone.

Four parts: the weights, the cache (cells of K and V, and recurrent states), the buffers of the graph, and the process
itself. Formulas follow llama.cpp's allocations (llama-kv-cache.cpp, llama-memory-recurrent.cpp, graph_reserve in
llama-context.cpp); those for the graph are what its allocator was seen to come to for llama, qwen2, gemma3, mamba and
mixtures of experts. Mapped weights count: the pages can be dropped, but a model that must read them anew for each token
is of no use, so what is asked is whether they fit. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from engines.inference import LoadConfig
from engines.llamacpp.hparams import Hyperparameters, read_hyperparameters
from engines.llamacpp.layout import Layout, lay_out, padded
from engines.store.gguf import GGUFHeader
from engines.store.gguf_types import TENSOR_TYPES

_F32, _F16 = 4, 2
_PROCESS_BYTES = 62 << 20  # Python, the worker's modules, llama.cpp's code, arenas of its threads
_VOCABULARY_FACTOR = 9  # a token's text, its pieces and maps over what its header takes
_TYPES = {kind.name.lower(): kind for kind in TENSOR_TYPES.values()}


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes by what they are for."""

    weights_bytes: int
    cache_bytes: int
    compute_bytes: int
    process_bytes: int

    @property
    def model_bytes(self) -> int:
        """All but the process, which is what can be on an accelerator."""
        return self.weights_bytes + self.cache_bytes + self.compute_bytes

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.model_bytes + self.process_bytes

    def offloaded_bytes(self, num_layers: int, gpu_layers: int) -> int:
        """What goes to accelerators that take so many layers, a negative number being all; each layer counts alike."""
        share = 1.0 if gpu_layers < 0 else min(gpu_layers / (num_layers + 1), 1.0)  # the output is one more
        return int(self.model_bytes * share)


def estimate(header: GGUFHeader, config: LoadConfig) -> MemoryNeed:
    """What loading a model takes.

    Raises:
        GGUFParseError: the header says what no model can mean.
    """
    shape = read_hyperparameters(header)
    layout = lay_out(config, shape.num_ctx, is_recurrent=shape.is_recurrent)
    uses_flash_attention = config.flash_attention is not False and shape.architecture != "grok"
    return MemoryNeed(
        weights_bytes=header.data_bytes,
        cache_bytes=_cache(shape, layout, config.cache_type),
        compute_bytes=_compute(shape, layout, uses_flash_attention=uses_flash_attention),
        process_bytes=_PROCESS_BYTES + _VOCABULARY_FACTOR * header.header_bytes,
    )


def _cache(shape: Hyperparameters, layout: Layout, cache_type: str) -> int:
    """Cells count all together; states are each slot's own, in 32-bit floats."""
    a_cell = sum(_row(layer.key_width, cache_type) + _row(layer.value_width, cache_type) for layer in shape.layers)
    a_slot = sum(layer.state_width for layer in shape.layers) * _F32
    return padded(layout.num_cells) * a_cell + layout.num_slots * a_slot


def _row(num_elements: int, kind: str) -> int:
    _, block_elements, block_bytes = _TYPES[kind]
    return -(-num_elements // block_elements) * block_bytes


def _compute(shape: Hyperparameters, layout: Layout, *, uses_flash_attention: bool) -> int:
    """The graph's buffer, the rows of logits, and the CPU's scratch space.

    The buffer is used again and again, so the largest moment counts: within a layer, or at the output, when the masks
    are no longer needed.
    """
    cells = padded(layout.seen_cells)
    num_tokens = min(layout.num_ubatch, cells)
    row = shape.num_vocab * _F32
    attention, feed_forward, recurrence = (
        num_tokens * _F32 * width
        for width in (
            2 * shape.num_embd + 4 * shape.query_width,
            4 * shape.num_embd + 3 * shape.ff_width,
            2 * shape.num_embd + 6 * shape.inner_width,
        )
    )
    attends = any(layer.key_width for layer in shape.layers)
    masks = (1 + shape.has_window) * cells * num_tokens * attends
    scores = 0 if uses_flash_attention else cells * num_tokens * shape.num_heads * _F32 * attends
    if not uses_flash_attention:  # where V is a view into K, it is copied to be transposed
        scores += cells * max((each.key_width for each in shape.layers if not each.value_width), default=0) * _F16
    masks *= _F16 if uses_flash_attention else _F32
    recurrence += layout.num_slots * shape.scan_width * _F32 if shape.inner_width else 0
    layer = masks + max(scores + attention, feed_forward, recurrence)
    at_output = min(num_tokens, layout.num_outputs) * row + num_tokens * _F32 * 2 * shape.num_embd
    scratch = num_tokens * max(shape.num_embd, shape.ff_width, shape.query_width, shape.inner_width)
    return max(layer, at_output) + layout.num_slots * row + scratch
