"""Drives traces through an engine, hop by hop: specs, reports, admission, metrics."""
