# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/study.py compares: settings, rows, stages and what is tuned. Nothing here runs."""

from typing import NamedTuple

LIFT, PLACE = "train_lift.py", "train_place.py"
SAMPLES = 10_000  # of every reported distance, against the 10,000 test images

# Every method alike, on a seed that is not reported, measured against training images that it does not train on
TUNING_SEED, TUNING_STEPS, TUNING_SAMPLES, TUNED_ON = 100, 500, 1024, 8000
RATES, WEIGHTS, FEATURE_WEIGHTS = ("3e-3", "1e-2"), ("1", "10"), ("4.7e-5", "1")

COMMON = (
    "--train_batch_size 64 "
    "--lr_scheduler cosine --lr_warmup_steps 50 --antithetic_timesteps --use_ema --ema_decay 0.995 "
    "--validation_steps 100000 --validation_shown_samples 0 "
    "--report_to none --num_cpu_threads 1 --logging_steps 50 --overwrite_output_dir"
).split()


class Family(NamedTuple):
    """What rows of latent teachers are trained and measured with; by default, that of the pixel rows."""

    captioned: bool = False  # the images with their captions, which lie beside the latent teachers
    scheduler: str | None = "DDIMScheduler"  # eta 0, 25 steps; None is the pipeline's own
    guidance_scale: float | None = None
    prompts: str | None = None  # a file, one a class
    class_labels: tuple[int, ...] | None = None
    max_sequence_length: int | None = None
    samples: int = SAMPLES
    rates: tuple[str, ...] = RATES
    tuning_steps: int = TUNING_STEPS
    tuning_samples: int = TUNING_SAMPLES

    @property
    def asks(self) -> bool:
        """Whether samples are told what to be, class by class: then the share that is taken for it is measured."""
        return bool(self.prompts or self.class_labels)


class Setting(NamedTuple):
    """A student and how long it trains. `flags` win over `COMMON`."""

    title: str
    steps: int
    flags: str
    teacher: str = "assets/teacher"  # or one of TEACHERS or LATENT_TEACHERS
    family: Family = Family()


class Row(NamedTuple):
    """A method. `tuned_as` is the row whose tuned flags it takes, its own without; the tuned weight of its output loss
    is divided by `over`."""

    script: str
    flags: str
    tuned_as: str | None = None
    over: float = 1.0

    def grid(self, rates: tuple[str, ...] = RATES) -> list[dict[str, str]]:
        """The flags that tuning tries."""
        if "--lambda_kd_output 0" in self.flags:
            weights = [{}]
        elif "--lambda_kd_feat" in self.flags:
            weights = [{"--lambda_kd_feat": weight} for weight in FEATURE_WEIGHTS]
        else:
            weights = [{"--lambda_kd_output": weight} for weight in WEIGHTS]
        return [{"--learning_rate": rate, **weight} for rate in rates for weight in weights]


# Rows of other teachers cost more to sample and are compared with each other alone: fewer samples
OTHER = Family(samples=1000)
# and, of latents, tuning of fewer steps
LATENT = Family(captioned=True, samples=1000, rates=("1e-3", "3e-3"), tuning_steps=150, tuning_samples=500)
TEXT = LATENT._replace(prompts="benchmarks/prompts.txt", guidance_scale=3.0)
CLASSES = LATENT._replace(class_labels=tuple(range(10)), guidance_scale=4.0)
FLOW = LATENT._replace(prompts="benchmarks/prompts.txt", guidance_scale=2.0, scheduler=None, max_sequence_length=8)

SETTINGS = {
    "random": Setting("1.6 %, random start", 1000, "--pruning_ratio 0.875 --student_init random"),
    "taylor": Setting("4.7 %, Taylor start", 800, "--pruning_ratio 0.8 --student_init taylor"),
    "quarter": Setting("25 %, Taylor start", 250, "--pruning_ratio 0.5 --student_init taylor", family=OTHER),
    "smaller": Setting(
        "4.7 %, of a smaller teacher",
        250,
        "--pruning_ratio 0.6 --student_init taylor",
        "smaller",
        OTHER,
    ),
    "weaker": Setting("4.7 %, of a weaker teacher", 250, "--pruning_ratio 0.8 --student_init taylor", "weaker", OTHER),
    "text": Setting("text-to-image, bk_tiny: 29 % of the U-Net", 250, "--student_preset bk_tiny", "text", TEXT),
    "dit": Setting("DiT, 2 of 8 layers, evenly chosen", 300, "--student_depth 2", "dit", CLASSES),
    "dit_scored": Setting(
        "DiT, 2 of 8 layers, chosen by score", 300, "--student_depth 2 --layer_choice scored", "dit", CLASSES
    ),
    "flow": Setting(
        "SD3's MMDiT, 2 of 8 layers, evenly chosen",
        300,
        "--student_depth 2 --max_sequence_length 8 --no-antithetic_timesteps",
        "flow",
        FLOW,
    ),
}

# Teachers that benchmarks/make_text_teacher.py and so on make
LATENT_TEACHERS = ("text", "dit", "flow")

# Teachers that stage 3 makes for itself, without distillation: train_lift.py with these flags
TEACHERS = {
    "smaller": "--pruning_ratio 0.5 --student_init taylor --max_train_steps 1000 --learning_rate 1e-3",
    "weaker": "--student_config recipes/fashion_mnist_teacher.json --max_train_steps 400 --learning_rate 1e-3",
}

# Balanced rows balance every term that they have, so that each differs from its neighbour in one thing; P is .5 in all
# of stage 1, chosen beforehand
NO_KD, MSE, L1 = "--lambda_kd_output 0", "--output_loss mse", "--output_loss l1"
BALANCED = "--timestep_balance {0} --task_balance {0}"
BASELINES = {
    "w/o KD": Row(LIFT, NO_KD),
    "w/o KD, balanced": Row(LIFT, f"{NO_KD} --task_balance 0.5"),
    "mse": Row(LIFT, MSE),
    "l1": Row(LIFT, L1),
    "mse + FeatKD": Row(LIFT, f"{MSE} --lambda_kd_feat 1"),  # the weight is tuned
    "LIFT": Row(LIFT, ""),
    "PLACE": Row(PLACE, ""),
    "mse, balanced": Row(LIFT, f"{MSE} {BALANCED.format(0.5)}"),
    "l1, balanced": Row(LIFT, f"{L1} {BALANCED.format(0.5)}"),
    "PLACE, balanced": Row(PLACE, BALANCED.format(0.5)),
}
VARIANTS = {
    "PLACE, K = 4": Row(PLACE, "--group_size 4", "PLACE"),
    "PLACE, K = 64": Row(PLACE, "--group_size 64", "PLACE"),
    "PLACE, K = N": Row(PLACE, "--group_size 256", "PLACE"),
    "PLACE, signed": Row(PLACE, "--grouping signed", "PLACE"),
    "PLACE, w = 1": Row(PLACE, "--weighting constant", "PLACE"),
    "PLACE, coarse only": Row(PLACE, "--coarse_scale 1e6", "PLACE", over=1e6),
    "PLACE, fine only": Row(PLACE, "--coarse_scale 0 --weighting constant", "PLACE"),
    "log": Row(LIFT, "--output_loss log"),
    **{
        f"PLACE, P = {power}": Row(PLACE, BALANCED.format(power), "PLACE, balanced")
        for power in (0.25, 0.75, 1)  # .5 is in stage 1
    },
}
ROWS = BASELINES | VARIANTS
CAPACITY = ("mse", "l1", "PLACE", "PLACE, balanced")

# stage -> setting -> rows. A stage's rows are compared within a setting; those of earlier stages stay beside them
STAGES = {
    1: {"random": tuple(BASELINES), "taylor": tuple(BASELINES)},
    2: {"random": tuple(VARIANTS), "taylor": ("PLACE, signed",)},
    3: {"quarter": (*CAPACITY, "PLACE, signed"), "smaller": CAPACITY, "weaker": CAPACITY},
    4: {"text": ("w/o KD", "mse", "l1", "PLACE", "mse, balanced", "PLACE, balanced", "PLACE, signed")},
    5: {"dit": (*CAPACITY, "PLACE, signed"), "dit_scored": ("mse", "PLACE")},
    6: {"flow": CAPACITY},
}
# a setting takes another's tuned flags
TUNED_LIKE = {"quarter": "taylor", "smaller": "taylor", "weaker": "taylor", "dit_scored": "dit"}
