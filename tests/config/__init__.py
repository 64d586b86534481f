"""Tests of wancli.config."""
