"""What is answered to a registry that asks who we are."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import subprocess
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from hypothesis import given
from hypothesis import strategies as st
from registries import PASSWORD, Asked, Shelf, docker_login, pulled, reply, scripted, transfers
from token_server import certificate_of_nobody

from engines.errors import RegistryDenied, RegistryError
from engines.store.credentials import Credentials, docker_config_path, find_credentials
from engines.store.names import ModelName
from engines.store.registry import make_client
from engines.store.registry_auth import Challenge, parse_challenges
from engines.store.registry_keys import sign


@pytest.mark.parametrize(
    ("header", "challenges"),
    [
        ("", []),
        ("Basic", [Challenge("basic", {})]),
        ('Basic realm="a b"', [Challenge("basic", {"realm": "a b"})]),
        (
            'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push"',
            [
                Challenge(
                    "bearer",
                    {
                        "realm": "https://auth.docker.io/token",
                        "service": "registry.docker.io",
                        "scope": "repository:a/b:pull,push",
                    },
                )
            ],
        ),
        ('bearer REALM = "x" , service=y', [Challenge("bearer", {"realm": "x", "service": "y"})]),
        (r'Basic realm="a\"b\\c"', [Challenge("basic", {"realm": 'a"b\\c'})]),
        (
            'Basic realm="x", Bearer realm="y"',
            [Challenge("basic", {"realm": "x"}), Challenge("bearer", {"realm": "y"})],
        ),
        ('realm="no scheme"', []),
        ('Bearer realm="never closed', [Challenge("bearer", {})]),
        ('Bearer realm="first",realm="second"', [Challenge("bearer", {"realm": "first"})]),
    ],
)
def test_challenges_are_read(header: str, challenges: list[Challenge]) -> None:
    """In every form that RFC 9110 allows, and none that it does not."""
    found = parse_challenges(header)
    if "never closed" in header:
        assert found[0].scheme == "bearer"
        assert "realm" not in found[0].parameters
    else:
        assert found == challenges


@given(st.text(max_size=300) | st.text(alphabet='Bearer="\\, \t', max_size=300))
def test_no_header_breaks_the_reader(header: str) -> None:
    """Whatever a server sends."""
    for challenge in parse_challenges(header):
        assert challenge.scheme == challenge.scheme.lower() != ""


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.text(alphabet=st.characters(codec="ascii"))))
def test_quoted_parameters_come_back(parameters: dict[str, str]) -> None:
    """What is quoted as RFC 9110 quotes it is read as it was."""
    quoted = ",".join(
        '{}="{}"'.format(name, value.replace("\\", "\\\\").replace('"', '\\"')) for name, value in parameters.items()
    )
    if "\n" not in quoted:
        assert parse_challenges(f"Bearer {quoted}") == [Challenge("bearer", parameters)]


def test_a_header_of_quotes_is_read_quickly() -> None:
    """A hostile header costs no more than its length allows."""
    parse_challenges('\\"' * 50_000)
    parse_challenges('"' + '\\"' * 50_000)


@pytest.mark.parametrize(
    ("host", "key"),
    [
        ("registry.example:5000", "registry.example:5000"),
        ("registry.example", "https://registry.example"),
        ("registry.example", "https://registry.example/v1/"),
        ("docker.io", "https://index.docker.io/v1/"),
        ("docker.io", "docker.io"),
    ],
)
def test_docker_logins_are_found(tmp_path: Path, host: str, key: str) -> None:
    """Under each spelling that Docker and its relatives use."""
    path = docker_login(tmp_path, key, "ann", "pass:word")
    assert find_credentials(path, host) == Credentials("ann", "pass:word")
    assert find_credentials(path, "other.example") is None


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"auths":{"h":{"auth":"%%%"}}}', '{"auths":{"h":{"auth":"bm9jb2xvbg=="}}}', '{"auths":{"h":{}}}'],
)
def test_a_config_that_makes_no_sense_has_no_logins(tmp_path: Path, content: str) -> None:
    """It is no reason for a pull to fail."""
    path = tmp_path / "config.json"
    assert find_credentials(path, "h") is None
    path.write_text(content)
    assert find_credentials(path, "h") is None


def test_docker_says_where_its_config_is() -> None:
    """DOCKER_CONFIG names the directory."""
    assert docker_config_path({"DOCKER_CONFIG": "/x"}) == Path("/x/config.json")
    assert docker_config_path({}) == Path.home() / ".docker/config.json"


def test_a_missing_key_is_made_as_ollama_makes_it(tmp_path: Path) -> None:
    """In OpenSSH's form, for its owner only, with the public half beside it, and kept from then on."""
    path = tmp_path / "new" / "id_ed25519"
    key, _, signature = sign(path, "text").partition(":")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes().startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    line = path.with_name("id_ed25519.pub").read_bytes()
    assert line.split()[1].decode() == key
    public = load_ssh_public_key(line)
    assert isinstance(public, Ed25519PublicKey)
    public.verify(base64.b64decode(signature), b"text")
    assert sign(path, "text") == f"{key}:{signature}"


@pytest.mark.parametrize(
    "content", [b"", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n"]
)
def test_a_key_that_is_none_is_told(tmp_path: Path, content: bytes) -> None:
    """With its path."""
    path = tmp_path / "id_ed25519"
    path.write_bytes(content)
    with pytest.raises(RegistryError, match="id_ed25519 cannot be used"):
        sign(path, "text")


async def test_ollamas_registry_gets_a_signed_request(tmp_path: Path) -> None:
    """The token is asked for with the key over method, address and the hash of nothing (section 10.1)."""
    shelf = Shelf(b"weights")

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        host = asked.headers["host"]
        if asked.target.startswith("/token"):
            key, _, signature = asked.headers["authorization"].partition(":")
            public = load_ssh_public_key(f"ssh-ed25519 {key}".encode())
            assert isinstance(public, Ed25519PublicKey)
            empty = base64.b64encode(hashlib.sha256(b"").hexdigest().encode()).decode()
            public.verify(base64.b64decode(signature), f"GET,http://{host}{asked.target},{empty}".encode())
            query = parse_qs(urlsplit(asked.target).query)
            assert query["service"] == [host]
            assert query["scope"] == ["repository:library/m:pull", "other"]
            assert query["ts"][0].isdigit()
            assert len(base64.urlsafe_b64decode(query["nonce"][0] + "==")) == 16
            return reply(writer, 200, json.dumps({"token": "signed"}).encode())
        if asked.headers.get("authorization") != "Bearer signed":
            challenge = f'Bearer realm="http://{host}/token",service="{host}",scope="repository:library/m:pull other"'
            return reply(writer, 401, www_authenticate=challenge)
        return await shelf.answer(asked, writer)

    async with scripted(answer) as server, transfers(tmp_path) as mine:
        said = await pulled(mine, ModelName(server.address, "library", "m", "latest"))
    assert said[-1].status == "success"
    assert sum(target.startswith("/token") for target in server.targets()) == 1


async def test_nothing_is_signed_for_another_host(tmp_path: Path) -> None:
    """A realm elsewhere is asked without our key, and gets no password that is not for the registry."""

    async def tokens(asked: Asked, writer: asyncio.StreamWriter) -> None:
        reply(writer, 200, b'{"access_token":"anonymous"}')

    async with scripted(tokens) as elsewhere, transfers(tmp_path) as mine:

        async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
            if asked.headers.get("authorization") != "Bearer anonymous":
                return reply(writer, 401, www_authenticate=f'Bearer realm="http://{elsewhere.address}/"')
            return await Shelf(b"weights").answer(asked, writer)

        async with scripted(answer) as server:
            await pulled(mine, ModelName(server.address, "library", "m", "latest"))
    assert elsewhere.asked
    assert all("authorization" not in asked.headers for asked in elsewhere.asked)
    assert not (tmp_path / "id_ed25519").exists()


async def test_a_registry_that_does_not_know_signatures_is_asked_without(tmp_path: Path) -> None:
    """A token server of Docker's kind on the registry's own host refuses the signature and gives a token to anybody."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        authorization = asked.headers.get("authorization", "")
        if asked.target.startswith("/token"):
            return reply(writer, 401) if authorization else reply(writer, 200, b'{"token":"t"}')
        if authorization != "Bearer t":
            return reply(writer, 401, www_authenticate=f'Bearer realm="http://{asked.headers["host"]}/token"')
        return await Shelf(b"weights").answer(asked, writer)

    async with scripted(answer) as server, transfers(tmp_path) as mine:
        await pulled(mine, ModelName(server.address, "library", "m", "latest"))


@pytest.mark.parametrize(
    ("realm", "kind"),
    [
        ("", RegistryError),
        ("file:///etc/passwd", RegistryError),
        ("not an address", RegistryError),
        ("http://127.0.0.1:1/", RegistryError),
    ],
)
async def test_realms_that_are_none_are_told(tmp_path: Path, realm: str, kind: type[Exception]) -> None:
    """And nothing is sent there."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        reply(writer, 401, www_authenticate=f'Bearer realm="{realm}"')

    async with scripted(answer) as server, transfers(tmp_path) as mine:
        with pytest.raises(kind):
            await pulled(mine, ModelName(server.address, "library", "m", "latest"))


@pytest.mark.parametrize("token", [b"", b"[]", b"{}", b'{"token":"a\\r\\nX-Evil: 1"}', b" " * 3_000_000])
async def test_tokens_that_are_none_are_told(tmp_path: Path, token: bytes) -> None:
    """A token is one word; what is longer, larger or something else never reaches a header."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        if asked.target.startswith("/token"):
            return reply(writer, 200, token)
        assert "x-evil" not in asked.headers
        return reply(writer, 401, www_authenticate=f'Bearer realm="http://{asked.headers["host"]}/token"')

    async with scripted(answer) as server, transfers(tmp_path) as mine:
        with pytest.raises(RegistryError):
            await pulled(mine, ModelName(server.address, "library", "m", "latest"))


async def test_a_password_goes_to_its_registry_only(tmp_path: Path) -> None:
    """Basic authentication without a login for this very registry is a refusal."""

    async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
        assert "authorization" not in asked.headers
        reply(writer, 401, www_authenticate='Basic realm="x"')

    login = docker_login(tmp_path, "other.example", "ann", PASSWORD)
    async with scripted(answer) as server, transfers(tmp_path, docker_config=login) as mine:
        with pytest.raises(RegistryDenied):
            await pulled(mine, ModelName(server.address, "library", "m", "latest"))
    assert len(server.asked) == 1


def test_ssh_keygens_keys_are_good(tmp_path: Path) -> None:
    """A key that OpenSSH made is used; one with a passphrase is told."""
    for passphrase in ("", "secret"):
        path = tmp_path / f"key{passphrase}"
        done = subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", str(path)], check=False, capture_output=True
        )
        if done.returncode:
            pytest.skip("OpenSSH is not installed")
        if passphrase:
            with pytest.raises(RegistryError, match="cannot be used"):
                sign(path, "text")
        else:
            assert sign(path, "text").partition(":")[0] in path.with_suffix(".pub").read_text()


async def test_a_certificate_of_nobody_is_good_enough_only_where_that_is_allowed(tmp_path: Path) -> None:
    """`insecure` takes https with any certificate before it takes http; without it the pull fails."""
    tls = certificate_of_nobody(tmp_path)
    async with scripted(Shelf(b"weights").answer, tls) as server, transfers(tmp_path) as mine:
        name = ModelName(server.address, "library", "m", "latest")
        with pytest.raises(RegistryError, match="certificate verify failed"):
            await pulled(mine, name, insecure=False)
        assert server.asked == []
        await pulled(mine, name)


async def test_a_redirect_from_https_to_http_is_refused_unless_http_is_allowed(tmp_path: Path) -> None:
    """Nobody on the way gets to see what was to be secret."""
    shelf = Shelf(b"weights")

    async def store(asked: Asked, writer: asyncio.StreamWriter) -> None:
        shelf.send_blob(asked, writer, shelf.blobs[asked.target.rpartition("/")[2]])

    async with scripted(store) as storage:

        async def answer(asked: Asked, writer: asyncio.StreamWriter) -> None:
            if "/blobs/" in asked.target:
                return reply(writer, 307, location=f"http://{storage.address}/{asked.target.rpartition('/')[2]}")
            return await shelf.answer(asked, writer)

        tls = certificate_of_nobody(tmp_path)
        async with scripted(answer, tls) as server, transfers(tmp_path) as mine:
            name = ModelName(server.address, "library", "m", "latest")
            mine._clients[False] = make_client("ollama/0", verify=False)  # as if an authority had signed it
            with pytest.raises(RegistryError, match="where we do not go"):
                await pulled(mine, name, insecure=False)
            assert storage.asked == []
            await pulled(mine, name)
