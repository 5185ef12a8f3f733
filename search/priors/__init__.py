"""Implements the JSON compression prior: format, versions, building, transfer to other models, text output."""

__all__: list[str] = []
