"""Training a compressed model towards the dense model: text, teacher, training, state."""

__all__: list[str] = []
