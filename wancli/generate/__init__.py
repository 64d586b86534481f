"""Generate clips with diffusers' pipelines: encode, denoise, decode, write, record."""
