"""Second moments, slopes and block-by-block streaming from a forward and backward pass."""

__all__: list[str] = []
