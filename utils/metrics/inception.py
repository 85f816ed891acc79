# SPDX-License-Identifier: Apache-2.0
"""The Inception of FID, by clean-fid's own networks and resizers."""

import pickle
import socket
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from utils.command_line import UsageError
from utils.files import sha256, versions
from utils.pixels import as_rgb

# fid_mode -> file, first digits of its SHA-256, what clean-fid does before the network
INCEPTION = {
    "clean": ("inception-2015-12-05.pt", "f58cb9b6ec323ed6", "299x299, bicubic with antialiasing, Pillow, float32"),
    "legacy_pytorch": ("pt_inception-2015-12-05-6726825d.pth", "6726825d", "299x299, bilinear, PyTorch, float32"),
}


class InceptionExtractor:
    """The Inception-v3 of FID, by clean-fid's own networks and resizers: (B, 2048) features.

    `clean`: Pillow's antialiased bicubic resize to 299 and NVIDIA's TorchScript of the original TensorFlow network.
    `legacy_pytorch`: PyTorch's bilinear resize to 299 and pytorch-fid's port of the same network.

    Class probabilities, for the Inception Score, are the softmax over all 1008 outputs of the last layer without its
    bias, as the code of Salimans et al. 2016 has them, but after the resize of `fid_mode`.
    """

    def __init__(
        self,
        fid_mode: str = "clean",
        path: str | None = None,
        device: str | torch.device = "cpu",
        *,
        flag: str = "--feature_extractor",
        with_probabilities: bool = False,
    ) -> None:
        """Read the weights from `path` (a folder, or the file), or from where clean-fid downloads them to.

        Raises UsageError, naming the flag, when they cannot be had, cannot be read, or lack the output layer.
        """
        from cleanfid.resize import build_resizer

        if fid_mode not in INCEPTION:
            raise UsageError(f"--fid_mode {fid_mode}: there is only {' and '.join(INCEPTION)}.")
        file, digest = _inception_weights(fid_mode, path, flag)
        self.device, self.fid_mode = torch.device(device), fid_mode
        with warnings.catch_warnings(action="ignore"):  # clean-fid itself silences all warnings, for good
            self._resize = build_resizer(fid_mode)
            try:
                self.model, self._classes = self._load(file)
            except (RuntimeError, ValueError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
                raise UsageError(f"{flag} inception: {file} does not hold the weights. {error}") from error
        self.model.to(self.device).eval().requires_grad_(False)
        if with_probabilities and self._classes is None:
            raise UsageError(f"{flag} inception: {file} has no output layer, which the Inception Score needs.")
        self.protocol = {
            "name": "inception",
            "kind": f"clean-fid, {fid_mode}",
            "resize": INCEPTION[fid_mode][2],
            "dimensions": 2048,
            "sha256": {INCEPTION[fid_mode][0]: digest},
            "libraries": versions("clean-fid", "pillow", "torch"),
        }

    def _load(self, file: Path) -> tuple[torch.nn.Module, Tensor | None]:
        """The network and the weight of its output layer (classes, 2048)."""
        from cleanfid import inception_pytorch
        from cleanfid.inception_torchscript import InceptionV3W

        if self.fid_mode == "clean":
            model = InceptionV3W(str(file.parent), download=False)
            classes = model.base.output.weight if hasattr(model.base, "output") else None
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
            # clean-fid's own loader reads one fixed place only, and unpickles whatever is there.
            with mock.patch.object(inception_pytorch, "load_state_dict_from_url", lambda *args, **kwargs: state):
                model = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False)
            classes = state["fc.weight"]
        return model, None if classes is None else classes.detach().to(self.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) uint8 -> (B, 2048) float32 on `device`; one channel is repeated to three."""
        arrays = as_rgb(images).permute(0, 2, 3, 1).cpu().numpy()
        resized = np.stack([self._resize(array) for array in arrays])  # (B, 299, 299, 3) float32, 0 to 255
        pixels = torch.from_numpy(resized).permute(0, 3, 1, 2).contiguous().to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            if self.fid_mode == "clean":
                return self.model(pixels)
            return self.model(pixels / 255)[0].flatten(1)

    @torch.inference_mode()
    def features_and_probabilities(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1 or 3, H, W) uint8 -> (B, 2048) and (B, 1008), both float32, in one forward pass."""
        features = self(images)
        with torch.autocast(self.device.type, enabled=False):
            return features, (features @ self._classes.T).softmax(dim=-1)


def _inception_weights(fid_mode: str, path: str | None, flag: str) -> tuple[Path, str]:
    """The weight file and its SHA-256; without `path` clean-fid's own copy, downloaded if absent.

    Raises:
        UsageError: there is none, or clean-fid's place holds another file.
    """
    from cleanfid import downloads_helper, inception_pytorch

    name, digest, _ = INCEPTION[fid_mode]
    url = downloads_helper.inception_url if fid_mode == "clean" else inception_pytorch.FID_WEIGHTS_URL
    if path is not None:
        file = Path(path) / name if Path(path).is_dir() else Path(path)
        if not file.is_file() or file.name != name:
            raise UsageError(f"--inception_path {path}: no {name} there. Put the file from {url} into that folder.")
        return file, sha256(file)

    folder = Path(tempfile.gettempdir()) if fid_mode == "clean" else Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / name
    if not file.is_file():
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(20)  # seconds without an answer; the downloader knows no timeout of its own
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hash_prefix=digest)
        except (OSError, RuntimeError) as error:  # URLError and timeouts are OSErrors, a wrong hash is a RuntimeError
            raise UsageError(
                f"{flag} inception: its weights are not in {folder} and cannot be downloaded ({error}). Two ways out: "
                f"fetch {url} elsewhere and pass its folder, --inception_path FOLDER (the file name stays {name}); or "
                "pass a transformers image model on this machine, such as --feature_extractor assets/classifier."
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
    found = sha256(file)
    if not found.startswith(digest):
        raise UsageError(
            f"{flag} inception: {file} is not the file of {url}, perhaps a broken download (SHA-256 {found[:16]}, not "
            f"{digest}). Delete it, or pass --inception_path FOLDER."
        )
    return file, found
