"""Benchmarks: both sides in one run, medians, tables and JSON."""
