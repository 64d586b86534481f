"""Tests of wancli.benchmark."""
