"""Tests of wancli.generate."""
