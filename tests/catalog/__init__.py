"""Tests of wancli.catalog."""
