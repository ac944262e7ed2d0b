"""The page in headless Chromium: the right numbers at each click, and no request to anybody."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from browser import Page, chromium, find_chromium
from data.tokenizer import ByteTokenizer
from model import GPT, ModelConfig
from sampling.choose import Choice, distribution
from viewer import page
from viewer.examples import examples_scene
from viewer.live import LiveServer
from viewer.page import packed
from viewer.probe import make_probes, measure
from viewer.record import losses, record, switch_off
from viewer.reverser import reverser_scene
from viewer.scene import Checkpoint, model_scene
from viewer.tokens import shown

BINARY = find_chromium()
if BINARY is None:
    pytest.skip("needs Chromium: apt-get install chromium", allow_module_level=True)

NASTY = "</script><script>bad = 1</script><img src=x onerror='bad = 1'> & 🙂\n\t\"'\\ \u2028"
LEFT, TOP = 84, 76  # what the names of tokens take beside a map
BYTES = ByteTokenizer()


def built(seed: int, **sizes: Any) -> GPT:
    torch.manual_seed(seed)
    small = {"n_layer": 2, "n_head": 3, "n_embd": 24, "context_length": 128}
    config = ModelConfig(architecture="modern", vocab_size=BYTES.vocab_size, **{**small, **sizes})
    model = GPT(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def judged(models: list[GPT]) -> list[Checkpoint]:
    probes = make_probes(models[0], 10, BYTES.vocab_size)
    return [Checkpoint(100 * n, model, measure(model, probes)) for n, model in enumerate(models)]


MODELS = [built(0), built(1)]
CHECKPOINTS = judged(MODELS)


def name(token: int) -> str:
    return shown(BYTES.token_bytes(token))


def scene_of(text: str, checkpoints: list[Checkpoint]) -> dict[str, Any]:
    if not text:
        raise ValueError("the text must not be empty")
    return model_scene(checkpoints, tokens(text), name, ["a notice"])


def tokens(text: str) -> Tensor:
    return torch.tensor([BYTES.encode(text)])


def build(text: str, **settings: Any) -> str:
    return page.build([examples_scene(), scene_of(text, CHECKPOINTS), reverser_scene()], **settings)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(BINARY or "", tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, browser: Page) -> Callable[..., Page]:
    """Return a function that opens the page of a text from a file."""
    folder = tmp_path_factory.mktemp("pages")
    written: dict[str, Path] = {}

    def open_page(text: str = "to be or not to be", **settings: Any) -> Page:
        path = written.get(text, folder / f"{len(written)}.html")
        if text not in written:
            path.write_text(build(text), encoding="utf-8")
            written[text] = path
        browser.messages.clear()
        browser.open(path.as_uri(), **settings)
        return browser

    return open_page


def click_cell(tab: Page, i: int, j: int) -> None:
    """Click where the map has query i and key j."""
    cell, across, down = tab.run(
        "(() => { const c = document.querySelector('#maps canvas');"
        " return [c.cell, c.clientWidth, c.clientHeight]; })()"
    )
    x, y = LEFT + (j + 0.5) * cell, TOP + (i + 0.5) * cell
    tab.click("#maps canvas", x / across, y / down)


def number(tab: Page, name: str) -> float:
    """Return a number that stands on the page."""
    return as_number(tab.run(f"document.querySelector('[data-name={name}]').textContent"))


def as_number(text: str) -> float:
    return float(text.replace("−", "-"))


def table(tab: Page, n: int) -> list[list[str]]:
    return tab.run(
        f"[...document.querySelectorAll('#side table')[{n}].querySelectorAll('tbody tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))"
    )


def text_of(tab: Page, selector: str) -> str:
    return tab.run(f"document.querySelector({json.dumps(selector)}).textContent")


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
    assert text_of(tab, "#notices") == "a notice"
    assert tab.complaints() == []


# --- The numbers ----------------------------------------------------------------------------------


def test_a_click_on_a_cell_shows_every_number_behind_it(opened: Callable[..., Page]):
    tab = opened()
    i, j = 9, 4
    tab.click("#grid .heads:nth-of-type(2) button:nth-child(2)")  # layer 1, head 1
    click_cell(tab, i, j)
    kept = record(MODELS[1], tokens("to be or not to be"))
    q_TD, k_TD, v_TD, y_TD = (
        tensor[1, 0, 1].double()
        for tensor in (kept.q_LBHTD, kept.k_LBHSD, kept.v_LBHSD, kept.y_LBHTD)
    )
    scores_S = k_TD[: i + 1] @ q_TD[i] / math.sqrt(8)
    expected = {
        "product": q_TD[i] @ k_TD[j],
        "score": scores_S[j],
        "exponential": scores_S[j].exp(),
        "denominator": scores_S.exp().sum(),
        "weight": scores_S.softmax(-1)[j],
        "model": kept.weights_LBHTS[1, 0, 1, i, j],
    }
    for key, value in expected.items():
        assert number(tab, key) == pytest.approx(float(value), rel=0.005, abs=6e-5), key
    assert number(tab, "apart") < 1e-5
    weight = float(kept.weights_LBHTS[1, 0, 1, i, j])
    assert text_of(tab, "#readout") == f"“n” (9) attends to “e” (4) with weight {weight:.4f}"
    channels, asked, outputs = (table(tab, n) for n in range(3))
    assert [as_number(row[3]) for row in channels[:8]] == pytest.approx(
        (q_TD[i] * k_TD[j]).tolist(), abs=1e-4
    )
    assert [as_number(row[3]) for row in asked] == pytest.approx(
        scores_S.softmax(-1).tolist(), rel=0.005, abs=6e-5
    )
    assert [as_number(row[2]) for row in outputs] == pytest.approx(
        (weight * v_TD[j]).tolist(), abs=1e-4
    )
    for column in (3, 4):
        assert [as_number(row[column]) for row in outputs] == pytest.approx(
            y_TD[i].tolist(), abs=1e-4
        )


def test_a_masked_cell_weighs_nothing(opened: Callable[..., Page]):
    tab = opened()
    click_cell(tab, 3, 8)
    assert (number(tab, "weight"), number(tab, "model"), number(tab, "exponential")) == (0, 0, 0)
    assert "cannot attend to" in text_of(tab, "#readout")


def test_with_queries_as_columns_the_same_cell_lies_across_the_diagonal(
    opened: Callable[..., Page],
):
    tab = opened()
    click_cell(tab, 9, 4)
    weight = number(tab, "weight")
    tab.click("#bar .switch:nth-of-type(2) :nth-child(2)")
    click_cell(tab, 4, 9)
    assert number(tab, "weight") == weight
    assert tab.run("[state.row, state.column]") == [9, 4]


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


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1, 0, 1), (0.5, 0, 1), (2, 7, 0.5)])
def test_the_next_token_is_what_sampling_would_draw(
    opened: Callable[..., Page], temperature: float, top_k: int, top_p: float
):
    tab = opened()
    at = 7
    sliders = {"temperature": temperature, "topK": top_k, "topP": top_p}
    tab.run(f"update({json.dumps({'side': 'next', 'row': at, **sliders})})")
    logits_V = record(MODELS[1], tokens("to be or not to be")).logits_BTV[0, at]
    choice = Choice(temperature=temperature, top_k=top_k, top_p=top_p)
    p_V = distribution(logits_V[None], choice)[0]
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
    assert len(table(tab, 0)) == len("to be or not to be") - 1


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


def test_every_control_is_reached_by_tab(opened: Callable[..., Page]):
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


def test_heads_stand_side_by_side_as_maps_and_as_lines(opened: Callable[..., Page]):
    tab = opened()
    tab.click("#bar > button")
    tab.click("#grid .heads:nth-of-type(2) button:nth-child(1)")
    assert tab.run("document.querySelectorAll('#maps canvas').length") == 2
    tab.click("#bar .switch:nth-of-type(1) :nth-child(2)")
    assert tab.run("document.querySelectorAll('#maps svg').length") == 2
    assert tab.run("document.querySelectorAll('#maps svg path').length") > 20
    assert tab.complaints() == []


def test_the_keyboard_points_at_a_token_and_stays_on_a_switch(opened: Callable[..., Page]):
    tab = opened()
    tab.run("update({ view: 'lines' })")
    tab.run("document.querySelector('#text [tabindex=\"0\"]').focus()")
    tab.press("ArrowLeft")
    assert tab.run("[state.hover.i, state.hover.j, state.row]") == [16, 16, 16]
    assert tab.run("document.querySelectorAll('#maps svg path').length") < 2 * 18
    tab.run("document.querySelector('[data-key=viewmap]').focus()")
    assert tab.run("state.hover") is None
    for selector in ("[data-key=transposedtrue]", "[data-key=pin]"):
        tab.run(f"document.querySelector('{selector}').focus()")
        tab.run("document.activeElement.click()")
        assert tab.run(f"document.activeElement.matches('{selector}')")
    assert tab.complaints() == []


def test_the_map_is_there_on_a_narrow_screen(opened: Callable[..., Page]):
    tab = opened(width=910, height=512)
    assert tab.run("document.querySelector('#maps canvas').cell") > 10
    assert tab.complaints() == []


def test_a_cut_of_one_scene_fits_another(opened: Callable[..., Page]):
    tab = opened()
    tab.run("Object.assign(state, { topK: 50, side: 'next' })")
    tab.run("openScene(scenes[2])")
    assert number(tab, "truth") > 0
    assert tab.run("state.topK") == 26


def test_the_chosen_key_is_scrolled_into_sight(opened: Callable[..., Page]):
    tab = opened("to be or not to be, that is the question: whether it is nobler")
    click_cell(tab, 55, 50)
    seen = tab.run(
        "(() => { const row = document.querySelector('.scroll tr.chosen').getBoundingClientRect();"
        " const box = document.querySelector('.scroll:has(tr.chosen)').getBoundingClientRect();"
        " return row.top >= box.top && row.bottom <= box.bottom; })()"
    )
    assert seen


# --- Live -----------------------------------------------------------------------------------------


def test_what_is_typed_is_shown_and_only_its_own_server_is_asked(browser: Page):
    def answer(text: str) -> dict[str, Any]:
        return scene_of(text, CHECKPOINTS[:1])

    with LiveServer(build("before", live=True), answer, port=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = f"http://127.0.0.1:{server.server_port}/"
        browser.messages.clear()
        browser.open(own)
        browser.click("form textarea")
        browser.type("after <b>")
        browser.wait("document.querySelectorAll('#text .token').length === 9")
        assert text_of(browser, "#text .token:nth-child(7)") == "<"
        assert browser.run("document.activeElement.value") == "after <b>"
        browser.run("update({ pinned: [state.panel] })")
        browser.type("\n")
        browser.wait("document.querySelectorAll('#text .token').length === 10")
        assert text_of(browser, "#text .token:nth-child(10)") == "↵"
        assert browser.run("state.pinned[0] === state.panel")
        browser.run("typed.select()")
        browser.ask(
            "Input.dispatchKeyEvent", type="keyDown", key="Backspace", windowsVirtualKeyCode=8
        )
        browser.wait("document.querySelector('#notices').textContent.includes('empty')")
        assert set(browser.requests()) <= {own, f"{own}favicon.ico"}
        server.shutdown()


@pytest.mark.slow
def test_the_largest_page_opens_with_all_its_maps(browser: Page, tmp_path: Path):
    model = built(0, n_layer=12, n_head=12, n_embd=24, context_length=256)
    scene = scene_of("x" * 256, judged([model]))
    for panel in scene["frames"][0]["panels"]:  # heads of 64 channels, as in GPT-2
        panel.update(dict.fromkeys("qkvo", packed(torch.rand(256, 64))))
    (tmp_path / "page.html").write_text(page.build([examples_scene(), scene]), encoding="utf-8")
    assert (tmp_path / "page.html").stat().st_size > 7e7
    browser.open((tmp_path / "page.html").as_uri())
    name, n_maps = browser.run("[state.scene.name, document.querySelectorAll('canvas').length]")
    assert name == "Your model"
    assert n_maps > 12 * 12  # one of them is enlarged
