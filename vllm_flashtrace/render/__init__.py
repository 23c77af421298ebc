"""Heat-maps of attributions: HTML pages and terminal output."""
