"""`tools/train.py ...` is `vitdense train ...`, also where vitdense is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vitdense.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
