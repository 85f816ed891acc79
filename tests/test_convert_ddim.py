# SPDX-License-Identifier: Apache-2.0
"""recipes/convert_ddim.py: the converted model computes what DDIM's own does, written down here a second time."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, UNet2DModel
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "layers_per_block": 2,
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "dropout": 0.1,
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_ddim", ROOT / "recipes" / "convert_ddim.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class DDIM:
    """The forward pass of ermongroup/ddim, models/diffusion.py, on weights by its names, random where first asked."""

    def __init__(self, widths=(32, 64, 64), attended=(1,), layers=2):
        self.widths, self.attended, self.layers = widths, attended, layers
        self.weights: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def weight(self, name: str, *shape: int) -> Tensor:
        if name not in self.weights:
            fan = math.prod(shape[1:]) if len(shape) > 1 else 4
            self.weights[name] = torch.randn(shape, generator=self.generator) / math.sqrt(fan)
        return self.weights[name]

    def conv(self, name: str, x: Tensor, width: int, size: int = 3, **options) -> Tensor:
        kernel = self.weight(f"{name}.weight", width, x.shape[1], size, size)
        return F.conv2d(x, kernel, self.weight(f"{name}.bias", width), **options)

    def linear(self, name: str, x: Tensor, width: int) -> Tensor:
        return F.linear(x, self.weight(f"{name}.weight", width, x.shape[1]), self.weight(f"{name}.bias", width))

    def norm(self, name: str, x: Tensor) -> Tensor:
        scale, shift = (self.weight(f"{name}.{part}", x.shape[1]) for part in ("weight", "bias"))
        return F.group_norm(x, 32, scale, shift, eps=1e-6)

    def resnet(self, name: str, x: Tensor, temb: Tensor, width: int) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), width, padding=1)
        h = h + self.linear(f"{name}.temb_proj", F.silu(temb), width)[:, :, None, None]
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), width, padding=1)
        return h + (x if x.shape[1] == width else self.conv(f"{name}.nin_shortcut", x, width, 1))

    def attention(self, name: str, x: Tensor) -> Tensor:
        h, width = self.norm(f"{name}.norm", x), x.shape[1]
        q, k, v = (self.conv(f"{name}.{part}", h, width, 1).flatten(2) for part in "qkv")
        shares = (q.transpose(1, 2) @ k * width**-0.5).softmax(dim=2)
        return x + self.conv(f"{name}.proj_out", (v @ shares.transpose(1, 2)).view_as(x), width, 1)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.widths[0] // 2
        angles = t.float()[:, None] * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        temb = self.linear("temb.dense.0", torch.cat([angles.sin(), angles.cos()], dim=1), 4 * self.widths[0])
        temb = self.linear("temb.dense.1", F.silu(temb), 4 * self.widths[0])
        hs, last = [self.conv("conv_in", x, self.widths[0], padding=1)], len(self.widths) - 1
        for level, width in enumerate(self.widths):
            for block in range(self.layers):
                h = self.resnet(f"down.{level}.block.{block}", hs[-1], temb, width)
                hs.append(self.attention(f"down.{level}.attn.{block}", h) if level in self.attended else h)
            if level < last:
                hs.append(self.conv(f"down.{level}.downsample.conv", F.pad(hs[-1], (0, 1, 0, 1)), width, stride=2))
        h = self.resnet("mid.block_1", hs[-1], temb, width)
        h = self.resnet("mid.block_2", self.attention("mid.attn_1", h), temb, width)
        for level in reversed(range(len(self.widths))):
            for block in range(self.layers + 1):
                h = torch.cat([h, hs.pop()], dim=1)
                h = self.resnet(f"up.{level}.block.{block}", h, temb, self.widths[level])
                h = self.attention(f"up.{level}.attn.{block}", h) if level in self.attended else h
            if level:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
                h = self.conv(f"up.{level}.upsample.conv", h, self.widths[level], padding=1)
        return self.conv("conv_out", F.silu(self.norm("norm_out", h)), 3, padding=1)


@pytest.fixture(scope="module")
def original():
    """(the model, an input, what it predicts of it)."""
    model, inputs = DDIM(), (torch.randn(2, 3, 8, 8), torch.tensor([3, 750]))
    return model, inputs, model(*inputs)


@torch.no_grad()
def test_the_converted_model_predicts_the_same(script, original):
    model, inputs, expected = original
    found = script.convert(model.weights, CONFIG)(*inputs).sample
    assert expected.std() > 0.1 and torch.allclose(found, expected, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["training", "no EMA", "published"])
def test_the_average_is_taken_where_there_is_one(script, original, tmp_path, monkeypatch, capsys, kind):
    """The forms that its code saves: a list that ends with the EMA, one without, and a state dict."""
    good = {f"module.{name}" if kind == "no EMA" else name: tensor for name, tensor in original[0].weights.items()}
    raw = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in original[0].weights.items()}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    forms = {"training": [raw, optimizer, 4, 500, good], "no EMA": [good, optimizer, 4, 500], "published": good}
    torch.save(forms[kind], tmp_path / "ckpt.pth")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    argv = [
        str(tmp_path / "ckpt.pth"),
        "--config",
        str(tmp_path / "config.json"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    with pytest.raises(ValueError, match="is a pickle: --allow_pickle_weights"):
        script.main(script.parse_args(argv))
    script.main(script.parse_args([*argv, "--allow_pickle_weights"]))
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(pipeline.unet.conv_in.weight, original[0].weights["conv_in.weight"])
    assert pipeline.unet.config.dropout == 0.1 and not pipeline.scheduler.config.clip_sample
    with pytest.raises(ValueError, match="--output_dir .* is not empty"):
        script.main(script.parse_args([*argv, "--allow_pickle_weights"]))


def test_what_is_no_checkpoint_of_it(script, original, tmp_path):
    torch.save(UNet2DModel(**{k: v for k, v in CONFIG.items() if k[0] != "_"}), tmp_path / "module.pth")  # runs code
    torch.save([1, 2], tmp_path / "numbers.pth")
    (tmp_path / "text.pth").write_text("no")
    messages = {"module": "weights alone", "numbers": "no state dict", "text": "weights alone", "none": "No such file"}
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            script.read_checkpoint(str(tmp_path / f"{name}.pth"))
    with pytest.raises(ValueError, match="does not fit --config"):
        script.convert({name: x for name, x in original[0].weights.items() if "mid" not in name}, CONFIG)
