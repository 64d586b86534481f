"""Clips through diffusers' own pipelines: encode, denoise, decode, write, record."""
