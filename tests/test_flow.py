# SPDX-License-Identifier: Apache-2.0
"""Flow matching against diffusers' scheduler and its functions of weighting schemes."""

import copy
from argparse import Namespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from utils.backbones.diffusion import ddpm_scheduler
from utils.backbones.flow import Flow, flow_scheduler
from utils.command_line import UsageError
from utils.flags import WEIGHTING_SCHEMES
from utils.randomness import StepRandom

PLACES = torch.tensor([0, 1, 250, 500, 998, 999])


def flow(scheduler: FlowMatchEulerDiscreteScheduler | None = None, **flags) -> Flow:
    off = dict.fromkeys(("weighting_scheme", "logit_mean", "logit_std", "mode_scale"))
    made = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
    return Flow(Namespace(**{**off, **flags}), made, bounded=False)


def test_noise_is_the_schedulers_and_the_target_recovers_the_data():
    process, scheduler = flow(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    clean, noise = torch.randn(2, 6, 4, 8, 8)
    noised = process.noised(clean, noise, PLACES)
    assert torch.equal(noised.time, scheduler.timesteps[999 - PLACES]) and noised.time.dtype == torch.float32
    assert torch.equal(noised.x_t, scheduler.scale_noise(clean, noised.time, noise))
    assert torch.equal(noised.target, noise - clean) and noised.weight is None and noised.clean is clean
    sigma = (noised.time / 1000).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(noised.x_t - sigma * noised.target, clean, atol=1e-5, rtol=0)
    assert (noised.time.diff() > 0).all() and noised.time[-1] == 1000  # place 0 is the cleanest
    assert process.place_name == "place"  # and no timestep: that is what the denoiser is told
    torch.testing.assert_close(noised.x_t[-1], noise[-1])


@pytest.mark.parametrize("scheme", [None, *WEIGHTING_SCHEMES])
@pytest.mark.parametrize("flags", [{}, {"logit_mean": -0.5, "logit_std": 1.5, "mode_scale": -0.8}], ids=["", "other"])
def test_draws_and_weights_are_those_of_diffusers(scheme, flags):
    process, scheduler = flow(weighting_scheme=scheme, **flags), FlowMatchEulerDiscreteScheduler(shift=3.0)
    own = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29} | flags
    scheme = scheme or "logit_normal"
    share = compute_density_for_timestep_sampling(scheme, 4096, **own, generator=StepRandom(1, 2).generator)
    step = (share * 1000).long()
    place = process.draw(4096, StepRandom(1, 2))
    assert place.dtype == torch.int64 and torch.equal(place, 999 - step)
    expected = compute_loss_weighting_for_sd3(scheme, scheduler.sigmas[step])
    noised = process.noised(torch.zeros(4096, 1), torch.zeros(4096, 1), place)
    found = torch.ones(4096) if noised.weight is None else noised.weight
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_two_processes_draw_what_one_does(scheme):
    process, clean = flow(weighting_scheme=scheme), torch.zeros(8, 1, 2, 2)
    whole = process.add_noise(clean, StepRandom(0, 5))
    halves = [process.add_noise(clean[:4], StepRandom(0, 5, rank=rank, world_size=2)) for rank in (0, 1)]
    for name in ("x_t", "place", "time", "target"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves]))


@pytest.mark.parametrize("mean, place", [(1e3, 0), (-1e3, 999)])
def test_no_draw_leaves_the_schedule(mean, place):
    assert set(flow(logit_mean=mean).draw(16, StepRandom(0, 0)).tolist()) == {place}


def test_sampling_leaves_the_training_schedule_alone():
    """`set_timesteps` moves a scheduler's smallest sigmas for good, diffusers' own copy of it too."""
    used = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    used.set_timesteps(28)
    process = flow(flow_scheduler(dict(used.config), "--x"))
    before = copy.deepcopy((process.sigmas, process.times))
    sampler = process.sampler()
    sampler.set_timesteps(1000)
    assert process.sigmas[0] == pytest.approx(3 / 1002, rel=1e-5) and sampler.sigmas[-2] > 1.9 * process.sigmas[0]
    assert not sampler.config.stochastic_sampling and sampler is not process.sampler()
    assert all(torch.equal(*pair) for pair in zip(before, (process.sigmas, process.times), strict=True))
    assert len(process.scheduler.sigmas) == process.num_places == 1000 and process.name == "Euler, shift 3"


@pytest.mark.parametrize(
    "config, found",
    [
        ({"_class_name": "DDPMScheduler"}, "a DDPMScheduler, of another process"),
        ({"_class_name": "FlowMatchLCMScheduler"}, "a FlowMatchLCMScheduler"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "a DPMSolverMultistepScheduler"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"shift": 0.0}, "shift 0.0, whose sigmas do not fall"),
        ({"shift": -2.0}, "shift -2.0, whose sigmas do not fall"),
        ({"shift": "3"}, "cannot be had"),
        ({"num_train_timesteps": 0}, "cannot be had"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "cannot be had"),
    ],
)
def test_other_processes_are_refused_by_name(config, found):
    with pytest.raises(UsageError, match=f"--x: its scheduler.*{found}"):
        flow_scheduler(config, "--x")


def test_samplers_of_one_process_are_one():
    heun = flow_scheduler({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0}, "--x")
    assert torch.equal(heun.timesteps, FlowMatchHeunDiscreteScheduler(shift=3.0).timesteps.unique().flip(0))
    karras = flow_scheduler({"shift": 3.0, "use_karras_sigmas": True}, "--x")  # spaces the sampler's steps alone
    assert not flow().differs(heun) and not flow().differs(karras)
    (found,) = flow().differs(FlowMatchEulerDiscreteScheduler(shift=1.0))
    assert found == "has shift 1, the teacher's 3"
    (found,) = flow().differs(FlowMatchEulerDiscreteScheduler(500, shift=3.0))
    assert found == "has num_train_timesteps 500, the teacher's 1000"
    with pytest.raises(UsageError, match="samples flow matching"):
        ddpm_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "--x")
