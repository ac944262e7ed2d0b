"""The script, as a user meets it: pages, and requests that it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.nn import functional as F

import visualize
from engine import checkpoint
from helpers import run_here, train_here, without_box, write_tiny
from viewer import weights

TEXT = "no sé… toma"
Script = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run that kept checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    train_here(write_tiny(folder), folder / "run", "--keep_every=5")
    return folder / "run"


@pytest.fixture
def script(trained: Path, capsys: pytest.CaptureFixture[str]) -> Script:
    """Return a function that runs visualize.py and returns its exit code, output and error."""

    def run(*flags: object) -> tuple[int, str, str]:
        code = run_here(visualize.main, "visualize.py", f"--out_dir={trained}", *flags)
        said = capsys.readouterr()
        return code, said.out, said.err

    capsys.readouterr()  # what training printed
    return run


def scenes(path: Path) -> list[dict[str, Any]]:
    data = path.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
    return json.loads(data)


# --- Pages ----------------------------------------------------------------------------------------


def test_one_command_writes_one_page_into_the_folder_of_the_run(script: Script, trained: Path):
    code, text, error = script(f"--text={TEXT}")
    assert (code, error) == (0, "")
    written, loss = text.splitlines()
    assert written.startswith(f"written to {trained / 'attention.html'}: ")
    assert loss.startswith("The model is in it, with weights as f16, which change the loss ")
    model, toy = scenes(trained / "attention.html")
    assert [scene["name"] for scene in (model, toy)] == ["Your model", "Cross-attention"]
    assert model["text"] == TEXT
    assert "".join(model["model"]["names"][id] for id in model["ids"]) == TEXT.replace(" ", "␣")
    assert [frame["step"] for frame in model["frames"]] == [0, 5, 10, 12]
    assert all(len(frame["panels"]) == 4 for frame in model["frames"])
    assert len(model["evaluations"]) == 3


def test_the_text_can_come_from_a_file_and_the_page_go_anywhere(script: Script, tmp_path: Path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    flags = (f"--text_file={tmp_path / 'text.txt'}", f"--html={tmp_path / 'page.html'}")
    assert script(*flags)[0] == 0
    assert scenes(tmp_path / "page.html")[0]["text"] == TEXT


def test_without_a_text_the_page_begins_with_one_by_the_model_itself(
    script: Script, trained: Path, tmp_path: Path
):
    assert script(f"--html={tmp_path / 'page.html'}")[0] == 0
    scene = scenes(tmp_path / "page.html")[0]
    run = visualize.Run.open(trained, "cpu")
    assert scene["ids"] == run.probes.written_BT[0, : visualize.FIRST_TOKENS].tolist()
    assert scene["text"] == run.newest.tokenizer.decode(scene["ids"])


def test_a_single_token_is_enough(script: Script, tmp_path: Path):
    assert script("--text=n", f"--html={tmp_path / 'page.html'}")[0] == 0
    assert len(scenes(tmp_path / "page.html")[0]["ids"]) == 1


@pytest.mark.parametrize("form", ["f32", "f16", "int8"])
def test_the_weights_are_written_as_asked(script: Script, tmp_path: Path, form: weights.Form):
    code, text, _ = script(f"--weights={form}", f"--html={tmp_path / 'page.html'}")
    assert code == 0
    assert f"with weights as {form}, which change the loss" in text
    frames = scenes(tmp_path / "page.html")[0]["frames"]
    assert {frame["weights"]["form"] for frame in frames} == {form}


def test_a_large_model_is_int8_and_the_loss_that_it_costs_is_that_of_the_rounded_model(
    script: Script, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(visualize, "MOST_IN_F16", 100)
    _, text, _ = script(f"--html={tmp_path / 'page.html'}")
    assert scenes(tmp_path / "page.html")[0]["frames"][0]["weights"]["form"] == "int8"
    run = visualize.Run.open(trained, "cpu")
    texts_BT = run.probes.written_BT.clone()  # as a normal tensor
    model = run.newest.model
    before, after = (
        F.cross_entropy(one(texts_BT)[:, :-1].flatten(0, 1), texts_BT[:, 1:].flatten())
        for one in (model, weights.rounded(model, "int8"))
    )
    said = float(text.split("of its own texts by ")[1].split()[0])
    assert said == pytest.approx((after - before).item(), abs=2e-5)


def test_a_model_that_no_page_can_hold_is_shown_on_the_text_that_was_given(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(weights, "MOST_PARAMETERS", 1000)
    code, text, _ = script(f"--text={TEXT}", f"--html={tmp_path / 'page.html'}")
    assert code == 0
    scene = scenes(tmp_path / "page.html")[0]
    assert "model" not in scene
    assert scene["axes"][0]["queries"] == list(TEXT.replace(" ", "␣"))
    why = "The page shows this one text only, as a page holds up to 1,000 parameters, and this"
    assert scene["notices"][0].startswith(why)
    assert text.splitlines()[1:] == scene["notices"]
    code, _, error = script("--weights=int8", f"--html={tmp_path / 'page.html'}")
    assert code == 2
    assert error.startswith("error: weights must be auto, as a page holds up to 1,000 parameters")


def test_checkpoints_that_do_not_fit_are_left_out_evenly_and_said(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(visualize, "most_copies", lambda *_: 2)
    code, text, _ = script(f"--text={TEXT}", f"--html={tmp_path / 'page.html'}")
    assert code == 0
    assert "2 of 4 checkpoints are shown.\n" in text
    model = scenes(tmp_path / "page.html")[0]
    assert [frame["step"] for frame in model["frames"]] == [0, 12]
    assert model["notices"] == ["2 of 4 checkpoints are shown."]


def file_of(run: Path, name: str) -> Path:
    return run / json.loads((run / checkpoint.RECORD).read_text())[name]["file"]


def rename(run: Path, old: str, new: str, **changes: str) -> None:
    """Give a checkpoint another name, too, in the record of a run."""
    record = json.loads((run / checkpoint.RECORD).read_text())
    record[new] = {**record[old], **changes}
    (run / checkpoint.RECORD).write_text(json.dumps(record))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_kept_checkpoints_that_are_missing_or_damaged_are_left_out_and_named(
    script: Script, trained: Path, tmp_path: Path
):
    run = shutil.copytree(trained, tmp_path / "run")
    missing = file_of(run, "step_0")
    missing.unlink()
    damaged = file_of(run, "step_10")
    damage(damaged)
    code, text, error = script(f"--out_dir={run}", f"--text={TEXT}")
    assert (code, error) == (0, "")
    model = scenes(run / "attention.html")[0]
    assert [frame["step"] for frame in model["frames"]] == [5, 12]
    count, first, second = model["notices"]
    assert count == "2 of 4 checkpoints are shown."
    assert first.startswith(f"The step_0 checkpoint is left out: {missing}, ")
    assert "is missing" in first
    assert second.startswith(f"The step_10 checkpoint is left out: {damaged} is damaged: ")
    assert text.splitlines()[2:] == model["notices"]


def test_a_run_whose_newest_step_was_kept_as_well_needs_only_one_of_the_two(
    script: Script, trained: Path, tmp_path: Path
):
    run = shutil.copytree(trained, tmp_path / "run")
    rename(run, "last", "step_12", file="step_00000012_nowhere.pt")
    assert script(f"--out_dir={run}", f"--text={TEXT}")[0] == 0
    model = scenes(run / "attention.html")[0]
    assert [frame["step"] for frame in model["frames"]] == [0, 5, 10, 12]
    assert model["notices"] == []


@pytest.mark.parametrize("harm", [Path.unlink, damage])
def test_a_newest_checkpoint_that_is_missing_or_damaged_is_refused(
    harm: Callable[[Path], None], script: Script, trained: Path, tmp_path: Path
):
    run = shutil.copytree(trained, tmp_path / "run")
    rename(run, "step_5", "best")  # which shall not stand in for it
    newest = file_of(run, "last")
    harm(newest)
    code, text, error = script(f"--out_dir={run}", f"--text={TEXT}")
    assert (code, text) == (2, "")
    assert error.startswith(f"error: {newest}")
    assert error.count("\n") == 1


def test_a_token_beyond_the_vocabulary_cannot_be_taken_for_a_byte(trained: Path):
    assert visualize.Run.open(trained, "cpu").name(80) == "⟨token 80⟩"


@pytest.mark.parametrize(
    ("most", "expected"), [(1, "e"), (2, "ae"), (3, "ace"), (4, "acde"), (5, "abcde"), (9, "abcde")]
)
def test_a_choice_of_checkpoints_is_even_and_keeps_the_newest(most: int, expected: str):
    assert "".join(visualize.evenly(list("abcde"), most)) == expected


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text=" + "no" * 9], "the text has 18 tokens, and this model sees at most context_len"),
        (["--text=aXb"], "the character vocabulary lacks 'X', 'b'"),
        (["--text_file=nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--text=a", "--html=/dev/null/a.html"], "/dev/null/a.html cannot be written"),
        (["--out_dir=nowhere", "--text=a"], "nowhere holds no checkpoint: train one with `python"),
    ],
)
def test_a_bad_request_is_refused_in_one_sentence(script: Script, flags: list[str], message: str):
    code, text, error = script(*flags)
    assert (code, text) == (2, "")
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text=a", "--text_file=b"], "give text or text_file, not both"),
        (["--weights=int4"], "'int4' for argument '--weights'. Expected one of ('auto', 'f32'"),
    ],
)
def test_flags_that_do_not_fit_are_refused(script: Script, flags: list[str], message: str):
    code, text, error = script(*flags)
    assert (code, text) == (2, "")
    assert message in without_box(error)


def test_a_damaged_checkpoint_is_refused(script: Script, trained: Path, tmp_path: Path):
    (tmp_path / checkpoint.RECORD).write_text("{}")
    code, _, error = script(f"--out_dir={tmp_path}", "--text=a")
    assert (code, error.count("\n")) == (2, 1)
