# SPDX-License-Identifier: Apache-2.0
"""Flags that change how fast a step is, not what it computes."""

import argparse
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from utils.training.optimizer import make_optimizer

ONE_CPU = SimpleNamespace(device=torch.device("cpu"), num_processes=1)


def arguments(**changes):
    settings = {"optimizer": "adamw", "learning_rate": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.99}
    settings |= {"adam_weight_decay": 0.1, "adam_epsilon": 1e-7, "use_8bit_adam": False, "scale_lr": False}
    settings |= {"train_batch_size": 3, "gradient_accumulation_steps": 2, **changes}
    return argparse.Namespace(**settings)


@pytest.mark.parametrize("name, kind", [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_the_optimizer_gets_every_setting(name, kind):
    optimizer = make_optimizer(arguments(optimizer=name), nn.Linear(2, 2).parameters(), ONE_CPU)
    assert type(optimizer) is kind and len(optimizer.param_groups[0]["params"]) == 2
    expected = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-7, "fused": True}
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trainable_weights_in_half_precision_are_refused(dtype):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(dtype))
    with pytest.raises(ValueError, match=f"must be float32, found {dtype}.*--mixed_precision"):
        make_optimizer(arguments(), model.parameters(), ONE_CPU)
