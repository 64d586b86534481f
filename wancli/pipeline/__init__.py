"""The one runner: encode, denoise, decode, write, record."""
