"""Run stock lm-eval tasks on several models. Import from the modules."""

__all__: list[str] = []
