"""Flow matching, its schedulers and its noise."""
