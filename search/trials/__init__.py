"""The loop that asks an agent, evaluates and tells it; the journal and the choice of the best."""

__all__: list[str] = []
