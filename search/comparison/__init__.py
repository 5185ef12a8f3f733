"""Several agents at equal cost: the contest and its table."""

__all__: list[str] = []
