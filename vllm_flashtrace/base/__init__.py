"""What every other part builds on: errors, records, log lines and facts of the process."""

__version__ = "0.1.0"
