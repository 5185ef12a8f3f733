"""The JSON compression prior: format, versions, building, transfer to other models, text."""

__all__: list[str] = []
