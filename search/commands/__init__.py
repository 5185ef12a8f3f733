"""Commands: one module for each, with `run(words) -> exit code`; `search.cli` imports the one it runs."""

__all__ = ["COMMANDS"]


COMMANDS = (
    "search",
    "apply",
    "benchmark",
    "compare",
    "completion",
    "data",
    "doctor",
    "export",
    "generate",
    "heal",
    "prior",
    "profile",
    "push",
    "report",
    "resume",
)
"""Names of the modules in `search.commands`; the first is meant where none is named."""
