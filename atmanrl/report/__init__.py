"""Views of saliency runs: terminal, self-contained HTML, Markdown, notebooks; JSON and CSV are `Run`'s own."""

from atmanrl.report.markdown import markdown_table
from atmanrl.report.notebook import PageView, show
from atmanrl.report.page import Plot, render_page, write_page
from atmanrl.report.terminal import print_run, print_summary

__all__ = ["PageView", "Plot", "markdown_table", "print_run", "print_summary", "render_page", "show", "write_page"]
