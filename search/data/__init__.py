"""Reads data packages and hub data sets, and turns them into items, prompts, splits and prose."""

__all__: list[str] = []
