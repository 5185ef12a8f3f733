"""One matrix compressed at a time: sweeps and sensitivity traces."""

__all__: list[str] = []
