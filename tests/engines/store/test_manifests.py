import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_samples import OllamaDirectory

from engines.store.blobs import StoreUnreadable, write_blob
from engines.store.gojson import encode_json
from engines.store.manifests import (
    CONFIG_TYPE,
    LAYER_TYPE,
    MAX_JSON_BYTES,
    Layer,
    Manifest,
    ManifestDamaged,
    ModelConfig,
    decode_json,
    locate,
    manifest_path,
    read_config,
    read_manifest,
    walk,
    write_manifest,
)
from engines.store.names import ModelName, parse_name

TEST_CONFIG = ModelConfig(
    model_format="gguf",
    model_family="test",
    model_families=("test",),
    model_type="0",
    file_type="unknown",
    architecture="amd64",
    os="linux",
)


@pytest.mark.parametrize(
    ("value", "digest"),
    [
        (TEST_CONFIG, "99759ad5b91e723db0393d698ffbb448b1b7df5ff6377a108c49254583b1bc8c"),
        (
            {"top_k": 10, "temperature": 1.0, "stop": ["USER:", "ASSISTANT:"]},
            "1d0ad71299d48c2fb7ae2b98e683643e771f8a5b72be34942af90d97a91c1e37",
        ),
        (
            {"stop": ["<|endoftext|>"], "temperature": 0.6, "top_k": 10, "top_p": 0.7},
            "12f58bb75cb3042d69a7e013ab87fb3c3c7088f50ddc62f0c77bd332f0d44d35",
        ),
    ],
)
def test_json_has_the_digests_that_ollama_gives_it(value: Any, digest: str) -> None:
    """The published test vectors come out byte for byte."""
    assert hashlib.sha256(encode_json(value)).hexdigest() == digest


def test_optional_config_fields_are_written_in_order_when_said() -> None:
    """Fields that are empty are left out, families that are unknown are null."""
    config = ModelConfig(
        model_format="gguf",
        model_family="",
        model_families=None,
        model_type="",
        file_type="",
        capabilities=("tools",),
        renderer="qwen3-coder",
        context_length=4096,
        architecture="amd64",
        os="linux",
    )
    assert encode_json(config) == (
        b'{"model_format":"gguf","model_family":"","model_families":null,"model_type":"","file_type":"",'
        b'"renderer":"qwen3-coder","capabilities":["tools"],"context_length":4096,"architecture":"amd64","os":"linux"}\n'
    )


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((1.0, "1"), (0.0, "0"), (-0.0, "-0"), (0.7, "0.7"), (1e-6, "0.000001"), (1e-7, "1e-7"), (1.5e-10, "1.5e-10")),
        *(
            (1e20, "100000000000000000000"),
            (1e21, "1e+21"),
            (1.25e100, "1.25e+100"),
            (-2.5, "-2.5"),
            (1e16, "1" + "0" * 16),
        ),
    ],
)
def test_floats_are_written_as_go_does(number: float, text: str) -> None:
    """Whole numbers have no point, and exponents are rare and short."""
    assert encode_json([number]) == f"[{text}]\n".encode()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives_being_written(number: float) -> None:
    """Reading gives the same number back."""
    assert float(json.loads(encode_json(number))) == number


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_json_lacks_are_refused(number: float) -> None:
    """They are an error rather than broken JSON."""
    with pytest.raises(ValueError, match="JSON cannot hold"):
        encode_json({"temperature": number})


def test_markup_is_escaped_and_other_text_is_not() -> None:
    """Go escapes what could end a script element, and nothing else beyond ASCII."""
    assert encode_json("<a>&\u2028\u2029é😀") == '"\\u003ca\\u003e\\u0026\\u2028\\u2029é😀"\n'.encode()


def test_a_written_manifest_is_ollamas_to_the_byte(tmp_path: Path) -> None:
    """Key order, absent members and the final newline are as `ollama create` writes them, and the digest is theirs."""
    config = encode_json(TEST_CONFIG)
    manifest = Manifest(
        config=Layer(CONFIG_TYPE, write_blob(tmp_path, config), len(config)),
        layers=(Layer(f"{LAYER_TYPE}system", write_blob(tmp_path, b"Say bye!"), 8, source="base:latest"),),
    )
    name = parse_name("localhost:5000/me/x:7b")
    digest = write_manifest(tmp_path, name, manifest)
    data = (tmp_path / "manifests/localhost:5000/me/x/7b").read_bytes()
    assert data == (
        b'{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json",'
        b'"config":{"mediaType":"application/vnd.docker.container.image.v1+json",'
        b'"digest":"sha256:99759ad5b91e723db0393d698ffbb448b1b7df5ff6377a108c49254583b1bc8c","size":%d},'
        b'"layers":[{"mediaType":"application/vnd.ollama.image.system",'
        b'"digest":"sha256:4c5f51faac758fecaff8db42f0b7382891a4d0c0bb885f7b86be88c814a7cc86","size":8,'
        b'"from":"base:latest"}]}\n' % len(config)
    )
    assert digest == hashlib.sha256(data).hexdigest()
    assert read_manifest(tmp_path, name) == (manifest, digest)
    assert read_config(tmp_path, manifest) == TEST_CONFIG
    assert manifest.size_bytes == len(config) + 8


def test_the_digest_is_of_the_bytes_as_pulled(tmp_path: Path) -> None:
    """Unknown members and odd spacing of a registry's manifest stay part of the digest and do no harm."""
    directory = OllamaDirectory(tmp_path)
    path = directory.model("h/n/m/t", [directory.layer("model", b"x", extra="1")], {"rootfs": {}, "model_type": None})
    manifest, digest = read_manifest(tmp_path, parse_name("h/n/m:t"))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_config(tmp_path, manifest).model_type == ""


@pytest.mark.parametrize(
    "data",
    [
        *(
            b"",
            b"{",
            b"[]",
            b"null",
            b"7",
            b"{}",
            b"\xff",
            b'{"config":{"mediaType":"c","digest":"sha256:0","size":1}}',
        ),
        b'{"config":{"mediaType":"c","digest":"sha256:' + b"0" * 64 + b'","size":-1}}',
        b'{"config":{"mediaType":"c","digest":"sha256:' + b"0" * 63 + b'/","size":1}}',
        b'{"config":{"mediaType":"\xff","digest":"sha256:' + b"0" * 64 + b'","size":1}}',
        b"[" * 1_000_000,
        b'{"a":' * 500_000,
        b'{"schemaVersion":' + b"9" * 100_000 + b"}",
    ],
)
def test_damaged_manifests_are_named_as_such(tmp_path: Path, data: bytes) -> None:
    """Whatever the bytes, the error is ours and says which model it is about."""
    OllamaDirectory(tmp_path).raw_manifest("h/n/m/t", data)
    with pytest.raises(ManifestDamaged, match="the manifest of h/n/m:t is damaged"):
        read_manifest(tmp_path, parse_name("h/n/m:t"))


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.sampled_from(["config", "layers", "mediaType", "digest", "size"]), inner)
    ),
)


@given(st.binary() | ANY_JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_do_worse_than_a_damaged_manifest(data: bytes) -> None:
    """Anything at all decodes or raises our own error, as manifest and as config."""
    for kind in (Manifest, ModelConfig):
        try:
            decode_json(data, kind, "it")
        except ManifestDamaged:
            continue


def test_huge_manifests_are_not_read(tmp_path: Path) -> None:
    """A manifest beyond the limit is refused by its size."""
    OllamaDirectory(tmp_path).raw_manifest("h/n/m/t", b" " * (MAX_JSON_BYTES + 1))
    with pytest.raises(StoreUnreadable, match="larger than"):
        read_manifest(tmp_path, parse_name("h/n/m:t"))


def test_the_walk_sees_exactly_the_manifests(tmp_path: Path) -> None:
    """Files at another depth, with invalid parts or that are directories are ignored."""
    directory = OllamaDirectory(tmp_path)
    for path in ("h/n/m/t", "h/n/m/u", "h:5000/n/M/t"):
        directory.raw_manifest(path, b"")
    for path in ("a", "h/a", "h/n/a", "h/n/d/t/deep", "h/n/m/.tmp", "h/n.n/m/t", ".h/n/m/t", "h/n/m/\N{KELVIN SIGN}"):
        directory.raw_manifest(path, b"")
    assert {name.full for name in walk(tmp_path)} == {"h/n/m:t", "h/n/m:u", "h:5000/n/M:t"}
    assert list(walk(tmp_path / "nowhere")) == []


def test_names_are_found_in_the_spelling_on_disk(tmp_path: Path) -> None:
    """Case does not matter, an exact spelling wins, and every directory that could match is searched."""
    directory = OllamaDirectory(tmp_path)
    for path in ("hf.co/User/Repo/Q8_0", "h/n/Foo/a", "h/n/foo/b", "h/n/m/X", "h/n/m/x"):
        directory.raw_manifest(path, b"")

    def located(text: str) -> ModelName | None:
        return locate(tmp_path, parse_name(text))

    assert located("HF.co/user/repo:q8_0") == parse_name("hf.co/User/Repo:Q8_0")
    assert located("h/n/FOO:A") == parse_name("h/n/Foo:a")
    assert located("h/n/FOO:B") == parse_name("h/n/foo:b")
    assert located("h/n/m:x") == parse_name("h/n/m:x")
    assert located("h/n/m:X") == parse_name("h/n/m:X")
    assert located("h/n/none:x") is None
    assert manifest_path(tmp_path, parse_name("h/n/m:x")) == tmp_path / "manifests/h/n/m/x"
