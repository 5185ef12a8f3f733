"""Lets engines serve compressed folders: the model that they fill with weights, and a plug-in for vLLM."""

__all__: list[str] = []
