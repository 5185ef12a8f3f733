"""The order of a run: prepare, search, select, measure, repair, heal, finish."""

__all__: list[str] = []
