"""Benchmarks: stock lm-eval tasks on several models at once. Import from the modules."""

__all__: list[str] = []
