"""The Ollama dialect: chat, generate, models and what is loaded (`spec/ollama.md`), as Ollama 0.33.0 speaks it.

Understood but not offered yet, and refused with a 400 that says so: `logprobs`, `_debug_render_only`, a `template` in
the request, `suffix`, and images in raw mode.

Deliberate divergences from Ollama, each with its reason:

- A model's Go template is not rendered yet: the Jinja template in its GGUF is used, and ChatML where there is none.
  `show` names the template that Ollama would use, because clients look for `.Suffix` and `.Thinking` in it.
- All tool calls of an answer come on its last object, as in Ollama's native mode, since that is the mode we are in. A
  call whose arguments are no JSON has an empty object for arguments; Ollama fails the whole answer.
- `shift` has no effect: a full window ends the answer with `length` and forgets nothing on the way.
- `truncate: false` and a prompt that is too long answers with the one text that Ollama has for it elsewhere.
- Numbers in `options` beyond a machine word are moved to the bound, threads and batch sizes to what a machine can bear.
- Token ids in `context` that are negative are refused at once; a null inside a list is refused instead of being empty.
- An unexpected exception is a 500 with `{"error":"internal server error"}` and not with an empty body, which clients
  cannot read.
- Without a cloud, names that ask for it are refused as by an Ollama whose cloud is disabled.
- Times of models and expiry have microseconds, not nanoseconds.
"""
