"""Files, locks, signals, the console and provenance. Imports nothing else of the project."""

__all__: list[str] = []
