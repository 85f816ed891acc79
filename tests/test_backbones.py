# SPDX-License-Identifier: Apache-2.0
"""The registry of backbones, and the flags of one family given to another."""

import importlib
import warnings

import pytest

import train_place
from utils.backbones import BACKBONES
from utils.backbones.base import DECISIVE, FAMILY_FLAGS
from utils.command_line import UsageError
from utils.training.arguments import STUDENTS, parse_args

# in an order that two test workers agree on, as a set's is not
CLASSES = [getattr(importlib.import_module(module), name) for module, name in dict.fromkeys(BACKBONES.values())]
GIVEN = {
    "pruning_ratio": ["0.5"],
    "student_preset": ["bk_tiny"],
    "student_depth": ["2"],
    "kept_layers": ["0,1"],
    "layer_choice": ["scored"],
    "label_column": ["label"],
    "validation_guidance_channels": ["3"],
    "lora_rank": ["2"],
    "latent_cache_dir": ["cache"],
    "cache_variants": ["2"],
    "caption_column": ["text"],
    "proportion_empty_prompts": ["0.2"],
    "pretrained_vae_model_name_or_path": ["vae"],
    "validation_prompts": ["a", "b"],
    "validation_guidance_scale": ["3"],
    "fuse_lora": [],
    "noise_offset": ["0.1"],
    "snr_gamma": ["5"],
    "antithetic_timesteps": [],
    "input_perturbation": ["0.1"],
    "weighting_scheme": ["mode"],
    "logit_mean": ["1"],
    "logit_std": ["2"],
    "mode_scale": ["1"],
    "max_sequence_length": ["77"],
}


def read(backbone) -> frozenset[str]:
    return backbone.flags | backbone.process_class.flags


def test_every_flag_of_a_family_is_tried_here():
    assert GIVEN.keys() == FAMILY_FLAGS.keys() and DECISIVE <= FAMILY_FLAGS.keys()
    assert all(read(backbone) <= FAMILY_FLAGS.keys() for backbone in CLASSES)
    for backbone in CLASSES:
        assert backbone.instead.keys() | backbone.process_class.instead.keys() <= DECISIVE - read(backbone)


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("backbone", CLASSES, ids=lambda backbone: backbone.__name__)
def test_a_flag_is_read_or_refused_or_warned_of(backbone, name, tmp_path):
    student = [] if name in STUDENTS else ["--student_config", "config.json"]
    flags = ["--pretrained_model_name_or_path", "teacher", "--dataset_name", "data", f"--{name}", *GIVEN[name]]
    with warnings.catch_warnings(action="ignore"):  # of what the command line itself finds idle
        args = parse_args(
            "", train_place.add_method_arguments, [*flags, *student, "--output_dir", str(tmp_path / "student")]
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if name in DECISIVE - read(backbone):
            with pytest.raises(UsageError, match=f"--{name} .* does not go with a {backbone.model_class.__name__}"):
                backbone.check_flags(args)
        else:
            backbone.check_flags(args)
    warned = [str(warning.message) for warning in caught]
    expected = name not in read(backbone) and name not in DECISIVE
    assert bool(warned) == expected and all(f"--{name} has no effect here" in text for text in warned)
