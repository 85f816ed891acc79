# SPDX-License-Identifier: Apache-2.0
"""Latents and prompt embeddings on disk: encoded once, read by every later epoch, run and process.

    cache.json                                   what it was made of, and whether it is complete
    latents-<variant>-<block>.safetensors        latent_mean, tokens, replaced ... of BLOCK rows, cropped one way
    text-<block>.safetensors                     prompt_embeds ... of BLOCK different captions
    empty.safetensors                            the same of the empty prompt

Files are written beside and renamed, so what is there is whole, and a cache whose making was stopped goes on.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from utils.command_line import UsageError
from utils.counts import counted
from utils.data.cache_key import FORMAT, cache_settings
from utils.data.rows import ImageRows, as_is, load_rows
from utils.distributed import on_main_process, wait_for_everyone
from utils.files import read_json, write_json, written_beside

BLOCK = 256  # rows, or captions, a file


def open_dataset(args, accelerator: Accelerator, backbone) -> Dataset:
    """The training set as batches of the backbone's tensors; without the dataset's flags, a complete cache.

    Raises:
        UsageError: as `load_rows`, `ImageRows` and `check_cache`.
    """
    if not (args.dataset_name or args.train_data_dir):
        on_main_process(accelerator, check_cache, args, accelerator, None, backbone)
        return CachedRows(Path(args.latent_cache_dir), backbone)
    dataset = ImageRows(
        load_rows(args, args.train_split, split_flag="--train_split"),
        backbone.transform(args),
        args.seed,
        skip_bad_images=args.skip_bad_images,
        variants=args.cache_variants or (1 if args.latent_cache_dir else None),
        quiet=not accelerator.is_local_main_process,
    )
    if args.latent_cache_dir:
        on_main_process(accelerator, check_cache, args, accelerator, dataset, backbone)
    return dataset


def encoded_once(args, accelerator: Accelerator, dataset: Dataset, backbone) -> Dataset:
    """`dataset` itself without `--latent_cache_dir`; with it its encoded rows, made now where they are missing, by all
    processes together. The encoders are freed afterwards."""
    if not args.latent_cache_dir or isinstance(dataset, CachedRows):
        return dataset
    folder = Path(args.latent_cache_dir)
    on_main_process(accelerator, _begin, args, accelerator, dataset, backbone)
    _encode_images(args, accelerator, dataset, backbone)
    wait_for_everyone(accelerator)
    _encode_captions(args, accelerator, backbone)
    wait_for_everyone(accelerator)
    if accelerator.is_main_process:
        write_json(folder / "cache.json", {**read_json(folder / "cache.json"), "complete": True})
    wait_for_everyone(accelerator)
    backbone.free_encoders()
    return CachedRows(folder, backbone)


def check_cache(args, accelerator: Accelerator, dataset: Dataset | None, backbone) -> None:
    """Raises UsageError where `--latent_cache_dir` holds another cache or, without the dataset, none complete."""
    flag = f"--latent_cache_dir {args.latent_cache_dir}"
    path = Path(args.latent_cache_dir) / "cache.json"
    if not path.exists():
        if dataset is None:
            raise UsageError(f"{flag}: no cache there. Give the data that is to be encoded.")
        return
    made, wanted = read_json(path), cache_settings(args, accelerator, dataset, backbone)
    if not isinstance(made, dict):
        raise UsageError(
            f"{flag}: its cache.json is empty or cut off, as a full disk leaves it, and what the cache is of is "
            "unknown. Delete the folder, or encode anew into another one."
        )
    if made.get("format") != FORMAT:
        raise UsageError(
            f"{flag} is a cache of another version of these scripts, whose files mean something else (format "
            f"{made.get('format', 1)}, now {FORMAT}). Encode anew, into another folder."
        )
    differing = [
        f"{name} was {made.get(name)}, is {value}" for name, value in wanted.items() if made.get(name) != value
    ]
    if differing:
        raise UsageError(f"{flag} was made with other settings: {'; '.join(differing)}. Give another folder.")
    if dataset is None and not made["complete"]:
        raise UsageError(f"{flag} is not complete: give the data again, to encode what is missing.")


class CachedRows(Dataset):
    """The rows of a complete cache; indexed by lists of (epoch, row), as `utils.data.rows.ImageRows` is."""

    def __init__(self, folder: Path, backbone):
        self.folder, self.tokenizers = folder, backbone.conditions.tokenizers
        made = read_json(folder / "cache.json")
        self.num_rows, self.variants, self.data = made["rows"], made["variants"], made["data"]
        self.bad_rows: set[int] = set()
        self.handles: dict[str, safe_open] = {}  # memory maps, opened when first read
        self.places: dict[int, tuple[str, int]] = {}  # caption -> file and index
        for path in sorted(folder.glob("text-??????.safetensors")):
            keys = self._open(path.name).get_tensor("caption").tolist()
            self.places |= {key: (path.name, i) for i, key in enumerate(keys)}
        if self.tokenizers:
            file = self._open("empty.safetensors")
            backbone.conditions.use_empty({name: file.get_tensor(name) for name in file.keys()})

    def __len__(self) -> int:
        return self.num_rows

    def __getstate__(self) -> dict:
        return {**self.__dict__, "handles": {}}  # a data worker opens its own

    def __str__(self) -> str:
        return f"{counted(len(self), 'image')}, encoded in {self.folder}"

    def fingerprint(self) -> str:
        """Of the data that was encoded."""
        return self.data

    def captions(self, count: int) -> list[str]:
        """Of the first rows, as the tokenizer that reads most of them does."""
        lengths = [tokenizer.model_max_length for tokenizer in self.tokenizers]
        longest = lengths.index(max(lengths))
        rows = [self._row(0, row)[f"input_ids_{longest}"] for row in range(min(count, len(self)))]
        return [self.tokenizers[longest].decode(tokens, skip_special_tokens=True) for tokens in rows]

    def __getitems__(self, positions: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """What `backbone.cache_rows` made of these rows, with `row` and `replaced` as in `ImageRows`."""
        rows = [self._row(epoch % self.variants, row) for epoch, row in positions]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if "input_ids" not in name}
        captions = batch.pop("caption").tolist()
        text = self._text(captions) if self.tokenizers else {}
        numbers = torch.tensor([row for _, row in positions])
        return {**batch, **text, "row": numbers}

    def _open(self, name: str) -> safe_open:
        if name not in self.handles:
            self.handles[name] = _opened(self.folder / name)
        return self.handles[name]

    def _row(self, variant: int, row: int) -> dict[str, torch.Tensor]:
        file = self._open(_latents_name(variant, row // BLOCK))
        return {name: file.get_slice(name)[row % BLOCK] for name in file.keys()}

    def _text(self, captions: list[int]) -> dict[str, torch.Tensor]:
        places = [self.places[caption] for caption in captions]
        names = [name for name in self._open(places[0][0]).keys() if name != "caption"]
        return {name: torch.stack([self._open(file).get_slice(name)[i] for file, i in places]) for name in names}


def caption_key(tokens: list[torch.Tensor]) -> int:
    """63 bits that name a caption: of its tokens, one (T,) tensor for each tokenizer."""
    content = b"".join(ids.numpy().astype(np.int64).tobytes() for ids in tokens)
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def _begin(args, accelerator: Accelerator, dataset: Dataset, backbone) -> None:
    """Write down what the cache will be of; or check again what another run may have begun since it was checked."""
    path = Path(args.latent_cache_dir) / "cache.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**cache_settings(args, accelerator, dataset, backbone), "complete": False})
    elif not (read_json(path) or {}).get("complete"):
        check_cache(args, accelerator, dataset, backbone)


def _encode_images(args, accelerator: Accelerator, dataset: Dataset, backbone) -> None:
    folder, variants = Path(args.latent_cache_dir), args.cache_variants or 1
    blocks = [(variant, block) for variant in range(variants) for block in range(-(-len(dataset) // BLOCK))]
    blocks = blocks[accelerator.process_index :: accelerator.num_processes]
    blocks = [each for each in blocks if not (folder / _latents_name(*each)).exists()]
    batches = [
        [(variant, row) for row in range(first, min(first + args.train_batch_size, (block + 1) * BLOCK, len(dataset)))]
        for variant, block in blocks
        for first in range(block * BLOCK, min((block + 1) * BLOCK, len(dataset)), args.train_batch_size)
    ]
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=args.dataloader_num_workers, collate_fn=as_is)
    pieces: list[dict[str, torch.Tensor]] = []
    progress = tqdm(
        total=sum(map(len, batches)), desc="encoding images", unit="image", disable=not accelerator.is_main_process
    )
    for positions, batch in zip(batches, loader, strict=True):
        batch.pop("row")
        replaced = batch.pop("replaced")
        tokens = {name: value for name, value in batch.items() if name.startswith("input_ids")}
        keys = [caption_key([ids[i] for ids in tokens.values()]) for i in range(len(positions))]
        encoded = _encoded(backbone, batch, "latents", args.train_batch_size)
        pieces.append({**encoded, **tokens, "caption": torch.tensor(keys), "replaced": replaced})
        progress.update(len(positions))
        variant, last = positions[-1]
        if last + 1 == min((last // BLOCK + 1) * BLOCK, len(dataset)):
            _write(folder / _latents_name(variant, last // BLOCK), pieces)
            pieces = []


def _encode_captions(args, accelerator: Accelerator, backbone) -> None:
    folder = Path(args.latent_cache_dir)
    if not backbone.conditions.tokenizers:
        return
    if accelerator.is_main_process and not (folder / "empty.safetensors").exists():
        _write(folder / "empty.safetensors", [backbone.conditions.empty()])
    tokens = {}
    for path in sorted(folder.glob("latents-*-??????.safetensors")):
        with _opened(path) as file:
            ids = [file.get_tensor(f"input_ids_{i}") for i in range(len(backbone.conditions.tokenizers))]
            for key, *each in zip(file.get_tensor("caption").tolist(), *ids, strict=True):
                tokens.setdefault(key, each)
    keys = list(tokens)
    blocks = range(-(-len(keys) // BLOCK))[accelerator.process_index :: accelerator.num_processes]
    missing = [block for block in blocks if not (folder / _text_name(block)).exists()]
    for block in tqdm(missing, desc="encoding captions", unit="file", disable=not accelerator.is_main_process):
        pieces = []
        chosen = keys[block * BLOCK : (block + 1) * BLOCK]
        for first in range(0, len(chosen), args.train_batch_size):
            part = chosen[first : first + args.train_batch_size]
            stacked = [torch.stack(ids) for ids in zip(*(tokens[key] for key in part), strict=True)]
            batch = {f"input_ids_{i}": ids for i, ids in enumerate(stacked)}
            encoded = _encoded(backbone, batch, "text", args.train_batch_size)
            pieces.append({**encoded, "caption": torch.tensor(part)})
        _write(folder / _text_name(block), pieces)


def _encoded(backbone, batch: dict[str, torch.Tensor], part: str, batch_size: int) -> dict[str, torch.Tensor]:
    """`backbone.cache_rows` of a batch filled up to `batch_size`, so that its last bits are those which training
    without a cache computes."""
    count = len(next(iter(batch.values())))
    filled = {name: value[torch.arange(batch_size) % count] for name, value in batch.items()}
    return {name: value[:count] for name, value in backbone.cache_rows(filled, (part,)).items()}


def _opened(path: Path) -> safe_open:
    """Raises UsageError where a file of the cache is not there, or not whole."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"--latent_cache_dir {path.parent}: {path.name} is missing or damaged ({error}). Delete what is there of "
            "it, and give the data, to encode it again."
        ) from error


def _write(path: Path, pieces: list[dict[str, torch.Tensor]]) -> None:
    tensors = {name: torch.cat([piece[name].cpu() for piece in pieces]).contiguous() for name in pieces[0]}
    with written_beside(path) as beside:
        save_file(tensors, beside)


def _latents_name(variant: int, block: int) -> str:
    return f"latents-{variant:02d}-{block:06d}.safetensors"


def _text_name(block: int) -> str:
    return f"text-{block:06d}.safetensors"
