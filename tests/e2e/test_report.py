"""The page of ``dery report``: whole by itself, the same bytes each time, safe to open."""

from __future__ import annotations

import html
import html.parser
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from tests.conftest import run_dery

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


class Page(html.parser.HTMLParser):
    """Opens and closes of a page, and where it points to."""

    VOID = ("meta", "img", "br", "link", "path", "use", "rect", "circle")

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.titles, self.scripts = [], [], [], 0
        self.headings = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                self.links.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "title":
            self.titles.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_the_page_is_whole_and_the_same_each_time(copied, tmp_path):
    first = copied("report", "--to", "a.html", "--figures", "figures", "--json")
    assert first.code == 0, first.stderr
    told = first.json["result"]
    assert told["left_out"] == []
    text = (tmp_path / "a.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.scripts == 0
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert set(re.findall(r"https?://[^\s\"'<>)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert len(text.encode()) == told["bytes"] < 5_000_000
    for heading in (
        "The zoo",
        "The pick",
        "Equivalence sets",
        "Beside its controls",
        "Accuracy and cost",
        "Fine-tuning",
        "Confusion on the test images",
    ):
        assert heading in page.headings
    # what hovering says: donors, pairs of them, pieces and updates
    for words in ("multiply-adds", "on average", "stitch", "update", "anchor"):
        assert any(words in title for title in page.titles), words
    assert "dery finetune --steps 8" in re.sub(r"<[^>]+>", "", text)
    identifiers = re.findall(r' id="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    for name in told["figures"]:
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "figures" / f"{name}.svg").read_text()
    assert copied("report", "--to", "b.html", "--json").code == 0
    assert (tmp_path / "b.html").read_bytes() == (tmp_path / "a.html").read_bytes()


def test_a_page_that_is_there_is_kept(copied, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    refused = copied("report", "--no-images", "--json")
    assert refused.code == 2
    assert "--force" in refused.json["error"]["hint"]
    assert (tmp_path / "report.html").read_text() == "mine"
    assert copied("report", "--no-images", "--force", "--json").code == 0


def test_what_is_missing_is_left_out_and_said(copied, tmp_path):
    root = tmp_path / "ws"
    (root / "partition.json").unlink()
    shutil.rmtree(root / "runs")
    found = copied("report", "--no-images", "--json").json["result"]
    assert "sets" not in found["figures"]
    assert "training" not in found["figures"]
    assert any(words.startswith("partition") for words in found["left_out"])
    assert any(words.startswith("run") for words in found["left_out"])
    assert not any(words.startswith(("assembly", "zoo")) for words in found["left_out"])
    text = (tmp_path / "report.html").read_text()
    assert "Left out" in text


def test_curves_of_a_run_without_reports_are_left_out_and_said(copied, tmp_path):
    (tmp_path / "ws" / "runs" / "default" / "metrics.jsonl").unlink()
    found = copied("report", "--no-images", "--json").json["result"]
    assert "training" not in found["figures"]
    assert [words for words in found["left_out"] if words.startswith("training curves")]


@pytest.mark.slow
def test_why_nothing_fits_is_told_until_something_does(copied, tmp_path):
    refused = copied("assemble", "--max-params", "1k", "--json")
    assert refused.code == 3
    for name in ("before", "after"):
        to = str(tmp_path / f"{name}.html")
        assert copied("report", "--no-images", "--to", to).code == 0
        assert copied("assemble", "--max-params", "700k", "--effort", "6").code == 0
    text = (tmp_path / "before.html").read_text()
    assert "The last try fitted nothing" in Page(text).headings
    assert html.escape(refused.json["error"]["message"]) in text.replace("&#39;", "&#x27;")
    assert "--max-params" in text
    assert "The last try" not in (tmp_path / "after.html").read_text()


def test_a_damaged_note_of_why_is_no_note(copied, tmp_path):
    note = tmp_path / "ws" / "assemblies" / "default.infeasible.log.json"
    for text in ("[]", "{", json.dumps({"message": 3, "hint": None, "details": None})):
        note.write_text(text)
        assert copied("report", "--no-images", "--force").code == 0
        assert "The last try" not in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_names_from_elsewhere_are_shown_and_not_run(copied, pipeline, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pipeline.data, data)
    hostile = '<script>alert(1)</script>\x1b[31m $\\frac$ id="x" 猫'
    for part in ("train", "test"):
        (data / part / "0").rename(data / part / hostile.replace("/", "_"))
    made = copied("assemble", "--data", str(data), "--max-params", "700k", "--effort", "2")
    assert made.code == 0, made.stderr
    told = copied("report", "--json")
    assert told.code == 0, told.stderr
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.scripts == 0
    assert "\x1b" not in text


def test_without_a_zoo_there_is_nothing_to_report(tmp_path):
    found = run_dery("report", "--json", cwd=tmp_path)
    assert found.code == 4
    assert list(tmp_path.iterdir()) == []


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
@pytest.mark.parametrize("width", [500, 1280])
@pytest.mark.parametrize(("scheme", "dark"), [(0, True), (1, False)])
def test_a_browser_shows_it_without_complaint(copied, tmp_path, width, scheme, dark):
    assert copied("report").code == 0
    shot = tmp_path / "shot.png"
    shown = subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--window-size={width},900",
            f"--screenshot={shot}",
            (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "CONSOLE" not in shown.stderr
    with Image.open(shot) as image:
        grey = image.convert("L")
        assert (grey.getpixel((2, 2)) < 60) == dark
        assert len(grey.getcolors()) > 30  # a page, not a blank
