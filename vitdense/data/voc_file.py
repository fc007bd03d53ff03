"""Pascal VOC's text and XML files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vitdense.data.base import DataError
from vitdense.data.images import inside
from vitdense.structures import Size

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element


class VocObject(NamedTuple):
    """One object; the box is xyxy, cut at the image's edges."""

    name: str
    box: list[float]
    difficult: bool


def read_split(root: Path, folder: str, split: str) -> list[str]:
    """Stems of the images that `folder`/`split`.txt lists; as `read_list`.

    In VOC's lists of one class a flag stands behind the stem.
    """
    return read_list(root, folder, split, first_word=True)


def read_list(root: Path, folder: str, split: str, first_word: bool = False) -> list[str]:
    """The lines of `folder`/`split`.txt, names of images, or the first word of each.

    Raises:
        DataError: there is no such file, it is no UTF-8, empty, or lists an image twice.
    """
    path = inside(root / folder, f"{split}.txt")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError:
        raise DataError(f"{path}: no such list of images; {list_splits(root, folder)}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    names = [line.strip() for line in lines if line.strip()]
    stems = [name.split()[0] for name in names] if first_word else names
    if not stems:
        raise DataError(f"{path}: lists no images")
    if len(set(stems)) < len(stems):
        twice = next(stem for stem, often in Counter(stems).items() if often > 1)
        raise DataError(f"{path}: lists '{twice}' twice; take one out")
    for stem in stems:
        if "/" in stem or "\\" in stem:
            raise DataError(f"{path}: '{stem}' must be the name of an image, without folders")
    return stems


def list_splits(root: Path, folder: str) -> str:
    """What splits there are instead, for a message."""
    found = sorted(path.stem for path in (root / folder).glob("*.txt"))
    if found:
        return f"there are the splits {', '.join(found)}"
    deeper = sorted(root.glob(f"*/{folder}")) or sorted(root.glob(f"*/*/{folder}"))
    if deeper:
        place = deeper[0].relative_to(root).as_posix().removesuffix(f"/{folder}")
        return f"set data.root to {root / place}"
    return f"the root must be a folder like VOC2012, with JPEGImages and {folder}"


def read_objects(path: Path, size: Size) -> list[VocObject]:
    """Objects of an XML file; boxes without area are left out.

    VOC counts pixels from 1 and names the last pixel of a box: 1, 1, 1, 1 is the first pixel.

    Args:
        size: (height, width) of the image.

    Raises:
        DataError: the file is missing, no XML, or an object has no name or box.
    """
    found = []
    for entry in _parse(path).iter("object"):
        try:
            name = (entry.findtext("name") or "").strip()
            corners = [float(entry.findtext(f"bndbox/{key}") or "") for key in _CORNERS]
        except ValueError:
            name = ""
        if not name:
            raise DataError(
                f"{path}: an object needs `name`, and `bndbox` with numbers {', '.join(_CORNERS)}"
            )
        x1, y1, x2, y2 = corners
        box = [max(0.0, x1 - 1), max(0.0, y1 - 1), min(x2, size[1]), min(y2, size[0])]
        if box[2] > box[0] and box[3] > box[1]:
            hard = (entry.findtext("difficult") or "0").strip() == "1"
            found.append(VocObject(name, box, hard))
    return found


def read_size(path: Path) -> Size | None:
    """(height, width) of the image that a file was made for; None if it does not tell.

    Raises:
        DataError: the file is missing or no XML.
    """
    root = _parse(path)
    sides = [(root.findtext(f"size/{key}") or "").strip() for key in ("height", "width")]
    if not all(side.isdecimal() and int(side) > 0 for side in sides):
        return None
    return int(sides[0]), int(sides[1])


def _parse(path: Path) -> Element:
    from xml.etree import ElementTree

    try:
        return ElementTree.parse(path).getroot()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: is not valid XML ({error})") from None


_CORNERS = ("xmin", "ymin", "xmax", "ymax")
