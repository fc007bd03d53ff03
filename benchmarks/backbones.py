"""Which timm family takes what: build every model on the meta device and run it at two sizes.

    python -m benchmarks.backbones            # writes the table of docs/backbones.md

Nothing is downloaded and no memory is used, so models of any size take a second each.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import timm
import torch

from vitdense.backbones.timm import TimmBackbone

HERE = Path(__file__).parent
RECTANGLE, SMALL = (256, 320), (137, 201)
OPTIONS = {"patch_size": 8, "checkpointing": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "backbones.md")
    parser.add_argument("--json", type=Path, help="also write what was found about each model")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("timm").setLevel(logging.ERROR)
    families = json.loads((HERE / "families.json").read_text())
    results = {family: sweep(names_of(patterns)) for family, patterns in families.items()}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    page = arguments.page.read_text().split("<!-- table -->")[0] if arguments.page.exists() else ""
    arguments.page.write_text(page + "<!-- table -->\n" + table(results))


def names_of(patterns: list[str]) -> list[str]:
    """Models that match; a pattern with a tag of weights stands for itself."""
    found = [[p] if "." in p else timm.list_models(p) for p in patterns]
    return list(dict.fromkeys(name for names in found for name in names))


def sweep(names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        with torch.device("meta"):
            row = {"model": name, **examine(name)}
            if name == names[0]:
                row |= {option: works(name, **{option: on}) for option, on in OPTIONS.items()}
        rows.append(row)
        print(rows[-1], flush=True)
    return rows


def examine(name: str) -> dict[str, Any]:
    """What one model serves, after running it at two sizes, one of them an odd rectangle."""
    try:
        backbone = TimmBackbone(model=name)
    except ValueError as error:
        return {"error": str(error)}
    default = backbone.canvas
    if default.fixed:
        try:
            backbone = TimmBackbone(model=name, img_size=RECTANGLE)
        except ValueError as error:
            return {"sizes": f"{_text(default.step)} and smaller", "img_size": str(error)}
    for size in (RECTANGLE, SMALL):
        check(backbone, size)
    return {
        "levels": [[level.channels, level.stride] for level in backbone.levels],
        "sizes": "up to `img_size`" if default.fixed else f"any, in steps of {_text(default.step)}",
        "layers": max(backbone.layer_depths().values(), default=0),
    }


def check(backbone: TimmBackbone, size: tuple[int, int]) -> None:
    """Raise unless the maps are what the levels promise."""
    maps = backbone.eval()(torch.empty(1, 3, *size))
    for feature, level in zip(maps, backbone.levels, strict=True):
        grid = tuple(math.ceil(side / level.stride) for side in size)
        if tuple(feature.shape) != (1, level.channels, *grid):
            raise AssertionError(f"{backbone.name} at {size}: {tuple(feature.shape)}, not {level}")


def works(name: str, **option: Any) -> bool:
    """Whether the backbone can be built with the option."""
    try:
        return bool(TimmBackbone(model=name, **option).levels)
    except ValueError:
        return False


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| family | models | input sizes | strides | `patch_size` | `checkpointing` | layers |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, rows in results.items():
        served = [row for row in rows if "error" not in row]
        if served:
            lines.append(_line(family, served))
    models = {row["model"] for rows in results.values() for row in rows if "error" not in row}
    lines += ["", f"{len(models)} models in all, with timm {timm.__version__}."]
    lines += ["", "## Refused", ""]
    for family, rows in results.items():
        if "error" in rows[0]:
            lines.append(f"- **{family}**: {rows[0]['error'].removeprefix('model: ')}")
    lines += ["", "## Models", ""]
    for family, rows in results.items():
        names = ", ".join(f"`{row['model']}`" for row in rows if "error" not in row)
        lines += [f"**{family}**: {names}", ""] if names else []
    return "\n".join(lines).rstrip() + "\n"


def _line(family: str, rows: list[dict[str, Any]]) -> str:
    sizes = _values(row["sizes"] for row in rows)
    full = [row for row in rows if "levels" in row]
    strides = _values(", ".join(dict.fromkeys(str(s) for _, s in row["levels"])) for row in full)
    layers = sorted({row["layers"] for row in full})
    depth = f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else "".join(map(str, layers))
    options = ["yes" if rows[0].get(option) else "no" for option in OPTIONS]
    cells = [sizes, strides, *options, depth]
    return f"| {family} | {len(rows)} | " + " | ".join(cell or "-" for cell in cells) + " |"


def _values(found: Any) -> str:
    return "; ".join(sorted(set(found), key=len))


def _text(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


if __name__ == "__main__":
    main()
