"""Wan video generation from the command line."""
