"""The demo: a question whose answer is hidden in a long context."""
