"""The page in headless Chromium: the right numbers at each click, and no request to anybody."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from browser import Page, find_chromium
from pages import (
    BYTES,
    as_number,
    built,
    check_numbers,
    click_cell,
    fixed_scene,
    judged,
    name,
    number,
    table,
    text_of,
    tokens,
)
from viewer import page
from viewer.page import packed
from viewer.record import losses, record, switch_off
from viewer.reverser import reverser_scene
from viewer.scores import SCORES

if find_chromium() is None:
    pytest.skip("needs Chromium: apt-get install chromium", allow_module_level=True)

NASTY = "</script><script>bad = 1</script><img src=x onerror='bad = 1'> & 🙂\n\t\"'\\ \u2028"
MODELS = [built(0), built(1)]
CHECKPOINTS = judged(MODELS)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, browser: Page) -> Callable[..., Page]:
    """Return a function that opens the page of a text at the first head and the last token."""
    folder = tmp_path_factory.mktemp("pages")
    written: dict[str, Path] = {}

    def open_page(text: str = "to be or not to be", **settings: Any) -> Page:
        path = written.get(text, folder / f"{len(written)}.html")
        if text not in written:
            html = page.build([fixed_scene(CHECKPOINTS, text), reverser_scene()])
            path.write_text(html, encoding="utf-8")
            written[text] = path
        browser.messages.clear()
        browser.open(path.as_uri(), **settings)
        browser.run(
            "choosePanel(state.frame.panels[0]); choose(state.panel.axis.queries.length - 1)"
        )
        return browser

    return open_page


# --- It stands on its own -------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_opens_from_a_file_asks_nobody_and_complains_of_nothing(
    opened: Callable[..., Page], theme: str
):
    tab = opened(theme=theme)
    for scene in range(3):
        tab.click(f"#tabs :nth-child({scene + 1})")
        for side in range(tab.run("document.querySelectorAll('#sides [role=tab]').length")):
            tab.click(f"#sides :nth-child({side + 1})")
            assert tab.run("document.querySelector('#side').textContent.length") > 30
    assert tab.complaints() == []
    assert [url[:7] for url in tab.requests()] == ["file://"]
    assert tab.run("performance.getEntriesByType('resource').length") == 0


def test_everything_fits_a_laptop_screen(opened: Callable[..., Page]):
    tab = opened()
    assert tab.run("document.documentElement.scrollHeight <= innerHeight")
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    for part in ("#maps canvas", "#grid", "#legend", "#sides"):
        assert tab.run(f"document.querySelector('{part}').getBoundingClientRect().bottom <= 768")


def test_dark_and_light_differ(opened: Callable[..., Page]):
    colours = [
        opened(theme=theme).run("getComputedStyle(document.body).backgroundColor")
        for theme in ("light", "dark")
    ]
    assert len(set(colours)) == 2


def test_no_text_can_become_part_of_the_page_and_every_token_is_there(opened: Callable[..., Page]):
    tab = opened(NASTY)
    assert tab.run("typeof bad") == "undefined"
    assert tab.run("document.querySelectorAll('script').length") == 2
    assert tab.run("document.querySelectorAll('img').length") == 0
    strip = "[...document.querySelectorAll('#text .token')].map((token) => token.textContent)"
    assert tab.run(strip) == [name(token) for token in BYTES.encode(NASTY)]
    assert text_of(tab, "#legend").endswith("a notice")
    assert tab.complaints() == []


# --- The numbers ----------------------------------------------------------------------------------


def test_a_click_on_a_cell_shows_every_number_behind_it(opened: Callable[..., Page]):
    tab = opened()
    tab.click("#grid .heads:nth-of-type(2) button:nth-child(2)")  # layer 1, head 1
    click_cell(tab, 9, 4)
    check_numbers(tab, record(MODELS[1], tokens("to be or not to be")), (1, 1), (9, 4))
    assert text_of(tab, "#readout").startswith("“n” (9) attends to “e” (4) with weight ")


def test_a_masked_cell_weighs_nothing(opened: Callable[..., Page]):
    tab = opened()
    click_cell(tab, 3, 8)
    assert (number(tab, "weight"), number(tab, "model"), number(tab, "exponential")) == (0, 0, 0)
    assert "cannot attend to" in text_of(tab, "#readout")


def test_the_worked_example_shows_the_printed_numbers(opened: Callable[..., Page]):
    tab = opened()
    tab.click("#tabs :first-child")
    click_cell(tab, 2, 1)
    assert [number(tab, n) for n in ("product", "score", "weight")] == [0.2508, 0.1773, 0.2632]
    tab.click("#grid .heads:nth-of-type(2) button:nth-child(1)")
    click_cell(tab, 2, 1)
    assert [number(tab, n) for n in ("score", "weight", "model")] == [0.89, 0.3784, 0.3784]
    assert [row[3] for row in table(tab, 2)] == ["0.5320", "0.5437", "0.4613"]


def test_the_toys_strongest_key_is_the_mirrored_letter(opened: Callable[..., Page]):
    tab = opened()
    tab.click("#tabs :last-child")
    click_cell(tab, 2, 5)
    assert number(tab, "weight") > 0.9
    assert text_of(tab, "#readout").startswith("“s” (2) attends to “s” (5) with weight ")


def test_the_next_token_is_what_the_model_predicts(opened: Callable[..., Page]):
    tab = opened()
    at = 7
    tab.run(f"update({json.dumps({'side': 'next', 'row': at})})")
    logits_V = record(MODELS[1], tokens("to be or not to be")).logits_BTV[0, at]
    p_V = logits_V.softmax(-1)
    top = logits_V.topk(10).indices
    rows = table(tab, 0)
    assert [row[0].split("  ")[0] for row in rows] == [name(token) for token in top.tolist()]
    assert [as_number(row[2]) for row in rows] == pytest.approx(
        p_V[top].tolist(), rel=0.01, abs=6e-5
    )
    true = BYTES.encode("to be or not to be")[at + 1]
    assert number(tab, "truth") == pytest.approx(float(p_V[true]), rel=0.01, abs=1e-4)
    loss = float(-logits_V.log_softmax(-1)[true])
    assert number(tab, "loss") == pytest.approx(loss, abs=1e-4)


def test_a_head_that_is_off_changes_the_loss_as_in_the_model(opened: Callable[..., Page]):
    tab = opened()
    tab.click("#grid .heads:nth-of-type(1) button:nth-child(3)")
    tab.run("update({ side: 'off' })")
    with switch_off(MODELS[1], 0, 2):
        without = float(losses(MODELS[1], tokens("to be or not to be")).mean())
    assert number(tab, "off") == pytest.approx(without, abs=1e-4)
    assert len(table(tab, 1)) == len("to be or not to be") - 1


# --- Worked examples, read from the page ----------------------------------------------------------


def worked(tab: Page, n: int, name: str) -> Tensor:
    """Return q, k, v, o or the weights (w) of panel n of the worked examples."""
    panel = f"scenes[0].frames[0].panels[{n}]"
    rows = f"{panel}.axis.queries.map((_, i) =>"
    if name == "w":
        found = tab.run(f"{rows} {panel}.axis.keys.map((_, j) => weight({panel}, i, j)))")
    else:
        found = tab.run(f"{rows} row({panel}, '{name}', i, {panel}.axis.queries.length))")
    return torch.tensor(found)


OTHER_Y = [[0.7504, -0.0072], [0.8748, 0.0645], [0.7008, -0.1071]]


def test_the_numbers_of_the_walk_through_are_those_that_are_printed(opened: Callable[..., Page]):
    tab = opened()
    q_TD, k_TD, v_TD, weights_TS, y_TD = (worked(tab, 0, name) for name in "qkvwo")
    scores_TS = q_TD @ k_TD.T
    printed = {
        "q": (q_TD, [[0.88, -0.4509], [-0.0549, -0.7598], [-0.085, -0.5294], [-0.517, -0.3579]]),
        "k": (k_TD, [[-0.0554, -1.9855], [-1.446, -0.2416], [-0.9736, -0.4014], [-0.94, 0.122]]),
        "v": (v_TD, [[-0.3642, 0.4548], [2.0765, 1.9576], [1.4534, 1.2925], [1.6637, 1.054]]),
        "scores": (scores_TS[3], [0.7393, 0.8340, 0.6470, 0.4423]),
        "scaled": (scores_TS[3] / math.sqrt(2), [0.5228, 0.5897, 0.4575, 0.3128]),
        "weights": (weights_TS[2:], [[0.4651, 0.2632, 0.2716, 0], [0.262, 0.2802, 0.2455, 0.2124]]),
        "y": (y_TD, [[-0.3642, 0.4548], [0.3499, 0.8945], [0.772, 1.0779], [1.1964, 1.2087]]),
        "others": (worked(tab, 1, "w")[3], [0.1504, 0.3682, 0.2866, 0.1948]),
        "other y": (worked(tab, 1, "o")[1:], OTHER_Y),
    }
    for key, (found, expected) in printed.items():
        assert torch.allclose(found, torch.tensor(expected), atol=5.1e-5), key


def test_the_numbers_of_the_walk_through_come_from_the_seed_that_it_names(
    opened: Callable[..., Page],
):
    tab = opened()
    torch.manual_seed(42)
    assert torch.allclose(torch.randn(2, 4, 2), torch.tensor(tab.run("TEXTS")), atol=1e-6)
    for weight, bias in tab.run("LINEAR"):
        linear = nn.Linear(2, 2)
        assert torch.allclose(linear.weight, torch.tensor(weight), atol=1e-6)
        assert torch.allclose(linear.bias, torch.tensor(bias), atol=1e-6)


@pytest.mark.parametrize("n", range(5))
def test_every_worked_example_is_what_torch_makes_of_its_queries_keys_and_values(
    opened: Callable[..., Page], n: int
):
    tab = opened()
    q_TD, k_TD, v_TD, weights_TS, y_TD = (worked(tab, n, name) for name in "qkvwo")
    causal, scale = n != 2, 1 if n in (2, 3) else 1 / math.sqrt(q_TD.shape[1])
    expected = F.scaled_dot_product_attention(q_TD, k_TD, v_TD, is_causal=causal, scale=scale)
    assert torch.allclose(y_TD, expected, atol=1e-6)
    eye = torch.eye(len(k_TD))
    expected = F.scaled_dot_product_attention(q_TD, k_TD, eye, is_causal=causal, scale=scale)
    assert torch.allclose(weights_TS, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "weights", "output"),
    [
        (2, [0.285989, 0.378400, 0.335611], [0.532002, 0.543678, 0.461285]),
        (3, [0.285989, 0.378400, 0.335611], [0.532002, 0.543678, 0.461285]),
        (4, [0.3056, 0.3592, 0.3352], [0.5185, 0.5534, 0.4496]),
    ],
)
def test_what_sat_reads_is_computed_right(
    opened: Callable[..., Page], n: int, weights: list[float], output: list[float]
):
    tab = opened()
    assert worked(tab, n, "w")[2].tolist() == pytest.approx(weights, abs=5e-5)
    assert worked(tab, n, "o")[2].tolist() == pytest.approx(output, abs=5e-5)
    second = {3: [0.28905, 0.71095, 0], 4: [0.372942, 0.627058, 0]}
    if n in second:
        assert worked(tab, n, "w")[1].tolist() == pytest.approx(second[n], abs=5e-6)


def test_scores_of_the_worked_example(opened: Callable[..., Page]):
    tab = opened()
    weights_TS = worked(tab, 0, "w")
    rows = "rowsOf(scenes[0].frames[0].panels[0])"
    expected = {"previous": 0.4054, "first": 0.4782, "entropy": 0.9448, "distance": 0.8732}
    for score, value in expected.items():
        assert float(SCORES[score](weights_TS, torch.arange(4))) == pytest.approx(value, abs=1e-4)
        assert tab.run(f"scoreOf('{score}', {rows}, [0, 1, 2, 3])") == pytest.approx(
            value, abs=1e-4
        )
    # No token comes twice, so no text can tell
    assert math.isnan(SCORES["induction"](weights_TS, torch.arange(4)))
    assert tab.run(f"scoreOf('induction', {rows}, [0, 1, 2, 3])") is None


# --- Pointer and keys -----------------------------------------------------------------------------


def test_the_slider_goes_through_the_checkpoints(opened: Callable[..., Page]):
    tab = opened()
    click_cell(tab, 9, 4)
    last = number(tab, "model")
    assert text_of(tab, "#film") == "step 100"
    tab.run("document.querySelector('#film input').focus()")
    tab.press("ArrowLeft")
    assert text_of(tab, "#film") == "step 0"
    kept = record(MODELS[0], tokens("to be or not to be"))
    first = float(kept.weights_LBHTS[0, 0, 0, 9, 4])
    assert number(tab, "model") == pytest.approx(first, rel=0.005, abs=6e-5)
    assert number(tab, "model") != last
    tab.press("ArrowRight")
    assert number(tab, "model") == last
    assert tab.run("document.activeElement.type") == "range"


def test_arrow_keys_move_cell_head_token_and_tab_and_the_focus_with_them(
    opened: Callable[..., Page],
):
    tab = opened()
    click_cell(tab, 9, 4)
    for key, expected in (("ArrowUp", [8, 4]), ("ArrowRight", [8, 5]), ("ArrowDown", [9, 5])):
        tab.press(key)
        assert tab.run("[state.row, state.column]") == expected
    tab.run("document.querySelector('#grid [tabindex=\"0\"]').focus()")
    tab.press("ArrowRight")
    tab.press("ArrowDown")
    assert tab.run("document.activeElement.ariaLabel") == "layer 1, head 1"
    tab.run("document.querySelector('#text [tabindex=\"0\"]').focus()")
    tab.press("ArrowLeft")
    assert tab.run("state.row") == 8
    assert tab.run("document.activeElement.dataset.n") == "8"
    tab.run("document.querySelector('#sides [tabindex=\"0\"]').focus()")
    tab.press("ArrowRight")
    assert text_of(tab, "#sides [aria-selected=true]") == "Next token"
    assert tab.run("document.activeElement.textContent") == "Next token"
    assert tab.complaints() == []


def test_tab_reaches_every_part_of_the_page(opened: Callable[..., Page]):
    tab = opened()
    reached: set[str] = set()
    for _ in range(40):
        tab.press("Tab")
        reached.add(tab.run("document.activeElement.closest('[id]')?.id"))
    assert {"tabs", "text", "grid", "film", "bar", "maps", "sides", "side"} <= reached


def test_pointing_at_a_token_shows_what_it_reads_and_who_reads_it(opened: Callable[..., Page]):
    tab = opened()
    box = tab.run(
        "(() => { const r = document.querySelector('#text [data-n=\"5\"]').getBoundingClientRect();"
        " return [r.x + 3, r.y + 5]; })()"
    )
    tab.ask("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert tab.run("[state.hover.i, state.hover.j]") == [5, 5]
    assert text_of(tab, "#text .asks") == name(BYTES.encode("to be")[2])
    assert "(5) attends to" in text_of(tab, "#readout")


def test_a_head_can_be_seen_as_lines(opened: Callable[..., Page]):
    tab = opened()
    tab.click("[data-key=lines]")
    assert tab.run("document.querySelectorAll('#maps svg').length") == 1
    assert tab.run("document.querySelectorAll('#maps svg path').length") > 20
    assert tab.complaints() == []


def test_the_keyboard_points_at_a_token_and_stays_on_a_switch(opened: Callable[..., Page]):
    tab = opened()
    tab.run("update({ view: 'lines' })")
    tab.run("document.querySelector('#text [tabindex=\"0\"]').focus()")
    tab.press("ArrowLeft")
    assert tab.run("[state.hover.i, state.hover.j, state.row]") == [16, 16, 16]
    assert tab.run("document.querySelectorAll('#maps svg path').length") < 2 * 18
    for selector in ("[data-key=map]", "[data-key=lines]"):
        tab.run(f"document.querySelector('{selector}').focus()")
        assert tab.run("state.hover") is None
        tab.run("document.activeElement.click()")
        assert tab.run(f"document.activeElement.matches('{selector}')")
    assert tab.complaints() == []


def test_the_map_is_there_on_a_narrow_screen(opened: Callable[..., Page]):
    tab = opened(width=910, height=512)
    assert tab.run("document.querySelector('#maps canvas').cell") > 10
    assert tab.complaints() == []


def test_the_chosen_key_is_scrolled_into_sight(opened: Callable[..., Page]):
    tab = opened("to be or not to be, that is the question: whether it is nobler")
    click_cell(tab, 55, 50)
    seen = tab.run(
        "(() => { const row = document.querySelector('.scroll tr.chosen').getBoundingClientRect();"
        " const box = document.querySelector('.scroll:has(tr.chosen)').getBoundingClientRect();"
        " return row.top >= box.top && row.bottom <= box.bottom; })()"
    )
    assert seen


@pytest.mark.slow
def test_the_largest_page_opens_with_all_its_maps(browser: Page, tmp_path: Path):
    model = built(0, n_layer=12, n_head=12, n_embd=24, context_length=256)
    scene = fixed_scene(judged([model]), "x" * 256)
    for panel in scene["frames"][0]["panels"]:  # heads of 64 channels, as in GPT-2
        panel.update(dict.fromkeys("qkvo", packed(torch.rand(256, 64))))
    (tmp_path / "page.html").write_text(page.build([scene]), encoding="utf-8")
    assert (tmp_path / "page.html").stat().st_size > 7e7
    browser.open((tmp_path / "page.html").as_uri())
    name, n_maps = browser.run("[state.scene.name, document.querySelectorAll('canvas').length]")
    assert name == "Your model"
    assert n_maps > 12 * 12  # one of them is enlarged
