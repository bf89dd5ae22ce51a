"""How a data-set folder is laid out: which image is the clean twin of which, and where low resolution lies.

Layouts, in upper or lower case: a flat folder of clean images; `input/ target/` or `blur/ sharp/`, of any scale; for
super-resolution `HR/` beside `LR_bicubic/X4/`, `LR/x4/`, `LRx4/`, `LR_x4/` or `LR/` with the scale in the file names
(`001x4.png`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ens.data.images import READ_SUFFIXES, list_images, list_skipped, show_name

_PAIR_FOLDERS = (("input", "target"), ("blur", "sharp"))
_SR_LAYOUTS = "HR/ beside LR_bicubic/X{0}/, LR/x{0}/, LRx{0}/, LR_x{0}/ or LR/ with names like 001x{0}.png"
# As in DIV2K_train_HR, GTmod12; DIV2K_train_LR_bicubic, LRx4, LR_bicubic_X4, LRbicx4.
_HIGH = re.compile(r"(?:.*[_-])?(?:hr|gt|gtmod\d+)", re.IGNORECASE)
_LOW = re.compile(r"(?:.*[_-])?lr(?:bic|bicubic|[_-].*?)?(?:[_-]?x(?P<scale>\d+))?", re.IGNORECASE)
_SCALE = re.compile(r"x?(?P<scale>\d+)x?", re.IGNORECASE)
_NAME = re.compile(r"(?P<name>.+?)[_-]?x(?P<scale>\d+)", re.IGNORECASE)
_MAX_SHOWN = 10
BUILTIN = "builtin:"


class DataError(ValueError):
    """A data set that cannot be used; the message lists the first ten offenders."""


@dataclass(frozen=True)
class PairPath:
    """One image of a data set; `degraded` is None where the task makes it from `clean`."""

    name: str
    clean: Path
    degraded: Path | None = None


def match_folder(root: Path, *, scale: int) -> list[PairPath]:
    """Pair the images of a folder by its layout.

    Raises FileNotFoundError for a missing folder, ValueError for one without images, and DataError for images without
    partner or of one name, and for a folder that holds low resolution that does not fit `scale`.
    """
    folders = _list_folders(root)
    by_name = {folder.name.lower(): folder for folder in folders}
    for degraded, clean in _PAIR_FOLDERS:
        if degraded in by_name and clean in by_name:
            return _match(list_images(by_name[clean]), {path: path.stem for path in list_images(by_name[degraded])})
    high = [folder for folder in folders if _HIGH.fullmatch(folder.name)] if scale > 1 else []
    if len(high) > 1:
        raise DataError(f"{show_name(root)} holds {_format_paths(high, root)}; give a folder with one of them")
    if folders and not high and not _holds_images(root):
        known = "input/ beside target/, blur/ beside sharp/" + (f", {_SR_LAYOUTS.format(scale)}" if scale > 1 else "")
        raise DataError(f"{show_name(root)} holds no images and has no layout that is known: clean images, or {known}")
    clean_paths = list_images(high[0] if high else root)
    low = _find_low(root, [folder for folder in folders if folder not in high], clean_paths,
                    scale=scale) if scale > 1 else {}
    return _match(clean_paths, low) if low else [PairPath(show_name(path.stem), path) for path in clean_paths]


def describe_paths(folder: str | Path, paths: Sequence[PairPath], *, degradation: str) -> str:
    """One line for people: which images were taken, how the degraded ones came about, and what was passed over.

    `degradation` says what made degraded images where the folder holds none.
    """
    first, place = paths[0], show_name(folder)
    if first.degraded is None:
        line = f"{len(paths)} clean images of {place}; degraded here: {degradation}"
    else:
        pair = " with ".join(_format_paths([path], Path(folder)) for path in (first.clean, first.degraded))
        line = f"{len(paths)} pairs of {place}: {pair}" + (" and so on" if len(paths) > 1 else "")
    skipped = [] if place.startswith(BUILTIN) or first.degraded else list_skipped(first.clean.parent)
    return line + (f"; skipped{format_offenders(skipped)}" if skipped else "")


def format_offenders(offenders: Sequence[str]) -> str:
    """`: a; b; c and 7 more`, ten at most."""
    more = f" and {len(offenders) - _MAX_SHOWN} more" if len(offenders) > _MAX_SHOWN else ""
    return ": " + "; ".join(offenders[:_MAX_SHOWN]) + more


def _format_paths(paths: Iterable[Path], root: Path) -> str:
    return ", ".join(show_name(path.relative_to(root).as_posix()) for path in paths)


def _list_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")) if (
        root.is_dir()) else []


def _holds_images(folder: Path) -> bool:
    return any(path.suffix.lower() in READ_SUFFIXES for path in folder.iterdir())


def _find_low(root: Path, folders: Sequence[Path], clean: Sequence[Path], *, scale: int) -> dict[Path, str]:
    """Low-resolution images of this scale with the names of their clean twins; none where the folder holds none.

    Beside `HR/` every folder with images has to be recognised: own bicubic never replaces what the user has.
    """
    holders = _find_holders(root, folders, strict=clean[0].parent != root, scale=scale)
    stems = {path.stem for path in clean}
    found = {holder: names for holder, known in holders.items()
             if known in (scale, None) and (names := _names_of_scale(holder, stems, scale))}
    bicubic = [holder for holder in found if "bicubic" in holder.relative_to(root).as_posix().lower()]
    if len(found) > 1 and len(bicubic) == 1:
        return found[bicubic[0]]
    if holders and len(found) != 1:
        fit = f"of which {_format_paths(found, root)} fit" if found else "none of which fits"
        raise DataError(f"{show_name(root)} holds low resolution in {_format_paths(holders, root)}, {fit} scale "
                        f"{scale} ({_SR_LAYOUTS.format(scale)}). Keep the one that is meant, or give the folder of the "
                        "clean images alone to have low resolution made from them")
    return next(iter(found.values()), {})


def _find_holders(root: Path, folders: Sequence[Path], *, strict: bool, scale: int) -> dict[Path, int | None]:
    """Folders of low resolution with the scale that they name, None where they name none.

    Raises DataError for images in a folder below LR that is not understood; `strict` is for those of any other name.
    """
    holders: dict[Path, int | None] = {}
    for folder in folders:
        outer = _LOW.fullmatch(folder.name)
        if not outer and not strict:
            continue
        below = (path for path in sorted(folder.rglob("*")) if path.is_dir())
        for holder in filter(_holds_images, (folder, *below)):
            inner = _SCALE.fullmatch(holder.name) if holder.parent == folder else None
            if outer is None or not (inner or holder == folder):
                raise DataError(f"{show_name(root)} holds images in {_format_paths([holder], root)}, which is no "
                                f"layout that is known: {_SR_LAYOUTS.format(scale)}")
            text = inner["scale"] if inner else outer["scale"]
            holders[holder] = int(text) if text else None
    return holders


def _names_of_scale(folder: Path, stems: set[str], scale: int) -> dict[Path, str]:
    """Images of a folder of low resolution by the name of their clean twin; those that name another scale are left out.

    Where all are called as clean images are, a name like `max2` tells no scale.
    """
    paths = list_images(folder)
    named = {path: match for path in paths if (match := _NAME.fullmatch(path.stem))}
    if len(named) < len(paths) or all(path.stem in stems for path in paths):
        return {path: path.stem for path in paths}
    return {path: match["name"] for path, match in named.items() if int(match["scale"]) == scale}


def _match(clean: Sequence[Path], degraded: dict[Path, str]) -> list[PairPath]:
    twice = [*_name_twins({path: path.stem for path in clean}), *_name_twins(degraded)]
    if twice:
        raise DataError(f"images of one name cannot be told apart{format_offenders(twice)}")
    by_name = {name: path for path, name in degraded.items()}
    names = {path.stem for path in clean}
    alone = [f"{show_name(path.name)} has no degraded partner" for path in clean if path.stem not in by_name]
    alone += [f"{show_name(by_name[name].name)} has no clean partner" for name in sorted(by_name) if name not in names]
    if alone:
        raise DataError(f"{len(clean)} clean images in {show_name(clean[0].parent)} and {len(degraded)} degraded in "
                        f"{show_name(next(iter(degraded)).parent)} do not match{format_offenders(alone)}")
    return [PairPath(show_name(path.stem), path, by_name[path.stem]) for path in clean]


def _name_twins(names: dict[Path, str]) -> list[str]:
    by_name: dict[str, list[Path]] = {}
    for path, name in names.items():
        by_name.setdefault(name, []).append(path)
    return [f"{' and '.join(show_name(path.name) for path in paths)} in {show_name(paths[0].parent)}"
            for paths in by_name.values() if len(paths) > 1]
