"""Generators of the sample data, one module per task."""
