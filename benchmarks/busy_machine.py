# SPDX-License-Identifier: Apache-2.0
"""What a busy core costs: training steps a second, with the ways in which OpenMP's threads may wait for each other.

    python benchmarks/busy_machine.py                 # about four minutes; on an idle machine

The default's step (teacher forward, student forward and backward, 64 images, a thread for each core) in a process of
its own for every way, in turn, `--repeats` times: beside nothing, and beside a process that keeps one core busy.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.threads import AT_ONCE, BRIEFLY, POLICIES  # noqa: E402

WAYS = {"libgomp's own": {}, "ours on an idle machine": BRIEFLY, "ours on a busy one": AT_ONCE}


def steps_a_second(seconds: float) -> float:
    """Of this process; 0 where not one step ended in time."""
    import torch
    from diffusers import UNet2DModel

    from utils.students.width import width_config

    teacher = UNet2DModel.from_pretrained(ROOT / "assets" / "teacher" / "unet").eval().requires_grad_(False)
    student = UNet2DModel.from_config(width_config(teacher.config, 0.8))
    torch.set_num_threads(os.cpu_count())
    x_t, timestep = torch.randn(64, 1, 16, 16), torch.full((64,), 500)

    def step() -> None:
        with torch.no_grad():
            target = teacher(x_t, timestep).sample
        (student(x_t, timestep).sample - target).square().mean().backward()

    count, start = -2, time.perf_counter()
    while time.perf_counter() - start < seconds:
        step()
        count += 1
        if count == 0:  # the first two warm up
            start = time.perf_counter()
    return max(count, 0) / (time.perf_counter() - start)


def measure(way: dict[str, str], busy: bool, seconds: float) -> float:
    """In a process of its own; with `busy` beside another that never waits."""
    environment = {name: value for name, value in os.environ.items() if name not in (*POLICIES, "OMP_NUM_THREADS")}
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        command = [sys.executable, __file__, "--child", str(seconds)]
        done = subprocess.run(command, env=environment | way, capture_output=True, text=True, check=True)
    finally:
        if other:
            other.kill()
            other.wait()
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement (default: 8)")
    parser.add_argument("--repeats", type=int, default=3, help="of each way, in turn (default: 3)")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(steps_a_second(args.child)))
        return
    cells = [(way, busy) for busy in (False, True) for way in WAYS]
    found = {cell: [] for cell in cells}
    for _ in range(args.repeats):
        for way, busy in cells:
            found[way, busy].append(measure(WAYS[way], busy, args.seconds))
    print(f"{'steps a second: median (range)':<34}{'idle':>24}{'one core busy':>24}")
    for way in WAYS:
        shown = [
            f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in (found[way, False], found[way, True])
        ]
        print(f"{way:<34}{shown[0]:>24}{shown[1]:>24}")


if __name__ == "__main__":
    main()
