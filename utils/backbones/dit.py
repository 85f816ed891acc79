# SPDX-License-Identifier: Apache-2.0
"""DiT: latent transformers that are told a class, `DiTTransformer2DModel` teachers (Peebles and Xie 2023)."""

import warnings
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from utils.backbones.base import Configs, Prediction, vae_factor
from utils.backbones.folder import Part
from utils.backbones.labels import Labels
from utils.backbones.loading import TEACHER
from utils.backbones.process import Noised
from utils.backbones.stand_in import GuidedLabels
from utils.backbones.transformer import Transformer
from utils.backbones.variance import LearnedVariance, no_bound
from utils.command_line import UsageError
from utils.data.labels import class_names
from utils.students.sizes import full_config


def predicts_variance(config: Mapping[str, Any]) -> bool:
    """Whether a DiT of this config, which is whole, predicts one beside its output."""
    return config["out_channels"] == 2 * config["in_channels"]


class DiT(Transformer):
    """Denoises latents with a `DiTTransformer2DModel`. One that predicts variances gives them beside its output."""

    component, model_class, pipeline_class = "transformer", DiTTransformer2DModel, DiTPipeline
    must_match = "in_channels out_channels sample_size num_embeds_ada_norm".split()
    flags = Transformer.flags | {"label_column", "validation_guidance_channels"}
    vae_unread = (*Transformer.vae_unread, "shift_factor")
    instead = Transformer.instead | {"lora_rank": "diffusers has no adapters for it. Leave it out"}

    def __init__(self, args, teacher: DiTTransformer2DModel, configs: Configs):
        super().__init__(args, teacher, configs)
        pipeline = DiTPipeline.load_config(args.pretrained_model_name_or_path, revision=args.revision)
        self.conditions = Labels(args, teacher.config.num_embeds_ada_norm, class_names(pipeline))
        self.variance = LearnedVariance(self.process.scheduler)
        self.sampling_options = {"guidance_scale": self.guidance_scale()}

    @classmethod
    def check_denoiser(cls, config: dict, flag: str) -> None:
        """What is no DiT, and outputs that are neither a prediction nor one with its variance."""
        channels, out = config["in_channels"], config["out_channels"]
        if config["norm_type"] != "ada_norm_zero" or not config["num_embeds_ada_norm"]:
            raise UsageError(
                f"{flag}: its norm_type is {config['norm_type']} and its num_embeds_ada_norm "
                f"{config['num_embeds_ada_norm']}; a DiT has ada_norm_zero and a number of classes. Choose another."
            )
        if not isinstance(config["sample_size"], int):
            raise UsageError(f"{flag}: sample_size is {config['sample_size']}; a DiT has one number. Choose another.")
        if out not in (channels, 2 * channels):
            raise UsageError(
                f"{flag}: out_channels is {out}; of in_channels {channels} it must be {channels}, or {2 * channels} "
                "with variances, for the stock pipeline to sample. Write it into the config, or choose another one."
            )

    @classmethod
    def check_more(cls, args, teacher: dict, student: dict, flag: str) -> None:
        """Another resolution than that of the table of positions. Warns where variances would be left to drift."""
        if predicts_variance(student) and not (args.lambda_task or args.lambda_kd_output):
            warnings.warn(
                "--lambda_task 0 --lambda_kd_output 0: nothing trains the variance that the student predicts, while "
                "the layers before it move. Samplers that read it will be off.",
                stacklevel=2,
            )
        if args.validation_guidance_channels and args.validation_guidance_scale in (0, 1):
            warnings.warn(
                f"--validation_guidance_channels has no effect here: at --validation_guidance_scale "
                f"{args.validation_guidance_scale:g} nothing is guided.",
                stacklevel=2,
            )
        own = teacher["sample_size"] * vae_factor(cls.vae_config(args))
        if args.resolution not in (None, own):
            raise UsageError(
                f"--resolution {args.resolution}: the teacher's table of positions is for {own} pixels a side, and "
                "its pipeline samples no other. Leave the flag out."
            )

    @classmethod
    def check_parts(cls, args, configs: Configs, parts: dict[str, Part]) -> None:
        """A schedule in which the variance that is predicted has no bound."""
        full = full_config(configs.student, cls.model_class)
        if predicts_variance(full) and (why := no_bound(configs.process.scheduler)):
            raise UsageError(
                f"{TEACHER} {args.pretrained_model_name_or_path}: its transformer predicts a variance beside its "
                f"output, and its scheduler {why}. Choose another teacher."
            )

    def make_student(self, args, batch: dict[str, Tensor]) -> tuple[DiTTransformer2DModel, str]:
        """As `Transformer.make_student`, without the labels that each of a DiT's layers would drop of its own."""
        student, table = super().make_student(args, batch)
        for module in student.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0
        return student, table

    def read(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """(what LIFT and PLACE compare, the variance where the denoiser predicts one), both (B, C, H, W)."""
        return output.chunk(2, dim=1) if predicts_variance(self.teacher.config) else (output, None)

    def task_terms(self, prediction: Prediction, noised: Noised) -> dict[str, Tensor]:
        """As `Backbone.task_terms`; a predicted variance has the bound as `variance`."""
        terms = super().task_terms(prediction, noised)
        if prediction.variance is None:
            return terms
        return terms | {"variance": self.variance.bound(prediction.output, prediction.variance, noised)}

    def distillation_terms(self, student: Prediction, teacher: Prediction, noised: Noised) -> dict[str, Tensor]:
        """The distance of the variances as `output_variance`, where they are predicted."""
        if student.variance is None:
            return {}
        return {"output_variance": self.variance.distance(student.variance, teacher.variance, noised)}

    def sampling_denoiser(self, denoiser: nn.Module) -> nn.Module:
        """With its own label for none, and guided in as many channels as asked for."""
        denoiser = super().sampling_denoiser(denoiser)
        if self.sampling_options["guidance_scale"] <= 1:  # the pipeline asks for no unconditional half
            return denoiser
        return GuidedLabels(denoiser, self.teacher.config.num_embeds_ada_norm, self.args.validation_guidance_channels)

    def sampling_pipeline(self, denoiser: nn.Module) -> DiffusionPipeline:
        """The stock one."""
        return DiTPipeline(transformer=denoiser, vae=self.decoder(), scheduler=self.process.sampler())
