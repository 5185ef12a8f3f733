"""Data packages and hub sets become items, prompts, splits and prose."""

__all__: list[str] = []
