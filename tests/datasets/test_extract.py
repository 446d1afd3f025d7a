"""Archive extraction: one-line errors for malicious or broken archives, no write elsewhere."""

from __future__ import annotations

import os
import random
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.test_cli import largest_file
from tests.helpers.archives import declared, encrypted, renamed, zipped
from vitdet.datasets.extract import Entry, Limits, unpack

GOOD = {"a.jpg": b"one" * 1000, "b/c.jpg": b"two" * 500, "empty": b""}
Unpack = Callable[..., list[Entry]]


@pytest.fixture
def unpacked(tmp_path: Path) -> Unpack:
    """Return a function that extracts the bytes of an archive into tmp_path/in/here."""

    def run(content: bytes, files: int = 10, size: int = 10_000, force: bool = True) -> list[Entry]:
        archive, limits = tmp_path / "some.zip", Limits(files, size)
        archive.write_bytes(content)
        return unpack(archive, tmp_path / "in" / "here", str, limits, lambda _: None, force)

    return run


def files(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_the_files_of_an_archive_are_extracted(unpacked: Unpack, tmp_path: Path) -> None:
    found = unpacked(zipped({**GOOD, "b/": b""}))
    assert files(tmp_path / "in" / "here") == GOOD
    sizes = {member.name: member.size for member in found}
    assert sizes == {"a.jpg": 3000, "b/c.jpg": 1500, "empty": 0}
    assert found[0].crc == 0xD870138F and found[2].crc == 0  # zlib.crc32(b"one" * 1000)
    assert not (tmp_path / "in" / "here" / "a.jpg").stat().st_mode & 0o133


def test_only_selected_files_are_checked_and_written(tmp_path: Path) -> None:
    archive, choose = tmp_path / "some.zip", {"x/a": "a", "x/huge": None}.get
    archive.write_bytes(zipped({"x/a": b"1", "x/huge": bytes(100_000)}))
    seen: list[int] = []
    found = unpack(archive, tmp_path / "here", choose, Limits(1, 1), seen.append, overwrite=True)
    assert files(tmp_path / "here") == {"a": b"1"} and seen == [1] and len(found) == 1


NAMES = [
    *("../x", "a/../../x", "/etc/x", "a/./x", "a//x", "C:/x", "a\\..\\x", ".."),
    *("a\nb", "\x1b[2J", ".some.unpacking", "é" * 150),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_name_rejects_the_archive(unpacked: Unpack, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="some.zip: contains .*; the archive was") as caught:
        unpacked(zipped({"good": b"1", name: b"2"}))
    assert str(caught.value).isprintable()
    assert set(files(tmp_path)) == {
        "some.zip"
    }  # no file is written, inside or outside of the folder


def test_a_name_is_not_truncated_at_a_null_byte(unpacked: Unpack, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the name 'x.jpg\\x00.txt'"):
        unpacked(renamed(zipped({"x.jpg?.txt": b"2"}), "x.jpg?.txt", b"x.jpg\0.txt"))
    assert set(files(tmp_path)) == {"some.zip"}


def device(kind: int, content: bytes = b"") -> bytes:
    return zipped({"p": content}, kinds={"p": kind})


SAME = "which are the same file on some file systems"
EVIL = {
    "link": (zipped({"good": b"1", "l": b"/etc/passwd"}, kinds={"l": stat.S_IFLNK}), "l is a link"),
    "device": (device(stat.S_IFBLK), "p is not a regular file"),
    "pipe": (device(stat.S_IFIFO), "p is not a regular file"),
    "folder": (device(stat.S_IFDIR, b"x"), "p is not a regular file"),
    "encrypted": (encrypted(zipped({"good": b"1", "s": b"2"}), "s"), "s is encrypted"),
    "bzip2": (
        zipped({"x": b"1" * 100}, zipfile.ZIP_BZIP2),
        "x uses compression method 12, expected",
    ),
    "lzma": (zipped({"x": b"1" * 100}, zipfile.ZIP_LZMA), "x uses compression method 14"),
    "case": (zipped({"IMG.jpg": b"1", "img.jpg": b"2"}), f"both IMG.jpg and img.jpg, {SAME}"),
    "accent": (zipped({"\u00e9.jpg": b"1", "e\u0301.jpg": b"2"}), SAME),
    "bomb": (zipped({"bomb": bytes(10_001)}), "unpacks to 10,001 bytes, expected at most 10,000"),
    "many": (zipped({f"{n}": b"" for n in range(11)}), "11 files, expected at most 10;"),
}


@pytest.mark.parametrize(("content", "says"), EVIL.values(), ids=EVIL)
def test_a_malicious_archive_is_rejected_before_a_byte_is_written(
    unpacked: Unpack, tmp_path: Path, content: bytes, says: str
) -> None:
    with pytest.raises(ValueError) as caught:
        unpacked(content)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/some.zip: ") and text.endswith("; the archive was rejected")
    assert says in text
    assert set(files(tmp_path)) == {"some.zip"} and not (tmp_path / "in").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_names_are_rejected(unpacked: Unpack) -> None:
    twice = renamed(zipped({"a.jpg": b"1", "b.jpg": b"2"}), "b.jpg", b"a.jpg")
    with pytest.raises(ValueError, match="contains both a.jpg and a.jpg"):
        unpacked(twice)


def test_no_more_than_the_declared_size_is_written(unpacked: Unpack, tmp_path: Path) -> None:
    bomb = declared(zipped({"good": b"1", "bomb": bytes(5_000_000)}), "bomb", 100)
    with pytest.raises(ValueError, match="some.zip: "), largest_file(5_000 + len(bomb)):
        unpacked(bomb)
    assert files(tmp_path / "in") == {"here/good": b"1"}


def test_a_file_below_its_declared_size_is_rejected(unpacked: Unpack, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="some.zip: "):
        unpacked(declared(zipped({"short": b"123"}), "short", 400))
    assert files(tmp_path / "in") == {}


def flipped(content: bytes, needle: bytes) -> bytes:
    at = content.index(needle)
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


STORED = zipped({"a": b"first", "b": b"second"}, zipfile.ZIP_STORED)


BROKEN = {
    "empty": b"",
    "page": b"<html>log in</html>",
    "cut": STORED[:60],
    "cut at its end": STORED[:-1],
    "wrong checksum": flipped(STORED, b"second"),
    "without its beginning": STORED[40:],
    "half": zipped({"a": random.Random(0).randbytes(4000)})[:2000],
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_archive_is_rejected(unpacked: Unpack, tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match="some.zip: not a complete zip archive") as caught:
        unpacked(content)
    assert "\n" not in str(caught.value)
    # files before the damage may remain
    assert set(files(tmp_path)) <= {"some.zip", "in/here/a"}


def test_any_damage_is_rejected_or_harmless(unpacked: Unpack, tmp_path: Path) -> None:
    rng, whole, refused = random.Random(0), zipped(GOOD), 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        try:
            unpacked(bytes(content))
        except (ValueError, OSError) as error:
            refused += 1
            assert str(error).startswith(str(tmp_path))
        assert {path.name for path in tmp_path.iterdir()} <= {"some.zip", "in"}
        assert sum(map(len, files(tmp_path / "in").values())) <= 10_000 * 2
    assert refused > 100


def test_only_incomplete_files_are_written_again(unpacked: Unpack, tmp_path: Path) -> None:
    here = tmp_path / "in" / "here"
    unpacked(zipped(GOOD))
    before = (here / "a.jpg").stat()
    (here / "b" / "c.jpg").write_bytes(b"tw")
    (here / ".some.unpacking").write_bytes(b"half a file, and the process was killed")
    assert len(unpacked(zipped(GOOD))) == 3 and files(here) == GOOD
    after = (here / "a.jpg").stat()
    assert os.path.samestat(after, before) and after.st_mtime_ns == before.st_mtime_ns


def test_a_different_existing_file_is_never_overwritten(unpacked: Unpack, tmp_path: Path) -> None:
    here = tmp_path / "in" / "here"
    here.mkdir(parents=True)
    (here / "a.jpg").write_bytes(b"mine" * 750)  # the size of the file in the archive
    says = "here/a.jpg: exists and differs from the file in the archive; move it away"
    with pytest.raises(ValueError, match=says):
        unpacked(zipped(GOOD), force=False)
    assert files(here) == {"a.jpg": b"mine" * 750}


def test_a_file_with_other_hard_links_is_replaced_and_not_changed(
    unpacked: Unpack, tmp_path: Path
) -> None:
    here = tmp_path / "in" / "here"
    here.mkdir(parents=True)
    (tmp_path / "cached").write_bytes(b"precious")
    os.link(tmp_path / "cached", here / "a.jpg")
    unpacked(zipped(GOOD))
    assert (tmp_path / "cached").read_bytes() == b"precious" and files(here) == GOOD


@pytest.mark.parametrize("link", ["", "b", "a.jpg", ".some.unpacking"])
def test_nothing_is_written_through_a_link(unpacked: Unpack, tmp_path: Path, link: str) -> None:
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "in" / "here" / link
    elsewhere.mkdir()
    here.parent.mkdir(parents=True)
    here.symlink_to(elsewhere / "file" if link.endswith(("jpg", "unpacking")) else elsewhere)
    with pytest.raises((OSError, ValueError)) as caught:
        unpacked(zipped(GOOD))
    assert not list(elsewhere.iterdir()) and "free some space" not in str(caught.value)


def test_a_full_disk_is_reported_and_the_next_run_resumes(unpacked: Unpack, tmp_path: Path) -> None:
    content = zipped({"a": b"1" * 500, "b": b"2" * 9000})
    says = "b: could not be extracted .*File too large.*; free some space and run the same command"
    with pytest.raises(OSError, match=says), largest_file(4000):
        unpacked(content)
    assert files(tmp_path / "in") == {"here/a": b"1" * 500}
    unpacked(content)
    assert files(tmp_path / "in")["here/b"] == b"2" * 9000
