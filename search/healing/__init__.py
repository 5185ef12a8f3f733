"""Train a compressed model to match the dense model: text, teacher, training loop, stored weights."""

__all__: list[str] = []
