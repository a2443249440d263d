"""Search for the choice with the smallest measured loss, with Optuna."""

from rankopt_solvers.search.records import Choice as Choice
from rankopt_solvers.search.records import Measured as Measured
from rankopt_solvers.search.records import OtherStudyError as OtherStudyError
from rankopt_solvers.search.records import SearchError as SearchError
from rankopt_solvers.search.records import SearchResult as SearchResult
from rankopt_solvers.search.records import StudyError as StudyError
from rankopt_solvers.search.records import without_password as without_password
from rankopt_solvers.search.run import SAMPLERS as SAMPLERS
from rankopt_solvers.search.run import search as search
