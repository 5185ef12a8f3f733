"""Handles files, locks, signals, console output and provenance. Imports no other package of `search`."""

__all__: list[str] = []
