"""llama.cpp as an engine: continuous batching over its low-level C API."""
