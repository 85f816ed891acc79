# SPDX-License-Identifier: Apache-2.0
"""Run a training script, unchanged, with the teacher's outputs of every step kept on disk.

    python benchmarks/recorded.py RECORD train_place.py @assets/default.args --seed 0      # the teacher runs
    python benchmarks/recorded.py RECORD train_lift.py @assets/default_lift.args --seed 0 --output_loss l1

Images, noise, timesteps and conditions of a step are functions of (seed, step), so every run of one seed asks the
teacher the same. The first writes its answers to the folder RECORD, later ones read them, bit for bit; 64 KiB a step
for 64 images of 16x16. A run that would ask something else is refused. Runs with feature distillation ask for more
than the output, so their teacher always runs.
"""

import fcntl
import hashlib
import importlib
import platform
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.backbones.base import Backbone, Prediction  # noqa: E402
from utils.command_line import UsageError, call, run  # noqa: E402

KEY_BYTES = 16


def cpu_name() -> str:
    """The processor, as Linux names it, elsewhere its architecture, and the instructions that torch uses on it.

    Another of either rounds otherwise, and one name covers many: "AMD EPYC" may or may not have AVX512."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


class Record:
    """Answers of a teacher in the order of the steps: `outputs.f32`, and a hash of each question in `keys`."""

    def __init__(self, folder: Path):
        """Open or make `folder`, for this process alone.

        Raises:
            UsageError: another process has it open.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.keys, self.outputs = (open(folder / name, "a+b") for name in ("keys", "outputs.f32"))  # noqa: SIM115
        self.folder, self.step, self.salt = folder, 0, b""
        try:
            fcntl.flock(self.keys, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"RECORD {folder} is being written by another run; wait for it, or name another."
            ) from error

    def of_teacher(self, teacher: torch.nn.Module) -> None:
        """Another teacher, processor or torch gives other answers."""
        digest = hashlib.sha256(f"{cpu_name()} {torch.__version__}".encode())
        for tensor in teacher.state_dict().values():
            digest.update(_bytes(tensor))
        self.salt = digest.digest()

    def answer(self, question: tuple[torch.Tensor, ...], ask) -> torch.Tensor:
        """The float32 answer to the next step's `question`, of the question's first tensor's shape: read where it is
        recorded, otherwise `ask()`ed and kept.

        Raises:
            UsageError: this step of the record is of another question.
        """
        digest = hashlib.sha256(self.salt)
        for tensor in question:
            digest.update(_bytes(tensor))
        key, size = digest.digest()[:KEY_BYTES], question[0].numel() * 4
        self.keys.seek(self.step * KEY_BYTES)
        self.outputs.seek(self.step * size)
        recorded, data = self.keys.read(KEY_BYTES), self.outputs.read(size)
        if len(recorded) == KEY_BYTES and recorded != key:
            raise UsageError(
                f"RECORD {self.folder}: its step {self.step} is of another seed, data, batch, teacher or machine, or "
                "this run was resumed. Name another folder."
            )
        if len(recorded) < KEY_BYTES or len(data) < size:
            output = ask().float()
            for file, place, content in (
                (self.outputs, self.step * size, _bytes(output).tobytes()),
                (self.keys, self.step * KEY_BYTES, key),  # last: a key says that its output is there
            ):
                file.truncate(place)
                file.write(content)
                file.flush()
        else:
            output = (
                torch.frombuffer(bytearray(data), dtype=torch.float32).view(question[0].shape).to(question[0].device)
            )
        self.step += 1
        return output


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """Of whatever type, NumPy's or not."""
    return tensor.contiguous().cpu().flatten().view(torch.uint8).numpy()


def tensors_of(condition: dict) -> list[torch.Tensor]:
    """What a denoiser is told besides its input and the time, whatever it is nested in, in the order of the names."""
    parts = (condition[name] for name in sorted(condition))
    return [tensor for part in parts for tensor in (tensors_of(part) if isinstance(part, dict) else [part])]


def record_teacher(folder: Path) -> None:
    """From now on, what a training loop asks its teacher goes through the record in `folder`.

    A teacher that predicts variances is refused, with a UsageError, in its first step.
    """
    predict, record = Backbone.predict, None

    def recorded(self, model, noised, condition):
        nonlocal record
        is_teacher = model.__dict__["_modules"].get("denoiser") is self.teacher
        if not is_teacher or model.blocks or torch.is_grad_enabled():  # as it is where a student is made of it
            return predict(self, model, noised, condition)
        if record is None:
            record = Record(folder)
            record.of_teacher(self.teacher)

        def ask() -> torch.Tensor:
            prediction = predict(self, model, noised, condition)
            if prediction.variance is not None:
                raise UsageError("RECORD keeps a teacher's output alone, and this one predicts variances too.")
            return prediction.output

        question = (noised.x_t, noised.time, *tensors_of(condition))
        return Prediction(record.answer(question, ask), None, [])

    Backbone.predict = recorded


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[2] not in ("train_lift.py", "train_place.py"):
        raise UsageError(f"give RECORD, train_lift.py or train_place.py, and its flags.\n\n{__doc__}")
    record_teacher(Path(sys.argv[1]))
    call(importlib.import_module(sys.argv[2].removesuffix(".py")), sys.argv[3:])


if __name__ == "__main__":
    run(main)
