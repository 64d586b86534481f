"""Settings, presets, and which layer of values wins."""
