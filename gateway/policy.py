"""What clients may choose of how a model is loaded and how long it stays: ceilings and pins.

Every option in `LoadOptions` is fixed when a model is loaded, so that a client who says another value than the one
before has the model loaded again under everybody. `LoadPolicy.apply` is where requests meet their model, whatever the
dialect: an option that is pinned is the model's own or the server's, as if the client had said nothing, and every
request for a model finds the runner that is there. Sending a model away is no option but a command, and stays one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

from engines.model import ModelCard
from engines.request import FOREVER, EmbedRequest, GenerateRequest, LoadOptions, RerankRequest, TokenizeRequest

Q = TypeVar("Q", GenerateRequest, EmbedRequest, RerankRequest, TokenizeRequest)

DEFAULT_NUM_CTX = 4096
MIN_NUM_CTX = 4

KEEP_ALIVE = "keep_alive"
PINNABLE = (*(field.name for field in dataclasses.fields(LoadOptions)), KEEP_ALIVE)


@dataclass(frozen=True, slots=True)
class LoadPolicy:
    """The server's word on how models are loaded.

    Attributes:
        num_ctx: window where neither request nor model says one; 0 lets us choose. max_num_ctx: the largest window of
            any request, 0 for no limit. max_keep_alive_s: how long an idle model stays at most.
        pinned: those of `PINNABLE` that a request cannot choose.
    """

    num_ctx: int = 0
    max_num_ctx: int = 0
    max_keep_alive_s: float = FOREVER
    pinned: frozenset[str] = frozenset()

    def apply(self, request: Q, card: ModelCard) -> Q:
        """The request with what the model says where the client may not or does not, within the ceilings."""
        said = dataclasses.replace(request.load, **dict.fromkeys(self.pinned - {KEEP_ALIVE}))
        load = said.over(card.load)
        if load.num_ctx is not None and self.max_num_ctx:
            load = dataclasses.replace(load, num_ctx=min(load.num_ctx, self.max_num_ctx))
        return dataclasses.replace(request, load=_settled(load), keep_alive_s=self._keep_alive(request.keep_alive_s))

    def _keep_alive(self, seconds: float | None) -> float | None:
        if seconds is None or KEEP_ALIVE in self.pinned:
            return None
        return min(seconds, self.max_keep_alive_s)

    def window(self, load: LoadOptions, card: ModelCard) -> int:
        """The window that a runner needs, at most what the model was trained with."""
        limits = [limit for limit in (self.max_num_ctx, card.context_length) if limit]
        return min([max(load.num_ctx or self.num_ctx or DEFAULT_NUM_CTX, MIN_NUM_CTX), *limits])


def _settled(load: LoadOptions) -> LoadOptions:
    """Without the values that mean what silence means: they are no reason to load a model again."""
    return dataclasses.replace(
        load,
        num_gpu=load.num_gpu if (load.num_gpu or 0) >= 0 else None,
        num_thread=load.num_thread or None,
    )
