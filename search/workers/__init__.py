"""Evaluators in other processes and on Ray."""

__all__: list[str] = []
