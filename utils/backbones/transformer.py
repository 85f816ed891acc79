# SPDX-License-Identifier: Apache-2.0
"""What latent transformers have in common: students of some of their teacher's layers, evenly spaced or scored."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from diffusers import ModelMixin
from torch import Tensor

from utils.backbones.latent import Latent
from utils.distillation.features import Tapped
from utils.randomness import StepRandom
from utils.students import depth
from utils.students.sizes import model_size, model_table, set_dropout

SCORED_BATCHES = 8  # whose losses score the layers


class Transformer(Latent):
    """Denoises latents, cut into tokens, with layers that are all alike."""

    component = "transformer"
    flags = Latent.flags | set(depth.FLAGS)
    instead = {"pruning_ratio": "a transformer is made shallower, not narrower. Give --student_depth or --kept_layers"}
    last_stays: ClassVar[bool] = False  # whether every student needs the teacher's last layer

    @classmethod
    def divisor(cls, config: dict) -> int:
        """The side of a token."""
        return config["patch_size"]

    @classmethod
    def student_config(cls, args, teacher: dict) -> tuple[str, dict]:
        """(the flag that says what the student is, its config); scored layers are chosen later, not their number."""
        if chosen := depth.even_choice(args, teacher, cls.model_class):
            flag, kept = chosen
            return flag, depth.depth_config(teacher, kept, cls.model_class)
        return super().student_config(args, teacher)

    def make_student(self, args, batch: dict[str, Tensor]) -> tuple[ModelMixin, str]:
        """The student in float32 and a table of what it is made of; with `--lora_rank` only its adapters train. Layers
        are scored on `batch`, of `images_for_student`."""
        if chosen := depth.even_choice(args, self.teacher.config, self.model_class):
            kept, scores = chosen[1], None
            if args.layer_choice == "scored" and args.kept_layers is None:
                scores = depth.layer_scores(self.teacher, self._diffusion_losses(batch, args))
                self.free_encoders()  # they load again in the dtype in which the teacher then runs
                self.conditions.forget()
                kept = depth.best_layers(scores, len(kept), self.last_stays)
            student, report = depth.make_depth_student(self.teacher, kept, scores)
            table = report.table()
        else:
            student = self.given_student(args)
            table = model_table(*(model_size(m.config, self.model_class) for m in (self.teacher, student)))
        set_dropout(student, args.dropout)
        table = self.adapted(student, table)
        return student.train(), table

    def images_for_student(self, args) -> int:
        """Those of a batch, or of several to score layers on."""
        return args.train_batch_size * (SCORED_BATCHES if args.layer_choice == "scored" else 1)

    def _diffusion_losses(self, images: dict[str, Tensor], args) -> Iterator[Tensor]:
        """The teacher's diffusion loss on several batches, of few images again and again, each noised anew."""
        one = next(iter(images.values()))
        device, count, size = one.device, len(one), min(args.train_batch_size, len(one))
        teacher = Tapped(self.teacher.to(device))
        for number in range(SCORED_BATCHES):
            rng = StepRandom(args.seed, number, device=device)
            chosen = torch.arange(number * size, (number + 1) * size, device=device) % count
            clean, condition = self.encode({name: value[chosen] for name, value in images.items()}, rng)
            noised = self.add_noise(clean, rng)
            yield self.task_terms(self.predict(teacher, noised, condition), noised)["task"]

    def feature_pairs(self, student: ModelMixin) -> list[tuple[str, str]]:
        """(student layer, teacher layer) that it was made of, or that lies where it does."""
        return depth.feature_pairs(student, self.teacher)
