"""The commands, one module each with `run(words) -> exit code`. `search.cli` imports the one that it runs."""

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
"""Names of the modules in `search.commands`. The first one runs if no command is named."""
