"""Tests of wancli.rollouts."""
