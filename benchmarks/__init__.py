"""Scripts that measure wancli; not part of the package."""
