"""The OpenAI dialect: chat completions, completions and models (`spec/openai.md`).

Understood but not offered yet, and refused with a 400 that names the field: log-probabilities, `logit_bias`, `echo`,
`best_of` above 1, `suffix`, `grammar`, audio, remote images, a forced `tool_choice`, custom tools, and the legacy
`functions` and `function_call`.

Deliberate divergences from OpenAI: a completion's `max_tokens` is unlimited by default, as in Ollama and llama.cpp;
`max_tokens` and `max_completion_tokens` may both be given; reasoning is shown as `reasoning_content` and `reasoning`.
"""
