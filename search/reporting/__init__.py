"""Tables, charts and pages, made from plain values. Knows no model and opens no run."""

__all__: list[str] = []
