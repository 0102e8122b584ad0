"""A request's `options` to sampling and load options, no number out of bounds (`spec/ollama.md` section 3).

Names, types and error texts are `engines.options`'s. A number beyond what an engine can hold is moved to the bound, as
Ollama cuts it to a machine word.
"""

from __future__ import annotations

from collections.abc import Mapping

from engines.options import parse_load_options, parse_sampling
from engines.request import JSON, LoadOptions, Sampling

_INT32 = (-(2**31), 2**31 - 1)
_BOUNDS = {
    "seed": (-(2**63), 2**63 - 1),
    "num_batch": (1, 2**16),  # one buffer each
    "num_thread": (0, 1024),  # one thread each
}


def parse_options(options: Mapping[str, JSON]) -> tuple[Sampling, LoadOptions]:
    """Both halves of the options. Raises OptionTypeError, which answers 500."""
    bounded = {name: _bounded(name, value) for name, value in options.items()}
    return parse_sampling(bounded), parse_load_options(bounded)


def _bounded(name: str, value: JSON) -> JSON:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    low, high = _BOUNDS.get(name, _INT32)
    return max(low, min(value, high))
