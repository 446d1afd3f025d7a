"""The published files that can be fetched by name; the data is in catalogue.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from vitdet.suggestions import nearest

NOT_PUBLISHED = "not published"
PACKAGED = Path(__file__).parent  # where the files that ship with the package lie


@dataclass(frozen=True)
class Entry:
    """A published file. Checksums are the first hexadecimal digits or all of them; '' and None: not published."""

    name: str
    what: str
    url: str = ""
    format: str = ""  # a name of vitdet.weights.formats.FORMATS; "": ships with the package
    license: str = NOT_PUBLISHED
    recipe: str = ""  # detectors: the recipe that builds the model and trains it
    ap: tuple[float, float] | None = None  # detectors: published box AP, mask AP
    size: int | None = None  # bytes
    sha256: str = ""
    md5: str = ""
    md5_of_name: bool = False  # the md5 is what the file's name looks like, not what its page says
    other: str = ""  # pre-trainings that nobody can download: a name to start from instead
    # file: a plain download. page: a page in a browser. dead: a link that no longer serves. none: never published.
    state: Literal["packaged", "file", "page", "dead", "none"] = "file"

    @property
    def file(self) -> str:
        """The name of the fetched file: weights for train.init, or a whole detector."""
        return f"{self.name}.{'pt' if self.recipe else 'safetensors'}"

    @property
    def downloadable(self) -> bool:
        """Whether a program can fetch it."""
        return self.state == "file"

    @property
    def instead(self) -> str:
        """What to do where nothing can be downloaded."""
        own = f"convert a copy that you have (vitdet weights fetch {self.name} --from FILE)"
        if self.state == "page":
            return (
                f"download it there in a browser, then vitdet weights fetch {self.name} --from FILE"
            )
        if self.recipe:
            return f"{own}, or train it from its pre-training (vitdet train {self.recipe} --output FOLDER)"
        other = f"--set train.init={self.other}" if self.other else "vitdet weights list"
        return f"{own}, or start from other weights ({other})"


def load_catalogue(path: Path) -> dict[str, Entry]:
    """The entries of a catalogue file by name, in its order."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, if PyYAML has it
    entries = {}
    for fields in yaml.load(path.read_bytes(), loader):
        ap = tuple(fields["ap"]) if "ap" in fields else None
        entries[fields["name"]] = Entry(**fields | {"ap": ap})
    return entries


CATALOGUE = load_catalogue(PACKAGED / "catalogue.yaml")


def find(name: str) -> Entry:
    """The entry of a name. Raises ValueError with the nearest name."""
    if name not in CATALOGUE:
        raise ValueError(
            f"no weights named {name!r}; {nearest(name, list(CATALOGUE))} "
            "(a .safetensors file can be given too)"
        )
    return CATALOGUE[name]


def cache_folder() -> Path:
    """Where fetched files lie if no other folder is given: ~/.cache/vitdet.

    XDG_CACHE_HOME is not asked: no setting of this package comes from the environment. --output and --weights name
    another folder. Raises FileNotFoundError where the user has no home, as in some containers.
    """
    try:
        return Path.home() / ".cache" / "vitdet"
    except RuntimeError as error:
        raise FileNotFoundError(
            "no home folder to keep weights in; give a folder with --output"
        ) from error


def fetched(name: str, folder: Path | None = None) -> Path:
    """The file of a name: in `folder` if that is given, else with the package or in the cache.

    Raises ValueError for a name that the catalogue lacks, FileNotFoundError with the command that fetches it.
    """
    entry = find(name)
    home = PACKAGED if entry.state == "packaged" else cache_folder()
    path = (folder or home) / entry.file
    if not path.is_file():
        command = f"vitdet weights fetch {name}" + (f" --output {folder}" if folder else "")
        todo = (
            f"run: {command}"
            if entry.state in ("packaged", "file")
            else f"{trouble(entry)}: {entry.instead}"
        )
        raise FileNotFoundError(f"{path}: not fetched yet; {todo}")
    return path


def trouble(entry: Entry) -> str:
    """Why no program can download it."""
    reasons = {
        "page": f"{entry.url} is a page, not a file",
        "dead": f"its link is dead ({entry.url})",
        "none": "its authors have not published it",
    }
    return reasons[entry.state]
