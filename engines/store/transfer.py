"""Pull and push: whole models between the store and registries, step by step in Ollama's words.

A pulled manifest is kept to the byte and written last, after all of its blobs, so that a model is at any moment what it
was before or what it is afterwards. Its surprise: models that Docker Model Runner published are kept in its words too,
under the digest that they have in their registry.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec

from engines.errors import HeadwaterError, ModelNotFound, RegistryError
from engines.library import Progress
from engines.store.blobs import StoreNotWritable, keep_blob, make_directories, read_bounded
from engines.store.disk import Disk
from engines.store.download import Downloads, Pace, pulling
from engines.store.manifests import (
    MAX_JSON_BYTES,
    OCI_MANIFEST_TYPE,
    Layer,
    Manifest,
    adopt_spelling,
    decode_json,
    manifest_path,
)
from engines.store.names import ModelName
from engines.store.registry import Repository, make_client
from engines.store.registry_auth import Authorizer
from engines.store.upload import Upload
from engines.store.writer import StoreWriter

log = logging.getLogger(__name__)

SUCCESS = Progress("success")

_IMAGE_LAYERS = (
    "application/vnd.docker.image.rootfs",
    "application/vnd.oci.image.layer",
)


@dataclass(frozen=True, slots=True)
class Access:
    """How registries are reached.

    Attributes:
        user_agent: who we say we are; registries look for Ollama's name in it.
        docker_config: where `docker login` keeps passwords. key_file: Ollama's private key.
        mirrors: addresses of registries that are asked first, by the host that they stand in for.
    """

    user_agent: str
    docker_config: Path
    key_file: Path
    mirrors: Mapping[str, str]


class Transfers:
    """Pulls and pushes of one store, which `writer` changes."""

    def __init__(self, writer: StoreWriter, access: Access, disk: Disk, *, pace: Pace | None = None) -> None:
        self._writer = writer
        self._models = writer.models
        self._access = access
        self._pace = pace or Pace()
        self._disk = disk
        self._downloads = Downloads(writer.models, self._disk, self._pace)
        self._authorizer = Authorizer(access.docker_config, access.key_file)
        self._clients: dict[bool, httpx.AsyncClient] = {}

    async def close(self) -> None:
        """End what still runs."""
        await self._downloads.close()
        for client in self._clients.values():
            await client.aclose()

    async def pull(self, name: ModelName, *, insecure: bool = False, token: str = "") -> AsyncGenerator[Progress, None]:
        """Fetch a model, or what is new in it. Whoever stops iterating leaves; what has arrived is kept for next time.

        With `insecure`, plain http is spoken where the registry does not speak https; `token` is a bearer token for it.

        Raises:
            RegistryError: the registry has no such model, or cannot be talked to.
            StoreNotWritable: the directory or the disk refuses, or has too little room.
            BlobMissing: another program deletes what is pulled here.
        """
        yield Progress("pulling manifest")
        name = await self._disk.run(adopt_spelling, self._models, name)
        repository, data, manifest = await self._find(name, insecure=insecure, token=token)
        layers = _blobs(manifest)
        async with AsyncExitStack() as stack:
            hold = stack.enter_context(self._writer.holds.holding())
            for layer in layers:
                hold.add(layer.digest)
            missing = {each for each in layers if not await self._disk.run(self._keep, each)}
            await self._disk.run(_check_room, self._models, sum(layer.size for layer in missing))
            downloads = []
            for layer in layers:
                if layer not in missing:
                    yield pulling(layer, layer.size)
                    continue
                download = await stack.enter_async_context(self._downloads.join(repository, layer))
                downloads.append(download)
                async with aclosing(download.progress()) as progress:
                    async for each in progress:
                        yield each
            yield Progress("verifying sha256 digest")
            for download in downloads:
                await download.verified()
            yield Progress("writing manifest")
            removed = await self._disk.run(self._writer.commit, name, data)
        if removed:
            yield Progress("removing unused layers")
        yield SUCCESS

    async def push(self, name: ModelName, *, insecure: bool = False, token: str = "") -> AsyncGenerator[Progress, None]:
        """Send a model to the registry that its name says. Arguments and iterating are as in `pull`.

        Raises:
            ModelNotFound: there is none of that name.
            RegistryError: the registry refuses, or cannot be talked to.
            ManifestDamaged, StoreUnreadable: a file of the model cannot be read.
        """
        yield Progress("retrieving manifest")
        name = await self._disk.run(adopt_spelling, self._models, name)
        try:
            data = await self._disk.run(read_bounded, manifest_path(self._models, name), MAX_JSON_BYTES)
            manifest = decode_json(data, Manifest, f"the manifest of {name.display}")
        except FileNotFoundError:
            yield Progress("couldn't retrieve manifest")
            raise ModelNotFound(name.display) from None
        repository = Repository(await self._client(insecure), self._authorizer, name, insecure=insecure, token=token)
        for layer in _blobs(manifest):
            upload = Upload(self._models, name, layer, repository, self._disk, self._pace)
            async with aclosing(upload.progress()) as progress:
                async for each in progress:
                    yield each
        yield Progress("pushing manifest")
        await repository.write_manifest(name.tag, data, _media_type(data))
        yield SUCCESS

    async def _find(self, name: ModelName, *, insecure: bool, token: str) -> tuple[Repository, bytes, Manifest]:
        """The manifest, and who had it: the mirror if it can."""
        client = await self._client(insecure)
        try:
            if mirror := self._access.mirrors.get(name.host.lower()):
                try:
                    repository = Repository(client, self._authorizer, name, mirror=mirror, insecure=insecure)
                    data = await repository.read_manifest(name.tag)
                    return repository, data, await self._disk.run(_decode, data, name)
                except HeadwaterError as error:
                    log.warning("the mirror %s cannot give %s: %s", mirror, name.display, error)
            repository = Repository(client, self._authorizer, name, insecure=insecure, token=token)
            data = await repository.read_manifest(name.tag)
            return repository, data, await self._disk.run(_decode, data, name)
        except RegistryError as error:
            raise type(error)(f"pull model manifest: {error.message}") from error

    async def _client(self, insecure: bool) -> httpx.AsyncClient:
        if insecure not in self._clients:
            # In a thread, because reading the certificates of all authorities takes tens of milliseconds.
            made = await self._disk.run(make_client, self._access.user_agent, verify=not insecure)
            self._clients.setdefault(insecure, made)
        return self._clients[insecure]

    def _keep(self, layer: Layer) -> bool:
        return keep_blob(self._models, layer.digest, layer.size)


def _blobs(manifest: Manifest) -> list[Layer]:
    """Every blob once: layers in order, the config last."""
    return list({layer.digest: layer for layer in (*manifest.layers, manifest.config)}.values())


def _decode(data: bytes, name: ModelName) -> Manifest:
    """A registry's manifest. Raises RegistryError for what is none, and for what is no model that could run here."""
    try:
        manifest = decode_json(data, Manifest, f"the manifest of {name.display}")
    except HeadwaterError as error:
        raise RegistryError(error.message) from None
    if any(layer.media_type.startswith(_IMAGE_LAYERS) for layer in manifest.layers):
        raise RegistryError(f"{name.display} is a container image and not a model")
    if any(layer.kind == "tensor" for layer in manifest.layers):
        raise RegistryError("this model requires MLX support, but the MLX runtime is not available")  # Ollama's words
    return manifest


def _media_type(data: bytes) -> str:
    """What a manifest says it is; only OCI's need not say it."""
    said = msgspec.json.decode(data).get("mediaType")
    return said if isinstance(said, str) and said.isascii() and said.isprintable() else OCI_MANIFEST_TYPE


def _check_room(models: Path, needed_bytes: int) -> None:
    """Raises StoreNotWritable when the disk cannot take what is to come."""
    try:
        make_directories(models / "blobs")
        free_bytes = shutil.disk_usage(models / "blobs").free
    except OSError as error:
        raise StoreNotWritable(f"cannot write {models}: {error.strerror}") from error
    if needed_bytes > free_bytes:
        raise StoreNotWritable(
            f"{needed_bytes / 1e9:.1f} GB are to be stored in {models}, where {free_bytes / 1e9:.1f} GB are free"
        )
