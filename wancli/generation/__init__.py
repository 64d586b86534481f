"""Clips by diffusers' pipelines: flow matching, noise, prompts, denoising, video and record."""
