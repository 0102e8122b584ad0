"""Pull and push against the reference registry."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from registries import (
    MB,
    PASSWORD,
    digest_of,
    docker_login,
    docker_registry,
    htpasswd,
    install,
    leftovers,
    needs_registry,
    pulled,
    pushed,
    scripted,
    steps,
    transfers,
    visible,
    wire,
)
from token_server import TokenServer

from engines.errors import ModelNotFound, NotInRegistry, RegistryDenied, RegistryError
from engines.library import Progress
from engines.store.blobs import blob_path
from engines.store.catalog import Catalog
from engines.store.manifests import (
    OCI_MANIFEST_TYPE,
    Layer,
    Manifest,
    manifest_path,
    read_manifest,
    write_manifest,
)
from engines.store.names import ModelName

pytestmark = needs_registry


def noise(num_bytes: int, seed: int = 0) -> bytes:
    """Bytes that no compression shortens."""
    return random.Random(seed).randbytes(num_bytes)


@pytest.fixture(name="registry", scope="module")
def registry_fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that asks nobody who they are."""
    with docker_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


def named(registry: str, model: str) -> ModelName:
    """A model of that registry."""
    return ModelName(registry, "library", model, "latest")


async def test_a_model_comes_back_as_it_was_pushed(registry: str, tmp_path: Path) -> None:
    """Manifest and blobs are the same to the byte, and both directions say what Ollama says."""
    name = named(registry, "round")
    here, there = tmp_path / "here", tmp_path / "there"
    big, small = noise(5 * MB), b"small"
    manifest = install(here / "models", name, big, small)
    async with transfers(here) as mine, transfers(there) as theirs:
        said = await pushed(mine, name)
        short = [layer.digest[7:19] for layer in (*manifest.layers, manifest.config)]
        assert steps(said) == [
            "retrieving manifest",
            *(f"pushing {each}" for each in short),
            "pushing manifest",
            "success",
        ]
        said = await pulled(theirs, name)
        assert steps(said) == [
            "pulling manifest",
            *(f"pulling {each}" for each in short),
            "verifying sha256 digest",
            "writing manifest",
            "success",
        ]
    of_big = [each for each in said if each.digest == digest_of(big)]
    assert all(each.total_bytes == 5 * MB for each in of_big)
    counts = [each.completed_bytes for each in of_big]
    assert counts == sorted(counts)
    assert counts[-1] == 5 * MB
    for models in (here / "models", there / "models"):
        assert blob_path(models, digest_of(big)).read_bytes() == big
    assert manifest_path(here / "models", name).read_bytes() == manifest_path(there / "models", name).read_bytes()
    assert leftovers(there / "models") == []
    assert (blob_path(there / "models", digest_of(big)).stat().st_mode & 0o777) == 0o644


async def test_what_is_there_is_not_fetched_again(registry: str, tmp_path: Path) -> None:
    """A blob on the disk is reported whole in one line; one of the wrong size is replaced."""
    name = named(registry, "present")
    install(tmp_path / "here" / "models", name, noise(2 * MB), b"text")
    models = tmp_path / "there" / "models"
    async with transfers(tmp_path / "here") as mine, transfers(tmp_path / "there") as theirs:
        await pushed(mine, name)
        await pulled(theirs, name)
        blob_path(models, digest_of(b"text")).write_bytes(b"torn to a wrong size")
        again = await pulled(theirs, name)
    assert [each.completed_bytes for each in again if each.digest == digest_of(noise(2 * MB))] == [2 * MB]
    assert blob_path(models, digest_of(b"text")).read_bytes() == b"text"


async def test_a_push_sends_only_what_is_missing(registry: str, tmp_path: Path) -> None:
    """The second push of a blob is told whole at once."""
    name = named(registry, "twice")
    install(tmp_path / "models", name, noise(3 * MB))
    async with transfers(tmp_path) as mine:
        await pushed(mine, name)
        again = await pushed(mine, name)
    assert [each.completed_bytes for each in again if each.digest == digest_of(noise(3 * MB))] == [3 * MB]


async def test_a_layer_is_mounted_from_the_model_it_came_from(registry: str, tmp_path: Path) -> None:
    """A blob that the registry has under another name is not sent again."""
    base, derived = named(registry, "base"), named(registry, "derived")
    async with transfers(tmp_path) as mine, wire(registry, upwards=True) as watched:
        install(tmp_path / "models", base, noise(4 * MB, 1))
        await pushed(mine, base)
        through = ModelName(watched.address, *derived.parts[1:])
        install(tmp_path / "models", through, noise(4 * MB, 1), source=f"{watched.address}/library/base:latest")
        watched.cuts = [MB]  # would break the connection that sends it
        await pushed(mine, through)
        assert watched.num_cut == 0


async def test_a_pull_goes_on_after_every_broken_connection(registry: str, tmp_path: Path) -> None:
    """Three cut connections cost what was on the wire, not the pull."""
    name = named(registry, "cut")
    data = noise(6 * MB, 2)
    install(tmp_path / "here" / "models", name, data)
    async with transfers(tmp_path / "here") as mine, transfers(tmp_path / "there") as theirs:
        await pushed(mine, name)
        async with wire(registry, 200_000, 500_000, 700_000) as broken:
            through = ModelName(broken.address, *name.parts[1:])
            said = await pulled(theirs, through)
            assert broken.num_cut == 3
    assert said[-1].status == "success"
    assert blob_path(tmp_path / "there" / "models", digest_of(data)).read_bytes() == data


async def test_a_push_goes_on_after_every_broken_connection(registry: str, tmp_path: Path) -> None:
    """Three chunks that arrive in part do not spoil the blob."""
    data = noise(6 * MB, 3)
    async with (
        transfers(tmp_path / "here") as mine,
        transfers(tmp_path / "there") as theirs,
        wire(registry, 300_000, 800_000, 400_000, upwards=True) as broken,
    ):
        name = named(broken.address, "cutpush")
        install(tmp_path / "here" / "models", name, data)
        said = await pushed(mine, name)
        assert broken.num_cut == 3
        await pulled(theirs, name)
    assert said[-1].status == "success"
    assert blob_path(tmp_path / "there" / "models", digest_of(data)).read_bytes() == data


async def test_a_dead_registry_ends_a_pull_after_six_tries(registry: str, tmp_path: Path) -> None:
    """Connections that never bring anything are given up, and nothing is visible."""
    name = named(registry, "dead")
    data = noise(MB, 4)
    install(tmp_path / "here" / "models", name, data)
    models = tmp_path / "there" / "models"
    async with transfers(tmp_path / "here") as mine, transfers(tmp_path / "there") as theirs:
        await pushed(mine, name)
        async with wire(registry) as broken:
            pull = theirs.pull(ModelName(broken.address, *name.parts[1:]), insecure=True)
            assert (await anext(pull)).status == "pulling manifest"
            broken.cuts = [1500] + [100] * 50  # the manifest is shorter, the blob is not
            with pytest.raises(RegistryError, match="max retries exceeded"):
                [progress async for progress in pull]
    assert visible(models) == set()
    assert not manifest_path(models, name).exists()


async def test_a_later_pull_goes_on_where_one_was_left(registry: str, tmp_path: Path) -> None:
    """What had arrived when the caller left is not fetched again."""
    data = noise(8 * MB, 5)
    install(tmp_path / "here" / "models", named(registry, "left"), data)
    models = tmp_path / "there" / "models"
    async with transfers(tmp_path / "here") as mine, transfers(tmp_path / "there") as theirs:
        await pushed(mine, named(registry, "left"))
        async with wire(registry, *[600_000] * 8) as broken:  # every part stops on its way, and waits
            theirs._pace = theirs._downloads._pace = type(theirs._pace)(MB, backoff_s=30)
            through = ModelName(broken.address, *named(registry, "left").parts[1:])
            async with aclosing(theirs.pull(through, insecure=True)) as pull:
                async for progress in pull:
                    if progress.completed_bytes > MB:
                        break
            assert visible(models) == set()
            notes = [json.loads(path.read_text()) for path in (models / "blobs").glob("*-partial-*")]
            assert [note["Size"] for note in notes] == [MB] * 8
            arrived = sum(note["Completed"] for note in notes)
            assert arrived > MB
            broken.cuts.clear()
            said = await pulled(theirs, through)
    first = next(each for each in said if each.completed_bytes)
    assert first.completed_bytes >= arrived
    assert blob_path(models, digest_of(data)).read_bytes() == data
    assert leftovers(models) == []


async def test_ollamas_unfinished_download_is_finished(registry: str, tmp_path: Path) -> None:
    """The files that Ollama leaves behind are gone on with; only what is missing crosses the wire."""
    data = noise(4 * MB, 6)
    name = named(registry, "ollamas")
    install(tmp_path / "here" / "models", name, data)
    models = tmp_path / "there" / "models"
    async with transfers(tmp_path / "here") as mine, transfers(tmp_path / "there") as theirs:
        await pushed(mine, name)
        blobs = models / "blobs"
        blobs.mkdir(parents=True)
        partial = blobs / f"{digest_of(data).replace(':', '-')}-partial"
        half = 2 * MB
        partial.write_bytes(data[: half - 1000] + bytes(1000) + data[half : half + 7] + bytes(half - 7))
        for n, completed in enumerate((half - 1000, 7)):  # as server/download.go writes them
            note = {"N": n, "Offset": n * half, "Size": half, "Completed": completed}
            partial.with_name(f"{partial.name}-{n}").write_text(json.dumps(note) + "\n")
        async with wire(registry) as watched:
            watched.cuts = [half + MB // 10]  # more than is missing of either part
            await pulled(theirs, ModelName(watched.address, *name.parts[1:]))
            assert watched.num_cut == 0
    assert blob_path(models, digest_of(data)).read_bytes() == data


async def test_two_callers_share_one_download(registry: str, tmp_path: Path) -> None:
    """The blob crosses the wire once, and the one who stays gets it although the one who began it left."""
    data = noise(5 * MB, 7)
    name = named(registry, "shared")
    install(tmp_path / "here" / "models", name, data)
    async with transfers(tmp_path / "here") as mine, transfers(tmp_path / "there") as theirs:
        await pushed(mine, name)
        first = theirs.pull(name, insecure=True)
        async for progress in first:
            if progress.digest:
                break
        staying = asyncio.create_task(pulled(theirs, name))
        while len(theirs._downloads._running) == 1 and not staying.done():
            await asyncio.sleep(0.001)
            if any(each.num_callers == 2 for each in theirs._downloads._running.values()):
                break
        await first.aclose()
        said = await staying
        assert theirs._downloads._running == {}
    assert said[-1].status == "success"
    assert visible(tmp_path / "there" / "models") >= {digest_of(data)}


async def test_two_stores_processes_fetch_the_same_blob_in_turn(registry: str, tmp_path: Path) -> None:
    """Who comes second waits for the first, as another process would, and finds the blob there."""
    data = noise(5 * MB, 8)
    name = named(registry, "turns")
    install(tmp_path / "here" / "models", name, data)
    async with (
        transfers(tmp_path / "here") as mine,
        transfers(tmp_path / "there") as one,
        transfers(tmp_path / "there") as other,
    ):
        await pushed(mine, name)
        ends = await asyncio.gather(pulled(one, name), pulled(other, name))
    assert [each[-1].status for each in ends] == ["success", "success"]
    assert blob_path(tmp_path / "there" / "models", digest_of(data)).read_bytes() == data
    assert leftovers(tmp_path / "there" / "models") == []


async def test_a_new_version_replaces_the_old_and_what_only_it_needed(registry: str, tmp_path: Path) -> None:
    """Shared blobs stay, orphans go, unless the store keeps what is unused."""
    name = named(registry, "versions")
    here, there, keeping = tmp_path / "here", tmp_path / "there", tmp_path / "keeping"
    async with (
        transfers(here) as mine,
        transfers(there) as theirs,
        transfers(keeping, keeps_unused=True) as keeper,
    ):
        install(here / "models", name, b"old weights", b"licence")
        await pushed(mine, name)
        await pulled(theirs, name)
        await pulled(keeper, name)
        install(here / "models", name, b"new weights", b"licence")
        await pushed(mine, name)
        assert "removing unused layers" in steps(await pulled(theirs, name))
        assert "removing unused layers" not in steps(await pulled(keeper, name))
    assert digest_of(b"old weights") not in visible(there / "models")
    assert {digest_of(b"new weights"), digest_of(b"licence")} <= visible(there / "models")
    assert digest_of(b"old weights") in visible(keeping / "models")


async def test_unknown_models_are_told_in_ollamas_words(registry: str, tmp_path: Path) -> None:
    """Clients match these texts."""
    async with transfers(tmp_path) as mine:
        with pytest.raises(NotInRegistry, match=r"^pull model manifest: file does not exist$"):
            await pulled(mine, named(registry, "nothing"))
        push = mine.push(named(registry, "nothing"), insecure=True)
        assert await anext(push) == Progress("retrieving manifest")
        assert await anext(push) == Progress("couldn't retrieve manifest")
        with pytest.raises(ModelNotFound):
            await anext(push)


async def test_http_is_spoken_only_where_it_is_allowed(registry: str, tmp_path: Path) -> None:
    """Without `insecure` a registry without https is not talked to."""
    async with transfers(tmp_path) as mine:
        with pytest.raises(RegistryError, match="pull model manifest: Get"):
            await pulled(mine, named(registry, "any"), insecure=False)


async def test_a_mirror_is_asked_first(registry: str, tmp_path: Path) -> None:
    """A model of a registry that cannot be reached comes from its mirror, under its own name."""
    name = named(registry, "mirrored")
    install(tmp_path / "here" / "models", name, b"weights")
    elsewhere = ModelName("registry.invalid", *name.parts[1:])
    mirrors = {"registry.invalid": f"http://{registry}"}
    async with transfers(tmp_path / "here") as mine, transfers(tmp_path / "there", mirrors=mirrors) as theirs:
        await pushed(mine, name)
        await pulled(theirs, elsewhere, insecure=False)
    read_manifest(tmp_path / "there" / "models", elsewhere)


async def test_docker_artifacts_are_pulled_and_pushed_as_they_are(registry: str, tmp_path: Path) -> None:
    """An OCI manifest in Docker Model Runner's words keeps its digest, and its GGUF is a model to the catalog."""
    name = ModelName(registry, "ai", "tiny", "latest")
    gguf = (Path(__file__).parents[3] / "engines/store/demo/demo.gguf").read_bytes()
    docker = "application/vnd.docker.ai."
    config = json.dumps({"config": {"format": "gguf"}, "descriptor": {}, "rootfs": {"type": "rootfs"}}).encode()
    models = tmp_path / "here" / "models"
    layers = (Layer(f"{docker}gguf.v3", digest_of(gguf), len(gguf)), Layer(f"{docker}license", digest_of(b"MIT"), 3))
    for blob in (gguf, b"MIT", config):
        path = blob_path(models, digest_of(blob))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(blob)
    write_manifest(
        models,
        name,
        Manifest(
            media_type=OCI_MANIFEST_TYPE,
            config=Layer(f"{docker}model.config.v0.1+json", digest_of(config), len(config)),
            layers=layers,
        ),
    )
    async with transfers(tmp_path / "here") as mine, transfers(tmp_path / "there") as theirs:
        await pushed(mine, name)
        await pulled(theirs, name)
    there = tmp_path / "there" / "models"
    assert manifest_path(there, name).read_bytes() == manifest_path(models, name).read_bytes()
    card = Catalog(there).find(name.full)
    assert card.licenses == ("MIT",)
    assert card.weights == blob_path(there, digest_of(gguf))
    assert "completion" in card.capabilities


async def test_passwords_of_docker_login_open_a_closed_registry(tmp_path: Path) -> None:
    """Basic authentication, for reading and for writing; without it the refusal is Ollama's."""
    users = htpasswd(tmp_path / "users", "ann")
    with docker_registry(tmp_path / "registry", htpasswd=users) as registry:
        login = docker_login(tmp_path, registry, "ann", PASSWORD)
        wrong = docker_login(tmp_path / "wrong", registry, "ann", "guess")
        name = named(registry, "closed")
        install(tmp_path / "here" / "models", name, noise(2 * MB), b"text")
        async with (
            transfers(tmp_path / "here", docker_config=login) as mine,
            transfers(tmp_path / "there", docker_config=login) as theirs,
            transfers(tmp_path / "nobody") as nobody,
            transfers(tmp_path / "guesser", docker_config=wrong) as guesser,
        ):
            await pushed(mine, name)
            assert (await pulled(theirs, name))[-1].status == "success"
            for stranger in (nobody, guesser):
                with pytest.raises(RegistryDenied, match="unauthorized: access denied"):
                    await pulled(stranger, name)


async def test_tokens_are_fetched_from_where_the_registry_says(tmp_path: Path) -> None:
    """Docker's token authentication with a password, on another host, for pushing (with a mount) and pulling."""
    tokens = TokenServer(tmp_path)
    async with scripted(tokens.answer) as server:
        realm = {
            "realm": f"http://{server.address}/token",
            "service": "here",
            "issuer": "tokens",
            "rootcertbundle": str(tokens.bundle),
        }
        with docker_registry(tmp_path / "registry", token=realm) as registry:
            login = docker_login(tmp_path, registry, "ann", PASSWORD)
            base, name = named(registry, "base"), named(registry, "tokened")
            install(tmp_path / "here" / "models", base, noise(2 * MB))
            install(tmp_path / "here" / "models", name, noise(2 * MB), source=base.full)
            async with (
                transfers(tmp_path / "here", docker_config=login) as mine,
                transfers(tmp_path / "there", docker_config=login) as theirs,
                transfers(tmp_path / "nobody") as nobody,
            ):
                await pushed(mine, base)
                await pushed(mine, name)
                assert (await pulled(theirs, name))[-1].status == "success"
                with pytest.raises(RegistryDenied, match="unauthorized: access denied"):
                    await pulled(nobody, name)
    assert ["repository:library/tokened:pull"] in tokens.scopes
    assert "" in tokens.logins
