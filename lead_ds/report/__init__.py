"""What a run was worth: plots, one page, a table; the card of the student it made."""

from lead_ds.report.page import write_report
from lead_ds.report.summary import summarize

__all__ = ["summarize", "write_report"]
