"""What a plan would leave of a model's weights: what a second round of measuring needs."""

import dataclasses
import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rankopt.apply.apply import applied
from rankopt.apply.surgery import merged_weight
from rankopt.errors import InfeasibleBudgetError
from rankopt.model.lowrank import LowRank
from rankopt.plan.planner import make_plan
from rankopt.profile.profile import Profile


@dataclasses.dataclass(frozen=True)
class Compressed:
    """For ``profile_model(again=...)``: the model under an exact plan of the first round.

    Attributes:
        keep: budget of the plan, as a share of the planned layers' parameters. The nearer to that
            of the plans to come the better; far below it does harm.
        needed: without, the first round is all where no ranks fit that budget, and stderr says so.
    """

    keep: float = 0.8
    needed: bool = dataclasses.field(default=True, repr=False)

    @torch.no_grad()
    def __call__(self, model: nn.Module, profile: Profile) -> Mapping[str, Tensor]:
        """Planned layer -> its weight of low rank; layers that share theirs stay dense.

        Raises:
            BudgetError: see make_plan.
            InfeasibleBudgetError: likewise, if the round is needed.
        """
        try:
            plan = make_plan(profile, keep=self.keep)
        except InfeasibleBudgetError as error:
            if self.needed:
                raise
            tqdm.write(f"note: no second round: {error}", file=sys.stderr)
            return {}
        low = [e.layer.name for e in plan.layers if e.rank is not None and not e.layer.partners]
        dense = {name: model.get_submodule(name) for name in low}
        with applied(model, plan, profile, progress=False) as compressed:
            # Formed by an operation: until then it is kept as its factors.
            return {
                name: merged_weight(_low_rank(compressed, name), module) * 1.0
                for name, module in dense.items()
            }


def _low_rank(model: nn.Module, name: str) -> LowRank:
    found = model.get_submodule(name)
    assert isinstance(found, LowRank)
    return found
