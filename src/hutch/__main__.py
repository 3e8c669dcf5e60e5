"""``python -m hutch``."""

import sys

from hutch.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
