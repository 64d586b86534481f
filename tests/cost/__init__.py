"""Tests of wancli.cost."""
