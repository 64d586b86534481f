"""Caches of one generation: attention keys and values, reused blocks and forwards."""
