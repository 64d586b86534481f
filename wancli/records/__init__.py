"""Records of what was requested and what happened, progress events, and output names."""
