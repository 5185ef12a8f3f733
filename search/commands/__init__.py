"""Commands: one module for each, with `run(words) -> exit code`; `search.cli` imports the one it runs."""

__all__: list[str] = []
