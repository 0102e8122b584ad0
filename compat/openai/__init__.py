"""The OpenAI dialect: chat completions, completions, embeddings, reranking and models (`spec/openai.md`).

Understood but not offered yet, and refused with a 400 that names the field: audio, remote images, custom tools, and the
legacy `functions` and `function_call`.

Deliberate divergences from OpenAI, each with its reason:

- A completion's `max_tokens` is unlimited by default, as in Ollama and llama.cpp; `max_tokens` and
  `max_completion_tokens` may both be given, as clients do that mean to work everywhere.
- Reasoning is shown as `reasoning_content` and `reasoning`, since clients read one or the other.
- A prompt that is too long is refused, and cut only on request: `truncate: true`, or Responses' `truncation: "auto"`.
  Then `usage` also has `truncated_tokens`, which is absent where nothing was cut.
- `service_tier: "flex"` and a list of prompts wait for everybody else, and a stream goes before what nobody reads yet.
- A completion model makes embeddings, the mean of its hidden states, where OpenAI has no such model and llama-server
  refuses. Embeddings of one text go before those of a list.
- `best_of` is at most what `n` may be, and kept choices come best first.
- An answer that `tool_choice` makes a call is one call, and comes whole when it is streamed; `response_format` says
  nothing of it.
- A token without text of its own, half a character or an end, is shown with the next text of its choice, or with the
  chunk that ends it. A log-probability that JSON cannot hold is -9999.

What other servers offer is understood in their words: llama.cpp's samplers, `n_probs`, `grammar`, `grammar_lazy` and
`grammar_triggers` (words only), vLLM's `guided_...` and `structured_outputs`, Ollama's `options`. A bias is from -100,
which bans, to 100 in llama.cpp's form too. Numbers out of range are refused, never moved to a bound. A constraint that
is no JSON Schema cannot be combined with tools, because it would leave no room to call one.
"""
