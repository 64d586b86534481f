"""State that one forward leaves for the next: attention keys and values."""
