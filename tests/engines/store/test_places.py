"""Docker Model Runner's store and plain folders of GGUF files, as places where models come from."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from store_samples import LLAMA, OllamaDirectory, gguf, small_llama, tensor

from engines.errors import InvalidModelName, ModelNotFound
from engines.store.catalog import Catalog
from engines.store.docker import DockerStore, display, parse_reference
from engines.store.folder import Folder

DOCKER = "application/vnd.docker.ai."
PROJECTOR = gguf({"general.architecture": ("str", "clip")})


class DockerDirectory:
    """Writes models the way Docker Model Runner lays them out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models: list[dict[str, Any]] = []
        for name in ("blobs", "manifests"):
            (root / name / "sha256").mkdir(parents=True)

    def blob(self, data: bytes) -> str:
        """Store a blob."""
        digest = hashlib.sha256(data).hexdigest()
        (self.root / "blobs" / "sha256" / digest).write_bytes(data)
        return f"sha256:{digest}"

    def model(self, tags: list[str], *layers: tuple[str, bytes, str]) -> str:
        """Store a model of layers with a media type, data and perhaps a file name; its id."""
        described = [
            {
                "mediaType": kind if "/" in kind else DOCKER + kind,
                "digest": self.blob(data),
                "size": len(data),
                **({"annotations": {"org.cncf.model.filepath": path}} if path else {}),
            }
            for kind, data, path in layers
        ]
        config = b'{"config":{"format":"gguf"}}'
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": f"{DOCKER}model.config.v0.1+json",
                "digest": self.blob(config),
                "size": len(config),
            },
            "layers": described,
        }
        data = json.dumps(manifest).encode()
        digest = hashlib.sha256(data).hexdigest()
        (self.root / "manifests" / "sha256" / digest).write_bytes(data)
        self.models.append({"id": f"sha256:{digest}", "tags": tags, "files": []})
        (self.root / "models.json").write_text(json.dumps({"models": self.models}))
        return f"sha256:{digest}"


@pytest.fixture
def docker(tmp_path: Path) -> DockerDirectory:
    """See DockerDirectory."""
    return DockerDirectory(tmp_path / "docker")


@pytest.fixture
def catalog(tmp_path: Path, docker: DockerDirectory) -> Catalog:
    """All places at once."""
    (tmp_path / "folder").mkdir()
    return Catalog(tmp_path / "models", DockerStore(docker.root), Folder(tmp_path / "folder"))


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("smollm2", "docker.io/ai/smollm2:latest"),
        ("ai/SmolLM2:360M-Q4", "docker.io/ai/smollm2:360M-Q4"),
        ("docker.io/ai/smollm2", "docker.io/ai/smollm2:latest"),
        ("me/x:t", "docker.io/me/x:t"),
        ("hf.co/Bartowski/X-GGUF:Q4_K_M", "huggingface.co/bartowski/x-gguf:Q4_K_M"),
        ("huggingface.co/a/b", "huggingface.co/a/b:latest"),
        ("registry.example.com:5000/a/b", "registry.example.com:5000/a/b:latest"),
    ],
)
def test_references(text: str, reference: str) -> None:
    """Whatever form a name has, it means the same; and so does the form in which it is shown."""
    assert parse_reference(text) == reference
    assert parse_reference(display(reference)) == reference


def test_a_docker_model_is_found_by_every_name(catalog: Catalog, docker: DockerDirectory) -> None:
    """Tag, short name, whole reference, id and its beginning."""
    layers = (("gguf.v3", small_llama(), ""), ("license", b"MIT", ""), ("chat.template.jinja", b"{{ tools }}", ""))
    model = docker.model(["docker.io/ai/smollm2:latest"], *layers)
    names = ["smollm2", "AI/smollm2", "ai/smollm2:latest", "docker.io/ai/smollm2", model, model[7:], model[7:19]]
    cards = {name: catalog.find(name) for name in names}
    assert len({id(card) for card in cards.values()}) == 1
    card = cards["smollm2"]
    assert (card.name, card.digest, card.namespace) == ("ai/smollm2:latest", model[7:], "ai")
    assert (card.family, card.quantization, card.context_length) == ("llama", "Q4_K_M", 2048)
    assert (card.licenses, card.chat_template, card.size_bytes) == (("MIT",), "{{ tools }}", len(small_llama()) + 42)
    assert card.weights.read_bytes() == small_llama()
    assert catalog.weights(card.weights_digest) == card.weights
    assert [card.name for card in catalog.list()] == ["ai/smollm2:latest"]
    assert catalog.describe("smollm2").num_parameters == 8
    owner = catalog.owner_of("smollm2")
    assert owner is not None
    assert "Docker Model Runner" in owner


def test_packed_and_split_docker_models(catalog: Catalog, docker: DockerDirectory) -> None:
    """ModelPack's raw layers are told by their files' names, parts stay in order, projectors come along."""
    raw = "application/vnd.cncf.model.weight.v1.raw"
    parts = [small_llama(split__no=("u16", number), split__count=("u16", 2)) for number in range(2)]
    docker.model(
        ["docker.io/me/pack:latest"],
        (raw, parts[0], "m-00001-of-00002.gguf"),
        (raw, parts[1], "m-00002-of-00002.gguf"),
        (raw, PROJECTOR, "mmproj-m.gguf"),
        (raw, b"{}", "config.json"),
    )
    docker.model(["docker.io/me/safe:latest"], ("safetensors", b"x", ""))
    card = catalog.find("me/pack")
    assert [path.read_bytes() for path in card.weight_parts] == parts
    assert [path.read_bytes() for path in card.projectors] == [PROJECTOR]
    with pytest.raises(ModelNotFound):
        catalog.find("me/safe")


def test_a_docker_store_in_any_state(catalog: Catalog, docker: DockerDirectory) -> None:
    """What is missing, damaged or half there is left out, and the rest is shown."""
    model = docker.model(["docker.io/ai/a:latest"], ("gguf.v3", small_llama(), ""))
    docker.model(["docker.io/ai/b:latest"], ("gguf.v3", small_llama(more=("u8", 1)), ""))
    manifest = docker.root / "manifests" / "sha256" / model[7:]
    manifest.write_bytes(manifest.read_bytes() + b" ")
    assert [card.name for card in catalog.list()] == ["ai/b:latest"]
    catalog.find("b").weights.unlink()
    assert catalog.list() == []
    for damaged in (b"", b"[]", b'{"models":[{"id":"../../x","tags":[]}]}', b"{" * 100_000):
        (docker.root / "models.json").write_bytes(damaged)
        assert catalog.list() == []


def test_a_folder_of_files(catalog: Catalog, tmp_path: Path) -> None:
    """Each file is a model, parts are one, projectors go with their own, what is no model is left out."""
    folder = tmp_path / "folder"
    files = {
        "Qwen2.5 (x)-Q4_K_M.gguf": small_llama(),
        "big-00001-of-00002.gguf": small_llama(split__no=("u16", 0), split__count=("u16", 2)),
        "big-00002-of-00002.gguf": small_llama(split__no=("u16", 1), split__count=("u16", 2)),
        "half-00001-of-00002.gguf": small_llama(),
        "pub.lisher/llava-7b-Q4_0.gguf": small_llama(),
        "pub.lisher/other.gguf": small_llama(),
        "pub.lisher/mmproj-llava-7b-f16.gguf": PROJECTOR,
        "alone/model.GGUF": small_llama(),
        "alone/mmproj.gguf": PROJECTOR,
        "a/b/c/d/e/deep.gguf": small_llama(),
        ".hidden.gguf": small_llama(),
        "notes.txt": b"",
        "damaged.gguf": b"GGUF",
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    cards = {card.name: card for card in catalog.list()}
    assert cards.keys() == {
        *("Qwen2.5-x-Q4_K_M:latest", "big:latest", "damaged:latest", "alone/model:latest"),
        *("pub-lisher/llava-7b-Q4_0:latest", "pub-lisher/other:latest"),
    }
    assert [path.name for path in cards["big:latest"].weight_parts] == [
        "big-00001-of-00002.gguf",
        "big-00002-of-00002.gguf",
    ]
    assert [path.name for path in cards["alone/model:latest"].projectors] == ["mmproj.gguf"]
    assert [path.name for path in cards["pub-lisher/llava-7b-Q4_0:latest"].projectors] == ["mmproj-llava-7b-f16.gguf"]
    assert cards["pub-lisher/other:latest"].projectors == ()
    card = catalog.find("QWEN2.5-X-q4_k_m")
    assert catalog.weights(card.weights_digest) == card.weights
    assert len(card.digest) == 64


def test_a_file_that_changes_is_another_model(catalog: Catalog, tmp_path: Path) -> None:
    """New files show at once, and what is loaded is told apart by the file's state."""
    path = tmp_path / "folder" / "m.gguf"
    path.write_bytes(small_llama())
    before = catalog.find("m")
    assert catalog.find("m") is before
    path.write_bytes(small_llama(more=("u8", 1)))
    os.utime(path, (1, 1))
    assert catalog.find("m").weights_digest != before.weights_digest
    path.unlink()
    with pytest.raises(ModelNotFound):
        catalog.find("m")


def test_the_first_place_that_has_a_name_counts(catalog: Catalog, docker: DockerDirectory, tmp_path: Path) -> None:
    """Ollama's directory before Docker's store, and that before the folders; a name is listed once."""
    other = gguf(LLAMA, [tensor("token_embd.weight", (8, 2))], bytes(64))
    (tmp_path / "folder" / "ai").mkdir()
    (tmp_path / "folder" / "ai" / "m.gguf").write_bytes(other)
    assert catalog.find("ai/m").parameter_size == "16"
    docker.model(["docker.io/ai/m:latest"], ("gguf.v3", small_llama(), ""))
    assert catalog.find("ai/m").parameter_size == "8"
    directory = OllamaDirectory(tmp_path / "models")
    layer = directory.layer("model", gguf(LLAMA, [tensor("token_embd.weight", (8, 4))], bytes(128)))
    directory.model("registry.ollama.ai/AI/m/latest", [layer])
    assert catalog.find("ai/m").parameter_size == "32"
    assert catalog.owner_of("ai/m") is None
    assert [(card.name, card.parameter_size) for card in catalog.list()] == [("AI/m:latest", "32")]


def test_what_is_no_name_is_none_anywhere(catalog: Catalog) -> None:
    """And what is one leads nowhere."""
    for name in ("", "../x", "a//b", "/etc/passwd"):
        with pytest.raises(InvalidModelName):
            catalog.find(name)
    with pytest.raises(ModelNotFound):
        catalog.find("0123456789ab")


@pytest.mark.parametrize("name", ["ai/smollm2", "smollm2", "AI/smollm2:latest", "docker.io/ai/smollm2"])
def test_docker_hubs_models_in_ollamas_directory_have_dockers_short_names(tmp_path: Path, name: str) -> None:
    """Unless a model of Ollama's is called so, which goes first."""
    directory = OllamaDirectory(tmp_path)
    directory.model("docker.io/ai/smollm2/latest", [directory.layer("model", small_llama())])
    catalog = Catalog(tmp_path)
    assert catalog.find(name).full_name == "docker.io/ai/smollm2:latest"
    directory.model("registry.ollama.ai/library/smollm2/latest", [directory.layer("model", small_llama())])
    assert (catalog.find(name).full_name == "docker.io/ai/smollm2:latest") is (name != "smollm2")
