"""Builds menus of options per site and allocates a parameter budget over them: closed form, knapsack and prices."""

__all__: list[str] = []
