"""Go's text/template, as Ollama's TEMPLATE layers are written in it (`spec/ollama.md` section 8)."""
