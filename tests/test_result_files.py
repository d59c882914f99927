"""Columns keep their types in Parquet; tables in Markdown are aligned and escaped."""

import pytest

from jsae_lightning.result_files import column_type, markdown_table


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, None, 2], "int64"),
        ([1, 0.5], "float64"),
        ([None], "float64"),
        ([True, None], "bool"),
        ([True, 1], "string"),
        ([1, "a"], "string"),
        ([2**63], "string"),
        ([0.5, 10**400], "string"),
    ],
)
def test_column_types(values, kind):
    assert column_type(values) == kind


def test_markdown_is_aligned_and_escaped():
    assert markdown_table(["a", "b|"], [["\\x", "1"], ["漢字", "22"]], [False, True]).splitlines() == [
        "| a    | b\\| |",
        "| ---- | --: |",
        "| \\\\x  |   1 |",
        "| 漢字 |  22 |",
    ]
