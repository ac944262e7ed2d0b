"""The three sources of a config, and every refusal as one sentence."""

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

from engine import cli
from helpers import REPOSITORY
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


def refusal(*argv: str) -> str:
    """The sentence with which `argv` is refused."""
    with pytest.raises(ValueError, match=r"\w") as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{Path(sys.argv[0]).name}: ")


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "config.toml").write_text(text, encoding="utf-8")
        return str(tmp_path / "config.toml")

    return write


# --- Sources --------------------------------------------------------------------------------------


def test_without_arguments_all_is_default():
    assert parse() == Config()


def test_the_file_wins_over_defaults_and_flags_win_over_the_file(toml: Callable[[str], str]):
    path = toml('seed = 2\nclip = 2.0\nname = "b"\n[part]\nwidth = 8\nlearning_rate = 2.0\n')
    config = parse(path, "--seed=3", "--part.width=16")
    assert config == Config(seed=3, clip=2.0, name="b", part=Part(width=16, learning_rate=2.0))


def test_a_file_may_hold_a_value_of_every_kind(toml: Callable[[str], str]):
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


@pytest.mark.parametrize(
    ("argv", "resume"),
    [
        (["--resume"], True),
        (["--resume", "--seed=3"], True),
        (["--seed", "3", "--resume"], True),
        (["--resume=True"], True),
        (["--resume", "True"], True),
        (["--resume=False"], False),
    ],
)
def test_a_bare_switch_means_true(argv: list[str], resume: bool):
    assert parse(*argv).resume is resume


def test_a_switch_of_the_file_can_be_turned_off(toml: Callable[[str], str]):
    assert parse(toml("resume = true"), "--resume=False").resume is False


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
def test_a_dumped_config_reads_back_equal(config: Config, toml: Callable[[str], str]):
    assert parse(toml(cli.dump_config(config))) == config


def test_a_dumped_training_config_reads_back_equal(toml: Callable[[str], str]):
    config = cli.parse_config(TrainConfig, ["--optim.grad_clip=inf", "--out_dir=a/b", "--resume"])
    assert cli.parse_config(TrainConfig, [toml(cli.dump_config(config))]) == config


def test_none_is_left_out_of_a_dumped_config():
    assert "prompt_file" not in cli.dump_config(Config())


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--sed=3", "--seed"),
        ("--nme", "--name"),
        ("--bettas=1", "--betas"),
        ("--part.widht=3", "--part.width"),
        ("--part.lerning_rate=3", "--part.learning_rate"),
        ("--learning_rate=3", "--part.learning_rate"),
        ("--prat.width=3", "--part.width"),
    ],
)
def test_a_misspelt_flag_is_refused_with_the_nearest_right_one(flag: str, nearest: str):
    assert refusal(flag).startswith("Unrecognized options: --")
    assert refusal(flag).endswith(f"; perhaps you meant {nearest}")


def test_a_flag_like_no_other_is_refused_without_a_guess():
    assert refusal("--zzzzzz=1") == "Unrecognized options: --zzzzzz=1"


def test_a_misspelt_key_is_refused_with_its_file_and_the_nearest_right_one(
    toml: Callable[[str], str],
):
    path = toml("[part]\nwidht = 3\n")
    expected = f"{path}: Unrecognized options: --part.widht=3; perhaps you meant --part.width"
    assert refusal(path) == expected


def test_a_misspelt_table_is_refused_with_the_nearest_right_key(toml: Callable[[str], str]):
    assert refusal(toml("[prat]\nwidth = 3\n")).endswith("; perhaps you meant --part.width")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed=ten"], "Error parsing --seed: invalid literal for int() with base 10: 'ten'"),
        (["--seed=1.5"], "Error parsing --seed: invalid literal for int() with base 10: '1.5'"),
        (["--seed"], "Missing value for argument '--seed'. Expected 1 values."),
        (["--clip=much"], "Error parsing --clip: could not convert string to float: 'much'"),
        (["--betas", "0.9"], "Missing value for argument '--betas'. Expected 2 values."),
        (["stray"], "Unrecognized options: stray"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(argv: list[str], message: str):
    assert refusal(*argv) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('seed = "ten"', "--seed: invalid literal for int() with base 10: 'ten'"),
        ("seed = 1.5", "--seed: invalid literal for int() with base 10: '1.5'"),
        ("seed = true", "--seed: invalid literal for int() with base 10: 'True'"),
        ("resume = 1", "invalid choice '1' for argument '--resume'"),
        ('kind = "medium"', "invalid choice 'medium' for argument '--kind'"),
        ("betas = [0.9]", "Missing value for argument '--betas'. Expected 2 values."),
        ("part = 3", "Unrecognized options: --part=3"),
        ('seed = "30"', "seed has a value of the wrong type: got '30'"),
        ("seed = [30]", "seed has a value of the wrong type: got [30]"),
        ("clip = true", "Error parsing --clip: could not convert string to float: 'True'"),
        ('resume = "True"', "resume has a value of the wrong type: got 'True'"),
        ("path = 5", "path has a value of the wrong type: got 5"),
        ('path = ["x", "--seed=5"]', "path has a value of the wrong type"),
        ('[part]\nlearning_rate = "1e-3"', "learning_rate has a value of the wrong type"),
        ("seed = -1", "seed must be at least 0: got -1"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_file_is_refused(
    text: str, message: str, toml: Callable[[str], str]
):
    assert message in refusal(toml(text))


def test_a_wrong_choice_is_refused_with_the_right_ones():
    expected = "invalid choice 'medium' for argument '--kind'. Expected one of ('small', 'large')."
    assert refusal("--kind=medium") == expected


@pytest.mark.parametrize("seed", ["-1", "-100"])
def test_a_bad_combination_is_refused_with_rule_and_value(seed: str):
    assert refusal(f"--seed={seed}").endswith(f"seed must be at least 0: got {seed}")


@pytest.mark.parametrize("text", ["seed = ", "seed 3", "[part", "seed = 1\nseed = 2", "\0"])
def test_a_file_that_is_not_toml_is_refused_by_name(text: str, toml: Callable[[str], str]):
    assert refusal(toml(text)).startswith(f"{toml(text)} is not valid TOML: ")


def test_a_file_that_is_not_text_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "picture.toml"
    path.write_bytes(b"\x89PNG\xff")
    assert refusal(str(path)).startswith(f"{path} is not valid TOML: ")


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
    ],
)
def test_what_the_user_can_mend_becomes_one_line(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
):
    assert ends(raises(error), capsys) == (2, said)


def test_ctrl_c_ends_as_shells_expect(capsys: pytest.CaptureFixture[str]):
    assert ends(raises(KeyboardInterrupt()), capsys) == (130, "")


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


def test_a_real_script_says_what_is_wrong_in_one_line_and_exits_with_2():
    said = script("from engine import cli; import train; cli.run(train.main)", "--max_step=3")
    expected = "error: -c: Unrecognized options: --max_step=3; perhaps you meant --max_steps\n"
    assert (said.returncode, said.stdout, said.stderr) == (2, "", expected)


def test_help_lists_every_field_with_its_docstring():
    said = script("from engine import cli; import train; cli.run(train.main)", "--help")
    assert said.returncode == 0
    assert "--model.n_layer" in said.stdout
    assert "Number of optimizer updates;" in said.stdout


def test_a_reader_that_closes_the_pipe_early_ends_a_script_quietly():
    code = "from engine import cli\ndef main():\n    while True: print('x' * 1000)\ncli.run(main)"
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
    said = script("from engine import cli; cli.run(lambda: print('é … 日本'))")
    assert (said.returncode, said.stdout, said.stderr) == (0, "é … 日本\n", "")
