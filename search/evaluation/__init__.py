"""Turn schedules into scores. Does not know data sets, model sources or configurations."""

__all__: list[str] = []
