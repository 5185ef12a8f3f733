"""Measures the effect of compressing one matrix at a time: sweeps and sensitivity traces."""

__all__: list[str] = []
