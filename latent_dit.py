"""A diffusion transformer in the latent space of an autoencoder: from one laptop to eight H100s with the same file.

    python latent_dit.py                              # drawn animal faces, a tokenizer of its own: no download, no GPU
    python latent_dit.py --data animal_faces --vae taesd       # photographs, in the latents of Stable Diffusion
    python latent_dit.py --resume out/latent_dit/ckpt.pt       # go on after Ctrl-C as if uninterrupted
    python latent_dit.py --sample 64 --ckpt out/latent_dit/model.safetensors --cfg_scale 2
    python latent_dit.py --data my_photos --size 256 --vae sd --model B --repa     # learn with DINOv2 as a teacher
    torchrun --nproc_per_node=8 latent_dit.py --preset xl8 --data data/imagenet/train
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 latent_dit.py --preset xl8 \\
        --data data/imagenet/train                             # the same on each of two nodes

Expected, first line: 566 s on two cores (shared AMD EPYC with bf16, torch 2.13.0), 149 s of them for the tokenizer and
the latents; loss 0.319, val_loss 0.403; 99 % of its faces are one species to a classifier (README.md). GPU: not
measured yet.
Writes out/latent_dit/: ckpt.pt, model.safetensors, log.jsonl, loss.png, samples/, reconstruction.png, forward.png,
guidance.png, reverse.gif, training.gif; with --sample generated/ and generated.png beside the --ckpt; latents and the
tokenizer that it trained in data/cache. A new run renames the first three of an old one to *.old, and replaces the
rest.

Here t = 0 is data and t = 1 noise, as in SD3 and FLUX; torchcfm and flow_matching write 1 - t for it and -v for v.
Papers: latent diffusion and its autoencoder 2112.10752, DiT and adaLN-Zero 2212.09748, flow matching 2210.02747,
logit-normal times and their shift 2403.03206 (SD3), rotary positions 2104.09864, SwiGLU 2002.05202, RMSNorm
1910.07467, QK-norm 2302.05442, representation alignment 2410.06940 (REPA), guidance 2207.12598 and its interval
2404.07724; LightningDiT, 2501.01423, puts most of these together.
"""
import argparse
import copy
import datetime
import functools
import hashlib
import http.client
import inspect
import itertools
import json
import math
import mmap
import os
import re
import signal
import struct
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from PIL import Image, ImageDraw, ImageOps
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# -----------------------------------------------------------------------------
# Knobs. A preset fills in what is not given by hand; --help shows the values of the one in force.

SIZES = {"tiny": (6, 192, 3), "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PRESETS = {  # SIZES: blocks, width, heads; all but tiny as in 2212.09748 table 1
    "cpu": dict(size=64, vae="tiny", vae_steps=3000, model="tiny", patch_size=1, steps=1600, batch_size=64, lr=1e-3,
                ema_decay=0.999, eval_every=400, sample_steps=50, cfg_scale=1.5, compile=False),
    "gpu": dict(data="animal_faces", size=256, vae="sd", vae_steps=10_000, model="B", patch_size=2, steps=100_000,
                batch_size=256, accum=2, lr=3e-4, ema_decay=0.9999, eval_every=5000, sample_steps=50, cfg_scale=2.0,
                compile=True),
    "xl8": dict(data="data/imagenet/train", size=256, vae="sd", vae_steps=10_000, model="XL", patch_size=2,
                steps=400_000, batch_size=256, lr=2e-4, ema_decay=0.9999, eval_every=10_000, sample_steps=50,
                cfg_scale=2.0, compile=True),
    "smoke": dict(out="out/smoke", size=32, vae="tiny", vae_steps=2, model="tiny", patch_size=1, steps=2, batch_size=16,
                  lr=1e-3, ema_decay=0.99, eval_every=1, sample_steps=4, cfg_scale=2.0, compile=False),
}
SAMPLERS = ["euler", "heun"]


def parse_args(argv=None):
    """The settings: flags given by hand, then the preset's. Wrong ones end the script with a sentence and status 2."""
    argv = sys.argv[1:] if argv is None else argv

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    class Parser(argparse.ArgumentParser):
        def error(self, sentence):  # argparse would print the whole usage first
            self.exit(2, f"{self.prog}: {sentence}; --help lists every flag\n")

    early = Parser(prog="latent_dit.py", add_help=False, allow_abbrev=False)  # the preset decides the other defaults
    early.add_argument("--preset")
    early.add_argument("--device", default="auto")
    early.add_argument("--smoke", action=argparse.BooleanOptionalAction)
    known = early.parse_known_args(argv)[0]
    preset = known.preset or ("gpu" if pick_device(known.device).type == "cuda" else "cpu")
    p = Parser(prog="latent_dit.py", description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction
    g = p.add_argument_group("data")
    g.add_argument("--data", metavar="drawn_faces|animal_faces|FOLDER|.zip|.npz", default="drawn_faces",
                   help="what to learn")
    g.add_argument("--size", type=int, help="pixels a side")
    g.add_argument("--flip", action=flag, default=True, help="mirror half of the training pictures")
    g.add_argument("--class_cond", action=flag, default=True, help="condition on the class: sub-folder or species")
    g = p.add_argument_group("tokenizer and model")
    g.add_argument("--vae", metavar="tiny|" + "|".join(VAES) + "|none|FILE|FOLDER",
                   help="the autoencoder in whose latents the model works; tiny is trained first, none is pixels")
    g.add_argument("--vae_steps", type=int, help="optimizer steps of --vae tiny")
    g.add_argument("--model", choices=list(SIZES), help="size of the transformer")
    g.add_argument("--patch_size", type=int, help="latents of a square of this side are one token")
    g.add_argument("--grad_checkpoint", action=flag, default=False,
                   help="compute activations a second time instead of keeping them: less memory, a third more work")
    g = p.add_argument_group("flow")
    g.add_argument("--time_shift", type=float, help="above 1: more of the times at high noise, in training and "
                   "sampling; default sqrt(numbers in a latent / 4096), at least 1")
    g.add_argument("--repa", type=float, nargs="?", const=0.5, default=0.0, metavar="WEIGHT",
                   help="weight of the agreement with what DINOv2 sees; 0 = off")
    g.add_argument("--repa_until", type=int, default=100_000, help="the step after which --repa ends")
    g = p.add_argument_group("training")
    g.add_argument("--preset", choices=["cpu", "gpu", "xl8"], default=preset,
                   help="sizes, settings; by device unless given")
    g.add_argument("--steps", type=int, help="optimizer steps")
    g.add_argument("--batch_size", type=int, help="training examples per step, on all devices together")
    g.add_argument("--accum", type=int, default=1, help="parts that each batch is split into, to save memory")
    g.add_argument("--lr", type=float, help="peak learning rate of AdamW")
    g.add_argument("--ema_decay", type=float, help="decay of the averaged weights, the ones that are sampled from")
    g.add_argument("--eval_every", type=int, help="steps from one validation, sample grid and checkpoint to the next")
    g.add_argument("--resume", metavar="FILE", help="continue the training run of this ckpt.pt")
    g = p.add_argument_group("sampling")
    g.add_argument("--sample", type=int, metavar="N", help="train nothing, draw N samples")
    g.add_argument("--ckpt", metavar="FILE", help="the model.safetensors to sample from")
    g.add_argument("--label", metavar="CLASS", help="draw this class alone, its name or number; else all in turn")
    g.add_argument("--sampler", choices=SAMPLERS, default="euler", help="how noise becomes data")
    g.add_argument("--sample_steps", type=int, help="steps from noise to data")
    g.add_argument("--cfg_scale", type=float, help="strength of classifier-free guidance; 1 = off")
    g.add_argument("--cfg_interval", type=float, nargs=2, default=[0.0, 1.0], metavar="T",
                   help="guide only from this t to that; 0 is data, 1 noise")
    g = p.add_argument_group("output and system")
    g.add_argument("--out", default="out/latent_dit", help="folder for everything that a run writes")
    g.add_argument("--seed", type=int, default=0, help="seed of all randomness")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    g.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto",
                   help="arithmetic of the network; what is trained is always fp32")
    g.add_argument("--compile", action=flag, help="torch.compile the network")
    g.add_argument("--smoke", action=flag, default=False, help="two steps of a tiny model, then reload it and sample")
    p.set_defaults(**PRESETS["smoke" if known.smoke else preset if preset in PRESETS else "cpu"])
    args = p.parse_args(argv)
    args.given = {a.dest for a in p._actions for o in a.option_strings for w in argv if w == o or w.startswith(o + "=")}
    check(args, p.error)
    return args


def check(args, error):
    """Calls error(sentence) for settings that cannot be, given by hand or found in a checkpoint."""
    for name in "size patch_size vae_steps steps batch_size accum eval_every sample_steps sample repa_until".split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            error(f"--{name} has to be at least 1")
    for name in "lr ema_decay cfg_scale repa seed".split():
        top = 1 if name == "ema_decay" else 2 ** 63
        if not 0 <= getattr(args, name) <= top:
            error(f"--{name} has to lie between 0 and {'1' if top == 1 else '2^63'}")
    if args.time_shift is not None and not 0.01 <= args.time_shift <= 100:
        error("--time_shift has to lie between 0.01 and 100")
    if len(args.cfg_interval) != 2 or not 0 <= args.cfg_interval[0] <= args.cfg_interval[1] <= 1:
        error("--cfg_interval takes two times, 0 <= first <= second <= 1")
    if Path(args.out).is_file():
        error(f"--out {args.out} is a file; it has to be a folder, or nothing yet")
    out = Path(args.out).resolve()
    if Path(args.data).is_dir() and Path(args.data).resolve() in (out, *out.parents):
        error(f"--out {args.out} lies in --data {args.data}: its pictures would be learnt the next time")
    if bool(args.sample) != bool(args.ckpt) or args.sample and args.resume:
        error("--sample N and --ckpt FILE go together; to go on training use --resume")
    for name in ("data flip steps batch_size accum lr ema_decay eval_every compile vae_steps repa repa_until "
                 "grad_checkpoint").split():
        if args.sample and name in args.given:
            error(f"--{name} is for training" + ("; for drawing say --sample_steps" if name == "steps" else ""))
    if args.label is not None and not args.sample:
        error("--label goes with --sample")
    told = args.resume or args.ckpt  # what is not given by hand is taken from there
    if "cfg_interval" in args.given and args.cfg_scale == 1 and not told:
        error("--cfg_interval without --cfg_scale changes nothing")
    if "vae_steps" in args.given and args.vae != "tiny" and not told:
        error("--vae_steps is for --vae tiny alone")
    if "repa_until" in args.given and not args.repa and not told:
        error("--repa_until is for --repa alone")
    for name, choices in (("model", SIZES), ("sampler", SAMPLERS)):
        if getattr(args, name) not in choices:
            error(f"--{name} is one of {', '.join(choices)}")


# -----------------------------------------------------------------------------
# The method: flow matching, as in cfm_images.py, on latents. z0 is what the tokenizer makes of a picture, with mean 0
# and variance 1, eps Gaussian noise, t in [0, 1] how far it is from the first to the second. A model is any
# (zt, t, y) -> velocity, shaped like zt.


def path(x0, eps, t):
    """Where the pair x0, eps (B, C, H, W) is at time t (B, 1, 1, 1), and its velocity there: 2209.03003 eq. 1."""
    return (1 - t) * x0 + t * eps, eps - x0


def logit_normal(shape, shift, generator):
    """Training times in (0, 1): sigmoid of a normal number, 2403.03206 eq. 19, so that most are in the middle, where
    there is most to learn; shift > 1 moves them to more noise, as time_grid() does."""
    t = torch.sigmoid(torch.randn(shape, generator=generator))
    return shift * t / (1 + (shift - 1) * t)


def natural_shift(dim):
    """The shift for latents of dim = C h w numbers. More of them tell more of the picture at an equal t, so that more
    noise is needed to hide it: 2403.03206 eq. 23, sqrt(m / n), with the 4 x 32 x 32 of Stable Diffusion at 256 pixels,
    for which 1 is right, as n (2510.11690). Never below 1: the times next to noise would hardly be trained, and
    sampling begins there."""
    return max(1.0, math.sqrt(dim / 4096))


def loss_fn(model, x0, eps, t, y=None):
    """Squared error of the velocity, 2210.02747 eq. 9: x0, eps (B, C, H, W), t (B,), labels y (B,) -> (B,)."""
    xt, v = path(x0, eps, t.view(-1, 1, 1, 1))
    return (model(xt, t, y) - v).square().mean((1, 2, 3))


def time_grid(steps, shift):
    """steps + 1 times from 1 to 0; shift > 1 puts more of them where there is much noise (2403.03206 eq. 23)."""
    t = np.linspace(1, 0, steps + 1)
    return (shift * t / (1 + (shift - 1) * t)).tolist()


@torch.no_grad()
def sample(model, z, sampler, times, on_step=None):
    """Latents z (B, C, h, w) carried from times[0] to times[-1] by Euler's method, or by Heun's, which takes the mean
    of the velocities at both ends of a step. on_step(t, zt, v) is called before a step."""
    for t, s in zip(times, times[1:]):
        v = model(z, torch.full((len(z),), t, device=z.device)).float()
        if on_step:
            on_step(t, z, v)
        if sampler == "heun":
            v = (v + model(z + (s - t) * v, torch.full((len(z),), s, device=z.device)).float()) / 2
        z = z + (s - t) * v
    return z


def guided(model, y, cfg_scale, interval):
    """model with labels y (or None) as (xt, t) -> v. cfg_scale is 1 + w of 2207.12598; outside the interval of t, where
    guidance does harm or nothing (2404.07724), it is 1, for half the price."""
    def call(xt, t):
        if y is None or cfg_scale == 1 or not interval[0] - 1e-6 <= t[0].item() <= interval[1] + 1e-6:
            return model(xt, t, y)
        labels = torch.cat([y, torch.full_like(y, model.y_null)])
        out = model(torch.cat([xt, xt]), torch.cat([t, t]), labels).to(xt.dtype)  # bf16 is too coarse for a difference
        with_y, without = out.chunk(2)
        return without + cfg_scale * (with_y - without)
    return call


# -----------------------------------------------------------------------------
# The model: a transformer on patches of latents. B images, N tokens, width D, d channels per head.


def rope(H, W, d, device, scale=1.0):
    """2-D rotary positions, 2104.09864 on two axes: cosines and sines (H W, d / 2) of the angles by which the channels
    of q and k turn, the first half of them by the row of a token, the other by its column. Their product q . k then
    depends on how far two tokens are apart, and not on where they stand. Positions are multiplied by scale, (side of
    the grid in training) / (side now): distances never seen are not understood (2306.15595)."""
    freq = 100.0 ** -(torch.arange(d // 4, device=device) / (d // 4))  # 100: more waves vary on grids of 8 to 64
    rows, columns = (scale * torch.arange(n, device=device)[:, None] * freq for n in (H, W))
    angle = torch.cat([rows.repeat_interleave(W, 0), columns.repeat(H, 1)], 1)
    return angle.cos(), angle.sin()


def rotate(x, positions):
    """x (B, heads, N, d): its halves are taken as real and imaginary part, and turned by the angles of rope()."""
    cos, sin = positions
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def waves(t, width):
    """Sinusoidal features of times t (B,) in 0..T-1, (B, width), 1706.03762 section 3.5."""
    freq = torch.exp(-math.log(10_000) / (width // 2) * torch.arange(width // 2, device=t.device))
    angle = t[:, None] * freq
    return torch.cat([angle.cos(), angle.sin()], 1)


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v of (B, heads, N, d). Among few tokens a CPU is 1.4 times as fast with the plain
    products as with its fused kernel, whose backward is slow; among many they would fill the memory."""
    if q.device.type == "cpu" and q.shape[2] <= 256:
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class SelfAttention(nn.Module):
    """Multi-head attention among all tokens. q and k are normed, so that their products cannot grow (2302.05442), and
    turned."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.norm_q, self.norm_k = nn.RMSNorm(D // heads, eps=1e-6), nn.RMSNorm(D // heads, eps=1e-6)

    def forward(self, x, positions):                                             # (B, N, D)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)       # (B, heads, N, d) each
        q, k = (rotate(norm(a.to(norm.weight.dtype)), positions).to(v.dtype)     # not in bf16
                for norm, a in ((self.norm_q, q), (self.norm_k, k)))
        h = attend(q, k, v)                                                      # (B, heads, N, d)
        return self.proj(h.transpose(1, 2).flatten(2))                           # (B, N, D)


class SwiGLU(nn.Module):
    """MLP with a gate, 2002.05202. Two thirds of the usual 4 D wide, so that it has as many weights."""

    def __init__(self, D):
        super().__init__()
        hidden = -(-8 * D // 3 // 64) * 64
        self.gate_up, self.down = nn.Linear(D, 2 * hidden), nn.Linear(hidden, D)

    def forward(self, x):                                                        # (B, N, D)
        gate, up = self.gate_up(x).chunk(2, -1)                                  # (B, N, 8/3 D) each
        return self.down(F.silu(gate) * up)                                      # (B, N, D)


class DiTBlock(nn.Module):
    """adaLN-Zero, 2212.09748 section 3.2: x + gate * f(norm(x) * (1 + scale) + shift), with f = attention, then MLP.
    Time and class set shift, scale and gate; all are 0 at the start, so that each block begins as the identity."""

    def __init__(self, D, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(D, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp, self.adaLN = SelfAttention(D, heads), SwiGLU(D), nn.Linear(D, 6 * D)
        nn.init.zeros_(self.adaLN.weight)
        nn.init.zeros_(self.adaLN.bias)

    def forward(self, x, emb, positions):                                        # (B, N, D), (B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN(emb)[:, None].chunk(6, -1)    # (B, 1, D) each
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, positions)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)       # (B, N, D)


class DiT(nn.Module):
    """(zt, t, y) -> velocity. zt (B, C, H, W), t (B,) in [0, 1], y (B,) labels or None; H and W multiples of patch.
    A token is a patch of latents. With align=True also what --repa compares, (B, N, repa_dim).
    differs from the paper: PyTorch's own start of linear layers, not Xavier's.

    z_mean, z_std (C, 1, 1): of the tokenizer's latents, by which these are brought to mean 0 and variance 1."""

    def __init__(self, C, patch, size, n_classes, grad_checkpoint=False, repa_dim=0):
        super().__init__()
        depth, D, self.heads = SIZES[size]
        self.patch, self.y_null, self.grad_checkpoint = patch, n_classes, grad_checkpoint
        self.grid = None                                                         # tokens a side in training, if other
        self.embed = nn.Conv2d(C, D, patch, patch)
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Embedding(n_classes + 1, D) if n_classes else None       # the last means "no label"
        self.blocks = nn.ModuleList([DiTBlock(D, self.heads) for _ in range(depth)])
        self.norm, self.adaLN = nn.RMSNorm(D, eps=1e-6, elementwise_affine=False), nn.Linear(D, 2 * D)
        self.out = nn.Linear(D, patch * patch * C)
        for zero in (self.adaLN, self.out):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)
        for module in self.time[0], self.time[2]:
            nn.init.normal_(module.weight, std=0.02)
        if n_classes:
            nn.init.normal_(self.label.weight, std=0.02)
        self.repa = nn.Sequential(nn.Linear(D, 2048), nn.SiLU(), nn.Linear(2048, 2048), nn.SiLU(),
                                  nn.Linear(2048, repa_dim)) if repa_dim else None
        self.register_buffer("z_mean", torch.zeros(C, 1, 1))
        self.register_buffer("z_std", torch.ones(C, 1, 1))

    def forward(self, zt, t, y=None, align=False):                               # (B, C, H, W), (B,), (B,)
        x = self.embed(zt).to(self.out.weight.dtype)  # under autocast, too: bf16 would lose what blocks add
        H, W = x.shape[2:]                                                       # (B, D, H / patch, W / patch)
        positions = rope(H, W, x.shape[1] // self.heads, x.device, (self.grid or max(H, W)) / max(H, W))
        x = x.flatten(2).transpose(1, 2)                                         # (B, N, D)
        emb = self.time(waves(1000 * t, 256).to(self.out.weight.dtype))          # (B, D); waves wants 0..1000
        if self.label is not None:
            emb = emb + self.label(torch.full(t.shape, self.y_null, device=t.device) if y is None else y)
        emb, h_proj = F.silu(emb), None
        for i, block in enumerate(self.blocks):
            if self.grad_checkpoint and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, emb, positions, use_reentrant=False)
            else:
                x = block(x, emb, positions)                                     # (B, N, D)
            if align and i + 1 == min(8, -(-len(self.blocks) // 3)):  # 2410.06940 table 2: B 4, L and XL 8
                h_proj = self.repa(x)                                            # (B, N, repa_dim)
        shift, scale = self.adaLN(emb)[:, None].chunk(2, -1)
        x = self.out(self.norm(x) * (1 + scale) + shift)                         # (B, N, C patch^2)
        v = F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (H, W)), self.patch)  # (B, C, H, W)
        return (v, h_proj) if align else v

    def flops(self, H, W):
        """Floating-point operations of one image's forward pass, 2 per multiply-add, attention included."""
        N, D = (H // self.patch) * (W // self.patch), self.out.in_features
        linear = [m for m in self.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        once = [self.adaLN, *self.time, *(block.adaLN for block in self.blocks)]  # once an image, not a token
        weights = sum(m.weight.numel() * (1 if any(m is o for o in once) else N) for m in linear)
        return 2 * (weights + len(self.blocks) * 2 * N * N * D)                  # q k^T, and the mean of v


# -----------------------------------------------------------------------------
# Tokenizers, as the field calls an autoencoder whose latents a transformer works on (text has nothing to do with it):
# pictures (B, 3, H, W) in [-1, 1] -> encode(x) -> latents (B, channels, H / factor, W / factor) -> decode(z) ->
# pictures. Each is read from raw safetensors; the names of the weights are those of the files.


class KLResBlock(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, c_in, 1e-6), nn.GroupNorm(groups, c_out, 1e-6)
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):                                                        # (B, c_in, H, W)
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))    # (B, c_out, H, W)
        return self.conv_shortcut(x) + h


class KLAttention(nn.Module):
    """Attention among all positions, with one head."""

    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, 1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(c, c) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):                                                        # (B, c, H, W)
        h = self.group_norm(x).flatten(2).transpose(1, 2)                        # (B, H W, c)
        h = F.scaled_dot_product_attention(*(w(h)[:, None] for w in (self.to_q, self.to_k, self.to_v)))[:, 0]
        return x + self.to_out[0](h).transpose(1, 2).view_as(x)


class AutoencoderKL(nn.Module):
    """The autoencoder of latent diffusion, 2112.10752: Stable Diffusion's, SDXL's and FLUX's. Latents are the mean of
    the posterior (its deviation is tiny), shifted and scaled as these models take them; encode_data() norms them once
    more, per channel. tensors tell the sizes."""

    def __init__(self, tensors, scale=0.18215, shift=0.0, groups=32):
        super().__init__()
        first = "encoder.down_blocks.{}.resnets.{}.conv1.weight"
        n = next(i for i in range(99) if first.format(i, 0) not in tensors)      # resolutions
        each = next(j for j in range(99) if first.format(0, j) not in tensors)   # blocks in each
        widths = [tensors[first.format(i, 0)].shape[0] for i in range(n)]
        self.channels, self.factor = tensors["decoder.conv_in.weight"].shape[1], 2 ** (n - 1)
        self.scale, self.shift, top = scale, shift, widths[-1]

        def stage(c_in, c_out, blocks, **ends):
            resnets = [KLResBlock(c_out if j else c_in, c_out, groups) for j in range(blocks)]
            ends = {name: nn.ModuleList([module]) for name, module in ends.items() if module}
            return nn.ModuleDict(dict(resnets=nn.ModuleList(resnets), **ends))

        def coder(c_in, c_first, c_last, c_out, **stages):
            return nn.ModuleDict(dict(conv_in=nn.Conv2d(c_in, c_first, 3, padding=1), **stages,
                                      mid_block=stage(top, top, 2, attentions=KLAttention(top, groups)),
                                      conv_norm_out=nn.GroupNorm(groups, c_last, 1e-6),
                                      conv_out=nn.Conv2d(c_last, c_out, 3, padding=1)))
        down, up = nn.ModuleList(), nn.ModuleList()
        for i, c in enumerate(widths):
            conv = nn.ModuleDict(dict(conv=nn.Conv2d(c, c, 3, 2))) if i < n - 1 else None
            down.append(stage(widths[max(i - 1, 0)], c, each, downsamplers=conv))
        for i, c in reversed(list(enumerate(widths))):
            conv = nn.ModuleDict(dict(conv=nn.Conv2d(c, c, 3, padding=1))) if i > 0 else None
            up.append(stage(widths[min(i + 1, n - 1)], c, each + 1, upsamplers=conv))
        self.encoder = coder(3, widths[0], top, 2 * self.channels, down_blocks=down)
        self.decoder = coder(self.channels, top, widths[0], 3, up_blocks=up)
        whole = "quant_conv.weight" in tensors  # 1 x 1, left over from a quantised autoencoder; FLUX's has none
        self.quant_conv = nn.Conv2d(2 * self.channels, 2 * self.channels, 1) if whole else nn.Identity()
        self.post_quant_conv = nn.Conv2d(self.channels, self.channels, 1) if whole else nn.Identity()
        load_weights(self, tensors, "the file")

    def extra_repr(self):  # for fingerprint()
        return f"scale={self.scale}, shift={self.shift}"

    def middle(self, h, block):
        return block["resnets"][1](block["attentions"][0](block["resnets"][0](h)))

    def encode(self, x):                                                         # (B, 3, H, W)
        h = self.encoder["conv_in"](x)
        for stage in self.encoder["down_blocks"]:
            for block in stage["resnets"]:
                h = block(h)
            if "downsamplers" in stage:
                h = stage["downsamplers"][0]["conv"](F.pad(h, (0, 1, 0, 1)))     # half the side
        h = F.silu(self.encoder["conv_norm_out"](self.middle(h, self.encoder["mid_block"])))
        mean, _ = self.quant_conv(self.encoder["conv_out"](h)).chunk(2, 1)       # (B, channels, H / f, W / f) each
        return (mean - self.shift) * self.scale

    def decode(self, z):                                                         # (B, channels, H / f, W / f)
        h = self.decoder["conv_in"](self.post_quant_conv(z / self.scale + self.shift))
        h = self.middle(h, self.decoder["mid_block"])
        for stage in self.decoder["up_blocks"]:
            for block in stage["resnets"]:
                h = block(h)
            if "upsamplers" in stage:
                h = stage["upsamplers"][0]["conv"](F.interpolate(h, scale_factor=2.0))       # twice the side
        return self.decoder["conv_out"](F.silu(self.decoder["conv_norm_out"](h)))            # (B, 3, H, W)


class TAESDBlock(nn.Module):
    """Three convolutions and a way around them."""

    def __init__(self):
        super().__init__()
        convs = [nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x):                                                        # (B, 64, H, W)
        return F.relu(x + self.conv(x))


class TAESD(nn.Module):
    """The tiny autoencoders of madebyollin: TAESD for the latents of Stable Diffusion, TAEF1 for FLUX's. They imitate
    the latents of the large ones, for a small part of the work."""
    factor = 8

    def __init__(self, tensors):
        super().__init__()
        self.channels = c = tensors["encoder.14.bias"].shape[0]
        encoder, decoder = [nn.Conv2d(3, 64, 3, padding=1), TAESDBlock()], []
        for _ in range(3):
            encoder += [nn.Conv2d(64, 64, 3, 2, 1, bias=False), *(TAESDBlock() for _ in range(3))]
            decoder += [*(TAESDBlock() for _ in range(3)), nn.Upsample(scale_factor=2.0),
                        nn.Conv2d(64, 64, 3, padding=1, bias=False)]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(64, c, 3, padding=1))
        self.decoder = nn.Sequential(nn.Identity(), nn.Conv2d(c, 64, 3, padding=1), nn.ReLU(), *decoder, TAESDBlock(),
                                     nn.Conv2d(64, 3, 3, padding=1))
        load_weights(self, tensors, "the file")

    def encode(self, x):                                                         # (B, 3, H, W)
        return self.encoder(x / 2 + 0.5)                                         # (B, channels, H / 8, W / 8)

    def decode(self, z):                                                         # (B, channels, H / 8, W / 8)
        return self.decoder(torch.tanh(z / 3) * 3) * 2 - 1                       # a soft clamp; (B, 3, H, W)


class Cosmos(nn.Module):
    """NVIDIA's continuous image tokenizers: two TorchScript files, which bring their own code."""

    def __init__(self, files):
        super().__init__()
        self.encoder, self.decoder = (torch.jit.load(file, "cpu") for file in files)
        with torch.no_grad():
            z = self.encode(torch.zeros(1, 3, 64, 64))
        self.channels, self.factor = z.shape[1], 64 // z.shape[2]

    def run(self, coder, x):
        dtype = next((p.dtype for p in coder.parameters()), x.dtype)             # bfloat16
        out = coder(x.to(dtype))
        return (out[0] if isinstance(out, (tuple, list)) else out).to(x.dtype)

    def encode(self, x):                                                         # (B, 3, H, W)
        return self.run(self.encoder, x)                                         # (B, 16, H / f, W / f)

    def decode(self, z):
        return self.run(self.decoder, z)                                         # (B, 3, H, W)


class TinyBlock(nn.Module):
    """Begins as the identity, which is sooner trained."""

    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, c), nn.GroupNorm(8, c)
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x):                                                        # (B, c, H, W)
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class TinyVAE(nn.Module):
    """A small KL autoencoder that the script trains itself, where none can be downloaded. Its first layers see patches
    of 4 x 4 pixels, because full resolution costs most."""
    channels, factor = 8, 8

    def __init__(self):
        super().__init__()
        z, c, C = self.channels, 64, 128
        self.encoder = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, c, 3, padding=1), TinyBlock(c),
                                     nn.Conv2d(c, C, 3, 2, 1), TinyBlock(C), TinyBlock(C),
                                     nn.GroupNorm(8, C), nn.SiLU(), nn.Conv2d(C, 2 * z, 1))
        self.decoder = nn.Sequential(nn.Conv2d(z, C, 1), TinyBlock(C), TinyBlock(C), nn.Upsample(scale_factor=2.0),
                                     nn.Conv2d(C, c, 3, padding=1), TinyBlock(c), TinyBlock(c),
                                     nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, 48, 3, padding=1), nn.PixelShuffle(4))

    def loss(self, x, noise, kl_weight=1e-4):
        """2112.10752 appendix G, without a discriminator: x (B, 3, H, W), noise like the latents -> loss. The KL term
        holds latents near N(0, 1); more of it would blur."""
        mean, log_var = self.encoder(x).chunk(2, 1)
        log_var = log_var.clamp(-12, 4)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var)
        out = self.decoder(mean + (0.5 * log_var).exp() * noise)
        return (out - x).abs().mean() + (out - x).square().mean() + kl_weight * kl.mean()

    def encode(self, x):                                                         # (B, 3, H, W)
        return self.encoder(x).chunk(2, 1)[0]                                    # (B, 8, H / 8, W / 8)

    def decode(self, z):
        return self.decoder(z)                                                   # (B, 3, H, W)


class Pixels(nn.Module):
    """--vae none: the pictures themselves."""
    channels, factor = 3, 1

    def encode(self, x):
        return x

    def decode(self, z):
        return z


# -----------------------------------------------------------------------------
# What --repa learns from.

TEACHER = "facebook/dinov2-base"  # of 2410.06940 table 2


class ViTBlock(nn.Module):
    """A transformer block: attention, then an MLP, each scaled by a learnt vector."""

    def __init__(self, D):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        self.query, self.key, self.value, self.proj = (nn.Linear(D, D) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))

    def forward(self, x):                                                        # (B, N, D)
        h = self.norm1(x)
        q, k, v = (w(h).unflatten(-1, (-1, 64)).transpose(1, 2) for w in (self.query, self.key, self.value))
        h = F.scaled_dot_product_attention(q, k, v)                              # (B, D / 64 heads, N, 64)
        x = x + self.scale1 * self.proj(h.transpose(1, 2).flatten(2))
        return x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))       # (B, N, D)


class DINOv2(nn.Module):
    """The vision transformer of 2304.07193, small, base or large: x (B, 3, 224, 224) -> its class token (B, D), as
    FD-DINOv2 (2306.04675) takes it. tensors: a Hugging Face weight file, which also tells the sizes."""
    side, dim_spatial = 224, 0
    NAMES = {"embeddings.patch_embeddings.projection": "patch", "embeddings.": "", "encoder.layer.": "blocks.",
             "attention.attention.": "", "attention.output.dense": "proj", "mlp.": "", "layer_scale1.lambda1": "scale1",
             "layer_scale2.lambda1": "scale2", "layernorm": "norm"}

    def __init__(self, tensors):
        super().__init__()
        D, _, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
        depth = len({k.split(".")[2] for k in tensors if k.startswith("encoder.layer.")})
        self.dim, self.patch = D, nn.Conv2d(3, D, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.position_embeddings = nn.Parameter(torch.zeros_like(tensors["embeddings.position_embeddings"]))
        self.blocks = nn.ModuleList([ViTBlock(D) for _ in range(depth)])
        self.norm = nn.LayerNorm(D, eps=1e-6)

    def translate(self, tensors):
        """tensors with the names of this class."""
        def ours(name):
            for theirs, our in self.NAMES.items():
                name = name.replace(theirs, our)
            return name
        return {ours(k): v for k, v in tensors.items() if k != "embeddings.mask_token"}

    def normalise(self, x, mode):                                                # [0, 255]
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=x.device)[..., None, None]
        return (x / 255 - mean) / std

    def tokens(self, x):                                                         # (B, 3, 224, 224)
        h = self.patch(x)                                                        # (B, D, 16, 16)
        first, rest = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        side = math.isqrt(rest.shape[1])                                         # 37, learnt at 518 pixels
        rest = rest.transpose(1, 2).unflatten(2, (side, side))                   # (1, D, 37, 37)
        if rest.shape[2:] != h.shape[2:]:  # 0.1 more, as the authors have it, who met a rounding error of PyTorch so
            rest = F.interpolate(rest, scale_factor=[(n + 0.1) / side for n in h.shape[2:]], mode="bicubic")
        h = (h + rest).flatten(2).transpose(1, 2)                                # (B, 256, D)
        h = torch.cat([(self.cls_token + first).expand(len(h), -1, -1), h], 1)   # (B, 257, D)
        for block in self.blocks:
            h = block(h)                                                         # (B, 257, D)
        return self.norm(h)

    def forward(self, x):                                                        # (B, 3, 224, 224)
        return self.tokens(x)[:, 0], None, None                                  # (B, D)


class Teacher(nn.Module):
    """What --repa learns from: DINOv2's view of pictures (B, 3, H, W) in [-1, 1] -> (B, N, dim), on the grid of N
    tokens."""

    def __init__(self, rank, world):
        super().__init__()
        paths = on_each_node(functools.partial(hub_file, TEACHER, "model.safetensors"), rank, world)
        path = paths[int(os.environ.get("GROUP_RANK", 0))]  # the one of this node
        tensors = load_safetensors(path)[0]
        self.net = DINOv2(tensors)
        load_weights(self.net, self.net.translate(tensors), path)
        self.dim = self.net.dim

    @torch.no_grad()
    def forward(self, x, N):
        x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True)
        tokens = self.net.tokens(self.net.normalise(x * 127.5 + 127.5, "clean"))[:, 1:]      # (B, 256, dim)
        side, grid = math.isqrt(N), tokens.transpose(1, 2).unflatten(2, (16, 16))
        return (grid if side == 16 else F.interpolate(grid, (side, side), mode="bilinear")).flatten(2).transpose(1, 2)


# -----------------------------------------------------------------------------
# Data: whatever --data names becomes one memory-mapped uint8 array, read once, in parallel, and kept in data/cache.

DRAWN_FACES = 16_000  # size of the drawn set; the drawing never ends, but epochs and a held-out part need an end
PICTURE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
ANIMAL_FACES_URL = "https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1"  # where StarGAN v2's download.sh gets it
FURS = {"gray": (138, 146, 160), "brown": (136, 86, 54), "orange": (240, 132, 44), "white": (240, 238, 242),
        "black": (56, 54, 64), "cream": (240, 210, 166)}
EYES = {"green": (70, 200, 84), "blue": (52, 148, 255), "amber": (255, 186, 32), "violet": (186, 88, 232)}
BACKGROUNDS = {"blue": (104, 172, 248), "green": (112, 204, 124), "pink": (255, 146, 190), "yellow": (255, 212, 52),
               "purple": (160, 122, 232), "teal": (44, 178, 184)}
TRAITS = {  # a face is a list of blobs (colour, x, y, rx, ry, tilt=0, tip=0): lengths in half-pictures from the middle
    # of the head, y down, tilt in degrees clockwise; tip 0 is an ellipse, 1 a drop that points up. x > 0 means one on
    # each side. Of ear, head and muzzle the colour is known. back lies beneath the head, front upon it; drop moves the
    # whole face down.
    "cat": dict(drop=.12, ear=(.43, -.56, .42, .42, 24, 1.2), head=(.72, .60), muzzle=(.14, .27, .18, .14), nose=.08,
                front=[("mark", 0, -.46, .05, .16, 180, 1), ("mark", .15, -.44, .05, .13, 188, 1),
                       ("white", .56, .20, .012, .22, 82), ("white", .56, .31, .012, .22, 96)]),
    "dog": dict(drop=.02, head=(.62, .66), muzzle=(.16, .30, .22, .20), nose=.14,
                front=[("mark", .62, -.04, .24, .46, -16, .4), ("pink", 0, .56, .11, .15)]),
    "fox": dict(drop=.12, ear=(.46, -.56, .46, .50, 20, 1.2), head=(.98, .66, 180, .8), muzzle=(.07, .38, .12, .12),
                nose=.10, front=[("light", .44, .24, .34, .40, 112, 1)]),
    "bear": dict(drop=.06, ear=(.52, -.48, .24, .24), head=(.74, .66), muzzle=(.12, .28, .22, .19), nose=.14),
    "rabbit": dict(drop=.36, ear=(.27, -.78, .19, .50, 10), head=(.64, .54), muzzle=(.12, .22, .16, .13), nose=.07,
                   front=[("white", .045, .37, .045, .08)]),
    "lion": dict(drop=.02, ear=(.46, -.44, .18, .18), head=(.60, .57), muzzle=(.13, .26, .17, .15), nose=.13,
                 back=[("mark", .65 * np.sin(a), .65 * np.cos(a), .26, .26) for a in np.linspace(0, np.pi, 8)]),
    "tiger": dict(drop=.08, ear=(.54, -.46, .21, .21), head=(.76, .64), muzzle=(.16, .27, .21, .18), nose=.12,
                  front=[("mark", 0, -.45, .07, .19, 180, 1), ("mark", .20, -.44, .07, .16, 190, 1),
                         ("mark", .57, -.02, .09, .16, 258, 1), ("mark", .55, .18, .09, .16, 280, 1)]),
    "mouse": dict(drop=.18, ear=(.58, -.46, .40, .40), head=(.72, .60, 180, .35), muzzle=(.08, .33, .13, .11), nose=.08,
                  front=[("white", .46, .30, .012, .22, 80), ("white", .46, .39, .012, .22, 94)])}
SPECIES = tuple(TRAITS)


def draw_face(seed, index, size):
    """One animal face -> picture (size, size, 3) uint8, label (its place in SPECIES), caption.

    Species, fur, eyes and background are uniform and independent; position, zoom, tilt, head width, ears, eyes, gaze
    and light vary a little. All come from (seed, index) alone: another size is the same picture, only sharper."""
    rng = np.random.default_rng((seed, index))
    species, fur, eye, ground = (list(t)[rng.integers(len(t))] for t in (SPECIES, FURS, EYES, BACKGROUNDS))
    dx, dy, zoom, turn, wide, ear_size, perk, eye_size, apart, gaze, lamp_x, lamp_y = rng.uniform(-1, 1, 12).tolist()
    trait, base, ink, white, pink = TRAITS[species], FURS[fur], (44, 32, 44), (255, 255, 255), (246, 132, 150)

    def blend(a, b, k):
        return tuple(round(u + (v - u) * k) for u, v in zip(a, b))
    # stripes, mane and shade are darker than the fur, but paler than black fur, so that they are always seen
    shade, k = (white, .5) if fur == "black" else ((66, 34, 48), 1)
    colour = {"fur": base, "dark": blend(base, shade, .28 * k), "mark": blend(base, shade, .52 * k),
              "light": blend(base, white, .3 + .3 * k), "inner": blend(base, pink, .7), "blush": blend(base, pink, .4),
              "halo": blend(BACKGROUNDS[ground], white, .25), "eye": EYES[eye], "ink": ink, "white": white,
              "pink": pink}
    # back to front: halo, body, ears, head, cheeks, what marks the species, mouth, muzzle, nose, eyes
    parts = [("halo", 0, 0, .88, .88), ("dark", 0, 1.1, .55, .5), ("light", 0, 1, .26, .4), *trait.get("back", ())]
    if "ear" in trait:
        x, y, rx, ry, tilt, tip = (*trait["ear"], 0, 0)[:6]
        rx, ry, tilt = rx * (1 + .1 * ear_size), ry * (1 + .1 * ear_size), tilt + 6 * perk
        parts += [("dark", x, y, rx, ry, tilt, tip), ("inner", x, y + .12 * ry, .62 * rx, .68 * ry, tilt, tip)]
    rx, ry, *tip = trait["head"]
    x, y, mx, my = trait["muzzle"]
    nose, r, ex, ey = trait["nose"], .155 + .012 * eye_size, .30 + .02 * apart, -.06
    parts += [("dark", 0, .02, rx, ry, *tip), ("fur", 0, -.015, .98 * rx, .97 * ry, *tip), ("blush", .45, .2, .12, .08),
              *trait.get("front", ()), ("ink", 0, y + .7 * my, .7 * mx, .6 * my), ("light", x, y, mx, my),
              ("light", 0, y - .02, x, .7 * my), ("ink", 0, y + .1 * my, .014, .7 * my),
              ("ink", 0, y - .5 * my, nose, .75 * nose, 180, .3),
              ("light", 0, y - .5 * my - .35 * nose, .4 * nose, .15 * nose),
              ("ink", ex, ey, r, 1.1 * r), ("eye", ex, ey, .84 * r, .94 * r)]
    parts = [(c, s * x, y, rx, ry, s * tilt, tip) for c, x, y, rx, ry, tilt, tip in ((*p, 0, 0)[:7] for p in parts)
             for s in ((-1, 1) if x > 0 else (1,))]
    for x in (-ex, ex):  # not mirrored: both pupils look the same way, both catch-lights show the same lamp
        parts += [("ink", x + .025 * gaze, ey, .44 * r, .56 * r, 0, 0), ("white", x - .05, ey - .06, .04, .04, 0, 0),
                  ("white", x + .05, ey + .07, .02, .02, 0, 0)]

    # all outlines at once, x + iy as complex numbers, so that to turn is to multiply                 (parts, 72 points)
    x, y, rx, ry, tilt, tip = np.array([p[1:] for p in parts]).T[..., None]
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    z = x + 1j * y + (rx * np.sin(t) * np.sin(t / 2) ** tip - 1j * ry * np.cos(t)) * np.exp(1j * np.radians(tilt))
    middle = .05 * dx + 1j * (trait["drop"] + .04 * dy)
    z = (z + .05 * wide * z.real) * (.96 + .05 * zoom) * np.exp(1j * np.radians(7 * turn)) + middle
    fine = size * (4 if size <= 128 else 2)  # drawn larger, then averaged down: Pillow's polygons have hard edges
    image = Image.new("RGB", (fine, fine), BACKGROUNDS[ground])
    draw = ImageDraw.Draw(image)
    for part, outline in zip(parts, ((z.view(float) + 1) * fine / 2 - .5).tolist()):  # pixel centres are at i + 1/2
        draw.polygon(outline, fill=colour[part[0]])

    y, x = (np.mgrid[:size, :size].astype(np.float32) + .5) * (2 / size) - 1
    rim = np.exp(-((np.hypot(x - middle.real, y - middle.imag) - .72) / .16) ** 2)  # the soft shadow that rounds a head
    light = 1.05 - .05 * lamp_x * x - (.07 + .03 * lamp_y) * y - .05 * (x * x + y * y) - .10 * rim
    picture = np.clip(np.asarray(image.reduce(fine // size)) * light[..., None], 0, 255).astype(np.uint8)
    caption = f"{'an' if fur == 'orange' else 'a'} {fur} {species} with {eye} eyes on a {ground} background"
    return picture, SPECIES.index(species), caption


def read_picture(file, size):
    """Any image that Pillow opens -> uint8 (size, size, 3): upright, on white, centre-cropped, antialiased."""
    with Image.open(file) as im:
        im.draft("RGB", (2 * size, 2 * size))  # JPEG only: decode at 1/2, 1/4 or 1/8 where that is large enough
        im = ImageOps.exif_transpose(im)
        if im.mode.startswith("I"):            # 16 bits, which Pillow's convert would clip at 255
            im = Image.fromarray((np.asarray(im) / 257).clip(0, 255).astype(np.uint8))
        if im.has_transparency_data:
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im.convert("RGBA"))
        return np.asarray(ImageOps.fit(im.convert("RGB"), (size, size), Image.LANCZOS))


def list_pictures(path):
    """A folder or .zip -> names, classes, labels, stamps (what tells a changed set). Classes are the top sub-folders;
    one folder around everything is looked through, and where there is a train/ folder, it is the set."""
    if path.is_dir():
        files = [(p.relative_to(path).as_posix(), p.stat()) for p in sorted(path.rglob("*")) if p.is_file()]
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    else:
        try:
            with zipfile.ZipFile(path) as z:
                files = sorted((i.filename, i.file_size, i.CRC) for i in z.infolist())
        except (FileNotFoundError, zipfile.BadZipFile):
            raise Stop(f"{path} {'is not a folder, .zip or .npz of pictures' if path.exists() else 'does not exist'}")
    files = [f for f in files if f[0].lower().endswith(PICTURE_FILES) and not ("/" + f[0]).count("/.")
             and not f[0].startswith("__MACOSX")]
    parts = [f[0].split("/") for f in files]
    while len({p[0] for p in parts}) == 1 and min(map(len, parts)) > 2:
        parts = [p[1:] for p in parts]
    train = [i for i, p in enumerate(parts) if p[0] == "train"]
    if train and {p[0] for p in parts} <= {"train", "val", "valid", "validation", "test"}:
        files, parts = [files[i] for i in train], [parts[i][1:] for i in train]
    class_of = [p[0] if len(p) > 1 else "." for p in parts]  # pictures beside the folders: one more class
    classes = sorted(set(class_of))
    return [f[0] for f in files], ["all"] if classes == ["."] else classes, [classes.index(c) for c in class_of], files


class Pictures(torch.utils.data.Dataset):
    """What --data names, one by one: item i is (uint8 (size, size, 3), label), or (why it cannot be read, -1)."""

    def __init__(self, data, size, drawn=DRAWN_FACES):
        self.data, self.size, self.file, path = str(data), size, None, Path(data)
        if self.data == "drawn_faces":
            self.names, self.classes, self.labels = range(drawn), list(SPECIES), None
            stamps = [inspect.getsource(draw_face), TRAITS, FURS, EYES, BACKGROUNDS]  # edit the drawing: a new set
        elif path.suffix == ".npz" and path.is_file():
            try:
                with zipfile.ZipFile(path), np.load(path) as f:
                    self.file, y = f["images"], f["labels"] if "labels" in f else np.zeros(f["images"].shape[:1], int)
            except Exception as e:  # a damaged file can raise anything
                raise Stop(f"{path} is not an .npz with an array named images: {e}")
            shape = self.file.shape
            if self.file.dtype != np.uint8 or shape[3:] != (3,) or not all(shape) or y.shape != shape[:1]:
                raise Stop(f"{path}: images has to be uint8 (N, height, width, 3), labels (N,)")
            classes, labels = np.unique(y, return_inverse=True)
            self.names, self.classes, self.labels = range(len(y)), [str(c) for c in classes], labels.tolist()
            stamps = [path.stat().st_size, path.stat().st_mtime_ns]
        else:
            self.names, self.classes, self.labels, stamps = list_pictures(path)
        about = [size, len(self.names), inspect.getsource(read_picture), stamps]  # not where: it may be moved
        self.key = hashlib.sha256(repr(about).encode()).hexdigest()[:16]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        name = self.names[i]
        try:
            if self.data == "drawn_faces":
                return draw_face(0, i, self.size)[:2]
            if isinstance(self.file, np.ndarray):
                picture = ImageOps.fit(Image.fromarray(self.file[i]), (self.size, self.size), Image.LANCZOS)
                return np.asarray(picture), self.labels[i]
            if os.path.isdir(self.data):
                return read_picture(os.path.join(self.data, name), self.size), self.labels[i]
            self.file = self.file or zipfile.ZipFile(self.data)  # opened here, because each worker needs its own
            with self.file.open(name) as f:
                return read_picture(f, self.size), self.labels[i]
        except Exception as e:  # a broken file can raise anything in Pillow or zipfile
            return f"{name}: {str(e) or type(e).__name__}".splitlines()[0], -1


def prepare_data(data, size, drawn=DRAWN_FACES):
    """Reads the pictures into data/cache/NAME-SIZE-KEY.uint8 and .json, unless they are there -> that path."""
    source = Pictures(animal_faces() if data == "animal_faces" else data, size, drawn)
    cache = Path("data/cache", f"{Path(source.data).stem}-{size}-{source.key}.uint8")
    if cache.exists():
        return cache
    if len(source) < 16:
        raise Stop(f"--data {data} holds {len(source)} pictures; training takes at least 16")
    cache.parent.mkdir(parents=True, exist_ok=True)
    about = dict(name=source.data, key=source.key, classes=source.classes, size=size, labels=[], broken=[])

    def write(f):
        loader = torch.utils.data.DataLoader(source, 32, num_workers=min(os.cpu_count(), 16), collate_fn=list)
        for picture, label in tqdm(itertools.chain.from_iterable(loader), "reading", len(source), disable=None):
            if label < 0:
                about["broken"].append(picture)
            else:
                f.write(picture.tobytes())
                about["labels"].append(label)
        if len(about["broken"]) > 0.05 * len(source) or len(about["labels"]) < 16:
            raise Stop(f"{len(about['broken'])} of the {len(source)} pictures in {data} cannot be read, among them "
                       + about["broken"][0])
        write_atomically(cache.with_suffix(".json"), lambda g: g.write(json.dumps(about).encode()))
    write_atomically(cache, write)
    return cache


def open_data(cache):
    """What prepare_data made -> name, key, classes, broken, images uint8 (N, size, size, 3), labels (N,), and train and
    val, the numbers of the pictures on either side. A tenth, at most 256, is held out, the same in every run."""
    data = SimpleNamespace(**json.loads(cache.with_suffix(".json").read_text()))
    n, data.labels = len(data.labels), np.array(data.labels)
    data.images = np.memmap(cache, np.uint8, "r", shape=(n, data.size, data.size, 3))
    data.val, data.train = np.split(np.random.default_rng(0).permutation(n), [min(256, n // 10)])
    return data


def shared_data(prepare, rank, world):
    """open_data of what prepare() makes, once on each node. Raises Stop."""
    caches = on_each_node(prepare, rank, world)
    if len(set(caches)) > 1:
        raise Stop("the pictures are not the same on all nodes")
    return open_data(caches[0])


def animal_faces():
    """Where the AFHQ photographs are: data/animal_faces, downloaded if need be; "drawn_faces" if they cannot be had."""
    folder, file = Path("data/animal_faces"), Path("data/animal_faces/afhq.zip")
    if folder.is_dir() and not file.exists() and any(p.name.lower().endswith(PICTURE_FILES) for p in folder.rglob("*")):
        return folder
    try:
        if not file.exists():
            print("animal_faces: AFHQ of StarGAN v2, licence CC BY-NC 4.0 (not for commercial use)", flush=True)
            download(ANIMAL_FACES_URL, file, zipfile.is_zipfile)
        return file
    except Stop as e:
        print(f"animal_faces cannot be had, so drawn_faces take their place: {e}", flush=True)
        return "drawn_faces"


def to_device(x, device):
    """x.to(device), without waiting for the step that a GPU is still at, for which the copy has to be pinned."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def load_pictures(images, i, device):
    """Pictures i of images uint8 (N, size, size, 3) -> float (len(i), 3, size, size) in [-1, 1] on device."""
    x = to_device(torch.from_numpy(images[i]), device)
    return x.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1  # contiguous: or the CPU's norms crawl


def to_uint8(x):
    """The inverse: (B, 3, H, W) in [-1, 1] -> numpy uint8 (B, H, W, 3)."""
    return ((x.float() + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


# -----------------------------------------------------------------------------
# Which tokenizer, and the latents of all pictures, made once.

VAES = {"sd": ("stabilityai/sd-vae-ft-ema", "diffusion_pytorch_model.safetensors", dict(scale=0.18215)),
        "sdxl": ("stabilityai/sdxl-vae", "diffusion_pytorch_model.safetensors", dict(scale=0.13025)),
        "flux": ("black-forest-labs/FLUX.1-schnell", "vae/diffusion_pytorch_model.safetensors",
                 dict(scale=0.3611, shift=0.1159)),
        "taesd": ("madebyollin/taesd", "diffusion_pytorch_model.safetensors", {}),
        "taef1": ("madebyollin/taef1", "diffusion_pytorch_model.safetensors", {}),
        "cosmos": ("nvidia/Cosmos-0.1-Tokenizer-CI8x8", "encoder.jit", {}),
        "cosmos16": ("nvidia/Cosmos-0.1-Tokenizer-CI16x16", "encoder.jit", {})}


def find_vae(name):
    """--vae -> the file or files that hold it, and what its configuration says. Raises Stop."""
    path, known = Path(name), ", ".join(["tiny", *VAES, "none"])
    if name in VAES:
        repo, file, how = VAES[name]
        return [hub_file(repo, f) for f in ([file, "decoder.jit"] if file == "encoder.jit" else [file])], how
    files = [path] if path.is_file() else []
    for candidates in (["encoder.jit", "decoder.jit"], ["diffusion_pytorch_model.safetensors"], ["model.safetensors"],
                       sorted((f.name for f in path.glob("*coder.safetensors")), reverse=True)):
        files = files or [path / f for f in candidates if (path / f).is_file()]
    if not files:
        raise Stop(f"--vae {name} is none of {known}, and no file or folder with an autoencoder")
    if len(files) > 2:
        raise Stop(f"--vae {name} holds several autoencoders: name one file, such as {files[0]}")
    half = re.fullmatch(r"(.*)(en|de)coder(\.jit|\.safetensors)", files[0].name)
    if half:  # in two files
        files = [files[0].with_name(f"{half[1]}{part}coder{half[3]}") for part in ("en", "de")]
        if not all(file.is_file() for file in files):
            raise Stop(f"--vae {name} is one half of a tokenizer; {files[half[2] == 'en']} is not there")
    how, config = {}, files[0].with_name("config.json")
    if config.exists():
        try:
            config = json.loads(config.read_text())
            how = {ours: config[theirs] for ours, theirs in (("scale", "scaling_factor"), ("shift", "shift_factor"),
                   ("groups", "norm_num_groups")) if config.get(theirs) is not None}
        except (ValueError, AttributeError) as e:
            raise Stop(f"{files[0].with_name('config.json')} is no configuration: {e}")
    return files, how


def read_vae(files, how):
    """The tokenizer in these files, whatever kind it is. Raises Stop."""
    if files[0].suffix == ".jit":
        try:
            return Cosmos(files)
        except (RuntimeError, ValueError, OSError) as e:
            raise Stop(f"{files[0]} is no tokenizer as NVIDIA's: {str(e).splitlines()[0]}")
    tensors = {}
    for file, prefix in zip(files, ("encoder.", "decoder.") if len(files) == 2 else ("",)):
        tensors |= {prefix + k: v.float() for k, v in load_safetensors(file)[0].items()}
    if "encoder.layers.0.weight" in tensors:  # diffusers' names, without the decoder's first layer, which is no weight
        tensors = {re.sub(r"\.layers\.(\d+)", lambda m: f".{int(m[1]) + k.startswith('decoder.')}", k): v
                   for k, v in tensors.items()}
    try:
        if "encoder.down_blocks.0.resnets.0.conv1.weight" in tensors:
            old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
            for k in [k for k in tensors if ".attentions." in k]:
                v, name = tensors.pop(k), k.split(".")[-2]
                k = k.replace(f".{name}.", f".{old.get(name, name)}.") if name in old else k
                tensors[k] = v.flatten(1) if v.ndim == 4 else v  # 1 x 1 convolutions in still older files
            return AutoencoderKL(tensors, **how)
        if "encoder.14.bias" in tensors:
            return TAESD(tensors)
        if "vae.encoder.1.weight" in tensors or "encoder.1.weight" in tensors:  # trained by this script
            vae, own = TinyVAE(), {k[4:]: v for k, v in tensors.items() if k.startswith("vae.")} or tensors
            load_weights(vae, own, "the file")
            return vae
    except Stop as e:
        raise Stop(str(e).replace("the file", str(files[0])))
    except (KeyError, StopIteration, RuntimeError, ValueError, TypeError, ArithmeticError) as e:
        raise Stop(f"{files[0]} is not a whole autoencoder, or its config.json is wrong: {e!r}")
    raise Stop(f"{files[0]} is no autoencoder of a known kind: AutoencoderKL, TAESD, or this script's own")


def train_tiny(vae, data, args, device, rank, world):
    """Trains a TinyVAE on these pictures, on the first process, unless data/cache has the result; all get it."""
    code = [inspect.getsource(part) for part in (TinyVAE, TinyBlock, train_tiny)]
    key = hashlib.sha256(repr([data.key, args.vae_steps, args.seed, code]).encode()).hexdigest()[:16]
    cache = Path(f"data/cache/tiny-vae-{key}.safetensors")
    if rank == 0 and cache.exists():
        load_weights(vae, load_safetensors(cache)[0], cache)
    elif rank == 0:
        print(f"a tokenizer is trained first: {args.vae_steps} steps", flush=True)
        torch.manual_seed(mix(INIT, args.seed))
        vae.load_state_dict(TinyVAE().state_dict())
        B = 16  # after 37 s, many small steps gave 23.1 dB, steps of 64 pictures 21.2
        opt = torch.optim.AdamW(vae.parameters(), 2e-3, (0.9, 0.99), weight_decay=0.01, fused=device.type != "mps")
        dtype = pick_dtype(args.dtype, device)
        for step in (bar := tqdm(range(args.vae_steps), "training the tokenizer", disable=None)):
            i = data.train[[shuffled(len(data.train), args.seed, k // len(data.train))[k % len(data.train)]
                            for k in range(step * B, step * B + B)]]
            x = load_pictures(data.images, i, device)
            noise = torch.randn((B, vae.channels, args.size // 8, args.size // 8),
                                generator=torch.Generator().manual_seed(mix(NOISE, args.seed, step))).to(device)
            for group in opt.param_groups:
                group["lr"] = 2e-3 * min(1, (step + 1) / 50, 1.02 - step / args.vae_steps)  # soon up, slowly down
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = vae.loss(x, noise)
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            if step % 50 == 0:
                bar.set_postfix_str(f"loss {loss.item():.4f}")
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(cache, vae.state_dict(), dict(format="pt", kind="tiny_vae"))
    if world > 1:
        for v in vae.state_dict().values():
            dist.broadcast(v, 0)


def fingerprint(vae):
    """What tells a tokenizer from others, wherever it lies."""
    digest = hashlib.sha256(repr(vae).encode())
    for v in vae.state_dict().values():
        digest.update(v.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def check_size(args, vae):
    """Raises Stop when pictures of --size cannot be cut into patches of latents."""
    if args.size % (vae.factor * args.patch_size):
        raise Stop(f"--size has to be a multiple of {vae.factor * args.patch_size}: the tokenizer's {vae.factor} x "
                   f"--patch_size {args.patch_size}")


def load_vae(args, rank, world):
    """The tokenizer that --vae names; tiny is yet to be trained. Raises Stop."""
    if args.vae in ("tiny", "none"):
        return TinyVAE() if args.vae == "tiny" else Pixels()
    found = on_each_node(functools.partial(find_vae, args.vae), rank, world)
    return read_vae(*found[int(os.environ.get("GROUP_RANK", 0))])  # where this node has it


def encode_data(vae, vae_key, data, args, device, rank, world):
    """Adds to data its latents, float16 (1 or 2, N, C, h, w), the second of mirrored pictures, and z_mean, z_std
    (C, 1, 1). They are computed once, by all processes of a node together, and kept in data/cache; what a run that was
    cut has left there is not made again. Pixels are not kept twice."""
    C, side = vae.channels, args.size // vae.factor
    data.latents, data.z_mean, data.z_std = None, torch.zeros(C, 1, 1), torch.full((C, 1, 1), 0.5)
    if isinstance(vae, Pixels):
        return
    N, mirrors = len(data.images), 2 if args.flip else 1
    shape, row = (mirrors, N, C, side, side), C * side * side * 2
    dtype = pick_dtype(args.dtype, device)
    about = [data.key, vae_key, shape, dtype, inspect.getsource(encode_data)]
    cache = Path(f"data/cache/latents-{args.size}-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.f16")
    local = int(os.environ.get("LOCAL_RANK", 0))
    ready = torch.tensor(float(cache.exists() and cache.with_suffix(".json").exists()
                               and cache.stat().st_size == mirrors * N * row), device=device)
    if sum_over_ranks(ready) < world:
        part = cache.with_name(f"{cache.name}.{os.environ.get('GROUP_RANK', 0)}.part")
        if local == 0:
            if rank == 0:
                print(f"latents of {mirrors * N} pictures come first, in {cache}", flush=True)
            part.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "ab") as f:  # what a run that was cut has made stays; 0 where there is nothing yet
                f.truncate(mirrors * N * row)
        sum_over_ranks(torch.zeros(1, device=device)).item()  # all wait for that; without .item() NCCL would not
        mine = np.array_split(np.arange(N), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))[local]
        failure = None
        try:
            with open(part, "r+b") as f, torch.no_grad():
                for k in tqdm(range(0, len(mine), 16), "latents, once", disable=True if rank else None):
                    i = mine[k:k + 16]
                    for m in range(mirrors):
                        place = (m * N + int(i[0])) * row
                        f.seek(place)
                        if np.frombuffer(f.read(len(i) * row), np.float16)[row // 2 - 1::row // 2].all():
                            continue  # there already, to the last number of each
                        x = load_pictures(data.images, i, device)
                        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                            z = vae.encode(x.flip(-1) if m else x).half()
                        if not z.isfinite().all():
                            raise Stop(f"--vae {args.vae} made latents that are no numbers", 1)
                        f.seek(place)
                        f.write(z.cpu().numpy().tobytes())
        except Stop as e:
            failure = e
        except OSError as e:
            failure = Stop(f"cannot write {part}: {e.strerror}; make room, and start again to go on with it", 1)
        failures = [failure] * world
        if world > 1:
            dist.all_gather_object(failures, failure)
        for failure in filter(None, failures):  # of any rank, on all
            raise failure
        if local == 0:
            whole = np.memmap(part if part.exists() else cache, np.float16, "r", shape=shape)
            some = whole[:, ::max(1, N // 5000)].astype(np.float64)
            about = dict(mean=some.mean((0, 1, 3, 4)).tolist(), std=some.std((0, 1, 3, 4)).clip(1e-6).tolist())
            write_atomically(cache.with_suffix(".json"), lambda g: g.write(json.dumps(about).encode()))
            if part.exists():  # another run on the same pictures may have been here
                os.replace(part, cache)
        sum_over_ranks(torch.zeros(1, device=device)).item()
    about = json.loads(cache.with_suffix(".json").read_text())
    data.latents = np.memmap(cache, np.float16, "r", shape=shape)
    data.z_mean, data.z_std = (torch.tensor(about[k]).view(C, 1, 1) for k in ("mean", "std"))


def load_latents(data, i, mirrored, device):
    """Latents (B, C, h, w) of pictures i, mirrored where that (B,) says so, with mean 0 and variance 1."""
    if data.latents is None:
        x = load_pictures(data.images, i, device)
        z = torch.where(to_device(mirrored, device).view(-1, 1, 1, 1), x.flip(-1), x)
    else:
        z = to_device(torch.from_numpy(data.latents[mirrored.long().numpy(), i]), device).float()
    return (z - data.z_mean.to(device)) / data.z_std.to(device)


def decode(vae, model, z):
    """Latents of mean 0 and variance 1 -> pictures (B, 3, H, W)."""
    return torch.cat([vae.decode(part * model.z_std + model.z_mean) for part in z.split(16)])  # large ones fill memory


# -----------------------------------------------------------------------------
# Utilities, the same text in every script that has them.


class Stop(Exception):
    """Ends the script with one sentence; code is the exit status: 2 for wrong input, 1 for a failure at run time."""

    def __init__(self, sentence, code=2):
        super().__init__(sentence)
        self.code = code


def pick_device(name):
    """torch.device for --device; auto takes CUDA, else MPS, else the CPU. Raises Stop when there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if 0 < torch.cuda.device_count() < processes:
            raise Stop(f"{processes} processes, but {torch.cuda.device_count()} GPUs here: lower --nproc_per_node")
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # under torchrun each process has its own
    elif name.startswith("cuda:") and "RANK" in os.environ:
        raise Stop(f"--device {name} under torchrun: say --device cuda, and each process takes its own GPU")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # raises for a device that is named right but is not there
        return device
    except (RuntimeError, AssertionError) as e:
        raise Stop(f"--device {name} cannot be used on this machine: {str(e).splitlines()[0]}")


def pick_dtype(name, device):
    """torch.dtype of the network's arithmetic; auto takes bf16 where the hardware has it, which halves the time."""
    if name == "auto":
        cpuinfo = Path("/proc/cpuinfo")
        has_bf16 = (torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda" else
                    device.type == "cpu" and cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text())
        name = "bf16" if has_bf16 else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


INIT, BATCH, NOISE, DROPOUT, IMAGE = range(1, 6)  # the first number of every seed: one stream for each purpose


def mix(*numbers):
    """Whole numbers, always as many for a purpose -> one seed; a change of any of them gives an unrelated one."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def image_noise(seed, indices, shape, device):
    """Endless standard normal noise (len(indices), *shape), picture i from its own generator of (seed, i): the same at
    any batch size. Drawn on the CPU, so the same on any device too."""
    generators = [torch.Generator().manual_seed(mix(IMAGE, seed, i)) for i in indices]
    while True:
        yield torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


@functools.lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    """The order of n training examples in an epoch, from (seed, epoch): resume needs no state."""
    return np.random.default_rng((seed, epoch)).permutation(n)


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model. Single steps jitter; the mean of the last ones samples better."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def write_atomically(path, write):
    """write(file) into path by way of a temporary file: a full disk or a killed process leaves the old one whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            write(f)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        e = e.__context__ if isinstance(e.__context__, OSError) else e  # torch.save hides the OSError in a RuntimeError
        why = getattr(e, "strerror", None) or str(e).partition("\n")[0]
        raise Stop(f"cannot write {path}: {why}; what was there before is intact", 1)
    finally:
        part.unlink(missing_ok=True)


SAFETENSORS_DTYPES = {torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32",
                      torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16", torch.int8: "I8",
                      torch.uint8: "U8", torch.bool: "BOOL"}  # in the order in which the library writes them


def save_safetensors(path, tensors, metadata):
    """The safetensors format by hand: 8 bytes of header length, a JSON header, then the raw tensors end to end.
    Widest type first, as the library orders them, keeps every tensor aligned."""
    header, end, rank = {"__metadata__": metadata}, 0, list(SAFETENSORS_DTYPES)
    order = sorted(tensors, key=lambda k: (rank.index(tensors[k].dtype), k))
    for k in order:
        v, start = tensors[k], end
        end += v.numel() * v.element_size()
        header[k] = {"dtype": SAFETENSORS_DTYPES[v.dtype], "shape": list(v.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(f):
        f.write(struct.pack("<Q", len(text)) + text)
        for k in order:
            f.write(tensors[k].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    write_atomically(path, write)


def load_safetensors(path):
    """-> {name: tensor}, memory-mapped, and the metadata. Raises Stop unless offsets, shapes and file agree."""
    try:
        with open(path, "rb") as f:
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        start, dtypes = 8 + struct.unpack("<Q", data[:8])[0], {name: d for d, name in SAFETENSORS_DTYPES.items()}
        header, tensors = json.loads(data[8:start]), {}
        metadata, end = header.pop("__metadata__", {}), 0
        if not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("the metadata has to be text")
        for k, v in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (low, high) = dtypes[v["dtype"]], v["shape"], v["data_offsets"]
            size_fits = high - low == math.prod(shape) * dtype.itemsize and min(shape + [0]) == 0
            if not (size_fits and end == low <= high <= len(data) - start):
                raise ValueError(f"{k} does not fit into it")
            end = high
            flat = torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=start + low) if high > low else []
            tensors[k] = torch.as_tensor(flat, dtype=dtype).view(shape)
        if start + end != len(data):
            raise ValueError("it is too long")
        return tensors, metadata
    except OSError as e:
        raise Stop(f"cannot read {path}: {e.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RuntimeError, OverflowError) as e:
        hint = "a ckpt.pt is for --resume, model.safetensors beside it for --ckpt" if str(path).endswith(".pt") else e
        raise Stop(f"{path} is not a whole .safetensors file: {hint}")


def read_model(path, script):
    """The tensors, settings and data of a model.safetensors. Raises Stop for a damaged one or one of another script."""
    tensors, about = load_safetensors(path)
    if about.get("script") != script:
        raise Stop(f"{path} was made by {about.get('script', 'another program')}, not by {script}")
    try:
        return tensors, json.loads(about["args"]), json.loads(about["data"])
    except (KeyError, ValueError) as e:
        raise Stop(f"the header of {path} does not describe a model: {e!r}")


def load_weights(model, tensors, path):
    """load_state_dict that says in a sentence why the weights in `path` are not those of this model."""
    try:
        model.load_state_dict(tensors)
    except (AttributeError, RuntimeError, TypeError) as e:
        details = " ".join(str(e).partition(":")[2].split()) or str(e)
        raise Stop(f"{path} is of another architecture: {details[:200]}")


def load_checkpoint(path, script):
    """The dict in a ckpt.pt. Raises Stop for a missing or damaged file and for one of another script."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"script", "args", "step", "model", "ema", "opt", "key"} <= set(state):
            raise ValueError("it lacks entries")
    except OSError as e:
        raise Stop(f"--resume {path}: {e.strerror or e}")
    except Exception as e:  # a damaged file can raise anything
        hint = "it holds weights alone, take the ckpt.pt" if str(path).endswith(".safetensors") else type(e).__name__
        raise Stop(f"--resume {path} is not a whole ckpt.pt: {hint}")
    if state["script"] != script:
        raise Stop(f"--resume {path} was made by {state['script']}, not by {script}")
    return state


def download(url, path, is_whole=lambda path: True, tries=5, token=""):
    """url -> path, on from path.part if that exists, checked against the size the server names. Raises Stop."""
    part, by_hand = path.with_name(path.name + ".part"), f"fetch {url} by hand and put it at {path}"
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(tries):
        have, why = part.stat().st_size if part.exists() else 0, "the connection broke"
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        if token:  # for this server alone: the store that it may point to refuses a second key
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer, \
                    open(part, "ab" if answer.status == 206 else "wb") as f:  # 200: the whole file, whatever was asked
                end = f.tell() + int(answer.headers["Content-Length"] or 0)
                with tqdm(None, path.name, end, initial=f.tell(), unit="B", unit_scale=True, disable=None) as bar:
                    while block := answer.read1(1 << 20):
                        bar.update(f.write(block))
                whole = f.tell() >= end
            if whole and is_whole(part):
                os.replace(part, path)
                return
            if whole:
                part.unlink()
                raise Stop(f"what came is not the file; {by_hand}", 1)
        except urllib.error.HTTPError as e:
            if e.code != 416:
                raise Stop(f"the server says {e.code} {e.reason}; {by_hand}", 1)
            part.unlink()  # as long as the file or longer: start afresh
        except (http.client.HTTPException, OSError) as e:
            why = getattr(e, "reason", e)
            if not part.exists() or part.stat().st_size == have:
                break
    raise Stop(f"the download broke off ({why}); start again to go on, or {by_hand}", 1)


def sha256(path):
    with open(path, "rb") as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hub_file(repo, name):
    """The file `name` of a Hugging Face repository -> its path: in the user's own cache of that hub, or else downloaded
    once into data/weights, from HF_ENDPOINT and with HF_TOKEN where these are set. Raises Stop."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"), f"models--{repo.replace('/', '--')}")
    for path in (*sorted(cache.glob(f"snapshots/*/{name}")), Path("data/weights", repo, name)):
        if path.is_file():
            return path
    url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{repo}/resolve/main/{name}"
    token = os.environ.get("HF_TOKEN", "")

    class Stay(urllib.request.HTTPRedirectHandler):  # the hub names the hash, the store that it points to does not
        def redirect_request(self, *args):
            return None
    request = urllib.request.Request(url, method="HEAD")
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.build_opener(Stay).open(request, timeout=30) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as e:
        headers = e.headers  # of the redirection; download() tells of errors
    except OSError:
        headers = {}
    digest = (headers.get("X-Linked-Etag") or "").strip('"')
    download(url, path, lambda part: len(digest) != 64 or sha256(part) == digest, token=token)
    return path


def setup(args):
    """-> device, rank, world. torchrun sets RANK, and then the same file runs as one of WORLD_SIZE processes."""
    device, rank, world = pick_device(args.device), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        patience = datetime.timedelta(hours=3)  # the others wait while rank 0 downloads and reads the data
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    torch.set_float32_matmul_precision("high")
    return device, rank, world


def sum_over_ranks(x):
    """Sum of a tensor over all processes; x itself when there is one."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def on_each_node(make, rank, world):
    """make() on the first rank of each node -> what it gave on each node. When one fails, all ranks raise its Stop."""
    result = None
    for turn in (True, False):  # rank 0 alone at first: where nodes share a disk, the others find its work done
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 and (rank == 0) == turn:
            try:
                result = make()
            except (Stop, OSError) as e:
                result = e
        results = [result] * world
        if world > 1:
            dist.all_gather_object(results, result)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return [result for result in results if result is not None]


def stop_at_once(number, frame):
    """Signal handler: KeyboardInterrupt, as Ctrl-C does by itself, that knows which signal it was."""
    raise KeyboardInterrupt(number)


def note_signals():
    """-> a list that takes the exit status (130, 143) of Ctrl-C or SIGTERM, so that the step in hand can end; a second
    signal ends at once."""
    noted = []

    def note(number, frame):
        if noted:
            stop_at_once(number, frame)
        noted.append(128 + number)
    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return noted


PEAK_TFLOPS = {"H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "A10": 125,
               "A10G": 70, "L40S": 362, "L40": 181, "L4": 121, "4090": 165, "3090": 71}


def peak_flops(device):
    """Dense bf16 FLOP/s of the GPU by its data sheet, None where it is not listed."""
    words = torch.cuda.get_device_name(device).replace("-", " ").split() if device.type == "cuda" else []
    if {"Laptop", "D", "Ti", "MIG"} & set(words):  # others than the cards of that number
        return None
    return next((1e12 * v for k, v in PEAK_TFLOPS.items() if set(k.split()) <= set(words)), None)


def peak_memory(device):
    """Most memory ever held, in GiB: of the GPU, or of the process (not measured on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if sys.platform == "win32":
        return None
    import resource  # not there on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def tile(pictures, columns):
    """uint8 (N, H, W, 3) -> one picture of rows and columns, white where the last row has gaps."""
    n, H, W, _ = pictures.shape
    rows = -(-n // columns)
    full = np.full((rows * columns, H, W, 3), 255, np.uint8)
    full[:n] = pictures
    return full.reshape(rows, columns, H, W, 3).transpose(0, 2, 1, 3, 4).reshape(rows * H, columns * W, 3)


def save_png(path, picture):
    """uint8 (H, W, 3) -> file, small pictures enlarged by a whole number so that pixels can be seen."""
    k = max(1, 512 // max(picture.shape[:2]))
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(picture.repeat(k, 0).repeat(k, 1))
    write_atomically(path, lambda f: image.save(f, "PNG"))  # training.gif reads grids: none may be cut short


def save_gif(path, frames, ms=120):
    """uint8 (H, W, 3) frames -> an endless GIF that rests on its last frame."""
    frames = [Image.fromarray(f).quantize(128, dither=Image.Dither.NONE) for f in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[ms] * (len(frames) - 1) + [2000], loop=0)


def plot_loss(path, records):
    """log.jsonl's records -> a picture of loss (gray) and val_loss (blue) over steps, logarithmic."""
    curves = [[(r["step"], math.log10(r[k])) for r in records if r.get(k)] for k in ("loss", "val_loss")]
    points = [p for c in curves for p in c]
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
    image = Image.new("RGB", (640, 400), "white")
    draw = ImageDraw.Draw(image)
    place = lambda x, y: (60 + 560 * (x - x0) / max(x1 - x0, 1), 360 - 330 * (y - y0) / max(y1 - y0, 1e-9))
    for i in range(5):
        y = y0 + (y1 - y0) * i / 4
        draw.line([place(x0, y), place(x1, y)], "#dddddd")
        draw.text((8, place(x0, y)[1] - 6), f"{10 ** y:.4f}", "black")
    for curve, colour, width in zip(curves, ("#999999", "#1f5fbf"), (1, 3)):
        draw.line([place(x, y) for x, y in curve], colour, width)
    for i, j in (place(x, y) for x, y in curves[1]):  # where it was measured
        draw.ellipse([i - 5, j - 5, i + 5, j + 5], "#1f5fbf")
    draw.text((60, 370), f"step {x0}", "black")
    draw.text((560, 370), f"step {x1}", "black")
    draw.text((250, 8), "loss (gray), validation loss of the EMA weights (blue)", "black")
    image.save(path)


# -----------------------------------------------------------------------------
# Sampling and training.

ARCHITECTURE = "vae_steps model patch_size class_cond".split()
FREE_ON_RESUME = ("data vae steps lr out eval_every device dtype compile accum grad_checkpoint sampler sample_steps "
                  "cfg_scale cfg_interval").split()
P_UNCOND = 0.1  # share of labels or texts that training hides: one network learns both sides of the guidance


NO_CLASSES = "--cfg_scale needs a model that knows classes, trained with --class_cond"


def adopt(args, saved, keys, path):
    """Take the settings `keys` from a checkpoint; one given by hand that differs is an error, not a surprise."""
    for k in sorted(keys):
        now = getattr(args, k)
        if not isinstance(saved, dict) or k not in saved or now is not None and type(saved[k]) is not type(now):
            raise Stop(f"{path} does not say what --{k} was; has it been edited?")
        if k in args.given and now != saved[k]:
            raise Stop(f"--{k} {now} contradicts {path}, which was made with {saved[k]}")
        setattr(args, k, saved[k])

    def refuse(sentence):
        raise Stop(f"{path} does not go with this: {sentence}")
    try:
        check(args, refuse)
    except TypeError:
        refuse("its settings have been edited")


def generate(model, vae, args, noise, y=None, on_step=None):
    """sample() as the flags say, from noise (B, C, h, w), with labels y (B,) and guidance -> pictures (B, 3, H, W)."""
    device = noise.device
    with torch.autocast(device.type, torch.bfloat16, enabled=pick_dtype(args.dtype, device) == torch.bfloat16):
        z = sample(guided(model, y, args.cfg_scale, args.cfg_interval), noise, args.sampler,
                   time_grid(args.sample_steps, args.time_shift), on_step)
        return decode(vae, model, z)


def train_batch(data, args, step, device, rank, world):
    """Latents and all randomness of one step -> z0, eps, t, y, and the pictures if --repa asks for them; of which each
    rank gets its share. Drawn for the whole batch from (seed, step), so that any number of processes trains on the same
    numbers."""
    B, g = args.batch_size, torch.Generator().manual_seed(mix(BATCH, args.seed, step))
    mine, n = slice(B * rank // world, B * (rank + 1) // world), len(data.train)
    t, u = logit_normal((B,), args.time_shift, g)[mine], torch.rand((B, 2), generator=g)[mine]  # u: mirror, hide y
    places = range(step * B + mine.start, step * B + mine.stop)  # in the endless list of shuffled epochs
    i = data.train[[shuffled(n, args.seed, k // n)[k % n] for k in places]]
    mirrored = (u[:, 0] < 0.5) & args.flip
    z0 = load_latents(data, i, mirrored, device)
    g = torch.Generator(device).manual_seed(mix(NOISE, args.seed, step))
    eps = torch.randn((B, *z0.shape[1:]), generator=g, device=device)[mine]
    y = torch.where(u[:, 1] < P_UNCOND, len(data.classes), torch.from_numpy(data.labels[i]))
    pictures = None
    if args.repa and step < args.repa_until:
        x = load_pictures(data.images, i, device)
        pictures = torch.where(to_device(mirrored, device).view(-1, 1, 1, 1), x.flip(-1), x)
    return z0, eps, to_device(t, device), to_device(y, device) if args.class_cond else None, pictures


def train_step(model, opt, batch, args, amp, teacher):
    """One optimizer step on batch = (z0, eps, t, y, pictures) -> the loss, left on the device. With --repa the tokens
    learn to tell, a third of the way up, what DINOv2 sees there: 2410.06940 eq. 8."""
    total = 0
    for k in range(args.accum):
        z0, eps, t, y, pictures = (None if a is None else a.chunk(args.accum)[k] for a in batch)
        if dist.is_initialized():
            model.require_backward_grad_sync = k == args.accum - 1  # gradients are averaged once per step
        h_proj, extra = [], 0

        def aligned(zt, t, y):
            v, h = model(zt, t, y, align=True)
            h_proj.append(h)
            return v
        with amp():
            loss = loss_fn(aligned if args.repa else model, z0, eps, t, y).mean()
            if args.repa and pictures is None:
                extra = 0 * h_proj[0].sum()  # --repa_until has come, but DDP wants all weights in use
            elif args.repa:
                target = teacher(pictures, h_proj[0].shape[1])
                extra = -args.repa * F.cosine_similarity(h_proj[0].float(), target.float(), -1).mean()
        total += loss.detach() / args.accum
        ((loss + extra) / args.accum).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
    return total


@torch.no_grad()
def validate(model, data, args, device, rank, world, amp):
    """Loss on the held-out pictures at fixed noise and evenly spread t -> the mean, and the mean by tenths of t."""
    total, n = torch.zeros(2, 10, dtype=torch.float64), len(data.val)
    mine = np.arange(n)[rank::world]
    for i in (mine[k:k + 64] for k in range(0, len(mine), 64)):
        t = torch.from_numpy((i + 0.5) / n).float().to(device)
        z0 = load_latents(data, data.val[i], torch.zeros(len(i), dtype=torch.bool), device)
        y = torch.from_numpy(data.labels[data.val[i]]).to(device)
        eps = next(image_noise(args.seed + 1, i, z0.shape[1:], device))
        with amp():
            loss = loss_fn(model, z0, eps, t, y if args.class_cond else None).cpu().double()
        total += torch.stack([torch.bincount((t.cpu() * 10).long(), w, 10) for w in (loss, torch.ones_like(loss))])
    total = sum_over_ranks(total.float().to(device)).cpu()
    bins = [loss / count if count else None for loss, count in zip(*total.tolist())]  # None: no picture fell into it
    return (total[0].sum() / total[1].sum()).item(), bins


def build_model(args, channels, n_classes, repa_dim=0):
    """The transformer that the flags describe."""
    n_classes = n_classes if args.class_cond else 0
    return DiT(channels, args.patch_size, args.model, n_classes, args.grad_checkpoint, repa_dim)


@torch.no_grad()
def draw_pictures(out, ema, vae, data, args, device, y):
    """What a finished run shows: forward.png, reverse.gif, training.gif, guidance.png, and in reconstruction.png what
    the tokenizer loses of held-out pictures -> its PSNR in dB."""
    x0, times = load_pictures(data.images, data.val[:8], device), [0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1]
    z0 = load_latents(data, data.val[:8], torch.zeros(len(x0), dtype=torch.bool), device)
    again = decode(vae, ema, z0)
    for name in ("reconstruction.png", "guidance.png"):  # an earlier run's; not every run has them
        (out / name).unlink(missing_ok=True)
    if not isinstance(vae, Pixels):
        save_png(out / "reconstruction.png", tile(to_uint8(torch.cat([x0, again])), len(x0)))  # above: the pictures
    eps = next(image_noise(args.seed, range(len(x0)), z0.shape[1:], device))
    steps = torch.stack([path(z0[:6], eps[:6], t)[0] for t in times], 1).flatten(0, 1)       # (6 times, C, h, w)
    save_png(out / "forward.png", tile(to_uint8(decode(vae, ema, steps)), len(times)))

    n, way = 16, []                                                                          # 16 pictures from noise
    few, eps = None if y is None else y[:n], next(image_noise(args.seed, range(n), z0.shape[1:], device))
    # what there is, and the clean latents that it is taken for, which path() has at zt - t v
    x = generate(ema, vae, args, eps, few, lambda t, zt, v: way.append(torch.cat([zt, zt - t * v])))
    k = -(-len(way) // 24)                                                                   # at most 24 of them
    frames = [to_uint8(decode(vae, ema, z)) for z in way[(len(way) - 1) % k::k]] + [to_uint8(torch.cat([x, x]))]
    save_gif(out / "reverse.gif", [np.concatenate([tile(part, 4) for part in np.split(f, 2)], 1) for f in frames])
    grids = sorted(out.glob("samples/" + "[0-9]" * 6 + ".png"))
    save_gif(out / "training.gif", [np.asarray(Image.open(p)) for p in grids], 500)
    if y is not None:                                                                        # the same noise, guided
        rows = [generate(ema, vae, argparse.Namespace(**{**vars(args), "cfg_scale": scale}), eps[:8], y[:8])
                for scale in (1.0, 1.5, 2.0, 4.0)]
        save_png(out / "guidance.png", tile(to_uint8(torch.cat(rows)), len(rows[0])))
    return (10 * (4 / (again.float() - x0).square().mean((1, 2, 3))).log10()).mean().item()


def begin_log(out, start, resumed):
    """Make the folder fit to go on from step `start` -> the log so far. A new run keeps the weights of an old one."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("ckpt.pt", "model.safetensors", "log.jsonl"):
        if not resumed and (out / name).exists():
            os.replace(out / name, out / f"{name}.old")
            print(f"{out / name} of an earlier run is now {name}.old", flush=True)
    for part in (*out.glob("*.[0-9]*.part"), *out.glob("samples/*.[0-9]*.part")):
        part.unlink()  # of a run that was killed while it wrote
    for grid in out.glob(f"samples/{'[0-9]' * 6}.png"):
        if not resumed or int(grid.stem) > start:
            grid.unlink()
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if resumed and log.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]  # a full disk can leave half a line
    records = [r for r in records if r["step"] <= start]
    log.write_text("".join(json.dumps(r) + "\n" for r in records))
    return records


def restore(state, model, ema, opt, args):
    """Put a checkpoint's contents into model, ema and opt -> steps done, best validation loss. Raises Stop."""
    load_weights(model, state["model"], args.resume)
    load_weights(ema, state["ema"], args.resume)
    try:
        opt.load_state_dict(state["opt"])
        start, best = int(state["step"]), float(state["best"])
        if start < 0 or any(opt.state[p][k].shape != p.shape for p in model.parameters() for k in
                            ("exp_avg", "exp_avg_sq")):
            raise ValueError("step or optimizer state")
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise Stop(f"--resume {args.resume} has been edited: {e!r}")
    if start > args.steps:
        raise Stop(f"{args.resume} has done {start} steps already; say how far to go on with --steps")
    return start, best


def load_model(path, args, device, rank, world):
    """The model in a model.safetensors of this script, its tokenizer and its classes; args take over what it was
    trained with. Another --size than that is drawn as it is said, with the times shifted accordingly."""
    tensors, saved, data = read_model(path, "latent_dit.py")
    also = {"vae", "sample_steps", "cfg_scale", "cfg_interval", "sampler", "time_shift", "size"} - args.given
    adopt(args, saved, ARCHITECTURE + sorted(also), path)
    if args.time_shift is None:
        raise Stop(f"{path} does not say what --time_shift was; has it been edited?")
    if args.vae != saved.get("vae") and {args.vae, saved.get("vae")} <= {"tiny", "none", *VAES}:  # before a download
        raise Stop(f"--vae {args.vae} contradicts {path}, which was made with {saved['vae']}")
    if "time_shift" in also:
        args.time_shift *= max(1, args.size / saved.get("size", args.size))
    classes = data.get("classes") if isinstance(data, dict) else None
    if not isinstance(classes, list) or args.class_cond and len(classes) < 2:
        raise Stop(f"{path} does not say what its classes were; has it been edited?")
    if args.cfg_scale != 1 and not args.class_cond:
        raise Stop(NO_CLASSES)
    own = {k[4:]: v for k, v in tensors.items() if k.startswith("vae.")}
    if own and ("vae" not in args.given or args.vae == "tiny"):
        vae = TinyVAE()
        load_weights(vae, own, path)
    else:
        vae = load_vae(args, rank, world)
    if fingerprint(vae) != data.get("vae_key"):
        raise Stop(f"--vae {args.vae} is not the tokenizer with which {path} was trained")
    model = build_model(args, vae.channels, len(classes))
    load_weights(model, {k: v for k, v in tensors.items() if not k.startswith("vae.")}, path)
    model.grid = saved.get("size", args.size) // (vae.factor * args.patch_size)
    model, vae = (net.to(device).eval().requires_grad_(False) for net in (model, vae))
    check_size(args, vae)
    return model, vae, classes


def train(args):
    """The whole run. All randomness follows from (seed, step): a run that was cut goes on bit for bit, on the CPU."""
    began, state = time.time(), None
    if args.resume:
        state = load_checkpoint(args.resume, "latent_dit.py")
        keep = {"given", "resume"} | args.given & set(FREE_ON_RESUME)
        adopt(args, state["args"], vars(args).keys() - keep, args.resume)
        if "out" not in args.given:
            args.out = str(Path(args.resume).parent)  # where it lies now: the folder may have been renamed
    device, rank, world = setup(args)  # the device, too, is the checkpoint's unless given
    say = functools.partial(print, flush=True) if rank == 0 else lambda *a, **k: None
    if args.batch_size % (world * args.accum):
        raise Stop(f"--batch_size {args.batch_size} has to be a multiple of {world} processes x --accum {args.accum}")
    vae = load_vae(args, rank, world).to(device)  # what can be refused is refused before the long work
    check_size(args, vae)
    teacher = Teacher(rank, world).to(device).eval() if args.repa else None
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Stop(f"--out {out} cannot be made: {e.strerror}")
    data = shared_data(functools.partial(prepare_data, args.data, args.size, 256 if args.smoke else DRAWN_FACES), rank,
                       world)
    if data.broken:
        say(f"left out, because they cannot be read: {len(data.broken)}: " + "; ".join(data.broken[:9]))
    if state and state["key"] != data.key:
        raise Stop(f"--data {args.data} is not what {args.resume} was trained on: the pictures "
                   "or their dates have changed, or the code that reads them")
    if len(data.classes) < 2 and "class_cond" not in args.given:
        args.class_cond = False  # there is nothing to tell
    if not args.class_cond and "cfg_scale" not in args.given:
        args.cfg_scale = 1.0
    if args.cfg_scale != 1 and not args.class_cond:
        raise Stop(NO_CLASSES)
    if args.class_cond and len(data.classes) < 2:
        raise Stop("--class_cond needs pictures in at least two sub-folders (or an .npz with labels)")
    say(f"{data.name}: {len(data.train)} pictures to train on, {len(data.val)} held out; {device} x {world}, "
        f"{str(pick_dtype(args.dtype, device))[6:]}; writes to {out}")
    if args.vae == "tiny" and state and state.get("vae"):
        load_weights(vae, state["vae"], args.resume)
    elif args.vae == "tiny":
        train_tiny(vae, data, args, device, rank, world)
    vae_key = fingerprint(vae)
    if state and state.get("vae_key") != vae_key:
        raise Stop(f"--vae {args.vae} is not the tokenizer with which {args.resume} was trained")
    vae = vae.eval().requires_grad_(False)
    encode_data(vae, vae_key, data, args, device, rank, world)
    shape = (vae.channels, args.size // vae.factor, args.size // vae.factor)
    args.time_shift = args.time_shift or natural_shift(math.prod(shape))

    torch.manual_seed(mix(INIT, args.seed))
    model = build_model(args, vae.channels, len(data.classes), teacher.dim if teacher else 0).to(device)
    model.z_mean.copy_(data.z_mean)
    model.z_std.copy_(data.z_std)
    ema, start, best = copy.deepcopy(model).eval().requires_grad_(False), 0, math.inf
    opt = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.99), weight_decay=0.01, fused=device.type != "mps")
    if state:
        start, best = restore(state, model, ema, opt, args)
    own_folder, state = state is not None and Path(args.resume).resolve().parent == out.resolve(), None  # frees memory
    raw_model = model
    if args.compile:
        raw_model.compile()
    if world > 1:
        model = DistributedDataParallel(raw_model, device_ids=[device] if device.type == "cuda" else None)

    dtype = pick_dtype(args.dtype, device)
    settings = {k: v for k, v in vars(args).items() if k != "given"}
    amp = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    log_every = max(1, min(50, args.steps // 50))
    y = torch.arange(64, device=device) % len(data.classes) if args.class_cond else None
    peak, flops = peak_flops(device), 3 * raw_model.flops(*shape[1:])  # forward once, backward twice
    log = begin_log(out, start, resumed=own_folder) if rank == 0 else []
    began -= log[-1]["seconds"] if log else 0  # a resumed run counts on
    say(f"{sum(p.numel() for p in ema.parameters()) / 1e6:.1f}M parameters; {args.vae} latents "
        f"{' x '.join(map(str, shape))}, {math.prod(shape[1:]) // args.patch_size ** 2} tokens")
    say("settings: " + " ".join(f"{k}={v}" for k, v in settings.items()))

    def save(step):
        if rank == 0:
            ckpt = dict(script="latent_dit.py", args=settings, step=step, data=data.name, key=data.key, best=best,
                        model=raw_model.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), vae_key=vae_key,
                        vae=vae.state_dict() if isinstance(vae, TinyVAE) else None)
            write_atomically(out / "ckpt.pt", functools.partial(torch.save, ckpt))
            tensors = {k: v for k, v in ema.state_dict().items() if not k.startswith("repa.")}
            if isinstance(vae, TinyVAE):  # small, and nowhere else to be had
                tensors |= {f"vae.{k}": v for k, v in vae.state_dict().items()}
            save_safetensors(out / "model.safetensors", tensors, dict(
                format="pt", script="latent_dit.py", kind="dit", args=json.dumps(settings), data=json.dumps(dict(
                    name=data.name, key=data.key, classes=data.classes, vae_key=vae_key, step=step))))

    def write_record(step, record):
        if rank == 0:
            record = dict(data=data.name, step=step, **record, seconds=time.time() - began, peak_gb=peak_memory(device))
            if device.type == "cuda":
                record["gpu_hours"] = record["seconds"] * world / 3600
            log.append(record)
            with open(out / "log.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")
            if bar.disable or "val_loss" in record:
                tqdm.write("  ".join(f"{k} {record[k]:.{d}f}" for k, d in dict(
                    step=0, loss=4, val_loss=4, img_per_s=0, mfu=3, peak_gb=1, gpu_hours=2, seconds=0).items()
                                     if k in record))
                sys.stdout.flush()  # or a redirected run seems to hang

    noted, loss_sum, seen, clock = note_signals(), torch.zeros((), device=device), 0, time.time()
    bar = tqdm(total=args.steps, initial=start, disable=True if rank else None, unit="step")
    for step in range(start, args.steps + 1):  # one turn more than there are steps, to evaluate the last
        record, last, stop = {}, step == args.steps, 0
        evaluate = last or step % args.eval_every == 0 and (step > start or step == 0)  # at 0 the untrained network

        # once in a while: read the loss off the device, and hear whether any rank was asked to stop
        if step > start and (step % log_every == 0 or evaluate or noted and world == 1):
            loss, stop = sum_over_ranks(torch.stack([loss_sum / world, torch.full_like(loss_sum, len(noted))])).tolist()
            loss, rate = loss / seen, seen * args.batch_size / (time.time() - clock)
            if not loss < 100:  # also true of NaN; a network that has learnt nothing yet has a loss of about 2
                raise Stop(f"the loss is {loss:.3g} at step {step}: training diverged at --lr {args.lr}; lower it", 1)
            record.update(loss=loss, lr=opt.param_groups[0]["lr"], img_per_s=rate)
            if peak:
                record["mfu"] = flops * rate / world / peak
            bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} img/s")
            loss_sum.zero_()
            seen, clock = 0, time.time()

        # once in a while: validation loss, checkpoint, sample grid
        if evaluate:
            val, bins = validate(ema, data, args, device, rank, world, amp)
            if not val < 100:  # the last step spoilt the weights: the checkpoint before it is better
                raise Stop(f"the validation loss is {val:.3g} at step {step}: diverged at --lr {args.lr}; lower it", 1)
            best = min(best, val)
            record.update(val_loss=val, val_bins=bins)
            if step > 0:  # at 0 nothing is learnt, and an earlier run's .old files must not make way for that
                save(step)
            if rank == 0:
                x = generate(ema, vae, args, next(image_noise(args.seed, range(64), shape, device)), y)
                save_png(out / f"samples/{step:06d}.png", tile(to_uint8(x), 8))
            clock = time.time()
        if record:
            write_record(step, record)
        if stop:
            if not evaluate:
                save(step)
            raise Stop(f"stopped at step {step}; go on: {'torchrun ...' if world > 1 else 'python'} latent_dit.py "
                       f"--resume {out / 'ckpt.pt'}", [*noted, 130][0])
        if last:
            break

        # one step: data, noise and t from (seed, step); the loss, its gradient, AdamW, the moving average
        for group in opt.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 50)  # warm-up, while Adam's averages settle
        batch = train_batch(data, args, step, device, rank, world)
        loss_sum += train_step(model, opt, batch, args, amp, teacher)
        update_ema(ema, raw_model, min(args.ema_decay, (1 + step) / (10 + step)))  # warm-up: forget the random start
        seen += 1
        bar.update()
    bar.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_at_once)  # all is saved
    if noted and world == 1:  # while the last step was evaluated
        raise KeyboardInterrupt(noted[0] - 128)
    if rank == 0:
        plot_loss(out / "loss.png", log)
        say("trained; now the pictures")
        again = draw_pictures(out, ema, vae, data, args, device, y)
        if args.vae != "none":
            say(f"the tokenizer alone gives held-out pictures back with {again:.1f} dB PSNR ({out}/reconstruction.png)")
        say(f"done in {time.time() - began:.0f} s; best val_loss {best:.4f}; see {out}/samples/{args.steps:06d}.png")
    sum_over_ranks(torch.zeros(1, device=device)).item()  # the others wait for the pictures


def begin_pictures(out, rank, device):
    """-> out/generated.part, not there yet: what was drawn before stays in out/generated until all is there."""
    part = out / "generated.part"
    if rank == 0 and part.exists():  # of a run that was stopped
        for old in part.iterdir():
            old.unlink()
        part.rmdir()
    sum_over_ranks(torch.zeros(1, device=device)).item()  # all wait for that; without .item() NCCL would not
    return part


def publish(part, folder):
    """Moves what was drawn into the folder, in place of the numbered pictures there -> how many those were."""
    folder.mkdir(exist_ok=True)
    earlier = sorted(folder.glob("[0-9]" * 6 + ".png"))
    for old in (*earlier, folder / "metadata.jsonl"):  # a larger earlier set must not mix with this one
        old.unlink(missing_ok=True)
    for new in part.iterdir():
        os.replace(new, folder / new.name)
    part.rmdir()
    return len(earlier)


def sample_only(args):
    """--sample N --ckpt FILE: pictures from a finished model, as generated/000000.png ... and one grid."""
    device, rank, world = setup(args)
    if "out" not in args.given:
        args.out = str(Path(args.ckpt).parent)
    model, vae, classes = load_model(args.ckpt, args, device, rank, world)
    names = [*classes, *map(str, range(len(classes)))] if args.class_cond else []
    if args.label is not None and args.label not in names:
        raise Stop(f"--label {args.label} is no class of {args.ckpt}: " + (", ".join(classes)[:200] or "it has none"))
    n, out = args.sample, Path(args.out)
    part = begin_pictures(out, rank, device)
    began, mine = time.time(), np.array_split(np.arange(n), world)[rank]
    shape = (vae.channels, args.size // vae.factor, args.size // vae.factor)
    side = shape[1] // args.patch_size
    batches = [mine[k:k + 64] for k in range(0, len(mine), 64)]
    for i in tqdm(batches, "sampling", disable=True if rank else None):
        labels = (i if args.label is None else np.full(len(i), names.index(args.label))) % len(classes)
        y = torch.as_tensor(labels, device=device) if args.class_cond else None
        x = generate(model, vae, args, next(image_noise(args.seed, i, shape, device)), y)
        if not x.isfinite().all():
            raise Stop(f"{args.ckpt} draws NaN or infinity; did its training diverge?", 1)
        part.mkdir(parents=True, exist_ok=True)
        for j, picture in zip(i, to_uint8(x)):
            write_atomically(part / f"{j:06d}.png", lambda f: Image.fromarray(picture).save(f, "PNG"))
        if i[0] == 0:
            grid = tile(to_uint8(x), max(1, int(len(x) ** 0.5)))
    sum_over_ranks(torch.zeros(1, device=device)).item()
    if rank == 0:
        earlier = publish(part, out / "generated")
        save_png(out / "generated.png", grid)
        how = f"{args.sampler}, {args.sample_steps} steps"
        if args.class_cond:
            first, last = args.cfg_interval
            how += f", --cfg_scale {args.cfg_scale} from t = {first} to {last}, "
            how += "in turn " + " ".join(classes) if args.label is None else args.label
        if side != model.grid:
            how += f"; trained at {model.grid * args.size // side} pixels: the further from that, the worse"
        print(f"{n} pictures in {out / 'generated'}"
              + (f", in place of {earlier} earlier ones" if earlier else "") + f"; see {out / 'generated.png'}\n"
              f"{how}; {time.time() - began:.0f} s on {device} x {world}")


# -----------------------------------------------------------------------------
# Start: what was asked for, and one sentence with an exit status when it cannot be had.


def main(argv=None):
    """-> the exit status: 0, 1 for a failure at run time, 2 for wrong input, 130 or 143 after Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, stop_at_once)
    sentence, code = None, 0
    try:
        args = parse_args(argv)
        if args.sample:
            sample_only(args)
        else:
            train(args)
            if args.smoke:
                again = ["--smoke", "--sample", "4", "--ckpt", f"{args.out}/model.safetensors", "--out", args.out]
                sample_only(parse_args(again + ["--device", args.device]))
    except Stop as e:
        sentence, code = str(e) if int(os.environ.get("LOCAL_RANK", 0)) == 0 else None, e.code  # one of each node
    except KeyboardInterrupt as e:
        sentence, code = "stopped at once; finished files are whole", 128 + (e.args or (2,))[0]
    except OSError as e:
        sentence, code = f"{e.filename or 'input or output'}: {e.strerror or e}", 1
    except (MemoryError, RuntimeError) as e:  # CUDA, MPS, the CPU and NumPy each have their own
        if not isinstance(e, MemoryError) and "out of memory" not in str(e) and "allocate memory" not in str(e):
            raise
        sentence, code = "out of memory: raise --accum, or lower --batch_size, or say --grad_checkpoint", 1
    if sentence:  # before the next line, which can wait for ranks that are gone
        print(f"latent_dit.py: {sentence}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    status = main()
    if "RANK" in os.environ:  # threads of the process group can outlive the interpreter, which now and then aborts it
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
