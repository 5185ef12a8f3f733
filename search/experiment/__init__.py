"""Open the model, data and statistics of a run together."""

__all__: list[str] = []
