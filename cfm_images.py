"""Flow matching on images: learn the velocity that carries noise to pictures, and follow it in as few steps as you can.

    python cfm_images.py                              # animal faces that the script draws itself: no download, no GPU
    python cfm_images.py --data animal_faces          # the AFHQ photographs (downloaded once)
    python cfm_images.py --data my_photos --class_cond --cfg_scale 2 --cfg_interval 0.1 0.8    # sub-folders = classes
    python cfm_images.py --resume out/cfm_images/ckpt.pt                       # go on after Ctrl-C as if uninterrupted
    python cfm_images.py --sample 64 --ckpt out/cfm_images/model.safetensors --sampler dopri5
    python cfm_images.py --sample 8 --ckpt out/cfm_images/model.safetensors --input my_photos  # to noise and back
    python cfm_images.py --reflow out/cfm_images/model.safetensors --out out/reflow            # straighten its paths
    python cfm_images.py --meanflow --init_from out/cfm_images/model.safetensors --lr 3e-4 --out out/meanflow  # jump
    python cfm_images.py --from_ddpm out/ddpm_images/model.safetensors --out out/bridge        # a DDPM is a flow, too
    torchrun --nproc_per_node=8 cfm_images.py --data animal_faces

Expected, first line: 278 s on two cores (shared AMD EPYC with bf16, torch 2.13.0), the final grid after 246 s, loss
0.0054, val_loss 0.0040; 96 % of its faces are one species to a classifier (README.md). GPU: not measured yet.
Writes out/cfm_images/: ckpt.pt, model.safetensors, log.jsonl, loss.png, samples/, forward.png, reverse.gif,
training.gif, interpolation.png, nfe.png, nfe.json; with --sample generated/ and generated.png. A new run renames the
first three of an old one to *.old, and replaces the rest.

Here t = 0 is data and t = 1 noise, as in SD3 and FLUX; torchcfm and flow_matching write 1 - t for it and -v for v.
Papers: flow matching 2210.02747, rectified flow and reflow 2209.03003, minibatch OT 2302.00482 and with classes
2503.10636, logit-normal times, shifted steps and the bridge 2403.03206 (SD3), x0 from the network and the loss on v
2511.13720 (JiT), MeanFlow 2505.13447, guidance 2207.12598 and its interval 2404.07724, ADM (UNet) 2105.05233.
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
from scipy.optimize import linear_sum_assignment
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# -----------------------------------------------------------------------------
# Knobs. A preset fills in what is not given by hand; --help shows the values of the one in force.

PRESETS = {
    "cpu": dict(size=64, patch=4, width=64, mults="1,2,2", blocks=1, attn=8, dropout=0.0, pred="x0", min_snr=0.5,
                times="logit_normal", steps=1700, batch_size=32, lr=1e-3, ema_decay=0.999, eval_every=425,
                sample_steps=50, pairs=4096, compile=False),
    "gpu": dict(size=64, patch=1, width=128, mults="1,2,3,4", blocks=2, attn=16, dropout=0.1, pred="v", min_snr=0.0,
                times="logit_normal", steps=100_000, batch_size=128, lr=2e-4, ema_decay=0.9999, eval_every=2500,
                sample_steps=50, pairs=50_000, compile=True),
    "smoke": dict(out="out/smoke", size=32, patch=4, width=32, mults="1,2", blocks=1, attn=4, dropout=0.0, pred="x0",
                  min_snr=0.5, times="logit_normal", steps=2, batch_size=16, lr=1e-3, ema_decay=0.99, eval_every=1,
                  sample_steps=4, pairs=64, compile=False),
}
COUPLINGS = ["independent", "ot"]
SAMPLERS = ["euler", "midpoint", "heun", "rk4", "dopri5", "ancestral"]


def parse_args(argv=None):
    """The settings: flags given by hand, then the preset's. Wrong ones end the script with a sentence and status 2."""
    argv = sys.argv[1:] if argv is None else argv

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    class Parser(argparse.ArgumentParser):
        def error(self, sentence):  # argparse would print the whole usage first
            self.exit(2, f"{self.prog}: {sentence}; --help lists every flag\n")

    early = Parser(prog="cfm_images.py", add_help=False, allow_abbrev=False)  # the preset decides the other defaults
    early.add_argument("--preset")
    early.add_argument("--device", default="auto")
    early.add_argument("--smoke", action=argparse.BooleanOptionalAction)
    known = early.parse_known_args(argv)[0]
    preset = known.preset or ("gpu" if pick_device(known.device).type == "cuda" else "cpu")
    p = Parser(prog="cfm_images.py", description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction
    g = p.add_argument_group("data")
    g.add_argument("--data", metavar="drawn_faces|animal_faces|FOLDER|.zip|.npz", default="drawn_faces",
                   help="what to learn")
    g.add_argument("--size", type=int, help="pixels a side")
    g.add_argument("--flip", action=flag, default=True, help="mirror half of the training pictures")
    g.add_argument("--class_cond", action=flag, default=False, help="condition on the class: sub-folder or species")
    g = p.add_argument_group("model")
    g.add_argument("--width", type=int, help="channels of a hidden layer; of a UNet, at full size")
    g.add_argument("--mults", help="channel multiplier of each resolution; the side halves from one to the next")
    g.add_argument("--blocks", type=int, help="residual blocks per resolution")
    g.add_argument("--attn", type=int, help="self-attention where the feature map has at most this side")
    g.add_argument("--patch", type=int, help="the UNet takes patches of this side for one position each; 1 = pixels")
    g.add_argument("--dropout", type=float, help="dropout inside the residual blocks")
    g = p.add_argument_group("flow")
    g.add_argument("--pred", choices=["v", "x0"], help="what the network predicts")
    g.add_argument("--times", choices=list(TIMES),
                   help="t in training: evenly, or more of it in the middle, near the data or near the noise")
    g.add_argument("--min_snr", type=float, help="gamma of min-SNR loss weights (the paper: 5); 0 = off")
    g.add_argument("--coupling", choices=COUPLINGS, default="independent", help="how noise is paired with data")
    g.add_argument("--reflow", metavar="FILE", help="straighten this model.safetensors: learn the pairs it makes")
    g.add_argument("--pairs", type=int, help="how many pairs --reflow makes and learns")
    g.add_argument("--meanflow", action=flag, default=False, help="learn mean velocities, to sample in 1 to 4 steps")
    g.add_argument("--init_from", metavar="FILE", help="begin with this model.safetensors, not with random weights")
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
    g.add_argument("--from_ddpm", metavar="FILE", help="train nothing: run this model.safetensors of a DDPM as a flow")
    g.add_argument("--input", metavar="FOLDER", help="with --sample: the pictures to start from")
    g.add_argument("--sampler", choices=SAMPLERS, default="ancestral", help="how noise becomes data")
    g.add_argument("--sample_steps", type=int, help="steps from noise to data")
    g.add_argument("--shift", type=float, default=1.0, help="above 1: more of the steps at high noise")
    g.add_argument("--tol", type=float, default=1e-3, help="error that dopri5 allows in a step; it chooses the steps")
    g.add_argument("--cfg_scale", type=float, default=1.0, help="strength of classifier-free guidance; 1 = off")
    g.add_argument("--cfg_interval", type=float, nargs=2, default=[0.0, 1.0], metavar="T",
                   help="guide only from this t to that; 0 is data, 1 noise")
    g = p.add_argument_group("output and system")
    g.add_argument("--out", default="out/cfm_images", help="folder for everything that a run writes")
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
    if args.from_ddpm and args.sample is None:
        args.sample = 64
    if (args.reflow or args.meanflow) and "times" not in args.given:
        args.times = "uniform"  # the others hardly ever draw t = 1, from where a single step starts
    if (args.input or args.reflow or args.coupling == "ot") and "sampler" not in args.given:
        args.sampler = "midpoint"  # the default takes fresh noise, which leads nowhere back and belongs to no pair
    check(args, p.error)
    return args


def check(args, error):
    """Calls error(sentence) for settings that cannot be, given by hand or found in a checkpoint."""
    for name in "size width blocks patch steps batch_size accum eval_every sample_steps sample pairs".split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            error(f"--{name} has to be at least 1")
    for name in "lr ema_decay dropout min_snr cfg_scale seed".split():
        top = 1 if name in ("ema_decay", "dropout") else 2 ** 63
        if not 0 <= getattr(args, name) <= top:
            error(f"--{name} has to lie between 0 and {'1' if top == 1 else '2^63'}")
    if not args.mults or not all(isinstance(m, int) and m > 0 for m in args.mults):
        error("--mults takes positive whole numbers with commas between, such as 1,2,2")
    unit = args.patch * 2 ** (len(args.mults) - 1)
    if args.size % unit:
        error(f"--size has to be a multiple of {unit}: patches of {args.patch}, halved {len(args.mults) - 1} times")
    if args.width % 32:
        error("--width has to be a multiple of 32, the channels of an attention head")
    if not 1e-12 <= args.tol <= 1:
        error("--tol has to lie between 1e-12 and 1")
    if not 0.01 <= args.shift <= 100:
        error("--shift has to lie between 0.01 and 100")
    if len(args.cfg_interval) != 2 or not 0 <= args.cfg_interval[0] <= args.cfg_interval[1] <= 1:
        error("--cfg_interval takes two times, 0 <= first <= second <= 1")
    if Path(args.out).is_file():
        error(f"--out {args.out} is a file; it has to be a folder, or nothing yet")
    out = Path(args.out).resolve()
    if Path(args.data).is_dir() and Path(args.data).resolve() in (out, *out.parents):
        error(f"--out {args.out} lies in --data {args.data}: its pictures would be learnt the next time")
    if bool(args.sample) != bool(args.ckpt or args.from_ddpm) or args.sample and args.resume or \
            args.input and not args.sample:
        error("--sample N and --ckpt FILE go together (and --input FOLDER with them); to go on training use --resume")
    for name in "data flip steps batch_size accum lr ema_decay eval_every compile min_snr times coupling pairs".split():
        if args.sample and name in args.given:
            error(f"--{name} is for training" + ("; for drawing say --sample_steps" if name == "steps" else ""))
    if args.from_ddpm and (args.ckpt or args.meanflow):
        error("--from_ddpm names the model: leave out --ckpt and --meanflow")
    if args.input and args.sampler == "ancestral":
        error("--input follows the ODE to noise and back: --sampler ancestral adds noise, choose another")
    if args.sample and args.reflow:
        error("--reflow is for training; to sample from its model.safetensors use --sample N --ckpt FILE")
    if (args.reflow or args.coupling == "ot") and args.sampler == "ancestral":
        error("--sampler ancestral needs noise that is independent of the pictures, so not --reflow or --coupling ot")
    if args.reflow and args.pairs < 16:
        error("--pairs has to be at least 16, as many as training takes")
    if "init_from" in args.given and (args.reflow or args.sample or args.resume):
        error("--init_from is for a new training: leave out --reflow, --sample and --resume")
    if args.reflow and args.coupling != "independent":
        error("--reflow trains on pairs of its own: leave out --coupling")
    if args.meanflow and args.reflow:
        error("--reflow and --meanflow exclude each other: to go on from a flow, say --meanflow --init_from FILE")
    if args.meanflow and (args.cfg_scale != 1 or "sampler" in args.given and not args.input):
        error("a model of --meanflow knows where paths end: leave out --cfg_scale and --sampler, say --sample_steps")
    told = args.resume or args.ckpt  # what is not given by hand is taken from there
    if "cfg_interval" in args.given and args.cfg_scale == 1 and not told:
        error("--cfg_interval without --cfg_scale changes nothing")
    if "tol" in args.given and args.sampler != "dopri5" and not told:
        error("--tol is for --sampler dopri5 alone")
    if "pairs" in args.given and not args.reflow and not told:
        error("--pairs is for --reflow alone")
    if args.meanflow and args.compile and "compile" in args.given:
        error("--compile cannot be had with --meanflow, whose derivative torch.compile does not take")
    for name, choices in (("pred", ["v", "x0"]), ("times", TIMES), ("coupling", COUPLINGS), ("sampler", SAMPLERS)):
        if getattr(args, name) not in choices:
            error(f"--{name} is one of {', '.join(choices)}")


# -----------------------------------------------------------------------------
# The method. x0 is a clean picture in [-1, 1], eps Gaussian noise, t in [0, 1] how far it is from the first to the
# second. A model is any (xt, t) -> velocity, shaped like xt.
# To train: take a picture, noise and any t, stand at xt on the line between them, and let the model guess the velocity
# eps - x0. Many lines cross at xt, so it learns their mean. To sample: follow that mean from noise at t = 1 to t = 0,
# an ODE; or take, at every step, part of the noise anew (ancestral, the default: it mends what went wrong before).

TIMES = {"uniform": None, "logit_normal": (0.0, 1.0), "skewed": (-1.2, 1.2), "noisy": (0.8, 0.8)}  # mean, std of logit


def path(x0, eps, t):
    """Where the pair x0, eps (B, C, H, W) is at time t (B, 1, 1, 1), and its velocity there: 2209.03003 eq. 1."""
    return (1 - t) * x0 + t * eps, eps - x0


def draw_times(kind, shape, generator):
    """Times t in [0, 1). Not uniform: sigmoid of a normal number, as in SD3 (2403.03206 eq. 19), in flow_matching's
    recipe for CIFAR-10 (skewed to data), in JiT (2511.13720; noisy: skewed to noise)."""
    if TIMES[kind] is None:
        return torch.rand(shape, generator=generator)
    mean, std = TIMES[kind]
    return torch.sigmoid(mean + std * torch.randn(shape, generator=generator))


def loss_weight(t, min_snr, straight=False):
    """What a squared error of the velocity counts at times t (B,) -> (B,). An error in v is one of x0 divided by t: so
    the error of x0 is weighted by min(SNR, min_snr), SNR = ((1 - t) / t)^2, as in 2303.09556 for diffusion. 0 = off.
    straight: in reflow and MeanFlow pure noise tells where its path ends, so there all errors of x0 count alike."""
    if min_snr == 0:
        return torch.ones_like(t)
    return t ** 2 if straight else torch.minimum((1 - t) ** 2, min_snr * t ** 2)


def loss_fn(model, x0, eps, t, y=None):
    """Squared error of the velocity, 2210.02747 eq. 9: x0, eps (B, C, H, W), t (B,), labels y (B,) -> (B,)."""
    xt, v = path(x0, eps, t.view(-1, 1, 1, 1))
    return (model(xt, t, y) - v).square().mean((1, 2, 3))


def meanflow_loss_fn(model, x0, eps, t, r, y=None):
    """MeanFlow, 2505.13447 eq. 9, 10: model(xt, t, y, r) learns u, the mean velocity between the times r <= t.

    (t - r) u is the way from r to t. Its derivative by t, along the path, is v = u + (t - r) du/dt: that gives u from v
    and from its own slope. Where r = t this is flow matching."""
    xt, v = path(x0, eps, t.view(-1, 1, 1, 1))
    target, i = v.clone(), (r < t).nonzero()[:, 0]
    if len(i):
        x, t_i, r_i, y_i = (None if a is None else a[i] for a in (xt, t, r, y))
        # fp32 and plain attention, because forward derivatives pass neither autocast nor the fused kernels
        with torch.no_grad(), torch.autocast(x0.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
            # differs from the paper: along the path of the model's velocity, not of this one pair, whose slope is noisy
            along = (model(x, t_i, y_i), torch.ones_like(t_i), torch.zeros_like(r_i))
            _, slope = torch.func.jvp(lambda x, t, r: model(x, t, y_i, r), (x, t_i, r_i), along)
        target[i] -= (t_i - r_i).view(-1, 1, 1, 1) * slope
    return (model(xt, t, y, r) - target).square().mean((1, 2, 3))


def couple(x0, eps, y):
    """eps in another order, so that the lines from x0 (B, C, H, W) are short and seldom cross: the assignment of least
    total squared distance (2302.00482). Only within each class of y (B,): else the noise that belongs to a class would
    no longer be Gaussian, which it is when sampling (2503.10636)."""
    cost = torch.cdist(x0.flatten(1), eps.flatten(1)).square().cpu().numpy()
    order = np.arange(len(x0))
    for c in y.unique().tolist():
        i = np.flatnonzero(y.cpu() == c)
        order[i] = i[linear_sum_assignment(cost[np.ix_(i, i)])[1]]
    return eps[torch.from_numpy(order).to(eps.device)]


# Runge-Kutta methods: for each further stage how far it goes along the slopes before it; the last row is the step.
RUNGE_KUTTA = {
    "euler": [[1]],
    "midpoint": [[1 / 2], [0, 1]],
    "heun": [[1], [1 / 2, 1 / 2]],
    "rk4": [[1 / 2], [0, 1 / 2], [0, 0, 1], [1 / 6, 1 / 3, 1 / 3, 1 / 6]],
    "dopri5": [[1 / 5], [3 / 40, 9 / 40], [44 / 45, -56 / 15, 32 / 9],
               [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
               [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
               [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]]}
DOPRI5_ERROR = [71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40]  # 5th minus 4th order


def rk_step(velocity, x, t, h, solver, slopes):
    """One step from t to t + h -> x there. slopes: a list with velocity(x, t), the further ones are added to it."""
    *stages, step = RUNGE_KUTTA[solver]
    for row in stages:
        slopes.append(velocity(x + h * sum(w * k for w, k in zip(row, slopes)), t + h * sum(row)))
    return x + h * sum(w * k for w, k in zip(step, slopes))


def solve(velocity, x, times, solver, tol, on_step=None):
    """dx/dt = velocity(x, t), t a number, from times[0] to times[-1] -> x there, and NFE, the calls of velocity.

    dopri5 ignores the times between: it makes its steps as long as the error that it estimates (root mean square over
    all points, relative to tol (1 + |x|)) allows. Hairer, Norsett, Wanner II.4, table II.5.2. Raises Stop when they
    become too short."""
    if solver != "dopri5":
        for t, s in zip(times, times[1:]):
            slopes = [velocity(x, t)]
            if on_step:
                on_step(t, x, slopes[0])
            x = rk_step(velocity, x, t, s - t, solver, slopes)
        return x, (len(times) - 1) * len(slopes)
    t, end = times[0], times[-1]
    h, slope, nfe = (end - t) / 20, velocity(x, t), 1
    while t != end:
        h, slopes = h if abs(h) < abs(end - t) else end - t, [slope]
        new = rk_step(velocity, x, t, h, solver, slopes)
        slopes.append(velocity(new, t + h))  # a 7th slope for the estimate, and the first one of the next step
        nfe += 6
        error = h * sum(w * k for w, k in zip(DOPRI5_ERROR, slopes))
        ratio = (error / (tol + tol * torch.maximum(x.abs(), new.abs()))).square().mean().item() ** 0.5
        if ratio <= 1:
            if on_step:
                on_step(t, x, slope)
            t, x, slope = end if h == end - t else t + h, new, slopes[-1]
        elif abs(h) < 1e-7:
            raise Stop(f"dopri5 cannot go on at t = {t:.4f}: the velocity is too rough for --tol {tol}", 1)
        h *= min(10, max(0.2, 0.9 * (ratio + 1e-10) ** -0.2))
    return x, nfe


def time_grid(steps, shift):
    """steps + 1 times from 1 to 0; shift > 1 puts more of them where there is much noise (2403.03206 eq. 23)."""
    t = np.linspace(1, 0, steps + 1)
    return (shift * t / (1 + (shift - 1) * t)).tolist()


@torch.no_grad()
def sample(model, noise, sampler, times, tol=1e-3, meanflow=False, on_step=None):
    """The first item of noise (B, C, H, W) carried from times[0] to times[-1] -> x there, and NFE: pictures from noise
    when the times fall from 1 to 0, and when they rise from 0 to 1 noise from pictures, which then are that item.

    noise: iterator; its other items are for the sampler that adds noise. on_step(t, xt, v) is called before a step."""
    def velocity(x, t, *r):
        return model(x, *(torch.full((len(x),), s, dtype=x.dtype, device=x.device) for s in (t, *r)))
    x = next(noise)
    if not meanflow and sampler != "ancestral":
        return solve(velocity, x, times, sampler, tol, on_step)
    for t, s in zip(times, times[1:]):
        v = velocity(x, t, s) if meanflow else velocity(x, t)
        if on_step:
            on_step(t, x, v)
        if meanflow:  # the mean velocity from t to s is all that the step needs: 2505.13447 eq. 12
            x = x + (s - t) * v
        else:         # part of the noise replaced by fresh noise: DDPM eq. 7 (2006.11239) in these coordinates
            kept = (s * (1 - t) / (t * (1 - s))) ** 2    # SNR at t over SNR at s
            x0, eps = x - t * v, x + (1 - t) * v
            x = (1 - s) * x0 + s * (kept ** 0.5 * eps + (1 - kept) ** 0.5 * next(noise))
    return x, len(times) - 1


def guided(model, y, cfg_scale, interval):
    """model with labels y (or None) as (xt, t) -> v. cfg_scale is 1 + w of 2207.12598; outside the interval of t, where
    guidance does harm or nothing (2404.07724), it is 1, for half the price."""
    def call(xt, t, *r):
        if y is None or cfg_scale == 1 or not interval[0] - 1e-6 <= t[0].item() <= interval[1] + 1e-6:
            return model(xt, t, y, *r)
        labels = torch.cat([y, torch.full_like(y, model.y_null)])
        with_y, without = model(torch.cat([xt, xt]), torch.cat([t, t]), labels).chunk(2)
        return without + cfg_scale * (with_y - without)
    return call


# -----------------------------------------------------------------------------
# The bridge to diffusion. A DDPM's xt = sqrt(ab) x0 + sqrt(1 - ab) eps, divided by the sum of both roots, is a point
# (1 - t) x0 + t eps of a straight line, with t = sqrt(1 - ab) / (sqrt(ab) + sqrt(1 - ab)). So its network, which sees
# x0 and eps in xt, is a velocity eps - x0 in the coordinates of flow matching, and a step of DDIM is a step of Euler.

T = 1000
SCHEDULES = ["cosine", "linear"]
PREDICTIONS = ["eps", "v", "x0"]


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


def to_x0(out, xt, ab, pred):
    """The clean picture that the network's output stands for, add_noise solved for x0. The output is the noise (eps,
    DDPM), the picture (x0), or a mix of both that has something to tell at every t (v)."""
    if pred == "eps":
        return (xt - (1 - ab) ** 0.5 * out) / ab ** 0.5
    if pred == "v":  # from out = sqrt(ab) eps - sqrt(1 - ab) x0
        return ab ** 0.5 * xt - (1 - ab) ** 0.5 * out
    return out


def flow_time(ab):
    """t in [0, 1] of a noise level alpha_bar."""
    return (1 - ab) ** 0.5 / (ab ** 0.5 + (1 - ab) ** 0.5)


class DDPMFlow(nn.Module):
    """A network of ddpm_images.py as a velocity field: (xt, t, y) -> v, xt (B, C, H, W) in the coordinates of flow
    matching, t (B,) one time for all. Between the T noise levels the network is asked at a fraction of a level, which
    it takes well; beyond the first and the last level it is asked at those."""

    def __init__(self, model, alpha_bar, pred):
        super().__init__()
        self.model, self.pred, self.y_null = model, pred, model.y_null
        self.times = flow_time(alpha_bar).cpu().numpy()               # they rise

    def forward(self, xt, t, y=None):
        s = float(np.clip(t[0].item(), self.times[0], self.times[-1]))
        level = torch.full_like(t, float(np.interp(s, self.times, np.arange(T))))
        length = (s ** 2 + (1 - s) ** 2) ** 0.5                       # of (1 - s, s): sqrt(ab) is its cosine
        ab, xt = ((1 - s) / length) ** 2, xt / length
        x0 = to_x0(self.model(xt, level, y).to(xt.dtype), xt, ab, self.pred).clamp(-1, 1)  # as ddpm_images.py does
        return (xt - ab ** 0.5 * x0) / (1 - ab) ** 0.5 - x0


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


T_MIN = 0.05  # v = (xt - x0) / t has no bound at t = 0: nearer than this it is divided by T_MIN, and so a little slow:
#               noise of one or two levels of gray stays. Smaller, and solvers with few steps stumble at t = 0.
T_SCALE = 30  # waves() sees 30 t. With DDPM's 1,000 t the derivative by t, for MeanFlow, explodes


class VelocityUNet(UNet):
    """The UNet as a velocity field: (xt, t, y) -> v, with times t (B,) in [0, 1]; one for MeanFlow takes r (B,) as
    well, and gives the mean velocity from t to r.

    What the network itself puts out is v, or (pred x0) the picture x0 where a line to xt begins, and v = (xt - x0) / t.
    Pictures are smooth and noise is not: on patches only x0 fits through the network (2511.13720). In MeanFlow it then
    is the picture to which the mean velocity points."""

    def __init__(self, pred, meanflow, size, patch, width, mults, blocks, attn, dropout, n_classes=0):
        super().__init__(size, patch, width, mults, blocks, attn, dropout, n_classes)
        D, self.pred = 4 * width, pred
        self.span = nn.Sequential(nn.Linear(width, D), nn.SiLU(), nn.Linear(D, D)) if meanflow else None
        if meanflow:
            nn.init.zeros_(self.span[-1].weight)  # to begin with, a mean velocity is that at t
            nn.init.zeros_(self.span[-1].bias)

    def forward(self, xt, t, y=None, r=None):                                    # (B, 3, H, W), (B,), (B,), (B,)
        emb = self.embed(T_SCALE * t, y)                                         # (B, D)
        if self.span is not None:
            emb = emb + self.span(waves(T_SCALE * (t - (t if r is None else r)), self.width).to(emb.dtype))
        out = self.body(xt, F.silu(emb)).to(xt.dtype)                            # (B, 3, H, W)
        return (xt - out) / t.clamp(min=T_MIN).view(-1, 1, 1, 1) if self.pred == "x0" else out


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


def plot_curves(path, curves, title):
    """{name: [(x, y)]} -> a picture of lines over a logarithmic axis of x, powers of two."""
    points = [p for c in curves.values() for p in c]
    top, (y0, y1) = math.log2(max(x for x, _ in points)), (f(y for _, y in points) for f in (min, max))
    image = Image.new("RGB", (640, 400), "white")
    draw = ImageDraw.Draw(image)
    place = lambda x, y: (60 + 560 * math.log2(x) / max(top, 1), 350 - 310 * (y - y0) / max(y1 - y0, 1e-9))
    for i in range(5):
        y = y0 + (y1 - y0) * i / 4
        draw.line([place(1, y), place(2 ** top, y)], "#dddddd")
        draw.text((8, place(1, y)[1] - 6), f"{y:.1f}", "black")
    for k in range(int(top) + 1):
        draw.text((place(2 ** k, y0)[0] - 4, 360), str(2 ** k), "black")
    colours = ("#1f5fbf", "#d1495b", "#3a9d5d", "#e09f3e", "#7b4fa3", "#444444", "#999999")
    for i, ((name, curve), colour) in enumerate(zip(curves.items(), itertools.cycle(colours))):
        draw.line([place(*p) for p in curve], colour, 3)
        for x, y in (place(*p) for p in curve):
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], colour)
        draw.text((60 + 95 * i, 382), name, colour)
    draw.text((60, 8), title, "black")
    image.save(path)


# -----------------------------------------------------------------------------
# Sampling and training.

ARCHITECTURE = "size patch width mults blocks attn dropout class_cond pred meanflow".split()
FREE_ON_RESUME = ("data steps lr out eval_every device dtype compile accum sampler sample_steps shift tol cfg_scale "
                  "cfg_interval").split()
P_UNCOND = 0.1  # share of labels or texts that training hides: one network learns both sides of the guidance
P_INSTANT = 0.5   # share of MeanFlow's examples with r = t, plain flow matching
PAIR_STEPS = 8   # of midpoint, with which reflow makes its pairs


NO_CLASSES = "--cfg_scale needs a model that knows classes, trained with --class_cond"


def build_model(args, n_classes):
    """The UNet that the flags describe."""
    return VelocityUNet(args.pred, args.meanflow, args.size, args.patch, args.width, args.mults, args.blocks, args.attn,
                        args.dropout, n_classes if args.class_cond else 0)


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


def load_model(path, args, device, also=()):
    """The model in a model.safetensors of this script, or of ddpm_images.py as a flow, and its classes; args take over
    what it was trained with, and the keys `also`."""
    ddpm = args.from_ddpm is not None
    tensors, saved, data = read_model(path, "ddpm_images.py" if ddpm else "cfm_images.py")
    keys = [k for k in ARCHITECTURE if not ddpm or k not in ("pred", "meanflow")]
    adopt(args, saved, keys + sorted(also), path)
    classes = data.get("classes") if isinstance(data, dict) else None
    if not isinstance(classes, list) or args.class_cond and len(classes) < 2:
        raise Stop(f"{path} does not say what its classes were; has it been edited?")
    if args.cfg_scale != 1 and not args.class_cond:
        raise Stop(NO_CLASSES)
    if not ddpm and args.sampler == "ancestral" and (saved.get("reflow") or saved.get("coupling") == "ot"):
        raise Stop(f"{path} was trained on pairs, which fresh noise would part: not --sampler ancestral")
    if not ddpm:
        model = build_model(args, len(classes))
    elif saved.get("schedule") not in SCHEDULES or saved.get("pred") not in PREDICTIONS:
        raise Stop(f"{path} does not say what --schedule and --pred were; has it been edited?")
    elif saved.get("condition") != "none":
        raise Stop(f"{path} translates pictures; as a flow only a model that draws from noise alone can be sampled")
    else:
        model = UNet(args.size, args.patch, args.width, args.mults, args.blocks, args.attn, args.dropout,
                     len(classes) if args.class_cond else 0)
    load_weights(model, tensors, path)
    model = model.to(device).eval().requires_grad_(False)
    return DDPMFlow(model, make_alpha_bar(saved["schedule"]), saved["pred"]) if ddpm else model, classes


def make_pairs(teacher, classes, args, device):
    """Pictures that the model in --reflow makes of noise, kept as prepare_data keeps its own -> that path. Number i is
    made of number i of image_noise(args.seed + 2), without guidance: 2209.03003 algorithm 1."""
    plain = argparse.Namespace(**{**vars(args), "cfg_scale": 1.0})
    what = repr([Path(args.reflow).read_bytes(), args.pairs, args.seed, PAIR_STEPS, pick_dtype(args.dtype, device)])
    key = hashlib.sha256(what.encode()).hexdigest()[:16]
    cache = Path(f"data/cache/reflow-{args.size}-{key}.uint8")
    if cache.exists():
        return cache
    print(f"making {args.pairs} pairs with {args.reflow}, once, for {cache}", flush=True)
    cache.parent.mkdir(parents=True, exist_ok=True)
    labels = [i % len(classes) for i in range(args.pairs)]
    about = dict(name=f"pairs of {args.reflow}", key=key, classes=classes, size=args.size, labels=labels, broken=[])

    def write(f):
        for k in tqdm(range(0, args.pairs, 64), "making pairs", disable=None):
            i = range(k, min(k + 64, args.pairs))
            y = torch.tensor(labels[k:k + 64], device=device) if args.class_cond else None
            noise = image_noise(args.seed + 2, i, (3, args.size, args.size), device)
            x, _ = generate(teacher, plain, noise, y, sampler="midpoint", times=time_grid(PAIR_STEPS, 1.0),
                            meanflow=False)
            f.write(to_uint8(x).tobytes())
        write_atomically(cache.with_suffix(".json"), lambda g: g.write(json.dumps(about).encode()))
    write_atomically(cache, write)
    return cache


def train_batch(data, args, step, device, rank, world):
    """Pictures and all randomness of one step -> x0, eps, t, r, y, of which each rank gets its share.

    Drawn for the whole batch from (seed, step), so that any number of processes trains on the same numbers; --coupling
    ot matches what each of them holds."""
    B, g = args.batch_size, torch.Generator().manual_seed(mix(BATCH, args.seed, step))
    mine, n = slice(B * rank // world, B * (rank + 1) // world), len(data.train)
    (t, r), u = draw_times(args.times, (2, B), g)[:, mine], torch.rand((B, 3), generator=g)[mine]
    r = torch.where(u[:, 2] < P_INSTANT, t, r) if args.meanflow else t  # u: mirror, hide y, r = t
    t, r = torch.maximum(t, r), torch.minimum(t, r)
    g = torch.Generator(device).manual_seed(mix(NOISE, args.seed, step))
    eps = torch.randn((B, 3, args.size, args.size), generator=g, device=device)[mine]
    places = range(step * B + mine.start, step * B + mine.stop)  # in the endless list of shuffled epochs
    i = data.train[[shuffled(n, args.seed, k // n)[k % n] for k in places]]
    labels = torch.from_numpy(data.labels[i])
    x0 = load_pictures(data.images, i, device)
    if args.reflow:
        eps = to_device(next(image_noise(args.seed + 2, i.tolist(), x0.shape[1:], "cpu")), device)
    elif args.coupling == "ot":
        eps = couple(x0, eps, labels if args.class_cond else torch.zeros_like(labels))
    y = torch.where(u[:, 1] < P_UNCOND, len(data.classes), labels)
    t, r, u, y = (to_device(a, device) for a in (t, r, u, y))
    if args.flip and not args.reflow:  # a mirrored pair would be a second path from the same noise
        x0, eps = (torch.where(u[:, 0].view(-1, 1, 1, 1) < 0.5, a.flip(-1), a) for a in (x0, eps))
    return x0, eps, t, r, y if args.class_cond else None


def train_step(model, opt, batch, args, amp):
    """One optimizer step on batch = (x0, eps, t, r, y) -> the loss, left on the device."""
    total = 0
    for k in range(args.accum):
        x0, eps, t, r, y = (None if a is None else a.chunk(args.accum)[k] for a in batch)
        if dist.is_initialized():
            model.require_backward_grad_sync = k == args.accum - 1  # gradients are averaged once per step
        with amp():
            loss = meanflow_loss_fn(model, x0, eps, t, r, y) if args.meanflow else loss_fn(model, x0, eps, t, y)
        loss = loss_weight(t, args.min_snr, args.meanflow or args.reflow) * loss
        total += loss.detach().mean() / args.accum
        if args.meanflow:  # now and then a slope is huge: all examples weigh alike, 2505.13447 section 4.3
            loss = loss / (loss.detach() + 0.01)
        (loss.mean() / args.accum).backward()
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
        x0, y = load_pictures(data.images, data.val[i], device), torch.from_numpy(data.labels[data.val[i]]).to(device)
        noise = (args.seed + 2, data.val[i].tolist()) if args.reflow else (args.seed + 1, i)
        eps = next(image_noise(*noise, x0.shape[1:], device))
        with amp():
            loss = loss_fn(model, x0, eps, t, y if args.class_cond else None)
            loss = (loss_weight(t, args.min_snr, args.meanflow or args.reflow) * loss).cpu().double()
        total += torch.stack([torch.bincount((t.cpu() * 10).long(), w, 10) for w in (loss, torch.ones_like(loss))])
    total = sum_over_ranks(total.float().to(device)).cpu()
    bins = [loss / count if count else None for loss, count in zip(*total.tolist())]  # None: no picture fell into it
    return (total[0].sum() / total[1].sum()).item(), bins


def generate(model, args, noise, y=None, on_step=None, **other):
    """sample() as the flags say, with labels y (B,) and guidance -> pictures (B, C, H, W) and NFE; `other` overrides
    sampler, times, tol or meanflow."""
    device = next(model.parameters()).device
    how = dict(sampler=args.sampler, times=time_grid(args.sample_steps, args.shift), tol=args.tol,
               meanflow=args.meanflow) | other
    if how["sampler"] == "dopri5" and how["tol"] < 1e-5 and pick_dtype(args.dtype, device) == torch.bfloat16:
        raise Stop(f"--tol {how['tol']:g} is finer than bf16 can tell, so dopri5 would crawl: say --dtype fp32 as well")
    with torch.autocast(device.type, torch.bfloat16, enabled=pick_dtype(args.dtype, device) == torch.bfloat16):
        return sample(guided(model, y, args.cfg_scale, args.cfg_interval), noise, on_step=on_step, **how)


def psnr(x, y):
    """Peak signal-to-noise ratio in dB of pictures x against y, both in [-1, 1]: 10 log10(2^2 / mean square of x - y).
    The median of the pictures, because here and there a path forks, and its picture becomes another."""
    error = (x - y).square().mean((1, 2, 3)).clamp(min=1e-20)
    return (10 * (4 / error).log10()).median().item()


def there_and_back(model, args, x0, sampler="rk4", steps=16, tol=1e-4):
    """Pictures turned into noise along the ODE, and that into pictures again -> noise, pictures, NFE of both ways, PSNR
    in dB. Without labels, and in fp32 (TF32 on a GPU), because bf16 rounds away what is to be found again."""
    exact, times = argparse.Namespace(**{**vars(args), "dtype": "fp32"}), time_grid(steps, args.shift)
    how = dict(sampler=sampler, tol=tol, meanflow=False)
    eps, there = generate(model, exact, iter([x0]), times=times[::-1], **how)
    x, back = generate(model, exact, iter([eps]), times=times, **how)
    return eps, x, there + back, psnr(x, x0)


def study_solvers(model, args, x0):
    """How exact are the solvers? -> {solver: [(NFE, PSNR in dB of samples against the solution)]}, and {solver NFE:
    PSNR of pictures x0 turned into noise and back}. Without labels."""
    exact, curves, inversions = argparse.Namespace(**{**vars(args), "dtype": "fp32"}), {}, {}
    noise = next(image_noise(args.seed, range(len(x0)), x0.shape[1:], x0.device))
    end, _ = generate(model, exact, iter([noise]), sampler="rk4", times=time_grid(40, 1.0), meanflow=False)
    runs = [(solver, calls // len(RUNGE_KUTTA[solver]), 0) for solver in ("euler", "midpoint", "heun", "rk4")
            for calls in (1, 2, 4, 8, 16, 32, 64) if calls >= len(RUNGE_KUTTA[solver])]
    for solver, steps, tol in runs + [("dopri5", 1, tol) for tol in (1e-2, 1e-3, 1e-4)]:
        try:
            x, nfe = generate(model, exact, iter([noise]), sampler=solver, tol=tol, times=time_grid(steps, args.shift),
                              meanflow=False)
            curves.setdefault(solver, []).append((nfe, psnr(x, end)))
            if tol or nfe in (16, 64):
                *_, nfe, found = there_and_back(model, args, x0, solver, steps, tol)
                inversions[f"{solver} {nfe}"] = found
        except Stop as e:  # a network that has hardly learnt can be too rough for dopri5: the run is fine all the same
            print(f"left out of nfe.png: {e}")
    return curves, inversions


def draw_pictures(out, ema, data, args, device, y):
    """What a finished run shows: forward.png, reverse.gif, training.gif, interpolation.png, and as nfe.png and nfe.json
    the findings of study_solvers."""
    x0, times = load_pictures(data.images, data.val[:8], device), [0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1]
    eps = next(image_noise(args.seed, range(6), x0.shape[1:], device))[:len(x0)]
    steps = torch.stack([path(x0[:6], eps, t)[0] for t in times], 1)                     # (6, times, 3, H, W)
    save_png(out / "forward.png", tile(to_uint8(steps.flatten(0, 1)), len(times)))

    frames, n = [], 16
    y = None if y is None else y[:n]
    def note(t, xt, v):                                                                  # noisy left, its guess right
        frames.append(np.concatenate([tile(to_uint8(x), 4) for x in (xt, xt - t * v)], 1))
    x, _ = generate(ema, args, image_noise(args.seed, range(n), x0.shape[1:], device), y, on_step=note)
    frames.append(np.concatenate([tile(to_uint8(x), 4)] * 2, 1))
    k = -(-len(frames) // 25)                                                            # at most 25 of them
    save_gif(out / "reverse.gif", frames[(len(frames) - 1) % k::k])
    grids = sorted(out.glob("samples/" + "[0-9]" * 6 + ".png"))
    save_gif(out / "training.gif", [np.asarray(Image.open(p)) for p in grids], 500)

    eps, *_ = there_and_back(ema, args, x0)
    n, angle = -(-len(x0) // 2), torch.linspace(0, math.pi / 2, 8, device=device).view(1, -1, 1, 1, 1)
    between = (angle.cos() * eps[:n, None] + angle.sin() * eps[-n:, None]).flatten(0, 1) # of constant variance
    x, _ = generate(ema, args, iter([between]), sampler="rk4", times=time_grid(16, args.shift), meanflow=False)
    x = torch.cat([x0[:n, None], x.unflatten(0, (n, 8)), x0[-n:, None]], 1).flatten(0, 1)
    save_png(out / "interpolation.png", tile(to_uint8(x), 10))                           # real, eight between, real
    curves, inversions = study_solvers(ema, args, x0)
    plot_curves(out / "nfe.png", curves, "PSNR in dB against the exact solution, by calls of the network (NFE)")
    print("to noise and back, PSNR in dB by solver and NFE: "
          + "  ".join(f"{k}: {v:.1f}" for k, v in inversions.items()))
    (out / "nfe.json").write_text(json.dumps(dict(psnr=curves, inversions=inversions)))


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
        state = load_checkpoint(args.resume, "cfm_images.py")
        keep = {"given", "resume"} | args.given & set(FREE_ON_RESUME)
        adopt(args, state["args"], vars(args).keys() - keep, args.resume)
        if "out" not in args.given:
            args.out = str(Path(args.resume).parent)  # where it lies now: the folder may have been renamed
    if args.init_from and not state:
        tensors, saved, _ = read_model(args.init_from, "cfm_images.py")
        adopt(args, saved, set(ARCHITECTURE) - {"meanflow"}, args.init_from)
        if saved.get("meanflow") and not args.meanflow:
            raise Stop(f"{args.init_from} was trained with --meanflow, which it needs to go on")
    device, rank, world = setup(args)  # the device, too, is the checkpoint's unless given
    say = functools.partial(print, flush=True) if rank == 0 else lambda *a, **k: None
    if args.batch_size % (world * args.accum):
        raise Stop(f"--batch_size {args.batch_size} has to be a multiple of {world} processes x --accum {args.accum}")
    for earlier in filter(None, (args.reflow, args.init_from)):
        if Path(earlier).resolve().parent == Path(args.out).resolve():
            raise Stop(f"this run would write over {earlier}: choose another --out")
    if args.reflow:
        teacher, classes = load_model(args.reflow, args, device)
        prepare = functools.partial(make_pairs, teacher, classes, args, device)
    else:
        prepare = functools.partial(prepare_data, args.data, args.size, 256 if args.smoke else DRAWN_FACES)
    data = shared_data(prepare, rank, world)
    if data.broken:
        say(f"left out, because they cannot be read: {len(data.broken)}: " + "; ".join(data.broken[:9]))
    if state and state["key"] != data.key and args.reflow:
        raise Stop(f"{args.resume} was trained on other pairs: {args.reflow} or the arithmetic, --dtype, has changed")
    if state and state["key"] != data.key:
        raise Stop(f"--data {args.data} is not what {args.resume} was trained on: the pictures "
                   "or their dates have changed, or the code that reads them")
    if args.cfg_scale != 1 and not args.class_cond:
        raise Stop(NO_CLASSES)
    if args.class_cond and len(data.classes) < 2:
        raise Stop("--class_cond needs pictures in at least two sub-folders (or an .npz with labels)")

    torch.manual_seed(mix(INIT, args.seed))
    model = build_model(args, len(data.classes)).to(device)
    if args.init_from and not state:
        span = {k: v for k, v in model.state_dict().items() if k.startswith("span.")}  # a flow has none
        load_weights(model, span | tensors, args.init_from)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)  # not on the CPU: GroupNorm is 20 times slower there
    ema, start, best = copy.deepcopy(model).eval().requires_grad_(False), 0, math.inf
    opt = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.99), weight_decay=0.01, fused=device.type != "mps")
    if args.reflow:
        for net in (model, ema):
            net.load_state_dict(teacher.state_dict())
    if state:
        start, best = restore(state, model, ema, opt, args)
    raw_model = model
    if args.compile and not args.meanflow:
        raw_model.compile()
    if world > 1:
        model = DistributedDataParallel(raw_model, device_ids=[device] if device.type == "cuda" else None)

    out, dtype = Path(args.out), pick_dtype(args.dtype, device)
    settings = {k: v for k, v in vars(args).items() if k != "given"}
    amp = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    log_every = max(1, min(50, args.steps // 50))
    shape = (3, args.size, args.size)
    y = torch.arange(64, device=device) % len(data.classes) if args.class_cond else None
    peak = None if args.meanflow else peak_flops(device)  # its derivatives are not counted
    if peak:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            ema(torch.zeros(1, *shape, device=device), torch.zeros(1, device=device))
        flops = 3 * counter.get_total_flops()  # forward once, backward twice; 2 per multiply-add
    own_folder = state is not None and Path(args.resume).resolve().parent == out.resolve()
    log = begin_log(out, start, resumed=own_folder) if rank == 0 else []
    began -= log[-1]["seconds"] if log else 0  # a resumed run counts on
    say(f"{data.name}: {len(data.train)} pictures to train on, {len(data.val)} held out; {device} x {world}, "
        f"{str(dtype)[6:]}; {sum(p.numel() for p in ema.parameters()) / 1e6:.1f}M parameters; writes to {out}")
    say("settings: " + " ".join(f"{k}={v}" for k, v in settings.items()))

    def save(step):
        if rank == 0:
            ckpt = dict(script="cfm_images.py", args=settings, step=step, data=data.name, key=data.key, best=best,
                        model=raw_model.state_dict(), ema=ema.state_dict(), opt=opt.state_dict())
            write_atomically(out / "ckpt.pt", functools.partial(torch.save, ckpt))
            save_safetensors(out / "model.safetensors", ema.state_dict(), dict(
                format="pt", script="cfm_images.py", kind="unet", args=json.dumps(settings),
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
            if not loss < (math.inf if args.meanflow else 100):  # also true of NaN; MeanFlow's may jump
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
                x, _ = generate(ema, args, image_noise(args.seed, range(64), shape, device), y)
                save_png(out / f"samples/{step:06d}.png", tile(to_uint8(x), 8))
            clock = time.time()
        if record:
            write_record(step, record)
        if stop:
            if not evaluate:
                save(step)
            raise Stop(f"stopped at step {step}; go on: {'torchrun ...' if world > 1 else 'python'} cfm_images.py "
                       f"--resume {out / 'ckpt.pt'}", [*noted, 130][0])
        if last:
            break

        # one step: data, noise and t from (seed, step); the loss, its gradient, AdamW, the moving average
        for group in opt.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 50)  # warm-up, while Adam's averages settle
        torch.manual_seed(mix(DROPOUT, args.seed, rank, step))
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
        say("trained; now the pictures, and how exact each solver is")
        draw_pictures(out, ema, data, args, device, y)
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
    file = args.ckpt or args.from_ddpm
    if args.ckpt and "out" not in args.given:
        args.out = str(Path(args.ckpt).parent)
    sampling = {"sample_steps", "shift", "tol", "cfg_scale", "cfg_interval"}  # as in training, unless given
    sampling |= set() if args.input else {"sampler"}
    model, classes = load_model(file, args, device, set() if args.from_ddpm else sampling - args.given)
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
    began, mine, calls, found = time.time(), np.array_split(np.arange(n), world)[rank], set(), []
    batches = [mine[k:k + 64] for k in range(0, len(mine), 64)]
    for i in tqdm(batches, "sampling", disable=True if rank else None):
        y = torch.as_tensor(i % len(classes), device=device) if args.class_cond else None
        if pictures is None:
            x, nfe = generate(model, args, image_noise(args.seed, i, (3, args.size, args.size), device), y)
            grid, columns = x, max(1, int(len(x) ** 0.5))
        else:
            x0 = load_pictures(pictures, i, device)
            eps, x, nfe, found_again = there_and_back(model, args, x0, args.sampler, args.sample_steps, args.tol)
            grid, columns = torch.stack([x0, eps, x], 1).flatten(0, 1), 9
            found.append(found_again)
        calls.add(nfe)
        if not x.isfinite().all():
            raise Stop(f"{file} draws NaN or infinity; did its training diverge?", 1)
        part.mkdir(parents=True, exist_ok=True)
        for j, picture in zip(i, to_uint8(x)):
            write_atomically(part / f"{j:06d}.png", lambda f: Image.fromarray(picture).save(f, "PNG"))
        if i[0] == 0:
            first = tile(to_uint8(grid), columns)
    sum_over_ranks(torch.zeros(1, device=device)).item()
    if rank == 0:
        earlier = publish(part, out / "generated")
        save_png(out / "generated.png", first)
        how = "mean velocities" if args.meanflow and not found else args.sampler
        how += f", NFE {'-'.join(map(str, sorted(calls)))}"
        if args.class_cond and not found:
            how += f", --cfg_scale {args.cfg_scale}, in turn " + " ".join(classes)
        if found:
            how += f"; PSNR to noise and back {np.mean(found):.1f} dB"
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
        print(f"cfm_images.py: {sentence}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    status = main()
    if "RANK" in os.environ:  # threads of the process group can outlive the interpreter, which now and then aborts it
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
