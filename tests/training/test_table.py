"""Tables as text: alignment, widths, empty columns."""

import pytest
from onepass.training.table import markdown_table, table_line, text_table


def test_the_first_column_is_aligned_left_and_the_others_right():
    assert text_table([["name", "a", "b"], ["x", 1, 100], ["long name", 22, ""]]) == (
        "name        a    b\nx           1  100\nlong name  22"
    )


@pytest.mark.parametrize(
    ("align", "lines"), [("<", "a    b    c\n100  200  300"), (">", "  a    b    c\n100  200  300")]
)
def test_the_last_alignment_applies_to_all_further_columns(align, lines):
    assert text_table([["a", "b", "c"], [100, 200, 300]], align) == lines


def test_lines_of_fixed_widths_align_until_a_cell_is_too_long():
    assert table_line(["a", 1.5, "z"], ("<3", ">5", "<")) == "a      1.5  z"
    assert table_line(["abcd", 1.5, ""], ("<3", ">5", "<")) == "abcd    1.5"


def test_markdown_leaves_out_empty_columns_but_the_first():
    text = markdown_table(["", "b", "c"], [["", "", "1"], ["", "", ""]])
    assert text == "|  | c |\n| --- | --- |\n|  | 1 |\n|  |  |"
