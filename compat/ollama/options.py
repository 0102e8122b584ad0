"""A request's `options` to sampling and load options (`spec/ollama.md` section 3).

Names, types, bounds and error texts are `engines.options`'s.
"""

from __future__ import annotations

from collections.abc import Mapping

from engines.options import parse_load_options, parse_sampling
from engines.request import JSON, LoadOptions, Sampling


def parse_options(options: Mapping[str, JSON]) -> tuple[Sampling, LoadOptions]:
    """Both halves of the options. Raises OptionTypeError, which answers 500."""
    return parse_sampling(options), parse_load_options(options)
