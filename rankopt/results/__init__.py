"""Results: what a comparison of plans measured, as a file, and what can be concluded from it."""

from rankopt.results.correlation import Correlation as Correlation
from rankopt.results.results import Calibration as Calibration
from rankopt.results.results import Measured as Measured
from rankopt.results.results import MeasuredPlan as MeasuredPlan
from rankopt.results.results import Results as Results
from rankopt.results.summary import Line as Line
from rankopt.results.summary import compared_with as compared_with
from rankopt.results.summary import increase_name as increase_name
from rankopt.results.summary import increases as increases
from rankopt.results.summary import lines_of as lines_of
from rankopt.results.summary import prediction as prediction
from rankopt.results.summary import summarise as summarise
