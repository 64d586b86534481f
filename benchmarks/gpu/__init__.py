"""Measures wancli on a GPU: kernels, blocks, denoiser, VAE and whole rollouts.

`make bench-gpu`, or `python -m benchmarks.gpu --seconds 480 --out FILE.json`.
"""
