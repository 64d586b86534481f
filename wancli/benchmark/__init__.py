"""A/B comparison of variants against a baseline: speed and quality, per prompt."""
