"""Docstrings name other objects by Sphinx roles; on the site, which knows no roles, the name alone stands."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):(?=<code>)")


def on_page_content(html: str, **_: Any) -> str:
    """The page without its roles."""
    return _ROLE.sub("", html)
