"""Tokens, characters and parts of a conversation: what to trace, and what the scores mean."""
