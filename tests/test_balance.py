# SPDX-License-Identifier: Apache-2.0
"""Balance between timesteps: against plain loops, the closed form, several processes and micro-steps, and bad samples.

Resumed runs are in test_checkpoint.py, real processes in test_distributed.py, waits in test_no_waits.py.
"""

import json
import math

import pytest
import torch
from conftest import read_log

import utils.distillation.balance
from utils.distillation.balance import BINS, TimestepBalance

PLACES = 1000


def steps(count: int, batch: int = 64, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(place, error) of optimizer steps, the errors falling along the schedule as a student's do."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(PLACES, (count, batch), generator=generator)
    errors = torch.rand(count, batch, generator=generator) * (1 + places).float() ** -0.5
    return list(zip(places, errors, strict=True))


def seen(steps, power: float = 0.5, **options) -> TimestepBalance:
    balance = TimestepBalance({"output": power}, PLACES, "cpu", **options)
    for place, error in steps:
        balance.add(place, {"output": error})
        balance.end_step()
    return balance


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0, 3.0])
def test_weights_match_loops(power):
    S, N = [0.0] * 20, [0.0] * 20
    batches = steps(12, batch=16)
    for place, error in batches:
        S, N = [0.99 * value for value in S], [0.99 * value for value in N]
        for t, e in zip(place.tolist(), error.tolist(), strict=True):
            S[20 * t // 1000] += e
            N[20 * t // 1000] += 1
    wanted = []
    for t in range(PLACES):
        b = math.floor(20 * t / PLACES)
        ratio = (sum(S) / sum(N)) / (S[b] / N[b])
        wanted.append(min(20.0, max(1 / 20, ratio**power)) if N[b] >= 8 else 1.0)
    assert len({*wanted}) > 10 and any(n < 8 for n in N) and any(n >= 8 for n in N)
    found = seen(batches, power).weight("output", torch.arange(PLACES))
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(wanted, rel=1e-4)


def test_at_power_1_all_bins_contribute_alike():
    """And as much as the mean of all, so that the loss keeps its scale."""
    place = torch.arange(PLACES)
    error = 0.3 / (1 + place // 50).float()
    balance = seen([(place, error)], power=1.0)
    contributions = (balance.weight("output", place) * error).view(BINS, -1).mean(1)
    torch.testing.assert_close(contributions, torch.full((BINS,), error.mean().item()))


def test_weights_are_limited_and_begin_at_1():
    balance = TimestepBalance({"output": 1.0, "task": 0.0}, PLACES, "cpu")
    place = torch.arange(PLACES)
    assert balance.weight("task", place) is None  # P = 0: the loss is what it was, bit for bit
    assert torch.equal(balance.weight("output", place), torch.ones(PLACES))
    error = torch.where(place < 50, 1e9, 1e-9)
    balance.add(place, {"output": error, "task": error})
    assert torch.equal(balance.weight("output", place), torch.ones(PLACES))  # of the state before this step
    balance.end_step()
    assert balance.weight("output", place).unique().tolist() == pytest.approx([1 / 20, 20])
    exact = seen([(place, torch.zeros(PLACES))], power=1.0)
    assert torch.equal(exact.weight("output", place), torch.ones(PLACES))  # of a student that is its teacher


def test_bad_samples_are_left_out():
    ((place, error),) = steps(1)
    bad = error.clone()
    bad[[3, 7, 9]] = torch.tensor([math.nan, math.inf, -math.inf])
    good = bad.isfinite()
    assert good.sum() == 61
    torch.testing.assert_close(seen([(place, bad)]).seen, seen([(place[good], error[good])]).seen)
    nothing = seen([(place, torch.full_like(error, math.nan))])
    assert torch.equal(nothing.weight("output", place), torch.ones(len(place)))


def test_micro_steps_and_processes_see_what_one_sees():
    batches = steps(5)
    one = seen(batches)
    parts = [[(p.view(4, 16)[i], e.view(4, 16)[i]) for p, e in batches] for i in range(4)]
    # two processes of two micro-steps each; the all-reduce gives both the same sum
    ranks = [TimestepBalance({"output": 0.5}, PLACES, "cpu") for _ in range(2)]
    reduces = []
    for step in range(5):
        for rank, balance in enumerate(ranks):
            for micro_step in range(2):
                place, error = parts[2 * rank + micro_step][step]
                before = balance.weight("output", place)
                balance.add(place, {"output": error})
                assert torch.equal(before, balance.weight("output", place))  # all of a step: those of its beginning
        both = ranks[0].new + ranks[1].new
        for balance in ranks:
            balance.total = lambda new, both=both: reduces.append(new) or both
            balance.end_step()
    assert torch.equal(ranks[0].seen, ranks[1].seen) and len(reduces) == 2 * 5  # one for each step
    torch.testing.assert_close(ranks[0].seen, one.seen)


def test_a_checkpoint_holds_it_exactly():
    batches = steps(6)
    whole, half = seen(batches), seen(batches[:3])
    resumed = TimestepBalance({"task": 1.0, "output": 0.5}, PLACES, "cpu")
    resumed.load_state(json.loads(json.dumps(half.state())), step=3)  # what a checkpoint does not know begins anew
    for place, error in batches[3:]:
        resumed.add(place, {"output": error})
        resumed.end_step()
    assert resumed.state()["output"] == whole.state()["output"]
    assert not torch.tensor(resumed.state()["task"]).any()


@pytest.mark.parametrize("flags", [["--timestep_balance", "1"], ["--task_balance", "1"]], ids=lambda flags: flags[0])
@pytest.mark.parametrize(
    "method", ["train_lift --output_loss mse", "train_lift --weighting constant", "train_place --weighting constant"]
)
def test_a_run_is_balanced(run, monkeypatch, method, flags):
    monkeypatch.setattr(utils.distillation.balance, "ENOUGH", 1)
    script, *options = [*method.split(), "--snr_gamma", "5", "--max_train_steps", "2"]
    plain, balanced = (read_log(run(script, *options, *more, output=str(len(more)))) for more in ([], flags))
    assert plain[0] == pytest.approx(balanced[0], rel=1e-5)  # nothing had been seen: all weights were 1
    changed = {name for name, value in plain[1].items() if balanced[1][name] != pytest.approx(value, rel=1e-4)}
    # `fine` is what it was, for the student was the same and it does not see the balance
    assert changed - {"grad_norm"} == {"loss", "output" if "--timestep_balance" in flags else "task"}
