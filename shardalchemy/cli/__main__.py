"""``python -m shardalchemy.cli``, where the console script is not on the path."""

from __future__ import annotations

from shardalchemy.cli import main

if __name__ == "__main__":  # the demonstration's processes import this module again
    main()
