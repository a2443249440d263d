"""The plan: from a profile and a budget to the rank of every layer, without torch."""

from rankopt.plan.budget import Budget as Budget
from rankopt.plan.budget import Limit as Limit
from rankopt.plan.latency import LatencyTable as LatencyTable
from rankopt.plan.plan import FORMAT_VERSION as FORMAT_VERSION
from rankopt.plan.plan import LARGEST_FILE as LARGEST_FILE
from rankopt.plan.plan import Certificate as Certificate
from rankopt.plan.plan import Plan as Plan
from rankopt.plan.plan import PlannedLayer as PlannedLayer
from rankopt.plan.plan import Size as Size
