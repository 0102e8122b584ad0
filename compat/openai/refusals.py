"""The refusals that this dialect makes itself, with OpenAI's codes (`spec/openai.md` section 2.1)."""

from __future__ import annotations

from engines.errors import BadRequest, UnsupportedFeature


def missing(path: str) -> BadRequest:
    """A required field is absent or null."""
    return BadRequest(f"Missing required parameter: '{path}'.", param=path, reason="missing_required_parameter")


def invalid_type(path: str, expected: str, got: str) -> BadRequest:
    """A field has the wrong JSON type."""
    return BadRequest(f"Invalid type for '{path}': expected {expected}, got {got}.", param=path, reason="invalid_type")


def invalid(path: str, why: str, reason: str = "invalid_value") -> BadRequest:
    """A field has the right type and an impossible value."""
    return BadRequest(f"Invalid '{path}': {why}.", param=path, reason=reason)


def unsupported_parameter(path: str) -> UnsupportedFeature:
    """A field is understood, but nothing here can honour it."""
    return UnsupportedFeature(
        f"Unsupported parameter: '{path}' is not offered here.", param=path, reason="unsupported_parameter"
    )


def unsupported_value(path: str, why: str) -> UnsupportedFeature:
    """A field is honoured, but not with this value."""
    return UnsupportedFeature(f"Unsupported value for '{path}': {why}.", param=path, reason="unsupported_value")
