"""Who is asking, from the headers that clients really send and from those that they should not."""

import ipaddress
import shutil
import subprocess
from collections.abc import Sequence

import httpx
import ollama
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from engines.request import Origin, Trust
from gateway.cli.client import Client as CliClient
from gateway.origin import (
    KNOWN_CLIENTS,
    MAX_NAME_CHARS,
    OriginResolver,
    client_family,
    parse_assertion,
    render_origin,
)

SURFACE = "ollama/completion"
PROXY = "10.0.0.1"
STRANGER = "192.0.2.7"


def resolver(*networks: str) -> OriginResolver:
    """One that trusts these networks, or the proxies' when there is none."""
    return OriginResolver([ipaddress.ip_network(network) for network in networks or ("10.0.0.0/8", "fd00::/8")])


def headers(*pairs: tuple[str, str]) -> Headers:
    """Headers as they come from the wire, duplicates included."""
    return Headers(raw=[(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs])


def agent(text: str) -> Headers:
    """Headers with that User-Agent."""
    return headers(("User-Agent", text))


USER_AGENTS = {
    "ollama-python/0.6.3 (x86_64 linux) Python/3.11.7": "ollama-python",
    "ollama-js/0.5.14 (x64 linux Node.js/v20.11.0)": "ollama-js",
    "ollama-js/0.5.14 (browser Mozilla/5.0 (X11; Linux x86_64))": "ollama-js",
    "ollama/0.9.0 (amd64 linux) Go/go1.24": "ollama-cli",
    "OpenAI/Python 1.99.9": "openai-python",
    "AsyncOpenAI/Python 1.99.9": "openai-python",
    "OpenAI/JS 5.0.1": "openai-node",
    "Anthropic/Python 0.40.0": "anthropic-sdk",
    "AsyncAnthropic/Python 0.40.0": "anthropic-sdk",
    "Anthropic/JS 0.52.0": "anthropic-sdk",
    "claude-cli/1.0.60 (external, cli)": "claude-code",
    "codex_cli_rs/0.20.0 (Linux 6.1; x86_64)": "codex",
    "GitHubCopilotChat/0.26.7": "copilot",
    "Zed/0.190.6 (linux; x86_64)": "zed",
    "opencode/0.5.1 ai-sdk/openai-compatible/1.0.7 runtime/bun/1.2.21": "opencode",
    "ai-sdk/openai-compatible/1.0.7 runtime/node/22": "ai-sdk",
    "ai/5.0.8 ai-sdk/provider-utils/3.0.2": "ai-sdk",
    "litellm/1.74.0": "litellm",
    "headwater/cli": "headwater",
    "curl/8.5.0": "curl",
    "Wget/1.21.4": "wget",
    "python-httpx/0.28.1": "httpx",
    "python-requests/2.32.3": "requests",
    "Python/3.11 aiohttp/3.11.11": "aiohttp",
    "node": "node",
    "node-fetch/1.0 (+https://github.com/bitinn/node-fetch)": "node",
    "undici": "node",
    "Go-http-client/1.1": "go-http",
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/126.0 Safari/537.36": "browser",
    "myxai/3": "unknown",
    "not-curl/1": "unknown",
    "": "unknown",
    "é\x85" * 10_000: "unknown",
}


@pytest.mark.parametrize(("user_agent", "client"), USER_AGENTS.items(), ids=lambda text: text[:40] or "none")
def test_clients_are_told_by_their_user_agent(user_agent: str, client: str) -> None:
    """Each by what it really sends."""
    assert client_family(agent(user_agent)) == client


def test_the_installed_clients_are_known() -> None:
    """The User-Agents of the real packages, as these versions send them."""
    assert client_family(Headers(dict(ollama.Client()._client.headers))) == "ollama-python"
    assert client_family(agent(openai.OpenAI(api_key="none").user_agent)) == "openai-python"
    assert client_family(agent(openai.AsyncOpenAI(api_key="none").user_agent)) == "openai-python"
    assert client_family(Headers(dict(httpx.Client().headers))) == "httpx"
    with CliClient("http://127.0.0.1:1") as cli:
        assert client_family(Headers(dict(cli._http.headers))) == "headwater"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_installed_curl_is_known() -> None:
    """By the version that it prints, which is what it sends."""
    version = subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    assert client_family(agent(f"curl/{version}")) == "curl"


def test_open_webui_is_told_by_its_own_headers() -> None:
    """Its calls go through aiohttp, which says nothing of it."""
    sent = headers(("User-Agent", "Python/3.11 aiohttp/3.11.11"), ("X-OpenWebUI-User-Id", "1"))
    assert client_family(sent) == "open-webui"


@pytest.mark.parametrize(("title", "client"), [("Cline", "cline"), ("Roo Code", "roo-code"), ("Aider", "aider")])
def test_applications_on_an_sdk_are_told_by_their_title(title: str, client: str) -> None:
    """The application, not the library below it."""
    assert client_family(headers(("User-Agent", "OpenAI/JS 5.0.1"), ("X-Title", title))) == client


def test_an_unknown_title_falls_back_to_the_user_agent() -> None:
    """A title that says nothing hides nothing."""
    assert client_family(headers(("User-Agent", "OpenAI/JS 5.0.1"), ("X-Title", "My App"))) == "openai-node"


def test_without_anything_the_caller_is_derived() -> None:
    """Client and address; it works with no keys and no client changes."""
    resolved = resolver().resolve(SURFACE, STRANGER, agent("curl/8.5.0"))
    assert resolved.origin == Origin(SURFACE, f"curl@{STRANGER}", "curl", "", Trust.DERIVED)
    assert resolved.peer == STRANGER
    assert not resolved.dropped_assertion


@pytest.mark.parametrize("peer", [None, "", "testclient", "local socket"])
def test_a_peer_without_an_address_is_local(peer: str | None) -> None:
    """A Unix socket has none, and is trusted no more than others."""
    resolved = resolver("0.0.0.0/0", "::/0").resolve(SURFACE, peer, headers(("X-Request-Origin", "alice")))
    assert resolved.origin.caller == "unknown@local"
    assert resolved.dropped_assertion


def test_a_stranger_cannot_say_who_it_is() -> None:
    """The header is dropped and flagged, and so is what goes with it."""
    sent = headers(
        ("X-Request-Origin", f'{SURFACE}; caller="alice"; client="zed"; user="ann"'),
        ("X-Forwarded-For", "198.51.100.1"),
        ("X-OpenWebUI-User-Email", "ann@example.com"),
    )
    resolved = resolver().resolve(SURFACE, STRANGER, sent)
    assert resolved.origin == Origin(SURFACE, f"open-webui@{STRANGER}", "open-webui")
    assert resolved.peer == STRANGER
    assert resolved.dropped_assertion


def test_nobody_is_trusted_by_default() -> None:
    """Not even this machine."""
    resolved = OriginResolver().resolve(SURFACE, "127.0.0.1", headers(("X-Request-Origin", "alice")))
    assert resolved.origin.caller == "unknown@127.0.0.1"
    assert resolved.dropped_assertion


def test_a_trusted_peer_is_believed_but_never_about_the_surface() -> None:
    """The surface is what the route is."""
    sent = headers(("X-Request-Origin", 'openai/chat; caller="alice"; client="zed"; user="ann"; trust="verified"'))
    resolved = resolver().resolve(SURFACE, PROXY, sent)
    assert resolved.origin == Origin(SURFACE, "alice", "zed", "ann", Trust.VOUCHED)
    assert not resolved.dropped_assertion


def test_a_trusted_peer_may_name_the_caller_alone() -> None:
    """The short form; the client is still told by its User-Agent."""
    sent = headers(("X-Request-Origin", "alice"), ("User-Agent", "curl/8.5.0"))
    assert resolver().resolve(SURFACE, PROXY, sent).origin == Origin(SURFACE, "alice", "curl", "", Trust.VOUCHED)


def test_a_trusted_user_interface_names_its_user() -> None:
    """Open WebUI forwards the e-mail address of whoever is logged in."""
    sent = headers(("X-OpenWebUI-User-Email", "ann@example.com"))
    origin = resolver().resolve(SURFACE, PROXY, sent).origin
    assert origin == Origin(SURFACE, f"open-webui@{PROXY}", "open-webui", "ann@example.com", Trust.DERIVED)


def test_an_asserted_client_outside_the_list_is_unknown() -> None:
    """Client values come from a closed list, whoever says them."""
    sent = headers(("X-Request-Origin", 'x; caller="alice"; client="my-own-thing"'))
    assert resolver().resolve(SURFACE, PROXY, sent).origin.client == "unknown"


MALFORMED = (
    "",
    "   ",
    "al\x00ice",
    "al\x85ice",
    "al\x9bice",
    "alice\\",
    '"alice"',
    "a" * (MAX_NAME_CHARS + 1),
    ";",
    "x; caller=alice",
    'x; caller="al\x7fice"',
    'x; caller="a\\"b"',
    'x; caller=""',
    'x; CALLER="alice"',
    'x; caller="a;b"',
)


@pytest.mark.parametrize("value", MALFORMED)
def test_what_is_malformed_says_nothing(value: str) -> None:
    """Even from a trusted peer: it is not guessed at, and it is flagged."""
    resolved = resolver().resolve(SURFACE, PROXY, headers(("X-Request-Origin", value)))
    assert resolved.origin == Origin(SURFACE, f"unknown@{PROXY}")
    assert resolved.dropped_assertion


def test_an_assertion_without_a_caller_is_still_used() -> None:
    """What it does say is believed and not flagged."""
    resolved = resolver().resolve(SURFACE, PROXY, headers(("X-Request-Origin", 'x; user="ann"')))
    assert resolved.origin == Origin(SURFACE, f"unknown@{PROXY}", user="ann")
    assert not resolved.dropped_assertion


def test_an_assertion_that_is_there_twice_says_nothing() -> None:
    """A proxy that adds its own header instead of replacing the client's would let the client's win."""
    sent = headers(("X-Request-Origin", "mallory"), ("X-Request-Origin", "alice"))
    resolved = resolver().resolve(SURFACE, PROXY, sent)
    assert resolved.origin.caller == f"unknown@{PROXY}"
    assert resolved.dropped_assertion
    sent = headers(("X-OpenWebUI-User-Email", "mallory@x"), ("X-OpenWebUI-User-Email", "ann@x"))
    assert resolver().resolve(SURFACE, PROXY, sent).origin.user == ""


FORWARDED: Sequence[tuple[str, list[str], str]] = [
    ("one hop", ["198.51.100.1"], "198.51.100.1"),
    ("a chain of trusted proxies", ["198.51.100.1, 10.0.0.3, 10.0.0.2"], "198.51.100.1"),
    ("what is left of a stranger is its own invention", ["203.0.113.9, 198.51.100.1, 10.0.0.2"], "198.51.100.1"),
    ("several lines are one list", ["203.0.113.9", "198.51.100.1", "10.0.0.2"], "198.51.100.1"),
    ("all of them trusted", ["10.0.0.9, 10.0.0.2"], "10.0.0.9"),
    ("no header", [], PROXY),
    ("an empty one", [""], PROXY),
    ("not an address", ["unknown"], PROXY),
    ("garbage behind a trusted hop", ["<script>, 10.0.0.2"], "10.0.0.2"),
    ("with a port", ["198.51.100.1:4711"], "198.51.100.1"),
    ("IPv6", ["2001:db8::1"], "2001:db8::1"),
    ("IPv6 in brackets", ["[2001:db8::1]:4711"], "2001:db8::1"),
    ("IPv6 through IPv6", ["2001:DB8:0::1, fd00::2"], "2001:db8::1"),
    ("IPv4 written as IPv6", ["::ffff:198.51.100.1"], "198.51.100.1"),
    ("a trusted one written as IPv6", ["198.51.100.1, ::ffff:10.0.0.2"], "198.51.100.1"),
    ("a scope that is no address", ['fe80::1%"; user="ann'], "fe80::1"),
    ("half a bracket", ["[2001:db8::1"], PROXY),
    ("behind the bracket", ["[2001:db8::1]x"], PROXY),
    ("a port that is none", ["198.51.100.1:http"], PROXY),
    ("octal", ["198.051.100.1"], PROXY),
    ("a name", ["client.example.com"], PROXY),
]


@pytest.mark.parametrize(("lines", "address"), [row[1:] for row in FORWARDED], ids=[row[0] for row in FORWARDED])
def test_forwarded_addresses_are_read_from_right_to_left_through_trusted_proxies(
    lines: list[str], address: str
) -> None:
    """The first that is not trusted is the client; malformed ones end the search."""
    resolved = resolver().resolve(SURFACE, PROXY, headers(*(("X-Forwarded-For", line) for line in lines)))
    assert resolved.peer == address
    assert resolved.origin.caller == f"unknown@{address}"


@pytest.mark.parametrize(
    ("peer", "shown"),
    [("::1", "::1"), ("::ffff:192.0.2.7", "192.0.2.7"), ("fe80::1%eth0", "fe80::1"), ("2001:DB8::1", "2001:db8::1")],
)
def test_peers_are_shown_in_one_spelling(peer: str, shown: str) -> None:
    """So that one machine is one caller."""
    assert resolver().resolve(SURFACE, peer, headers()).peer == shown


def test_networks_hold_for_mapped_addresses_and_their_own_family_only() -> None:
    """A dual-stack socket shows IPv4 peers as IPv6."""
    sent = headers(("X-Request-Origin", "alice"))
    assert resolver("10.0.0.0/8").resolve(SURFACE, "::ffff:10.0.0.1", sent).origin.caller == "alice"
    assert resolver("10.0.0.0/8").resolve(SURFACE, "fd00::1", sent).dropped_assertion
    assert resolver("::/0").resolve(SURFACE, "10.0.0.1", sent).dropped_assertion
    assert resolver("fd00::/8").resolve(SURFACE, "fd00::1", sent).origin.caller == "alice"


# Anything that can stand in a header as the server hands it over: any byte.
_values = st.text(st.characters(max_codepoint=255), max_size=300)
_names = st.sampled_from(
    ["x-request-origin", "x-forwarded-for", "x-openwebui-user-email", "user-agent", "x-title", "x-real-ip", "forwarded"]
)
_wire = st.lists(st.tuples(_names, _values), max_size=6).map(lambda pairs: headers(*pairs))
_hostile = st.sampled_from(
    ['x; caller="', '"; user="', "caller=", "10.0.0.1, ", "%", "[", "\r\n", "\x9b", "alice", "é"]
)
_assertions = st.lists(st.one_of(_hostile, _values), max_size=6).map("".join)


def assert_sendable(text: str) -> None:
    """The text can be a header's value, and nothing but one."""
    text.encode("latin-1")
    assert text == text.strip()
    assert not any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in text)


@given(_wire)
def test_no_header_of_a_stranger_changes_its_caller(sent: Headers) -> None:
    """All that it can choose is which of the known clients it looks like."""
    resolved = resolver().resolve(SURFACE, STRANGER, sent)
    assert resolved.origin.client in KNOWN_CLIENTS | {"unknown"}
    assert resolved.origin == Origin(SURFACE, f"{resolved.origin.client}@{STRANGER}", resolved.origin.client)
    assert resolved.peer == STRANGER
    assert resolved.dropped_assertion == ("x-request-origin" in sent)
    assert_sendable(render_origin(resolved.origin))


@given(_wire, _assertions, _assertions)
def test_whatever_a_trusted_peer_says_the_origin_can_be_sent(sent: Headers, assertion: str, forwarded: str) -> None:
    """Its names are bounded, and none of them can end the header or speak to a terminal."""
    more = headers(*sent.items(), ("x-request-origin", assertion), ("x-forwarded-for", forwarded))
    origin = resolver().resolve(SURFACE, PROXY, more).origin
    assert origin.surface == SURFACE
    assert origin.client in KNOWN_CLIENTS | {"unknown"}
    assert len(origin.caller) <= MAX_NAME_CHARS + 20
    assert len(origin.user) <= MAX_NAME_CHARS
    assert_sendable(render_origin(origin))


# Names as `resolve` lets them through.
_callers = (
    st.text(st.characters(min_codepoint=0x20, max_codepoint=255), min_size=1, max_size=MAX_NAME_CHARS)
    .map(str.strip)
    .filter(lambda text: parse_assertion(text) == {"caller": text})
)


@given(_callers, st.sampled_from(sorted(KNOWN_CLIENTS)), st.one_of(st.just(""), _callers))
def test_a_rendered_origin_is_read_back_as_it_was(caller: str, client: str, user: str) -> None:
    """One gateway behind another keeps who asked."""
    origin = Origin(SURFACE, caller, client, user, Trust.VOUCHED)
    said = parse_assertion(render_origin(origin))
    assert said == {"caller": caller, "client": client} | ({"user": user} if user else {})
    resolved = resolver().resolve(SURFACE, PROXY, headers(("X-Request-Origin", render_origin(origin))))
    assert resolved.origin == origin
