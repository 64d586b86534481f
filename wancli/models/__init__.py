"""Load, inspect, convert, offload and optimise models."""
