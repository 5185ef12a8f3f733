"""A name becomes a model in memory: sources, loading, architecture, devices, caches, chat."""

__all__: list[str] = []
