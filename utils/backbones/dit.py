# SPDX-License-Identifier: Apache-2.0
"""DiT: latent transformers that are told a class, `DiTTransformer2DModel` teachers (Peebles and Xie 2023)."""

import inspect
import warnings
from collections.abc import Iterator

from diffusers import DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from utils.backbones.base import Configs, Prediction, vae_factor
from utils.backbones.labels import Labels
from utils.backbones.latent import Latent
from utils.backbones.process import Noised
from utils.backbones.stand_in import GuidedLabels
from utils.backbones.variance import LearnedVariance
from utils.command_line import UsageError
from utils.distillation.features import Tapped
from utils.randomness import StepRandom
from utils.students import depth
from utils.students.sizes import full_config, model_size, model_table, set_dropout

SCORED_DRAWS = 8  # of noise and times for one batch, whose losses score the layers


class DiT(Latent):
    """Denoises latents with a `DiTTransformer2DModel`. One that predicts variances gives them beside its output."""

    component, model_class, pipeline_class = "transformer", DiTTransformer2DModel, DiTPipeline
    must_match = "in_channels out_channels sample_size num_embeds_ada_norm".split()
    flags = Latent.flags | {"label_column", "validation_guidance_channels", *depth.FLAGS}
    vae_unread = (*Latent.vae_unread, "shift_factor")
    instead = {
        "pruning_ratio": "a transformer is made shallower, not narrower. Give --student_depth or --kept_layers",
        "lora_rank": "diffusers has no adapters for it. Leave it out",
    }

    def __init__(self, args, teacher: DiTTransformer2DModel, configs: Configs):
        super().__init__(args, teacher, configs)
        pipeline = DiTPipeline.load_config(args.pretrained_model_name_or_path, revision=args.revision)
        names = {int(label): name for label, name in (pipeline.get("id2label") or {}).items()}
        self.conditions = Labels(args, teacher.config.num_embeds_ada_norm, names)
        self.variance = LearnedVariance(self.process.scheduler)
        scale, default = args.validation_guidance_scale, inspect.signature(DiTPipeline.__call__).parameters
        self.sampling_options = {"guidance_scale": default["guidance_scale"].default if scale is None else scale}

    @classmethod
    def check_denoiser(cls, config: dict, flag: str) -> None:
        """What is no DiT, and outputs that are neither a prediction nor one with its variance."""
        channels, out = config["in_channels"], config["out_channels"]
        if config["norm_type"] != "ada_norm_zero" or not config["num_embeds_ada_norm"]:
            raise UsageError(
                f"{flag}: its norm_type is {config['norm_type']} and its num_embeds_ada_norm "
                f"{config['num_embeds_ada_norm']}; a DiT has ada_norm_zero and a number of classes. Choose another."
            )
        if out not in (None, channels, 2 * channels):
            raise UsageError(
                f"{flag}: out_channels is {out}; of in_channels {channels} it must be {channels}, or {2 * channels} "
                "with variances. Choose another one."
            )

    @classmethod
    def check_more(cls, args, teacher: dict, student: dict, flag: str) -> None:
        """Another resolution than that of the table of positions. Warns where variances would be left to drift."""
        if student["out_channels"] == 2 * student["in_channels"] and not (args.lambda_task or args.lambda_kd_output):
            warnings.warn(
                "--lambda_task 0 --lambda_kd_output 0: nothing trains the variance that the student predicts, while "
                "the layers before it move. Samplers that read it will be off.",
                stacklevel=2,
            )
        own = teacher["sample_size"] * vae_factor(cls.vae_config(args))
        if args.resolution not in (None, own):
            raise UsageError(
                f"--resolution {args.resolution}: the teacher's table of positions is for {own} pixels a side, and "
                "its pipeline samples no other. Leave the flag out."
            )

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

    def make_student(self, args, batch: dict[str, Tensor]) -> tuple[DiTTransformer2DModel, str]:
        """The student in float32 and a table of what it is made of. Layers are scored on `batch`."""
        if chosen := depth.even_choice(args, self.teacher.config, self.model_class):
            kept, scores = chosen[1], None
            if args.layer_choice == "scored" and args.kept_layers is None:
                scores = depth.layer_scores(self.teacher, self._diffusion_losses(batch, args.seed))
                kept = depth.best_layers(scores, len(kept), last_stays=False)
            student, report = depth.make_depth_student(self.teacher, kept, scores)
            table = report.table()
        else:
            student = self.given_student(args)
            table = model_table(*(model_size(m.config, self.model_class) for m in (self.teacher, student)))
        set_dropout(student, args.dropout)
        for module in student.modules():
            if isinstance(module, LabelEmbedding):  # in every layer, and each would drop labels of its own
                module.dropout_prob = 0.0
        return student.train(), table

    def _diffusion_losses(self, batch: dict[str, Tensor], seed: int) -> Iterator[Tensor]:
        """The teacher's diffusion loss on one real batch, at several draws of noise and times."""
        device = next(iter(batch.values())).device
        teacher = Tapped(self.teacher.to(device))
        for draw in range(SCORED_DRAWS):
            rng = StepRandom(seed, draw, device=device)
            clean, condition = self.encode(batch, rng)
            noised = self.add_noise(clean, rng)
            yield self.task_terms(self.predict(teacher, noised, condition), noised)["task"]

    def feature_pairs(self, student: DiTTransformer2DModel) -> list[tuple[str, str]]:
        """(student layer, teacher layer) that it was made of, or that lies where it does."""
        return depth.feature_pairs(student, self.teacher)

    def read(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """(what LIFT and PLACE compare, the variance where the denoiser predicts one), both (B, C, H, W)."""
        config = full_config(self.teacher.config, self.model_class)
        return output.chunk(2, dim=1) if config["out_channels"] == 2 * config["in_channels"] else (output, None)

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
