# SPDX-License-Identifier: Apache-2.0
"""Work on numbered images in fixed blocks, by all processes and, on the CPU, by several threads of each.

Block b holds the indices from b * batch_size on. It is worked on by one thread of one process, with PyTorch's own
threads off, and results are put together in the order of the blocks. So no number depends on how many processes and
threads there were, or on which was faster.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from utils.command_line import UsageError
from utils.data.rows import as_is
from utils.devices import cpu_share
from utils.threads import wanted_threads


def blocks(count: int, size: int) -> list[range]:
    """The indices below `count` in blocks of `size`; the last may be shorter."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def check_processes(accelerator: Accelerator) -> None:
    """Raises UsageError where several processes were launched that do not know of each other: each would do all of the
    work, into the same folder."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise UsageError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}. On the CPU set the "
            "environment variable ACCELERATE_USE_CPU=true before `torchrun` or `accelerate launch --multi_gpu`."
        )


def block_threads(wanted: int | None, accelerator: Accelerator) -> int:
    """Blocks that this process works on at once: `wanted`, else OMP_NUM_THREADS, else one for each of
    its cores; on a GPU one."""
    if accelerator.device.type != "cpu":
        return 1
    torch.set_num_threads(1)
    return wanted or wanted_threads() or cpu_share(accelerator)


@contextlib.contextmanager
def mapping(threads: int) -> Iterator[Callable[..., Iterator]]:
    """`map`, in so many threads: results come in order, and what has not begun when one fails never begins."""
    if threads == 1:
        yield map
    else:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map


def in_order(
    images: Dataset,
    work: Callable[[torch.Tensor, Sequence[int]], object],
    accelerator: Accelerator,
    *,
    batch_size: int,
    threads: int,
    num_workers: int,
    description: str,
) -> Iterator:
    """`work(images, indices)` of every block, done by all processes, given to every one in the order of the blocks.

    What `work` returns is gathered every few blocks, so memory does not grow; it must be picklable and on the CPU.
    """
    numbered = list(enumerate(blocks(len(images), batch_size)))
    own = [list(block) for _, block in numbered[accelerator.process_index :: accelerator.num_processes]]
    batches = iter(DataLoader(images, batch_sampler=own, num_workers=num_workers, collate_fn=as_is))
    progress = tqdm(total=len(images), desc=description, unit="image", disable=not accelerator.is_local_main_process)
    at_once = accelerator.num_processes * threads
    with mapping(threads) as map_blocks:
        for first in range(0, len(numbered), at_once):
            mine = numbered[first : first + at_once][accelerator.process_index :: accelerator.num_processes]
            results = map_blocks(work, (next(batches) for _ in mine), [block for _, block in mine])
            found = [(number, result) for (number, _), result in zip(mine, results, strict=True)]
            for number, result in sorted(gather_object(found), key=itemgetter(0)):
                progress.update(len(numbered[number][1]))
                yield result
    progress.close()
