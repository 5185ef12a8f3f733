"""A run becomes a folder that others load: weights, model card, standalone code, upload."""

__all__: list[str] = []
