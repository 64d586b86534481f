"""Tests of wancli.records."""
