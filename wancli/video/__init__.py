"""Videos on disk: written, read back, compared."""
