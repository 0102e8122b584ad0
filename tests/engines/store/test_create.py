"""Models made of others and of files: what is inherited, in which order, and to the byte what Ollama would write."""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from store_samples import OllamaDirectory, gguf, small_llama, tensor

from engines.errors import BadRequest, Cancelled, GGUFParseError, HeadwaterError, ModelNotFound, TemplateError
from engines.library import CreateRequest, Progress
from engines.request import Message
from engines.store.catalog import Catalog
from engines.store.create import Creator, check_request
from engines.store.manifests import Manifest, read_config, read_manifest
from engines.store.names import parse_name
from engines.store.writer import StoreWriter

LIBRARY = "registry.ollama.ai/library"
SMALL = {"general.architecture": ("str", "llama"), "llama.block_count": ("u32", 1)}


class Store:
    """A store with a base, and what makes models in it; `rewrites` is what was asked of the quantizer."""

    def __init__(self, root: Path) -> None:
        self.directory = OllamaDirectory(root)
        self.rewrites: list[tuple[list[str], str]] = []
        self.writer = StoreWriter(root)
        self.creator = Creator(self.writer, rewrite=self._rewrite, check_template=check_template)
        layer = self.directory.layer
        self.directory.model(
            f"{LIBRARY}/base/latest",
            [
                layer("model", small_llama()),
                layer("template", b"{{ .Prompt }}"),
                layer("license", b"MIT"),
                layer("params", b'{"stop":["a"],"temperature":0.5}\n'),
                layer("messages", b'[{"role":"user","content":"hi"}]\n'),
            ],
            {"model_format": "gguf", "renderer": "r", "parser": "p", "requires": "0.1.0", "capabilities": ["tools"]},
        )

    def create(self, name: str = "new", **fields: Any) -> list[Progress]:
        """Make a model; what was told."""
        said: list[Progress] = []
        self.creator.run(CreateRequest(name=name, **fields), said.append)
        return said

    def manifest(self, name: str = "new") -> Manifest:
        """A model's manifest."""
        return read_manifest(self.directory.root, parse_name(name))[0]

    def text(self, kind: str, name: str = "new") -> list[str]:
        """The content of the layers of a kind."""
        return [self.directory.path_of(layer.digest).read_text() for layer in self.manifest(name).of_kind(kind)]

    def _rewrite(self, source: Path, target: Path, kind: str, on_progress: Callable[[float], None]) -> None:
        names = [path.name for path in sorted(source.parent.iterdir())] if source.is_symlink() else [source.name]
        self.rewrites.append((names, kind))
        for share in (0.0, 0.5):
            on_progress(share)
        target.write_bytes(gguf({**SMALL, "general.file_type": ("u32", 7)}))


def check_template(text: str) -> None:
    """Refuse what a Go template cannot begin with."""
    if text.startswith("{{ if }"):
        raise TemplateError('template: :1: unexpected "}" in if')


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """See Store."""
    return Store(tmp_path)


def test_a_model_from_another(store: Store) -> None:
    """Layers are reused under the base's name, texts replace, licences are added, parameters are merged."""
    said = store.create(
        base="base",
        template="{{ .System }}",
        system="Say bye!",
        licenses=("Apache",),
        parameters={"temperature": 1.0, "top_k": 10},
        messages=(Message("assistant", "<b>"),),
    )
    kinds = [layer.kind for layer in store.manifest().layers]
    assert kinds == ["model", "license", "template", "system", "license", "params", "messages"]
    assert [layer.source for layer in store.manifest().layers] == ["base:latest", "base:latest", "", "", "", "", ""]
    assert store.text("license") == ["MIT", "Apache"]
    assert store.text("params") == ['{"stop":["a"],"temperature":1,"top_k":10}\n']
    assert store.text("messages") == ['[{"role":"assistant","content":"\\u003cb\\u003e"}]\n']
    system = store.manifest().of_kind("system")[0]
    assert system.digest == "sha256:4c5f51faac758fecaff8db42f0b7382891a4d0c0bb885f7b86be88c814a7cc86"
    weights = store.manifest().layers[0].digest
    assert said[0] == Progress(f"using existing layer {weights}")
    assert [each.status for each in said[-3:]] == [
        f"creating new layer {store.manifest().layers[-1].digest}",
        "writing manifest",
        "success",
    ]


def test_what_is_not_said_is_inherited(store: Store) -> None:
    """The config as far as it is about the model's making, and every layer to the byte."""
    store.create(base="BASE:local")
    config = read_config(store.directory.root, store.manifest())
    assert (config.renderer, config.parser, config.requires, config.capabilities) == ("r", "p", "0.1.0", ("tools",))
    assert (config.model_family, config.model_families, config.model_type) == ("llama", ("llama",), "8")
    assert (config.file_type, config.architecture, config.os) == ("Q4_K_M", "amd64", "linux")
    base = {layer.kind: layer.digest for layer in store.manifest("base").layers}
    assert {layer.kind: layer.digest for layer in store.manifest().layers} == base
    store.create(base="base", renderer="x", requires="2.0.0", info={"context_length": 5, "model_family": "f"})
    config = read_config(store.directory.root, store.manifest())
    assert (config.renderer, config.parser, config.requires) == ("x", "p", "2.0.0")
    assert (config.context_length, config.model_family, config.model_families) == (5, "f", ("f", "llama"))


def test_bytes_are_ollamas(store: Store) -> None:
    """The test vectors of its own source (server/routes_create_test.go), for config, parameters and messages."""
    weights = store.directory.blob(gguf({"general.architecture": ("str", "test")}))
    talk = (("assistant", "What is my purpose?"), ("user", "You run tests."), ("assistant", "Oh, my god."))
    store.create(
        files={"x.gguf": weights},
        parameters={"temperature": 1.0, "top_k": 10, "stop": ["USER:", "ASSISTANT:"]},
        messages=tuple(Message(role, text) for role, text in talk),
    )
    assert [layer.digest for layer in (store.manifest().config, *store.manifest().layers[1:])] == [
        "sha256:99759ad5b91e723db0393d698ffbb448b1b7df5ff6377a108c49254583b1bc8c",
        "sha256:1d0ad71299d48c2fb7ae2b98e683643e771f8a5b72be34942af90d97a91c1e37",
        "sha256:298baeaf6928a60cf666d88d64a1ba606feb43a2865687c39e40652e407bffc4",
    ]


def test_a_model_from_files(store: Store) -> None:
    """What each GGUF is for is told by itself; a name without an ending is looked into."""
    projector = {"general.architecture": ("str", "clip"), "clip.has_vision_encoder": ("bool", True)}
    adapter = {"general.architecture": ("str", "llama"), "general.type": ("str", "adapter")}
    files = {
        "model": store.directory.blob(gguf(SMALL)),
        "mmproj.gguf": store.directory.blob(gguf(projector)),
    }
    lora = {"lora": store.directory.blob(gguf(adapter))}
    said = store.create(files=files, adapters=lora, draft_files={"d.gguf": store.directory.blob(small_llama())})
    assert [layer.kind for layer in store.manifest().layers] == ["projector", "model", "adapter", "draft"]
    assert [layer.source for layer in store.manifest().layers] == ["mmproj.gguf", "model", "lora", "d.gguf"]
    assert said[0] == Progress("parsing GGUF")
    config = store.directory.path_of(store.manifest().config.digest).read_text()
    assert '"draft":{"model_format":"gguf","architecture":"llama"}' in config
    assert [path.name for path in Catalog(store.directory.root).find("new").adapters]


def test_digests_may_have_a_hyphen_and_capitals(store: Store) -> None:
    """As in Ollama; the manifest has them as they should be."""
    digest = store.directory.blob(gguf(SMALL))
    store.create(files={"x.gguf": digest.replace(":", "-").replace("a", "A")})
    assert store.manifest().layers[0].digest == digest


def test_a_split_model_becomes_one_file(store: Store) -> None:
    """Under the names that llama.cpp looks for; the parts are left to be tidied up."""

    def part(number: int) -> str:
        split = {"split.no": ("u16", number), "split.count": ("u16", 2)}
        return store.directory.blob(gguf({**SMALL, **split}))

    files = {"dir/m-00002-of-00002.gguf": part(1), "dir/m-00001-of-00002.gguf": part(0)}
    said = store.create(files=files)
    assert store.rewrites == [(["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"], "COPY")]
    assert [each.completed_bytes for each in said if each.status == "validating GGUF model"][-1] > 0
    assert len(store.manifest().layers) == 1
    for files, message in (
        ({"m-00001-of-00002.gguf": part(0)}, "has 1 shards, expected 2"),
        ({"m.gguf": part(0)}, "must use llama.cpp split filename pattern"),
        ({"m-00001-of-00003.gguf": part(0)}, "filename count 3 does not match metadata count 2"),
        ({"m-00002-of-00002.gguf": part(0)}, "filename index 1 does not match metadata index 0"),
    ):
        with pytest.raises(HeadwaterError, match=message) as refused:
            store.create(files=files)
        assert refused.value.status == 500
    assert not [path for path in (store.directory.root / "blobs").iterdir() if path.suffix == ".tmp"]


def test_quantizing(store: Store) -> None:
    """Only what is not quantized, only to what is known, and not at all where it is so already."""
    half = store.directory.blob(gguf({**SMALL, "general.file_type": ("u32", 1)}))
    full = store.directory.blob(gguf(SMALL, [tensor("token_embd.weight", (4, 2))], bytes(32)))
    said = store.create(files={"x.gguf": half}, quantize="q8_0")
    size = store.directory.path_of(half).stat().st_size
    assert Progress("quantizing F16 model to Q8_0", "0" * 19, size, size // 2) in said
    assert store.manifest().layers[0].digest != half
    assert read_config(store.directory.root, store.manifest()).file_type == "Q8_0"
    store.create(files={"x.gguf": half}, quantize="f16")
    assert store.manifest().layers[0].digest == half
    store.create("other", files={"x.gguf": full}, quantize="Q4_K")
    assert [kind for _, kind in store.rewrites] == ["Q8_0", "Q4_K_M"]
    for fields, message in (
        ({"base": "base", "quantize": "q8_0"}, "quantization is only supported for F16, BF16 and F32 models"),
        (
            {"files": {"x.gguf": half}, "quantize": "q9"},
            "unsupported quantization type Q9 - supported types are F32, F16, Q4_K_S, Q4_K_M, Q8_0",
        ),
    ):
        with pytest.raises(HeadwaterError) as refused:
            store.create(**fields)
        assert (refused.value.message, refused.value.status) == (message, 500)


def test_architectures_with_a_renderer_of_their_own(store: Store) -> None:
    """Get it and its stop string, unless the request says otherwise."""
    weights = store.directory.blob(gguf({"general.architecture": ("str", "gemma4")}))
    store.create(files={"x.gguf": weights})
    config = read_config(store.directory.root, store.manifest())
    assert (config.renderer, config.parser) == ("gemma4", "gemma4")
    assert store.text("params") == ['{"stop":["\\u003cturn|\\u003e"]}\n']
    store.create(files={"x.gguf": weights}, parameters={"stop": ["x"]})
    assert store.text("params") == ['{"stop":["x"]}\n']


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({}, 400, "neither 'from' or 'files' was specified"),
        ({"files": {"/a": "sha256:" + "0" * 64}}, 400, "file path must be relative"),
        ({"files": {"a/../b": "sha256:" + "0" * 64}}, 400, "file path must be relative"),
        ({"files": {"a//b": "sha256:" + "0" * 64}}, 400, "file path must be relative"),
        ({"files": {"a": ""}}, 400, "invalid digest format"),
        ({"files": {"a": "sha256:../../etc/passwd"}}, 400, "invalid digest format"),
        ({"base": "base", "adapters": {"a": "md5:x"}}, 400, "invalid digest format"),
        ({"base": "base", "draft_quantize": "q8_0"}, 400, "--draft-quantize requires a DRAFT model"),
        ({"base": "a//b"}, 400, "invalid model name: 'a//b'"),
        ({"base": "base", "name": "../x"}, 400, "invalid model name: '../x'"),
    ],
)
def test_refused_before_anything_is_done(fields: Mapping[str, Any], status: int, message: str) -> None:
    """With Ollama's words and status."""
    with pytest.raises(BadRequest) as refused:
        check_request(CreateRequest(**{"name": "x", **fields}))
    assert (refused.value.status, refused.value.message) == (status, message)


def test_refused_on_the_way(store: Store) -> None:
    """The old model stays as it was, and nothing is left of the new one."""
    store.create(base="base", system="old")
    before = sorted(store.directory.root.rglob("*"))
    text, damaged = store.directory.blob(b"plain text"), store.directory.blob(b"GGUF" + bytes(30))
    added = {store.directory.path_of(text), store.directory.path_of(damaged)}
    for error, fields, message in (
        (ModelNotFound, {"base": "nope"}, "model 'nope' not found"),
        (BadRequest, {"files": {}}, "unknown type"),
        (BadRequest, {"files": {"a": text}}, "unknown type"),
        (BadRequest, {"files": {"a.gguf": text}}, "supplied file was not in GGUF format"),
        (BadRequest, {"files": {"a.gguf": "sha256:" + "0" * 64}}, "not found"),
        (GGUFParseError, {"files": {"a.gguf": damaged}}, "failed to parse GGUF"),
        (BadRequest, {"files": {"model.safetensors": text}}, "convert_hf_to_gguf.py"),
        (BadRequest, {"base": "base", "adapters": {"a.gguf": text, "b.gguf": text}}, "only one adapter"),
        (BadRequest, {"base": "base", "system": "new", "template": "{{ if }"}, "template error: template: :1: unexp"),
        (BadRequest, {"base": "base", "system": "new", "parameters": {"top_p": float("inf")}}, "JSON cannot hold"),
        (BadRequest, {"base": "base", "info": {"context_length": -1}}, '"context_length" must be a non-negative int'),
        (BadRequest, {"base": "base", "info": {"base_name": 1}}, 'info field "base_name" must be a string'),
    ):
        with pytest.raises(error, match=message):
            store.create(**fields)
        assert store.text("system") == ["old"]
        assert {*store.directory.root.rglob("*")} - added - {*before} == set(), fields


def test_a_base_whose_blob_is_cut_short(store: Store) -> None:
    """Is no base: its header says more than there is."""
    path = store.directory.path_of(store.manifest("base").layers[0].digest)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(GGUFParseError, match="cut short"):
        store.create(base="base")


def test_whoever_leaves_ends_the_work(store: Store) -> None:
    """And nothing of it is left."""
    before = sorted(store.directory.root.rglob("*"))

    def leave(progress: Progress) -> None:
        if progress.status == "writing manifest":
            raise Cancelled

    with pytest.raises(Cancelled):
        store.creator.run(CreateRequest(name="new", base="base", system="new", licenses=("L",)), leave)
    assert {*store.directory.root.rglob("*")} - {*before} <= {store.directory.root / ".headwater.lock"}


def test_two_creates_and_a_delete_at_once(store: Store) -> None:
    """Again and again, one model being the other's base: none fails but for a base that is gone, and all stay whole."""

    def make(name: str, base: str) -> None:
        for number in range(15):
            with suppress(ModelNotFound):
                store.create(name, base=base, system=str(number), licenses=(str(number),))

    def delete() -> None:
        for number in range(30):
            with suppress(ModelNotFound):
                store.writer.delete(parse_name(("one", "two")[number % 2]))

    with ThreadPoolExecutor(3) as threads:
        works = [threads.submit(make, "one", "base"), threads.submit(make, "two", "one"), threads.submit(delete)]
    assert [work.result() for work in works] == [None, None, None]
    for card in Catalog(store.directory.root).list():
        for layer in store.manifest(card.name).layers:
            data = store.directory.path_of(layer.digest).read_bytes()
            assert f"sha256:{hashlib.sha256(data).hexdigest()}" == layer.digest
    assert Catalog(store.directory.root).find("base")


def test_a_message_keeps_what_ollama_keeps(store: Store) -> None:
    """Images and thoughts are written, and read by nobody."""
    store.create(base="base", messages=(Message("user", "", thinking="t", images=(b"\x00",)),))
    assert store.text("messages") == ['[{"role":"user","content":"","thinking":"t","images":["AA=="]}]\n']
    assert Catalog(store.directory.root).find("new").messages == (Message("user", ""),)
