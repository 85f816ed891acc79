# SPDX-License-Identifier: Apache-2.0
"""The process that a denoiser undoes: which noise a sample gets at which place, and what is to be predicted of it.

A place is an integer from 0, the cleanest, to `num_places` - 1, the noisiest; logs, bins and analyses speak of places.
What the denoiser is told, its time, is another thing in a flow, and the same in a diffusion.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from diffusers import SchedulerMixin
from torch import Tensor

from utils.backbones.loading import TEACHER, component_config, listed_scheduler
from utils.command_line import UsageError
from utils.randomness import StepRandom


class Noised(NamedTuple):
    """A noisy batch and what the task loss needs to know of it."""

    x_t: Tensor  # (B, C, *S)
    place: Tensor  # (B,) int64, 0 the cleanest
    time: Tensor  # (B,) what the denoiser is told: its timestep, int64, or a flow's, float32
    clean: Tensor  # (B, C, *S), x_0
    target: Tensor  # (B, C, *S), what the denoiser should predict: noise, velocity or x_0
    weight: Tensor | None  # (B,), the task loss's weight per sample; None is 1

    def weighted(self, weight: Tensor | None) -> "Noised":
        """The same with the task loss of every sample times `weight` (B,); None is 1."""
        if weight is None:
            return self
        return self._replace(weight=weight if self.weight is None else self.weight * weight)


class Process:
    """What all processes are: one scheduler's, which is kept private. `set_timesteps` never touches it."""

    flags: ClassVar[frozenset[str]] = frozenset()  # those of `FAMILY_FLAGS` that it reads
    instead: ClassVar[dict[str, str]] = {}  # a flag of another process -> what to do here
    scheduler_class: ClassVar[type[SchedulerMixin]]
    place_name: ClassVar[str]  # what a place is called where people read of one
    name: str  # the sampler, for logs, cards and analyses
    listed: Sequence[str] = ()  # the classes of scheduler that the teacher's files name

    def __init__(self, args, scheduler: SchedulerMixin, *, bounded: bool):
        """`bounded`: whether clean data lie in [-1, 1], where a sampler may clip them: pixels do, latents not."""
        self.scheduler, self.bounded = scheduler, bounded

    @classmethod
    def load(cls, args, *, bounded: bool) -> "Process":
        """The teacher's process, which a student must share; without a teacher, the scheduler's own.

        What a pipeline's scheduler is called only says how it samples. A denoiser without a pipeline does not say what
        it was trained on, so that of a student cannot be compared.

        Raises:
            UsageError: the teacher has no scheduler or one of no such process, or the student's pipeline has another
                process than the teacher.
        """
        source, student = args.pretrained_model_name_or_path, args.student_model_name_or_path
        if not source:
            return cls(args, cls.scheduler_class(), bounded=bounded)
        scheduler, listed = cls._of_pipeline(source, args.revision)
        process = cls(args, scheduler, bounded=bounded)
        process.listed = listed
        if not student:
            return process
        flag = "--student_model_name_or_path"
        try:
            theirs = component_config(cls.scheduler_class, "scheduler", student, flag)
        except ValueError:
            return process
        if differing := process.differs(cls.scheduler_of(theirs, f"{flag} {student}")):
            raise UsageError(
                f"{flag} {student}: its scheduler {differing[0]}; both must see the same noise "
                "and predict the same of it. Take a student and a teacher of one schedule."
            )
        return process

    @classmethod
    def _of_pipeline(cls, source: str, revision: str | None) -> tuple[SchedulerMixin, list[str]]:
        """The scheduler and the classes that it is said to be of. Its own config and model_index.json may name two: a
        stock pipeline takes the listed one, the weights were perhaps trained with the other, so both have to be of
        this process."""
        said = f"{TEACHER} {source}"
        config = component_config(cls.scheduler_class, "scheduler", source, TEACHER, revision)
        named = [config.get("_class_name"), listed_scheduler(source, TEACHER, revision)]
        schedulers = [cls.scheduler_of(config | {"_class_name": name}, said) for name in named if name]
        return (schedulers or [cls.scheduler_of(config, said)])[-1], [name for name in named if name]

    @classmethod
    def scheduler_of(cls, config: dict, said: str) -> SchedulerMixin:
        """The private scheduler of the process that one of this config, of whatever class, samples.

        Raises:
            UsageError: that is another process; `said` names the flag.
        """
        raise NotImplementedError

    def differs(self, scheduler: SchedulerMixin) -> list[str]:
        """In what the process of another scheduler is another, a phrase for each."""
        raise NotImplementedError

    @property
    def num_places(self) -> int:
        """How many there are: the timesteps of the schedule."""
        return self.scheduler.config.num_train_timesteps

    def draw(self, count: int, rng: StepRandom) -> Tensor:
        """(count,) int64 places."""
        raise NotImplementedError

    def add_noise(self, clean: Tensor, rng: StepRandom) -> Noised:
        """Noise at random places, one a sample of `clean` (B, C, *S)."""
        place = self.draw(clean.shape[0], rng)
        return self.noised(clean, rng.normal(clean.shape), place)

    def noised(self, clean: Tensor, noise: Tensor, place: Tensor) -> Noised:
        """x_t and target: `clean` and `noise` (B, C, *S), `place` (B,) int64."""
        raise NotImplementedError

    def sampler(self) -> SchedulerMixin:
        """A fresh one of the same process, without noise of its own."""
        raise NotImplementedError
