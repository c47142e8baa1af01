"""Views of saliency runs: terminal, self-contained HTML, Markdown, notebooks; JSON and CSV are `Run`'s own."""

from atmanrl.report.page import PageView, Plot, render_page, show, write_page
from atmanrl.report.text import markdown_table, print_run, print_summary

__all__ = ["PageView", "Plot", "markdown_table", "print_run", "print_summary", "render_page", "show", "write_page"]
