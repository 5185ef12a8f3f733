"""A schedule becomes a score. Knows no data set, no model source and no configuration."""

__all__: list[str] = []
