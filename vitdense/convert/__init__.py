"""Public weights into vitdense models: `vitdense convert`. family.py says how to add a family."""

from __future__ import annotations

from vitdense.convert.family import Family, Plan
from vitdense.convert.names import Weights, rename
from vitdense.convert.source import ConversionError, Source, read

__all__ = ["ConversionError", "Family", "Plan", "Source", "Weights", "read", "rename"]
