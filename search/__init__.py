"""Composes the program: command line, configuration, models, data, pipeline. No other top-level package imports it."""

from search.config import Config

__all__ = ["Config"]
