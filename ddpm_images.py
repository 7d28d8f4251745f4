"""DDPM on images: drown pictures in Gaussian noise step by step, train a UNet to undo it, sample new pictures.

    python ddpm_images.py                             # animal faces that the script draws itself: no download, no GPU
    python ddpm_images.py --data animal_faces         # the AFHQ photographs (downloaded once)
    python ddpm_images.py --data my_photos --class_cond --cfg_scale 2          # sub-folders are the classes
    python ddpm_images.py --resume out/ddpm_images/ckpt.pt                     # go on after Ctrl-C as if uninterrupted
    python ddpm_images.py --sample 64 --ckpt out/ddpm_images/model.safetensors --sampler ddpm --sample_steps 1000
    python ddpm_images.py --condition gray            # colourise; also lowres, edges, mask; then apply it to a folder:
    python ddpm_images.py --sample 8 --input my_photos --ckpt out/ddpm_images/model.safetensors
    torchrun --nproc_per_node=8 ddpm_images.py --data animal_faces
    python ddpm_images.py --schedule linear --pred eps --min_snr 0 --sample_steps 1000     # the choices of the paper

Expected, first line: 254 s on two cores (shared AMD EPYC with bf16, torch 2.13.0), the final grid after 249 s, loss
0.0050, val_loss 0.0047; 95.5 % of its faces are one species to a classifier (README.md). GPU: not measured yet.
Writes out/ddpm_images/: ckpt.pt, model.safetensors, log.jsonl, loss.png, samples/, forward.png, reverse.gif,
training.gif, interpolation.png; with --sample generated/ and generated.png. A new run renames the first three of an
old one to *.old, and replaces the rest.

Papers: DDPM 2006.11239, improved DDPM 2102.09672, DDIM 2010.02502, v-prediction 2202.00512, min-SNR 2303.09556,
ADM (UNet) 2105.05233, classifier-free guidance 2207.12598, DPM-Solver++ 2211.01095.
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
from PIL import Image, ImageDraw, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# -----------------------------------------------------------------------------
# Knobs. A preset fills in what is not given by hand; --help shows the values of the one in force.

PRESETS = {
    "cpu": dict(size=64, patch=4, width=64, mults="1,2,2", blocks=1, attn=8, dropout=0.0, pred="x0", min_snr=0.5,
                steps=1700, batch_size=32, lr=1e-3, ema_decay=0.999, eval_every=425, sample_steps=50,
                compile=False),
    "gpu": dict(size=64, patch=1, width=128, mults="1,2,3,4", blocks=2, attn=16, dropout=0.1, pred="v", min_snr=5.0,
                steps=100_000, batch_size=128, lr=2e-4, ema_decay=0.9999, eval_every=2500, sample_steps=250,
                compile=True),
    "smoke": dict(out="out/smoke", size=32, patch=4, width=32, mults="1,2", blocks=1, attn=4, dropout=0.0, pred="x0",
                  min_snr=0.5, steps=2, batch_size=16, lr=1e-3, ema_decay=0.99, eval_every=1, sample_steps=4,
                  compile=False),
}
SCHEDULES = ["cosine", "linear"]
PREDICTIONS = ["eps", "v", "x0"]
SAMPLERS = ["ddpm", "ddim", "dpmpp_2m"]
CONDITION_CHANNELS = {"none": 0, "lowres": 3, "gray": 1, "edges": 1, "mask": 4}


def parse_args(argv=None):
    """The settings: flags given by hand, then the preset's. Wrong ones end the script with a sentence and status 2."""
    argv = sys.argv[1:] if argv is None else argv

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    class Parser(argparse.ArgumentParser):
        def error(self, sentence):  # argparse would print the whole usage first
            self.exit(2, f"{self.prog}: {sentence}; --help lists every flag\n")

    early = Parser(prog="ddpm_images.py", add_help=False, allow_abbrev=False)  # the preset decides the other defaults
    early.add_argument("--preset")
    early.add_argument("--device", default="auto")
    early.add_argument("--smoke", action=argparse.BooleanOptionalAction)
    known = early.parse_known_args(argv)[0]
    preset = known.preset or ("gpu" if pick_device(known.device).type == "cuda" else "cpu")
    p = Parser(prog="ddpm_images.py", description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction
    g = p.add_argument_group("data")
    g.add_argument("--data", metavar="drawn_faces|animal_faces|FOLDER|.zip|.npz", default="drawn_faces",
                   help="what to learn")
    g.add_argument("--size", type=int, help="pixels a side")
    g.add_argument("--flip", action=flag, default=True, help="mirror half of the training pictures")
    g.add_argument("--class_cond", action=flag, default=False, help="condition on the class: sub-folder or species")
    g.add_argument("--condition", choices=list(CONDITION_CHANNELS), default="none",
                   help="translate pictures: enlarge, colour, edges to photo, fill a hole")
    g = p.add_argument_group("model")
    g.add_argument("--width", type=int, help="channels of a hidden layer; of a UNet, at full size")
    g.add_argument("--mults", help="channel multiplier of each resolution; the side halves from one to the next")
    g.add_argument("--blocks", type=int, help="residual blocks per resolution")
    g.add_argument("--attn", type=int, help="self-attention where the feature map has at most this side")
    g.add_argument("--patch", type=int, help="the UNet takes patches of this side for one position each; 1 = pixels")
    g.add_argument("--dropout", type=float, help="dropout inside the residual blocks")
    g = p.add_argument_group("diffusion")
    g.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="how alpha_bar falls from 1 to 0")
    g.add_argument("--pred", choices=PREDICTIONS, help="what the network predicts")
    g.add_argument("--min_snr", type=float, help="gamma of min-SNR loss weights (the paper: 5); 0 = off")
    g = p.add_argument_group("training")
    g.add_argument("--preset", choices=["cpu", "gpu"], default=preset, help="sizes, settings; by device unless given")
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
    g.add_argument("--input", metavar="FOLDER", help="with --sample: the pictures to start from")
    g.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="how noise becomes data")
    g.add_argument("--sample_steps", type=int, help="steps from noise to data")
    g.add_argument("--eta", type=float, default=0.0, help="noise that ddim adds back: 0 = none, 1 = as much as ddpm")
    g.add_argument("--cfg_scale", type=float, default=1.0, help="strength of classifier-free guidance; 1 = off")
    g = p.add_argument_group("output and system")
    g.add_argument("--out", default="out/ddpm_images", help="folder for everything that a run writes")
    g.add_argument("--seed", type=int, default=0, help="seed of all randomness")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    g.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto",
                   help="arithmetic of the network; what is trained is always fp32")
    g.add_argument("--compile", action=flag, help="torch.compile the network")
    g.add_argument("--smoke", action=flag, default=False, help="two steps of a tiny model, then reload it and sample")
    p.set_defaults(**PRESETS["smoke" if known.smoke else preset if preset in PRESETS else "cpu"])
    args = p.parse_args(argv)
    if all(m.isdecimal() for m in args.mults.split(",")):
        args.mults = [int(m) for m in args.mults.split(",")]
    args.given = {a.dest for a in p._actions for o in a.option_strings for w in argv if w == o or w.startswith(o + "=")}
    check(args, p.error)
    return args


def check(args, error):
    """Calls error(sentence) for settings that cannot be, given by hand or found in a checkpoint."""
    for name in "size width blocks patch steps batch_size accum eval_every sample_steps sample".split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            error(f"--{name} has to be at least 1")
    for name in "lr ema_decay dropout eta min_snr cfg_scale seed".split():
        top = 1 if name in ("ema_decay", "dropout", "eta") else 2 ** 63
        if not 0 <= getattr(args, name) <= top:
            error(f"--{name} has to lie between 0 and {'1' if top == 1 else '2^63'}")
    if not args.mults or not all(isinstance(m, int) and m > 0 for m in args.mults):
        error("--mults takes positive whole numbers with commas between, such as 1,2,2")
    unit = args.patch * 2 ** (len(args.mults) - 1)
    if args.size % unit:
        error(f"--size has to be a multiple of {unit}: patches of {args.patch}, halved {len(args.mults) - 1} times")
    if args.width % 32:
        error("--width has to be a multiple of 32, the channels of an attention head")
    if args.sample_steps > T:
        error(f"--sample_steps can be at most T = {T}")
    if Path(args.out).is_file():
        error(f"--out {args.out} is a file; it has to be a folder, or nothing yet")
    out = Path(args.out).resolve()
    if Path(args.data).is_dir() and Path(args.data).resolve() in (out, *out.parents):
        error(f"--out {args.out} lies in --data {args.data}: its pictures would be learnt the next time")
    if bool(args.sample) != bool(args.ckpt) or args.sample and args.resume or args.input and not args.sample:
        error("--sample N and --ckpt FILE go together (and --input FOLDER with them); to go on training use --resume")
    for name in "data flip steps batch_size accum lr ema_decay eval_every compile min_snr".split():
        if args.sample and name in args.given:
            error(f"--{name} is for training" + ("; for drawing say --sample_steps" if name == "steps" else ""))
    if args.condition == "lowres" and args.size % 4:
        error("--size has to be a multiple of 4 with --condition lowres, which sees a quarter of it")
    for name, choices in (("condition", CONDITION_CHANNELS), ("schedule", SCHEDULES), ("pred", PREDICTIONS),
                          ("sampler", SAMPLERS)):
        if getattr(args, name) not in choices:
            error(f"--{name} is one of {', '.join(choices)}")


def check_eta(args):
    """Raises Stop for an --eta without a use. Not in check: the eta of a checkpoint may meet another sampler."""
    if "eta" in args.given and args.sampler != "ddim":
        raise Stop("--eta is for --sampler ddim; ddpm is ddim with eta 1")


# -----------------------------------------------------------------------------
# The method. x0 is a clean picture in [-1, 1], eps Gaussian noise, t = 0..T-1 the noise level, alpha_bar[t] how much
# of x0 is left at t: xt = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps. A model is any (xt, t) -> out, shaped like xt.
# To train: take a picture, any t and fresh noise, mix xt, and let the model guess what was mixed. To sample: begin with
# pure noise at T-1, let it guess x0, go a step towards that, to a slightly cleaner xt, and repeat.

T = 1000


def make_alpha_bar(schedule):
    """alpha_bar (T,) in float64, the product of 1 - beta. linear: DDPM section 4; cosine: 2102.09672 eq. 17."""
    if schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    elif schedule == "cosine":
        f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"no schedule {schedule}")
    return torch.cumprod(1 - beta, 0)


def add_noise(x0, eps, ab):
    """The forward process in one leap, q(xt | x0), DDPM eq. 4; ab = alpha_bar[t], a number or one of each example."""
    return ab ** 0.5 * x0 + (1 - ab) ** 0.5 * eps


def to_x0(out, xt, ab, pred):
    """The clean picture that the network's output stands for, add_noise solved for x0. The output is the noise (eps,
    DDPM), the picture (x0), or a mix of both that has something to tell at every t (v)."""
    if pred == "eps":
        return (xt - (1 - ab) ** 0.5 * out) / ab ** 0.5
    if pred == "v":  # from out = sqrt(ab) eps - sqrt(1 - ab) x0
        return ab ** 0.5 * xt - (1 - ab) ** 0.5 * out
    return out


def loss_fn(model, x0, eps, t, alpha_bar, pred, min_snr=0.0):
    """Mean squared error of the prediction, DDPM eq. 14: x0, eps (B, C, H, W), t (B,) -> (B,).

    SNR = alpha_bar / (1 - alpha_bar), signal to noise, is large where there is little noise. min_snr > 0 weights the
    error of x0 by min(SNR, min_snr), 2303.09556. An error in eps is one of x0 times SNR, one in v times SNR + 1."""
    ab = alpha_bar[t].view(-1, 1, 1, 1)
    snr, ab = (ab / (1 - ab)).to(x0.dtype), ab.to(x0.dtype)
    out = model(add_noise(x0, eps, ab), t).to(x0.dtype)
    v_pred_target = ab ** 0.5 * eps - (1 - ab) ** 0.5 * x0  # 2202.00512 appendix D
    target, per_x0 = {"eps": (eps, snr), "v": (v_pred_target, snr + 1), "x0": (x0, torch.ones_like(snr))}[pred]
    weight = snr.clamp(max=min_snr) / per_x0 if min_snr > 0 else torch.ones_like(snr)
    return (weight * (out - target) ** 2).mean((1, 2, 3))


@torch.no_grad()
def sample(model, noise, alpha_bar, pred, sampler, steps, eta=0.0, on_step=None):
    """From noise to pictures (B, C, H, W) in `steps` network calls, evenly spaced in t from T-1 to 0.

    noise: iterator over (B, C, H, W); its first item is x_T, the others are for the samplers that add noise.
    on_step(t, xt, x0) is called after each network call. All coefficients are float64 numbers."""
    xt, x0_old, lam_old, ab = next(noise), None, None, alpha_bar.tolist() + [1.0]
    levels = np.linspace(T - 1, 0, steps).round().astype(int).tolist()
    for t, s in zip(levels, levels[1:] + [-1]):          # from level t to the cleaner level s; -1 is clean
        ab_t, ab_s = ab[t], ab[s]
        out = model(xt, torch.full((len(xt),), t, device=xt.device)).to(xt.dtype)
        x0 = to_x0(out, xt, ab_t, pred).clamp(-1, 1)     # differs from the paper: pictures live in [-1, 1]
        if on_step:
            on_step(t, xt, x0)
        if s < 0:
            return x0
        beta = 1 - ab_t / ab_s                           # variance of the noise between s and t
        var = beta * (1 - ab_s) / (1 - ab_t)             # of q(xs | xt, x0): DDPM's "beta tilde", section 3.2
        if sampler == "ddpm":                            # posterior mean plus a draw: DDPM eq. 6, 7, algorithm 2
            mean = (ab_s ** 0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - ab_s) * xt) / (1 - ab_t)
            xt = mean + var ** 0.5 * next(noise)
        elif sampler == "ddim":                          # same marginals, eta times that noise: DDIM eq. 12
            eps = (xt - ab_t ** 0.5 * x0) / (1 - ab_t) ** 0.5
            xt = ab_s ** 0.5 * x0 + (1 - ab_s - eta ** 2 * var) ** 0.5 * eps
            if eta > 0:
                xt = xt + eta * var ** 0.5 * next(noise)
        else:                                            # dpmpp_2m: a line through two x0; 2211.01095 algorithm 2
            lam = 0.5 * math.log(ab_t / (1 - ab_t))      # log of signal over noise
            h = 0.5 * math.log(ab_s / (1 - ab_s)) - lam
            ahead = 0 if x0_old is None else 0.5 * h / (lam - lam_old) * (x0 - x0_old)
            xt = ((1 - ab_s) / (1 - ab_t)) ** 0.5 * xt - ab_s ** 0.5 * math.expm1(-h) * (x0 + ahead)
            x0_old, lam_old = x0, lam


def guided(model, y, cond, cfg_scale):
    """model with labels y and condition cond (or None) as (xt, t) -> out. cfg_scale is 1 + w of 2207.12598."""
    def call(xt, t):
        if y is None or cfg_scale == 1:
            return model(xt, t, y, cond)
        twice = [None if a is None else torch.cat([a, a]) for a in (xt, t, cond)]
        labels = torch.cat([y, torch.full_like(y, model.y_null)])
        out = model(twice[0], twice[1], labels, twice[2]).to(xt.dtype)  # bf16 is too coarse for a difference
        with_y, without = out.chunk(2)
        return without + cfg_scale * (with_y - without)
    return call


def make_condition(kind, x0, box=None):
    """What picture translation sees of x0 (B, 3, H, W) -> (B, K, H, W) in [-1, 1], or None.

    lowres: a quarter of the side; gray: luma; edges: Sobel slope; mask: x0 with a hole, and where the hole is.
    box (B, 4) in [0, 1]: place and size of the hole; without it, the middle half."""
    if kind == "none":
        return None
    if kind == "lowres":
        return F.interpolate(F.avg_pool2d(x0, 4), scale_factor=4.0, mode="bilinear")
    if kind == "mask":
        box = torch.full((len(x0), 4, 1), 0.5).to(x0) if box is None else box[:, :, None].to(x0)
        side = 0.25 + 0.5 * box[:, 2:]                                            # (B, 2, 1), shares of the picture
        low = box[:, :2] * (1 - side)
        high = low + side
        at = [(torch.arange(n, device=x0.device) + 0.5) / n for n in x0.shape[2:]]
        row, col = ((low[:, i] <= at[i]) & (at[i] < high[:, i]) for i in (0, 1))  # (B, H), (B, W)
        hole = (row[:, :, None] & col[:, None, :])[:, None].to(x0.dtype)          # (B, 1, H, W)
        return torch.cat([x0 * (1 - hole), 2 * hole - 1], 1)
    gray = (x0 * x0.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    if kind == "gray":
        return gray
    sobel = x0.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    slope = F.conv2d(F.pad(gray, (1, 1, 1, 1), mode="replicate"), torch.stack([sobel, sobel.T])[:, None])
    return (2 * slope.square().sum(1, keepdim=True).sqrt() - 1).clamp(max=1)


# -----------------------------------------------------------------------------
# The model: a UNet after ADM's (2105.05233), on pixels or on patches, with label and condition as extras.


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v of (B, heads, N, d). Among few tokens a CPU is 1.4 times as fast with the plain
    products as with its fused kernel, whose backward is slow; among many they would fill the memory."""
    if q.device.type == "cpu" and q.shape[2] <= 256:
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Self-attention over the positions of a feature map, in heads of 32 channels; starts as the identity."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.GroupNorm(32, c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x):                                                        # (B, C, H, W)
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, C // 32, 32, H * W)           # (B, 3, heads, 32, N)
        q, k, v = qkv.transpose(-1, -2).unbind(1)                                # (B, heads, N, 32) each
        out = attend(q, k, v)                                                    # (B, heads, N, 32)
        return x + self.proj(out.transpose(-1, -2).reshape(B, C, H, W))          # (B, C, H, W)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the embedding scales and shifts the second norm (FiLM; ADM section 3)."""

    def __init__(self, c_in, c_out, c_emb, attn, dropout):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.film = nn.Linear(c_emb, 2 * c_out)
        self.norm2, self.conv2 = nn.GroupNorm(32, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attn = Attention(c_out) if attn else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # a block starts as its skip connection, so that deep nets train at once
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, emb):                                                   # (B, c_in, H, W), (B, c_emb)
        h = self.conv1(F.silu(self.norm1(x)))                                    # (B, c_out, H, W)
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)              # (B, c_out, 1, 1) each
        h = F.silu(self.norm2(h) * (1 + scale) + shift)                          # (B, c_out, H, W)
        return self.attn(self.skip(x) + self.conv2(self.dropout(h)))             # (B, c_out, H, W)


def waves(t, width):
    """Sinusoidal features of times t (B,) in 0..T-1, (B, width), 1706.03762 section 3.5."""
    freq = torch.exp(-math.log(10_000) / (width // 2) * torch.arange(width // 2, device=t.device))
    angle = t[:, None] * freq
    return torch.cat([angle.cos(), angle.sin()], 1)


class UNet(nn.Module):
    """(xt, t, y, cond) -> out. xt (B, 3, H, W), t (B,) in 0..T-1, y (B,) labels, cond (B, c_cond, H, W).

    With patch > 1 the UNet works on patches, patch^2 times cheaper. A thin path of two convolutions at full
    resolution, from its input past it to its output, hides the seams between the patches.
    # differs from the paper: heads of 32 channels, not 64; single convolutions between the resolutions; as many blocks
    # and skips on the way up as on the way down, not one more. All of it is faster."""

    def __init__(self, size, patch, width, mults, blocks, attn, dropout, n_classes=0, c_cond=0):
        super().__init__()
        c, side, D, c_thin = width, size // patch, 4 * width, 8 if patch > 1 else 0
        self.width, self.patch, self.y_null = width, patch, n_classes  # the label after the last means "no label"
        self.time = nn.Sequential(nn.Linear(width, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Embedding(n_classes + 1, D) if n_classes else None
        self.thin_in = nn.Conv2d(3 + c_cond, c_thin, 3, padding=1) if patch > 1 else nn.Identity()
        self.conv_in = nn.Conv2d((c_thin or 3 + c_cond) * patch ** 2, c, 3, padding=1)
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), []
        for i, mult in enumerate(mults):
            for _ in range(blocks):
                self.down.append(ResBlock(c, width * mult, D, side <= attn, dropout))
                c = width * mult
                skips.append(c)
            if i < len(mults) - 1:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                side //= 2
        self.mid = nn.ModuleList([ResBlock(c, c, D, True, dropout), ResBlock(c, c, D, False, dropout)])
        for i, mult in reversed(list(enumerate(mults))):
            for _ in range(blocks):
                self.up.append(ResBlock(c + skips.pop(), width * mult, D, side <= attn, dropout))
                c = width * mult
            if i > 0:
                below, c = c, width * mults[i - 1]
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(below, c, 3, padding=1)))
                side *= 2
        self.norm = nn.GroupNorm(32, c)
        self.conv_out = nn.Conv2d(c, (c_thin or 3) * patch ** 2, 3, padding=1)
        self.thin_out = nn.Conv2d(2 * c_thin, 3, 3, padding=1) if patch > 1 else nn.Identity()
        last = self.thin_out if patch > 1 else self.conv_out
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def embed(self, t, y):                                                       # (B,), (B,) or None
        emb = self.time(waves(t, self.width).to(self.time[0].weight.dtype))      # (B, D)
        if self.label is None:
            return emb
        return emb + self.label(torch.full(t.shape, self.y_null, device=t.device) if y is None else y)

    def forward(self, xt, t, y=None, cond=None):                                 # (B, 3, H, W), (B,)
        return self.body(xt if cond is None else torch.cat([xt, cond], 1), F.silu(self.embed(t, y)))

    def body(self, x, emb):                                                      # (B, 3 + c_cond, H, W), (B, D)
        thin = self.thin_in(x)                                                   # (B, c_thin, H, W)
        h = self.conv_in(F.pixel_unshuffle(thin, self.patch))                    # (B, width, H / patch, W / patch)
        skips = []
        for layer in self.down:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
                skips.append(h)
            else:
                h = layer(h)                                                     # half the side
        for layer in self.mid:
            h = layer(h, emb)                                                    # the lowest resolution
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], 1), emb) if isinstance(layer, ResBlock) else layer(h)
        h = F.pixel_shuffle(self.conv_out(F.silu(self.norm(h))), self.patch)     # (B, c_thin, H, W)
        return self.thin_out(torch.cat([F.silu(h), thin], 1)) if self.patch > 1 else h


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

ARCHITECTURE = "size patch width mults blocks attn dropout class_cond condition schedule pred".split()
FREE_ON_RESUME = "data steps lr out eval_every device dtype compile accum sampler sample_steps eta cfg_scale".split()
P_UNCOND = 0.1  # share of labels or texts that training hides: one network learns both sides of the guidance


def build_model(args, n_classes):
    """The UNet that the flags describe."""
    if args.cfg_scale != 1 and not args.class_cond:
        raise Stop("--cfg_scale needs a model that knows classes, trained with --class_cond")
    return UNet(args.size, args.patch, args.width, args.mults, args.blocks, args.attn, args.dropout,
                n_classes if args.class_cond else 0, CONDITION_CHANNELS[args.condition])


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


def train_batch(data, args, step, device, rank, world):
    """Pictures and all randomness of one step -> x0, eps, t, y, box, of which each rank gets its share.

    Drawn for the whole batch from (seed, step), so that any number of processes trains on the same numbers."""
    B, g = args.batch_size, torch.Generator().manual_seed(mix(BATCH, args.seed, step))
    mine, n = slice(B * rank // world, B * (rank + 1) // world), len(data.train)
    t, u = torch.randint(0, T, (B,), generator=g)[mine], torch.rand((B, 6), generator=g)[mine]  # mirror, hide y, box
    g = torch.Generator(device).manual_seed(mix(NOISE, args.seed, step))
    eps = torch.randn((B, 3, args.size, args.size), generator=g, device=device)[mine]
    places = range(step * B + mine.start, step * B + mine.stop)  # in the endless list of shuffled epochs
    i = data.train[[shuffled(n, args.seed, k // n)[k % n] for k in places]]
    y = torch.where(u[:, 1] < P_UNCOND, len(data.classes), torch.from_numpy(data.labels[i]))
    x0, (t, u, y) = load_pictures(data.images, i, device), (to_device(a, device) for a in (t, u, y))
    if args.flip:
        x0 = torch.where(u[:, 0].view(-1, 1, 1, 1) < 0.5, x0.flip(-1), x0)
    return x0, eps, t, y if args.class_cond else None, u[:, 2:]


def train_step(model, opt, batch, args, alpha_bar, amp):
    """One optimizer step on batch = (x0, eps, t, y, box), DDPM algorithm 1 -> the loss, left on the device."""
    total = 0
    for k in range(args.accum):
        x0, eps, t, y, box = (None if a is None else a.chunk(args.accum)[k] for a in batch)
        if dist.is_initialized():
            model.require_backward_grad_sync = k == args.accum - 1  # gradients are averaged once per step
        call = functools.partial(model, y=y, cond=make_condition(args.condition, x0, box))
        with amp():
            loss = loss_fn(call, x0, eps, t, alpha_bar, args.pred, args.min_snr).mean() / args.accum
        loss.backward()
        total += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
    return total


@torch.no_grad()
def validate(model, data, args, alpha_bar, device, rank, world, amp):
    """Loss on the held-out pictures at fixed noise and evenly spread t -> the mean, and the mean by tenths of T."""
    total, n = torch.zeros(2, 10, dtype=torch.float64), len(data.val)
    mine = np.arange(n)[rank::world]
    for i in (mine[k:k + 64] for k in range(0, len(mine), 64)):
        t = torch.from_numpy((i * T + T // 2) // n).to(device)
        x0, y = load_pictures(data.images, data.val[i], device), torch.from_numpy(data.labels[data.val[i]]).to(device)
        eps = next(image_noise(args.seed + 1, i, x0.shape[1:], device))
        call = functools.partial(model, y=y if args.class_cond else None, cond=make_condition(args.condition, x0))
        with amp():
            loss = loss_fn(call, x0, eps, t, alpha_bar, args.pred, args.min_snr).cpu().double()
        total += torch.stack([torch.bincount(t.cpu() * 10 // T, w, 10) for w in (loss, torch.ones_like(loss))])
    total = sum_over_ranks(total.float().to(device)).cpu()
    bins = [loss / count if count else None for loss, count in zip(*total.tolist())]  # None: no picture fell into it
    return (total[0].sum() / total[1].sum()).item(), bins


def generate(model, args, alpha_bar, indices, device, y=None, cond=None, noise=None, on_step=None):
    """Samples number `indices` (len, 3, size, size), a function of (seed, index) alone at any batch size."""
    noise = noise or image_noise(args.seed, indices, (3, args.size, args.size), device)
    with torch.autocast(device.type, torch.bfloat16, enabled=pick_dtype(args.dtype, device) == torch.bfloat16):
        return sample(guided(model, y, cond, args.cfg_scale), noise, alpha_bar, args.pred, args.sampler,
                      args.sample_steps, args.eta, on_step)


def save_grid(path, x, cond, x0):
    """Samples x (B, 3, H, W) as one picture; in translation each stands between what it was given and what it was."""
    columns = max(1, int(len(x) ** 0.5))
    if cond is not None:
        x, columns = torch.stack([cond[:, :3].expand(-1, 3, -1, -1), x, x0], 1).flatten(0, 1), 9
    save_png(path, tile(to_uint8(x), columns))


def draw_pictures(out, ema, data, args, alpha_bar, device, y, cond):
    """What a finished run shows: forward.png, reverse.gif, interpolation.png, training.gif."""
    x0, levels = load_pictures(data.images, data.val[:6], device), [0, 50, 100, 200, 400, 600, 800, 999]
    eps = next(image_noise(args.seed, range(len(x0)), x0.shape[1:], device))
    steps = torch.stack([add_noise(x0, eps, alpha_bar[t].item()) for t in levels], 1)    # (6, levels, 3, H, W)
    save_png(out / "forward.png", tile(to_uint8(steps.flatten(0, 1)), len(levels)))

    frames, n = [], 16
    y, cond = (None if c is None else c[torch.arange(n, device=device) % len(c)] for c in (y, cond))
    generate(ema, args, alpha_bar, range(n), device, y, cond, on_step=lambda t, xt, x0: frames.append(
        np.concatenate([tile(to_uint8(x), 4) for x in (xt, x0)], 1)))                    # noisy left, its guess right
    k = -(-len(frames) // 25)                                                            # at most 25 of them
    save_gif(out / "reverse.gif", frames[(len(frames) - 1) % k::k])

    a, b = next(image_noise(args.seed, range(8), x0.shape[1:], device)).chunk(2)
    angle = torch.linspace(0, math.pi / 2, 8, device=device).view(1, -1, 1, 1, 1)        # a path of constant variance
    between = (angle.cos() * a[:, None] + angle.sin() * b[:, None]).flatten(0, 1)
    still = argparse.Namespace(**{**vars(args), "sampler": "ddim", "eta": 0.0})          # no noise on the way
    y, cond = (None if c is None else c[:4].repeat_interleave(8, 0) for c in (y, cond))
    x = generate(ema, still, alpha_bar, None, device, y, cond, iter([between]))
    save_png(out / "interpolation.png", tile(to_uint8(x), 8))
    grids = sorted(out.glob("samples/" + "[0-9]" * 6 + ".png"))
    save_gif(out / "training.gif", [np.asarray(Image.open(p)) for p in grids], 500)


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


def train(args):
    """The whole run. All randomness follows from (seed, step): a run that was cut goes on bit for bit, on the CPU."""
    began, state = time.time(), None
    if args.resume:
        state = load_checkpoint(args.resume, "ddpm_images.py")
        keep = {"given", "resume"} | args.given & set(FREE_ON_RESUME)
        adopt(args, state["args"], vars(args).keys() - keep, args.resume)
        if "out" not in args.given:
            args.out = str(Path(args.resume).parent)  # where it lies now: the folder may have been renamed
    check_eta(args)
    device, rank, world = setup(args)  # the device, too, is the checkpoint's unless given
    say = functools.partial(print, flush=True) if rank == 0 else lambda *a, **k: None
    if args.batch_size % (world * args.accum):
        raise Stop(f"--batch_size {args.batch_size} has to be a multiple of {world} processes x --accum {args.accum}")
    prepare = functools.partial(prepare_data, args.data, args.size, 256 if args.smoke else DRAWN_FACES)
    data = shared_data(prepare, rank, world)
    if data.broken:
        say(f"left out, because they cannot be read: {len(data.broken)}: " + "; ".join(data.broken[:9]))
    if state and state["key"] != data.key:
        raise Stop(f"--data {args.data} is not what {args.resume} was trained on: the pictures "
                   "or their dates have changed, or the code that reads them")
    if args.class_cond and len(data.classes) < 2:
        raise Stop("--class_cond needs pictures in at least two sub-folders (or an .npz with labels)")

    torch.manual_seed(mix(INIT, args.seed))
    model = build_model(args, len(data.classes)).to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)  # not on the CPU: GroupNorm is 20 times slower there
    ema, start, best = copy.deepcopy(model).eval().requires_grad_(False), 0, math.inf
    opt = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.99), weight_decay=0.01, fused=device.type != "mps")
    if state:
        start, best = restore(state, model, ema, opt, args)
    raw_model = model
    if args.compile:
        raw_model.compile()
    if world > 1:
        model = DistributedDataParallel(raw_model, device_ids=[device] if device.type == "cuda" else None)

    out, dtype = Path(args.out), pick_dtype(args.dtype, device)
    alpha_bar = make_alpha_bar(args.schedule).to(device, None if device.type != "mps" else torch.float32)
    settings = {k: v for k, v in vars(args).items() if k != "given"}
    amp = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    log_every, n_show = max(1, min(50, args.steps // 50)), 64
    shown = load_pictures(data.images, data.val[:n_show], device)
    n_show = len(shown) if args.condition != "none" else n_show
    cond = make_condition(args.condition, shown)
    y = torch.arange(n_show, device=device) % len(data.classes) if args.class_cond else None
    peak = peak_flops(device)
    if peak:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            ema(shown[:1], torch.zeros(1, dtype=torch.long, device=device), None, None if cond is None else cond[:1])
        flops = 3 * counter.get_total_flops()  # forward once, backward twice; 2 per multiply-add
    own_folder = state is not None and Path(args.resume).resolve().parent == out.resolve()
    log = begin_log(out, start, resumed=own_folder) if rank == 0 else []
    began -= log[-1]["seconds"] if log else 0  # a resumed run counts on
    say(f"{data.name}: {len(data.train)} pictures to train on, {len(data.val)} held out; {device} x {world}, "
        f"{str(dtype)[6:]}; {sum(p.numel() for p in ema.parameters()) / 1e6:.1f}M parameters; writes to {out}")
    say("settings: " + " ".join(f"{k}={v}" for k, v in settings.items()))

    def save(step):
        if rank == 0:
            ckpt = dict(script="ddpm_images.py", args=settings, step=step, data=data.name, key=data.key, best=best,
                        model=raw_model.state_dict(), ema=ema.state_dict(), opt=opt.state_dict())
            write_atomically(out / "ckpt.pt", functools.partial(torch.save, ckpt))
            save_safetensors(out / "model.safetensors", ema.state_dict(), dict(
                format="pt", script="ddpm_images.py", kind="unet", args=json.dumps(settings),
                data=json.dumps(dict(name=data.name, key=data.key, classes=data.classes, step=step))))

    def write_record(step, record):
        if rank == 0:
            record = dict(data=data.name, step=step, **record, seconds=time.time() - began, peak_gb=peak_memory(device))
            log.append(record)
            with open(out / "log.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")
            if bar.disable or "val_loss" in record:
                tqdm.write("  ".join(f"{k} {record[k]:.{d}f}" for k, d in dict(
                    step=0, loss=4, val_loss=4, img_per_s=0, mfu=3, seconds=0).items() if k in record))
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
            if not loss < 100:  # also true of NaN; a network that has learnt nothing yet has a loss of about 1
                raise Stop(f"the loss is {loss:.3g} at step {step}: training diverged at --lr {args.lr}; lower it", 1)
            record.update(loss=loss, lr=opt.param_groups[0]["lr"], img_per_s=rate)
            if peak:
                record["mfu"] = flops * rate / world / peak
            bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} img/s")
            loss_sum.zero_()
            seen, clock = 0, time.time()

        # once in a while: validation loss, checkpoint, sample grid
        if evaluate:
            val, bins = validate(ema, data, args, alpha_bar, device, rank, world, amp)
            if not val < 100:  # the last step spoilt the weights: the checkpoint before it is better
                raise Stop(f"the validation loss is {val:.3g} at step {step}: diverged at --lr {args.lr}; lower it", 1)
            best = min(best, val)
            record.update(val_loss=val, val_bins=bins)
            if step > 0:  # at 0 nothing is learnt, and an earlier run's .old files must not make way for that
                save(step)
            if rank == 0:
                x = generate(ema, args, alpha_bar, range(n_show), device, y, cond)
                save_grid(out / f"samples/{step:06d}.png", x, cond, shown)
            clock = time.time()
        if record:
            write_record(step, record)
        if stop:
            if not evaluate:
                save(step)
            raise Stop(f"stopped at step {step}; go on: {'torchrun ...' if world > 1 else 'python'} ddpm_images.py "
                       f"--resume {out / 'ckpt.pt'}", [*noted, 130][0])
        if last:
            break

        # one step: data, noise and t from (seed, step); the loss, its gradient, AdamW, the moving average
        for group in opt.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 50)  # warm-up, while Adam's averages settle
        torch.manual_seed(mix(DROPOUT, args.seed, rank, step))
        batch = train_batch(data, args, step, device, rank, world)
        loss_sum += train_step(model, opt, batch, args, alpha_bar, amp)
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
        draw_pictures(out, ema, data, args, alpha_bar, device, y, cond)
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
    tensors, saved, data = read_model(args.ckpt, "ddpm_images.py")
    sampling = {"sampler", "sample_steps", "eta", "cfg_scale"}  # as in training, unless given
    adopt(args, saved, ARCHITECTURE + sorted(sampling - args.given), args.ckpt)
    check_eta(args)
    classes = data.get("classes") if isinstance(data, dict) else None
    if not isinstance(classes, list) or args.class_cond and len(classes) < 2:
        raise Stop(f"{args.ckpt} does not say what its classes were; has it been edited?")
    model = build_model(args, len(classes)).to(device).eval().requires_grad_(False)
    load_weights(model, tensors, args.ckpt)
    if (args.condition == "none") != (args.input is None):
        raise Stop(f"{args.ckpt} " + ("draws from noise alone, so --input has no use" if args.input else
                                      f"translates pictures ({args.condition}): name some with --input FOLDER"))
    n, pictures = args.sample, None
    if args.input:
        source = Pictures(args.input, args.size)
        n = min(n, len(source))
        pictures = [source[i] for i in range(n)]
        wrong = [p for p, label in pictures if label < 0]
        if wrong or not pictures:
            raise Stop(f"--input {args.input}: " + (f"cannot read {wrong[0]}" if wrong else "no pictures in it"))
        pictures = np.stack([p for p, _ in pictures])
    out = Path(args.out)
    part = begin_pictures(out, rank, device)
    began, alpha_bar, mine = time.time(), make_alpha_bar(args.schedule), np.array_split(np.arange(n), world)[rank]
    batches = [mine[k:k + 64] for k in range(0, len(mine), 64)]
    for i in tqdm(batches, "sampling", disable=True if rank else None):
        y = torch.as_tensor(i % len(classes), device=device) if args.class_cond else None
        x0 = None if pictures is None else load_pictures(pictures, i, device)
        cond = make_condition(args.condition, x0)
        x = generate(model, args, alpha_bar, i, device, y, cond)
        if not x.isfinite().all():
            raise Stop(f"{args.ckpt} draws NaN or infinity; did its training diverge?", 1)
        part.mkdir(parents=True, exist_ok=True)
        for j, picture in zip(i, to_uint8(x)):
            write_atomically(part / f"{j:06d}.png", lambda f: Image.fromarray(picture).save(f, "PNG"))
        if i[0] == 0:
            first = x, cond, x0
    sum_over_ranks(torch.zeros(1, device=device)).item()
    if rank == 0:
        earlier = publish(part, out / "generated")
        save_grid(out / "generated.png", *first)
        how = f"{args.sampler}, {args.sample_steps} steps"
        if args.class_cond:
            how += f", --cfg_scale {args.cfg_scale}, in turn " + " ".join(classes)
        print(f"{n}" + (f" of {args.sample}" if n < args.sample else "") + f" pictures in {out / 'generated'}"
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
                again += ["--input", "drawn_faces"] if args.condition != "none" else []
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
        sentence, code = "out of memory: raise --accum, or lower --batch_size or --width; for drawing lower --sample", 1
    if sentence:  # before the next line, which can wait for ranks that are gone
        print(f"ddpm_images.py: {sentence}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    status = main()
    if "RANK" in os.environ:  # threads of the process group can outlive the interpreter, which now and then aborts it
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
