"""The catalog of published weights, read from catalogue.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from vitdet.config.suggestions import nearest

NOT_PUBLISHED = "not published"
PACKAGED = Path(__file__).parent  # folder of the packaged weights


@dataclass(frozen=True)
class Entry:
    """A weights file. Checksums may be truncated to their first hexadecimal digits."""

    name: str
    what: str
    url: str = ""
    format: str = ""  # a key of vitdet.weights.formats.FORMATS; "" if packaged
    license: str = NOT_PUBLISHED
    recipe: str = ""  # recipe of a complete detector; "" for a pre-trained backbone
    ap: tuple[float, float] | None = None  # published box and mask AP of a detector
    size: int | None = None  # bytes; None if not published
    sha256: str = ""  # "" if not published
    md5: str = ""  # "" if not published
    md5_of_name: bool = False  # whether `md5` is inferred from the file name
    other: str = ""  # name of alternative weights if this file cannot be downloaded
    # packaged: included in this package; file: direct download; page: download in a browser;
    # dead: broken link; none: never published
    state: Literal["packaged", "file", "page", "dead", "none"] = "file"

    @property
    def file(self) -> str:
        """Name of the fetched file: .pt for a complete detector, .safetensors for a backbone."""
        return f"{self.name}.{'pt' if self.recipe else 'safetensors'}"

    @property
    def downloadable(self) -> bool:
        """Whether the file can be downloaded without a browser."""
        return self.state == "file"

    @property
    def instead(self) -> str:
        """The remedy if the file cannot be downloaded."""
        command = f"vitdet weights fetch {self.name} --from FILE"
        if self.state == "page":
            return f"download it in a browser, then {command}"
        other = f"--set train.init={self.other}" if self.other else "vitdet weights list"
        other = f"start from other weights ({other})"
        if self.recipe:
            other = (
                f"train it from pre-trained weights (vitdet train {self.recipe} --output FOLDER)"
            )
        return f"convert your copy of the file ({command}), or {other}"


def load_catalogue(path: Path) -> dict[str, Entry]:
    """Read the entries of a catalog file, by name."""
    # CSafeLoader (libyaml) is faster than SafeLoader but not always available
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    entries = {}
    for fields in yaml.load(path.read_bytes(), loader):
        ap = tuple(fields["ap"]) if "ap" in fields else None
        entries[fields["name"]] = Entry(**fields | {"ap": ap})
    return entries


CATALOGUE = load_catalogue(PACKAGED / "catalogue.yaml")


def find(name: str) -> Entry:
    """Return the entry `name`. Raises ValueError, with a suggestion, for an unknown name."""
    if name not in CATALOGUE:
        closest = nearest(name, list(CATALOGUE))
        file = "or specify a weights file with a suffix, e.g. .pth"
        raise ValueError(f"no weights named {name!r}; {closest} ({file})")
    return CATALOGUE[name]


def cache_folder() -> Path:
    """Return the default folder for fetched files, ~/.cache/vitdet (XDG_CACHE_HOME is not used).

    Raises FileNotFoundError if the user has no home folder, e.g. in some containers.
    """
    try:
        return Path.home() / ".cache" / "vitdet"
    except RuntimeError as error:
        text = "no home folder for the cache of weights; set HOME, or fetch with --output"
        raise FileNotFoundError(text) from error


def fetched(name: str, folder: Path | None = None) -> Path:
    """Return the file of the entry `name` in `folder`, by default in the package or the cache.

    Raises ValueError for an unknown name and FileNotFoundError, with a remedy, for a missing file.
    """
    entry = find(name)
    home = PACKAGED if entry.state == "packaged" else cache_folder()
    path = (folder or home) / entry.file
    if not path.is_file():
        todo = f"run: vitdet weights fetch {name}" + (f" --output {folder}" if folder else "")
        if entry.state not in ("packaged", "file"):
            todo = f"{unavailable_reason(entry)}: {entry.instead}"
        raise FileNotFoundError(f"{path}: not fetched yet; {todo}")
    return path


def unavailable_reason(entry: Entry) -> str:
    """Return the reason why the file of an entry cannot be downloaded."""
    reasons = {
        "page": f"{entry.url} is a page, not a file",
        "dead": f"its link is dead ({entry.url})",
        "none": "its authors have not published it",
    }
    return reasons[entry.state]
