"""Defines the torch modules that hold factors, the routes that compute them, and the planner that chooses a route."""

__all__: list[str] = []
