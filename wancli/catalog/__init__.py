"""Known models: specs, architectures, tasks, geometry, local folders and the hub cache."""
