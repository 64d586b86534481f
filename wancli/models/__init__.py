"""Models as the runner needs them: loaded, checked, on their device."""
