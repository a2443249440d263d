"""Reports: a profile, its plans and what was measured of them, as one page that needs no network."""

from rankopt.report.report import write_pictures as write_pictures
from rankopt.report.report import write_report as write_report
