import dataclasses
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_samples import OllamaDirectory, gguf, small_llama, tensor

from engines.errors import GGUFParseError, HeadwaterError, InvalidModelName, ModelNotFound
from engines.request import Message
from engines.store.catalog import Catalog
from engines.store.manifests import ManifestDamaged

CONFIG = {
    "model_format": "gguf",
    "model_family": "qwen2",
    "model_families": ["qwen2", "clip"],
    "model_type": "3.2B",
    "file_type": "Q5_K_M",
    "requires": "0.14.0",
    "architecture": "amd64",
    "os": "linux",
    "rootfs": {"type": "layers"},
}
LIBRARY = "registry.ollama.ai/library"


@pytest.fixture
def directory(tmp_path: Path) -> OllamaDirectory:
    """An empty Ollama directory."""
    return OllamaDirectory(tmp_path)


@pytest.fixture
def catalog(directory: OllamaDirectory) -> Catalog:
    """A catalog of it."""
    return Catalog(directory.root)


def test_a_card_has_everything_that_ollama_stores(directory: OllamaDirectory, catalog: Catalog) -> None:
    """Every layer of a full model arrives in its field, and the last of a kind counts where there is but one."""
    weights = small_llama(tokenizer__chat_template=("str", "{{ messages }}"))
    manifest = directory.model(
        "hf.co/Me/Full/7B",
        [
            directory.layer("model", weights, **{"from": "base:latest"}),
            directory.layer("projector", b"GGUF projector"),
            directory.layer("adapter", b"GGUF adapter"),
            directory.layer("prompt", b"old {{ .Prompt }}"),
            directory.layer("template", b"{{ .Messages }} {{ .Tools }}"),
            directory.layer("system", "Be kïnd.".encode()),
            directory.layer("params", b'{"stop":["<|x|>"],"temperature":0.6,"num_ctx":512,"seed":null}\n'),
            directory.layer("messages", b'[{"role":"user","content":"Hi"},{"role":"assistant","content":"Yes?"}]\n'),
            directory.layer("license", b"MIT"),
            directory.layer("license", b"Apache"),
            directory.layer("embed", b"obsolete"),
        ],
        CONFIG,
    )
    os.utime(manifest, (1_700_000_000, 1_700_000_000))
    card = catalog.find("hf.co/me/full:7b")
    data = manifest.read_bytes()
    layers = json.loads(data)["layers"]
    assert (card.name, card.full_name, card.namespace) == ("hf.co/Me/Full:7B", "hf.co/Me/Full:7B", "Me")
    assert card.digest == hashlib.sha256(data).hexdigest()
    assert card.modified_at == 1_700_000_000
    assert card.size_bytes == sum(layer["size"] for layer in layers) + json.loads(data)["config"]["size"]
    assert card.weights_digest == layers[0]["digest"]
    assert card.weights.read_bytes() == weights
    assert [path.read_bytes() for path in (*card.projectors, *card.adapters)] == [b"GGUF projector", b"GGUF adapter"]
    assert (card.format, card.family, card.families) == ("gguf", "qwen2", ("qwen2", "clip"))
    assert (card.parameter_size, card.quantization) == ("3.2B", "Q5_K_M")
    assert (card.context_length, card.embedding_length) == (2048, 64)
    assert (card.parent, card.requires) == ("base:latest", "0.14.0")
    assert (card.template, card.chat_template) == ("{{ .Messages }} {{ .Tools }}", "{{ messages }}")
    assert card.go_template == card.template
    assert card.system == "Be kïnd."
    assert card.parameters == {"stop": ["<|x|>"], "temperature": 0.6, "num_ctx": 512}
    assert (card.sampling.stop, card.sampling.temperature, card.load.num_ctx) == (("<|x|>",), 0.6, 512)
    assert card.messages == (Message("user", "Hi"), Message("assistant", "Yes?"))
    assert card.licenses == ("MIT", "Apache")
    assert card.capabilities == ("completion", "tools", "vision")


def test_the_operator_may_have_one_kind_of_template_alone(directory: OllamaDirectory) -> None:
    """With it go the capabilities that are told."""
    jinja, go = "{{ tools }}", "{{ .Messages }} {{ .Suffix }}"
    weights = directory.layer("model", small_llama(tokenizer__chat_template=("str", jinja)))
    directory.model("registry.ollama.ai/library/m/latest", [weights, directory.layer("template", go.encode())])
    for says, template, capability in ((None, go, "insert"), (True, go, "insert"), (False, "", "tools")):
        card = Catalog(directory.root, go_templates=says).find("m")
        assert (card.go_template, card.capabilities) == (template, ("completion", capability))


def test_the_header_answers_where_the_config_is_silent(directory: OllamaDirectory, catalog: Catalog) -> None:
    """Family, size and quantization come from the weights when the config has none, or says unknown."""
    directory.model(f"{LIBRARY}/m/t", [directory.layer("model", small_llama())], {"file_type": "unknown"})
    card = catalog.find("m:t")
    assert (card.family, card.families, card.parameter_size, card.quantization) == ("llama", ("llama",), "8", "Q4_K_M")


def test_null_families_stay_null_when_the_family_is_known(directory: OllamaDirectory, catalog: Catalog) -> None:
    """Ollama tells null here, and so do we."""
    config = CONFIG | {"model_families": None}
    directory.model(f"{LIBRARY}/m/t", [directory.layer("model", small_llama())], config)
    assert catalog.find("m:t").families is None


def test_listing_is_newest_first_by_whole_seconds(directory: OllamaDirectory, catalog: Catalog) -> None:
    """Within a second the order is by name, as fractions are nothing to sort by."""
    weights = directory.layer("model", small_llama())
    for name, modified in (("a", 10.9), ("c", 20.1), ("b", 20.9), ("d", 5.0)):
        os.utime(directory.model(f"{LIBRARY}/{name}/latest", [weights]), (modified, modified))
    assert [card.name for card in catalog.list()] == ["b:latest", "c:latest", "a:latest", "d:latest"]


def test_an_empty_or_missing_directory_has_no_models(tmp_path: Path) -> None:
    """A directory that is not there yet is an empty one."""
    assert Catalog(tmp_path).list() == Catalog(tmp_path / "missing").list() == []
    with pytest.raises(ModelNotFound):
        Catalog(tmp_path / "missing").find("m")


def test_changes_from_outside_show_at_once(directory: OllamaDirectory, catalog: Catalog) -> None:
    """Models that appear, change or vanish do so on the next call."""
    weights = directory.layer("model", small_llama())
    path = directory.model(f"{LIBRARY}/m/t", [weights, directory.layer("system", b"old")])
    assert [card.system for card in catalog.list()] == [catalog.find("m:t").system] == ["old"]
    directory.model(f"{LIBRARY}/m/t", [weights, directory.layer("system", b"new")])
    assert [card.system for card in catalog.list()] == [catalog.find("m:t").system] == ["new"]
    directory.model(f"{LIBRARY}/m/u", [weights])
    assert len(catalog.list()) == 2
    path.unlink()
    assert [card.name for card in catalog.list()] == ["m:u"]
    with pytest.raises(ModelNotFound):
        catalog.find("m:t")


def test_cards_are_remembered_while_files_stay_the_same(directory: OllamaDirectory, catalog: Catalog) -> None:
    """An unchanged model is the same object; a touched manifest gives a new card with the new time."""
    path = directory.model(f"{LIBRARY}/m/t", [directory.layer("model", small_llama())])
    card = catalog.find("m:t")
    assert catalog.find("M:T") is card
    assert catalog.list()[0] is card
    os.utime(path, (1000, 1000))
    assert catalog.find("m:t") == dataclasses.replace(card, modified_at=1000)


@pytest.mark.parametrize("name", ["", "m:", "../m", "/etc/passwd", "a.b/m", "m@sha256:" + "0" * 64])
def test_malformed_names_are_invalid(catalog: Catalog, name: str) -> None:
    """They are told apart from names of models that are not there."""
    with pytest.raises(InvalidModelName):
        catalog.find(name)


@pytest.mark.parametrize("name", ["None", "none:local", "host/x/none:tag"])
def test_unknown_models_are_not_found_as_typed(catalog: Catalog, name: str) -> None:
    """The error repeats what the client wrote."""
    with pytest.raises(ModelNotFound) as caught:
        catalog.find(name)
    assert caught.value.name == name


def test_local_suffix_means_this_machine(directory: OllamaDirectory, catalog: Catalog) -> None:
    """`m:t:local` is `m:t` here."""
    directory.model(f"{LIBRARY}/m/t", [directory.layer("model", small_llama())])
    assert catalog.find("m:t:local").name == "m:t"


@pytest.mark.parametrize("kind", ["model", "projector", "adapter", "system"])
def test_a_model_with_a_missing_blob_is_not_there(directory: OllamaDirectory, catalog: Catalog, kind: str) -> None:
    """It is neither listed nor found."""
    layers = [directory.layer("model", small_llama()), directory.layer(kind, small_llama(x=("u8", 1)))]
    directory.model(f"{LIBRARY}/m/t", layers)
    directory.path_of(layers[1]["digest"]).unlink()
    assert catalog.list() == []
    with pytest.raises(ModelNotFound):
        catalog.find("m:t")


def test_weights_that_vanish_take_the_model_with_them(directory: OllamaDirectory, catalog: Catalog) -> None:
    """A remembered card does not outlive its weights."""
    layer = directory.layer("model", small_llama())
    directory.model(f"{LIBRARY}/m/t", [layer])
    assert catalog.find("m:t")
    directory.path_of(layer["digest"]).unlink()
    assert catalog.list() == []
    with pytest.raises(ModelNotFound):
        catalog.find("m:t")


def test_models_without_weights_are_not_listed(directory: OllamaDirectory, catalog: Catalog) -> None:
    """Safetensors models are nothing that we could run, and neither is half a stub."""
    directory.model(f"{LIBRARY}/half/latest", [], {"remote_host": "https://ollama.com"})
    directory.model(f"{LIBRARY}/tensors/latest", [directory.layer("tensor", b"x", name="t")])
    assert catalog.list() == []
    for name in ("half", "tensors"):
        with pytest.raises(ModelNotFound):
            catalog.find(name)


def test_models_that_run_elsewhere_are_listed_by_what_their_config_says(
    directory: OllamaDirectory, catalog: Catalog
) -> None:
    """They have no weights, and their description no header."""
    said = {
        "model_format": "gguf",
        "model_family": "gptoss",
        "model_type": "116.8B",
        "file_type": "MXFP4",
        "remote_host": "https://ollama.com",
        "remote_model": "gpt-oss:120b",
        "capabilities": ["completion", "tools"],
        "context_length": 131072,
        "embedding_length": 2880,
        "base_name": "gpt-oss",
    }
    directory.model(f"{LIBRARY}/gpt-oss/120b-cloud", [directory.layer("system", b"Be brief.")], said)
    (card,) = catalog.list()
    assert (card.name, card.is_remote, card.remote_model) == ("gpt-oss:120b-cloud", True, "gpt-oss:120b")
    assert (card.family, card.parameter_size, card.quantization) == ("gptoss", "116.8B", "MXFP4")
    assert (card.context_length, card.capabilities, card.system) == (131072, ("completion", "tools"), "Be brief.")
    description = catalog.describe("gpt-oss:120b-cloud")
    assert description.metadata == {
        "general.architecture": "gptoss",
        "general.basename": "gpt-oss",
        "gptoss.context_length": 131072,
        "gptoss.embedding_length": 2880,
    }
    assert (description.tensors, description.num_parameters) == ((), 0)


def test_a_stub_that_says_nothing_has_nothing_to_show(directory: OllamaDirectory, catalog: Catalog) -> None:
    """Not even an architecture."""
    directory.model(f"{LIBRARY}/stub/latest", [], {"remote_host": "https://ollama.com", "remote_model": "big"})
    assert catalog.describe("stub").metadata == {}


@pytest.mark.parametrize("weights", [b"", b"not a GGUF", small_llama()[:-1], small_llama()[:40]])
def test_damaged_weights_are_listed_by_their_config(
    directory: OllamaDirectory, catalog: Catalog, weights: bytes
) -> None:
    """The card says what the config says, and describing it tells what is wrong."""
    layers = [directory.layer("model", weights), directory.layer("template", b"{{ .Tools }}")]
    directory.model(f"{LIBRARY}/m/t", layers, CONFIG)
    (card,) = catalog.list()
    assert card == catalog.find("m:t")
    assert (card.family, card.parameter_size, card.quantization) == ("qwen2", "3.2B", "Q5_K_M")
    assert card.capabilities == ("completion",)
    with pytest.raises(GGUFParseError):
        catalog.describe("m:t")


def test_damaged_weights_without_a_config_are_still_listed(directory: OllamaDirectory, catalog: Catalog) -> None:
    """Nothing is known, and nothing is made up."""
    directory.model(f"{LIBRARY}/m/t", [directory.layer("model", b"")])
    (card,) = catalog.list()
    assert (card.family, card.families, card.parameter_size, card.quantization) == ("", None, "", "unknown")


def _write_manifest_bytes(directory: OllamaDirectory) -> None:
    directory.raw_manifest(f"{LIBRARY}/bad/t", b"{")


def _write_config(directory: OllamaDirectory) -> None:
    directory.model(f"{LIBRARY}/bad/t", [directory.layer("model", small_llama())], {"model_families": "llama"})


def _write_layer(kind: str, data: bytes) -> Callable[[OllamaDirectory], None]:
    def write(directory: OllamaDirectory) -> None:
        layers = [directory.layer("model", small_llama()), directory.layer(kind, data)]
        directory.model(f"{LIBRARY}/bad/t", layers)

    return write


@pytest.mark.parametrize(
    "damage",
    [
        _write_manifest_bytes,
        _write_config,
        _write_layer("params", b"[]"),
        _write_layer("params", b"{"),
        _write_layer("messages", b'[{"role":5}]'),
        _write_layer("messages", b'{"role":"user"}'),
        _write_layer("license", b"x" * ((8 << 20) + 1)),
    ],
)
def test_damaged_models_are_skipped_in_lists_and_clear_when_named(
    directory: OllamaDirectory, catalog: Catalog, damage: Callable[[OllamaDirectory], None]
) -> None:
    """One bad model never hides the others, and whoever asks for it learns what is wrong."""
    directory.model(f"{LIBRARY}/good/t", [directory.layer("model", small_llama())])
    damage(directory)
    assert [card.name for card in catalog.list()] == ["good:t"]
    with pytest.raises(HeadwaterError, match=r"damaged|larger") as caught:
        catalog.find("bad:t")
    assert caught.value.status == 500


def test_one_blob_named_many_times_does_not_fill_the_memory(directory: OllamaDirectory, catalog: Catalog) -> None:
    """The limit is on all texts together, however few blobs they are."""
    licence = directory.layer("license", b"x" * (1 << 20))
    directory.model(f"{LIBRARY}/m/t", [directory.layer("model", small_llama()), *[licence] * 1000])
    with pytest.raises(HeadwaterError, match="larger than"):
        catalog.find("m:t")


def test_describe_has_the_whole_header(directory: OllamaDirectory, catalog: Catalog) -> None:
    """Arrays are there in full, tensors and parameters are counted, and the first projector's metadata is added."""
    weights = small_llama(tokens=("[str]", ["a", "b"]))
    projector: dict[str, tuple[str, Any]] = {"general.architecture": ("str", "clip")}
    layers = [directory.layer("model", weights), directory.layer("projector", gguf(projector))]
    directory.model(f"{LIBRARY}/m/t", layers)
    description = catalog.describe("m:t")
    assert description.card is catalog.find("m:t")
    assert description.metadata["tokens"] == ["a", "b"]
    assert [(tensor.name, tensor.type, tensor.shape) for tensor in description.tensors] == [
        ("token_embd.weight", "F32", (4, 2))
    ]
    assert description.num_parameters == 8
    assert description.projector_metadata == {"general.architecture": "clip"}


def test_describe_without_projector_has_no_projector_metadata(directory: OllamaDirectory, catalog: Catalog) -> None:
    """None tells that there is no projector."""
    directory.model(f"{LIBRARY}/m/t", [directory.layer("model", small_llama())])
    assert catalog.describe("m:t").projector_metadata is None


def test_a_weights_blob_may_be_a_symlink(directory: OllamaDirectory, catalog: Catalog, tmp_path: Path) -> None:
    """Ollama's users move large blobs to other disks that way."""
    layer = directory.layer("model", small_llama())
    blob = directory.path_of(layer["digest"])
    blob.symlink_to(blob.rename(tmp_path / "elsewhere"))
    directory.model(f"{LIBRARY}/m/t", [layer])
    assert catalog.find("m:t").quantization == "Q4_K_M"


def test_a_damaged_model_can_be_mended(directory: OllamaDirectory, catalog: Catalog) -> None:
    """Nothing bad is remembered beyond the file that was bad."""
    layer = directory.layer("model", small_llama())
    blob = directory.path_of(layer["digest"])
    blob.write_bytes(b"half")
    directory.model(f"{LIBRARY}/m/t", [layer])
    assert catalog.find("m:t").context_length == 0
    blob.write_bytes(small_llama())
    assert catalog.find("m:t").context_length == 2048
    manifest = directory.raw_manifest(f"{LIBRARY}/m/t", b"{")
    with pytest.raises(ManifestDamaged):
        catalog.find("m:t")
    manifest.unlink()
    directory.model(f"{LIBRARY}/m/t", [layer])
    assert catalog.find("m:t").context_length == 2048


def test_a_hundred_models_are_listed_quickly(directory: OllamaDirectory, catalog: Catalog) -> None:
    """The first listing reads them all, later ones only look at the files."""
    for number in range(100):
        weights = small_llama(general__name=("str", str(number)))
        directory.model(f"{LIBRARY}/m{number}/latest", [directory.layer("model", weights)])
    assert len(catalog.list()) == 100
    start = time.perf_counter()
    assert len(catalog.list()) == 100
    assert time.perf_counter() - start < 0.2


def test_threads_may_share_a_catalog(directory: OllamaDirectory, catalog: Catalog) -> None:
    """Listing and finding while models come and go raises nothing unexpected and ends with the truth."""
    weights = directory.layer("model", small_llama())
    directory.model(f"{LIBRARY}/stays/t", [weights])
    errors: list[BaseException] = []
    done = threading.Event()

    def look() -> None:
        try:
            while not done.is_set():
                assert "stays:t" in {card.name for card in catalog.list()}
                catalog.find("stays:t")
        except BaseException as error:  # noqa: BLE001 (a thread's failure must reach the test)
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(100):
        path = directory.model(f"{LIBRARY}/m{number}/t", [weights])
        if number % 2:
            path.unlink()
    done.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(catalog.list()) == 51


def test_a_reranker_is_told_by_its_head(tmp_path: Path) -> None:
    """Though its header says nothing of pooling, and its card keeps no other tensor."""
    directory = OllamaDirectory(tmp_path)
    weights = gguf({"general.architecture": ("str", "bert")}, [tensor("cls.weight", (4, 2))], bytes(32))
    directory.model("registry.ollama.ai/library/ranker/latest", [directory.layer("model", weights)])
    assert Catalog(tmp_path).find("ranker").capabilities == ("rerank",)
