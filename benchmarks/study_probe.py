# SPDX-License-Identifier: Apache-2.0
"""Where in the schedule a row's student errs, and where its gradient comes from: 20 bins, 64 test images in each."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import train_lift
import train_place
from utils.backbones import choose_backbone
from utils.data.cache import open_dataset
from utils.data.rows import ImageRows, load_rows, sample_batch
from utils.distillation.balance import BINS, TimestepBalance
from utils.distillation.features import Tapped
from utils.distillation.losses import fine_weight, lift_loss, output_loss, place_loss
from utils.files import write_json
from utils.randomness import StepRandom
from utils.training.arguments import parse_args
from utils.training.log import error_per_sample

IMAGES = 64


def row_loss(args, backbone, student: Tapped, teacher: Tapped, noised, condition, balance: TimestepBalance) -> Tensor:
    """() the loss of the training loop without its feature term; `adaptive` w is that of this batch."""
    prediction = backbone.predict(student, noised, condition)
    weighted = noised.weighted(balance.weight("task", noised.place))
    loss = args.lambda_task * sum(backbone.task_terms(prediction, weighted).values())
    if not args.lambda_kd_output:
        return loss
    with torch.no_grad():
        pair = prediction.output, backbone.predict(teacher, noised, condition).output
    options = {"sample_weight": balance.weight("output", noised.place)}
    if getattr(args, "output_loss", "lift") != "lift":
        return loss + args.lambda_kd_output * output_loss(*pair, kind=args.output_loss, **options).loss
    options |= {"coarse_norm": args.coarse_norm, "coarse_scale": args.coarse_scale}
    options["weight"] = fine_weight(args.weighting, 1.0)
    if hasattr(args, "group_size"):
        output = place_loss(*pair, group_size=args.group_size, grouping=args.grouping, **options)
    else:
        output = lift_loss(*pair, coefficients=args.coefficients, **options)
    return loss + args.lambda_kd_output * output.loss


def by_bin(args, backbone, student: nn.Module, balance: TimestepBalance, batch: dict[str, Tensor]) -> dict[str, list]:
    """Means of the squared error to the teacher and to the noise, and the gradient's norm, in each bin."""
    student, teacher = Tapped(student.train()), Tapped(backbone.teacher)
    found = {"error_to_teacher": [], "error_to_noise": [], "gradient_norm": []}
    parameters = list(student.parameters())
    for number in range(BINS):
        rng = StepRandom(0, number)
        clean, condition = backbone.encode(batch, rng)
        span = backbone.process.num_places // BINS
        place = number * span + torch.arange(len(clean)) * span // len(clean)
        noised = backbone.process.noised(clean, rng.normal(clean.shape), place)
        loss = row_loss(args, backbone, student, teacher, noised, condition, balance)
        gradients = torch.autograd.grad(loss, parameters)
        found["gradient_norm"].append(torch.stack([g.square().sum() for g in gradients]).sum().sqrt().item())
        with torch.no_grad():
            ours, theirs = (backbone.predict(model, noised, condition).output for model in (student, teacher))
        found["error_to_teacher"].append(error_per_sample(ours, theirs).mean().item())
        found["error_to_noise"].append(error_per_sample(ours, noised.target).mean().item())
    return found


def probe(target: Path, folder: Path, script: str, flags: list[str]) -> None:
    """Write to `target`, as JSON, what `by_bin` finds of the row's student as it was made and as it is saved in
    `folder`; there with the running means that its last checkpoint holds."""
    method = {"train_lift.py": train_lift, "train_place.py": train_place}[script].add_method_arguments
    args = parse_args("", method, [*flags, "--output_dir", str(folder)])
    backbone = choose_backbone(args).load(args)
    data = open_dataset(args, Accelerator(), backbone)
    batch = sample_batch(data, backbone.images_for_student(args), args.seed)
    fresh, _ = backbone.make_student(args, batch)
    test = ImageRows(load_rows(args, "test").select(range(IMAGES)), backbone.transform(args), seed=0, quiet=True)
    images = test.__getitems__([(0, row) for row in range(IMAGES)])

    powers = {"task": args.task_balance, "output": args.timestep_balance}
    before, after = (TimestepBalance(powers, backbone.process.num_places, "cpu") for _ in range(2))
    states = json.loads((max((folder / "checkpoints").glob("step-*")) / "state.json").read_text())["states"]
    after.load_state(states["balance"], args.max_train_steps)
    trained = backbone.model_class.from_pretrained(folder / backbone.component)
    students = {"start": (fresh, before), "end": (trained, after)}
    write_json(target, {"probe": {when: by_bin(args, backbone, *pair, images) for when, pair in students.items()}})
