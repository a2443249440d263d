"""What a plan would leave of a model's weights: what a second round of measuring needs."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rankopt.apply.apply import applied
from rankopt.plan.planner import make_plan
from rankopt.profile.profile import Profile


@dataclasses.dataclass(frozen=True)
class Compressed:
    """For ``profile_model(again=...)``: the model under an exact plan of the first round.

    Attributes:
        keep: budget of the plan, as a share of the planned layers' parameters. The nearer to that
            of the plans to come the better; far below it does harm.
    """

    keep: float = 0.8

    @torch.no_grad()
    def __call__(self, model: nn.Module, profile: Profile) -> Mapping[str, Tensor]:
        """Planned layer -> its weight of low rank; layers that share theirs stay dense.

        Raises:
            BudgetError, InfeasibleBudgetError: see make_plan.
        """
        plan = make_plan(profile, keep=self.keep)
        low = [e.layer.name for e in plan.layers if e.rank is not None and not e.layer.partners]
        with applied(model, plan, profile, progress=False) as compressed:
            # Formed by an operation: until then it is kept as its factors.
            return {name: _formed(compressed.get_submodule(name)) for name in low}


def _formed(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach() * 1.0
