"""Benchmarks of every room against what users can write today. Not part of the installed package."""
