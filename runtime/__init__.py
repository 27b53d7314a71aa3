"""The engine core: bytes, reads, cache, execution. Knows no model and no tokens of text."""
