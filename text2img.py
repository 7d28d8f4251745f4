"""Text to image: the diffusion transformer of latent_dit.py, told in words what to draw.

    python text2img.py                                # drawn animal faces and their captions: no download, no GPU
    python text2img.py --ckpt out/text2img/model.safetensors --prompt "a gray cat with green eyes on a blue background"
    python text2img.py --resume out/text2img/ckpt.pt           # go on after Ctrl-C as if uninterrupted
    python text2img.py --ckpt out/text2img/model.safetensors --prompt "a gray cat" "an orange fox" --interpolate 16
    python text2img.py --ckpt out/text2img/model.safetensors --prompt "a gray fox" --init_image fox.png --mask white.png
    python text2img.py --data my_photos --size 256 --vae sd --text clip --model M --patch_size 2     # with captions
    torchrun --nproc_per_node=8 text2img.py --preset gpu --data my_photos.zip

Expected, first line: 1,038 s on two cores of a shared Intel Xeon (torch 2.13.0), 312 s of them for the autoencoder and
the latents; two cores of an AMD EPYC train nearly twice as fast. Loss 0.313, val_loss 0.314; of 200 faces 199 have
species, fur, eyes and background as told (README.md). GPU: not measured yet.
Writes out/text2img/: ckpt.pt, model.safetensors, log.jsonl, loss.png, samples/, reconstruction.png, forward.png,
guidance.png, reverse.gif, training.gif; with --ckpt generated/, generated.png or interpolation.gif beside that file;
latents, the autoencoder that it trained and what CLIP reads in the captions in data/cache. A new run renames the first
three of an old one to *.old, and replaces the rest.

Here t = 0 is data and t = 1 noise, as in SD3 and FLUX; torchcfm and flow_matching write 1 - t for it and -v for v. A
tokenizer, as the field says, is the autoencoder of pictures; texts become tokens, too.
Papers: latent diffusion and cross-attention to a text 2112.10752, CLIP 2103.00020, DiT and adaLN-Zero 2212.09748, with
cross-attention 2310.00426 (PixArt), flow matching 2210.02747, logit-normal times and their shift 2403.03206 (SD3),
rotary positions 2104.09864, SwiGLU 2002.05202, RMSNorm 1910.07467, QK-norm 2302.05442, guidance 2207.12598 and its
interval 2404.07724.
"""
import argparse
import copy
import datetime
import functools
import hashlib
import http.client
import inspect
import io
import itertools
import json
import math
import mmap
import os
import posixpath
import re
import signal
import struct
import sys
import time
import unicodedata
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# -----------------------------------------------------------------------------
# Knobs. A preset fills in what is not given by hand; --help shows the values of the one in force.

SIZES = {"tiny": (6, 192, 3), "S": (12, 384, 6), "M": (12, 640, 10), "B": (12, 768, 12), "L": (24, 1024, 16)}
PRESETS = {  # SIZES: blocks, width, heads
    "cpu": dict(size=64, vae="tiny", vae_steps=3000, text="tiny", model="tiny", patch_size=1, steps=1000, batch_size=64,
                lr=1e-3, ema_decay=0.999, eval_every=500, sample_steps=50, cfg_scale=1.5, compile=False),
    "gpu": dict(size=256, vae="sd", vae_steps=10_000, text="clip", model="M", patch_size=2, steps=300_000,
                batch_size=256, accum=2, lr=3e-4, ema_decay=0.9999, eval_every=5000, sample_steps=50, cfg_scale=4.0,
                compile=True),
    "smoke": dict(out="out/smoke", size=32, vae="tiny", vae_steps=2, text="tiny", model="tiny", patch_size=1, steps=2,
                  batch_size=16, lr=1e-3, ema_decay=0.99, eval_every=1, sample_steps=4, cfg_scale=2.0, compile=False),
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

    early = Parser(prog="text2img.py", add_help=False, allow_abbrev=False)  # the preset decides the other defaults
    early.add_argument("--preset")
    early.add_argument("--device", default="auto")
    early.add_argument("--smoke", action=argparse.BooleanOptionalAction)
    known = early.parse_known_args(argv)[0]
    preset = known.preset or ("gpu" if pick_device(known.device).type == "cuda" else "cpu")
    p = Parser(prog="text2img.py", description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction
    g = p.add_argument_group("data")
    g.add_argument("--data", metavar="drawn_faces|animal_faces|FOLDER|.zip|.npz", default="drawn_faces",
                   help="what to learn")
    g.add_argument("--size", type=int, help="pixels a side")
    g.add_argument("--flip", action=flag, default=True, help="mirror half of the training pictures")
    g = p.add_argument_group("text, tokenizer and model")
    g.add_argument("--text", metavar="tiny|clip|FOLDER",
                   help="what reads the captions; tiny is trained along, clip is CLIP ViT-L/14")
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
    g.add_argument("--ckpt", metavar="FILE", help="the model.safetensors to sample from")
    g.add_argument("--prompt", nargs="+", metavar="TEXT", help="what to draw; several, or a .txt file with one a line")
    g.add_argument("--negative_prompt", default="", metavar="TEXT", help="what to keep away from, by guidance")
    g.add_argument("--sample", type=int, metavar="N", help="train nothing, draw N samples")
    g.add_argument("--init_image", metavar="FILE", help="begin with this picture instead of noise")
    g.add_argument("--strength", type=float, help="how much of --init_image is drawn anew, from 0, nothing, to 1, "
                   "all: the t at which drawing begins; default 0.6, with --mask 1")
    g.add_argument("--mask", metavar="FILE", help="as large as --init_image: only what is white in it is drawn anew")
    g.add_argument("--interpolate", type=int, metavar="FRAMES",
                   help="in place of pictures a GIF from each prompt to the next, of --sample noises side by side")
    g.add_argument("--sampler", choices=SAMPLERS, default="euler", help="how noise becomes data")
    g.add_argument("--sample_steps", type=int, help="steps from noise to data")
    g.add_argument("--cfg_scale", type=float, help="strength of classifier-free guidance; 1 = off")
    g.add_argument("--cfg_interval", type=float, nargs=2, default=[0.0, 1.0], metavar="T",
                   help="guide only from this t to that; 0 is data, 1 noise")
    g = p.add_argument_group("output and system")
    g.add_argument("--out", default="out/text2img", help="folder for everything that a run writes")
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
    for name in "size patch_size vae_steps steps batch_size accum eval_every sample_steps sample".split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            error(f"--{name} has to be at least 1")
    for name in "lr ema_decay cfg_scale seed".split():
        top = 1 if name == "ema_decay" else 2 ** 63
        if not 0 <= getattr(args, name) <= top:
            error(f"--{name} has to lie between 0 and {'1' if top == 1 else '2^63'}")
    if args.time_shift is not None and not 0.01 <= args.time_shift <= 100:
        error("--time_shift has to lie between 0.01 and 100")
    if args.interpolate is not None and args.interpolate < 2:
        error("--interpolate takes at least 2 frames")
    if args.strength is not None and not 0 <= args.strength <= 1:
        error("--strength has to lie between 0 and 1")
    if len(args.cfg_interval) != 2 or not 0 <= args.cfg_interval[0] <= args.cfg_interval[1] <= 1:
        error("--cfg_interval takes two times, 0 <= first <= second <= 1")
    if Path(args.out).is_file():
        error(f"--out {args.out} is a file; it has to be a folder, or nothing yet")
    out = Path(args.out).resolve()
    if Path(args.data).is_dir() and Path(args.data).resolve() in (out, *out.parents):
        error(f"--out {args.out} lies in --data {args.data}: its pictures would be learnt the next time")
    drawing = bool(args.sample or args.prompt)
    if drawing != bool(args.ckpt) or drawing and args.resume:
        error("--ckpt FILE goes with --prompt TEXT or --sample N; to go on training use --resume")
    for name in "data flip steps batch_size accum lr ema_decay eval_every compile vae_steps grad_checkpoint".split():
        if drawing and name in args.given:
            error(f"--{name} is for training" + ("; for drawing say --sample_steps" if name == "steps" else ""))
    for name in "negative_prompt init_image interpolate".split():
        if getattr(args, name) and not drawing:
            error(f"--{name} goes with --ckpt FILE --prompt TEXT")
    for name in "mask strength".split():
        if getattr(args, name) is not None and not args.init_image:
            error(f"--{name} goes with --init_image")
    told = args.resume or args.ckpt  # what is not given by hand is taken from there
    if "cfg_interval" in args.given and args.cfg_scale == 1 and not told:
        error("--cfg_interval without --cfg_scale changes nothing")
    if "vae_steps" in args.given and args.vae != "tiny" and not told:
        error("--vae_steps is for --vae tiny alone")
    for name, choices in (("model", SIZES), ("sampler", SAMPLERS)):
        if getattr(args, name) not in choices:
            error(f"--{name} is one of {', '.join(choices)}")


# -----------------------------------------------------------------------------
# The method: flow matching, as in latent_dit.py, told a text. z0 is what the tokenizer makes of a picture, with mean 0
# and variance 1, eps Gaussian noise, t in [0, 1] how far it is from the first to the second. A text is a triple txt,
# txt_mask, pooled, see below. A model is any (zt, t, text) -> velocity, shaped like zt.


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


def loss_fn(model, x0, eps, t, text):
    """Squared error of the velocity, 2210.02747 eq. 9: x0, eps (B, C, H, W), t (B,), text -> (B,)."""
    xt, v = path(x0, eps, t.view(-1, 1, 1, 1))
    return (model(xt, t, text) - v).square().mean((1, 2, 3))


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


def guided(model, text, text_null, cfg_scale, interval):
    """model told text, and kept away from text_null, as (xt, t) -> v. cfg_scale is 1 + w of 2207.12598; outside the
    interval of t, where guidance does harm or nothing (2404.07724), it is 1, for half the price."""
    def call(xt, t):
        if cfg_scale == 1 or not interval[0] - 1e-6 <= t[0].item() <= interval[1] + 1e-6:
            return model(xt, t, text)
        both = [torch.cat(pair) for pair in zip(text, text_null)]
        out = model(torch.cat([xt, xt]), torch.cat([t, t]), both).to(xt.dtype)  # bf16 is too coarse for a difference
        with_text, without = out.chunk(2)
        return without + cfg_scale * (with_text - without)
    return call


def between(one, other, share):
    """Two texts -> a batch of texts on the way from one to the other, by share (B,) from 0 to 1: both lie side by side,
    and each weighs less the further away it is, long or short. At 0 and 1 nothing is left of the other."""
    near, far = 1 - share.view(-1, 1), share.view(-1, 1)
    txt = torch.cat([one[0], other[0]], 1).expand(len(share), -1, -1)
    weights = torch.cat([near * one[1] / one[1].sum(), far * other[1] / other[1].sum()], 1)
    return txt, weights, near * one[2] + far * other[2]


def inpaint(model, mask, v_known):
    """model where mask (1, 1, h, w) is True. Elsewhere v_known = eps - z0, which leads straight from the noise to what
    was there; at each t that part is as noisy as path() would make it, and the model fits the rest to it."""
    return lambda xt, t: torch.where(mask, model(xt, t), v_known)


# -----------------------------------------------------------------------------
# The model: a transformer on patches of latents that reads. B images, N image tokens, L text tokens, width D, d
# channels per head.


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


def attend(q, k, v, weights=None):
    """softmax(q k^T / sqrt(d)) v of q (B, heads, N, d), k, v (B, heads, L, d), in which each of the L counts by its
    weight (B, L), 0 as if it were not there. Among few tokens a CPU is 1.4 times as fast with the plain products as
    with its fused kernel, whose backward is slow; among many they would fill the memory."""
    bias = None if weights is None else weights.log()[:, None, None].to(q.dtype)                 # (B, 1, 1, L)
    if q.device.type == "cpu" and q.shape[2] <= 256:
        a = q * q.shape[-1] ** -0.5 @ k.mT                                       # (B, heads, N, L)
        return (a if bias is None else a + bias).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, bias)


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


class CrossAttention(nn.Module):
    """Each image token looks up what the text says, 2112.10752 section 3.3. Nothing is added at the start."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads, self.q, self.kv, self.proj = heads, nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.norm_q, self.norm_k = nn.RMSNorm(D // heads, eps=1e-6), nn.RMSNorm(D // heads, eps=1e-6)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x, txt, txt_mask):                                         # (B, N, D), (B, L, D), (B, L)
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)             # (B, heads, N, d)
        k, v = self.kv(txt).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)         # (B, heads, L, d) each
        q, k = (norm(a.to(norm.weight.dtype)).to(v.dtype) for norm, a in ((self.norm_q, q), (self.norm_k, k)))
        return self.proj(attend(q, k, v, txt_mask).transpose(1, 2).flatten(2))   # (B, N, D)


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
    """The block of latent_dit.py, adaLN-Zero (2212.09748 section 3.2), with cross-attention in between, as in PixArt
    (2310.00426 section 2.3). Time and the pooled text set shift, scale and gate; each block begins as the identity."""

    def __init__(self, D, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.RMSNorm(D, eps=1e-6, elementwise_affine=False) for _ in range(3))
        self.attn, self.cross, self.mlp = SelfAttention(D, heads), CrossAttention(D, heads), SwiGLU(D)
        self.adaLN = nn.Linear(D, 6 * D)
        nn.init.zeros_(self.adaLN.weight)
        nn.init.zeros_(self.adaLN.bias)

    def forward(self, x, emb, positions, txt, txt_mask):                         # (B, N, D), (B, D), ..., (B, L, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN(emb)[:, None].chunk(6, -1)    # (B, 1, D) each
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, positions)
        x = x + self.cross(self.norm3(x), txt, txt_mask)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)       # (B, N, D)


class DiT(nn.Module):
    """(zt, t, text) -> velocity. zt (B, C, H, W), t (B,) in [0, 1]; H and W multiples of patch. A token is a patch of
    latents. text: txt (B, L, dim), txt_mask (B, L), 1 where there is a token and 0 behind the text, and pooled
    (B, pooled_dim); with a tower of its own: ids for txt, None for pooled.
    differs from the papers: PyTorch's own start of linear layers, not Xavier's.

    z_mean, z_std (C, 1, 1): of the tokenizer's latents, by which these are brought to mean 0 and variance 1."""

    def __init__(self, C, patch, size, dim, pooled_dim, tower=None, grad_checkpoint=False):
        super().__init__()
        depth, D, self.heads = SIZES[size]
        self.patch, self.grad_checkpoint = patch, grad_checkpoint
        self.grid = None                                                         # tokens a side in training, if other
        self.embed = nn.Conv2d(C, D, patch, patch)
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.tower = tower
        self.txt = nn.Sequential(nn.RMSNorm(dim, eps=1e-6), nn.Linear(dim, D))
        self.pooled = nn.Sequential(nn.RMSNorm(pooled_dim, eps=1e-6), nn.Linear(pooled_dim, D))
        self.blocks = nn.ModuleList([DiTBlock(D, self.heads) for _ in range(depth)])
        self.norm, self.adaLN = nn.RMSNorm(D, eps=1e-6, elementwise_affine=False), nn.Linear(D, 2 * D)
        self.out = nn.Linear(D, patch * patch * C)
        for zero in (self.adaLN, self.out):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)
        for module in self.time[0], self.time[2]:
            nn.init.normal_(module.weight, std=0.02)
        self.register_buffer("z_mean", torch.zeros(C, 1, 1))
        self.register_buffer("z_std", torch.ones(C, 1, 1))

    def encode_text(self, text):
        """A text with ids -> the text with features; one that has them stays. A sampler does it once, not each step."""
        txt, txt_mask, pooled = text
        if not txt.is_floating_point():
            txt, pooled = self.tower(txt)
        return txt, txt_mask, pooled

    def forward(self, zt, t, text):                                              # (B, C, H, W), (B,)
        txt, txt_mask, pooled = self.encode_text(text)                           # (B, L, dim), (B, L), (B, pooled_dim)
        txt, pooled = self.txt(txt), self.pooled(pooled)                         # (B, L, D), (B, D)
        x = self.embed(zt).to(self.out.weight.dtype)  # under autocast, too: bf16 would lose what blocks add
        H, W = x.shape[2:]                                                       # (B, D, H / patch, W / patch)
        positions = rope(H, W, x.shape[1] // self.heads, x.device, (self.grid or max(H, W)) / max(H, W))
        x = x.flatten(2).transpose(1, 2)                                         # (B, N, D)
        emb = self.time(waves(1000 * t, 256).to(self.out.weight.dtype)) + pooled             # (B, D); waves: 0..1000
        emb = F.silu(emb)
        for block in self.blocks:
            if self.grad_checkpoint and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, emb, positions, txt, txt_mask, use_reentrant=False)
            else:
                x = block(x, emb, positions, txt, txt_mask)                      # (B, N, D)
        shift, scale = self.adaLN(emb)[:, None].chunk(2, -1)
        x = self.out(self.norm(x) * (1 + scale) + shift)                         # (B, N, C patch^2)
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (H, W)), self.patch)           # (B, C, H, W)

    def flops(self, H, W, L):
        """Floating-point operations of one image's forward pass, 2 per multiply-add, with a text of L tokens; attention
        included."""
        N, D = (H // self.patch) * (W // self.patch), self.out.in_features
        linear = [m for m in self.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        once = [self.adaLN, *self.time, *self.pooled, *(block.adaLN for block in self.blocks)]  # once an image
        text = [*self.txt, *(block.cross.kv for block in self.blocks)]                        # once a token of the text
        pairs = len(self.blocks) * (N * N + N * L) * D
        if self.tower is not None:
            text += [m for m in self.tower.modules() if isinstance(m, nn.Linear)]
            pairs += len(self.tower.encoder["layers"]) * L * L * self.tower.dim
        times = {id(m): 1 for m in once} | {id(m): L for m in text}                          # others: once a patch
        return 2 * (sum(m.weight.numel() * times.get(id(m), N) for m in linear) + 2 * pairs)       # q k^T, mean of v


# -----------------------------------------------------------------------------
# What reads a text. First ids, numbers of its words or of pieces of them, and then a vector for each and one for all.

TINY = dict(vocab=8192, length=64, D=192, hidden=768, depth=3, heads=3)  # the tower of --text tiny


def word_ids(text):
    """--text tiny: the words and signs of a text, in lower case -> two ids for each, and those of the end. The ids are
    hashes, so there is no vocabulary, and no language that is not in it; with two of them, whose rows are added up, no
    two words are likely to be taken for one another (1709.03933). Of Chinese and its like each sign is a word."""
    text = unicodedata.normalize("NFC", text).lower()
    words = "".join(c if unicodedata.category(c)[0] in "LMN" and not "\u2e80" <= c <= "\ud7ff" else f" {c} "
                    for c in text).split()
    end = TINY["vocab"] - 1
    hashes = [zlib.crc32(word.encode(errors="replace")) for word in words]
    return [[h % end, (h // end) % end] for h in hashes] + [[end, end]]


def quick_gelu(x):
    """The GELU of OpenAI's CLIP, nearly the usual one."""
    return x * torch.sigmoid(1.702 * x)


class CLIPLayer(nn.Module):
    """A transformer block in which a token sees those before it. The names are those of the weight files."""

    def __init__(self, D, hidden, heads, act):
        super().__init__()
        self.heads, self.act = heads, act
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(D, D) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(D, hidden), fc2=nn.Linear(hidden, D)))

    def extra_repr(self):  # for fingerprint()
        return f"heads={self.heads}, act={self.act.__name__}"

    def forward(self, x):                                                        # (B, L, D)
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[f"{name}_proj"](h).unflatten(2, (self.heads, -1)).transpose(1, 2) for name in "qkv")
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)              # (B, heads, L, D / heads)
        x = x + self.self_attn["out_proj"](h.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](self.act(self.mlp["fc1"](self.layer_norm2(x))))           # (B, L, D)


class CLIPText(nn.Module):
    """The text tower of CLIP, 2103.00020 section 2.4: ids (B, L) -> what the tokens hold before the last layer
    (B, L, D), which tells more than what is left of them after it, and pooled, what the end of the text, which has seen
    all of it, holds after the last layer (B, D)."""

    def __init__(self, vocab, length, D, hidden, depth, heads, act=quick_gelu, projection=0):
        super().__init__()
        self.length, self.dim, self.pooled_dim = length, D, projection or D
        self.embeddings = nn.ModuleDict(dict(token_embedding=nn.Embedding(vocab, D),
                                             position_embedding=nn.Embedding(length, D)))
        nn.init.normal_(self.embeddings["position_embedding"].weight, std=0.1)   # words count for more than places
        self.encoder = nn.ModuleDict(dict(layers=nn.ModuleList(CLIPLayer(D, hidden, heads, act) for _ in range(depth))))
        self.final_layer_norm = nn.LayerNorm(D)
        self.text_projection = nn.Linear(D, projection, bias=False) if projection else nn.Identity()

    def forward(self, ids):                                                      # (B, L), of word_ids() (B, L, 2)
        x = self.embeddings["token_embedding"](ids)                              # (B, L, D), or (B, L, 2, D)
        if ids.ndim == 3:
            x, ids = x.sum(2), ids[..., 0]
        x = x + self.embeddings["position_embedding"].weight[:ids.shape[1]]
        for layer in self.encoder["layers"]:
            before, x = x, layer(x)                                              # (B, L, D)
        end = x[torch.arange(len(ids), device=x.device), ids.argmax(1)]          # the end has the highest id; (B, D)
        return before, self.text_projection(self.final_layer_norm(end))


# -----------------------------------------------------------------------------
# Which reader of texts, and what it makes of all captions. A frozen one reads each once.

SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # in Unicode; \s has more


class BPE:
    """CLIP's ids, 2103.00020 section 2.4: lower case, byte pairs, and <|startoftext|> and <|endoftext|> around. They
    are those of transformers' CLIPTokenizer; OpenAI's own also repairs mojibake and HTML.

    vocab {piece: id}; merges [(left, right), ...] in the order in which they were learnt."""

    def __init__(self, vocab, merges):
        self.vocab, self.rank = vocab, {tuple(pair): i for i, pair in enumerate(merges)}
        self.start, self.end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]  # are written as the letters from 256 on
        self.letters = {b: chr(b if b in printable else 256 + others.index(b)) for b in range(256)}
        self.known = {}  # words that were merged before

    def words(self, text):
        """What is merged each by itself: an ending such as 's, letters, one digit, or other signs."""
        def kind(c):
            return {"L": "letter", "N": "digit"}.get(unicodedata.category(c)[0], "sign")
        for part in re.split(f"[{SPACES}]+", text):
            while part:
                ending = re.match("'s|'t|'re|'ve|'m|'ll|'d", part)
                first = kind(part[0])
                n = ending.end() if ending else 1
                while not ending and first != "digit" and n < len(part) and kind(part[n]) == first:
                    n += 1
                yield part[:n]
                part = part[n:]

    def pieces(self, word):
        """Of all neighbours those are joined that were joined first in training, until none are left. The work grows
        with the square of a word's length, and no text holds 1,000 letters of one."""
        parts = [self.letters[b] for b in word[:1000].encode(errors="replace")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if pair not in self.rank:
                break
            joined, i = [], 0
            while i < len(parts):
                n = 2 if tuple(parts[i:i + 2]) == pair else 1
                joined.append("".join(parts[i:i + n]))
                i += n
            parts = joined
        return [self.vocab.get(part, self.end) for part in parts]

    def __call__(self, text):
        ids = [self.start]
        for i, part in enumerate(re.split(r"(<\|startoftext\|>|<\|endoftext\|>)", text)):
            if i % 2:  # these two in a text are what they say, in transformers, too
                ids.append(self.vocab[part])
                continue
            part = "".join(c.lower() for c in unicodedata.normalize("NFC", part))  # by sign, for final sigmas
            for word in self.words(part):
                if word not in self.known:
                    self.known[word] = self.pieces(word)
                ids += self.known[word]
        return [*ids, self.end]


CLIP = "stabilityai/stable-diffusion-xl-base-1.0"  # has the text tower of openai/clip-vit-large-patch14 by itself


def find_text(name):
    """--text -> the files that hold a text tower, its config.json and its vocabulary. Raises Stop."""
    if name == "clip":
        return [hub_file(CLIP, file) for file in ("text_encoder/model.safetensors", "text_encoder/config.json",
                                                  "tokenizer/vocab.json", "tokenizer/merges.txt")]
    folder, files = Path(name), []
    for choices in (["model.safetensors"], ["config.json"], ["tokenizer.json", "vocab.json"]):
        places = [where / file for where in (folder, folder.parent / "tokenizer") for file in choices]
        found = [place for place in places if place.is_file()]
        if not found:
            raise Stop(f"--text {name} is not tiny or clip, and no folder with {' or '.join(choices)}"
                       + (", nor is there one in the folder tokenizer beside it" if "vocab.json" in choices else ""))
        files.append(found[0])
    return files + [files[-1].with_name("merges.txt")] * (files[-1].name == "vocab.json")


def read_text_files(weights, config, vocab, merges=None):
    """Files of Hugging Face, the weights in one or in a list -> the tokenizer and the text tower. Raises Stop."""
    files = weights if isinstance(weights, list) else [weights]
    tensors = {k.removeprefix("text_model."): v.float() for file in files for k, v in load_safetensors(file)[0].items()
               if not k.startswith(("vision_model.", "visual_projection.", "logit_scale"))
               and not k.endswith("position_ids")}
    try:
        about, words = (json.loads(file.read_text(encoding="utf-8")) for file in (config, vocab))
        about = about.get("text_config", about)
        if merges:
            pairs = [line.split(" ") for line in merges.read_text(encoding="utf-8").split("\n")
                     if line.strip() and not line.startswith("#version")]
        else:  # tokenizer.json holds both, and writes a pair in one of two ways
            added, words = {a["content"]: a["id"] for a in words["added_tokens"]}, words["model"]
            pairs = [p.split(" ") if isinstance(p, str) else p for p in words["merges"]]
            words = words["vocab"] | added
        if words["<|endoftext|>"] != max(words.values()):
            raise ValueError("<|endoftext|> has not the highest id")
        n, D = tensors["embeddings.token_embedding.weight"].shape
        depth = len({k.split(".")[2] for k in tensors if k.startswith("encoder.layers.")})
        tower = CLIPText(n, len(tensors["embeddings.position_embedding.weight"]), D,
                         len(tensors["encoder.layers.0.mlp.fc1.bias"]), depth, about["num_attention_heads"],
                         {"gelu": F.gelu, "quick_gelu": quick_gelu}[about["hidden_act"]],
                         len(tensors.get("text_projection.weight", ())))
        load_weights(tower, tensors, files[0])
        bpe = BPE(words, pairs)
        tower(torch.tensor([bpe("a cat"), [max(words.values())] * len(bpe("a cat"))]))  # or it fails after long work
        return bpe, tower
    except OSError as e:
        raise Stop(f"cannot read {e.filename}: {e.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, ArithmeticError) as e:
        raise Stop(f"{files[0]} with {config.name} and {vocab.name} is no text tower of CLIP: {e!r}")


def load_reader(args, rank, world):
    """What --text names: tokenise(text) -> ids; length, how many of them count; dim and pooled_dim of what is read; and
    the frozen tower, None where the model has its own. Raises Stop."""
    if args.text == "tiny":
        return SimpleNamespace(tokenise=word_ids, length=TINY["length"], dim=TINY["D"], pooled_dim=TINY["D"],
                               tower=None, key="tiny")
    found = on_each_node(functools.partial(find_text, args.text), rank, world)
    bpe, tower = read_text_files(*found[int(os.environ.get("GROUP_RANK", 0))])  # where this node has it
    tower.eval().requires_grad_(False)
    about = [fingerprint(tower), sorted(bpe.vocab.items()), sorted(bpe.rank.items())]
    return SimpleNamespace(tokenise=bpe, length=tower.length, dim=tower.dim, pooled_dim=tower.pooled_dim, tower=tower,
                           key=hashlib.sha256(repr(about).encode()).hexdigest()[:16])


@torch.no_grad()
def read_texts(reader, texts, device, cache=None):
    """texts -> rows, ids (all texts together, ...) or float16 features (all together, dim); start, where each text
    begins in them; pooled (texts, pooled_dim) or None; longest, and too_long, how many were cut to reader.length.
    Features are kept in the file `cache`, and taken from it where it exists. Raises Stop."""
    ids = [reader.tokenise(text) for text in texts]
    too_long = sum(len(i) > reader.length for i in ids)
    ids = [i if len(i) <= reader.length else [*i[:reader.length - 1], i[-1]] for i in ids]   # the end stays
    tokens = SimpleNamespace(start=np.cumsum([0, *map(len, ids)]), pooled=None, longest=max(map(len, ids)),
                             too_long=too_long)
    if reader.tower is None:
        tokens.rows = np.concatenate(ids)
        return tokens

    def write(f):
        tower, pooled = reader.tower.to(device), []
        for part in tqdm([ids[k:k + 64] for k in range(0, len(ids), 64)], "reading captions, once",
                         disable=None if cache else True):
            longest = max(map(len, part))
            padded = torch.tensor([[*i, *[i[-1]] * (longest - len(i))] for i in part], device=device)
            try:
                rows, all_of_it = (a.half().cpu() for a in tower(padded))
            except RuntimeError as e:
                raise Stop(f"--text cannot read the captions on {device}: {str(e).splitlines()[0]}", 1)
            if not (rows.isfinite().all() and all_of_it.isfinite().all()):
                raise Stop("--text gives features that float16 cannot hold", 1)
            f.write(torch.cat([r[:len(i)] for r, i in zip(rows, part)]).numpy().tobytes())
            pooled.append(all_of_it.numpy())
        f.write(np.concatenate(pooled).tobytes())
    n, width = tokens.start[-1] * reader.dim, reader.pooled_dim
    if cache is None:
        write(file := io.BytesIO())
        flat = np.frombuffer(file.getvalue(), np.float16)
    else:
        if not cache.exists() or cache.stat().st_size != 2 * (n + len(ids) * width):
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, write)
        flat = np.memmap(cache, np.float16, "r")
    tokens.rows, tokens.pooled = flat[:n].reshape(-1, reader.dim), flat[n:].reshape(len(ids), width)
    return tokens


def text_batch(tokens, k, device):
    """Texts number k of what read_texts() gave, as the model takes them: txt, ids (B, L, ...) or features (B, L, dim),
    txt_mask (B, L), 1 where there is a token and 0 behind the text, and pooled (B, pooled_dim) or None."""
    parts = [tokens.rows[tokens.start[i]:tokens.start[i + 1]] for i in k]
    txt = np.zeros((len(k), tokens.longest, *tokens.rows.shape[1:]), tokens.rows.dtype)  # one length: compiled once
    for row, part in zip(txt, parts):
        row[:len(part)] = part
    txt_mask = (np.arange(tokens.longest) < np.array([len(part) for part in parts])[:, None]).astype(np.float32)
    txt, txt_mask = (to_device(torch.from_numpy(a), device) for a in (txt, txt_mask))
    if tokens.pooled is None:
        return txt, txt_mask, None
    return txt.float(), txt_mask, to_device(torch.from_numpy(tokens.pooled[k]), device).float()



# -----------------------------------------------------------------------------
# Tokenizers, as the field calls an autoencoder whose latents a transformer works on, too: pictures (B, 3, H, W) in
# [-1, 1] -> encode(x) -> latents (B, channels, H / factor, W / factor) -> decode(z) -> pictures. Each is read from raw
# safetensors; the names of the weights are those of the files.


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
# Data: pictures and captions, read once into a cache of uint8 that is memory-mapped.

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


def read_captions(path, names):
    """The captions of pictures in a folder or .zip -> {name: [caption, ...]}: from a.txt beside a.jpg, one a line, and
    from metadata.jsonl ({"file_name": "a.jpg", "text": "..."}), as Hugging Face's imagefolder has them. In place of
    those that cannot be read, or are of a picture that is not there, the reason. Raises Stop."""
    if path.is_dir():
        files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
        contents = lambda name: (path / name).read_bytes()
    else:
        archive = zipfile.ZipFile(path)
        files, contents = set(archive.namelist()), archive.read
    captions = {}
    for file in sorted(f for f in files if f.rpartition("/")[2] == "metadata.jsonl"):
        try:
            lines = contents(file).splitlines()
        except Exception as e:  # a damaged file can raise anything
            raise Stop(f"{file} in {path} cannot be read: {e}")
        for i, line in enumerate(lines, 1):
            try:
                entry = json.loads(line) if line.strip() else dict(file_name="", text="")
                name = posixpath.normpath(posixpath.join(posixpath.dirname(file), entry["file_name"]))
                texts = [entry["text"]] if isinstance(entry["text"], str) else entry["text"]
                if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                    raise TypeError("text")
            except (ValueError, KeyError, TypeError):
                raise Stop(f'{path}: line {i} of {file} is not like {{"file_name": "a.jpg", "text": "a caption"}}')
            if line.strip() and name not in files:
                captions[name] = f"{file} names it, but it is not there"
            elif line.strip():
                captions.setdefault(name, []).extend(texts)
    for name in names:
        for beside in {name.rpartition(".")[0] + suffix for suffix in (".txt", ".TXT")} & files:
            try:
                lines = [line.strip() for line in contents(beside).decode("utf-8-sig").splitlines()]
                captions.setdefault(name, []).extend([line for line in lines if line] or [""])
            except UnicodeDecodeError:
                captions[name] = f"{beside} is not UTF-8"
            except Exception as e:
                captions[name] = f"{beside} cannot be read: {e}"
    return {name: texts for name, texts in captions.items() if isinstance(texts, str) or name in set(names)}


def retold(caption, rng):
    """A caption of draw_face() in other words: less is said, in another order, as a sentence or as a list. A model that
    has only read one form takes the words of another for the wrong things."""
    fur, species, eye, ground = re.fullmatch(r"an? (\w+) (\w+) with (\w+) eyes on a (\w+) background", caption).groups()
    animal = species if rng.random() < 0.3 else f"{fur} {species}"
    a_animal = f"{'an' if animal[0] == 'o' else 'a'} {animal}"
    if rng.random() < 0.3:  # a list
        parts = [animal, *(part for part in (f"{eye} eyes", f"{ground} background") if rng.random() < 0.7)]
        return ", ".join(rng.permutation(parts))
    if rng.random() < 0.3:
        return f"on a {ground} background {a_animal}" + (f" with {eye} eyes" if rng.random() < 0.7 else "")
    parts = [part for part in (f"{eye} eyes", f"a {ground} background") if rng.random() < 0.7]
    if len(parts) == 2 and rng.random() < 0.5:
        return f"{a_animal} on a {ground} background with {eye} eyes"
    return a_animal + " with " * bool(parts) + " and ".join(rng.permutation(parts))


class Pictures(torch.utils.data.Dataset):
    """What --data names, one by one: item i is (uint8 (size, size, 3), captions), or (why it cannot be used, None)."""

    def __init__(self, data, size, drawn=DRAWN_FACES):
        self.data, self.size, self.file, self.note, path = str(data), size, None, "", Path(data)
        if self.data == "drawn_faces":
            self.names, self.captions = range(drawn), None
            code = map(inspect.getsource, (draw_face, retold))
            stamps = [*code, TRAITS, FURS, EYES, BACKGROUNDS]  # edit the drawing: a new set
        elif path.suffix == ".npz" and path.is_file():
            try:
                with zipfile.ZipFile(path), np.load(path) as f:
                    self.file, captions = f["images"], f["captions"]
            except Exception as e:  # a damaged file can raise anything
                raise Stop(f"{path} is not an .npz with arrays named images and captions: {e}")
            shape = self.file.shape
            if self.file.dtype != np.uint8 or shape[3:] != (3,) or not all(shape):
                raise Stop(f"{path}: images has to be uint8 (N, height, width, 3)")
            if captions.dtype.kind != "U" or not captions.size or captions.shape[0] != shape[0] or captions.ndim > 2:
                raise Stop(f"{path}: captions has to be text, (N,) or (N, captions of each) with N = {shape[0]}; it is "
                           f"{captions.dtype} {captions.shape}")
            self.names, self.captions = range(shape[0]), [[text for text in texts if text] or [""] for texts in
                                                          captions.reshape(shape[0], -1).tolist()]
            stamps = [path.stat().st_size, path.stat().st_mtime_ns]
        else:
            self.names, classes, labels, stamps = list_pictures(path)
            captions = read_captions(path, self.names)
            if not captions and len(classes) > 1:
                captions = {name: [classes[y].strip(".").replace("_", " ")] for name, y in zip(self.names, labels)}
                self.note = f"{path} has no captions, so the names of its folders are taken: {', '.join(classes)[:200]}"
            if not captions and self.names:
                raise Stop(f"{path} has no captions: put a.txt beside a.jpg, or write a metadata.jsonl with lines like "
                           '{"file_name": "a.jpg", "text": "a caption"}')
            self.names = sorted(captions.keys() - set(self.names)) + self.names  # first what is named but not there
            self.captions = [captions.get(name, "no caption") for name in self.names]
        about = [size, len(self.names), inspect.getsource(read_picture), stamps, self.captions]  # not where it lies
        self.key = hashlib.sha256(repr(about).encode(errors="replace")).hexdigest()[:16]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        name = self.names[i]
        try:
            if self.data == "drawn_faces":
                picture, _, caption = draw_face(0, i, self.size)
                rng = np.random.default_rng((1, i))
                return picture, [caption] * 4 + [retold(caption, rng) for _ in range(4)]
            captions = self.captions[i]
            if isinstance(captions, str):
                raise ValueError(captions)
            if isinstance(self.file, np.ndarray):
                picture = ImageOps.fit(Image.fromarray(self.file[i]), (self.size, self.size), Image.LANCZOS)
                return np.asarray(picture), captions
            if os.path.isdir(self.data):
                return read_picture(os.path.join(self.data, name), self.size), captions
            self.file = self.file or zipfile.ZipFile(self.data)  # opened here, because each worker needs its own
            with self.file.open(name) as f:
                return read_picture(f, self.size), captions
        except Exception as e:  # a broken file can raise anything in Pillow or zipfile
            why = f"{name}: {str(e) or type(e).__name__}".splitlines()[0]
            return why.encode(errors="backslashreplace").decode(), None  # a name need not be UTF-8


def prepare_data(data, size, drawn=DRAWN_FACES):
    """Reads the pictures into data/cache/NAME-SIZE-KEY.uint8 and .json, unless they are there -> that path."""
    source = Pictures(animal_faces() if data == "animal_faces" else data, size, drawn)
    cache = Path("data/cache", f"{Path(source.data).stem}-{size}-{source.key}.uint8")
    if source.note:
        print(source.note, flush=True)
    if cache.exists():
        return cache
    if len(source) < 16:
        raise Stop(f"--data {data} holds {len(source)} pictures; training takes at least 16")
    cache.parent.mkdir(parents=True, exist_ok=True)
    about = dict(name=source.data, key=source.key, size=size, captions=[], broken=[])

    def write(f):
        loader = torch.utils.data.DataLoader(source, 32, num_workers=min(os.cpu_count(), 16), collate_fn=list)
        for picture, captions in tqdm(itertools.chain.from_iterable(loader), "reading", len(source), disable=None):
            if captions is None:
                about["broken"].append(picture)
            else:
                f.write(picture.tobytes())
                about["captions"].append(captions)
        if len(about["broken"]) > 0.05 * len(source) or len(about["captions"]) < 16:
            raise Stop(f"{len(about['broken'])} of the {len(source)} pictures that {data} holds or names cannot be "
                       f"used, more than 5 %, such as {about['broken'][0]}")
        write_atomically(cache.with_suffix(".json"), lambda g: g.write(json.dumps(about).encode()))
    write_atomically(cache, write)
    return cache


SIDES = re.compile(r"\b(left|right|(counter|anti)?-?clockwise)\b", re.IGNORECASE)


def open_data(cache):
    """What prepare_data made -> name, key, broken, images uint8 (N, size, size, 3), texts, the captions there are and
    "" as the last, text_of, the numbers of each picture's captions in texts, and train and val, the numbers of the
    pictures on either side; has_sides (N,), where mirroring would make a caption untrue.

    A tenth is held out, the same in every run: of the captions, with all their pictures, or where these are few or each
    is of many pictures, of the pictures; at most 256 of either. Val are 256 of those pictures."""
    data = SimpleNamespace(**json.loads(cache.with_suffix(".json").read_text()))
    n, rng = len(data.captions), np.random.default_rng(0)
    data.images = np.memmap(cache, np.uint8, "r", shape=(n, data.size, data.size, 3))
    number = {text: k for k, text in enumerate(sorted({text for texts in data.captions for text in texts} - {""}))}
    number[""] = len(number)
    data.texts, data.text_of = list(number), [[number[text] for text in texts] for texts in data.captions]
    data.has_sides = np.array([any(map(SIDES.search, texts)) for texts in data.captions])
    first = np.array([texts[0] for texts in data.text_of])
    rare = np.flatnonzero(np.bincount(first, minlength=len(number))[:-1] <= max(1, n // 100))   # without ""
    rare = np.intersect1d(rare, first)
    if len(rare) >= 100:
        held = set(rng.permutation(rare)[:min(256, len(rare) // 10)].tolist())
        out = np.isin(first, list(held))
        data.text_of = [texts if away else [k for k in texts if k not in held]  # nor as another caption of a picture
                        for texts, away in zip(data.text_of, out)]
    else:
        out = np.isin(np.arange(n), rng.permutation(n)[:min(256, n // 10)])
    data.train, data.val = np.flatnonzero(~out), rng.permutation(np.flatnonzero(out))[:256]
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


def caption_rows(rows, texts):
    """rows of pictures, each uint8 (n, H, W, 3) -> one picture, above each row the text that it was drawn from."""
    columns = max(map(len, rows))
    k, font, parts = max(1, 512 // (columns * rows[0].shape[2])), ImageFont.load_default(13), []
    for row, text in zip(rows, texts):
        strip = Image.new("RGB", (columns * row.shape[2] * k, 20), "white")
        ImageDraw.Draw(strip).text((4, 3), "".join(c if c.isprintable() else " " for c in text), "black", font)
        parts += [np.asarray(strip), tile(row, columns).repeat(k, 0).repeat(k, 1)]
    return np.concatenate(parts)


# -----------------------------------------------------------------------------
# Sampling and training.

ARCHITECTURE = "vae_steps text model patch_size".split()
FREE_ON_RESUME = ("data text vae steps lr out eval_every device dtype compile accum grad_checkpoint sampler "
                  "sample_steps cfg_scale cfg_interval").split()
P_UNCOND = 0.1  # share of labels or texts that training hides: one network learns both sides of the guidance


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


@torch.no_grad()
def generate(model, vae, args, noise, text, text_null, on_step=None, z0=None, mask=None):
    """sample() as the flags say, from noise (B, C, h, w), told text and kept away from text_null. With latents z0
    (1, C, h, w) it begins with these at t = --strength, and where mask (1, 1, h, w) is False it keeps
    them -> pictures (B, 3, H, W)."""
    device, times = noise.device, time_grid(args.sample_steps, args.time_shift)
    with torch.autocast(device.type, torch.bfloat16, enabled=pick_dtype(args.dtype, device) == torch.bfloat16):
        text, text_null = model.encode_text(text), model.encode_text(text_null)
        velocity = guided(model, text, text_null, args.cfg_scale, args.cfg_interval)
        if z0 is not None:
            times = [args.strength] + [t for t in times if t < args.strength]
            if mask is not None:
                velocity = inpaint(velocity, mask, noise - z0)
            noise = path(z0, noise, times[0])[0]
        return decode(vae, model, sample(velocity, noise, args.sampler, times, on_step))


def train_batch(data, args, step, device, rank, world):
    """Latents and all randomness of one step -> z0, eps, t, txt, txt_mask, pooled; of which each rank gets its share.
    Drawn for the whole batch from (seed, step), so that any number of processes trains on the same numbers."""
    B, g = args.batch_size, torch.Generator().manual_seed(mix(BATCH, args.seed, step))
    mine, n = slice(B * rank // world, B * (rank + 1) // world), len(data.train)
    t, u = logit_normal((B,), args.time_shift, g)[mine], torch.rand((B, 3), generator=g)[mine]
    places = range(step * B + mine.start, step * B + mine.stop)  # in the endless list of shuffled epochs
    i = data.train[[shuffled(n, args.seed, k // n)[k % n] for k in places]]
    mirrored = (u[:, 0] < 0.5) & args.flip & ~torch.from_numpy(data.has_sides[i])
    z0 = load_latents(data, i, mirrored, device)
    g = torch.Generator(device).manual_seed(mix(NOISE, args.seed, step))
    eps = torch.randn((B, *z0.shape[1:]), generator=g, device=device)[mine]
    texts = [data.text_of[j] if hide >= P_UNCOND else [len(data.texts) - 1] for j, hide in zip(i, u[:, 1].tolist())]
    text = text_batch(data.tokens, [k[int(v * len(k))] for k, v in zip(texts, u[:, 2].tolist())], device)
    return z0, eps, to_device(t, device), *text


def train_step(model, opt, batch, args, amp):
    """One optimizer step on batch = (z0, eps, t, txt, txt_mask, pooled) -> the loss, left on the device."""
    total = 0
    for k in range(args.accum):
        z0, eps, t, *text = (None if a is None else a.chunk(args.accum)[k] for a in batch)
        if dist.is_initialized():
            model.require_backward_grad_sync = k == args.accum - 1  # gradients are averaged once per step
        with amp():
            loss = loss_fn(model, z0, eps, t, text).mean()
        total += loss.detach() / args.accum
        (loss / args.accum).backward()
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
        text = text_batch(data.tokens, [data.text_of[j][0] for j in data.val[i]], device)
        eps = next(image_noise(args.seed + 1, i, z0.shape[1:], device))
        with amp():
            loss = loss_fn(model, z0, eps, t, text).cpu().double()
        total += torch.stack([torch.bincount((t.cpu() * 10).long(), w, 10) for w in (loss, torch.ones_like(loss))])
    total = sum_over_ranks(total.float().to(device)).cpu()
    bins = [loss / count if count else None for loss, count in zip(*total.tolist())]  # None: no picture fell into it
    return (total[0].sum() / total[1].sum()).item(), bins


def build_model(args, channels, dim, pooled_dim):
    """The transformer that the flags describe, for texts of these widths."""
    tower = CLIPText(**TINY) if args.text == "tiny" else None
    return DiT(channels, args.patch_size, args.model, dim, pooled_dim, tower, args.grad_checkpoint)


@torch.no_grad()
def draw_pictures(out, ema, vae, data, args, device, show):
    """What a finished run shows: forward.png, reverse.gif, training.gif, guidance.png, and in reconstruction.png what
    the tokenizer loses of held-out pictures -> its PSNR in dB. show(number of held-out captions, of pictures of each,
    **other settings) -> those pictures."""
    x0, times = load_pictures(data.images, data.val[:8], device), [0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1]
    z0 = load_latents(data, data.val[:8], torch.zeros(len(x0), dtype=torch.bool), device)
    again = decode(vae, ema, z0)
    (out / "reconstruction.png").unlink(missing_ok=True)                                     # an earlier run's
    if not isinstance(vae, Pixels):
        save_png(out / "reconstruction.png", tile(to_uint8(torch.cat([x0, again])), len(x0)))  # above: the pictures
    eps = next(image_noise(args.seed, range(len(x0)), z0.shape[1:], device))
    steps = torch.stack([path(z0[:6], eps[:6], t)[0] for t in times], 1).flatten(0, 1)       # (6 times, C, h, w)
    save_png(out / "forward.png", tile(to_uint8(decode(vae, ema, steps)), len(times)))

    way = []                                                                                 # 4 x 4 pictures from noise
    # what there is, and the clean latents that it is taken for, which path() has at zt - t v
    rows = show(4, 4, on_step=lambda t, zt, v: way.append(torch.cat([zt, zt - t * v])))
    k = -(-len(way) // 24)                                                                   # at most 24 of them
    frames = [to_uint8(decode(vae, ema, z)) for z in way[(len(way) - 1) % k::k]] + [np.concatenate(rows + rows)]
    save_gif(out / "reverse.gif", [np.concatenate([tile(part, 4) for part in np.split(f, 2)], 1) for f in frames])
    grids = sorted(out.glob("samples/" + "[0-9]" * 6 + ".png"))
    save_gif(out / "training.gif", [np.asarray(Image.open(p)) for p in grids], 500)
    scales = (1.0, 2.0, 4.0, 8.0)
    rows = [np.concatenate(show(8, 1, cfg_scale=scale)) for scale in scales]                 # the same noise, guided
    save_png(out / "guidance.png", caption_rows(rows, [f"--cfg_scale {scale}" for scale in scales]))
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
    """The model in a model.safetensors of this script, its tokenizer, what reads its texts, and captions held out of
    its training; args take over what it was trained with. Another --size than that is drawn as it is said, with the
    times shifted accordingly."""
    tensors, saved, data = read_model(path, "text2img.py")
    also = {"vae", "text", "sample_steps", "cfg_scale", "cfg_interval", "sampler", "time_shift", "size"} - args.given
    adopt(args, saved, set(ARCHITECTURE) - {"text"} | also, path)
    if args.time_shift is None:
        raise Stop(f"{path} does not say what --time_shift was; has it been edited?")
    for k, builtin in (("text", {"tiny", "clip"}), ("vae", {"none", *VAES})):  # before anything is downloaded
        if getattr(args, k) != saved.get(k) and {getattr(args, k), saved.get(k)} <= {"tiny", *builtin}:
            raise Stop(f"--{k} {getattr(args, k)} contradicts {path}, which was made with {saved[k]}")
    if "time_shift" in also:
        args.time_shift *= max(1, args.size / saved.get("size", args.size))
    prompts = data.get("prompts") if isinstance(data, dict) else None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise Stop(f"{path} does not say what its captions were; has it been edited?")
    own = {k[4:]: v for k, v in tensors.items() if k.startswith("vae.")}
    if own and ("vae" not in args.given or args.vae == "tiny"):
        vae = TinyVAE()
        load_weights(vae, own, path)
    else:
        vae = load_vae(args, rank, world)
    if fingerprint(vae) != data.get("vae_key"):
        raise Stop(f"--vae {args.vae} is not the tokenizer with which {path} was trained")
    reader = load_reader(args, rank, world)
    if reader.key != data.get("text_key"):
        raise Stop(f"--text {args.text} is not what {path} was trained with")
    model = build_model(args, vae.channels, reader.dim, reader.pooled_dim)
    load_weights(model, {k: v for k, v in tensors.items() if not k.startswith("vae.")}, path)
    model.grid = saved.get("size", args.size) // (vae.factor * args.patch_size)
    model, vae = (net.to(device).eval().requires_grad_(False) for net in (model, vae))
    check_size(args, vae)
    return model, vae, reader, prompts


def train(args):
    """The whole run. All randomness follows from (seed, step): a run that was cut goes on bit for bit, on the CPU."""
    began, state = time.time(), None
    if args.resume:
        state = load_checkpoint(args.resume, "text2img.py")
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
    reader = load_reader(args, rank, world)
    if state and state.get("text_key") != reader.key:
        raise Stop(f"--text {args.text} is not what {args.resume} was trained with")
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Stop(f"--out {out} cannot be made: {e.strerror}")
    data = shared_data(functools.partial(prepare_data, args.data, args.size, 256 if args.smoke else DRAWN_FACES), rank,
                       world)
    if data.broken:
        say(f"left out, because they cannot be used: {len(data.broken)}: " + "; ".join(data.broken[:9]))
    if state and state["key"] != data.key:
        raise Stop(f"--data {args.data} is not what {args.resume} was trained on: the pictures, their captions "
                   "or their dates have changed, or the code that reads them")
    say(f"{data.name}: {len(data.train)} pictures to train on, {len(data.val)} held out, {len(data.texts) - 1} "
        f"captions; {device} x {world}, {str(pick_dtype(args.dtype, device))[6:]}; writes to {out}")
    code = [inspect.getsource(part) for part in (CLIPLayer, CLIPText, BPE, read_texts)]
    about = repr([reader.key, data.texts, code]).encode(errors="replace")
    cache = Path(f"data/cache/text-{hashlib.sha256(about).hexdigest()[:16]}.f16")
    if reader.tower is not None:
        on_each_node(lambda: bool(read_texts(reader, data.texts, device, cache)), rank, world)
    data.tokens, reader.tower = read_texts(reader, data.texts, device, cache), None  # frees its memory
    if data.tokens.too_long:
        say(f"captions of more than {reader.length} tokens, cut to that: {data.tokens.too_long}")
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
    model = build_model(args, vae.channels, reader.dim, reader.pooled_dim).to(device)
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
    prompts = list(dict.fromkeys(data.text_of[i][0] for i in data.val))  # held-out captions, for all that is shown
    peak, flops = peak_flops(device), 3 * raw_model.flops(*shape[1:], data.tokens.longest)  # forward, 2 x backward
    log = begin_log(out, start, resumed=own_folder) if rank == 0 else []
    began -= log[-1]["seconds"] if log else 0  # a resumed run counts on
    say(f"{sum(p.numel() for p in ema.parameters()) / 1e6:.1f}M parameters; {args.vae} latents "
        f"{' x '.join(map(str, shape))}, {math.prod(shape[1:]) // args.patch_size ** 2} tokens")
    say("settings: " + " ".join(f"{k}={v}" for k, v in settings.items()))

    def show(rows, columns, on_step=None, **other):
        """Pictures (columns, H, W, 3) of each of the first held-out captions, of all from the same noise."""
        k = np.repeat(prompts[:rows], columns)
        noise = next(image_noise(args.seed, range(columns), shape, device)).repeat(len(k) // columns, 1, 1, 1)
        text, null = (text_batch(data.tokens, n, device) for n in (k, [len(data.texts) - 1] * len(k)))
        settings = argparse.Namespace(**{**vars(args), **other})
        return np.split(to_uint8(generate(ema, vae, settings, noise, text, null, on_step)), len(k) // columns)

    def save(step):
        if rank == 0:
            ckpt = dict(script="text2img.py", args=settings, step=step, data=data.name, key=data.key, best=best,
                        model=raw_model.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), vae_key=vae_key,
                        vae=vae.state_dict() if isinstance(vae, TinyVAE) else None, text_key=reader.key)
            write_atomically(out / "ckpt.pt", functools.partial(torch.save, ckpt))
            tensors = ema.state_dict()
            if isinstance(vae, TinyVAE):  # small, and nowhere else to be had
                tensors |= {f"vae.{k}": v for k, v in vae.state_dict().items()}
            save_safetensors(out / "model.safetensors", tensors, dict(
                format="pt", script="text2img.py", kind="text2img", args=json.dumps(settings), data=json.dumps(dict(
                    name=data.name, key=data.key, prompts=[data.texts[k] for k in prompts], vae_key=vae_key,
                    text_key=reader.key, step=step))))

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
                rows = show(8, 8)
                save_png(out / f"samples/{step:06d}.png", caption_rows(rows, [data.texts[k] for k in prompts]))
            clock = time.time()
        if record:
            write_record(step, record)
        if stop:
            if not evaluate:
                save(step)
            raise Stop(f"stopped at step {step}; go on: {'torchrun ...' if world > 1 else 'python'} text2img.py "
                       f"--resume {out / 'ckpt.pt'}", [*noted, 130][0])
        if last:
            break

        # one step: data, noise and t from (seed, step); the loss, its gradient, AdamW, the moving average
        for group in opt.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 50)  # warm-up, while Adam's averages settle
        batch = train_batch(data, args, step, device, rank, world)
        loss_sum += train_step(model, opt, batch, args, amp)
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
        again = draw_pictures(out, ema, vae, data, args, device, show)
        if args.vae != "none":
            say(f"the tokenizer alone gives held-out pictures back with {again:.1f} dB PSNR ({out}/reconstruction.png)")
        say(f"done in {time.time() - began:.0f} s; best val_loss {best:.4f}; see {out}/samples/{args.steps:06d}.png")
    sum_over_ranks(torch.zeros(1, device=device)).item()  # the others wait for the pictures


def read_given(args, out, model, vae, device):
    """--init_image and --mask -> picture (1, 3, H, W) and its latents z0 (1, C, h, w); white (1, 1, H, W), True where
    the picture may change, and mask (1, 1, h, w), where its latents may; None for what is not given. Raises Stop."""
    def open_picture(name, file):
        if Path(file).resolve().parent == out.resolve():
            raise Stop(f"--{name} lies in {out}, where the new pictures go: copy it elsewhere, or say --out")
        try:
            with Image.open(file) as im:
                sides = ImageOps.exif_transpose(im).size
            return load_pictures(read_picture(file, args.size)[None], [0], device), sides
        except Exception as e:  # a broken file can raise anything in Pillow
            raise Stop(f"--{name} {file} cannot be read: {getattr(e, 'strerror', None) or e}")
    if not args.init_image:
        return None, None, None, None
    picture, sides = open_picture("init_image", args.init_image)
    with torch.autocast(device.type, torch.bfloat16, enabled=pick_dtype(args.dtype, device) == torch.bfloat16):
        z0 = (vae.encode(picture).float() - model.z_mean) / model.z_std
    if not args.mask:
        return picture, z0, None, None
    white, mask_sides = open_picture("mask", args.mask)
    if mask_sides != sides:
        raise Stop(f"--mask is {mask_sides[0]} x {mask_sides[1]} pixels, but --init_image {sides[0]} x {sides[1]}")
    white = white.mean(1, keepdim=True) > 0
    if not white.any():
        raise Stop(f"nothing in --mask {args.mask} is white, so nothing would change")
    return picture, z0, white, F.max_pool2d(white.float(), vae.factor) > 0


def read_prompts(given):
    """Texts, and .txt files with one a line -> texts. Raises Stop."""
    prompts = []
    for text in given:
        try:
            lines = Path(text).read_text(encoding="utf-8-sig").splitlines() if text.lower().endswith(".txt") else [text]
        except OSError as e:
            raise Stop(f"prompts cannot be read from {text}: {e.strerror}")
        except UnicodeDecodeError:
            raise Stop(f"{text} is not UTF-8")
        prompts += [line.strip() for line in lines if line.strip() or lines == [text]]
    if not prompts:
        raise Stop(f"there is no prompt in {' '.join(given)!r}: it is empty")
    return prompts


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
    """--ckpt FILE with --prompt or --sample: pictures as generated/000000.png ..., what each was told in
    metadata.jsonl, and one grid; or with --interpolate a GIF. Prompts take turns; with --prompt picture k of each
    begins with the same noise, however many there are."""
    device, rank, world = setup(args)
    prompts = read_prompts(args.prompt) if args.prompt else None
    model, vae, reader, held_out = load_model(args.ckpt, args, device, rank, world)
    prompts, out = prompts or held_out, Path(args.out if "out" in args.given else Path(args.ckpt).parent)
    if args.negative_prompt and args.cfg_scale == 1:
        raise Stop("--negative_prompt works by guidance: it needs a --cfg_scale above 1")
    if args.interpolate and len(prompts) < 2:
        raise Stop("--interpolate needs at least two prompts")
    if args.prompt and not args.interpolate and (args.sample or len(prompts)) < len(prompts):
        raise Stop(f"--sample {args.sample}, for all prompts together, is too few for {len(prompts)}")
    picture, z0, white, mask = read_given(args, out / "generated", model, vae, device)
    args.strength = (1.0 if args.mask else 0.6) if args.strength is None else args.strength
    began, P, tokens = time.time(), len(prompts), read_texts(reader, [*prompts, args.negative_prompt], device)
    shape = (vae.channels, args.size // vae.factor, args.size // vae.factor)

    def draw(noise, text, text_null):
        x = generate(model, vae, args, noise, text, text_null, z0=z0, mask=mask)
        if not x.isfinite().all():
            raise Stop(f"{args.ckpt} draws NaN or infinity; did its training diverge?", 1)
        return to_uint8(x if mask is None else torch.where(white, x.float(), picture))  # the rest as it was

    part = begin_pictures(out, rank, device)
    if args.interpolate:
        C, frames = args.sample or 4, []  # pictures side by side
        share = torch.linspace(0, 1, args.interpolate, device=device).repeat_interleave(C)
        noise = next(image_noise(args.seed, range(C), shape, device)).repeat(args.interpolate, 1, 1, 1)
        texts = [model.encode_text(text_batch(tokens, [k], device)) for k in range(P + 1)]
        for k in tqdm(range(P - 1), "sampling", disable=True if rank else None):
            x = np.concatenate([draw(e, between(texts[k], texts[k + 1], f), between(texts[P], texts[P], f))
                                for e, f in zip(noise.split(64), share.split(64))])
            first = C if k else 0  # the film has it already
            frames += [caption_rows([x[i:i + C]], [prompts[k + (share[i].item() > 0.5)]])
                       for i in range(first, len(x), C)]
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            save_gif(out / "interpolation.gif", frames)
            print(f"{len(frames)} frames in {out / 'interpolation.gif'}; {time.time() - began:.0f} s on {device}")
        return

    n = args.sample or 4 * P
    mine, side = np.array_split(np.arange(n), world)[rank], shape[1] // args.patch_size
    for i in tqdm([mine[k:k + 64] for k in range(0, len(mine), 64)], "sampling", disable=True if rank else None):
        noise = next(image_noise(args.seed, i // P if args.prompt else i, shape, device))
        x = draw(noise, *(text_batch(tokens, k, device) for k in (i % P, np.full(len(i), P))))
        part.mkdir(parents=True, exist_ok=True)
        for j, drawn in zip(i, x):
            write_atomically(part / f"{j:06d}.png", lambda f: Image.fromarray(drawn).save(f, "PNG"))
        if i[0] == 0:
            rows = [x[p::P] for p in range(min(P, len(x)))]
            grid = caption_rows(rows, prompts) if P <= 16 else tile(x, int(len(x) ** 0.5))
    sum_over_ranks(torch.zeros(1, device=device)).item()  # all wait for the others; without .item() NCCL would not
    if rank == 0:
        about = {k: getattr(args, k) for k in "negative_prompt seed cfg_scale sample_steps sampler ckpt".split()}
        lines = [json.dumps(dict(file_name=f"{j:06d}.png", text=prompts[j % P], **about)) + "\n" for j in range(n)]
        write_atomically(part / "metadata.jsonl", lambda f: f.write("".join(lines).encode()))
        earlier = publish(part, out / "generated")
        save_png(out / "generated.png", grid)
        first, last = args.cfg_interval
        how = f"{args.sampler}, {args.sample_steps} steps, --cfg_scale {args.cfg_scale} from t = {first} to {last}"
        if tokens.too_long:
            how += f"; texts of more than {reader.length} tokens, cut to that: {tokens.too_long}"
        if side != model.grid:
            how += f"; trained at {model.grid * args.size // side} pixels: the further from that, the worse"
        print(f"{n} pictures of {min(n, P)} prompt{'s' * (min(n, P) > 1)} in {out / 'generated'}"
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
        if args.ckpt:
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
        sentence, code = "out of memory: raise --accum, or lower --batch_size, or say --grad_checkpoint; for drawing " \
                         "lower --size or --sample", 1
    if sentence:  # before the next line, which can wait for ranks that are gone
        print(f"text2img.py: {sentence}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    status = main()
    if "RANK" in os.environ:  # threads of the process group can outlive the interpreter, which now and then aborts it
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
