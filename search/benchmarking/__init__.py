"""Benchmarks: stock lm-eval tasks on several models at once. Import from the modules."""
