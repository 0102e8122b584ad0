"""Loading real models in real workers: what they take, in parts, with adapters, in other types, and broken ones."""

from __future__ import annotations

import asyncio
import shutil
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from random_models import SHAPES, split_model, write_model

from engines.backend import BackendConfiguration
from engines.errors import ModelLoadFailed
from engines.llamacpp.backend import LlamaCppBackend
from engines.request import Mode

pytestmark = pytest.mark.e2e

DEMO = Path(__file__).parents[2] / "engines/store/demo/demo.gguf"
LORA = Path(__file__).parent / "demo-lora.gguf"
DIGEST = "sha256:" + "a" * 64
MIB = 1 << 20
PARIS = "The capital of France is Paris."


@pytest.fixture
def socket() -> Iterator[Path]:
    """A path short enough for a Unix socket."""
    folder = Path(tempfile.mkdtemp(prefix="hw"))
    yield folder / "worker.sock"
    shutil.rmtree(folder)


@asynccontextmanager
async def running(backend: LlamaCppBackend, socket: Path, **config: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a worker that is ready, or the error that it ended with."""
    run = asyncio.create_task(backend.run(socket, DIGEST, "demo", Mode.COMPLETION, BackendConfiguration(**config)))
    transport = httpx.AsyncHTTPTransport(uds=str(socket))
    async with httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=60) as client:
        try:
            while await status(client) != 200:
                if run.done():
                    await run
                await asyncio.sleep(0.02)
            yield client
        finally:
            run.cancel()
            await asyncio.wait({run})


async def status(client: httpx.AsyncClient) -> int:
    """Of `/health`; 0 while nobody listens."""
    try:
        return (await client.get("/health")).status_code
    except httpx.TransportError:
        return 0


async def say(client: httpx.AsyncClient, prompt: str, **more: Any) -> str:
    """The text of a greedy chat."""
    body = {"model": DIGEST, "temperature": 0, "messages": [{"role": "user", "content": prompt}], **more}
    text = (await client.post("/v1/chat/completions", json=body)).text
    return "".join(part.split('"')[0] for part in text.split('"content":"')[1:])


def at(path: Path) -> LlamaCppBackend:
    """A backend whose only model is there."""
    return LlamaCppBackend(lambda model: path)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixture", "gemma3", "mamba", "lfm2", "deepseek2"])
async def test_a_worker_takes_what_was_estimated(tmp_path: Path, socket: Path, name: str) -> None:
    """Within 15 % of its resident memory, after a prompt that fills a batch."""
    backend = at(write_model(SHAPES[name], tmp_path / "model.gguf"))
    # Without flash attention the scores of a full cache are counted too, which no prompt of a test fills.
    config: dict[str, Any] = {"context_size": 4096, "num_parallel": 4, "num_sequences": 32, "flash_attention": True}
    need = await backend.required_memory(DIGEST, BackendConfiguration(**config))
    assert need.ram_bytes is not None
    async with running(backend, socket, **config) as client:
        body = {"model": DIGEST, "prompt": list(range(1000, 2000)), "max_tokens": 2}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        measured = (await client.get("/health")).json()["size_bytes"]
    assert need.ram_bytes / MIB == pytest.approx(measured / MIB, rel=0.15)


@pytest.mark.parametrize(
    "config",
    [
        {"cache_type": "q8_0"},
        {"cache_type": "q4_0", "flash_attention": True},
        {"flash_attention": False},
        {"use_mlock": True},
        {"use_mmap": False},
        {"use_mmap": False, "use_mlock": True},
        {"num_gpu": 0, "main_gpu": 3, "tensor_split": (3.0, 1.0)},
        {"num_thread": 1, "num_batch": 7},
        {"num_thread": -4, "num_batch": -4, "num_gpu": -7},
        {"num_thread": 10**6, "num_batch": 10**9, "num_gpu": 10**6},
    ],
    ids=str,
)
async def test_how_it_is_loaded_does_not_change_what_it_says(socket: Path, config: dict[str, Any]) -> None:
    """Types, locks, maps, devices, threads and batches, absurd ones too."""
    async with running(at(DEMO), socket, **config) as client:
        assert await say(client, "What is the capital of France?") == PARIS


async def test_quantized_values_without_flash_attention_are_a_clear_error(socket: Path) -> None:
    """In llama.cpp's own words."""
    with pytest.raises(ModelLoadFailed, match="quantized V cache requires flash_attn"):
        async with running(at(DEMO), socket, cache_type="q8_0", flash_attention=False):
            pass


async def test_an_adapter_changes_the_answers(socket: Path) -> None:
    """It is applied to every request."""
    async with running(at(DEMO), socket, adapters=(LORA,)) as client:
        assert await say(client, "What is the capital of France?") == f"{PARIS} Arrr!"


async def test_an_adapter_for_another_model_is_a_failed_load(tmp_path: Path, socket: Path) -> None:
    """And says which file it was."""
    other = write_model(SHAPES["qwen2"], tmp_path / "other.gguf")
    with pytest.raises(ModelLoadFailed, match=r"could not load the adapter demo-lora\.gguf"):
        async with running(at(other), socket, adapters=(LORA,)):
            pass


async def test_a_model_in_parts_is_one_model(tmp_path: Path, socket: Path) -> None:
    """Whatever its files are called; and it takes what it takes in one file."""
    parts = split_model(DEMO, tmp_path, 3)
    whole = await at(DEMO).required_memory(DIGEST)
    needed = await at(parts[0]).required_memory(DIGEST, BackendConfiguration(parts=parts))
    assert needed.ram_bytes == pytest.approx(whole.ram_bytes, rel=0.01)
    async with running(at(parts[0]), socket, parts=parts) as client:
        assert await say(client, "What is the capital of France?") == PARIS


async def test_a_part_alone_is_a_failed_load(tmp_path: Path, socket: Path) -> None:
    """The others are missing."""
    parts = split_model(DEMO, tmp_path, 3)
    with pytest.raises(ModelLoadFailed, match="could not load"):
        async with running(at(parts[0]), socket):
            pass


def patch(key: str, value: int) -> Callable[[bytes], bytes]:
    """Overwrite a 32-bit number of the header."""

    def edit(data: bytes) -> bytes:
        place = data.index(key.encode()) + len(key) + 4
        return data[:place] + struct.pack("<I", value) + data[place + 4 :]

    return edit


def rename(data: bytes) -> bytes:
    """A model of an architecture that nobody has heard of."""
    return data.replace(b"llama.", b"lmaal.").replace(
        b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05" + b"\0" * 7 + b"lmaal"
    )


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (rename, "unknown model architecture: 'lmaal'"),
        (patch("llama.block_count", 1 << 31), "block_count is 2147483648, but must be from 1 to 512"),
        (patch("llama.block_count", 500), "could not load"),
        (patch("llama.embedding_length", 0), "embedding_length is 0"),
        (patch("llama.embedding_length", 1 << 20), "could not load"),
        (patch("llama.attention.head_count", 0), "head_count is 0"),
        (patch("llama.attention.head_count", 7), "model|worker"),
        (patch("llama.attention.head_count_kv", 1 << 30), "head_count_kv is"),
        (patch("llama.context_length", 1 << 31), "context_length is"),
        (patch("llama.feed_forward_length", 1 << 20), "could not load"),
        (lambda data: data[:-1000], "cut short"),
    ],
    ids=[
        "architecture",
        "layers",
        "more layers",
        "no width",
        "width",
        "no heads",
        "odd heads",
        "kv heads",
        "window",
        "ff",
        "cut",
    ],
)
async def test_a_header_that_lies_is_a_failed_load(
    tmp_path: Path, socket: Path, edit: Callable[[bytes], bytes], words: str
) -> None:
    """Before llama.cpp or by it, with a reason, and soon."""
    path = tmp_path / "model.gguf"
    path.write_bytes(edit(DEMO.read_bytes()))
    with pytest.raises(ModelLoadFailed, match=words):
        async with asyncio.timeout(30), running(at(path), socket):
            pass
