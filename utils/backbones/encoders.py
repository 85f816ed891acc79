# SPDX-License-Identifier: Apache-2.0
"""VAE and text encoders of a latent teacher: frozen, loaded when first needed, freed when they are in the way."""

import gc
from collections.abc import Callable

import torch
from diffusers import ModelMixin

from utils.backbones.weights import find_weights
from utils.command_line import UsageError, announce
from utils.devices import DTYPE_KEYWORD
from utils.hub_folders import teacher_folder


class Frozen:
    """A model that only runs forward: loaded at its first call, on the device and in the dtype that `place` says
    then."""

    def __init__(
        self,
        kind: type,
        args,
        place: Callable[[], tuple[torch.device, torch.dtype]],
        *,
        subfolder: str,
        argument: str = "pretrained_model_name_or_path",
        dtype: torch.dtype | None = None,
    ):
        """The `kind` of model in `subfolder` of the teacher, or the whole of what another flag, `argument`, names.
        `dtype`: one that it always has."""
        self.kind, self.args, self.place = kind, args, place
        self.subfolder, self.argument, self.dtype = subfolder, argument, dtype
        self.model: torch.nn.Module | None = None

    def __call__(self) -> torch.nn.Module:
        """The model.

        Raises:
            UsageError: it cannot be loaded; names the flag.
        """
        if self.model is None:
            announce(f"loading the {self.subfolder} of {getattr(self.args, self.argument)}")
            device, dtype = self.place()
            self.model = self._loaded(self.dtype or dtype).to(device).eval().requires_grad_(False)
        return self.model

    def _loaded(self, dtype: torch.dtype) -> torch.nn.Module:
        source, options = getattr(self.args, self.argument), {}
        if self.argument == "pretrained_model_name_or_path":  # as it was found whole, see `folder.parts_to_copy`
            folder = teacher_folder(source, self.args.revision, self.args.variant)
            weights = find_weights(
                folder / self.subfolder, self.kind, self.args.variant, pickled=self.args.allow_pickle_weights
            )
            source, options = folder / self.subfolder, {"variant": weights.variant}
        safe = None if self.args.allow_pickle_weights else True
        options[DTYPE_KEYWORD if issubclass(self.kind, ModelMixin) else "dtype"] = dtype
        try:
            return self.kind.from_pretrained(source, use_safetensors=safe, **options)
        except (OSError, ValueError) as error:
            raise UsageError(f"--{self.argument} {source}: its {self.kind.__name__} does not load: {error}") from error

    def free(self) -> None:
        """Forget the model; it loads again when it is needed again."""
        self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
