# SPDX-License-Identifier: Apache-2.0
"""A shallower transformer: the teacher's config with fewer layers first, the tensors of the layers kept second.

For DiT (Peebles and Xie 2023) and the MMDiT of Stable Diffusion 3 (Esser et al. 2024), or any denoiser whose layers
are `transformer_blocks`. Which layers a student was made of stays in its config, under a private name that diffusers
saves and otherwise leaves alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from utils.command_line import UsageError, announce
from utils.counts import counted
from utils.students.sizes import full_config, model_size, model_table

PRESETS = {"d14": 14, "d7": 7, "d4": 4}  # layers left of DiT-XL's 28, as TinyFusion (Fang et al. 2025) names them
KEPT = "_kept_layers"  # in a student's config: layer i of the student was layer kept[i] of its teacher
OF = "_layers_of_teacher"  # and how many layers that teacher had
BLOCKS = "transformer_blocks"
FLAGS = ("student_preset", "student_depth", "kept_layers", "layer_choice")  # that say what is left


def even_layers(num_layers: int, depth: int) -> list[int]:
    """`depth` of `num_layers` layers, evenly spaced, the first and the last among them; of one the last."""
    if depth == 1:
        return [num_layers - 1]
    return [round(i * (num_layers - 1) / (depth - 1)) for i in range(depth)]


def check_kept(config: Mapping[str, Any], kept: Sequence[int], model_class: type[ModelMixin], flag: str) -> None:
    """Raises UsageError, naming `flag`, where a teacher of that config has no such layers or must keep another."""
    config = full_config(config, model_class)
    last = config["num_layers"] - 1
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] > last:
        raise UsageError(
            f"{flag}: {','.join(map(str, kept)) or 'no layer'}; give layers of the teacher's 0 to {last}, in rising "
            "order, each once."
        )
    if "dual_attention_layers" in config and kept[-1] != last:
        raise UsageError(
            f"{flag}: the last layer kept is {kept[-1]}; it must be {last}, the teacher's last, the only one of a "
            f"{model_class.__name__} that gives no text."
        )


def even_choice(args, teacher: Mapping[str, Any], model_class: type[ModelMixin]) -> tuple[str, list[int]] | None:
    """(the flag that says how many layers are kept, those of `--kept_layers` or as many evenly spaced ones); None
    where the student is made otherwise.

    Raises:
        UsageError: no such preset, or no such layers in a teacher of this config.
    """
    num_layers = full_config(teacher, model_class)["num_layers"]
    if args.kept_layers is not None:
        flag, kept = "--kept_layers", args.kept_layers
    elif args.student_preset is not None or args.student_depth is not None:
        flag, wanted = "--student_depth", args.student_depth
        if args.student_preset is not None:
            flag, wanted = f"--student_preset {args.student_preset}", PRESETS.get(args.student_preset)
        if wanted is None:
            raise UsageError(
                f"{flag}: of a {model_class.__name__} there are {', '.join(PRESETS)}, or --student_depth."
            )
        if wanted > num_layers:
            raise UsageError(f"{flag}: {counted(wanted, 'layer')} to be kept, of {num_layers}. Give fewer.")
        kept = even_layers(num_layers, wanted)
    else:
        return None
    check_kept(teacher, kept, model_class, flag)
    return flag, kept


def depth_config(config: Mapping[str, Any], kept: Sequence[int], model_class: type[ModelMixin]) -> dict[str, Any]:
    """The student's complete config, with its `_class_name`: the layers in `kept` of the teacher's, numbered anew."""
    layers = {KEPT: list(kept), OF: full_config(config, model_class)["num_layers"]}
    config = full_config(config, model_class) | {"num_layers": len(kept)}
    if dual := config.get("dual_attention_layers"):
        config["dual_attention_layers"] = [new for new, old in enumerate(kept) if old in dual]
    return {"_class_name": model_class.__name__, **layers, **config}


@dataclass(frozen=True)
class DepthReport:
    """What a student was made of, and what a score said of every layer of its teacher, where one did."""

    teacher_config: Mapping[str, Any]
    student_config: Mapping[str, Any]
    model_class: type[ModelMixin]
    scores: Sequence[float] | None

    def table(self) -> str:
        """The sizes table (counted now), the layers kept and, of scored layers, a line for each."""
        kept = self.student_config[KEPT]
        sizes = (model_size(config, self.model_class) for config in (self.teacher_config, self.student_config))
        lines = [model_table(*sizes), f"layers kept     {', '.join(map(str, kept))}"]
        for layer, score in enumerate(self.scores or ()):
            lines.append(f"  layer {layer:<3} score {score:.3e}  {'kept' if layer in kept else 'dropped'}")
        return "\n".join(lines)


def make_depth_student(
    teacher: ModelMixin, kept: Sequence[int], scores: Sequence[float] | None = None
) -> tuple[ModelMixin, DepthReport]:
    """A float32 student on the CPU in train mode, all parameters trainable, that has every tensor of the teacher but
    those of the layers that are not in `kept`, buffers too; the teacher is untouched. `scores` are for the report."""
    model_class = type(teacher)
    config = depth_config(teacher.config, kept, model_class)
    with torch.device("meta"):
        student = model_class.from_config(config)
    # a model made on meta has no values: none is left without, as every name must be found, and buffers that are in no
    # state dict, such as DiT's table of positions, are taken too
    with torch.no_grad():
        weights = {name: _copy(tensor) for name, tensor in _of_kept(teacher.state_dict(), kept).items()}
        student.load_state_dict(weights, strict=True, assign=True)
        for name, buffer in _of_kept(dict(teacher.named_buffers()), kept).items():
            owner, _, last = name.rpartition(".")
            student.get_submodule(owner)._buffers[last] = _copy(buffer)
    student.requires_grad_(True)
    return student.train(), DepthReport(teacher.config, config, model_class, scores)


def _of_kept(tensors: Mapping[str, Tensor], kept: Sequence[int]) -> dict[str, Tensor]:
    """Those of a student by its own names: layer i's are those of the teacher's layer kept[i]."""
    new, found = {old: new for new, old in enumerate(kept)}, {}
    for name, tensor in tensors.items():
        if not name.startswith(f"{BLOCKS}."):
            found[name] = tensor
            continue
        _, layer, rest = name.split(".", 2)
        if int(layer) in new:
            found[f"{BLOCKS}.{new[int(layer)]}.{rest}"] = tensor
    return found


def _copy(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else None
    return tensor.detach().to("cpu", dtype, copy=True)


def feature_pairs(student: ModelMixin, teacher: ModelMixin) -> list[tuple[str, str]]:
    """(student layer, teacher layer) whose outputs are compared: of each student's layer the one it was made of; where
    its config does not say, or this teacher has another number of layers, as many evenly spaced ones."""
    layers, depth = teacher.config.num_layers, student.config.num_layers
    kept = student.config.get(KEPT)
    if not kept or len(kept) != depth or student.config.get(OF) != layers or not {*kept} <= {*range(layers)}:
        kept = even_layers(layers, depth)
    return [(f"{BLOCKS}.{new}", f"{BLOCKS}.{old}") for new, old in enumerate(kept)]


def layer_scores(teacher: ModelMixin, losses: Iterable[Tensor]) -> list[float]:
    """What each layer matters: |g . (out - in)| of a layer's hidden states, g being the loss's gradient at the *last*
    layer's output, where all layers' changes add up; the mean over samples and `losses`.

    `losses` yields scalar losses of `teacher`, each computed when it is asked for (a generator). Only what follows the
    last layer is differentiated. To first order this is what leaving it out changes in the loss. The gradient of
    one value of a large picture is less than float16 holds, so it is taken of a multiple of the loss.
    """
    announce("scoring the teacher's layers on real images (--layer_choice scored)")
    layers: Sequence[nn.Module] = getattr(teacher, BLOCKS)
    changes: dict[int, Tensor] = {}  # layer -> out - in (B, N, D), of the forward that is under way
    last: list[Tensor] = []

    def see(layer: int):
        def hook(_, args, kwargs, output):
            stream = output[-1] if isinstance(output, tuple) else output  # MMDiT's layers give text and image
            entered = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            changes[layer] = stream.detach() - entered.detach()
            if layer < len(layers) - 1:
                return None
            last[:] = [stream.detach().requires_grad_()]
            return (*output[:-1], last[0]) if isinstance(output, tuple) else last[0]

        return hook

    totals, samples = [0.0] * len(layers), 0
    with ExitStack() as hooks, torch.enable_grad():
        for layer, module in enumerate(layers):
            hooks.enter_context(module.register_forward_hook(see(layer), with_kwargs=True))
        for loss in losses:
            values = last[0].numel()
            gradient = torch.autograd.grad(loss * values, last)[0].float() / values
            samples += len(gradient)
            for layer, change in changes.items():
                totals[layer] += (gradient * change.float()).flatten(1).sum(1).abs().sum().item()
    return [total / samples for total in totals]


def best_layers(scores: Sequence[float], depth: int, last_stays: bool) -> list[int]:
    """The `depth` layers of the highest scores, in their order; `last_stays`: the last is one of them."""
    ranked = sorted(range(len(scores)), key=lambda layer: -scores[layer])
    if last_stays:
        ranked.remove(len(scores) - 1)
        ranked.insert(0, len(scores) - 1)
    return sorted(ranked[:depth])
