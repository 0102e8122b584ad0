"""Dialects: Ollama, OpenAI and Docker Model Runner. Translation only; nothing here knows how models run."""
