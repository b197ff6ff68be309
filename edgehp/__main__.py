"""``python -m edgehp``: the command line without its entry point."""

from __future__ import annotations

from edgehp.cli.main import main

if __name__ == "__main__":
    main()
