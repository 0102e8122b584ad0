from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import InvalidModelName
from engines.store.names import ModelName, parse_name, without_local


@pytest.mark.parametrize(
    ("text", "full", "display"),
    [
        ("llama3", "registry.ollama.ai/library/llama3:latest", "llama3:latest"),
        ("llama3:8b-Q4_K_M", "registry.ollama.ai/library/llama3:8b-Q4_K_M", "llama3:8b-Q4_K_M"),
        ("me/x:7b", "registry.ollama.ai/me/x:7b", "me/x:7b"),
        ("localhost:5000/a/b", "localhost:5000/a/b:latest", "localhost:5000/a/b:latest"),
        ("localhost:5000/a/b:c", "localhost:5000/a/b:c", "localhost:5000/a/b:c"),
        ("hf.co/U/R.GGUF:Q8_0", "hf.co/U/R.GGUF:Q8_0", "hf.co/U/R.GGUF:Q8_0"),
        ("host/library/m:t", "host/library/m:t", "host/library/m:t"),
        ("https://h/a/b", "h/a/b:latest", "h/a/b:latest"),
        ("  demo ", "registry.ollama.ai/library/demo:latest", "demo:latest"),
        ("registry.ollama.ai/library/m", "registry.ollama.ai/library/m:latest", "m:latest"),
        ("_m", "registry.ollama.ai/library/_m:latest", "_m:latest"),
        ("x:cloud", "registry.ollama.ai/library/x:cloud", "x:cloud"),
    ],
)
def test_names_are_completed_and_shortened(text: str, full: str, display: str) -> None:
    """Missing parts get their defaults, and the display name drops those that go without saying."""
    name = parse_name(text)
    assert (name.full, name.display) == (full, display)
    assert parse_name(name.display) == parse_name(name.full) == name


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "m:", ":t", "/m", "n/", "/n/m", "h//m", "//", ":", "/", "-m", ".m", "m:.t", "a.b/m", "hf.co/R"),
        *(
            "a/b/c/d",
            "m@sha256:" + "0" * 64,
            "h/na:me/m:t",
            "a b",
            "m\nx",
            "m\0",
            "é",
            "\N{KELVIN SIGN}",
            "..",
            "../m",
            "a/../m",
        ),
        *("../../etc/passwd", "a/b/..", "m:..", "m:a/b", "://a/b", "://h/a/b", "https:///a/b", "https://h/b", "m" * 81),
        *("m:" + "t" * 81, "n" * 81 + "/m", "h" * 351 + "/n/m", "a\\b", "~m", "m:x:y"),
    ],
)
def test_what_the_grammar_forbids_is_refused_as_typed(text: str) -> None:
    """Every malformed name raises, and the error keeps the text as it was typed."""
    with pytest.raises(InvalidModelName) as caught:
        parse_name(text)
    assert caught.value.name == text


def test_longest_parts_are_accepted() -> None:
    """Lengths are 350 for the host and 80 for the rest."""
    text = f"{'h' * 350}/{'n' * 80}/{'m' * 80}:{'t' * 80}"
    assert parse_name(text).full == text


@given(st.text() | st.text(alphabet="aA0_-.:/@~ \\\0é\n", max_size=20))
def test_no_text_makes_a_path_that_leaves_the_store(text: str) -> None:
    """Whatever is typed is refused or gives four plain path parts."""
    try:
        name = parse_name(text)
    except InvalidModelName:
        return
    path = PurePosixPath("manifests", *name.parts)
    assert len(path.parts) == 5
    assert not any(part.startswith(".") or "/" in part or "\0" in part for part in name.parts)
    assert parse_name(name.full) == name


def test_a_name_cannot_be_built_from_bad_parts() -> None:
    """The grammar holds for names made from directory entries too."""
    with pytest.raises(InvalidModelName):
        ModelName("host", "..", "m", "t")


@pytest.mark.parametrize(
    ("text", "bare"), [("x:local", "x"), (" x:8b:LOCAL ", "x:8b"), ("local", "local"), ("x:mylocal", "x:mylocal")]
)
def test_local_suffix_is_taken_off(text: str, bare: str) -> None:
    """Only a trailing `:local`, in any case, means this machine."""
    assert without_local(text) == bare
