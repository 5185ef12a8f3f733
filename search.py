"""The command line from a checkout: `python search.py --help`. All logic is in search/cli.py."""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    # Said before any import: from 3.14 on, `compression` is a package of the standard library and ours would shadow it.
    sys.exit(f"Chisel needs Python 3.11, 3.12 or 3.13, this is {sys.version.split()[0]}: `make setup` picks one")

try:
    from search.cli import main
except ModuleNotFoundError as missing:
    sys.exit(f"the module {missing.name!r} is not installed here: run `make setup`, then .venv/bin/python search.py")

if __name__ == "__main__":
    sys.exit(main())
