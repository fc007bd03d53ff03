"""YAML into checked, typed objects, with file and line for every problem."""

from __future__ import annotations

from vitdense.config.errors import ConfigError
from vitdense.config.loader import dump, load, loads
from vitdense.config.part import Part
from vitdense.config.schema import Config

__all__ = ["Config", "ConfigError", "Part", "dump", "load", "loads"]
