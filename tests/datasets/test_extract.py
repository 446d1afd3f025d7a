"""Archive extraction: valid archives, one-line errors for malicious or broken ones, no write outside the folder."""

from __future__ import annotations

import hashlib
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
    """Unpacks these bytes into tmp_path/in/here."""

    def run(content: bytes, files: int = 10, size: int = 10_000, ours: bool = True) -> list[Entry]:
        (tmp_path / "some.zip").write_bytes(content)
        return unpack(
            tmp_path / "some.zip",
            tmp_path / "in" / "here",
            str,
            Limits(files, size),
            lambda _: None,
            ours,
        )

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()
    }


def test_the_files_of_an_archive(unpacked: Unpack, tmp_path: Path) -> None:
    found = unpacked(zipped({**GOOD, "b/": b""}))
    assert files(tmp_path / "in" / "here") == GOOD
    assert [(one.name, one.size) for one in found] == [
        ("a.jpg", 3000),
        ("b/c.jpg", 1500),
        ("empty", 0),
    ]
    assert found[0].crc == 0xD870138F and found[2].crc == 0  # zlib.crc32(b"one" * 1000)
    assert not (tmp_path / "in" / "here" / "a.jpg").stat().st_mode & 0o133


def test_only_what_is_chosen_counts_and_is_written(tmp_path: Path) -> None:
    (tmp_path / "some.zip").write_bytes(zipped({"x/a": b"1", "x/huge": bytes(100_000)}))
    seen: list[int] = []
    found = unpack(
        tmp_path / "some.zip",
        tmp_path / "here",
        {"x/a": "a", "x/huge": None}.get,
        Limits(1, 1),
        seen.append,
        ours=True,
    )
    assert files(tmp_path / "here") == {"a": b"1"} and seen == [1] and len(found) == 1


NAMES = [
    "../x",
    "a/../../x",
    "/etc/x",
    "a/./x",
    "a//x",
    "C:/x",
    "a\\..\\x",
    "..",
    "a\nb",
    "\x1b[2J",
    ".some.unpacking",
    "é" * 150,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_elsewhere_refuses_the_archive(
    unpacked: Unpack, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match="some.zip: holds .*: refused") as caught:
        unpacked(zipped({"good": b"1", name: b"2"}))
    assert str(caught.value).isprintable()
    assert set(files(tmp_path)) == {"some.zip"}  # nothing of it, nowhere


def test_a_name_with_a_zero_is_not_cut_there(unpacked: Unpack, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the name 'x.jpg\\x00.txt'"):
        unpacked(renamed(zipped({"x.jpg?.txt": b"2"}), "x.jpg?.txt", b"x.jpg\0.txt"))
    assert set(files(tmp_path)) == {"some.zip"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (zipped({"good": b"1", "l": b"/etc/passwd"}, kinds={"l": stat.S_IFLNK}), "l is a link"),
        (zipped({"d": b""}, kinds={"d": stat.S_IFBLK}), "d is no plain file"),
        (zipped({"p": b""}, kinds={"p": stat.S_IFIFO}), "p is no plain file"),
        (zipped({"p": b"x"}, kinds={"p": stat.S_IFDIR}), "p is no plain file"),
        (encrypted(zipped({"good": b"1", "secret": b"2"}), "secret"), "secret is encrypted"),
        (
            zipped({"x": b"1" * 100}, zipfile.ZIP_BZIP2),
            "x is compressed by method 12, not deflated or stored",
        ),
        (zipped({"x": b"1" * 100}, zipfile.ZIP_LZMA), "x is compressed by method 14"),
        (
            zipped({"IMG.jpg": b"1", "img.jpg": b"2"}),
            "holds both IMG.jpg and img.jpg, which are one file on some disks",
        ),
        (zipped({"\u00e9.jpg": b"1", "e\u0301.jpg": b"2"}), "which are one file on some disks"),
        (zipped({"bomb": bytes(10_001)}), "unpacks to 10,001 bytes, at most 10,000 are expected"),
        (zipped({f"{n}": b"" for n in range(11)}), "11 files, of which at most 10 are expected"),
    ],
    ids=[
        "link",
        "device",
        "pipe",
        "folder",
        "encrypted",
        "bzip2",
        "lzma",
        "case",
        "accent",
        "bomb",
        "many",
    ],
)
def test_an_evil_archive_is_refused_before_a_byte_is_written(
    unpacked: Unpack, tmp_path: Path, content: bytes, says: str
) -> None:
    with pytest.raises(ValueError) as caught:
        unpacked(content)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/some.zip: ") and says in text and text.endswith(": refused")
    assert set(files(tmp_path)) == {"some.zip"} and not (tmp_path / "in").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_name_twice_is_two_names(unpacked: Unpack) -> None:
    twice = renamed(zipped({"a.jpg": b"1", "b.jpg": b"2"}), "b.jpg", b"a.jpg")
    with pytest.raises(ValueError, match="holds both a.jpg and a.jpg"):
        unpacked(twice)


def test_a_bomb_that_lies_about_its_size_gets_no_more_than_it_declares(
    unpacked: Unpack, tmp_path: Path
) -> None:
    bomb = declared(zipped({"good": b"1", "bomb": bytes(5_000_000)}), "bomb", 100)
    with pytest.raises(ValueError, match="some.zip: "), largest_file(5_000 + len(bomb)):
        unpacked(bomb)
    assert files(tmp_path / "in") == {"here/good": b"1"}


def test_less_than_declared_is_refused(unpacked: Unpack, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="some.zip: "):
        unpacked(declared(zipped({"short": b"123"}), "short", 400))
    assert files(tmp_path / "in") == {}


def flipped(content: bytes, needle: bytes) -> bytes:
    at = content.index(needle)
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


STORED = zipped({"a": b"first", "b": b"second"}, zipfile.ZIP_STORED)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>log in</html>",
        STORED[:60],
        STORED[:-1],
        flipped(STORED, b"second"),
        STORED[40:],
        zipped({"a": random.Random(0).randbytes(4000)})[:2000],
    ],
    ids=[
        "empty",
        "page",
        "cut",
        "cut at its end",
        "wrong checksum",
        "without its beginning",
        "half",
    ],
)
def test_a_broken_archive_is_one_line(unpacked: Unpack, tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match="some.zip: not a whole zip archive") as caught:
        unpacked(content)
    assert "\n" not in str(caught.value)
    # of a broken archive, the files before the break
    assert set(files(tmp_path)) <= {"some.zip", "in/here/a"}


def test_any_damage_is_a_line_or_does_no_harm(unpacked: Unpack, tmp_path: Path) -> None:
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
        assert {one.name for one in tmp_path.iterdir()} <= {"some.zip", "in"}
        assert sum(map(len, files(tmp_path / "in").values())) <= 10_000 * 2
    assert refused > 100


def test_what_is_whole_is_not_written_again_and_what_is_not_is(
    unpacked: Unpack, tmp_path: Path
) -> None:
    here = tmp_path / "in" / "here"
    unpacked(zipped(GOOD))
    before = (here / "a.jpg").stat()
    (here / "b" / "c.jpg").write_bytes(b"tw")
    (here / ".some.unpacking").write_bytes(b"half a file, and the process was killed")
    assert len(unpacked(zipped(GOOD))) == 3 and files(here) == GOOD
    after = (here / "a.jpg").stat()
    assert os.path.samestat(after, before) and after.st_mtime_ns == before.st_mtime_ns


def test_another_file_in_the_place_is_never_written_over(unpacked: Unpack, tmp_path: Path) -> None:
    here = tmp_path / "in" / "here"
    here.mkdir(parents=True)
    (here / "a.jpg").write_bytes(b"mine" * 750)  # of the same size
    with pytest.raises(
        ValueError, match="here/a.jpg: there already, and not the file of the archive; move it away"
    ):
        unpacked(zipped(GOOD), ours=False)
    assert files(here) == {"a.jpg": b"mine" * 750}


def test_a_file_that_others_hold_too_is_replaced_not_changed(
    unpacked: Unpack, tmp_path: Path
) -> None:
    here = tmp_path / "in" / "here"
    here.mkdir(parents=True)
    (tmp_path / "cached").write_bytes(b"precious")
    os.link(tmp_path / "cached", here / "a.jpg")
    unpacked(zipped(GOOD))
    assert (tmp_path / "cached").read_bytes() == b"precious" and files(here) == GOOD


@pytest.mark.parametrize(
    "link", ["in/here", "in/here/b", "in/here/a.jpg", "in/here/.some.unpacking"]
)
def test_nothing_is_written_through_a_link_that_lies_in_wait(
    unpacked: Unpack, tmp_path: Path, link: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target = elsewhere / "file" if link.endswith(("jpg", "unpacking")) else elsewhere
    (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / link).symlink_to(target)
    with pytest.raises((OSError, ValueError)):
        unpacked(zipped(GOOD))
    assert not list(elsewhere.iterdir())


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(unpacked: Unpack, tmp_path: Path) -> None:
    content = zipped({"a": b"1" * 500, "b": b"2" * 9000})
    with (
        pytest.raises(
            OSError, match="b: could not be unpacked .*File too large.*goes on from there"
        ),
        largest_file(4000),
    ):
        unpacked(content)
    assert files(tmp_path / "in") == {"here/a": b"1" * 500}
    unpacked(content)
    assert (
        hashlib.md5((tmp_path / "in/here/b").read_bytes()).hexdigest()
        == hashlib.md5(b"2" * 9000).hexdigest()
    )
