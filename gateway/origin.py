"""Who is asking, and how sure are we (`design.md` section 4).

Pure: from a peer address, headers and a route's surface to an Origin. The rule that matters: what a client says about
itself is believed only when its peer is a trusted proxy, so nobody can book usage on someone else's name. Malformed
input is never guessed at.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers

from engines.request import Origin, Trust
from engines.wire import ORIGIN_HEADER

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

UNKNOWN = "unknown"
MAX_NAME_CHARS = 128
_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\"\\;]+")
_ADDRESS = re.compile(
    r"(?:\[(?P<bracketed>[0-9a-fA-F:.]+)(?:%[^\]]*)?\]|(?P<bare>[0-9.]+))(?::[0-9]{1,5})?"
    r"|(?P<ipv6>[0-9a-fA-F:.]+)(?:%.*)?"
)
_PARAMETER = re.compile(r';\s*(?P<key>[a-z]+)="(?P<value>[^"\\\x00-\x1f\x7f]*)"')
_CLIENTS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        # Applications before the libraries they are built on.
        ("open-webui", r"open-?webui"),
        ("continue", r"\bcontinue(dev)?/"),
        ("cline", r"\bcline\b"),
        ("roo-code", r"\broo[- ]?code\b"),
        ("aider", r"\baider\b"),
        ("opencode", r"\bopencode\b"),
        ("zed", r"^zed/"),
        ("copilot", r"GitHubCopilotChat"),
        ("codex", r"codex[_-]"),
        ("claude-code", r"claude-(cli|code)"),
        ("langchain", r"langchain"),
        ("llama-index", r"llama.?index"),
        ("litellm", r"litellm"),
        ("ai-sdk", r"\bai-sdk/|\bai/\d"),
        ("headwater", r"^headwater/"),
        ("docker-model", r"docker-model"),
        ("ollama-python", r"ollama-python"),
        ("ollama-js", r"ollama-js"),
        ("ollama-cli", r"^ollama/"),
        ("openai-python", r"OpenAI/Python"),
        ("openai-node", r"OpenAI/JS|openai-node"),
        ("anthropic-sdk", r"Anthropic/(Python|JS)"),
        ("curl", r"^curl/"),
        ("wget", r"^wget/"),
        ("httpx", r"python-httpx/"),
        ("requests", r"python-requests/"),
        ("aiohttp", r"aiohttp/"),
        ("node", r"^node(-fetch)?\b|undici"),
        ("go-http", r"Go-http-client"),
        ("browser", r"^Mozilla/"),
    )
)


def client_family(headers: Headers) -> str:
    """The software family, from a closed list; `unknown` for everything else.

    Open WebUI calls through aiohttp and shows itself by its own headers; Cline and others that sit on an SDK name
    themselves in `X-Title`.
    """
    if any(name.startswith("x-openwebui-") for name in headers):
        return "open-webui"
    for text in (headers.get("x-title", ""), headers.get("user-agent", "")):
        for name, pattern in _CLIENTS:
            if pattern.search(text[:512]):
                return name
    return UNKNOWN


@dataclass(frozen=True, slots=True)
class Resolved:
    """An origin, the address it was resolved to, and whether an assertion was dropped on the way."""

    origin: Origin
    peer: str
    dropped_assertion: bool


class OriginResolver:
    """Turns what a connection shows into an Origin.

    Args:
        trusted: peers that may forward addresses and assert who is asking.
    """

    def __init__(self, trusted: Sequence[Network] = ()) -> None:
        self._trusted = tuple(trusted)

    def resolve(self, surface: str, peer: str | None, headers: Headers) -> Resolved:
        """The origin of one request.

        `surface` is what the route is; `peer` the address of the other end of the connection, None for a Unix socket.
        """
        client = client_family(headers)
        vouches = self._is_trusted(peer)
        address = self._forwarded_for(peer, headers) if vouches else _printable(peer)
        is_asserted = ORIGIN_HEADER in headers
        if not vouches:
            derived = Origin(surface, f"{client}@{address}", client)
            return Resolved(derived, address, dropped_assertion=is_asserted)
        said = parse_assertion(_said_once(headers, ORIGIN_HEADER))
        user = said.get("user") or _clean(_said_once(headers, "x-openwebui-user-email"))
        client = said.get("client") or client
        if client != UNKNOWN and client not in KNOWN_CLIENTS:
            client = UNKNOWN
        if caller := said.get("caller"):
            return Resolved(Origin(surface, caller, client, user, Trust.VOUCHED), address, dropped_assertion=False)
        derived = Origin(surface, f"{client}@{address}", client, user)
        return Resolved(derived, address, dropped_assertion=is_asserted and not said)

    def _is_trusted(self, peer: str | None) -> bool:
        address = _address(peer or "")
        return address is not None and any(
            address in network for network in self._trusted if network.version == address.version
        )

    def _forwarded_for(self, peer: str | None, headers: Headers) -> str:
        """`X-Forwarded-For` from right to left through trusted proxies only; the first other address is the client."""
        hops = [hop.strip() for line in headers.getlist("x-forwarded-for") for hop in line.split(",")]
        nearest = _printable(peer)
        for hop in reversed(hops):
            address = _address(hop)
            if address is None:
                return nearest
            nearest = str(address)
            if not self._is_trusted(nearest):
                return nearest
        return nearest


KNOWN_CLIENTS = frozenset(name for name, _ in _CLIENTS)


def parse_assertion(value: str) -> dict[str, str]:
    """What a trusted peer says in `X-Request-Origin`.

    Either a bare name, which is the caller, or our own form as `render_origin` writes it, whose surface is ignored:
    the surface is ours to set. Anything malformed says nothing.
    """
    name, separator, rest = value.strip().partition(";")
    if not separator:
        return {"caller": name} if name == _clean(name) and name else {}
    parameters = {found["key"]: _clean(found["value"]) for found in _PARAMETER.finditer(";" + rest)}
    return {key: parameters[key] for key in ("caller", "client", "user") if parameters.get(key)}


def render_origin(origin: Origin) -> str:
    """The origin as an answer's header shows it: the surface, then the rest as parameters (RFC 9651)."""
    parts = {"caller": origin.caller, "client": origin.client, "user": origin.user, "trust": origin.trust.value}
    text = "; ".join([origin.surface, *(f'{key}="{_quoted(value)}"' for key, value in parts.items() if value)])
    return text.encode("latin-1", "replace").decode("latin-1")


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')


def _said_once(headers: Headers, name: str) -> str:
    """A header's value; empty when it is missing, or there twice and a proxy may have added its own to a client's."""
    values = headers.getlist(name)
    return values[0] if len(values) == 1 else ""


def _clean(text: str) -> str:
    """A name that can be stored, shown and sent: bounded, and without control characters or quoting trouble."""
    found = _NAME.fullmatch(text.strip()[:MAX_NAME_CHARS])
    return found[0].strip() if found else ""


def _address(text: str) -> Address | None:
    """An address, with or without a port; a scope (`%eth0`) says nothing to others and may be any text."""
    found = _ADDRESS.fullmatch(text.strip())
    if found is None:
        return None
    try:
        address = ipaddress.ip_address(found["bracketed"] or found["bare"] or found["ipv6"])
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address


def _printable(peer: str | None) -> str:
    address = _address(peer or "")
    return str(address) if address else "local"
