"""Modelfiles: read as Ollama reads them, written so that they are read back."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.store.modelfile import (
    COMMANDS,
    ROLES,
    Instruction,
    ModelfileError,
    parse_modelfile,
    parse_parameters,
    parse_requires,
    render_modelfile,
)

COMMAND_ERROR = (
    'command must be one of "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", '
    '"parameter", "message", or "requires"'
)

PRINTABLE = st.characters(exclude_categories=["C", "Z"], include_characters=" \t\n\r")


def is_writable(text: str) -> bool:
    """Whether quotes can hold it: none of its own three end a line, and none end it."""
    return '"""' not in text and not text.endswith('"')


texts = st.text(PRINTABLE, max_size=60).filter(is_writable)
lines = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters='"'), min_size=1, max_size=30)
names = st.from_regex(r"[A-Za-z0-9_]{1,20}", fullmatch=True)
plain = st.sampled_from([command for command in COMMANDS if command not in ("from", "parameter", "message")])
instructions = st.one_of(
    st.builds(Instruction, st.just("from"), lines),
    st.builds(Instruction, plain, texts),
    st.builds(Instruction, st.just("parameter"), texts, names),
    st.builds(Instruction, st.just("message"), texts, st.sampled_from(ROLES)),
)


@given(st.lists(instructions, max_size=8), lines)
def test_what_is_written_is_read_back(body: list[Instruction], base: str) -> None:
    """Any text that quotes can hold comes back as it was."""
    written = [Instruction("from", base), *body]
    assert list(parse_modelfile(render_modelfile(written).encode())) == written


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_a_modelfile_or_a_clear_error(data: bytes) -> None:
    """Nothing else is raised."""
    with suppress(ModelfileError):
        parse_modelfile(data)


def test_a_whole_file() -> None:
    """Comments, case, all forms of values, in any order."""
    text = '''# a comment
FROM  ./model.gguf
from proj.gguf
Parameter temperature 0.7
PARAMETER stop "<|end|>"
PARAMETER   stop   USER:
TEMPLATE """
{{ .Prompt }}"""
SYSTEM "two
lines" \t
MESSAGE user  hello: there
LICENSE """He said "hi".
"""
ADAPTER ./lora.gguf
RENDERER qwen3
REQUIRES 0.14.0'''
    assert parse_modelfile(text.encode()) == (
        Instruction("from", "./model.gguf"),
        Instruction("from", "proj.gguf"),
        Instruction("parameter", "0.7", "temperature"),
        Instruction("parameter", "<|end|>", "stop"),
        Instruction("parameter", "USER:", "stop"),
        Instruction("template", "\n{{ .Prompt }}"),
        Instruction("system", "two\nlines"),
        Instruction("message", "hello: there", "user"),
        Instruction("license", 'He said "hi".\n'),
        Instruction("adapter", "./lora.gguf"),
        Instruction("renderer", "qwen3"),
        Instruction("requires", "0.14.0"),
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(encoding: str, newline: str) -> None:
    """A byte order mark says how the text is encoded; any line end ends a line."""
    data = newline.join(["FROM a", "SYSTEM grüß dich"]).encode(encoding)
    assert parse_modelfile(data) == (Instruction("from", "a"), Instruction("system", "grüß dich"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no FROM line"),
        ("# FROM a", "no FROM line"),
        ("SYSTEM x", "no FROM line"),
        ("FROM", "unexpected EOF"),
        ("FROM a\nPARAMETER stop", "unexpected EOF"),
        ("FROM a\nPARAMETER stop\n", "unexpected EOF"),
        ("FROM a\nPARAMETER num-ctx 1", "unexpected EOF"),
        ('FROM a\nSYSTEM "open', "unexpected EOF"),
        ('FROM a\nSYSTEM """open"', "unexpected EOF"),
        ('FROM a\nSYSTEM """""', "unexpected EOF"),
        ("FROM a\nMESSAGE user", "unexpected EOF"),
        ("FRM a", f"(line 1): {COMMAND_ERROR}"),
        ("FROM\n", f"(line 2): {COMMAND_ERROR}"),
        ("FROM a\n\nS5 x", f"(line 3): {COMMAND_ERROR}"),
        ("FROM a\n{}", f"(line 2): {COMMAND_ERROR}"),
        ("FROM a\nMESSAGE bob hi", '(line 2): message role must be one of "system", "user", or "assistant"'),
        ("FROM a\nMESSAGE USER hi", '(line 2): message role must be one of "system", "user", or "assistant"'),
    ],
)
def test_what_is_no_modelfile(text: str, message: str) -> None:
    """The errors are Ollama's, with its line numbers."""
    with pytest.raises(ModelfileError) as error:
        parse_modelfile(text.encode())
    assert error.value.message == message


def test_parameters_have_the_types_that_options_have() -> None:
    """Stop strings gather, of all others the last counts, deprecated ones are left out."""
    said = [("num_ctx", "2048"), ("temperature", "1"), ("stop", "a"), ("stop", "b"), ("use_mmap", "False")]
    said += [("num_ctx", "-4096"), ("mirostat", "2")]
    expected = {"num_ctx": -4096, "temperature": 1.0, "stop": ["a", "b"], "use_mmap": False}
    assert parse_parameters(said) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("num_ctx", "x", "invalid int value [x]"),
        ("num_ctx", "1.5", "invalid int value [1.5]"),
        ("temperature", "nan", "invalid float value [nan]"),
        ("use_mmap", "yes", "invalid bool value [yes]"),
        ("nonsense", "1", "unknown parameter 'nonsense'"),
    ],
)
def test_bad_parameters(name: str, text: str, message: str) -> None:
    """The errors are Ollama's."""
    with pytest.raises(ModelfileError) as error:
        parse_parameters([(name, text)])
    assert error.value.message == message


def test_versions() -> None:
    """A leading v is allowed and dropped; what is no version is refused."""
    assert [parse_requires(text) for text in ("v0.14.0", "1", "1.2.3-rc.1+x")] == ["0.14.0", "1", "1.2.3-rc.1+x"]
    for text in ("", "x", "1.2.3.4", "01.2", "1.2-rc"):
        with pytest.raises(ModelfileError, match="requires must be a valid semver"):
            parse_requires(text)


def test_a_long_text_takes_no_time() -> None:
    """Ten megabytes of lines are read in one pass."""
    text = 'FROM a\nSYSTEM """' + "word word\n" * 1_000_000 + '"""'
    assert len(parse_modelfile(text.encode())[1].argument) == 10_000_000
