"""The table of what goes together, in the documentation, is what the constructors say today."""

from pathlib import Path

from fedkit.strategies.matrix import page

README = Path(__file__).parents[2] / "strategies" / "README.md"


def test_the_table_of_the_readme_is_what_the_constructors_say():
    begin, end = "<!-- python -m fedkit.strategies.matrix -->\n", "<!-- end -->"
    shown = README.read_text().partition(begin)[2].partition(end)[0]
    assert shown.strip() == page().strip(), "run: python -m fedkit.strategies.matrix"


def test_a_combination_that_is_refused_has_a_reason_and_every_note_is_used():
    text = page()
    assert "no (1)" in text
    assert all(len(line.split(". ", 1)[1]) > 20 for line in text.splitlines() if line[:1].isdigit())
