"""Text of others is shown, never obeyed."""

from __future__ import annotations

import pytest

from dery_cli.runtime.printable import markdown, printable
from dery_cli.runtime.terminal import Terminal
from tests.conftest import run_dery


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é, \U0001f600, \U0001f469\u200d\U0001f4bb", None),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("two\nlines\r\t", "two\\nlines\\r\\t"),
        ("\x00\x07\x7f\x9b", "\\x00\\x07\\x7f\\x9b"),
        ("a\u2028b\u202ec", "a\\u2028b\\u202ec"),
        ("caf\udce9", "caf\\udce9"),
    ],
)
def test_control_characters_are_written_out(text, shown):
    assert printable(text) == (text if shown is None else shown)


def test_markup_is_plain_words_in_a_card():
    assert markdown("a|b <script>&\n# `x`") == "a\\|b &lt;script\\>&amp;\\n\\# \\`x\\`".replace(
        "\\n", "\\\\n"
    )
    assert markdown("ImageNet-1k, 10 classes") == "ImageNet-1k, 10 classes"


def test_a_terminal_escapes_all_that_it_prints(capsys):
    terminal = Terminal(verbose=True)
    for call in (terminal.say, terminal.note, terminal.detail, terminal.warn):
        call("x\x1b[2Jy\nz")
    terminal.table("t\x1b", ["c\x1b"], [["\x1b[31mred\n"]])
    terminal.growing_table({"e\x1b": 8}).row(["\x1b"])
    with terminal.progress("p\x1b", 1) as bar:
        bar.advance()
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert out.startswith("x\\x1b[2Jy\\nz\n")
    assert "\\x1b[31mred\\n" in out
    assert terminal.warnings == ["x\\x1b[2Jy\\nz"]


def test_an_error_is_escaped_in_terminal_and_json(tmp_path):
    for name in ("a\x1b[31m\nb", "caf\udce9"):
        outcome = run_dery("zoo", "show", name, "--json", cwd=tmp_path)
        assert outcome.code == 2
        assert outcome.stdout.isascii()
        assert outcome.json["error"]["message"].startswith("no donor named '")
        assert "\x1b" not in outcome.stderr + outcome.json["error"]["message"]
