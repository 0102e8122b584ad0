"""The Ollama dialect: chat, generate, embeddings and models (`spec/ollama.md`), as Ollama 0.33.0 speaks it.

Understood but not offered yet, and refused with a 400 that says so: images in raw mode.

Deliberate divergences from Ollama, each with its reason:

- Models whose config names a renderer or a parser of Ollama's are rendered with their template all the same, and their
  replies read as it is written. A `template` in a request also says how the reply is read, and an over-long prompt of
  its may lose the model's own messages before it loses its middle.
- A tool in a Go template prints as JSON wherever it is printed whole, `.Function` and `.Parameters` too, as those
  templates mean it. A template may be as expensive as the limits of `engines.chat.meter`, and no more.
- A reply that begins like a tool call and is none is shown; Ollama drops it where calls have a word for a tag. A call
  without arguments is one.
- A gap is also filled by the tokens that a vocabulary has for it, where no template has `.Suffix`.
- All tool calls of an answer come on its last object, as in Ollama's native mode, whatever the template. A call whose
  arguments are no JSON has an empty object for arguments; Ollama fails the whole answer.
- An answer whose prompt was cut, or whose window moved on, says so on its last object: `truncated`, and
  `prompt_tokens_sent`, what the prompt was before it was cut. Other answers have neither.
- `truncate: false` and a prompt that is too long answers with the one text that Ollama has for it elsewhere.
- Numbers in `options` beyond a machine word are moved to the bound, threads and batch sizes to what a machine can bear,
  and `repeat_penalty` to what is above zero.
- llama.cpp's further samplers count in `options`: `mirostat`, `mirostat_tau`, `mirostat_eta`, `top_n_sigma`, `xtc_...`,
  `dry_...`, `dynatemp_...`, `ignore_eos` and `logit_bias`. Older Ollamas had some of them and today's ignores them all
  whatever they are, so that one with a wrong type or out of range is ignored here too.
- A completion model makes embeddings, the mean of its hidden states; Ollama loads it and then refuses. A request has
  16,384 texts at most. The old `/api/embeddings` looks for a model's name in any case of letters.
- `/api/tokenize` and `/api/detokenize` exist (`tokens.py` says in whose words). `options` count where the model has to
  be loaded; a model that is there for whatever purpose answers as it is.
- `/api/rerank` exists, and `rerank` is a capability, told instead of `embedding`, since a reranker makes no vectors.
- `create` keeps an uploaded GGUF as it is, where Ollama writes every one anew; only parts of a split model are written,
  as one file. It quantizes to more types than Ollama, and F32 weights that do not say so too. A chat template that is
  in the GGUF is used as it is, so none of Ollama's own is put in its place. Safetensors are refused with what to do.
- An uploaded blob with another digest than it should have is thrown away; Ollama keeps it under the digest it has.
- Models of Docker Model Runner and of plain folders are listed and served, but not changed: to copy, delete or build
  upon one is a 403 that says whose it is. A model whose manifest is damaged can be deleted.
- Token ids in `context` that are negative are refused at once; a null inside a list is refused instead of being empty.
- An unexpected exception is a 500 with `{"error":"internal server error"}` and not with an empty body, which clients
  cannot read.
- `insecure`, or `http://` before a name, allows plain http and any certificate where Ollama then speaks nothing but
  http: https is tried first. Passwords of `docker login` and mirrors are used, Docker Hub is found, and OCI manifests
  are taken.
- A stalled part of a pull is one of six failed tries, which count from the last byte that arrived. A push whose
  registry lost its place begins again instead of spoiling the blob.
- A push of an invalid name is a 400 and no line of a stream; one of a missing model, asked for in one piece, is a 404.
- Without a cloud, names that ask for it are refused as by an Ollama whose cloud is disabled, and so is every model that
  runs on another server (`remote_host` in its config), which is listed and shown all the same. None is made.
- `/api/me` tells that nobody is signed in without an address to do so at.
- Times of models and expiry have microseconds, not nanoseconds.
"""
