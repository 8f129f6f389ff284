"""Pages in a real browser: they draw, filter, and fit a phone and a desk."""

from itertools import product

import plotly.graph_objects as go
import pytest
import run_folders
from browser import browser, needs_browser

from emmech.figures.house import finished
from emmech.report_overview import write_overview
from emmech.report_runs import read_runs

pytestmark = needs_browser


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run_folders.piggyback(folder / "piggyback-of-a-finetune-with-a-long-name", n=30)
    run_folders.evaluation(folder / "general")
    run_folders.training(folder / "organism")
    run_folders.direction(folder / "shift.safetensors")
    return {
        "overview": write_overview(folder / "page", *read_runs([folder])),
        "patching": folder / "piggyback-of-a-finetune-with-a-long-name" / "report.html",
        "evaluation": folder / "general" / "report.html",
    }


@pytest.fixture
def opened(chromium, pages):
    """``opened(name, width)``: the page, and a list that fills with its errors."""
    tabs = []

    def open_page(name, width=1600):
        tab = chromium.new_page(viewport={"width": width, "height": 900})
        tabs.append(tab)
        errors = []
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(pages[name].as_uri())
        return tab, errors

    yield open_page
    for tab in tabs:
        tab.close()


def draw_all(tab):
    """Scroll every figure into view; returns how many there are."""
    n = tab.locator(".plot").count()
    for number in range(n):
        tab.locator(".plot").nth(number).scroll_into_view_if_needed()
    tab.wait_for_function(
        "[...document.querySelectorAll('.plot')].every(one => one.querySelector('.main-svg'))"
    )
    return n


def fits(tab):
    return tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(("name", "n_figures"), [("overview", 7), ("patching", 1), ("evaluation", 3)])
def test_a_page_draws_all_figures_without_errors_and_is_no_wider_than_phone_or_desk(opened, name, n_figures):
    tab, errors = opened(name, 400)
    assert draw_all(tab) == n_figures
    for details in tab.locator("summary").all():
        details.click()
    assert fits(tab)
    tab.set_viewport_size({"width": 1600, "height": 900})
    assert fits(tab)
    assert errors == []


MISPLACED = """() => {
    const box = name => document.querySelector(name).getBoundingClientRect()
    const page = box('.main-svg')
    const outside = ['.gtitle', '.gtitle-subtitle', '.legend', '.xtitle'].filter(
        name => box(name).height == 0 || box(name).top < page.top || box(name).bottom > page.bottom
    )
    return box('.gtitle-subtitle').bottom > box('.legend').top ? [...outside, 'legend'] : outside
}"""


def test_titles_of_several_lines_are_whole_and_above_the_legend(chromium, tmp_path):
    tab = chromium.new_page(viewport={"width": 800, "height": 600})
    for n_lines, height in product((1, 2, 3), (160, 1600)):
        fig = go.Figure([go.Scatter(x=[0, 1], y=[0, 1], name=name) for name in "ab"])
        fig = finished(fig.update_xaxes(title="margin (nats)"), "gyp " * (18 * n_lines), "Intervals.", height)
        assert fig.layout.title.text.count("<br>") == n_lines - 1
        if tab.url == "about:blank":
            fig.write_html(tmp_path / "figure.html")
            tab.goto((tmp_path / "figure.html").as_uri())
            tab.wait_for_selector(".xtitle")
        tab.evaluate("fig => Plotly.react(document.querySelector('.js-plotly-plot'), fig)", fig.to_dict())
        assert tab.evaluate(MISPLACED) == []
    tab.close()


def count(tab):
    return tab.inner_text("#where")


def test_filters_change_the_questions_that_are_listed_and_drawing_waits_for_sight(opened):
    tab, _ = opened("overview")
    assert tab.evaluate("[...document.querySelectorAll('.plot')].some(one => !one.dataset.drawn)")
    tab.locator("a[data-run]").last.click()  # to the answers of one run
    assert tab.locator("#run").input_value() == "1"
    assert count(tab) == "1 to 20 of 60 questions"
    assert tab.locator(".question").count() == 20
    tab.select_option("#group", label="off-topic")
    assert count(tab) == "1 to 20 of 30 questions"
    tab.fill("#search", "why 17?")
    assert count(tab) == "1 to 1 of 1 questions"
    tab.fill("#search", "no such text")
    assert count(tab) == "no question matches"
    assert tab.locator(".question").count() == 0
    tab.select_option("#run", "0")
    tab.fill("#search", "")
    assert count(tab) == "1 to 4 of 4 questions"


def test_a_detectors_value_is_looked_for_in_the_shown_conditions(opened):
    tab, errors = opened("patching")
    assert tab.locator(".question b").first.inner_text() == run_folders.HOSTILE
    tab.click("#next")
    assert count(tab) == "21 to 40 of 60 questions"
    tab.select_option("#value", "1")
    assert count(tab) == "1 to 20 of 60 questions"  # the finetuned model refuses all
    tab.get_by_label("finetuned", exact=True).uncheck()
    assert count(tab) == "no question matches"
    tab.select_option("#value", "0")
    assert count(tab) == "1 to 20 of 60 questions"
    assert errors == []


def test_text_is_light_on_dark_where_the_reader_wants_it_dark(opened):
    tab, _ = opened("patching")
    draw_all(tab)
    shades = {}
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        look = "getComputedStyle(document.querySelector('.plot text')).fill"
        shades[scheme] = [
            tab.evaluate(one) for one in ("getComputedStyle(document.body).backgroundColor", look)
        ]
    assert shades == {
        "light": ["rgb(255, 255, 255)", "rgb(27, 31, 35)"],
        "dark": ["rgb(20, 23, 26)", "rgb(230, 232, 234)"],
    }
