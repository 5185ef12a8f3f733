"""Turn a model name into a model in memory: sources, loading, architecture, devices, KV caches, chat."""

__all__: list[str] = []
