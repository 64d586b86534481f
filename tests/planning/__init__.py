"""Tests of wancli.planning."""
