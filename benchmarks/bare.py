"""The limit: llama.cpp alone, greedy, in a process of its own, with nothing of ours between two decodes.

`python -m benchmarks.bare` prints one JSON object. The only benchmark file that imports llama_cpp, and nothing here
imports the engine: parameters are written out once more on purpose, so that a wrong one there shows as a difference.
The kernels are loaded as the engine loads them, or left out.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.llamacpp.kernels import library


@dataclass(frozen=True, slots=True)
class BareOptions:
    """What to run: `sequences` prompts of `prompt` tokens at once, `tokens` generated for each.

    `num_*` are the context's: cells in all, the most sequences it allows, tokens of a batch, threads (0: each core).
    """

    model: str
    sequences: int
    prompt: int
    tokens: int
    num_cells: int
    num_sequences: int
    num_batch: int = 512
    num_threads: int = 0


@dataclass(frozen=True, slots=True)
class BareRates:
    """Tokens per second of all sequences together. Decode excludes prefill and the first token, which prefill gives."""

    prefill_tps: float
    decode_tps: float


def run_bare(options: BareOptions, *, kernels: bool = True) -> BareRates:
    """Measure in a new process. Raises CalledProcessError; what was wrong is on stderr.

    Args:
        options: what to run.
        kernels: with ours, where they can be used, or llama.cpp as it ships.
    """
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(options).items()]
    command = [sys.executable, "-m", "benchmarks.bare", *arguments]
    environment = os.environ if kernels else os.environ | {"HEADWATER_KERNELS": "0"}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=root, env=environment)
    return BareRates(**json.loads(done.stdout))


def measure(options: BareOptions) -> BareRates:
    """Measure in this process."""
    kernels = library.load()
    import llama_cpp as lib  # noqa: PLC0415  # whoever imports this module must not load llama.cpp
    import numpy as np  # noqa: PLC0415  # as above, to keep the two together

    silent = lib.llama_log_callback(lambda *_: None)  # kept: C holds the pointer
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    has_kernels = kernels is not None and library.bind(kernels, Path(lib.__file__).parent / "lib")
    model, context = _load(lib, options, has_kernels=has_kernels)
    num_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(options.num_batch, 0, 1)

    def decode(entries: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Compute (sequence, token, position, wants_logits) entries; the best next token of each that wants logits."""
        batch.n_tokens = len(entries)
        for i, (sequence, token, position, wants_logits) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wants_logits
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if status := lib.llama_decode(context, batch):
            raise SystemExit(f"llama_decode returned {status}")
        rows = {entry[0]: lib.llama_get_logits_ith(context, i) for i, entry in enumerate(entries) if entry[3]}
        return {sequence: int(np.ctypeslib.as_array(row, (num_vocab,)).argmax()) for sequence, row in rows.items()}

    decode([(0, 0, 0, True)])  # the first decode allocates and reads the weights from the disk
    lib.llama_memory_clear(lib.llama_get_memory(context), True)

    random = np.random.default_rng(0)
    prompts = random.integers(0, 256, (options.sequences, options.prompt)).tolist()
    last = options.prompt - 1
    entries = [(s, token, i, i == last) for s, prompt in enumerate(prompts) for i, token in enumerate(prompt)]
    best: dict[int, int] = {}
    started = time.perf_counter()
    for start in range(0, len(entries), options.num_batch):
        best |= decode(entries[start : start + options.num_batch])
    prefilled = time.perf_counter()
    for position in range(options.prompt, options.prompt + options.tokens - 1):
        best = decode([(sequence, token, position, True) for sequence, token in best.items()])
    ended = time.perf_counter()
    return BareRates(
        prefill_tps=len(entries) / (prefilled - started),
        decode_tps=options.sequences * (options.tokens - 1) / (ended - prefilled),
    )


def _load(lib: Any, options: BareOptions, *, has_kernels: bool) -> tuple[Any, Any]:
    """A model and a context; weights are repacked, and wide batches tiled, where the kernels do not compute."""
    lib.llama_backend_init()
    if has_kernels:
        os.environ["GGML_CPU_TILED_MM"] = "0"
    how = lib.llama_model_default_params()
    how.use_extra_bufts = not has_kernels
    model = lib.llama_model_load_from_file(os.fsencode(options.model), how)
    params = lib.llama_context_default_params()
    params.n_ctx = options.num_cells
    params.n_batch = options.num_batch
    params.n_ubatch = min(options.num_batch, 128)
    params.flash_attn_type = 0  # as fast as llama.cpp can on a processor: see engines.llamacpp.backend
    params.n_seq_max = params.n_outputs_max = options.num_sequences
    params.n_threads = params.n_threads_batch = options.num_threads or len(os.sched_getaffinity(0))
    params.kv_unified = False
    params.no_perf = True
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("llama.cpp could not create a context")
    return model, context


def main() -> None:
    """Entry point of `python -m benchmarks.bare`."""
    parser = argparse.ArgumentParser(prog="benchmarks.bare", description="measure llama.cpp alone")
    parser.add_argument("--model", required=True, help="the GGUF file")
    for name in ("sequences", "prompt", "tokens", "num-cells", "num-sequences", "num-batch", "num-threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    print(json.dumps(asdict(measure(BareOptions(**vars(parser.parse_args()))))))


if __name__ == "__main__":
    main()
