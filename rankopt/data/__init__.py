"""Rows of files and data sets, batches for a model, and the digest of what it was measured on."""

from rankopt.data.batches import load_batches as load_batches
from rankopt.data.batches import spread as spread
from rankopt.data.batches import text_batches as text_batches
from rankopt.data.domains import python_help as python_help
from rankopt.data.mixtures import Mixture as Mixture
from rankopt.data.mixtures import load_mixture as load_mixture
from rankopt.data.mixtures import mixture as mixture
from rankopt.data.rows import Columns as Columns
from rankopt.data.rows import DataSource as DataSource
from rankopt.data.rows import Row as Row
from rankopt.data.rows import read_rows as read_rows
from rankopt.data.rows import require_columns as require_columns
