import struct
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_samples import FORMS, LLAMA, gguf, member, raw_gguf, small_llama, tensor, text

from engines.errors import GGUFParseError
from engines.model import TensorInfo
from engines.store.blobs import StoreUnreadable
from engines.store.gguf import GGUFHeader, Pooling, read_header

DEMO = Path(__file__).parents[3] / "engines/store/demo/demo.gguf"


def read(tmp_path: Path, data: bytes, *, arrays: bool = True) -> GGUFHeader:
    """The header of a file with this content."""
    path = tmp_path / "test.gguf"
    path.write_bytes(data)
    return read_header(path, arrays=arrays)


def test_demo_header_says_what_the_model_is() -> None:
    """Metadata, arrays and tensors of the real model are read in full."""
    header = read_header(DEMO)
    assert (header.version, header.architecture, header.file_type) == (3, "llama", "Q8_0")
    assert (header.num_parameters, header.parameter_size) == (2742720, "2.74M")
    assert header.count("context_length") == 4096
    assert header.metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-05
    assert header.metadata["tokenizer.ggml.add_bos_token"] is False
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 1984
    assert header.metadata["tokenizer.ggml.tokens"][1973] == "<|im_start|>"
    assert header.tensors[0] == TensorInfo("token_embd.weight", "Q8_0", (192, 1984))
    assert {tensor.type for tensor in header.tensors} == {"Q8_0", "F32"}


def test_arrays_can_be_left_out() -> None:
    """Without arrays everything else is the same."""
    whole, short = read_header(DEMO), read_header(DEMO, arrays=False)
    assert short.metadata["tokenizer.ggml.tokens"] is None
    scalars = {key: value for key, value in whole.metadata.items() if not isinstance(value, list)}
    assert {key: value for key, value in short.metadata.items() if value is not None} == scalars
    assert short.tensors == whole.tensors


@pytest.mark.parametrize(
    ("pooling", "head", "expected"),
    [
        (None, False, Pooling.UNSAID),
        (0, False, Pooling.NONE),
        (3, False, Pooling.LAST),
        (4, False, Pooling.RANK),
        (None, True, Pooling.RANK),
        (1, True, Pooling.MEAN),
        (99, False, Pooling.UNSAID),
    ],
)
def test_pooling_is_what_is_said_or_what_a_ranking_head_shows(
    tmp_path: Path, pooling: int | None, head: bool, expected: Pooling
) -> None:
    """Rerankers are often converted without a word about it."""
    says = {} if pooling is None else {"llama.pooling_type": ("u32", pooling)}
    tensors = [tensor("cls.output.weight", (4, 1))] if head else []
    assert read(tmp_path, gguf(LLAMA | says, tensors, bytes(32 * head))).pooling is expected


def test_every_value_type_is_read(tmp_path: Path) -> None:
    """Scalars and arrays of all types come back as they were written, in file order."""
    values: dict[str, Any] = {kind: 1 if form not in "fd?" else form == "?" or 0.5 for kind, form in FORMS.items()}
    members: dict[str, tuple[str, Any]] = {f"one.{kind}": (kind, value) for kind, value in values.items()}
    members |= {f"many.{kind}": (f"[{kind}]", [value, value]) for kind, value in values.items()}
    members |= {"s": ("str", "ö\0"), "ss": ("[str]", ["a", "", "ü"]), "none": ("[u8]", []), "low": ("i8", -1)}
    for version in (2, 3):
        header = read(tmp_path, gguf(members, version=version))
        expected = {key: value for key, (_, value) in members.items()}
        assert header.metadata == expected
        assert list(header.metadata) == list(expected)


@pytest.mark.parametrize("number", [1e-5, 1e-6, 0.1, 10000.0, 1e6, 3.4028234663852886e38, -0.0, float("inf")])
def test_floats_have_no_more_digits_than_they_need(tmp_path: Path, number: float) -> None:
    """A 32-bit float reads as the decimal it was written from."""
    value = read(tmp_path, gguf({"f": ("f32", number)})).metadata["f"]
    assert struct.pack("<f", value) == struct.pack("<f", number)
    assert len(repr(value)) <= len(repr(number))


def test_text_that_is_not_utf8_is_kept_readable(tmp_path: Path) -> None:
    """Bad bytes in values, which real vocabularies have, become U+FFFD."""
    header = read(tmp_path, gguf({"t": ("[str]", [b"a\xff"]), "s": ("str", b"\xfe")}))
    assert header.metadata == {"t": ["a\N{REPLACEMENT CHARACTER}"], "s": "\N{REPLACEMENT CHARACTER}"}


@pytest.mark.parametrize(
    ("number", "size"),
    [
        *((0, "0"), (999, "999"), (12345, "12K"), (567_754_752, "567.75M"), (7_000_000, "7M"), (3_212_749_888, "3.2B")),
        *((7_000_000_000, "7B"), (7_000_100_000, "7.0B")),
    ],
)
def test_parameter_size_is_written_for_people(number: int, size: str) -> None:
    """Thousands have no digits, millions two, billions one, and whole numbers none."""
    assert GGUFHeader(3, {}, (), number).parameter_size == size


@pytest.mark.parametrize(
    ("number", "name"), [(0, "unknown"), (1, "F16"), (15, "Q4_K_M"), (40, "Q1_0"), (99, "unknown")]
)
def test_file_type_is_named(number: float, name: str) -> None:
    """The table is Ollama's, which reads zero as not said."""
    assert GGUFHeader(3, {"general.file_type": number}, (), 0).file_type == name


def test_odd_metadata_gives_no_facts() -> None:
    """Values of an unexpected type count as absent."""
    header = GGUFHeader(3, {"general.architecture": 7, "general.file_type": "x", "unknown.context_length": [1]}, (), 0)
    assert (header.architecture, header.file_type, header.count("context_length")) == ("unknown", "unknown", 0)


HUGE = (1 << 64) - 1


@pytest.mark.parametrize(
    ("data", "words", "offset"),
    [
        (b"", "magic number", 0),
        (b"GG", "magic number", 0),
        (b"PK\3\4 a zip file", "not a GGUF file", 0),
        (b"GGUF", "the version", 4),
        (b"GGUF" + struct.pack(">I", 3), "big-endian", 4),
        (b"GGUF" + struct.pack("<I", 1), "version 1 is not supported", 4),
        (b"GGUF" + struct.pack("<I", 9), "version 9 is not supported", 4),
        (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), f"a list of {HUGE} tensors", 16),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), f"a list of {HUGE} metadata keys", 24),
        (raw_gguf([struct.pack("<Q", HUGE) + bytes(64)]), "a metadata key of", 32),
        (raw_gguf([struct.pack("<Q", 60000) + bytes(64)]), "a metadata key needs 60000 bytes", 32),
        (raw_gguf([member(b"\xff", "u8", 1)]), "is not UTF-8", 33),
        (raw_gguf([member("k", "u8", 1), member("k", "u8", 2)]), "appears twice", 47),
        (raw_gguf([text("k") + struct.pack("<I", 13)]), "unknown value type 13", 37),
        (raw_gguf([text("k") + struct.pack("<IQ", 8, HUGE)]), f"needs {HUGE} bytes", 45),
        (raw_gguf([text("k") + struct.pack("<IIQ", 9, 9, 1)]), "array of arrays", 41),
        (raw_gguf([text("k") + struct.pack("<IIQ", 9, 77, 1)]), "unknown value type 77", 41),
        (raw_gguf([text("k") + struct.pack("<IIQ", 9, 10, HUGE)]), "values in 'k'", 49),
        (raw_gguf([text("k") + struct.pack("<IIQ", 9, 8, HUGE)]), "strings in 'k'", 49),
        (raw_gguf([text("k") + struct.pack("<IIQQ", 9, 8, 1, HUGE)]), "runs past the end", 57),
        (raw_gguf([text("k") + struct.pack("<IIQ", 9, 8, 2) + text("a" * 8) + b"cut"])[:68], "ends within 'k'", 65),
        (raw_gguf([], [tensor("t", ()), tensor("t", ())]), "appears twice", 58),
        (raw_gguf([], [tensor("t", (1,) * 5)]), "5 dimensions", 37),
        (raw_gguf([], [tensor("t", (HUGE, HUGE))]), "impossibly large", 57),
        (raw_gguf([], [tensor("t", (8,))], bytes(31)), "cut short: its tensors end at byte 96", 95),
        (raw_gguf([], [tensor("t", (8,), offset=HUGE)], bytes(32)), "cut short", 96),
        (raw_gguf([member("general.alignment", "u32", 0)], [tensor("t", (8,))], bytes(32)), "alignment", None),
        (raw_gguf([member("general.alignment", "str", "x")], [tensor("t", (8,))], bytes(32)), "alignment", None),
    ],
)
def test_damaged_files_are_refused_with_the_byte(tmp_path: Path, data: bytes, words: str, offset: int | None) -> None:
    """Every kind of damage is named, together with where it was met."""
    for arrays in (True, False):
        with pytest.raises(GGUFParseError) as caught:
            read(tmp_path, data, arrays=arrays)
        assert words in str(caught.value)
        assert offset is None or caught.value.offset == offset


def test_a_tensor_type_from_the_future_is_listed_as_unknown(tmp_path: Path) -> None:
    """A new quantization does not make the header unreadable."""
    header = read(tmp_path, gguf(LLAMA, [tensor("t", (1 << 20,), kind=1000)]))
    assert header.tensors == (TensorInfo("t", "unknown", (1 << 20,)),)


def test_missing_weights_are_noticed(tmp_path: Path) -> None:
    """The real model without its last byte is no model."""
    with pytest.raises(GGUFParseError, match="cut short"):
        read(tmp_path, DEMO.read_bytes()[:-1])


def test_a_file_that_cannot_be_opened_is_a_clear_error(tmp_path: Path) -> None:
    """A missing file or a directory is no damaged GGUF."""
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(StoreUnreadable, match="cannot read"):
            read_header(path)


def test_long_names_do_not_make_long_messages(tmp_path: Path) -> None:
    """An error quotes no more than a few words of a hostile file."""
    with pytest.raises(GGUFParseError) as caught:
        read(tmp_path, raw_gguf([text("k" * 60000) + struct.pack("<I", 13)]))
    assert len(str(caught.value)) < 400


def test_headers_are_limited_in_size(tmp_path: Path) -> None:
    """A sparse file of a terabyte that claims one endless array is refused without reading it."""
    path = tmp_path / "huge.gguf"
    path.write_bytes(raw_gguf([text("k") + struct.pack("<IIQ", 9, 0, 1 << 39)]))
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(GGUFParseError, match="values in 'k'"):
        read_header(path)


def test_large_vocabularies_are_quick(tmp_path: Path) -> None:
    """150 000 tokens and as many merges take well under a second, and less when they are skipped."""
    tokens = [f"token{number}" for number in range(150_000)]
    data = gguf({"tokens": ("[str]", tokens), "merges": ("[str]", tokens), "scores": ("[f32]", [0.0] * 150_000)})
    start = time.perf_counter()
    assert read(tmp_path, data).metadata["tokens"] == tokens
    assert read(tmp_path, data, arrays=False).metadata["tokens"] is None
    assert time.perf_counter() - start < 1


SMALL = gguf(
    {**LLAMA, "t": ("[str]", ["a", "bc"]), "n": ("[u16]", [1, 2, 3]), "f": ("f32", 0.5), "b": ("bool", True)},
    [tensor("token_embd.weight", (4, 2)), tensor("output.weight", (32, 1), kind=8, offset=32)],
    bytes(66),
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file to write over and over."""
    return tmp_path_factory.mktemp("gguf") / "fuzzed.gguf"


def check_harmless(path: Path, data: bytes) -> None:
    """Reading gives a header that can be used, or GGUFParseError at a byte of the file."""
    path.write_bytes(data)
    for arrays in (True, False):
        failed_at = 0
        try:
            header = read_header(path, arrays=arrays)
            msgspec.json.encode(
                [header.metadata, header.tensors, header.num_parameters, header.count("context_length")]
            )
            assert header.architecture is not None
            assert header.file_type
            assert header.parameter_size
        except GGUFParseError as error:
            failed_at = error.offset if error.offset is not None else -1
        assert 0 <= failed_at <= len(data)


@settings(max_examples=500)
@given(changes=st.dictionaries(st.integers(0, len(SMALL) - 1), st.integers(0, 255), max_size=8))
def test_flipped_bytes_never_do_worse_than_a_parse_error(scratch: Path, changes: dict[int, int]) -> None:
    """Any bytes of a valid file may be anything."""
    data = bytearray(SMALL)
    for position, byte in changes.items():
        data[position] = byte
    check_harmless(scratch, bytes(data))


@settings(max_examples=300)
@given(position=st.integers(0, len(SMALL) - 8), number=st.integers(0, HUGE), length=st.integers(0, len(SMALL)))
def test_huge_numbers_and_cuts_never_do_worse_than_a_parse_error(
    scratch: Path, position: int, number: float, length: int
) -> None:
    """Any eight bytes may be any number, and the file may end anywhere."""
    data = SMALL[:position] + struct.pack("<Q", number) + SMALL[position + 8 :]
    check_harmless(scratch, data)
    check_harmless(scratch, data[:length])


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    """A file that ends early is refused wherever it ends, except in the padding after the last tensor."""
    for length in range(len(SMALL)):
        with pytest.raises(GGUFParseError):
            read(tmp_path, SMALL[:length])
    assert read(tmp_path, SMALL).num_parameters == 40
    assert read(tmp_path, small_llama()).num_parameters == 8
