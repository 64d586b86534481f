"""Batches of jobs: checked, named, and made by workers that share a ledger."""
