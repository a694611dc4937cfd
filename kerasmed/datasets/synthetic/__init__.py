"""Synthetic data sets: real layouts with a planted, known signal."""
