"""Menus of options, the closed form, knapsack and prices."""

__all__: list[str] = []
