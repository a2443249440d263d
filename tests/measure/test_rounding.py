"""What rounding loses: rounded as torchao does it, valued as the second-order estimate says."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rankopt import Profile, make_plan, profile_model
from rankopt.backends import find_backend
from rankopt.backends.rounding import rounded, rounding_losses
from rankopt.backends.statistics import Statistics
from rankopt.errors import OptionError
from rankopt.layers import BITS, DENSE, Bits, Form
from rankopt.model.pivoted import kind_of
from tests import tiny


def statistics(weight: Tensor, x: Tensor, g: Tensor) -> Statistics:
    """Of inputs ``(n, in)`` and output gradients ``(n, out)``, one position a unit."""
    out, into = weight.shape
    inputs, gradients = x.T @ x, g.T @ g
    each = g.square().T @ x.square()
    return Statistics(
        units=float(len(x)),
        rows=each.sum(0),
        columns=each.sum(1),
        second_moment=inputs if into <= out else weight @ inputs @ weight.T,
        gradient_moment=gradients if out <= into else weight.T @ gradients @ weight,
        positions=float(len(x)),
        input_energy=float(x.square().sum()),
        gradient_energy=float(g.square().sum()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_that_of_torchao(bits: Bits, dtype: torch.dtype) -> None:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    from torchao.quantization.granularity import PerGroup

    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=False, dtype=dtype)
    weight = linear.weight.detach().clone()
    how = (
        quantization.Int8WeightOnlyConfig()
        if bits == 8
        else quantization.IntxWeightOnlyConfig(torch.int4, PerGroup(32))
    )
    quantization.quantize_(linear, how)
    theirs: Any = linear.weight
    ours = rounded(weight, bits).to(dtype).float()
    step = (ours - theirs.dequantize().float()).abs()
    # Ties may fall the other way, and in bfloat16 the numbers on both sides are rounded themselves.
    size = weight.float().abs().max() / 2 ** (bits - 1)
    assert step.max() <= size * 1.3
    assert (step > 0.3 * size).float().mean() < (0.02 if dtype == torch.float32 else 0.2)
    error, own = (
        float((weight.float() - each).square().sum())
        for each in (theirs.dequantize().float(), ours)
    )
    assert own == pytest.approx(error, rel=0.03)


def test_rows_of_zeros_stay_zeros() -> None:
    weight = torch.zeros(4, 64)
    weight[1] = torch.randn(64)
    for bits in (8, 4):
        found = rounded(weight, bits)  # type: ignore[arg-type]
        assert found.isfinite().all() and not found[0].any() and found[1].any()


@pytest.mark.parametrize("shape", [(64, 64), (64, 160), (160, 64)])
@pytest.mark.parametrize("form", ["pairs", "pivoted"])
def test_losses_are_those_of_errors_of_these_sizes(shape: tuple[int, int], form: Form) -> None:
    """Errors of the same sizes and of any sign, on inputs and gradients that know nothing of each
    other: what they lose in the mean, sampled.
    """
    torch.manual_seed(0)
    out, into = shape
    weight = torch.randn(shape).double()
    x = (torch.randn(2000, into) @ torch.randn(into, into) / into**0.5).double()
    g = (torch.randn(2000, out) @ torch.randn(out, out) / out**0.5).double()
    seen, backend = statistics(weight, x, g), find_backend("kronecker")
    made = backend.decompose(weight, seen, 64)
    ranks = np.array([32, DENSE])
    inputs, gradients = x.T @ x / len(x), g.T @ g / len(g)
    up, down = backend.factors(weight, made.kept, 32)
    kind: Any = kind_of(False, shape, form)
    low = kind.from_factors(down, up, None)
    before, matrices = low.weight.double(), [low.down.weight.detach(), low.up.weight.detach()]
    for bits in BITS:
        found = rounding_losses(backend, weight, seen, made, ranks, form, BITS)[bits]
        assert found.shape == (2,) and (found > 0).all()
        lost = torch.zeros(2, dtype=torch.float64)
        for _ in range(40):
            signs = [torch.randint(0, 2, m.shape) * 2 - 1 for m in (*matrices, weight)]
            # Small enough that what both errors do together is nothing.
            moved = [
                m + 1e-3 * sign * (rounded(m, bits) - m)
                for m, sign in zip(matrices, signs[:2], strict=True)
            ]
            for factor, new in zip((low.down, low.up), moved, strict=True):
                factor.weight = nn.Parameter(new)
            changes = (
                1e3 * (low.weight.detach().double() - before.detach()),
                signs[2] * (rounded(weight, bits) - weight),
            )
            for k, change in enumerate(changes):
                lost[k] += 0.5 * ((gradients @ change) * (change @ inputs)).sum() / 40
        assert found.tolist() == pytest.approx(lost.tolist(), rel=0.12)


def test_inputs_that_meet_no_gradient_cost_nothing() -> None:
    """A few large inputs make the second moment, and are where nothing depends on the layer."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64).double()
    x, g = torch.randn(400, 64).double(), torch.randn(400, 64).double()
    backend, ranks = find_backend("kronecker"), np.array([32, DENSE])

    def lost(x: Tensor, g: Tensor) -> Tensor:
        seen = statistics(weight, x, g)
        made = backend.decompose(weight, seen, 64)
        return rounding_losses(backend, weight, seen, made, ranks, "pairs", (8,))[8]

    plain = lost(x, g)
    x[:20] *= 100.0
    g[:20] = 0.0
    assert float(lost(x, g)[1]) == pytest.approx(float(plain[1]), rel=0.1)


def model_and_batches(head: bool = True) -> tuple[Any, list[Any]]:
    model = tiny.bert(hidden_size=64, intermediate_size=96, num_labels=3)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data *= 3.0
    batches = [
        {
            "input_ids": torch.randint(3, tiny.VOCABULARY, (8, 7)),
            "labels": torch.randint(0, 3, (8,)),
        }
        for _ in range(4)
    ]
    return model, batches


def test_a_profile_with_bits_plans_bytes(tmp_path: Any) -> None:
    model, batches = model_and_batches()
    profile = profile_model(model, batches, bits=(4, 8), cross_fit=True)
    assert profile.info.bits == (8, 4)
    profile.save(tmp_path / "p.st")
    profile = Profile.load(tmp_path / "p.st")
    names = {layer.name: "dense" for layer in profile.info.layers}
    least = sum(int(x.bytes_of(np.array(DENSE), "pivoted", 8)) for x in profile.info.layers)
    plan = make_plan(profile, max_bytes=least, bits=(8,), pins=names)  # type: ignore[arg-type]
    assert {entry.bits for entry in plan.layers} == {8}
    (backend,) = profile.backends
    lost = [profile.rounding_of(backend, name)[8][-1] for name in names]
    per_target = profile.info.units / profile.info.targets
    assert plan.predicted == pytest.approx(sum(lost) * per_target, rel=1e-12)
    # What it says is what is measured, as far as second order goes: here within a factor.
    with torch.no_grad():
        dense = torch.cat([model(**batch).logits for batch in batches]).double()
        for name in names:
            linear = model.get_submodule(name)
            linear.weight.data = rounded(linear.weight.data, 8)
        other = torch.cat([model(**batch).logits for batch in batches]).double()
    p, q = dense.log_softmax(-1), other.log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert kl / 4 < plan.predicted < kl * 4


def test_what_cannot_be_rounded_is_not_offered() -> None:
    model = tiny.llama(hidden_size=64, intermediate_size=80, tie_word_embeddings=True)
    ids = torch.randint(3, tiny.VOCABULARY, (4, 9))
    profile = profile_model(
        model,
        [{"input_ids": ids, "labels": ids}],
        include=["*lm_head", "*embed_tokens", "*.down_proj"],
        untie=True,
        bits=(8, 4),
    )
    (backend,) = profile.backends
    tied = next(layer for layer in profile.info.layers if layer.partners)
    assert not profile.rounding_of(backend, tied.name)
    down = next(layer for layer in profile.info.layers if layer.name.endswith("0.mlp.down_proj"))
    assert set(profile.rounding_of(backend, down.name)) == {8}  # 80 inputs are no whole groups


def test_gpt2_has_losses_of_the_transposes_that_it_keeps() -> None:
    model = tiny.gpt2(n_embd=64)
    ids = torch.randint(3, tiny.VOCABULARY, (4, 9))
    profile = profile_model(model, [{"input_ids": ids, "labels": ids}], bits=(8,))
    (backend,) = profile.backends
    for layer in profile.info.layers:
        lost = profile.rounding_of(backend, layer.name)
        assert set(lost) == {8} and (lost[8] > 0).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [({"bits": (3,)}, "8 or 4 bits"), ({"bits": (8,), "moments": False}, "second moments")],
)
def test_mistakes(options: dict[str, Any], says: str) -> None:
    model, batches = model_and_batches()
    with pytest.raises(OptionError, match=says):
        profile_model(model, batches, **options)
