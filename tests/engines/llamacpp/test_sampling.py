from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import BadRequest
from engines.llamacpp.candidates import gather
from engines.llamacpp.context import Context, Logits
from engines.llamacpp.engine import DEFAULTS
from engines.llamacpp.model import Model
from engines.llamacpp.sampler import Sampler
from engines.llamacpp.sampling import CandidateChooser, ChainChooser, GreedyChooser, make_chooser, resolve_bias
from engines.request import Sampling

DEMO = Path(__file__).parents[3] / "engines/store/demo/demo.gguf"
NUM_CTX = 512


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """The demo model's vocabulary."""
    model = Model(DEMO, num_gpu=0)
    yield model
    model.close()


class Rows:
    """Stands for a context that has computed some rows of logits."""

    def __init__(self, *rows: Logits) -> None:
        self._rows = rows

    def logits(self, index: int) -> Logits:
        """One of the rows."""
        return self._rows[index]


def random_row(model: Model, seed: int) -> Logits:
    """Logits as a model gives them: a few high ones."""
    return np.random.default_rng(seed).gumbel(0, 2, model.num_tokens).astype(np.float32)


def chooser(model: Model, rows: Rows, sampling: Sampling, prompt: list[int], **more: Any) -> Any:
    """The chooser that the engine would use."""
    return make_chooser(model, cast(Context, rows), sampling.over(DEFAULTS), prompt, num_ctx=NUM_CTX, **more)


numbers = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.1, 2),
        "top_k": st.integers(1, 60),
        "top_p": st.floats(0.1, 1),
        "min_p": st.floats(0, 0.5),
        "typical_p": st.floats(0.2, 1),
        "repeat_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.7]),
        "xtc_probability": st.sampled_from([0.0, 0.5]),
        "dynatemp_range": st.sampled_from([0.0, 0.4]),
        "seed": st.integers(0, 2**31),
    }
)


@given(fields=numbers, seed=st.integers(0, 1000), bias=st.lists(st.integers(0, 1900), max_size=3, unique=True))
@settings(deadline=None)
def test_looking_at_the_likeliest_tokens_chooses_what_looking_at_all_does(
    model: Model, fields: dict[str, Any], seed: int, bias: list[int]
) -> None:
    """Penalties, biases and filters included, token for token."""
    sampling = Sampling(**fields).over(DEFAULTS)
    prompt = np.random.default_rng(seed).integers(0, model.num_tokens, 80).tolist()
    rows = Rows(*(random_row(model, seed + i) for i in range(4)))
    biased = [(token, 5.0) for token in bias]
    fast = make_chooser(model, cast(Context, rows), sampling, prompt, num_ctx=NUM_CTX, bias=biased)
    whole = Sampler(model, sampling, prompt, num_ctx=NUM_CTX, bias=biased)
    everything = np.arange(model.num_tokens)
    for index in range(4):
        assert fast.sample(index) == whole.choose(gather(rows.logits(index), everything))
    fast.close()
    whole.close()


@pytest.mark.parametrize(
    ("sampling", "kind"),
    [
        (Sampling(temperature=0), GreedyChooser),
        (Sampling(top_k=1), GreedyChooser),
        (Sampling(), CandidateChooser),
        (Sampling(temperature=0, repeat_penalty=1.1), CandidateChooser),
        (Sampling(temperature=0, xtc_probability=0.5), CandidateChooser),
        (Sampling(top_k=0), ChainChooser),
        (Sampling(top_n_sigma=1.0), ChainChooser),
        (Sampling(mirostat=2), ChainChooser),
        (Sampling(dry_multiplier=0.8), ChainChooser),
    ],
)
def test_each_sampling_has_its_chooser(model: Model, sampling: Sampling, kind: type) -> None:
    """The cheapest that gives the right answer."""
    assert isinstance(chooser(model, Rows(), sampling, [1, 2, 3]), kind)


def test_a_seed_gives_the_same_tokens_again(model: Model) -> None:
    """And another seed other ones."""
    rows = Rows(*(random_row(model, i) for i in range(20)))

    def say(seed: int) -> list[int]:
        made = chooser(model, rows, Sampling(seed=seed, temperature=2.0), [])
        tokens = [made.sample(index) for index in range(20)]
        made.close()
        return tokens

    assert say(7) == say(7) != say(8)


def test_a_bias_forces_and_bans(model: Model) -> None:
    """A token far down the row is chosen with a large bias, and the likeliest is not with -inf."""
    row = random_row(model, 3)
    least, best = int(row.argmin()), int(row.argmax())
    forced = chooser(model, Rows(row), Sampling(temperature=0), [], bias=[(least, 1000.0)])
    banned = chooser(model, Rows(row), Sampling(temperature=0), [], bias=[(best, -np.inf)])
    assert forced.sample(0) == least
    assert banned.sample(0) == int(np.argsort(row)[-2])


def test_a_text_is_biased_in_every_token(model: Model) -> None:
    """As llama-server reads it; what is said twice adds up."""
    tokens = model.tokenize("Paris", add_special=False, parse_special=True)
    bias = resolve_bias(model, Sampling(logit_bias=(("Paris", 2.0), (tokens[0], 1.0))))
    assert dict(bias) == dict.fromkeys(tokens, 2.0) | {tokens[0]: 3.0}


def test_ignoring_the_end_bans_every_token_that_ends(model: Model) -> None:
    """The demo model has two."""
    bias = resolve_bias(model, Sampling(ignore_eos=True))
    assert dict(bias) == {1972: -np.inf, 1974: -np.inf}


@pytest.mark.parametrize("token", [-1, 1984, 10**9])
def test_a_bias_on_no_token_is_refused(model: Model, token: int) -> None:
    """The field is named."""
    with pytest.raises(BadRequest, match="not in this model's vocabulary") as refusal:
        resolve_bias(model, Sampling(logit_bias=((token, 1.0),)))
    assert refusal.value.param == "logit_bias"
