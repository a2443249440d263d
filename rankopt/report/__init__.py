"""Reports: a profile, its plans and what was measured of them, as one page without a network."""

from rankopt.report.report import write_pictures as write_pictures
from rankopt.report.report import write_report as write_report
