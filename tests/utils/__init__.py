"""Tests of wancli.utils."""
