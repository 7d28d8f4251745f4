"""LoRA: teach a text-to-image model something new, by a few thousandths of its weights.

    python finetune_lora.py                            # teaches the model of text2img.py a new animal: no GPU
    python finetune_lora.py --lora out/finetune_lora/lora.safetensors --sample 4 --prompt "a white panda"
    python finetune_lora.py --resume out/finetune_lora/ckpt.pt                # go on after Ctrl-C as if uninterrupted
    python finetune_lora.py --base SD_FOLDER --data my_dog --instance_prompt "a photo of sks dog"
    python finetune_lora.py --base stabilityai/stable-diffusion-xl-base-1.0 --data my_style --grad_checkpoint
    python finetune_lora.py --base black-forest-labs/FLUX.1-dev --data my_style --quant nf4 --grad_checkpoint
    torchrun --nproc_per_node=8 finetune_lora.py --base FOLDER --data my_style.zip

Expected, first line: 84 s on two cores of a shared Intel Xeon (torch 2.13.0), about 40 of them before the first step,
mostly to draw what the base should not forget; loss 0.204, val_loss 0.352; of 48 pandas of combinations that training
never had 96 % are as told (README.md). GPU: not measured yet.
Writes out/finetune_lora/: lora.safetensors (diffusers' and PEFT's names; --format kohya: kohya's), ckpt.pt, log.jsonl,
loss.png, samples/ with the base on the left and the LoRA on the right; with --sample generated/ and generated.png.

Papers: LoRA 2106.09685, QLoRA and NF4 2305.14314, DreamBooth and prior preservation 2208.12242, Stable Diffusion
2112.10752, SDXL 2307.01952, FLUX.1 without a paper (2403.03206 comes near), min-SNR 2303.09556, DDIM 2010.02502,
DPM-Solver++ 2211.01095, CLIP 2103.00020, T5 1910.10683, unigram pieces of words 1804.10959.
"""
import argparse
import base64
import datetime
import functools
import hashlib
import http.client
import io
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
from tqdm import tqdm

# -----------------------------------------------------------------------------
# Knobs. The kind of the base, which its files tell, fills in what is not given by hand.

DEFAULT_BASE = "out/text2img/model.safetensors"
COMMON = dict(size=512, rank=16, targets=["attn"], steps=1000, batch_size=1, lr=1e-4, eval_every=250, sampler="euler",
              class_images=100)
PRESETS = {
    "text2img": COMMON | dict(size=64, targets=["attn", "ff", "text"], steps=100, batch_size=16, lr=1e-3, eval_every=50,
                              sample_steps=50, cfg_scale=1.5, class_images=48),
    "sd": COMMON | dict(batch_size=2, sampler="dpmpp_2m", sample_steps=25, cfg_scale=7.5),
    "sdxl": COMMON | dict(size=1024, sample_steps=30, cfg_scale=5.0),
    "flux": COMMON | dict(sample_steps=28, cfg_scale=3.5)}
SAMPLERS = ["euler", "ddim", "dpmpp_2m"]
DRAWING = ("base lora prompt negative_prompt sampler sample_steps cfg_scale size quant out seed device dtype "
           "compile").split()  # flags that may go with --sample
TARGET_NAMES = {  # patterns of the names of the layers
    "attn": r"\.(attn\d?|cross)\.", "text": r"^text_encoder(_2)?\.encoder|\.tower\.encoder",
    "ff": r"blocks\..*\.(ff|ff_context|mlp|proj_mlp)\b|single_transformer_blocks\.\d+\.proj_out"}


def parse_args(argv=None):
    """The settings: flags given by hand. Wrong ones end the script with a sentence and status 2."""
    argv = sys.argv[1:] if argv is None else argv

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            if action.dest in PRESETS["sd"]:
                values = {kind: preset[action.dest] for kind, preset in PRESETS.items()}
                return action.help + " (default: " + ", ".join(f"{kind} {v}" for kind, v in values.items()) + ")"
            return action.help if action.default is None else super()._get_help_string(action)

    class Parser(argparse.ArgumentParser):
        def error(self, sentence):  # argparse would print the whole usage first
            self.exit(2, f"{self.prog}: {sentence}; --help lists every flag\n")

    p = Parser(prog="finetune_lora.py", description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction
    g = p.add_argument_group("base and data")
    g.add_argument("--base", metavar="FILE|FOLDER|OWNER/NAME", default=DEFAULT_BASE,
                   help="text2img.py's model.safetensors, or SD 1.5, SDXL or FLUX.1 as a folder or on the hub")
    g.add_argument("--data", metavar="drawn_pandas|FOLDER|.zip|.npz", default="drawn_pandas", help="what to learn")
    g.add_argument("--instance_prompt", metavar="TEXT", help="the caption of all pictures, in place of their own")
    g.add_argument("--class_prompt", nargs="+", metavar="TEXT", help="prior preservation: half of each batch is "
                   "what the base itself draws of these texts (or a .txt file), so as not to forget them")
    g.add_argument("--class_images", type=int, help="how many of these it draws first, once; 0 = off")
    g.add_argument("--size", type=int, help="pixels a side")
    g.add_argument("--flip", action=flag, default=True, help="mirror half of the training pictures")
    g = p.add_argument_group("LoRA")
    g.add_argument("--rank", type=int, help="rank of the two matrices beside a layer")
    g.add_argument("--alpha", type=float, help="the LoRA's output is scaled by alpha / rank; default alpha = rank")
    g.add_argument("--lora_dropout", type=float, default=0.0,
                   help="dropout on the input of each LoRA")
    g.add_argument("--targets", nargs="+", metavar="attn|ff|text|PATTERN", help="layers that get a LoRA: attn, ff "
                   "(MLPs), text (encoders), or a pattern for names like unet.mid_block.attentions.0.proj_in")
    g.add_argument("--lora", nargs="+", metavar="FILE[:WEIGHT]", default=[],
                   help="LoRAs to draw with, each scaled by its weight; in training the one to go on from")
    g = p.add_argument_group("memory")
    g.add_argument("--quant", choices=["int8", "nf4"], help="hold the frozen weights in 8 or 4 bits")
    g.add_argument("--grad_checkpoint", action=flag, default=False,
                   help="compute activations a second time instead of keeping them: less memory, a third more work")
    g = p.add_argument_group("training")
    g.add_argument("--steps", type=int, help="optimizer steps")
    g.add_argument("--batch_size", type=int, help="training examples per step, on all devices together")
    g.add_argument("--accum", type=int, default=1, help="parts that each batch is split into, to save memory")
    g.add_argument("--lr", type=float, help="peak learning rate of AdamW")
    g.add_argument("--ema_decay", type=float, default=0.99,
                   help="decay of the averaged weights, the ones that are sampled from")
    g.add_argument("--min_snr", type=float, default=5.0,
                   help="gamma of min-SNR loss weights (the paper: 5); 0 = off")
    g.add_argument("--eval_every", type=int, help="steps from one validation, sample grid and checkpoint to the next")
    g.add_argument("--resume", metavar="FILE", help="continue the training run of this ckpt.pt")
    g = p.add_argument_group("sampling")
    g.add_argument("--sample", type=int, metavar="N", help="train nothing, draw N samples")
    g.add_argument("--prompt", nargs="+", metavar="TEXT", help="what to draw; several, or a .txt file with one a line")
    g.add_argument("--negative_prompt", default="", metavar="TEXT", help="what to keep away from, by guidance")
    g.add_argument("--sampler", choices=SAMPLERS, help="how noise becomes data")
    g.add_argument("--sample_steps", type=int, help="steps from noise to data")
    g.add_argument("--cfg_scale", type=float, help="strength of classifier-free guidance; 1 = off")
    g = p.add_argument_group("output and system")
    g.add_argument("--format", choices=["diffusers", "kohya"], default="diffusers", help="names in lora.safetensors")
    g.add_argument("--out", default="out/finetune_lora", help="folder for everything that a run writes")
    g.add_argument("--seed", type=int, default=0, help="seed of all randomness")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    g.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto",
                   help="arithmetic of the network; what is trained is always fp32")
    g.add_argument("--compile", action=flag, default=False, help="torch.compile the network")
    g.add_argument("--smoke", action=flag, default=False, help="two steps of a tiny model, then reload it and sample")
    if "--smoke" in argv:
        p.set_defaults(base="out/smoke_lora/base.safetensors", out="out/smoke_lora", steps=2, eval_every=1,
                       class_images=4, rank=2, sample_steps=2)
    args = p.parse_args(argv)
    args.given = {a.dest for a in p._actions for o in a.option_strings for w in argv if w == o or w.startswith(o + "=")}
    if args.prompt and not args.sample and args.given <= set(DRAWING):
        args.sample = 4 * len(read_prompts(args.prompt))
    check(args, p.error)
    return args


def check(args, error):
    """Calls error(sentence) for settings that cannot be, given by hand or found in a checkpoint."""
    for name in "size rank steps batch_size accum eval_every sample sample_steps".split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            error(f"--{name} has to be at least 1")
    if args.class_images is not None and args.class_images < 0:
        error("--class_images is 0 for none, or more")
    if args.alpha == 0:
        error("--alpha 0 multiplies what is learnt by 0")
    for name, top in dict(lr=1, ema_decay=1, lora_dropout=0.999, alpha=2 ** 31, min_snr=2 ** 31, cfg_scale=2 ** 31,
                          seed=2 ** 63).items():
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= top:
            error(f"--{name} has to lie between 0 and {top if top <= 1 else f'2^{top.bit_length() - 1}'}")
    if not args.out:
        error("--out is the name of a folder")
    if Path(args.out).is_file():
        error(f"--out {args.out} is a file; it has to be a folder, or nothing yet")
    out = Path(args.out).resolve()
    if Path(args.data).is_dir() and Path(args.data).resolve() in (out, *out.parents):
        error(f"--out {args.out} lies in --data {args.data}: its pictures would be learnt the next time")
    if args.sample and not args.prompt:
        error("--sample N goes with --prompt TEXT")
    if args.sample and args.resume:
        error("--sample N draws, and --resume goes on training: one of them")
    for name in sorted(args.given - {"sample", "smoke", *DRAWING}) if args.sample else ():
        error(f"--{name} is for training" + ("; for drawing say --sample_steps" if name == "steps" else ""))
    if not args.sample and len(args.lora) > 1:
        error("several --lora are for drawing, with --sample N; training goes on with one")
    for name in "rank alpha targets".split():
        if args.lora and not args.sample and name in args.given:
            error(f"--{name} is for a new LoRA; --lora FILE has its own")
    if args.class_images and "class_images" in args.given and not args.class_prompt and args.data != "drawn_pandas":
        error("--class_images goes with --class_prompt TEXT")
    if (args.sample_steps or 1) > 999:
        error("--sample_steps is at most 999")
    for pattern in args.targets or ():
        try:
            re.compile(TARGET_NAMES.get(pattern, pattern))
        except re.error as e:
            error(f"--targets {pattern} is no regular expression: {e}")

# -----------------------------------------------------------------------------
# The method: LoRA, 2106.09685. A layer W stays as it is, and learns two thin matrices beside it.


class LoRA(nn.Module):
    """B A x of 2106.09685 eq. 3, times alpha / rank, beside a linear layer or a convolution. A (rank, in) begins at
    random and B (out, rank) at zero, so that nothing is changed at first."""

    def __init__(self, layer, rank, alpha, dropout=0.0):
        super().__init__()
        self.rank, self.alpha, self.dropout = rank, alpha, nn.Dropout(dropout)
        if isinstance(layer, nn.Conv2d):  # A does what the convolution does, B mixes the channels
            self.A = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False)
            self.B = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.A, self.B = (nn.Linear(*sides, bias=False) for sides in
                              ((layer.in_features, rank), (rank, layer.out_features)))
        nn.init.normal_(self.A.weight, std=1 / rank)
        nn.init.zeros_(self.B.weight)

    def forward(self, x, weight=1.0):                                            # (..., in)
        x = self.dropout(x) if torch.is_grad_enabled() else x                    # not where it draws or is judged
        return self.B(self.A(x) * (weight * self.alpha / self.rank))             # (..., rank), (..., out)

    def delta(self):
        """What it adds to the layer's weight, in its shape."""
        product = self.B.weight.flatten(1) @ self.A.weight.flatten(1) * (self.alpha / self.rank)
        return product.view(len(product), *self.A.weight.shape[1:])


class Adapted(nn.Module):
    """A frozen layer with any number of LoRAs beside it, each with the weight that --lora gives it."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.loras, self.weights, self.original = layer, nn.ModuleList(), [], None

    @property
    def weight(self):  # for those who ask a layer for its dtype
        return self.layer.weight

    def forward(self, x):
        y = self.layer(x)
        for lora, weight in zip(self.loras, self.weights) if self.original is None else ():
            if weight:
                y = y + lora(x, weight)
        return y

    @torch.no_grad()
    def merge(self, keep=True):
        """Adds the LoRAs to the layer's weight, for nothing more to be done in forward(); for ever, unless the weight
        is kept as it was."""
        self.original = self.layer.weight.detach().clone() if keep else None
        for lora, weight in zip(self.loras, self.weights):
            self.layer.weight += (lora.delta() * weight).to(self.layer.weight.dtype)
        if not keep:
            self.loras, self.weights = nn.ModuleList(), []

    @torch.no_grad()
    def unmerge(self):
        """Exactly as it was: what is added cannot be taken away without rounding."""
        self.layer.weight.copy_(self.original)
        self.original = None


NF4 = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)  # 2305.14314 appendix E: quantiles of a Gaussian


class Quantised(nn.Module):
    """A frozen linear layer in 8 or 4 bits: in blocks of 64 weights, each with the scale at which its largest is 1.
    nf4 takes the nearest of 16 numbers that a Gaussian makes equally likely (2305.14314), int8 of 255 even ones."""

    def __init__(self, layer, kind):
        super().__init__()
        self.kind, (self.out_features, self.in_features) = kind, layer.weight.shape
        w = F.pad(layer.weight.detach().float().flatten(), (0, -layer.weight.numel() % 64)).view(-1, 64)
        scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12)
        if kind == "int8":
            scale = scale / 127
            q = (w / scale).round().to(torch.int8)
        else:
            levels = torch.tensor(NF4, device=w.device)
            q = torch.bucketize(w / scale, (levels[1:] + levels[:-1]) / 2, out_int32=True).byte()
            q = q[:, ::2] * 16 + q[:, 1::2]                                      # two in a byte
            pairs = torch.cartesian_prod(levels, levels).bfloat16()              # (256, 2), what a byte stands for
            self.register_buffer("pairs", pairs, persistent=False)
        self.register_buffer("q", q)
        self.register_buffer("scale", scale.bfloat16())
        self.bias = layer.bias

    def unpack(self, dtype):
        """-> the weight (out, in), nearly."""
        w = (self.q if self.kind == "int8" else F.embedding(self.q.int(), self.pairs).flatten(1)).to(dtype)
        w = (w * self.scale.to(dtype)).flatten()
        return w[:self.out_features * self.in_features].view(self.out_features, self.in_features)

    def forward(self, x):                                                        # (..., in)
        x = x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
        y = FrozenProduct.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)             # (..., out)


class FrozenProduct(torch.autograd.Function):
    """x W^T with a Quantised W. It is unpacked again in the backward pass; autograd would keep it all the while."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x @ layer.unpack(x.dtype).T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.unpack(grad.dtype), None


def quantise(model, name, kind):
    """Puts a Quantised in the place of a linear layer."""
    parent, _, child = name.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, child, Quantised(getattr(parent, child), kind))


# -----------------------------------------------------------------------------
# Diffusion and flow: what the model is asked for in training, and how it draws. z0 is what the autoencoder makes of a
# picture, eps Gaussian noise. Stable Diffusion is a diffusion with t in 0..999, FLUX and text2img.py are flows with t
# from 0 (data) to 1 (noise).


def alpha_bar_of(config):
    """What is left of the data's variance at each t in 0..T-1, by the scheduler's config.json, float64."""
    T, first, last = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    root = {"scaled_linear": 0.5, "linear": 1}[config["beta_schedule"]]
    return torch.cumprod(1 - torch.linspace(first ** root, last ** root, T, dtype=torch.float64) ** (1 / root), 0)


def diffusion_loss(model, z0, eps, t, text, alpha_bar, v_prediction, min_snr):
    """Squared error of eps or v, 2006.11239 eq. 14 and 2202.00512, weighted by min(SNR, min_snr) / SNR of 2303.09556,
    which keeps the many t with hardly any noise from drowning the rest: z0, eps (B, C, h, w), t (B,) in 0..T-1, on the
    CPU as alpha_bar -> (B,)."""
    ab = alpha_bar[t].view(-1, 1, 1, 1).to(z0)
    zt = ab.sqrt() * z0 + (1 - ab).sqrt() * eps
    v_pred_target = ab.sqrt() * eps - (1 - ab).sqrt() * z0
    loss = (model(zt, t.to(z0.device), text) - (v_pred_target if v_prediction else eps)).square().mean((1, 2, 3))
    if min_snr == 0:
        return loss
    snr = (alpha_bar / (1 - alpha_bar))[t].to(z0)
    return loss * snr.clamp(max=min_snr) / (snr + 1 if v_prediction else snr)


def path(x0, eps, t):
    """Where the pair x0, eps (B, C, H, W) is at time t (B, 1, 1, 1), and its velocity there: 2209.03003 eq. 1."""
    return (1 - t) * x0 + t * eps, eps - x0


def logit_normal(shape, shift, generator):
    """Training times in (0, 1): sigmoid of a normal number, 2403.03206 eq. 19, so that most are in the middle, where
    there is most to learn; shift > 1 moves them to more noise, as time_grid() does."""
    t = torch.sigmoid(torch.randn(shape, generator=generator))
    return shift * t / (1 + (shift - 1) * t)


def loss_fn(model, x0, eps, t, text):
    """Squared error of the velocity, 2210.02747 eq. 9: x0, eps (B, C, H, W), t (B,), text -> (B,)."""
    xt, v = path(x0, eps, t.view(-1, 1, 1, 1))
    return (model(xt, t, text) - v).square().mean((1, 2, 3))


def time_grid(steps, shift):
    """steps + 1 times from 1 to 0; shift > 1 puts more of them where there is much noise (2403.03206 eq. 23)."""
    t = np.linspace(1, 0, steps + 1)
    return (shift * t / (1 + (shift - 1) * t)).tolist()


def sample(model, x, sampler, times):
    """x (B, C, h, w) carried from times[0] to times[-1]. model(x, t) is dx / dt: of a flow the velocity, of a diffusion
    eps, with sigma for t. euler, and ddim: Euler's method. dpmpp_2m: 2211.01095 algorithm 2, which takes what is left
    of x without the noise, x - t dx/dt, for a line through the last two steps."""
    before = None
    for t, s in zip(times, times[1:]):
        d = model(x, t).to(x.dtype)
        if sampler == "dpmpp_2m" and s > 0:
            x0, h = x - t * d, math.log(t / s)
            ahead = 0 if before is None else (x0 - before[0]) * h / (2 * before[1])
            x, before = s / t * x + (1 - s / t) * (x0 + ahead), (x0, h)
        else:
            x = x + (s - t) * d
    return x


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

# -----------------------------------------------------------------------------
# The UNet of Stable Diffusion, 2112.10752, and of SDXL, 2307.01952. B images, C channels, D width of a token, L text
# tokens. The names of the weights are those of the files, in diffusers' layout.


def attention(q, k, v, heads):
    """Multi-head attention of q (B, N, D) to k, v (B, L, D)."""
    q, k, v = (a.unflatten(2, (heads, -1)).transpose(1, 2) for a in (q, k, v))   # (B, heads, N, D / heads)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Rerun(nn.Module):
    """Modules whose parts forward() can compute again in the backward pass, instead of keeping all activations."""
    grad_checkpoint = False

    def call(self, block, *args):
        if self.grad_checkpoint and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)
        return block(*args)


class SDAttention(nn.Module):
    """Of x to itself, or to the tokens of the text."""

    def __init__(self, D, context, heads):
        super().__init__()
        self.heads, self.to_q = heads, nn.Linear(D, D, bias=False)
        self.to_k, self.to_v = nn.Linear(context, D, bias=False), nn.Linear(context, D, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(D, D)])

    def forward(self, x, context):                                               # (B, N, D), (B, L, context)
        return self.to_out[0](attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class FeedForward(nn.Module):
    """An MLP, 4 D wide; gated with GEGLU, 2002.05202, in Stable Diffusion, in FLUX not."""

    def __init__(self, D, gated):
        super().__init__()
        self.gated = gated
        self.net = nn.ModuleList([nn.ModuleDict(dict(proj=nn.Linear(D, 8 * D if gated else 4 * D))), nn.Identity(),
                                  nn.Linear(4 * D, D)])

    def forward(self, x):                                                        # (B, N, D)
        h = self.net[0]["proj"](x)                                               # (B, N, 4 D), or twice that
        if self.gated:
            h, gate = h.chunk(2, -1)
            return self.net[2](h * F.gelu(gate))
        return self.net[2](F.gelu(h, approximate="tanh"))


class SDBlock(nn.Module):
    """Attention among the positions, attention to the text, an MLP."""

    def __init__(self, D, context, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(D) for _ in range(3))
        self.attn1, self.attn2 = SDAttention(D, D, heads), SDAttention(D, context, heads)
        self.ff = FeedForward(D, gated=True)

    def forward(self, x, context):                                               # (B, N, D), (B, L, context)
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))                                        # (B, N, D)


class SDTransformer(nn.Module):
    """Blocks on the positions of a map. proj_in and proj_out are 1 x 1 convolutions in SD 1.5, linear in SDXL."""

    def __init__(self, D, context, heads, depth, groups, linear):
        super().__init__()
        self.linear, self.norm = linear, nn.GroupNorm(groups, D, 1e-6)
        self.proj_in, self.proj_out = (nn.Linear(D, D) if linear else nn.Conv2d(D, D, 1) for _ in range(2))
        self.transformer_blocks = nn.ModuleList(SDBlock(D, context, heads) for _ in range(depth))

    def forward(self, x, context):                                               # (B, D, H, W), (B, L, context)
        h = self.norm(x)
        h = self.proj_in(h.flatten(2).mT) if self.linear else self.proj_in(h).flatten(2).mT              # (B, H W, D)
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h).mT.reshape(x.shape) if self.linear else self.proj_out(h.mT.reshape(x.shape))
        return x + h


class SDResBlock(nn.Module):
    """Two convolutions, told the time between them."""

    def __init__(self, c_in, c_out, emb, groups):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, c_in, 1e-5), nn.GroupNorm(groups, c_out, 1e-5)
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb, c_out)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):                                                   # (B, c_in, H, W), (B, emb)
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))         # (B, c_out, H, W)


class TwoLayers(nn.Module):
    """Of what the network is told beside the text: the time, the size, the strength of the guidance."""

    def __init__(self, c_in, D):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(c_in, D), nn.Linear(D, D)

    def forward(self, x):                                                        # (B, c_in)
        return self.linear_2(F.silu(self.linear_1(x)))                           # (B, D)


class SDUNet(Rerun):
    """(zt, t, text) -> eps or v. zt (B, C, h, w), t (B,) in 0..999; text: context (B, L, D), and in SDXL pooled (B, P)
    and the six numbers size (B, 6): height and width of the original, top and left of the crop, height and width."""

    def __init__(self, config):
        super().__init__()
        widths, each, groups = config["block_out_channels"], config["layers_per_block"], config["norm_num_groups"]
        n, context, emb = len(widths), config["cross_attention_dim"], 4 * widths[0]

        def by_level(x):
            return x if isinstance(x, list) else [x] * n
        heads = by_level(config.get("num_attention_heads") or config["attention_head_dim"])  # named so by mistake
        depths = by_level(config.get("transformer_layers_per_block", 1))
        text = [name.startswith("CrossAttn") for name in config["down_block_types"]]
        linear = config.get("use_linear_projection", False)
        self.size_width = config.get("addition_time_embed_dim")                # SDXL's

        def stage(i, inputs, with_text, **end):
            c = widths[i]
            parts = dict(resnets=[SDResBlock(c_in, c, emb, groups) for c_in in inputs])
            if with_text:
                parts["attentions"] = [SDTransformer(c, context, heads[i], depths[i], groups, linear)
                                       for _ in range(with_text)]
            parts |= {k: [nn.ModuleDict(dict(conv=conv))] for k, conv in end.items() if conv}
            return nn.ModuleDict({k: nn.ModuleList(v) for k, v in parts.items()})

        self.first, self.conv_in = widths[0], nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = TwoLayers(widths[0], emb)
        if self.size_width:
            self.add_embedding = TwoLayers(config["projection_class_embeddings_input_dim"], emb)
        self.down_blocks, self.up_blocks, c, skips = nn.ModuleList(), nn.ModuleList(), widths[0], [widths[0]]
        for i, wide in enumerate(widths):
            down = nn.Conv2d(wide, wide, 3, 2, 1) if i < n - 1 else None
            self.down_blocks.append(stage(i, [c] + [wide] * (each - 1), each * text[i], downsamplers=down))
            skips += [wide] * (each + bool(down))
            c = wide
        self.mid_block = stage(n - 1, [c, c], 1)
        for i, wide in reversed(list(enumerate(widths))):
            up, inputs = nn.Conv2d(wide, wide, 3, padding=1) if i > 0 else None, []
            for _ in range(each + 1):
                inputs.append(c + skips.pop())
                c = wide
            self.up_blocks.append(stage(i, inputs, (each + 1) * text[i], upsamplers=up))
        self.conv_norm_out = nn.GroupNorm(groups, c, 1e-5)
        self.conv_out = nn.Conv2d(c, config["out_channels"], 3, padding=1)

    def forward(self, zt, t, text):                                              # (B, C, h, w), (B,)
        context, dtype = text[0], self.conv_in.weight.dtype
        emb = self.time_embedding(waves(t.float(), self.first).to(dtype))  # (B, emb)
        if self.size_width:
            size = waves(text[2].flatten().float(), self.size_width).view(len(zt), -1)
            emb = emb + self.add_embedding(torch.cat([text[1].to(dtype), size.to(dtype)], 1))
        h = self.conv_in(zt)
        skips = [h]
        for stage in self.down_blocks:
            for j, block in enumerate(stage["resnets"]):
                h = self.call(block, h, emb)
                if "attentions" in stage:
                    h = self.call(stage["attentions"][j], h, context)
                skips.append(h)
            if "downsamplers" in stage:
                h = stage["downsamplers"][0]["conv"](h)                          # half the side
                skips.append(h)
        h = self.call(self.mid_block["resnets"][0], h, emb)
        h = self.call(self.mid_block["attentions"][0], h, context)
        h = self.call(self.mid_block["resnets"][1], h, emb)
        for stage in self.up_blocks:
            for j, block in enumerate(stage["resnets"]):
                h = self.call(block, torch.cat([h, skips.pop()], 1), emb)
                if "attentions" in stage:
                    h = self.call(stage["attentions"][j], h, context)
            if "upsamplers" in stage:                                            # to the side of what comes next
                h = stage["upsamplers"][0]["conv"](F.interpolate(h, skips[-1].shape[2:]))
        return self.conv_out(F.silu(self.conv_norm_out(h)))                      # (B, C, h, w)


# -----------------------------------------------------------------------------
# FLUX.1's transformer: text and image side by side, at first each with its own weights, then with the same. N image
# tokens of 2 x 2 latents, L text tokens. The names are those of the files.


def flux_rope(sides, axes, device):
    """2104.09864 on three axes; images are at 0 on the first, texts at 0 on all: cosines and sines (L + N, d / 2) of
    the angles by which pairs of neighbouring channels turn."""
    L, H, W = sides
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    ids = torch.cat([torch.zeros(L, 3), torch.stack([torch.zeros(H, W), rows, columns], -1).view(-1, 3)])
    angle = torch.cat([torch.outer(ids[:, i].double(), 10_000 ** -(torch.arange(0, d, 2).double() / d))
                       for i, d in enumerate(axes)], 1)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def flux_rotate(x, positions):
    """x (B, heads, L + N, d): channels 2 i and 2 i + 1 are the real and imaginary part."""
    cos, sin = positions
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


class FluxAttention(nn.Module):
    """Attention among text and image together; q and k are normed. added: the text has weights of its own."""

    def __init__(self, D, heads, added):
        super().__init__()
        self.heads, self.added, d = heads, added, D // heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, D) for _ in range(3))
        self.norm_q, self.norm_k = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        if added:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(D, D) for _ in range(3))
            self.norm_added_q, self.norm_added_k = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
            self.to_out, self.to_add_out = nn.ModuleList([nn.Linear(D, D)]), nn.Linear(D, D)

    def forward(self, x, positions, txt=None):                                   # (B, N, D), ..., (B, L, D)
        def split(x, q, k, v, norm_q, norm_k):                                   # -> (B, heads, N, d) each
            q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (q, k, v))
            return norm_q(q.to(norm_q.weight.dtype)), norm_k(k.to(norm_k.weight.dtype)), v
        q, k, v = split(x, self.to_q, self.to_k, self.to_v, self.norm_q, self.norm_k)
        if self.added:
            texts = split(txt, self.add_q_proj, self.add_k_proj, self.add_v_proj, self.norm_added_q, self.norm_added_k)
            q, k, v = (torch.cat(pair, 2) for pair in zip(texts, (q, k, v)))     # (B, heads, L + N, d)
        q, k = (flux_rotate(a, positions).to(v.dtype) for a in (q, k))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if not self.added:
            return h
        return self.to_out[0](h[:, txt.shape[1]:]), self.to_add_out(h[:, :txt.shape[1]])


def modulated(x, shift, scale):
    """adaLN: a norm without weights of its own, whose shift and scale come from the time."""
    return (F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift).to(x.dtype)  # autocast's norms are fp32


class FluxDouble(nn.Module):
    """Image and text, each with its own weights, meet in one attention (MM-DiT, 2403.03206 section 4)."""

    def __init__(self, D, heads):
        super().__init__()
        self.norm1, self.norm1_context = (nn.ModuleDict(dict(linear=nn.Linear(D, 6 * D))) for _ in range(2))
        self.attn = FluxAttention(D, heads, added=True)
        self.ff, self.ff_context = FeedForward(D, gated=False), FeedForward(D, gated=False)

    def forward(self, x, txt, emb, positions):                                   # (B, N, D), (B, L, D), (B, D)
        image = self.norm1["linear"](emb)[:, None].chunk(6, -1)                  # shift, scale, gate; again for ff
        text = self.norm1_context["linear"](emb)[:, None].chunk(6, -1)
        h, h_txt = self.attn(modulated(x, *image[:2]), positions, modulated(txt, *text[:2]))
        x, txt = x + image[2] * h, txt + text[2] * h_txt
        x = x + image[5] * self.ff(modulated(x, *image[3:5]))
        return x, txt + text[5] * self.ff_context(modulated(txt, *text[3:5]))


class FluxSingle(nn.Module):
    """Attention and MLP at once, on text and image in a row."""

    def __init__(self, D, heads):
        super().__init__()
        self.norm, self.attn = nn.ModuleDict(dict(linear=nn.Linear(D, 3 * D))), FluxAttention(D, heads, added=False)
        self.proj_mlp, self.proj_out = nn.Linear(D, 4 * D), nn.Linear(5 * D, D)

    def forward(self, x, emb, positions):                                        # (B, L + N, D), (B, D)
        shift, scale, gate = self.norm["linear"](emb)[:, None].chunk(3, -1)
        h = modulated(x, shift, scale)
        h = torch.cat([self.attn(h, positions), F.gelu(self.proj_mlp(h), approximate="tanh")], -1)
        return x + gate * self.proj_out(h)


class Flux(Rerun):
    """(zt, t, text) -> velocity. zt (B, 16, h, w), t (B,) in [0, 1]; text: txt (B, L, T5's width), pooled (B, CLIP's),
    and where the model was distilled to be guided (dev) guidance (B,), the strength that it imitates."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.axes = config["num_attention_heads"], config.get("axes_dims_rope", (16, 56, 56))
        D = self.heads * config["attention_head_dim"]
        self.x_embedder = nn.Linear(config["in_channels"], D)
        self.context_embedder = nn.Linear(config["joint_attention_dim"], D)
        embedders = dict(timestep_embedder=TwoLayers(256, D),
                         text_embedder=TwoLayers(config["pooled_projection_dim"], D))
        if config.get("guidance_embeds"):
            embedders["guidance_embedder"] = TwoLayers(256, D)
        self.time_text_embed = nn.ModuleDict(embedders)
        self.transformer_blocks = nn.ModuleList(FluxDouble(D, self.heads) for _ in range(config["num_layers"]))
        self.single_transformer_blocks = nn.ModuleList(FluxSingle(D, self.heads)
                                                       for _ in range(config["num_single_layers"]))
        self.norm_out = nn.ModuleDict(dict(linear=nn.Linear(D, 2 * D)))
        self.proj_out = nn.Linear(D, config["in_channels"])

    def forward(self, zt, t, text):                                              # (B, 16, h, w), (B,)
        dtype, (H, W) = self.proj_out.weight.dtype, (side // 2 for side in zt.shape[2:])
        x = self.x_embedder(F.pixel_unshuffle(zt, 2).flatten(2).mT)              # (B, N, D); channel, row, column
        txt, embedders = self.context_embedder(text[0]), self.time_text_embed    # (B, L, D)
        emb = embedders["timestep_embedder"](waves(1000 * t.float(), 256).to(dtype))
        emb = emb + embedders["text_embedder"](text[1])
        if "guidance_embedder" in embedders:
            emb = emb + embedders["guidance_embedder"](waves(1000 * text[2].float(), 256).to(dtype))
        emb = F.silu(emb)                                                        # (B, D)
        positions = flux_rope((txt.shape[1], H, W), self.axes, x.device)
        for block in self.transformer_blocks:
            x, txt = self.call(block, x, txt, emb, positions)
        x = torch.cat([txt, x], 1)                                               # (B, L + N, D)
        for block in self.single_transformer_blocks:
            x = self.call(block, x, emb, positions)
        scale, shift = self.norm_out["linear"](emb)[:, None].chunk(2, -1)
        x = self.proj_out(modulated(x[:, txt.shape[1]:], shift, scale))          # (B, N, 64)
        return F.pixel_shuffle(x.mT.unflatten(2, (H, W)), 2)                     # (B, 16, h, w)


# -----------------------------------------------------------------------------
# What reads the text: CLIP, as in text2img.py, and for FLUX T5, 1910.10683. The names are those of the files.


class T5Layer(nn.Module):
    """Attention without a scale, to which a bias by distance is added; and an MLP with a gate. In the files it is
    layer.0 and layer.1."""

    def __init__(self, D, d, hidden, heads, buckets):
        super().__init__()
        self.heads = heads
        part = nn.ModuleDict({name: nn.Linear(D, heads * d, bias=False) for name in "qkv"})
        part["o"] = nn.Linear(heads * d, D, bias=False)
        if buckets:
            part["relative_attention_bias"] = nn.Embedding(buckets, heads)
        wi = {name: nn.Linear(D, hidden, bias=False) for name in ("wi_0", "wi_1")}
        wi["wo"] = nn.Linear(hidden, D, bias=False)
        self.layer = nn.ModuleList([
            nn.ModuleDict(dict(SelfAttention=part, layer_norm=nn.RMSNorm(D, eps=1e-6))),
            nn.ModuleDict(dict(DenseReluDense=nn.ModuleDict(wi), layer_norm=nn.RMSNorm(D, eps=1e-6)))])

    def forward(self, x, bias):                                                  # (B, L, D), (1, heads, L, L)
        part, ff = self.layer[0]["SelfAttention"], self.layer[1]["DenseReluDense"]
        h = self.layer[0]["layer_norm"](x)
        q, k, v = (part[name](h).unflatten(2, (self.heads, -1)).transpose(1, 2) for name in "qkv")
        h = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype), scale=1.0)
        x = x + part["o"](h.transpose(1, 2).flatten(2))
        h = self.layer[1]["layer_norm"](x)
        return x + ff["wo"](F.gelu(ff["wi_0"](h), approximate="tanh") * ff["wi_1"](h))


class T5(nn.Module):
    """The encoder of T5 v1.1: ids (B, L) -> (B, L, D). FLUX lets it read the padding, too."""

    def __init__(self, config):
        super().__init__()
        self.buckets, self.far = (config.get(f"relative_attention_{k}", v) for k, v in
                                  (("num_buckets", 32), ("max_distance", 128)))
        D, heads = config["d_model"], config["num_heads"]
        layers = [T5Layer(D, config["d_kv"], config["d_ff"], heads, self.buckets if i == 0 else 0)
                  for i in range(config["num_layers"])]
        self.shared = nn.Embedding(config["vocab_size"], D)
        self.encoder = nn.ModuleDict(dict(block=nn.ModuleList(layers), final_layer_norm=nn.RMSNorm(D, eps=1e-6)))

    def bias(self, L, device):
        """Section 2.1: distances up to 8 have a number each, more and more share one up to 128, on either side."""
        distance = torch.arange(L, device=device)[None] - torch.arange(L, device=device)[:, None]        # (L, L)
        half, exact = self.buckets // 2, self.buckets // 4
        far = exact + (distance.abs().clamp(min=1).float() / exact).log() / math.log(self.far / exact) * (half - exact)
        bucket = torch.where(distance.abs() < exact, distance.abs(), far.long().clamp(max=half - 1))
        table = self.encoder["block"][0].layer[0]["SelfAttention"]["relative_attention_bias"]
        return table(bucket + half * (distance > 0)).permute(2, 0, 1)[None]      # (1, heads, L, L)

    def forward(self, ids):                                                      # (B, L)
        x, bias = self.shared(ids), self.bias(ids.shape[1], ids.device)
        for layer in self.encoder["block"]:
            x = layer(x, bias)                                                   # (B, L, D)
        return self.encoder["final_layer_norm"](x)


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


class Unigram:
    """T5's ids, 1804.10959: of all ways to cut a word into pieces the likeliest. Equal to sentencepiece where a text
    holds none of the special tokens, which are taken for what they say here, as in transformers.

    pieces [(text, log of its likelihood), ...] in the order of their ids; special {text: id}; charsmap, the compiled
    rules that replace characters before that: its length, a trie in a double array (darts-clone), and texts."""

    def __init__(self, pieces, special, unknown, charsmap=b""):
        self.ids, self.special, self.unknown = {p: (i, score) for i, (p, score) in enumerate(pieces)}, special, unknown
        self.longest, self.end = max(len(p) for p, _ in pieces), special["</s>"]
        self.worst = min(score for _, score in pieces) - 10                      # of a letter that no piece has
        size = struct.unpack("<I", charsmap[:4])[0] if charsmap else 0
        self.trie, self.texts = struct.unpack(f"<{size // 4}I", charsmap[4:4 + size]), charsmap[4 + size:]

    def normal(self, text):
        """Replaces what the rules know, the longest first, such as full-width letters and kinds of spaces."""
        data, out, i = text.encode(errors="replace"), b"", 0
        while i < len(data):
            node, n, found, j = 0, 0, None, i
            while self.trie and j < len(data):
                unit = self.trie[node]
                node ^= (unit >> 10) << ((unit & 512) >> 6) ^ data[j]
                if node >= len(self.trie) or self.trie[node] & 0x800000ff != data[j]:
                    break
                unit, j = self.trie[node], j + 1
                if unit >> 8 & 1:                                                # a rule ends here
                    found, n = self.trie[node ^ (unit >> 10) << ((unit & 512) >> 6)] & 0x7fffffff, j - i
            if found is None:
                n = max(1, len(data[i:i + 4].decode(errors="ignore")[:1].encode()))
                out += data[i:i + n]
            else:
                out += self.texts[found:self.texts.index(b"\0", found)]
            i += n
        return out.decode(errors="replace")

    def pieces(self, word):
        """Viterbi's algorithm: best[i] is the likeliest way to write the first i letters."""
        best = [(0.0, 0, None)] + [(-math.inf, 0, None)] * len(word)
        for i in range(len(word)):
            for j in range(i + 1, min(i + self.longest, len(word)) + 1):
                number, score = self.ids.get(word[i:j], (self.unknown, self.worst if j == i + 1 else -math.inf))
                if best[i][0] + score > best[j][0]:
                    best[j] = best[i][0] + score, i, number
        ids, j = [], len(word)
        while j > 0:
            _, i, number = best[j]
            if not (number == self.unknown and ids and ids[-1] == number):       # of unknown letters one for all
                ids.append(number)
            j = i
        return ids[::-1]

    def __call__(self, text):
        ids = []
        for i, part in enumerate(re.split("(" + "|".join(map(re.escape, self.special)) + ")", text)):
            if i % 2:
                ids.append(self.special[part])
            for word in self.normal(part).split() if i % 2 == 0 else ():
                ids += self.pieces("\u2581" + word)
        return [*ids, self.end]


def read_unigram(file):
    """T5's tokenizer from tokenizer.json or from sentencepiece's spiece.model. Raises Stop."""
    def fields(data):
        """A message of protobuf -> (number of the field, its bytes or number) one by one."""
        i = 0

        def varint():
            nonlocal i
            n = shift = 0
            while True:
                n, i, shift = n | (data[i] & 127) << shift, i + 1, shift + 7
                if data[i - 1] < 128:
                    return n
        while i < len(data):
            number, kind = divmod(varint(), 8)
            if kind == 0:
                yield number, varint()
            else:
                n = {1: 8, 5: 4}[kind] if kind != 2 else varint()
                yield number, data[i:i + n]
                i += n
    try:
        if file.suffix == ".json":
            about = json.loads(file.read_text(encoding="utf-8"))
            steps = about["normalizer"] or {}
            steps = [steps, *steps.get("normalizers", [])]
            charsmap = [step["precompiled_charsmap"] for step in steps if step.get("precompiled_charsmap")]
            return Unigram([(p, score) for p, score in about["model"]["vocab"]],
                           {a["content"]: a["id"] for a in about["added_tokens"]}, about["model"]["unk_id"],
                           base64.b64decode(charsmap[0]) if charsmap else b"")
        pieces, special, charsmap, unknown = [], {}, b"", 2
        for number, value in fields(file.read_bytes()):
            if number == 1:
                piece = {1: b"", 2: b"\0\0\0\0", 3: 1, **dict(fields(value))}
                text = piece[1].decode()
                if piece[3] == 2:
                    unknown = len(pieces)
                if piece[3] in (2, 3):                                           # unknown and control
                    special[text] = len(pieces)
                pieces.append((text, struct.unpack("<f", piece[2])[0]))
            elif number == 3:
                charsmap = dict(fields(value)).get(2, b"")
        special |= {f"<extra_id_{99 - k}>": len(pieces) + k for k in range(100)}  # T5 has them behind all others
        return Unigram(pieces, special, unknown, charsmap)
    except OSError as e:
        raise Stop(f"cannot read {file}: {e.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as e:
        raise Stop(f"{file} is no tokenizer of T5: {e!r}")


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
# The transformer of text2img.py.

SIZES = {"tiny": (6, 192, 3), "S": (12, 384, 6), "M": (12, 640, 10), "B": (12, 768, 12), "L": (24, 1024, 16)}


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
# Autoencoders.


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


def decode(vae, model, z):
    """Latents of mean 0 and variance 1 -> pictures (B, 3, H, W)."""
    return torch.cat([vae.decode(part * model.z_std + model.z_mean) for part in z.split(16)])  # large ones fill memory


def fingerprint(vae):
    """What tells a tokenizer from others, wherever it lies."""
    digest = hashlib.sha256(repr(vae).encode())
    for v in vae.state_dict().values():
        digest.update(v.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# -----------------------------------------------------------------------------
# What is fine-tuned, found from the files themselves: see Base.


def load_frozen(model, tensors, where, device, dtype, quant=None):
    """Fills a model that was made on the device "meta", one weight after the other; quantises the linear layers of its
    blocks, which are nearly all of a large one. Raises Stop."""
    wanted = {k: v.shape for k, v in model.state_dict().items()}
    wrong = [k for k in wanted if k not in tensors] + [f"{k} (not known)" for k in tensors if k not in wanted] \
        + [f"{k} {list(tensors[k].shape)}" for k in wanted if k in tensors and tensors[k].shape != wanted[k]]
    if wrong:
        raise Stop(f"{where} is not whole, or of another architecture: {len(wrong)} weights, such as "
                   + ", ".join(sorted(wrong)[:5]))
    for name, module in tqdm(list(model.named_modules()), where.name, disable=None, leave=False):
        for k, v in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            v = tensors[f"{name}.{k}" if name else k].to(device, dtype)
            if k in module._parameters:
                setattr(module, k, nn.Parameter(v, requires_grad=False))
            else:
                setattr(module, k, v)
        if quant and isinstance(module, nn.Linear) and "block" in name:
            quantise(model, name, quant)
    return model.eval()


def read_tensors(files):
    """The tensors of one safetensors file, or of the parts of a large one."""
    tensors = {}
    for file in files:
        tensors |= load_safetensors(file)[0]
    return tensors


def read_json(file):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise Stop(f"cannot read {file}: {getattr(e, 'strerror', None) or e}")


KINDS = {"StableDiffusionPipeline": "sd", "StableDiffusionXLPipeline": "sdxl", "FluxPipeline": "flux"}


def find_file(base, *choices):
    """The first of these files that a base has, a folder or a repository of the hub, or None. Raises Stop."""
    for choice in choices:
        if Path(base).is_dir():
            if Path(base, choice).is_file():
                return Path(base, choice)
            continue
        try:
            return hub_file(base, choice)
        except Stop as e:
            if "says 401" in str(e) or "says 403" in str(e):
                raise Stop(f"{base} is not there, or has to be asked for: agree to its licence on its page, and put "
                           f"your key into HF_TOKEN ({e})", 1)
            if "says 404" not in str(e):
                raise
    return None


def need_file(base, *choices):
    """find_file, or Stop."""
    file = find_file(base, *choices)
    if file is None:
        raise Stop(f"{base} is incomplete: there is no {' or '.join(choices)}")
    return file


def weight_files(base, part, stem):
    """The one file with the weights of a part, or the several that an index names."""
    index = find_file(base, f"{part}/{stem}.safetensors.index.json", f"{part}/{stem}.safetensors.index.fp16.json")
    if index is None:
        return [need_file(base, f"{part}/{stem}.safetensors", f"{part}/{stem}.fp16.safetensors")]
    try:
        return [need_file(base, f"{part}/{shard}") for shard in sorted(set(read_json(index)["weight_map"].values()))]
    except (KeyError, TypeError, AttributeError):
        raise Stop(f"{index} does not say where the weights are")


def clip_vocabulary(base, part):
    """The files of a CLIP tokenizer: vocabulary and merges, in two files or one, and two that may be missing."""
    files = [find_file(base, f"{part}/vocab.json"), find_file(base, f"{part}/merges.txt")]
    files = files if all(files) else [need_file(base, f"{part}/tokenizer.json", f"{part}/vocab.json"), None]
    return files + [find_file(base, f"{part}/{name}") for name in ("special_tokens_map.json", "tokenizer_config.json")]


def find_base(name):
    """A name -> {part: its files}: a model.safetensors of text2img.py, or the parts of a folder in the layout of
    diffusers, which can also be a repository of the hub. Raises Stop that says what is missing."""
    if Path(name).is_file():
        return {"text2img": [Path(name)]}
    if Path(name, "model.safetensors").is_file() and not Path(name, "model_index.json").exists():
        raise Stop(f"{name} is a folder: say {Path(name, 'model.safetensors')}")
    if not Path(name).is_dir() and (not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.endswith(".safetensors")
                                    or name.startswith(("out/", "data/"))):
        raise Stop(f"{name} does not exist")
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    hub = Path(os.environ.get("HF_HUB_CACHE", hub), f"models--{name.replace('/', '--')}", "snapshots")
    for index in sorted(hub.glob("*/model_index.json")) if not Path(name).is_dir() else ():
        try:
            return find_base(str(index.parent))  # whole, in the user's own cache
        except Stop:
            continue

    about = need_file(name, "model_index.json")
    pipeline = read_json(about)
    pipeline = pipeline.get("_class_name") if isinstance(pipeline, dict) else "broken one"
    if pipeline not in KINDS:
        raise Stop(f"{name} is a {pipeline}; this script knows {', '.join(KINDS)}")
    kind = KINDS[pipeline]
    files = {kind: [about], "scheduler": [need_file(name, "scheduler/scheduler_config.json")]}
    for part in ("transformer" if kind == "flux" else "unet", "vae"):
        files[part] = [need_file(name, f"{part}/config.json"), *weight_files(name, part, "diffusion_pytorch_model")]
    for number in ("",) if kind == "sd" else ("", "_2"):
        part = f"text_encoder{number}"
        files[part] = [need_file(name, f"{part}/config.json"), *weight_files(name, part, "model")]
        t5 = kind == "flux" and number
        files[f"tokenizer{number}"] = clip_vocabulary(name, f"tokenizer{number}") if not t5 else \
            [need_file(name, "tokenizer_2/tokenizer.json", "tokenizer_2/spiece.model")]
    return files


AUTOENCODERS = {  # what text2img.py calls --vae
    "sd": ("stabilityai/sd-vae-ft-ema", "diffusion_pytorch_model.safetensors", dict(scaling_factor=0.18215)),
    "sdxl": ("stabilityai/sdxl-vae", "diffusion_pytorch_model.safetensors", dict(scaling_factor=0.13025)),
    "flux": ("black-forest-labs/FLUX.1-schnell", "vae/diffusion_pytorch_model.safetensors",
             dict(scaling_factor=0.3611, shift_factor=0.1159))}


def open_vae(files, config):
    """The autoencoder in these files, of latent diffusion's kind. Raises Stop."""
    tensors, old = {}, {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for k, v in read_tensors(files).items():
        *rest, name, last = k.split(".")
        if "attentions" in rest:  # older files have other names, and 1 x 1 convolutions
            k, v = ".".join([*rest, old.get(name, name), last]), v.flatten(1) if v.ndim == 4 else v
        tensors[k] = v.float()
    how = {ours: config[theirs] for ours, theirs in (("scale", "scaling_factor"), ("shift", "shift_factor"),
           ("groups", "norm_num_groups")) if config.get(theirs) is not None}
    try:
        return AutoencoderKL(tensors, **how)
    except (Stop, KeyError, StopIteration, RuntimeError, ValueError, TypeError) as e:
        raise Stop(f"{files[0]} is not a whole autoencoder: {e}")


class Prompts:
    """A CLIP tower and its tokenizer, as they lie in a folder of diffusers."""

    def __init__(self, files, part, tokenizer, device, dtype):
        config, *weights = files[part]
        vocab, merges, *about = files[tokenizer]
        self.bpe, tower = read_text_files(weights, config, vocab, merges)
        self.tower = tower.to(device, dtype).eval().requires_grad_(False)
        known = [read_json(file) for file in about if file]
        pads = [k.get("pad_token") if isinstance(k, dict) else None for k in known]
        self.pad = next((p if isinstance(p, str) else p["content"] for p in pads if p), "<|endoftext|>")
        self.pad_id = self.bpe.vocab.get(self.pad, self.bpe.end)

    def ids(self, texts):
        """-> ids (texts, 77), and how many texts were cut to that. SDXL's second tokenizer pads with "!", which it then
        takes for that in a text, too, as transformers does."""
        rows, length, too_long = [], self.tower.length, 0
        for text in texts:
            parts = [text] if self.pad_id == self.bpe.end else text.split(self.pad)
            ids = [id for part in parts for id in [self.pad_id, *self.bpe(part)[1:-1]]][1:]
            too_long += len(ids) > length - 2
            ids = [self.bpe.start, *ids[:length - 2], self.bpe.end]
            rows.append(ids + [self.pad_id] * (length - len(ids)))
        return torch.tensor(rows), too_long

    def read(self, ids):
        """ids (B, 77) -> what is held before the last layer, and after it (B, 77, D), and pooled (B, P)."""
        before, pooled = self.tower(ids)
        return before, self.tower.final_layer_norm(self.tower.encoder["layers"][-1](before)), pooled


class Base:
    """What is fine-tuned. trained: what its network is called in LoRA files; parts: {name: module}, what LoRAs can be
    put into; channels, factor: of its latents. prepare() reads texts once, features() gives what the network takes of
    them, encode() and decode() are the autoencoder, loss() is what training lowers, draw() makes latents of noise."""
    trained = "transformer"

    def __init__(self, files, args, device, dtype, rank=0, world=1):
        self.files, self.args, self.device, self.dtype, self.too_long = files, args, device, dtype, 0
        self.rank, self.world = rank, world
        self.parts, self.vae, self.shift, self.live = {}, None, 1.0, False
        stats = [file.stat() for part in files.values() for file in part if file]
        self.key = [str(args.base), [(stat.st_size, stat.st_mtime_ns) for stat in stats]]

    def layers(self):
        """{name: layer} of all that can have a LoRA."""
        found = {}
        for part, model in self.parts.items():
            for name, layer in model.named_modules() if model is not None else ():
                if isinstance(layer, (nn.Linear, nn.Conv2d, Quantised)) and "loras" not in name:
                    found[f"{part}.{name.removesuffix('.layer')}"] = layer       # .layer: within an Adapted
        return found

    def adapted(self):
        return [module for model in self.parts.values() if model is not None for module in model.modules()
                if isinstance(module, Adapted)]

    def features(self, text):
        """What prepare() gave -> what the network takes."""
        text = [None if a is None else to_device(a, self.device) for a in text]
        return self.read(*text) if self.live and not all(a.is_floating_point() for a in text) else text

    def shape(self):
        """Of the latents of one picture."""
        return self.channels, self.args.size // self.factor, self.args.size // self.factor

    def times(self, n, g):
        """Times t (n,) to train at: of a flow logit-normal."""
        return logit_normal((n,), self.shift, g)

    def even_times(self, n):
        return (torch.arange(n) + 0.5) / n

    def loss(self, z0, eps, t, text):
        return loss_fn(self.model, z0, eps, t.to(z0.device), text)

    def null(self, text, told):
        """What guidance leads away from, when `told` (1, ...) was read from `text`."""
        return told

    def load_model(self):
        """The network, whose weights are read one by one, brought to their place, and quantised there."""
        _, *weights = self.files[self.trained]
        load_frozen(self.model, read_tensors(weights), weights[0], self.device, self.dtype, self.args.quant)
        self.model.grad_checkpoint = self.args.grad_checkpoint

    def load_vae(self):
        config, *weights = self.files["vae"]
        self.vae = open_vae(weights, read_json(config)).to(self.device).eval().requires_grad_(False)

    def encode(self, x):
        return self.vae.encode(x)

    def decode(self, z):
        return torch.cat([self.vae.decode(part) for part in z.split(1)])

    @torch.no_grad()
    def prepare(self, texts):
        """texts -> tensors (texts, ...) on the CPU, as the network takes them; or, where CLIP is `live`, trained along,
        as read() takes them."""
        ids = [self.tokenise(texts[k:k + 8]) for k in range(0, len(texts), 8)]
        read = self.cached_part if self.live else self.read
        out = [read(*i) for i in tqdm(ids, "reading texts", disable=None)]
        return [torch.cat([part.cpu() for part in parts]) for parts in zip(*out)]


class StableDiffusion(Base):
    """SD 1.5 and SDXL: a diffusion, told by CLIP, SDXL by two of them."""
    trained = "unet"

    def __init__(self, *given):
        super().__init__(*given)
        self.kind = "sdxl" if "sdxl" in self.files else "sd"
        self.scheduler = read_json(self.files["scheduler"][0])
        self.alpha_bar = alpha_bar_of(self.scheduler)
        odd = [k for k in ("rescale_betas_zero_snr", "trained_betas") if self.scheduler.get(k)]
        if odd or self.scheduler.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
            raise Stop(f"--base {self.args.base}: this script does not know {', '.join(odd) or 'its prediction_type'}")
        self.v_prediction = self.scheduler.get("prediction_type", "epsilon") == "v_prediction"
        with torch.device("meta"):
            self.model = SDUNet(read_json(self.files["unet"][0]))
        self.channels, self.factor, self.parts["unet"] = self.model.conv_in.in_channels, 8, self.model

    def load_text(self):
        pairs = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")][:2 if self.kind == "sdxl" else 1]
        self.prompts = [Prompts(self.files, *pair, self.device, self.dtype) for pair in pairs]
        self.parts |= {part: prompts.tower for (part, _), prompts in zip(pairs, self.prompts)}

    def free_text(self):
        if not self.live:
            self.prompts = self.parts["text_encoder"] = self.parts["text_encoder_2"] = None

    def tokenise(self, texts):
        """-> ids (texts, 77) for each encoder; in SDXL also sizes (texts, 6) as drawn_sizes() has them."""
        ids, cut = zip(*(prompts.ids(texts) for prompts in self.prompts))
        self.too_long += max(cut)
        sizes = [drawn_sizes([[self.args.size] * 2] * len(texts), self.args.size)] * (self.kind == "sdxl")
        return [a.to(self.device) for a in (*ids, *sizes)]

    def cached_part(self, *given):
        return given

    def read(self, *given):
        """What tokenise() gave -> context (B, 77, D), in SDXL with pooled (B, P) and sizes (B, 6)."""
        read = [prompts.read(ids) for prompts, ids in zip(self.prompts, given)]
        if self.kind == "sd":
            return [read[0][1]]
        return [torch.cat([before for before, _, _ in read], 2), read[1][2], given[2]]

    def null(self, text, told):  # in SDXL zeros where that is empty
        zeros = self.kind == "sdxl" and read_json(self.files["sdxl"][0]).get("force_zeros_for_empty_prompt", True)
        if text or not zeros:
            return told
        return [torch.zeros_like(a, device="cpu") if k < 2 else a.cpu() for k, a in enumerate(self.features(told))]

    def times(self, n, g):
        return torch.randint(len(self.alpha_bar), (n,), generator=g)

    def even_times(self, n):
        return (torch.arange(n) + 0.5).mul(len(self.alpha_bar) / n).long()

    def loss(self, z0, eps, t, text):
        return diffusion_loss(self.model, z0, eps, t, text, self.alpha_bar, self.v_prediction, self.args.min_snr)

    def draw(self, z, text, text_null):
        """In x / sqrt(alpha_bar), where the noise has the deviation sigma, a diffusion is an ODE whose derivative by
        sigma is eps (2206.00364), and DDIM is Euler's method (2010.02502 section 4.3)."""
        args, T, get = self.args, len(self.alpha_bar), self.scheduler.get
        sigma_of = ((1 - self.alpha_bar) / self.alpha_bar).sqrt()
        spacing = get("timestep_spacing", "leading" if args.sampler == "ddim" else "linspace")
        times = spaced(args.sample_steps, T, spacing, get("steps_offset", 0), args.sampler)
        t_of = dict(zip(np.interp(times, range(T), sigma_of.numpy()).tolist(), times))
        last = sigma_of[0].item() if args.sampler == "ddim" and not get("set_alpha_to_one", True) else 0.0
        predict = guided(self.model, text, text_null, args.cfg_scale, [0, T])

        def eps_at(x, sigma):
            xt = x / math.sqrt(1 + sigma ** 2)
            out = predict(xt, torch.full((len(x),), t_of[sigma], device=x.device))
            return (xt * sigma + out) / math.sqrt(1 + sigma ** 2) if self.v_prediction else out
        sigmas = [*t_of, last]
        only_noise = args.sampler == "euler" and spacing != "leading"            # as diffusers begins
        return sample(eps_at, z * (sigmas[0] if only_noise else math.sqrt(1 + sigmas[0] ** 2)), args.sampler, sigmas)


def drawn_sizes(sides, size):
    """What SDXL is told of a picture, 2307.01952 section 2.2, lest it draw as blurred as one that was enlarged, or as
    cut as one that was cropped: sides (N, 2), height and width of the files -> (N, 6), these, top and left of the
    centre crop at --size, and --size twice."""
    sides = torch.tensor(sides, dtype=torch.float32)
    crop = (sides * (size / sides.amin(1, keepdim=True)) - size) / 2
    return torch.cat([sides, crop.round(), torch.full_like(sides, size)], 1)


def spaced(n, T, spacing, offset, sampler):
    """n of the times T-1 ... 0, as diffusers spaces them for this sampler."""
    more = sampler == "dpmpp_2m"
    if spacing == "leading":
        each = T // (n + more)
        return [float(i * each + offset) for i in range(more, n + more)][::-1]
    if spacing == "trailing":
        return (np.arange(T, 0, -T / n).round() - 1).tolist()
    times = np.linspace(T - 1, 0, n + more)[:n]
    return (times if sampler == "euler" else times.round()).tolist()


class FluxBase(Base):
    """FLUX.1 dev and schnell: a flow, told by what T5 reads and by CLIP's pooled vector. dev was distilled to imitate
    guidance, so it is told its strength, and called once a step."""
    kind = "flux"

    def __init__(self, *given):
        super().__init__(*given)
        config, get = read_json(self.files["transformer"][0]), read_json(self.files["scheduler"][0]).get
        self.dev, self.length = config.get("guidance_embeds", False), 512 if config.get("guidance_embeds") else 256
        with torch.device("meta"):
            self.model = Flux(config)
        self.channels, self.factor, self.parts["transformer"] = config["in_channels"] // 4, 8, self.model
        self.shift = get("shift", 1.0)
        if get("use_dynamic_shifting"):  # the more tokens, the more noise: 2403.03206 section 5.3.2
            n, few, many = (self.args.size // 16) ** 2, get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
            low, high = get("base_shift", 0.5), get("max_shift", 1.15)
            self.shift = math.exp(low + (high - low) * (n - few) / (many - few))

    def load_text(self):
        self.prompts = Prompts(self.files, "text_encoder", "tokenizer", self.device, self.dtype)
        config, *weights = self.files["text_encoder_2"]
        tensors = read_tensors(weights)
        if "encoder.embed_tokens.weight" in tensors:  # the same table by another name
            tensors["shared.weight"] = tensors.pop("encoder.embed_tokens.weight")
        with torch.device("meta"):
            self.t5 = T5(read_json(config))
        load_frozen(self.t5, tensors, weights[0], self.device, self.dtype, self.args.quant and "int8")
        self.unigram = read_unigram(self.files["tokenizer_2"][0])
        self.parts["text_encoder"] = self.prompts.tower

    def free_text(self):
        self.t5 = None
        if not self.live:
            self.prompts = self.parts["text_encoder"] = None

    def tokenise(self, texts):
        """-> ids (texts, 512) for T5, in schnell 256, and (texts, 77) for CLIP."""
        rows = [self.unigram(text) for text in texts]
        self.too_long += sum(len(ids) > self.length for ids in rows)
        rows = [ids if len(ids) <= self.length else [*ids[:self.length - 1], ids[-1]] for ids in rows]
        rows = torch.tensor([ids + [0] * (self.length - len(ids)) for ids in rows])
        return [rows.to(self.device), self.prompts.ids(texts)[0].to(self.device)]

    def cached_part(self, ids_t5, ids):
        return [self.t5(ids_t5), ids]

    def read(self, txt, ids):
        """ids, or what T5 has made of its own -> txt (B, L, D), pooled (B, P), and for dev guidance (B,), 1 in
        training, where there is none to imitate."""
        txt = txt if txt.is_floating_point() else self.t5(txt)
        return [txt, self.prompts.read(ids)[2]] + [torch.ones(len(ids), device=self.device)] * self.dev

    def draw(self, z, text, text_null):
        scale = self.args.cfg_scale
        if self.dev:
            text, scale = [*text[:2], torch.full_like(text[2], scale)], 1
        velocity = guided(self.model, text, text_null, scale, [0, 1])
        return sample(lambda x, t: velocity(x, torch.full((len(x),), t, device=x.device)), z, "euler",
                      time_grid(self.args.sample_steps, self.shift))


class Text2Img(Base):
    """A model.safetensors of text2img.py: a flow, told by tokens and their mask. Where it was made with --text tiny,
    what reads the text is a part of it."""
    kind = "text2img"

    def __init__(self, *given):
        super().__init__(*given)
        path = self.files["text2img"][0]
        tensors, saved, about = read_model(path, "text2img.py")
        own = {k[4:]: v for k, v in tensors.items() if k.startswith("vae.")}
        try:
            self.shift, self.prompts, name = saved["time_shift"], about["prompts"], saved["vae"]
            if own or name == "none":
                self.vae = TinyVAE() if own else Pixels()
            elif name in AUTOENCODERS:
                repo, file, how = AUTOENCODERS[name]
                found = on_each_node(functools.partial(hub_file, repo, file), self.rank, self.world)
                self.vae = open_vae([found[int(os.environ.get("GROUP_RANK", 0))]], how)
            else:
                raise Stop(f"{path} was made with --vae {name}; this script reads tiny, none, "
                           + ", ".join(AUTOENCODERS))
            self.reader = load_reader(SimpleNamespace(text=saved["text"]), self.rank, self.world)
            tower = CLIPText(**TINY) if saved["text"] == "tiny" else None
            self.model = DiT(self.vae.channels, saved["patch_size"], saved["model"], self.reader.dim,
                             self.reader.pooled_dim, tower, self.args.grad_checkpoint)
            self.model.grid = saved["size"] // (self.vae.factor * saved["patch_size"])
            vae_key, text_key = about["vae_key"], about["text_key"]
        except (KeyError, TypeError) as e:
            raise Stop(f"{path} does not describe its model: {e!r}; has it been edited?")
        if own:
            load_weights(self.vae, own, path)
        if fingerprint(self.vae) != vae_key or self.reader.key != text_key:
            raise Stop(f"{path} was trained with another {'text encoder' if self.reader.key != text_key else '--vae'}")
        load_weights(self.model, {k: v for k, v in tensors.items() if not k.startswith("vae.")}, path)
        self.model, self.vae = (m.to(self.device).eval().requires_grad_(False) for m in (self.model, self.vae))
        self.channels, self.factor, self.parts["transformer"] = self.vae.channels, self.vae.factor, self.model
        if self.args.quant:
            for name, layer in list(self.model.named_modules()):
                if isinstance(layer, nn.Linear) and "blocks" in name:
                    quantise(self.model, name, self.args.quant)

    def load_text(self):
        pass

    def free_text(self):
        self.reader.tower = None

    def load_model(self):
        pass

    def load_vae(self):
        pass

    def encode(self, x):
        return (self.vae.encode(x).float() - self.model.z_mean) / self.model.z_std

    def decode(self, z):
        return decode(self.vae, self.model, z)

    def prepare(self, texts):
        """-> txt, ids of --text tiny or features, txt_mask, pooled or None, as text2img.py has them."""
        tokens = read_texts(self.reader, texts, self.device)
        self.too_long = tokens.too_long
        return text_batch(tokens, range(len(texts)), torch.device("cpu"))

    def draw(self, z, text, text_null):
        text, text_null = self.model.encode_text(text), self.model.encode_text(text_null)
        velocity = guided(self.model, text, text_null, self.args.cfg_scale, [0, 1])
        return sample(lambda x, t: velocity(x, torch.full((len(x),), t, device=x.device)), z, "euler",
                      time_grid(self.args.sample_steps, self.shift))


# -----------------------------------------------------------------------------
# LoRA files. All of them hold for each layer A (rank, in), called down as well, B (out, rank), or up, and sometimes
# alpha; they differ in what they call the layers. Keys that fit nothing are an error, never left out.

KEYS = re.compile(r"(.+?)(?:\.(?:lora_|lora\.|lora_linear_layer\.)(A|B|down|up)(?:\.\w+)?\.weight"  # PEFT, diffusers,
                  r"|\.processor\.(to_\w+)_lora\.(down|up)\.weight"              # diffusers at first
                  r"|\.(alpha))")                                                # kohya
FLUX_LAYERS = {  # of Black Forest Labs, whose q, k and v are one layer: in diffusers' names, from top to bottom
    r"double_blocks_(\d+)_": ("transformer_blocks", dict(
        img_attn_qkv="attn.to_q attn.to_k attn.to_v", txt_attn_qkv="attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        img_attn_proj="attn.to_out.0", txt_attn_proj="attn.to_add_out", img_mlp_0="ff.net.0.proj", img_mlp_2="ff.net.2",
        txt_mlp_0="ff_context.net.0.proj", txt_mlp_2="ff_context.net.2", img_mod_lin="norm1.linear",
        txt_mod_lin="norm1_context.linear")),
    r"single_blocks_(\d+)_": ("single_transformer_blocks", dict(
        linear1="attn.to_q attn.to_k attn.to_v proj_mlp", linear2="proj_out", modulation_lin="norm.linear"))}


def lora_shapes(layer, rank):
    """The shapes of A and B beside a layer."""
    if isinstance(layer, nn.Conv2d):
        return (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)
    return (rank, layer.in_features), (layer.out_features, rank)


def kohya_names(base):
    """{kohya's name of a layer: the names of the layers here that it holds, from top to bottom}."""
    names = {}
    for name in base.layers():
        part, _, rest = name.partition(".")
        short = {"unet": ["unet"], "transformer": ["unet", "transformer"], "text_encoder": ["te", "te1"],
                 "text_encoder_2": ["te2"]}[part]
        rest = ("text_model." if part.startswith("text") else "") + rest
        names |= {f"lora_{s}_{rest.replace('.', '_')}": [name] for s in short}
    if base.kind == "sdxl":  # its UNet keeps the names of Stability's own code
        for old, new in stability_names(base.model):
            names |= {k.replace(f"lora_unet_{new}", f"lora_unet_{old}"): v for k, v in list(names.items())
                      if k.startswith(f"lora_unet_{new}")}
    if base.kind == "flux":
        here = set(base.layers())
        for pattern, (blocks, layers) in FLUX_LAYERS.items():
            for i in range(len(getattr(base.model, blocks))):
                for theirs, ours in layers.items():
                    ours = [f"transformer.{blocks}.{i}.{layer}" for layer in ours.split()]
                    if here.issuperset(ours):
                        names["lora_unet_" + pattern.replace(r"(\d+)", str(i)) + theirs] = ours
    return names


def stability_names(unet):
    """(their name, ours) of the parts of SDXL's UNet, with _ for dots."""
    n, each = len(unet.down_blocks), len(unet.down_blocks[0]["resnets"])
    inner = [("in_layers_2", "conv1"), ("emb_layers_1", "time_emb_proj"), ("out_layers_3", "conv2"),
             ("skip_connection", "conv_shortcut")]

    def both(old, new, attention):
        yield from ((f"{old}_0_{a}", f"{new[0]}_{b}") for a, b in inner)
        if attention:
            yield f"{old}_1_", f"{new[1]}_"
    for i in range(n):
        down, up = unet.down_blocks[i], unet.up_blocks[i]
        for j in range(each):
            yield from both(f"input_blocks_{1 + i * (each + 1) + j}", [f"down_blocks_{i}_{part}_{j}" for part in
                            ("resnets", "attentions")], "attentions" in down)
        for j in range(each + 1):
            yield from both(f"output_blocks_{i * (each + 1) + j}", [f"up_blocks_{i}_{part}_{j}" for part in
                            ("resnets", "attentions")], "attentions" in up)
        if "downsamplers" in down:
            yield f"input_blocks_{(i + 1) * (each + 1)}_0_op", f"down_blocks_{i}_downsamplers_0_conv"
        if "upsamplers" in up:
            yield (f"output_blocks_{i * (each + 1) + each}_{1 + ('attentions' in up)}_conv",
                   f"up_blocks_{i}_upsamplers_0_conv")
    for j in range(2):
        yield from ((f"middle_block_{2 * j}_{a}", f"mid_block_resnets_{j}_{b}") for a, b in inner)
    yield "middle_block_1_", "mid_block_attentions_0_"


NAMES = {"sd": "SD 1.5", "sdxl": "SDXL", "flux": "FLUX.1", "text2img": "text2img.py"}


def kind_of_lora(tensors):
    """What base a LoRA seems to be for, by its names and widths."""
    text = " ".join(tensors)
    if not re.search(r"lora|\.alpha\b", text):
        return "nothing, for it is no LoRA"
    if re.search(r"single_(transformer_)?blocks|double_blocks", text):
        return "FLUX.1"
    if re.search(r"\.blocks\.\d+\.", text):
        return "text2img.py"
    width = {v.shape[-1] for k, v in tensors.items() if re.search(r"attn2.*to_k\W?.*(down|A)\.", k) and v.ndim > 1}
    return {768: "SD 1.5", 1024: "SD 2", 2048: "SDXL"}.get(next(iter(width), 0), "another model")


def read_lora(path, base):
    """A LoRA file, in whatever naming -> {name of a layer: (A, B, alpha)}. alpha stands beside the layer, or comes from
    the metadata of diffusers, or is the rank. Raises Stop for keys that fit no layer here, or for other sizes."""
    tensors, about = load_safetensors(path)
    layers, kohya, found, alphas, lost = base.layers(), kohya_names(base), {}, {}, []
    for key, v in tensors.items():
        m = KEYS.fullmatch(key)
        stem = m and m[1].removeprefix("base_model.model.")
        if m and m[3]:  # processor
            stem += "." + {"to_out": "to_out.0"}.get(m[3], m[3])
        names = stem and (kohya.get(stem) or kohya.get(  # ComfyUI's
            f"lora_unet_{stem.removeprefix('diffusion_model.').replace('.', '_')}"
            if stem.startswith("diffusion_model.") else ""))
        if m and names is None:
            part, _, rest = stem.partition(".")
            if part not in ("unet", "transformer", "text_encoder", "text_encoder_2"):
                part, rest = base.trained, stem
            names = [f"{part}.{rest.removeprefix('text_model.')}"]
        if not m or not layers.keys() >= set(names):
            lost.append(key)
        elif m[5]:
            alphas[tuple(names)] = v.item()
        else:
            found.setdefault(tuple(names), {})["A" if (m[2] or m[4]) in ("A", "down") else "B"] = v
    for sign, what in (("dora_scale", "DoRA"), ("magnitude_vector", "DoRA"), ("hada_", "LoHa"), ("lokr_", "LoKr")):
        if any(sign in key for key in lost):
            raise Stop(f"{path} holds a {what}, which is more than a LoRA and which this script does not know: "
                       + ", ".join(key for key in lost if sign in key)[:200])
    lost += [str(names) for names, pair in found.items() if len(pair) < 2]
    if lost or not found:
        raise Stop(f"{path} does not fit --base: it seems to be a LoRA for {kind_of_lora(tensors)}, and the base is "
                   f"{NAMES[base.kind]}; {len(lost)} of its {len(tensors)} keys belong to no layer here: "
                   + ", ".join(lost[:5]) + " ..." * (len(lost) > 5))
    try:
        peft = json.loads(about.get("lora_adapter_metadata", "{}"))
    except ValueError:
        raise Stop(f"the metadata of {path} is no JSON")
    beside = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and beside.is_file():  # as PEFT itself saves
        peft = {f"{base.trained}.{k}": v for k, v in read_json(beside).items()}
    loras = {}
    for names, pair in found.items():
        part, _, rest = names[0].partition(".")
        alpha = alphas.get(names, peft.get(f"{part}.lora_alpha", len(pair["A"])))
        alpha = next((value for pattern, value in peft.get(f"{part}.alpha_pattern", {}).items()
                      if re.fullmatch(rf"(.*\.)?({pattern})", rest)), alpha)
        if peft.get(f"{part}.use_rslora"):  # 2312.03732: alpha / root of the rank
            alpha *= len(pair["A"]) ** 0.5
        rows = [lora_shapes(layers[name], 1)[1][0] for name in names]            # of B, for layers that are one there
        whole = len(names) == 1 or sum(rows) != len(pair["B"])
        for name, B in zip(names, [pair["B"]] if whole else pair["B"].split(rows)):
            wanted = lora_shapes(layers[name], len(pair["A"]))
            A, B = (v.view(shape) if v.numel() == math.prod(shape) else v for v, shape in zip((pair["A"], B), wanted))
            if (A.shape, B.shape) != wanted:                                     # view: linear, or a 1 x 1 convolution
                raise Stop(f"{path} does not fit --base: beside {name} go A {list(wanted[0])} and B {list(wanted[1])}, "
                           f"and it has {list(A.shape)} and {list(B.shape)}; it seems to be a LoRA for "
                           f"{kind_of_lora(tensors)}, and the base is {NAMES[base.kind]}")
            used = B.flatten(1).any(0)                                           # a part of a fused layer: its own rows
            if len(names) > 1 and used.any() and not used.all():
                A, B, share = A[used], B[:, used], int(used.sum()) / len(used)
                loras[name] = A, B, alpha * share
            else:
                loras[name] = A, B, alpha
    return loras


def write_lora(path, base, loras, naming, metadata):
    """{layer: LoRA} -> a file with the names of diffusers and PEFT, where B holds alpha / rank already, because most
    who read these take alpha for the rank; or with kohya's names, and alpha beside each layer."""
    tensors, known = {}, base.layers()

    if naming == "kohya":
        short = {"sd": "lora_te_"}.get(base.kind, "lora_te1_")
        for name, layers in kohya_names(base).items():
            own = name.startswith(("lora_unet_", short, "lora_te2_")) and (base.kind != "sdxl" or not re.match(
                r"lora_unet_(down|up|mid)_", name)) and (base.kind != "flux" or not re.match(
                    r"lora_unet_(single_)?transformer_", name))
            here = [loras.get(layer) for layer in layers]
            if not own or not any(here):
                continue
            # one below the other, with alpha / rank in B already where they are one layer there; rows for each of them
            A = [lora.A.weight for lora in here if lora]
            B = [torch.zeros(lora_shapes(known[layer], 0)[1][0], 0) if lora is None else lora.B.weight
                 * (lora.alpha / lora.rank if len(here) > 1 else 1) for lora, layer in zip(here, layers)]
            alpha = sum(map(len, A)) if len(here) > 1 else here[0].alpha
            tensors |= {f"{name}.lora_down.weight": torch.cat(A), f"{name}.alpha": torch.tensor(float(alpha)),
                        f"{name}.lora_up.weight": B[0] if len(B) == 1 else torch.block_diag(*B)}
    else:
        for layer, lora in loras.items():
            part, _, rest = layer.partition(".")
            name = f"{part}.{'text_model.' if part.startswith('text') else ''}{rest}"
            tensors |= {f"{name}.lora_A.weight": lora.A.weight,
                        f"{name}.lora_B.weight": lora.B.weight * (lora.alpha / lora.rank)}
    save_safetensors(path, {k: v.detach().float().cpu() for k, v in tensors.items()}, metadata)


# -----------------------------------------------------------------------------
# Data: a few pictures and their captions, read anew by each run.

PICTURE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")


FURS = {"white": (240, 238, 242)}


EYES = {"green": (70, 200, 84), "blue": (52, 148, 255), "amber": (255, 186, 32), "violet": (186, 88, 232)}


BACKGROUNDS = {"blue": (104, 172, 248), "green": (112, 204, 124), "pink": (255, 146, 190), "yellow": (255, 212, 52),
               "purple": (160, 122, 232), "teal": (44, 178, 184)}


TRAITS = {"panda": dict(drop=.06, head=(.76, .68), muzzle=(.12, .28, .22, .19), nose=.12,
                        back=[("ink", .54, -.50, .25, .25)], front=[("mark", .33, -.04, .23, .28, 24)])}


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


def drawn_pandas(size):
    """Pandas, an animal that text2img.py has never seen: one of each of the 24 pairs of eyes and backgrounds ->
    pictures and captions. The first 12 are to learn from."""
    seen, i = {}, 0
    while len(seen) < 24:
        picture, _, caption = draw_face(7, i, size)
        seen.setdefault(caption, picture)
        i += 1
    return list(seen.values()), [[caption] for caption in seen]


def read_examples(data, size, instance_prompt):
    """What --data names -> pictures uint8 (N, size, size, 3), height and width that each had, a list of captions for
    each, what could not be used, and the numbers of those to train on and of those held out, a tenth if there are 40.
    Raises Stop."""
    path, broken, pictures, texts = Path(data), [], [], []
    if data == "drawn_pandas":
        pictures, texts = drawn_pandas(size)
        sides = [(size, size)] * len(pictures)
    elif path.suffix == ".npz" and path.is_file():
        try:
            with zipfile.ZipFile(path), np.load(path) as f:
                images, captions = f["images"], f["captions"] if "captions" in f else None
        except Exception as e:  # a damaged file can raise anything
            raise Stop(f"{path} is not an .npz with arrays named images and captions: {e}")
        if images.dtype != np.uint8 or images.shape[3:] != (3,) or not all(images.shape):
            raise Stop(f"{path}: images has to be uint8 (N, height, width, 3)")
        if captions is not None and (captions.dtype.kind != "U" or captions.shape[:1] != images.shape[:1]):
            raise Stop(f"{path}: captions has to be text, (N,) or (N, captions of each) with N = {len(images)}")
        pictures = [np.asarray(ImageOps.fit(Image.fromarray(im), (size, size), Image.LANCZOS)) for im in images]
        sides = [images.shape[1:3]] * len(pictures)
        texts = [None] * len(pictures) if captions is None else [[t for t in c if t] or [""] for c in
                                                                  captions.reshape(len(images), -1).tolist()]
    else:
        names, _, _, _ = list_pictures(path)
        captions, sides = {} if instance_prompt else read_captions(path, names), []
        archive = None if path.is_dir() else zipfile.ZipFile(path)
        for name in tqdm([*sorted(captions.keys() - set(names)), *names], "reading", disable=None):
            try:
                if isinstance(captions.get(name), str):
                    raise ValueError(captions[name])
                with archive.open(name) if archive else open(path / name, "rb") as f:
                    picture = read_picture(f, size)
                    f.seek(0)
                    with Image.open(f) as im:
                        turned = im.getexif().get(274, 1) > 4  # EXIF: lies on its side
                        sides.append(im.size if turned else im.size[::-1])
                pictures.append(picture)
                texts.append(captions.get(name))
            except Exception as e:  # a broken file can raise anything in Pillow or zipfile
                why = f"{name}: {str(e) or type(e).__name__}".splitlines()[0]
                broken.append(why.encode(errors="backslashreplace").decode())
    if not pictures or len(broken) > 0.05 * (len(broken) + len(pictures)):
        raise Stop(f"--data {data} holds {len(pictures)} pictures that can be used" + (
            f", and {len(broken)} that cannot, more than 5 %, such as {broken[0]}" if broken else ""))
    if instance_prompt:
        texts = [[instance_prompt]] * len(pictures)
    missing = [i for i, t in enumerate(texts) if t is None]
    if missing:
        raise Stop(f"{len(missing)} of the {len(pictures)} pictures in {data} have no caption: put a.txt beside a.jpg, "
                   "write a metadata.jsonl, or say --instance_prompt TEXT for all of them")
    n = len(pictures)
    held = np.arange(12, 24) if data == "drawn_pandas" else np.arange(0, n, 10) if n >= 40 else np.arange(0)
    return np.stack(pictures), sides, texts, broken, np.setdiff1d(np.arange(n), held), held


@torch.no_grad()
def latents_of(base, pictures, flip, amp):
    """uint8 (N, size, size, 3) -> latents float16 (1 or 2, N, C, h, w) on the CPU, the second of mirrored ones."""
    out = []
    for mirrored in range(1 + flip):
        parts = []
        for i in tqdm(range(len(pictures)), "latents", disable=None, leave=False):  # one by one: they are large
            x = load_pictures(pictures, [i], base.device)
            with amp():
                parts.append(base.encode(x.flip(-1) if mirrored else x).half().cpu())
        out.append(torch.cat(parts))
    out = torch.stack(out)
    if not out.isfinite().all():
        raise Stop("the autoencoder made latents that are no numbers: say --dtype fp32", 1)
    return out


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

FREE_ON_RESUME = ("data steps lr out eval_every device dtype compile accum grad_checkpoint prompt negative_prompt "
                  "sampler sample_steps cfg_scale format base").split()


def set_weights(base, weight):
    """0: the base without its LoRA, 1: with it."""
    for adapted in base.adapted():
        adapted.weights = [weight] * len(adapted.loras)


def target_layers(base, patterns):
    """The names of the layers that --targets asks for. Raises Stop."""
    names = [name for name in base.layers() if any(re.search(TARGET_NAMES.get(p, p), name) for p in patterns)]
    for p in patterns:
        if not any(re.search(TARGET_NAMES.get(p, p), name) for name in base.layers()):
            raise Stop(f"--targets {p} finds no layer; names are such as {', '.join(list(base.layers())[::200][:4])}")
    return names


def attach(base, loras, args, parts, weight=1.0):
    """Puts LoRAs beside layers of these parts -> {layer: LoRA}. loras: {layer: (A, B, alpha)}, None for a new one."""
    made, layers = {}, base.layers()
    for name in [name for name in loras if name.partition(".")[0] in parts]:
        A, B, alpha = loras[name] or (None, None, args.rank if args.alpha is None else args.alpha)
        rank = args.rank if A is None else len(A)
        shape_A, shape_B = lora_shapes(layers[name], rank)
        most = min(math.prod(shape_A[1:]), shape_B[0])
        if A is None and rank > most:
            raise Stop(f"--rank {rank} is more than {name} has room for, {most}: lower it, or choose other --targets")
        made[name] = lora = LoRA(layers[name], rank, alpha, args.lora_dropout)
        if A is not None:
            lora.A.weight.data.copy_(A)
            lora.B.weight.data.copy_(B)
        lora.to(base.device)
        part, _, rest = name.partition(".")
        parent, child = base.parts[part].get_submodule(rest.rpartition(".")[0]), rest.rpartition(".")[2]
        if not isinstance(getattr(parent, child), Adapted):
            setattr(parent, child, Adapted(layers[name]))
        getattr(parent, child).loras.append(lora)
        getattr(parent, child).weights.append(weight)
    return made


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


def begin_log(out, start, resumed):
    """Make the folder fit to go on from step `start` -> the log so far. A new run keeps the weights of an old one."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("ckpt.pt", "model.safetensors", "lora.safetensors", "log.jsonl"):
        if not resumed and (out / name).exists():
            olds = (f"{name}.old{n or ''}" for n in range(10_000))
            old = f"{name}.old" if name != "lora.safetensors" else next(old for old in olds if not (out / old).exists())
            os.replace(out / name, out / old)  # of LoRAs all are kept: they are small, and many are tried
            print(f"{out / name} of an earlier run is now {old}", flush=True)
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


def save_random_base(path):
    """--smoke: a model.safetensors as of text2img.py, of random weights."""
    torch.manual_seed(0)
    vae, D = TinyVAE(), TINY["D"]
    tensors = DiT(vae.channels, 1, "tiny", D, D, CLIPText(**TINY)).state_dict()
    about = dict(vae_key=fingerprint(vae), text_key="tiny", prompts=["a cat", "a dog"])
    settings = dict(size=32, text="tiny", vae="tiny", model="tiny", patch_size=1, time_shift=1.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_safetensors(path, tensors | {f"vae.{k}": v for k, v in vae.state_dict().items()}, dict(
        format="pt", script="text2img.py", kind="text2img", args=json.dumps(settings), data=json.dumps(about)))


def open_base(args, rank, world, device):
    """The base that --base names; args take over what its kind needs and was not given. Raises Stop."""
    if args.base == DEFAULT_BASE and not Path(args.base).exists():
        raise Stop(f"--base {args.base} does not exist; python text2img.py makes it")
    files = on_each_node(functools.partial(find_base, args.base), rank, world)[int(os.environ.get("GROUP_RANK", 0))]
    kind = next(k for k in PRESETS if k in files)
    saved = read_model(files["text2img"][0], "text2img.py")[1] if kind == "text2img" else {}
    preset = dict(PRESETS[kind])
    if kind == "flux" and not read_json(files["transformer"][0]).get("guidance_embeds"):
        preset.update(sample_steps=4, cfg_scale=1.0)  # schnell
    elif kind == "flux" and args.negative_prompt:
        raise Stop("--negative_prompt works by guidance, which FLUX.1-dev only imitates: it cannot have one")
    for k, v in preset.items():
        if getattr(args, k) is None:
            setattr(args, k, saved.get(k, v) if k in ("size", "sample_steps", "cfg_scale") else v)
    if args.negative_prompt and args.cfg_scale == 1:
        raise Stop("--negative_prompt works by guidance: it needs a --cfg_scale above 1")
    dtype = pick_dtype(args.dtype, device) if kind != "text2img" else torch.float32
    try:
        make = {"text2img": Text2Img, "flux": FluxBase}.get(kind, StableDiffusion)
        base = make(files, args, device, dtype, rank, world)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as e:
        raise Stop(f"--base {args.base} has a config.json that this script does not understand: {e!r}")
    if kind == "text2img" and args.format == "kohya":
        raise Stop("--format kohya is for Stable Diffusion and FLUX")
    if kind in ("text2img", "flux") and args.sampler != "euler":
        raise Stop(f"--sampler {args.sampler} is for Stable Diffusion; flows have euler")
    if kind in ("text2img", "flux") and "min_snr" in args.given:
        raise Stop("--min_snr is for Stable Diffusion; flows have no such weights")
    unit = base.factor * (2 if kind == "flux" else 8 if kind != "text2img" else base.model.patch)
    if args.size % unit:
        raise Stop(f"--size has to be a multiple of {unit}")
    return base


def texts_of(data, texts, pictures):
    """Texts of these numbers, as prepare() gave them; in SDXL with the sizes of the pictures that they go with."""
    text = pick(data.text, texts)
    return text if data.sizes is None else [*text[:-1], data.sizes[pictures]]


def pick(text, k):
    """Texts number k of what prepare() gave."""
    return [None if a is None else a[k] for a in text]


@torch.no_grad()
def generate(base, noise, text, text_null, amp):
    """noise (B, C, h, w), texts as prepare() gives them -> pictures uint8 (B, H, W, 3)."""
    out, each = [], min(64, max(1, 8 * 512 ** 2 // base.args.size ** 2))         # at 1024 pixels 2 at a time
    for i in range(0, len(noise), each):
        with amp():
            one, null = (base.features(pick(t, slice(i, i + each))) for t in (text, text_null))
            x = base.decode(base.draw(noise[i:i + each], one, null).float())
        if not x.isfinite().all():
            raise Stop("the model draws NaN or infinity: say --dtype fp32; or did its training diverge?", 1)
        out.append(to_uint8(x))
    return np.concatenate(out)


SIDES = re.compile(r"\b(left|right|(counter|anti)?-?clockwise)\b", re.IGNORECASE)


def train_batch(data, args, step, base, rank, world):
    """Latents and all randomness of one step -> z0, eps, t, text; of which each rank gets its share. Drawn for the
    whole batch from (seed, step), so that any number of processes trains on the same numbers."""
    B, g = args.batch_size, torch.Generator().manual_seed(mix(BATCH, args.seed, step))
    t, u = base.times(B, g), torch.rand((B, 2), generator=g)
    mine, rows, texts, shown = range(B * rank // world, B * (rank + 1) // world), [], [], []
    for k in mine:
        place, numbers = step * B + k, data.train
        if len(data.preserved):  # every other one keeps the class as it was
            place, numbers = place // 2, (data.train, data.preserved)[place % 2]
        i = numbers[shuffled(len(numbers), args.seed, place // len(numbers))[place % len(numbers)]]
        rows.append(data.latents[int(args.flip and u[k, 0] < 0.5 and not data.has_sides[i]), i])
        texts.append(data.text_of[i][int(u[k, 1] * len(data.text_of[i]))])
        shown.append(i)
    z0 = to_device(torch.stack(rows), base.device).float()
    eps = torch.randn((B, *z0.shape[1:]), generator=torch.Generator().manual_seed(mix(NOISE, args.seed, step)))
    return z0, to_device(eps[mine.start:mine.stop], base.device), t[mine.start:mine.stop], texts_of(data, texts, shown)


def train_step(base, params, opt, batch, args, amp):
    """One optimizer step -> the loss, left on the device. The gradients of all processes are averaged in one go at the
    end: they are small, and DistributedDataParallel has nothing to hide behind backward()."""
    total = 0
    for k in range(args.accum):
        z0, eps, t, *text = (None if a is None else a.chunk(args.accum)[k] for a in (*batch[:3], *batch[3]))
        with amp():
            loss = base.loss(z0, eps, t, base.features(text)).mean()
        total += loss.detach() / args.accum
        (loss / args.accum).backward()
    for p in params:  # of a layer that nothing reads, such as the last of SDXL's first text encoder
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if dist.is_initialized():
        flat = sum_over_ranks(torch.cat([p.grad.flatten() for p in params])) / dist.get_world_size()
        for p, part in zip(params, flat.split([p.numel() for p in params])):
            p.grad.copy_(part.view_as(p))
    nn.utils.clip_grad_norm_(params, 1.0)
    opt.step()
    opt.zero_grad()
    return total


@torch.no_grad()
def validate(base, data, args, amp):
    """Loss on the held-out pictures at fixed noise and evenly spread t."""
    total = 0.0
    for k, i in enumerate(data.val):
        eps = next(image_noise(args.seed + 1, range(8 * k, 8 * k + 8), base.shape(), base.device))
        t = base.even_times(8)
        z0 = data.latents[0, i].to(base.device).float().expand_as(eps)
        with amp():
            text = base.features(texts_of(data, [data.text_of[i][0]] * 8, [i] * 8))
            total += base.loss(z0, eps, t, text).mean().item()
    return total / len(data.val)


def layers_of(state, base, path):
    """{layer: (rank, alpha)} of a checkpoint. Raises Stop."""
    layers = state.get("layers")
    if not isinstance(layers, dict) or not layers.keys() <= base.layers().keys():
        raise Stop(f"--resume {path} has been edited, or --base is another than it was")
    return layers


def restore(state, params, ema, opt, args):
    """Put a checkpoint's contents into params, ema and opt -> steps done. Raises Stop."""
    try:
        for now, saved in ((params, state["model"]), (ema, state["ema"])):
            if [p.shape for p in now] != [p.shape for p in saved]:
                raise ValueError("its LoRA has other sides")
            for p, v in zip(now, saved):
                p.data.copy_(v)
        opt.load_state_dict(state["opt"])
        start = int(state["step"])
        if start < 0 or any(opt.state[p][k].shape != p.shape for p in params for k in ("exp_avg", "exp_avg_sq")):
            raise ValueError("step or optimizer state")
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise Stop(f"--resume {args.resume} has been edited: {e!r}")
    if start > args.steps:
        raise Stop(f"{args.resume} has done {start} steps already; say how far to go on with --steps")
    return start


def is_picture(file, size):
    """Whether the file is a whole picture of this size: one of a run that was killed may not be."""
    try:
        with Image.open(file) as im:
            im.load()
            return im.size == (size, size) and im.mode == "RGB"
    except (OSError, SyntaxError, ValueError):  # of a broken PNG
        return False


def class_pictures(base, args, prompts, text, text_null, amp, rank):
    """Prior preservation, 2208.12242 section 4.2: what the base draws of these prompts, whose texts take turns in text,
    kept in data/cache -> uint8 (--class_images, size, size, 3)."""
    about = [base.key, prompts, args.negative_prompt, args.size, args.sample_steps, args.sampler,
             args.cfg_scale, args.seed]
    folder = Path(f"data/cache/class-{hashlib.sha256(repr(about).encode(errors='replace')).hexdigest()[:16]}")
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:06d}.png" for i in range(args.class_images)]
    local, processes = (int(os.environ.get(k, v)) for k, v in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    todo = [i for i, file in enumerate(files) if not is_picture(file, args.size)][local::processes]  # on each node all
    if todo and rank == 0:
        print(f"{len(todo)} pictures of the class come first, once: into {folder}", flush=True)
    sum_over_ranks(torch.zeros(1, device=base.device)).item()  # all have looked before any writes
    shape = base.shape()
    set_weights(base, 0.0)  # of a LoRA that is trained on
    for i in tqdm([todo[k:k + 8] for k in range(0, len(todo), 8)], "pictures of the class, once",
                  disable=True if rank else None):
        noise = next(image_noise(args.seed, i, shape, base.device))
        drawn = generate(base, noise, pick(text, i), pick(text_null, [0] * len(i)), amp)
        for k, picture in zip(i, drawn):
            image = Image.fromarray(picture)
            write_atomically(files[k], lambda f: image.save(f, "PNG"))
    set_weights(base, 1.0)
    sum_over_ranks(torch.zeros(1, device=base.device)).item()
    return np.stack([np.asarray(Image.open(file)) for file in files])


def train(args):
    """The whole run. All randomness follows from (seed, step): a run that was cut goes on bit for bit, on the CPU."""
    began, state = time.time(), None
    if args.resume:
        state = load_checkpoint(args.resume, "finetune_lora.py")
        keep = {"given", "resume"} | args.given & set(FREE_ON_RESUME)
        adopt(args, state["args"], vars(args).keys() - keep, args.resume)
        if "out" not in args.given:
            args.out = str(Path(args.resume).parent)  # where it lies now: the folder may have been renamed
    device, rank, world = setup(args)
    say = functools.partial(print, flush=True) if rank == 0 else lambda *a, **k: None
    base = open_base(args, rank, world, device)
    if args.batch_size % (world * args.accum):
        raise Stop(f"--batch_size {args.batch_size} has to be a multiple of {world} processes x --accum {args.accum}")
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Stop(f"--out {out} cannot be made: {e.strerror}")
    pictures, sides, captions, broken, train_on, held = read_examples(args.data, args.size, args.instance_prompt)
    digest = hashlib.sha256(pictures)
    digest.update(repr(captions).encode(errors="replace"))
    key = digest.hexdigest()[:16]
    if broken:
        say(f"left out, because they cannot be used: {len(broken)}: " + "; ".join(broken[:9]))
    if state and state["key"] != key:
        raise Stop(f"--data {args.data} is not what {args.resume} was trained on")
    amp = functools.partial(torch.autocast, device.type, torch.bfloat16,
                            enabled=pick_dtype(args.dtype, device) == torch.bfloat16)
    say(f"{args.data}: {len(train_on)} pictures to train on, {len(held)} held out; base {args.base} ({base.kind}); "
        f"{device} x {world}, {str(pick_dtype(args.dtype, device))[6:]}; writes to {out}")

    # which layers; then the texts are read, the pictures encoded, and what did that is freed before the network comes
    base.load_text()
    if state:  # not the file that it began with, which may be another by now
        loras = {name: (*map(torch.zeros, lora_shapes(base.layers()[name], rank)), alpha) for name, (rank, alpha) in
                 layers_of(state, base, args.resume).items()}
    else:
        file, weight = split_lora(args.lora[0]) if args.lora else (None, 1)
        if weight != 1:
            raise Stop(f"--lora {args.lora[0]}: a weight is for drawing, with --sample N; training goes on as it is")
        loras = read_lora(file, base) if file else dict.fromkeys(target_layers(base, args.targets))
    torch.manual_seed(mix(INIT, args.seed))
    readers = [part for part in base.parts if part != base.trained]
    made = attach(base, loras, args, readers)
    base.live = bool(made)
    shown = read_prompts(args.prompt) if args.prompt else [captions[i][0] for i in (*held, *train_on)]
    shown = list(dict.fromkeys(shown))[:4]
    number = {t: k for k, t in enumerate(dict.fromkeys([t for texts in captions for t in texts] + shown))}
    kept = read_prompts(args.class_prompt) if args.class_prompt else []
    if len(kept) > args.class_images > 0:
        raise Stop(f"--class_images {args.class_images} is too few for {len(kept)} class prompts")
    if args.data == "drawn_pandas" and base.kind == "text2img":
        kept = kept or base.prompts  # what it can draw, and should go on drawing
    kept = kept[:args.class_images]
    with amp():
        text = base.prepare([*number, *kept, args.negative_prompt])
    if base.too_long:
        say(f"captions that are too long, cut: {base.too_long}")
    with amp(), torch.no_grad():
        text_null = base.null(args.negative_prompt, pick(text, [-1]))
    base.free_text()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what read the texts
    base.load_vae()
    data = SimpleNamespace(train=train_on, val=held[:12], preserved=[], text=text,
                           sizes=drawn_sizes(sides, args.size) if base.kind == "sdxl" else None,
                           text_of=[[number[t] for t in texts] for texts in captions],
                           has_sides=[any(map(SIDES.search, texts)) for texts in captions],
                           latents=latents_of(base, pictures, args.flip, amp))
    base.load_model()
    if kept:
        k = [len(number) + i % len(kept) for i in range(args.class_images)]
        drawn = class_pictures(base, args, kept, pick(text, k), text_null, amp, rank)
        data.preserved = np.arange(len(pictures), len(pictures) + len(drawn))
        data.text_of += [[i] for i in k]
        data.has_sides += [bool(SIDES.search(kept[i % len(kept)])) for i in range(len(drawn))]
        if data.sizes is not None:
            data.sizes = torch.cat([data.sizes, drawn_sizes([[args.size] * 2] * len(drawn), args.size)])
        data.latents = torch.cat([data.latents, latents_of(base, drawn, args.flip, amp)], 1)
    made |= attach(base, loras, args, [base.trained])
    params = [p for lora in made.values() for p in lora.parameters()]
    ema, start = [p.detach().clone() for p in params], 0
    opt = torch.optim.AdamW(params, args.lr, (0.9, 0.99), weight_decay=0.01, fused=device.type != "mps")
    if state:
        start = restore(state, params, ema, opt, args)
    base.model.train()
    if args.compile:
        base.model.compile()
    settings = {k: v for k, v in vars(args).items() if k != "given"}
    shape = base.shape()
    say(f"{sum(p.numel() for p in params) / 1e6:.2f}M parameters to train, beside {len(made)} layers")
    say("settings: " + " ".join(f"{k}={v}" for k, v in settings.items()))
    log = begin_log(out, start, resumed=state is not None and Path(args.resume).resolve().parent == out.resolve()) \
        if rank == 0 else []
    began -= log[-1]["seconds"] if log else 0  # a resumed run counts on

    def show(weight):
        """Two pictures of each prompt, from the same noise, with so much of the LoRA."""
        set_weights(base, weight)
        k = np.repeat([number[t] for t in shown], 2)
        noise = next(image_noise(args.seed, range(2), shape, device)).repeat(len(shown), 1, 1, 1)
        pictures = generate(base, noise, pick(text, k), pick(text_null, [0] * len(k)), amp)
        set_weights(base, 1.0)
        return np.split(pictures, len(shown))

    def with_ema(make):
        """make() while the LoRAs hold their averaged weights."""
        now = [p.detach().clone() for p in params]
        torch._foreach_copy_([p.data for p in params], ema)
        try:
            return make()
        finally:
            torch._foreach_copy_([p.data for p in params], now)

    def save(step):
        if rank == 0:
            ckpt = dict(script="finetune_lora.py", args=settings, step=step, key=key, opt=opt.state_dict(),
                        model=[p.detach() for p in params], ema=ema,
                        layers={name: (lora.rank, lora.alpha) for name, lora in made.items()})
            write_atomically(out / "ckpt.pt", functools.partial(torch.save, ckpt))
            about = dict(format="pt", script="finetune_lora.py", kind="lora", base=base.kind, step=str(step),
                         args=json.dumps(settings))
            with_ema(lambda: write_lora(out / "lora.safetensors", base, made, args.format, about))

    before = show(0.0) if rank == 0 else None
    noted, loss_sum, seen, clock = note_signals(), torch.zeros((), device=device), 0, time.time()
    log_every = max(1, min(50, args.steps // 10))
    bar = tqdm(total=args.steps, initial=start, disable=True if rank else None, unit="step")
    for step in range(start, args.steps + 1):  # one turn more than there are steps, to draw the last
        record, last, stop = {}, step == args.steps, 0
        evaluate = last or step > start and step % args.eval_every == 0
        # once in a while: read the loss off the device, and hear whether any rank was asked to stop
        if step > start and (step % log_every == 0 or evaluate or noted and world == 1):
            loss, stop = sum_over_ranks(torch.stack([loss_sum / world, torch.full_like(loss_sum, len(noted))])).tolist()
            loss, rate = loss / seen, seen * args.batch_size / (time.time() - clock)
            if not math.isfinite(loss):
                raise Stop(f"the loss is {loss:.3g} at step {step}: training diverged at --lr {args.lr}; lower it", 1)
            record = dict(step=step, loss=loss, lr=opt.param_groups[0]["lr"], img_per_s=rate,
                          s_per_step=args.batch_size / rate, seconds=time.time() - began, peak_gb=peak_memory(device))
            bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} img/s")
            loss_sum.zero_()
            seen, clock = 0, time.time()
        # once in a while: validation loss, checkpoint, sample grid
        if evaluate:
            if len(data.val):
                record["val_loss"] = with_ema(lambda: validate(base, data, args, amp))
            save(step)
            if rank == 0:
                rows = [np.concatenate(pair) for pair in zip(before, with_ema(lambda: show(1.0)))]
                save_png(out / f"samples/{step:06d}.png", caption_rows(rows, shown))
            clock = time.time()
        if record and rank == 0:
            log.append(record)
            with open(out / "log.jsonl", "a") as f:
                f.write(json.dumps(record) + "\n")
            if bar.disable or evaluate:
                tqdm.write("  ".join(f"{k} {record[k]:.{d}f}" for k, d in dict(
                    step=0, loss=4, val_loss=4, img_per_s=1, s_per_step=2, peak_gb=1, seconds=0).items()
                                     if k in record))
                sys.stdout.flush()  # or a redirected run seems to hang
        if stop:
            if not evaluate:
                save(step)
            raise Stop(f"stopped at step {step}; go on: {'torchrun ...' if world > 1 else 'python'} finetune_lora.py "
                       f"--resume {out / 'ckpt.pt'}", [*noted, 130][0])
        if last:
            break
        # one step: data, noise and t from (seed, step); the loss, its gradient, AdamW, the moving average
        for group in opt.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 20)  # warm-up, while Adam's averages settle
        batch = train_batch(data, args, step, base, rank, world)
        torch.manual_seed(mix(DROPOUT, args.seed, rank, step))
        loss_sum += train_step(base, params, opt, batch, args, amp)
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1 - min(args.ema_decay, (1 + step) / (10 + step)))
        seen += 1
        bar.update()
    bar.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_at_once)  # all is saved
    if noted and world == 1:  # while the last pictures were drawn
        raise KeyboardInterrupt(noted[0] - 128)
    if rank == 0:
        plot_loss(out / "loss.png", log)
        say(f"done in {time.time() - began:.0f} s; see {out}/samples/{args.steps:06d}.png, without and with "
            f"{out / 'lora.safetensors'}")
    sum_over_ranks(torch.zeros(1, device=device)).item()


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


def split_lora(text):
    """FILE or FILE:WEIGHT -> file, weight. Raises Stop."""
    file, _, weight = text.rpartition(":")
    try:
        found = (Path(text), 1.0) if Path(text).exists() or not file else (Path(file), float(weight))
        if not math.isfinite(found[1]):
            raise ValueError
        return found
    except ValueError:
        raise Stop(f"--lora {text}: there is no such file, and {weight!r} is no weight as in FILE:0.8")


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
    """--sample N: pictures as generated/000000.png ..., what each was told in metadata.jsonl, and one grid. Prompts
    take turns; picture k of each begins with the same noise."""
    device, rank, world = setup(args)
    args.prompt = read_prompts(args.prompt)
    began, base = time.time(), open_base(args, rank, world, device)
    n, out = args.sample, Path(args.out)
    if n < len(args.prompt):
        raise Stop(f"--sample {n}, for all prompts together, is too few for {len(args.prompt)}")
    amp = functools.partial(torch.autocast, device.type, torch.bfloat16,
                            enabled=pick_dtype(args.dtype, device) == torch.bfloat16)
    base.load_text()
    files = [split_lora(text) for text in args.lora]
    loras = [(read_lora(file, base), weight) for file, weight in files]
    for part in [part for part in base.parts if part != base.trained]:
        for lora, weight in loras:
            attach(base, lora, args, [part], weight)
    with amp():
        text = base.prepare([*args.prompt, args.negative_prompt])
    base.free_text()
    if base.too_long and rank == 0:
        print(f"prompts that are too long, cut: {base.too_long}", flush=True)
    with amp(), torch.no_grad():
        text_null = base.null(args.negative_prompt, pick(text, [-1]))
    base.load_vae()
    base.load_model()
    for lora, weight in loras:
        attach(base, lora, args, [base.trained], weight)
    if not args.quant:
        for adapted in base.adapted():
            adapted.merge(keep=False)
    if args.compile:
        base.model.compile()
    part = begin_pictures(out, rank, device)
    P, mine = len(args.prompt), np.array_split(np.arange(n), world)[rank]
    for i in tqdm([mine[k:k + 64] for k in range(0, len(mine), 64)], "sampling", disable=True if rank else None):
        noise = next(image_noise(args.seed, i // P, base.shape(), device))
        x = generate(base, noise, pick(text, i % P), pick(text_null, [0] * len(i)), amp)
        part.mkdir(parents=True, exist_ok=True)
        for j, drawn in zip(i, x):
            write_atomically(part / f"{j:06d}.png", lambda f: Image.fromarray(drawn).save(f, "PNG"))
        if i[0] == 0:
            grid = caption_rows([x[p::P] for p in range(P)], args.prompt) if P <= 16 else tile(x, int(len(x) ** 0.5))
    sum_over_ranks(torch.zeros(1, device=device)).item()
    if rank == 0:
        about = {k: getattr(args, k) for k in "base lora negative_prompt seed cfg_scale sample_steps sampler".split()}
        lines = [json.dumps(dict(file_name=f"{j:06d}.png", text=args.prompt[j % P], **about)) + "\n" for j in range(n)]
        write_atomically(part / "metadata.jsonl", lambda f: f.write("".join(lines).encode()))
        earlier = publish(part, out / "generated")
        save_png(out / "generated.png", grid)
        used = ", ".join(f"{file} x {weight}" for file, weight in files) or "no LoRA"
        print(f"{n} pictures of {min(n, P)} prompt{'s' * (min(n, P) > 1)} in {out / 'generated'}"
              + (f", in place of {earlier} earlier ones" if earlier else "") + f"; see {out / 'generated.png'}\n"
              f"{base.kind} with {used}; {args.sampler}, {args.sample_steps} steps, --cfg_scale {args.cfg_scale}; "
              f"{time.time() - began:.0f} s on {device} x {world}")


# -----------------------------------------------------------------------------
# Start: what was asked for, and one sentence with an exit status when it cannot be had.


def main(argv=None):
    """-> the exit status: 0, 1 for a failure at run time, 2 for wrong input, 130 or 143 after Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, stop_at_once)
    sentence, code = None, 0
    try:
        args = parse_args(argv)
        if args.smoke and not args.sample and args.base == "out/smoke_lora/base.safetensors":
            save_random_base(Path(args.base))
        if args.sample:
            sample_only(args)
        else:
            train(args)
            if args.smoke:
                again = ["--smoke", "--sample", "4", "--lora", f"{args.out}/lora.safetensors", "--prompt", "a panda"]
                sample_only(parse_args(again + ["--base", args.base, "--out", args.out, "--device", args.device]))
    except Stop as e:
        sentence, code = str(e) if int(os.environ.get("LOCAL_RANK", 0)) == 0 else None, e.code  # one of each node
    except KeyboardInterrupt as e:
        sentence, code = "stopped at once; finished files are whole", 128 + (e.args or (2,))[0]
    except OSError as e:
        sentence, code = f"{e.filename or 'input or output'}: {e.strerror or e}", 1
    except (MemoryError, RuntimeError) as e:  # CUDA, MPS, the CPU and NumPy each have their own
        if not isinstance(e, MemoryError) and "out of memory" not in str(e) and "allocate memory" not in str(e):
            raise
        ways = {"--quant nf4": args.quant != "nf4", "--dtype bf16": args.dtype == "fp32",
                "--grad_checkpoint": not args.sample and not args.grad_checkpoint,
                f"--accum {args.batch_size}": not args.sample and args.accum < (args.batch_size or 1),
                f"a --size below {args.size}": True}
        sentence, code = "out of memory; what helps: " + ", or ".join(way for way in ways if ways[way]), 1
    if sentence:  # before the next line, which can wait for ranks that are gone
        print(f"finetune_lora.py: {sentence}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    status = main()
    if "RANK" in os.environ:  # threads of the process group can outlive the interpreter, which now and then aborts it
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
