"""``python -m mlakit``: the same as the command ``mlakit``."""

from mlakit.cli import main

if __name__ == "__main__":
    main()
