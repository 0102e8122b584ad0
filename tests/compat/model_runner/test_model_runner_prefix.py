from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from compat.model_runner.prefix import StripPrefix


async def stripped(path: str, raw_path: bytes | None, kind: str = "http") -> tuple[str, bytes | None]:
    """The paths that the app below the middleware sees."""
    seen: dict[str, Any] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.update(scope)

    scope = {"type": kind, "path": path, "raw_path": raw_path}
    await StripPrefix(app)(scope, None, None)  # type: ignore[arg-type]  # this app neither receives nor sends
    assert scope["path"] == path, "the server's own scope is left alone"
    return seen["path"], seen["raw_path"]


@pytest.mark.parametrize(
    ("path", "rest"),
    [
        ("/exp/vDD4.40/engines/v1/models", "/engines/v1/models"),
        ("/exp/vDD4.40/", "/"),
        ("/exp/vDD4.40", "/exp/vDD4.40"),
        ("/exp/vDD4.400/x", "/exp/vDD4.400/x"),
        ("/v1/models", "/v1/models"),
        ("/exp/vDD4.40/exp/vDD4.40/x", "/exp/vDD4.40/x"),
    ],
)
async def test_the_prefix_is_stripped_once_from_both_paths(path: str, rest: str) -> None:
    """Only as a whole path segment, and everything else passes."""
    assert await stripped(path, path.encode()) == (rest, rest.encode())


async def test_encoded_slashes_stay_encoded() -> None:
    """The raw path keeps what comes after the prefix as it was sent."""
    assert await stripped("/exp/vDD4.40/a/b", b"/exp/vDD4.40/a%2Fb") == ("/a/b", b"/a%2Fb")


async def test_a_scope_that_is_no_request_passes() -> None:
    """Lifespan has no path."""
    reached = False

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal reached
        reached = True

    await StripPrefix(app)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]  # never called
    assert reached
