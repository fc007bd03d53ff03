"""`python -m vitdense ...` is `vitdense ...`."""

from __future__ import annotations

import sys

from vitdense.cli import main

if __name__ == "__main__":
    sys.exit(main())
