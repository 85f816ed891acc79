# SPDX-License-Identifier: Apache-2.0
"""`python pair.py jobs.json` runs train_place.py for each job in turn, on one process or on several that talk gloo.

Every process of a job is a fork of this one. A job is {"argv", "folder", "processes"}; its
folder gets `out-<rank>.txt` and `seen-<rank>.json`: what the rank trained on, wrote and ended with. Where a job has
them, `signal` is a step in which the last rank, alone, gets SIGTERM, `validation_takes` seconds, and `patience` and
`step_patience` are the seconds that hosts and devices wait for each other.
"""

import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDPMPipeline, StableDiffusionPipeline  # noqa: F401
from forks import worlds

import train_place
import utils.data.cache
import utils.distillation.balance
import utils.distributed
from utils.backbones.process import Diffusion
from utils.command_line import call
from utils.training.log import RunLog
from utils.training.validation import Validation

LIMIT = 600  # seconds, then a process that waits for another is killed


def record(job: dict, seen: dict) -> None:
    """Note what passes; change nothing but what the job asks for."""
    batches, end_step = train_place.training_batches, RunLog.end_step
    write, save = utils.data.cache._write, train_place.Checkpoints._write
    validate, draw, noise_at = Validation.run, Validation._draw, Diffusion.noised

    def rows(dataset, args, accelerator, **span):
        seen["processes"], seen["rank"] = accelerator.num_processes, accelerator.process_index
        for batch, rng in batches(dataset, args, accelerator, **span):
            seen["rows"].append(batch["row"].tolist())
            yield batch, rng

    def timesteps(self, clean, noise, timestep):
        seen["timesteps"].append(timestep.tolist())
        return noise_at(self, clean, noise, timestep)

    def files(path, pieces):
        seen["encoded"].append(path.name)
        write(path, pieces)

    def checkpoints(self, folder, step, records):
        seen["checkpoints"].append(step)
        save(self, folder, step, records)

    def samples(self, denoiser, first, count):
        seen["sampled"] += 1
        return draw(self, denoiser, first, count)

    def validation(self, student, step):
        if self.accelerator.is_main_process:
            time.sleep(job.get("validation_takes", 0))
        return validate(self, student, step)

    def step_ended(self, step, grad_norm, learning_rate):
        if step == job.get("signal") and self.accelerator.is_last_process:
            os.kill(os.getpid(), signal.SIGTERM)
        end_step(self, step, grad_norm, learning_rate)

    train_place.memory_estimate = lambda *_: "not estimated"  # most of a tiny run's time, and no part of its result
    train_place.training_batches, RunLog.end_step, utils.data.cache._write = rows, step_ended, files
    train_place.Checkpoints._write, Validation.run, Validation._draw = checkpoints, validation, samples
    if "patience" in job:
        utils.distributed.PATIENCE = timedelta(seconds=job["patience"])
    if "step_patience" in job:
        utils.distributed.STEP_PATIENCE = timedelta(seconds=job["step_patience"])
    Diffusion.noised = timesteps
    utils.distillation.balance.ENOUGH = 1  # as if many more samples had been seen


def run(job: dict, rank: int) -> int:
    """What a launcher would start, in this process; its exit code."""
    folder = Path(job["folder"])
    descriptor = os.open(folder / f"out-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    seen = {"rows": [], "timesteps": [], "encoded": [], "checkpoints": [], "sampled": 0}
    record(job, seen)
    try:
        call(train_place, job["argv"])
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    (folder / f"seen-{rank}.json").write_text(json.dumps({**seen, "code": code}))
    return code


def start(job: dict) -> None:
    """All ranks of a job, to their end."""
    count = job["processes"]
    for rank, world in enumerate(worlds(count)):
        if os.fork() == 0:
            signal.alarm(LIMIT)
            torch.set_num_threads(1)
            os.environ.update(world if count > 1 else {})
            os._exit(run(job, rank))
    for _ in range(count):
        os.wait()


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text()):
        start(each)
