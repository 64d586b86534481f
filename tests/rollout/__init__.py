"""Tests of wancli.rollout."""
