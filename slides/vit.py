"""Vision transformers as published: UNI, UNI2-h, DINOv2 (with and without registers), HIPT, Phikon (Z §3.1 uses two).

One network fits them all. Width, depth and the like are read off the tensors of a file that you downloaded; what they
do not tell, and what each paper does to a tile before, stands in the table KINDS. encoder.py puts both together.

in:  images (B,3,H,W), normalised as KINDS says   out: class token (B,E), register and patch tokens
run: python vit.py     read next: encoder.py
"""
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, cli, common_count, common_size, load_official, summary

# ----- 1. What the tensors do not tell -----

# our names -> published ones, as replacements in this order
TIMM = ((".proj.", ".attn.proj."), (".qkv.0.", ".attn.qkv."), (".fc", ".mlp.fc"), (".scale1", ".ls1.gamma"),
        (".scale2", ".ls2.gamma"), ("patchify.", "patch_embed.proj."), ("cls", "cls_token"), ("positions", "pos_embed"))
TRANSFORMERS = (
    (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."), ("norm.", "layernorm."),
    (".proj.", ".attention.output.dense."), (".fc1.", ".intermediate.dense."), (".fc2.", ".output.dense."),
    (".qkv.0.", ".attention.attention.query."), (".qkv.1.", ".attention.attention.key."),
    (".qkv.2.", ".attention.attention.value."), ("blocks.", "encoder.layer."), ("cls", "embeddings.cls_token"),
    ("patchify.", "embeddings.patch_embeddings.projection."), ("positions", "embeddings.position_embeddings"))


@dataclass
class Kind:
    """One published encoder. Sizes are those of its file, for the table that this module prints."""
    size: tuple                 # width, depth, heads, patch, hidden, positions, registers
    names: tuple = TIMM         # how its file names what is ours
    prefixes: tuple = ("",)     # what may stand before all names
    unused: tuple = ()          # beginnings of keys that no embedding needs
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
    "dinov2": Kind((1024, 24, 16, 14, 4096, 1370, 0), unused=("mask_token",), offset=0.1, antialias=False,
                   resize="bicubic"),
    "dinov2_reg": Kind((1024, 24, 16, 14, 4096, 1370, 4), unused=("mask_token",),
                       registers=("register_tokens", "reg_token"), resize="bicubic"),  # the second: timm's copies
    "hipt": Kind((384, 12, 6, 16, 1536, 197, 0), prefixes=("module.backbone.", "backbone.", ""),
                 unused=("module.head.", "head."), scaled=False, offset=0.1, antialias=False, side=256, mean=(0.5,) * 3,
                 std=(0.5,) * 3),
    "phikon": Kind((768, 12, 12, 16, 3072, 197, 0), TRANSFORMERS, ("", "vit."), ("pooler.", "vit.pooler."),
                   scaled=False, eps=1e-12, antialias=False),
}
SIGNS = (  # a part of a key -> what has such keys; the first one found counts
    ("first_stage_model.", "a whole latent diffusion model"), ("input_blocks.", "a diffusion U-Net"),
    ("down.0.block.", "a VQ-VAE"), ("layer_scale1.lambda1", "Phikon-v2 or another DINOv2 from transformers"),
    ("attention.attention.query", "phikon"), ("relative_position", "CTransPath or another Swin transformer"),
    ("layer1.0.conv1", "a ResNet"), ("_conv_stem", "EfficientNet-Lite"), ("backbone.patch_embed", "hipt"),
    ("mlp.w12.", "DINOv2 giant"), ("register_tokens", "dinov2_reg"), ("mask_token", "dinov2"))


def recognise(state):
    """What a state dict looks like: a name of KINDS, or some words."""
    found = next((what for part, what in SIGNS if any(part in k for k in state)), None)
    if found:
        return found
    if any("reg_token" in k for k in state):  # packed SwiGLU: fc1 makes twice what fc2 takes
        wide, hidden = (common_size(state, d, f"blocks.0.mlp.fc{d + 1}.weight") for d in (0, 1))
        return "dinov2_reg" if wide == hidden else "uni2h"
    if any(".ls1.gamma" in k for k in state):  # the same names and layers: only the patches differ
        return "dinov2" if common_size(state, 2, "patch_embed.proj.weight") == 14 else "uni"
    return "hipt" if any("attn.qkv" in k for k in state) else "nothing known here"


# ----- 2. The network -----

class Block(nn.Module):
    """A pre-norm transformer block with GELU or SwiGLU, with or without LayerScale. in, out: (B,N,E)."""

    def __init__(self, kind, width, heads, hidden):
        super().__init__()
        self.heads, self.swiglu, split = heads, kind.swiglu, 3 if kind.names is TRANSFORMERS else 1
        self.norm1, self.norm2 = nn.LayerNorm(width, kind.eps), nn.LayerNorm(width, kind.eps)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width // split) for _ in range(split))  # one layer or three
        self.proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden * (1 + kind.swiglu)), nn.Linear(hidden, width)
        self.scale1, self.scale2 = (nn.Parameter(torch.ones(width)) if kind.scaled else 1.0 for _ in range(2))

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = torch.cat([f(h) for f in self.qkv], -1).chunk(3, -1)                     # (B,N,E) each
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))   # (B,nh,N,hd)
        x = x + self.scale1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.fc1(self.norm2(x))
        if self.swiglu:
            gate, h = h.chunk(2, -1)
            return x + self.scale2 * self.fc2(F.silu(gate) * h)
        return x + self.scale2 * self.fc2(F.gelu(h))


class ViT(nn.Module):
    """A published vision transformer.

    in:  image (B,3,H,W), normalised as KINDS[name] says, H and W multiples of the patch side (16 or 14)
    out: (B,E), the class token after the final norm, which is the published embedding; `tokens` has the others, too
    """

    def __init__(self, name, width, depth, heads, patch, hidden, positions, registers=0):
        super().__init__()
        self.kind, self.embed_dim, self.patch, self.grid = KINDS[name], width, patch, isqrt(positions)
        self.first = positions - self.grid**2  # 1 if the class token has a position of its own
        if self.first > 1 or heads < 1 or width % heads:
            raise UserError(f"{name}: {positions} positions are neither a square nor one more, or a width of {width} "
                            f"does not divide into {heads} heads: say how many heads there are, or give another file")
        self.cls, self.positions = (nn.Parameter(torch.zeros(1, n, width)) for n in (1, positions))
        self.registers = nn.Parameter(torch.zeros(1, registers, width)) if self.kind.registers else None
        self.patchify = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.Sequential(*(Block(self.kind, width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, self.kind.eps)

    def place(self, h, w):
        """Positions (1,first+h*w,E) for h x w patches: the trained ones, resized where their grid differs."""
        if (h, w) == (self.grid, self.grid):
            return self.positions
        # official: DINO adds 0.1 so that no size is rounded down; this also shifts where the table is read
        size = {"scale_factor": [(n + self.kind.offset) / self.grid for n in (h, w)]} if self.kind.offset else {
            "size": (h, w)}
        grid = self.positions[:, self.first:].float().mT.unflatten(2, (self.grid, self.grid))      # (1,E,G,G)
        grid = F.interpolate(grid, **size, mode="bicubic", antialias=self.kind.antialias)          # (1,E,h,w)
        return torch.cat([self.positions[:, :self.first], grid.flatten(2).mT], 1)

    def tokens(self, image):
        """out: class token (B,E), register tokens (B,R,E), patch tokens (B,N,E) row by row; all after the final norm.
        raises: ValueError for an image that does not divide into patches."""
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % self.patch or image.shape[3] % self.patch:
            raise UserError(f"got images of shape {tuple(image.shape)}, this ViT takes (B,3,H,W) with H and W multiples"
                            f" of {self.patch}: resize them")
        x = self.patchify(image)                                                                   # (B,E,h,w)
        place, x = self.place(*x.shape[2:]), x.flatten(2).mT                                       # (B,N,E)
        front = [self.cls + place[:, :1] if self.first else self.cls]
        front += [] if self.registers is None else [self.registers]                                # without positions
        front = torch.cat(front, 1).expand(len(x), -1, -1)                                         # (B,1+R,E)
        n, x = front.shape[1], self.norm(self.blocks(torch.cat([front, x + place[:, self.first:]], 1)))
        return x[:, 0], x[:, 1:n], x[:, n:]

    def forward(self, image):
        return self.tokens(image)[0]

    @classmethod
    def from_official(cls, state, name, heads=None):
        """Build from a published state dict, in eval mode.

        in:  name, one of KINDS; heads, by default width / 64, as in all published sizes. A flat dict, or HIPT's whole
        file, of which the teacher counts.
        raises: ValueError listing missing, unexpected and mis-shaped keys, and saying what the weights look like.
        """
        if name not in KINDS:
            raise UserError(f"unknown ViT {name!r}: known are {', '.join(KINDS)}")
        kind, state = KINDS[name], state.get("teacher", state)

        def publish(our, prefix):
            for ours, theirs in kind.names:
                our = our.replace(ours, theirs)
            return prefix + our

        def size(dim, *ours):
            return common_size(state, dim, *(publish(n, prefix) for n in ours)) or 0
        prefix = max(kind.prefixes, key=lambda p: sum(k.startswith(publish("blocks.", p)) for k in state))
        registers = next((k for k in kind.registers if k in state), "".join(kind.registers[:1]))
        blocks = range(common_count(state, publish("blocks.", prefix)))
        width = size(0, "norm.weight", "norm.bias", "patchify.bias", *(f"blocks.{i}.proj.bias" for i in blocks))
        looks = f"they look like {recognise(state)}"
        if not blocks or not width:
            raise UserError(f"these weights do not fit the encoder {name!r}: {publish('blocks.0.norm1.weight', prefix)}"
                            f" and all the rest are missing; {looks}")
        with torch.device("meta"):
            model = cls(name, width, len(blocks), heads or width // 64, size(2, "patchify.weight") or 1,
                        size(1, *(f"blocks.{i}.fc2.weight" for i in blocks)) or 1, size(1, "positions") or 1,
                        common_size(state, 1, registers) or 1)
        try:
            load_official(model, state, "", lambda n: registers if n == "registers" else publish(n, prefix),
                          kind.unused)
        except UserError as err:
            raise UserError(f"these weights do not fit the encoder {name!r}: {err}; {looks}") from err
        if recognise(state) in KINDS and recognise(state) != name:
            raise UserError(f"these weights do not fit the encoder {name!r}, although their keys do: {looks}")
        return model.eval()


def main(argv):
    rows = []
    with torch.device("meta"):
        for name, kind in KINDS.items():
            model = ViT(name, *kind.size)
            rows.append([name, *kind.size, f"{sum(p.numel() for p in model.parameters()):,}"])
        summary(ViT("uni", *KINDS["uni"].size), torch.zeros(1, 3, 224, 224), depth=1)
    print("\n" + "".join(f"{x:>11}" for x in "encoder width depth heads patch hidden positions registers".split()),
          "    parameters")
    for row in rows:
        print("".join(f"{x:>11}" for x in row[:-1]), f"{row[-1]:>14}")
    model = ViT("dinov2_reg", 48, 2, 3, 14, 96, 82, 4)
    print("\ntiny forward on the CPU: image (2, 3, 70, 98) -> " + ", ".join(
        str(tuple(x.shape)) for x in model.tokens(torch.randn(2, 3, 70, 98))))


if __name__ == "__main__":
    cli(main)
