"""Pages and plots: the report of a run, and the generic page that claims and the demo reuse."""

from stillroom.report.page import Figure, Files, Header, Images, Panels, Section, Settings, Table, Text, page
from stillroom.report.plots import curve, curves, scatter
from stillroom.report.run import write_report

__all__ = [
    "Figure", "Files", "Header", "Images", "Panels", "Section", "Settings", "Table", "Text",
    "curve", "curves", "page", "scatter", "write_report",
]
