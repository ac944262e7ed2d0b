"""The three sources of a config, and what is refused."""

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import cli
from helpers import REPOSITORY, finish, start, without_box
from train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part."""

    width: int = 4
    """Its width."""
    learning_rate: float = 0.5
    """Its rate."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A config with a field of every kind that the scripts use."""

    seed: int = 1
    """A whole number."""
    clip: float = 1.0
    """A number."""
    resume: bool = False
    """A switch."""
    name: str = "a"
    """A text."""
    kind: Literal["small", "large"] = "small"
    """A choice."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Two numbers."""
    path: Path = Path("out/run")
    """A path."""
    prompt_file: Path | None = None
    """A path, or none."""
    part: Part = field(default_factory=Part)

    def __post_init__(self) -> None:
        cli.at_least(0, self, "seed")


def parse(*argv: str) -> Config:
    return cli.parse_config(Config, argv)


Refusal = Callable[..., str]
Toml = Callable[[str], str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Parse what must be refused; return what is said on stderr, in one line."""

    def refuse(*argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda: print(parse(*argv)))
        assert stop.value.code == 2
        said = capsys.readouterr()
        assert said.out == ""
        return without_box(said.err)

    return refuse


@pytest.fixture
def toml(tmp_path: Path) -> Toml:
    def write(text: str) -> str:
        (tmp_path / "config.toml").write_text(text, encoding="utf-8")
        return str(tmp_path / "config.toml")

    return write


# --- Sources --------------------------------------------------------------------------------------


def test_without_arguments_all_is_default():
    assert parse() == Config()


def test_the_file_wins_over_defaults_and_flags_win_over_the_file(toml: Toml):
    path = toml('seed = 2\nclip = 2.0\nname = "b"\n[part]\nwidth = 8\nlearning_rate = 2.0\n')
    config = parse(path, "--seed=3", "--part.width=16")
    assert config == Config(seed=3, clip=2.0, name="b", part=Part(width=16, learning_rate=2.0))


def test_a_file_may_hold_a_value_of_every_kind(toml: Toml):
    path = toml(
        'resume = true\nclip = inf\nname = "x = 1, \\"é\\" --seed=3"\nkind = "large"\n'
        'betas = [0.5, 0.75]\npath = "a b/c"\nprompt_file = "-"\n'
    )
    assert parse(path) == Config(
        resume=True,
        clip=math.inf,
        name='x = 1, "é" --seed=3',
        kind="large",
        betas=(0.5, 0.75),
        path=Path("a b/c"),
        prompt_file=Path("-"),
    )


def test_a_switch_is_turned_on_by_its_name_and_off_by_no(toml: Toml):
    assert parse("--resume", "--seed=3").resume
    assert not parse("--no-resume").resume
    assert not parse(toml("resume = true"), "--no-resume").resume
    assert not parse("--resume", "--no-resume").resume


def test_a_switch_of_a_part_is_turned_off_by_no_before_its_name():
    flags = ["--model.architecture=modern", "--model.no-tie_embeddings"]
    assert not cli.parse_config(TrainConfig, flags).model.tie_embeddings


def test_of_a_flag_that_is_given_twice_the_last_wins():
    assert parse("--seed=3", "--betas", "0.1", "0.2", "--seed=4").seed == 4
    assert parse("--betas", "0.1", "0.2", "--betas", "0.3", "0.4").betas == (0.3, 0.4)


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(
            seed=7,
            clip=math.inf,
            resume=True,
            name='Infinity = "é🙂\\ \t',
            kind="large",
            betas=(0.0, 1e-9),
            path=Path("Infinity/ä b"),
            prompt_file=Path("p.txt"),
            part=Part(width=1, learning_rate=1e-5),
        ),
        Config(clip=-math.inf, betas=(math.inf, 1e22)),
    ],
)
def test_a_dumped_config_reads_back_equal(config: Config, toml: Toml):
    assert parse(toml(cli.dump_config(config))) == config


def test_a_dumped_training_config_reads_back_equal(toml: Toml):
    config = cli.parse_config(TrainConfig, ["--optim.grad_clip=inf", "--out_dir=a/b", "--resume"])
    assert cli.parse_config(TrainConfig, [toml(cli.dump_config(config))]) == config


def test_none_is_left_out_of_a_dumped_config():
    assert "prompt_file" not in cli.dump_config(Config())


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [("--resum", "--resume"), ("--bettas=1", "--betas"), ("--part.widht=3", "--part.width INT")],
)
def test_a_misspelt_flag_is_refused_with_the_nearest_right_one(
    refusal: Refusal, flag: str, nearest: str
):
    said = refusal(flag)
    assert f"Unrecognized options: {flag} Perhaps you meant: {nearest}" in said


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("[part]\nwidht = 3", "--part.width INT"), ("[prat]\nwidth = 3", "--part.width INT")],
)
def test_a_misspelt_key_is_refused_with_its_file_and_the_nearest_right_one(
    refusal: Refusal, toml: Toml, text: str, nearest: str
):
    path = toml(text)
    said = refusal(path)
    assert f"Perhaps you meant: {nearest}" in said
    assert said.endswith(f"error: {path} is not a valid config, as said above")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed=ten"], "Error parsing --seed: invalid literal for int() with base 10: 'ten'"),
        (["--seed=1.5"], "Error parsing --seed: invalid literal for int() with base 10: '1.5'"),
        (["--seed"], "Missing value for argument '--seed'. Expected 1 values."),
        (["--clip=much"], "Error parsing --clip: could not convert string to float: 'much'"),
        (["--betas", "0.9"], "Missing value for argument '--betas'. Expected 2 values."),
        (["--resume=True"], "Unrecognized options: True"),
        (["--kind=medium"], "'medium' for argument '--kind'. Expected one of ('small', 'large')"),
        (["stray"], "Unrecognized options: stray"),
        (["--zzzzzz=1"], "Unrecognized options: --zzzzzz=1"),
        (["--seed=-1"], "Error parsing Config: seed must be at least 0: got -1"),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused(refusal: Refusal, argv: list[str], message: str):
    assert message in refusal(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('seed = "ten"', "--seed: invalid literal for int() with base 10: 'ten'"),
        ("seed = 1.5", "--seed: invalid literal for int() with base 10: '1.5'"),
        ("seed = true", "Missing value for argument '--seed'."),
        ("resume = 1", "Unrecognized options: 1"),
        ('resume = "True"', "Unrecognized options: True"),
        ('kind = "medium"', "invalid choice 'medium' for argument '--kind'"),
        ("betas = [0.9]", "Missing value for argument '--betas'. Expected 2 values."),
        ("betas = [0.9, 0.9, 0.9]", "Unrecognized options: 0.9"),
        ("part = 3", "Unrecognized options: --part=3"),
        ("clip = true", "Missing value for argument '--clip'."),
        ("seed = -1", "seed must be at least 0: got -1"),
        ("help = true", "error:"),
    ],
)
def test_what_is_no_flag_is_refused_in_a_file_too(
    refusal: Refusal, toml: Toml, text: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdout", sys.stderr)  # where --help writes
    path = toml(text)
    said = refusal(path)
    assert message in said
    assert said.endswith(f"error: {path} is not a valid config, as said above")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('seed = "30"', "no field seed takes '30'"),
        ("seed = [30]", "no field seed takes [30]"),
        ("path = 5", "no field path takes 5"),
        ('path = ["x", "--seed=5"]', "no field path takes ['x', '--seed=5']"),
        ("name = 2020-01-01", "no field name takes datetime.date(2020, 1, 1)"),
        ('[part]\nlearning_rate = "1e-3"', "no field learning_rate takes '1e-3'"),
        ("[part]\nlearning-rate = 1.0", "no field learning-rate takes 1.0"),
        ('prompt-file = "a"', "no field prompt-file takes 'a'"),
        ('"part.width" = 3', "no field part.width takes 3"),
        ("no-resume = true", "no field no-resume takes True"),
        ("[prat]", "no field prat takes {}"),
        ("[seed]", "no field seed takes {}"),
    ],
)
def test_what_would_do_as_a_flag_only_is_refused_in_a_file(
    refusal: Refusal, toml: Toml, text: str, message: str
):
    path = toml(text)
    assert refusal(path) == f"error: {path}: {message}: check its name and type"


def test_a_table_may_be_empty(toml: Toml):
    assert parse(toml("[part]")) == Config()


@pytest.mark.parametrize("text", ["seed = ", "seed 3", "[part", "seed = 1\nseed = 2", "\0"])
def test_a_file_that_is_not_toml_is_refused_by_name(refusal: Refusal, text: str, toml: Toml):
    assert refusal(toml(text)).startswith(f"error: {toml(text)} is not valid TOML: ")


def test_a_file_that_is_not_there_is_refused_by_name(refusal: Refusal):
    assert refusal("nowhere.toml") == "error: nowhere.toml: No such file or directory"


def test_a_file_that_is_not_text_is_refused_by_name(refusal: Refusal, tmp_path: Path):
    path = tmp_path / "picture.toml"
    path.write_bytes(b"\x89PNG\xff")
    assert refusal(str(path)).startswith(f"error: {path} is not valid TOML: ")


def test_at_least_refuses_a_value_that_is_no_number():
    with pytest.raises(ValueError, match="seed must be at least 0: got nan"):
        cli.at_least(0, dataclasses.make_dataclass("C", ["seed"])(math.nan), "seed")


# --- run ------------------------------------------------------------------------------------------


def ends(main: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """The exit code of a script and what it says on stderr."""
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    return caught.value.code, capsys.readouterr().err


def raises(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a rule:\n  got 3"), "error: a rule: got 3\n"),
        (ArithmeticError("not finite"), "error: not finite\n"),
        (OSError("the disk is full"), "error: the disk is full\n"),
        (PermissionError(13, "Permission denied", "a.txt"), "error: a.txt: Permission denied\n"),
        (MemoryError("no room for 9 GB"), "error: no room for 9 GB\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), "error: CUDA out of memory\n"),
    ],
)
def test_what_the_user_can_mend_becomes_one_line(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
):
    assert ends(raises(error), capsys) == (2, said)


def test_ctrl_c_ends_as_shells_expect(capsys: pytest.CaptureFixture[str]):
    assert ends(raises(KeyboardInterrupt()), capsys) == (130, "")


def test_a_tensor_larger_than_the_memory_is_refused_in_a_line(capsys: pytest.CaptureFixture[str]):
    code, said = ends(lambda: torch.empty(2**60, dtype=torch.uint8), capsys)
    assert code == 2
    assert "memory: you tried to allocate 1152921504606846976 bytes" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), RuntimeError("x")])
def test_a_fault_of_the_program_keeps_its_traceback(error: Exception):
    with pytest.raises(type(error)) as caught:
        cli.run(raises(error))
    assert caught.value is error


def script(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` as a script would be, from the repository."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        cwd=REPOSITORY,
        text=True,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"},
    )


def test_a_real_script_lists_every_field_with_its_docstring(tmp_path: Path):
    assert finish(start("train", "--help", output=tmp_path / "log")) == 0
    said = without_box((tmp_path / "log").read_text(encoding="utf-8"))
    assert said.startswith("usage: train.py ")
    for about in ("--model.n_layer INT Number of Transformer blocks;", "Number of optimizer updat"):
        assert about in said


def test_a_real_script_refuses_a_flag_with_exit_code_2(tmp_path: Path):
    assert finish(start("train", "--max_step=3", output=tmp_path / "log")) == 2
    said = without_box((tmp_path / "log").read_text(encoding="utf-8"))
    assert "Unrecognized options: --max_step=3 Perhaps you meant: --max_steps INT" in said


def test_a_reader_that_closes_the_pipe_early_ends_a_script_quietly():
    code = "import cli\ndef main():\n    while True: print('x' * 1000)\ncli.run(main)"
    shell = f'"{sys.executable}" -c "$CODE" | head -1; echo "${{PIPESTATUS[0]}}"'
    said = subprocess.run(
        ["bash", "-c", shell],
        capture_output=True,
        cwd=REPOSITORY,
        text=True,
        env=os.environ | {"CODE": code},
    )
    assert said.stdout == "x" * 1000 + "\n0\n"
    assert said.stderr == ""


def test_any_character_can_be_printed_wherever_the_output_goes():
    said = script("import cli; cli.run(lambda: print('é … 日本'))")
    assert (said.returncode, said.stdout, said.stderr) == (0, "é … 日本\n", "")


def test_a_script_that_ends_does_not_search_torchs_objects_for_garbage():
    frozen = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0))"
    said = script(f"{frozen}; import cli; cli.run(lambda: None)")
    assert (said.stdout, said.stderr) == ("True\n", "")
