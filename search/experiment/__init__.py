"""The model, data and statistics of one run, opened together."""

__all__: list[str] = []
