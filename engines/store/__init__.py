"""Models on disk, in the very directory and form that Ollama uses, so that both can share one."""
