"""Autoregressive rollout: chunk after chunk on a rolling KV cache, streamed into one video."""
