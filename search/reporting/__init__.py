"""Makes tables, charts and pages from plain values. Does not load models."""

__all__: list[str] = []
