"""The tour runs from its first cell to its last, and its stored outputs are those of such a run.

python tests/test_tour.py    # run it, and store its outputs again
"""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "tour.ipynb"
MOST_BYTES = 150_000  # with its outputs, so that a page that shows it stays quick to load
CELL_SECONDS = 300  # longer than any cell takes, on a busy machine too
AGAIN = "store its outputs again: python tests/test_tour.py"

Cells = list[Any]


def run() -> Any:
    """Return the notebook with the outputs of a run in a new kernel, but without its times."""
    notebook = nbformat.read(TOUR, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}  # without the version that ran it
    return notebook


def code_cells(notebook: Any) -> Cells:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def is_alike(before: str, now: str) -> bool:
    """Compare what was printed: the last digit of 0.1234 may differ, as processors round apart."""
    decimal = re.compile(r"\d+\.(\d+)")
    if decimal.sub("#", before) != decimal.sub("#", now):
        return False
    pairs = zip(decimal.finditer(before), decimal.finditer(now), strict=True)
    return all(abs(float(a[0]) - float(b[0])) < 1.5 * 10 ** -len(a[1]) for a, b in pairs)


@pytest.fixture(scope="module")
def stored() -> Cells:
    return code_cells(nbformat.read(TOUR, as_version=4))


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    """Run every cell, whose `assert` lines check what the text claims."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):  # not those of whoever runs the tests
            patch.setenv(folder, str(tmp_path_factory.mktemp(folder)))
        return code_cells(run())


@pytest.mark.slow
def test_every_cell_runs_and_warns_of_nothing(executed: Cells) -> None:
    outputs = [output for cell in executed for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []


@pytest.mark.slow
def test_the_outputs_that_depend_on_no_training_are_those_of_a_run_now(
    stored: Cells, executed: Cells
) -> None:
    first_trained = next(n for n, cell in enumerate(stored) if "train(model" in cell.source)
    assert first_trained > 20
    for before, now in zip(stored[:first_trained], executed, strict=False):
        assert is_alike(printed(before), printed(now)), AGAIN


def test_every_cell_was_executed_in_order_and_none_failed(stored: Cells) -> None:
    counts = [cell.execution_count for cell in stored]
    assert counts == list(range(1, len(stored) + 1)), AGAIN
    outputs = [output for cell in stored for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert [output for output in outputs if output.get("name") == "stderr"] == []


def test_cells_that_print_or_draw_have_their_outputs(stored: Cells) -> None:
    speaking = [cell for cell in stored if "\nprint(" in f"\n{cell.source}"]
    drawing = [cell for cell in stored if "plt.subplots" in cell.source]
    assert len(speaking) > 15
    assert len(drawing) == 2
    assert all(printed(cell) for cell in speaking), AGAIN
    drawn = [[set(output.get("data", {})) for output in cell.outputs] for cell in drawing]
    assert drawn == [[{"image/png", "text/plain"}]] * 2, AGAIN


def test_the_parameters_of_gpt_3s_attention_are_counted(stored: Cells) -> None:
    text = "".join(map(printed, stored))
    for number in ("1,572,864", "6,291,456", "603,979,776", "57,982,058,496"):
        assert f"= {number}\n" in text


def test_the_file_is_small_and_holds_nothing_of_the_machine_that_ran_it(stored: Cells) -> None:
    assert TOUR.stat().st_size < MOST_BYTES
    assert [cell.metadata for cell in stored if "execution" in cell.metadata] == [], AGAIN
    text = TOUR.read_text(encoding="utf-8")
    assert [place for place in ("/home/", "/Users/", "/tmp/", str(ROOT)) if place in text] == []


if __name__ == "__main__":
    nbformat.write(run(), TOUR)
