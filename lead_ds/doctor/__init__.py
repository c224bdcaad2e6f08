"""What a machine, or each host of a hostfile, lacks for a run - every finding with its remedy."""

from lead_ds.doctor.diagnosis import diagnose
from lead_ds.doctor.report import Line, Report, show

__all__ = ["Line", "Report", "diagnose", "show"]
