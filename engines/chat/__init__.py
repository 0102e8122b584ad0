"""Prompt in, reply out, for every model family: templates, capabilities and reply parsers."""
