"""Worker-side recording of traces, in terms of this package's own records."""
