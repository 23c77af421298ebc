"""From a finished completion to a trace plan, and from measured scores to the response object."""
