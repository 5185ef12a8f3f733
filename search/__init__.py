"""The composition root: command line, configuration, models, data, stages. Imports all, imported by none."""

from search.config import Config

__all__ = ["Config"]
