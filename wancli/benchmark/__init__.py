"""A/B comparison of variants against a baseline: wall time and quality, per prompt."""
