"""What the pages' sources say in the terms of other programs, in the site's terms."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

# Docstrings name other objects by Sphinx roles; on the site, which knows no roles, the name alone stands.
_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):(?=<code>)")
# Links of a notebook; those of Markdown pages are resolved, and checked, by mkdocs.
_LINK = re.compile(r'(?<=href=")(?P<page>[\w/-]+\.md)(?=[#"])')


def on_config(config: MkDocsConfig) -> None:
    """Blocks of LaTeX, fenced as GitHub reads them ("math"), become MathML: no script and nothing from elsewhere."""

    def formula(source: str, *_: Any, **__: Any) -> str:
        return convert(source, display="block")

    fences = [{"name": "math", "class": "math", "format": formula}]
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": fences}


def on_page_content(html: str, page: Page, files: Files, **_: Any) -> str:
    """The page without roles, its links leading to pages of the site."""

    def address(link: re.Match[str]) -> str:
        target = files.get_file_from_path(link["page"])
        if target is None:
            raise PluginError(f"{page.file.src_path}: no page {link['page']}")
        return target.url_relative_to(page.file)

    return _LINK.sub(address, _ROLE.sub("", html))
