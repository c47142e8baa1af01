"""The examples of docs/drop-in-attention.md run, in their order, as one program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "drop-in-attention.md"


def test_the_examples_run():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == PAGE.read_text().count("```") // 2
    namespace: dict[str, object] = {}
    for block in blocks:
        try:
            exec(compile(block, PAGE.name, "exec"), namespace)
        except Exception as error:
            pytest.fail(f"{error!r} in the example:\n{block}")
