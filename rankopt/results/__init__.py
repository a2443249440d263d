"""Results: what a comparison of plans measured, as a file, and what can be concluded from it."""

from rankopt.results.results import Calibration as Calibration
from rankopt.results.results import Measured as Measured
from rankopt.results.results import MeasuredPlan as MeasuredPlan
from rankopt.results.results import Results as Results
from rankopt.results.summary import Line as Line
from rankopt.results.summary import summarise as summarise
