"""What this machine can run, tried and measured."""
