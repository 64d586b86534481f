"""Parameters, FLOPs, bytes and seconds of a request, and whether it fits a machine."""
