"""Flow matching and its noise: maths only."""
