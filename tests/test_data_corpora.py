"""Parquet files, known corpora of the hub, and the reading of many documents in one pass."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data.split
from data.corpora import HUB
from data.documents import Document
from data.hub import HubFile, Repository
from data.loader import Dataset
from data.prepare import PrepareConfig, prepare
from data.sources import Corpus
from data.split import Scan
from data.tokenizer import cut

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "naïve", "☃", "dogs"]
REPOSITORY = Path(__file__).parents[1]


def story(seed: int, n_words: int = 20) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n_words)) + "\n"


def write_parquet(path: Path, *, group: int = 100, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def read(source: str | Path, column: str = "text") -> list[str]:
    return ["".join(document) for document in Corpus.find([str(source)], column).documents()]


def token_files(folder: Path) -> dict[str, bytes]:
    """The files of a dataset; meta.json without the names of its sources."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    meta = json.loads(found.pop("meta.json"))
    del meta["sources"]
    return {**found, "meta.json": json.dumps(meta).encode()}


@pytest.mark.parametrize("group", [1, 3, 1000])
def test_each_row_of_a_parquet_file_is_a_document_unless_it_is_null_or_empty(
    tmp_path: Path, group: int
):
    texts = [story(i) for i in range(600)]
    rows = [texts[0], None, "", "\ufeff", *texts[1:]]
    path = write_parquet(tmp_path / "a.parquet", group=group, id=list(range(603)), text=rows)
    assert read(path) == texts
    assert read(tmp_path) == texts


def test_a_long_row_is_cut_into_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data.documents.cut", lambda text: cut(text, 300))
    path = write_parquet(tmp_path / "a.parquet", text=[story(1, 5000)])
    (document,) = Corpus.find([str(path)]).documents()
    assert len(list(document)) > 50
    assert "".join(document) == story(1, 5000)


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.string_view()])
def test_the_only_column_of_text_is_taken_whatever_its_name(tmp_path: Path, type_: pa.DataType):
    path = write_parquet(tmp_path / "a.parquet", n=[1, 2], content=pa.array(["a", "b"], type_))
    assert read(path) == ["a", "b"]


def test_column_names_the_text_in_parquet_and_jsonl(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", text=["no"], content=["a"])
    (tmp_path / "b.jsonl").write_text('{"text": "no", "content": "b"}\n')
    assert read(tmp_path, "content") == ["a", "b"]


@pytest.mark.parametrize(
    ("columns", "column", "words"),
    [
        ({"a": ["x"], "b": ["y"]}, "text", "has no text in a column text: name one of a, b by --c"),
        ({"text": ["x"], "n": [1]}, "b", "has no text in a column b: name one of text by --column"),
        ({"text": [1]}, "text", r"must have a column of strings: got text .int64.; convert one"),
        ({"text": [b"x"]}, "text", r"must have a column of strings: got text .binary.; convert"),
    ],
)
def test_a_parquet_file_without_the_column_is_refused_with_those_of_text(
    tmp_path: Path, columns: dict[str, list], column: str, words: str
):
    path = write_parquet(tmp_path / "a.parquet", group=1, **columns)
    with pytest.raises(ValueError, match=f"a.parquet {words}"):
        read(path, column)


def test_a_row_that_is_not_utf8_is_refused_with_the_name_of_its_file(tmp_path: Path):
    rows = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has a text that is not UTF-8 .*: convert it"):
        read(tmp_path / "a.parquet")


def test_strings_that_are_numbered_in_a_dictionary_are_text(tmp_path: Path):
    rows = pa.array(["a", "b", None, "a"]).dictionary_encode()
    assert read(write_parquet(tmp_path / "a.parquet", n=[1] * 4, content=rows)) == ["a", "b", "a"]


@pytest.mark.parametrize("damage", ["cut", "changed", "text"])
def test_a_damaged_parquet_file_is_refused_in_a_sentence(tmp_path: Path, damage: str):
    path = write_parquet(tmp_path / "a.parquet", text=[story(i) for i in range(100)])
    whole = path.read_bytes()
    middle = whole[:100] + bytes(1000) + whole[1100:]
    path.write_bytes({"cut": whole[:-100], "changed": middle, "text": b"text"}[damage])
    with pytest.raises(ValueError, match=r"a\.parquet is not a whole Parquet file"):
        read(path)


def test_without_pyarrow_a_parquet_file_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_parquet(tmp_path / "a.parquet", text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        read(path)


def test_nothing_imports_pyarrow_without_a_parquet_file(tmp_path: Path):
    (tmp_path / "a.txt").write_text(story(1))
    code = (
        "import sys; from data.sources import Corpus; "
        f"list(Corpus.find([{str(tmp_path)!r}]).documents()); print('pyarrow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert done.stdout == b"False\n"


PEAK = """
import sys
from pathlib import Path
import pyarrow.parquet
from data.documents import read_rows
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
print(sum(map(len, read_rows(Path(sys.argv[1]), "text"))), peak() - before)
"""


def test_a_row_group_as_large_as_the_file_is_not_held_in_memory(tmp_path: Path):
    text = "".join(map(chr, random.Random(0).choices(range(32, 127), k=4500)))
    texts = [text[i % 4000 :] + text[: i % 4000] + str(i) for i in range(30_000)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False, compression="none")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    n, kibibytes = map(int, done.stdout.split())
    assert n > 130e6
    assert kibibytes < 60_000


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A corpus of 60 documents of each form, some of them twice."""
    folder = tmp_path / "many"
    write_parquet(folder / "a.parquet", text=[story(i) for i in range(20)])
    (folder / "b.jsonl").write_text(
        "".join(json.dumps({"text": story(i)}) + "\n" for i in range(10, 30))
    )
    for i in range(25, 45):
        (folder / f"c{i}.txt").write_text(story(i), "utf-8")
    return folder


@pytest.fixture
def read_documents(monkeypatch: pytest.MonkeyPatch) -> list[Document]:
    """Every document that is given out."""
    given: list[Document] = []
    documents = Corpus.documents

    def counted(corpus: Corpus) -> Iterator[Document]:
        for document in documents(corpus):
            given.append(document)
            yield document

    monkeypatch.setattr(Corpus, "documents", counted)
    return given


@pytest.mark.parametrize(
    ("tokenizer", "passes"), [("byte", 1), ("gpt2", 1), ("char", 2), ("bpe", 3)]
)
@pytest.mark.usefixtures("gpt2_cache")
def test_many_documents_are_split_without_a_pass_of_their_own_and_to_the_same_bytes(
    many: Path, tmp_path: Path, monkeypatch, read_documents: list[Document], tokenizer, passes
):
    monkeypatch.setattr(data.split, "MOST_CUT", 7)
    config = PrepareConfig(sources=(str(many),), tokenizer=tokenizer, out=tmp_path / "1")
    prepare(config)
    ahead = 8 if tokenizer != "bpe" else 0  # documents, until it is known that they go whole
    assert len(read_documents) == 60 * passes + ahead
    scan_of = Scan.of
    monkeypatch.setattr(Scan, "of", lambda corpus, fraction, complete: scan_of(corpus, fraction))
    prepare(PrepareConfig(sources=(str(many),), tokenizer=tokenizer, out=tmp_path / "2"))
    assert token_files(tmp_path / "1") == token_files(tmp_path / "2")


def test_few_documents_are_all_read_before_they_are_split(many: Path, monkeypatch):
    monkeypatch.setattr(data.split, "MOST_CUT", 60)
    corpus = Corpus.find([str(many)])
    assert Scan.of(corpus, 0.1, complete=False) == Scan.of(corpus, 0.1)


def test_a_pass_that_also_scans_ends_with_what_a_scan_finds(many: Path, monkeypatch):
    monkeypatch.setattr(data.split, "MOST_CUT", 7)
    corpus = Corpus.find([str(many)])
    scan = Scan.of(corpus, 0.1, complete=False)
    assert scan.documents == 8
    list(scan.parts(corpus))
    assert scan == Scan.of(corpus, 0.1)


STORIES = ["Once upon\n\na time.", "There was <a> cat.", "The end"]
TITLED = [
    "", " = Robert Boulter = \n", "", " Robert is an actor . \n", " = = Career = = \n", "",
    " = Valkyria = 3 = \n", "", " A game . \n",
]  # fmt: skip
ARTICLES = [
    " \n = Robert Boulter = \n \n Robert is an actor . \n = = Career = = \n \n",
    " = Valkyria = 3 = \n \n A game . \n",
]


@pytest.mark.parametrize("block", [2**20, 1, 7])
@pytest.mark.parametrize("end", ["", "\n", "\n<|endoftext|>\n"])
def test_tinystories_are_separated_by_end_of_text(tmp_path: Path, monkeypatch, block, end):
    monkeypatch.setattr("data.documents.BLOCK", block)
    text = "\n" + "\n<|endoftext|>\n".join(STORIES) + end
    (tmp_path / "TinyStoriesV2-GPT4-train.txt").write_text(text)
    (tmp_path / "TinyStoriesV2-GPT4-valid.txt").write_text("not this")
    assert read(f"tinystories:{tmp_path}") == STORIES


def test_the_lines_of_wikitext_are_joined_to_articles(tmp_path: Path):
    write_parquet(tmp_path / "wikitext-103-raw-v1/train-00000-of-00002.parquet", text=TITLED)
    write_parquet(tmp_path / "wikitext-103-raw-v1/test-00000-of-00001.parquet", text=["not this"])
    assert read(f"wikitext:{tmp_path}") == ARTICLES


def test_of_a_copy_of_the_repository_only_the_files_of_the_corpus_are_taken(tmp_path: Path):
    for folder, text in (("wikitext-103-raw-v1", " the"), ("wikitext-103-v1", " <unk>")):
        write_parquet(tmp_path / folder / "train-00000-of-00001.parquet", text=[text])
    assert read(f"wikitext:{tmp_path}") == [" the"]
    assert read(f"wikitext:{tmp_path / 'wikitext-103-v1'}") == [" <unk>"]
    with pytest.raises(FileNotFoundError, match=r"files sample/10BT/\*\.parquet or"):
        read(f"fineweb-edu:{tmp_path}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that has all corpora, each of 14 files, and remembers what was fetched."""
    fetched: list[str] = []
    monkeypatch.chdir(tmp_path)

    def files(repository: Repository, folder: Path, under: str) -> list[HubFile]:
        corpus = next(c for c in HUB.values() if c.repository == repository.name)
        names = [corpus.files.replace("*", f"{i:03}") for i in range(14)]
        return [HubFile("README.md", 1, ""), *(HubFile(n, 1, "") for n in dict.fromkeys(names))]

    def fetch(repository: Repository, chosen: list[HubFile], folder: Path) -> list[Path]:
        fetched.extend(file.name for file in chosen)
        texts = [story(i) for i in range(3000)]
        for file in chosen:
            if file.name.endswith(".parquet"):
                write_parquet(folder / file.name, text=texts)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / file.name).write_text("<|endoftext|>".join(texts))
        return [folder / file.name for file in chosen]

    monkeypatch.setattr(Repository, "files", files)
    monkeypatch.setattr(Repository, "fetch", fetch)
    return fetched


@pytest.mark.parametrize(
    ("source", "n", "fraction"),
    [
        ("tinystories", 1, 0.01),
        ("wikitext", 14, 0.01),
        ("openwebtext", 14, 0.001),
        ("openwebtext:2", 2, 0.001),
        ("fineweb-edu", 1, 0.001),
        ("fineweb-edu:2", 2, 0.001),
    ],
)
def test_a_known_corpus_is_prepared_from_so_many_files_with_its_own_fraction(
    hub: list[str], source: str, n: int, fraction: float
):
    prepare(PrepareConfig(sources=(source,), tokenizer="byte"))
    name = source.partition(":")[0]
    dataset = Dataset.open(Path(f"data/{name}_byte"))
    assert len(hub) == n
    assert dataset.meta["val_fraction"] == fraction
    assert Corpus.find([source]).val_fraction == fraction
    assert Corpus.find([source, "stdlib"]).val_fraction == fraction


def test_a_fraction_that_is_asked_for_goes_before_that_of_the_corpus(hub: list[str]):
    prepare(PrepareConfig(sources=("fineweb-edu",), tokenizer="byte", val_fraction=0.5))
    assert Dataset.open(Path("data/fineweb-edu_byte")).meta["val_fraction"] == 0.5
    assert len(hub) == 1


def test_without_a_network_a_corpus_says_to_pass_a_folder_by_its_name(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"train-\*\.parquet of Sales.* and pass wikitext:FOLDER$"):
        read("wikitext")


@pytest.mark.parametrize("n", ["0", "15"])
def test_a_number_of_files_that_a_corpus_does_not_have_is_refused(hub: list[str], n: str):
    with pytest.raises(ValueError, match=f"fineweb-edu has 14 files: got fineweb-edu:{n}"):
        read(f"fineweb-edu:{n}")
    assert hub == []


def test_a_folder_without_the_files_of_a_corpus_is_refused(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"files sample/10BT/\*\.parquet or \*\.parquet of fine"
    ):
        read(f"fineweb-edu:{tmp_path}")


@pytest.mark.parametrize("name", HUB)
def test_a_known_corpus_is_pinned_to_a_commit(name: str):
    assert len(HUB[name].commit) == 40
    assert int(HUB[name].commit, 16)
