"""Exports the model of a run as a folder that others can load: weights, model card, standalone code, upload."""

__all__: list[str] = []
