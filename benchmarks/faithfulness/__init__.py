"""Faithfulness of attributions: our variants against what else a user could run.

The command is ``python -m benchmarks.faithfulness --tasks ... --methods ... --json OUT``.
"""
