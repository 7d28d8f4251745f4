"""DDPM in the plane: drown points in Gaussian noise step by step, train a small network to undo it, measure it all.

    python ddpm_2d.py                                       # a swiss roll, with every picture and measure
    python ddpm_2d.py --data 8gaussians                     # or moons, checkerboard, circles, pinwheel, drawing.png
    python ddpm_2d.py --pred v --schedule linear --sampler ddim --sample_steps 50
    python ddpm_2d.py --data moons --oracle                 # no training: the true score, known in closed form
    python ddpm_2d.py --sample 2048 --ckpt out/ddpm_2d/model.safetensors --sampler heun --sample_steps 20
    python ddpm_2d.py --resume out/ddpm_2d/ckpt.pt --steps 40000

Expected, first line: 30 s on two cores of a shared AMD EPYC (torch 2.13.0), 19 of them training; of 2,048 samples the
Chamfer distance 4.05 (of true points: 4.02), 2-Wasserstein 0.17 (0.24), energy 0.0026 (0.0035), nll 1.68 (1.66).
Writes out/ddpm_2d/: forward.png, reverse.gif, field.gif, density.png, training.gif, log.jsonl, ckpt.pt,
model.safetensors; with --sample points.npy and points.png.

Papers: DDPM 2006.11239, DDIM 2010.02502, v-prediction 2202.00512, NCSN (annealed Langevin) 1907.05600, the
probability-flow ODE 2011.13456, EDM (Heun) 2206.00364, DPM-Solver++ 2211.01095, Fourier features 2006.10739.
"""
import argparse
import copy
import functools
import itertools
import json
import math
import mmap
import os
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from scipy.special import ndtri
from tqdm import tqdm

# -----------------------------------------------------------------------------
# Knobs.

TARGETS = ["swiss_roll", "moons", "8gaussians", "checkerboard", "circles", "pinwheel"]
SCHEDULES = ["cosine", "linear"]
PREDICTIONS = ["eps", "v", "x0", "score"]
SAMPLERS = ["ddpm", "ddim", "dpmpp_2m", "heun", "langevin"]


def parse_args(argv=None):
    """The settings, flags given by hand or defaults. Wrong ones end the script with a sentence and status 2."""
    argv = sys.argv[1:] if argv is None else argv

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    class Parser(argparse.ArgumentParser):
        def error(self, sentence):  # argparse would print the whole usage first
            self.exit(2, f"{self.prog}: {sentence}; --help lists every flag\n")

    p = Parser(prog="ddpm_2d.py", description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction
    g = p.add_argument_group("data")
    g.add_argument("--data", metavar="|".join([*TARGETS, "PICTURE"]), default="swiss_roll", help="what to learn")
    g.add_argument("--noise", type=float, default=0.05, help="std of the noise on the points, whose own std is 2")
    g = p.add_argument_group("model")
    g.add_argument("--width", type=int, default=128, help="channels of a hidden layer; of a UNet, at full size")
    g.add_argument("--depth", type=int, default=3, help="hidden layers")
    g.add_argument("--features", type=int, default=64, help="random Fourier features of x; 0 = none")
    g = p.add_argument_group("diffusion")
    g.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="how alpha_bar falls from 1 to 0")
    g.add_argument("--pred", choices=PREDICTIONS, default="v", help="what the network predicts")
    g = p.add_argument_group("training")
    g.add_argument("--steps", type=int, default=10_000, help="optimizer steps")
    g.add_argument("--batch_size", type=int, default=512, help="training examples per step, on all devices together")
    g.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    g.add_argument("--ema_decay", type=float, default=0.9995,
                   help="decay of the averaged weights, the ones that are sampled from")
    g.add_argument("--resume", metavar="FILE", help="continue the training run of this ckpt.pt")
    g = p.add_argument_group("sampling")
    g.add_argument("--sample", type=int, metavar="N", help="train nothing, draw N samples")
    g.add_argument("--ckpt", metavar="FILE", help="the model.safetensors to sample from")
    g.add_argument("--oracle", action=flag, default=False, help="train nothing, sample with the truth in closed form")
    g.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="how noise becomes data")
    g.add_argument("--sample_steps", type=int, default=250, help="steps from noise to data")
    g.add_argument("--eta", type=float, default=0.0, help="noise that ddim adds back: 0 = none, 1 = as much as ddpm")
    g = p.add_argument_group("output and system")
    g.add_argument("--out", default="out/ddpm_2d", help="folder for everything that a run writes")
    g.add_argument("--seed", type=int, default=0, help="seed of all randomness")
    g.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:1, mps")
    args = p.parse_args(argv)
    args.given = {a.dest for a in p._actions for o in a.option_strings for w in argv if w == o or w.startswith(o + "=")}
    check(args, p.error)
    return args


def check(args, error):
    """Calls error(sentence) for settings that cannot be, given by hand or found in a checkpoint."""
    for name in "width depth steps batch_size sample_steps sample".split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            error(f"--{name} has to be at least 1")
    for name in "lr ema_decay eta noise features seed".split():
        top = 1 if name in ("ema_decay", "eta") else 2 ** 63
        if not 0 <= getattr(args, name) <= top:
            error(f"--{name} has to lie between 0 and {'1' if top == 1 else '2^63'}")
    if args.sample_steps > T:
        error(f"--sample_steps can be at most T = {T}")
    if Path(args.out).is_file():
        error(f"--out {args.out} is a file; it has to be a folder, or nothing yet")
    if args.oracle and (args.sample or args.resume):
        error("--oracle needs no model: leave out --sample and --resume")
    if bool(args.sample) != bool(args.ckpt) or args.sample and args.resume:
        error("--sample N and --ckpt FILE go together; to go on training use --resume")
    for name in "steps batch_size lr ema_decay".split():
        if (args.sample or args.oracle) and name in args.given:
            error(f"--{name} is for training" + ("; for drawing say --sample_steps" if name == "steps" else ""))
    for name, choices in (("schedule", SCHEDULES), ("pred", PREDICTIONS), ("sampler", SAMPLERS)):
        if getattr(args, name) not in choices:
            error(f"--{name} is one of {', '.join(choices)}")


def check_eta(args):
    """Raises Stop for an --eta without a use. Not in check: the eta of a checkpoint may meet another sampler."""
    if "eta" in args.given and args.sampler != "ddim":
        raise Stop("--eta is for --sampler ddim; ddpm is ddim with eta 1")


# -----------------------------------------------------------------------------
# The method. x0 is a clean point, eps Gaussian noise, t = 0..T-1 the noise level, alpha_bar[t] how much of x0 is left
# at t: xt = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps. A model is any (xt, t) -> out, shaped like xt.
# To train: take a point, any t and fresh noise, mix xt, and let the model guess what was mixed. To sample: begin with
# pure noise at T-1, let it guess x0, go a step towards that, to a slightly cleaner xt, and repeat.

T = 1000
LANGEVIN = 5  # steps of Langevin dynamics at each noise level


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
    """The clean point that the network's output stands for, add_noise solved for x0. The output is the noise (eps,
    DDPM), the point (x0), a mix of both that has something to tell at every t (v), or the gradient of log p(xt)
    (score). eps and score say next to nothing of x0 where all is noise: the cosine schedule, which ends there, needs
    one of the others."""
    if pred == "eps":
        return (xt - (1 - ab) ** 0.5 * out) / ab ** 0.5
    if pred == "v":      # from out = sqrt(ab) eps - sqrt(1 - ab) x0
        return ab ** 0.5 * xt - (1 - ab) ** 0.5 * out
    if pred == "score":  # Tweedie's formula: the score of p(xt) is -E[eps | xt] / sqrt(1 - ab)
        return (xt + (1 - ab) * out) / ab ** 0.5
    return out


def loss_fn(model, x0, eps, t, alpha_bar, pred):
    """Squared error of the prediction, DDPM eq. 14: x0, eps (B, 2), t (B,) -> (B,)."""
    ab = alpha_bar[t].to(x0.dtype)[:, None]
    out = model(add_noise(x0, eps, ab), t)
    if pred == "score":  # the target -eps / sqrt(1 - ab) explodes as t -> 0: weight with the variance, NCSN eq. 5, 6
        return (((1 - ab) ** 0.5 * out + eps) ** 2).mean(1)
    v_pred_target = ode_slope(x0, eps, ab)  # 2202.00512 appendix D
    return (out - {"eps": eps, "v": v_pred_target, "x0": x0}[pred]).square().mean(1)


def guess(model, xt, t, alpha_bar, pred):
    """One network call at level t (a number) -> the x0 and the eps that it sees in xt, (B, 2) each."""
    ab = alpha_bar[t].item()
    out = model(xt, torch.full((len(xt),), t, device=xt.device))
    x0 = to_x0(out, xt, ab, pred)
    return x0, (xt - ab ** 0.5 * x0) / (1 - ab) ** 0.5


def ode_slope(x0, eps, ab):
    """The probability-flow ODE (2011.13456 section 4.3) in the angle phi of x = cos(phi) x0 + sin(phi) eps, where
    cos(phi) = sqrt(ab): dx / dphi = cos(phi) eps - sin(phi) x0, the v of v-prediction. Everything in it is bounded."""
    return ab ** 0.5 * eps - (1 - ab) ** 0.5 * x0


@torch.no_grad()
def sample(model, noise, alpha_bar, pred, sampler, steps, eta=0.0, on_step=None):
    """From noise to points (B, 2), over `steps` levels evenly spaced in t from T-1 to 0.

    noise: iterator over (B, 2); its first item is x_T, the others are for the samplers that add noise.
    on_step(t, xt, x0) is called at each level. One network call per level; heun takes two, langevin LANGEVIN more, and
    carries the points to the next level as they are."""
    xt, x0_old, lam_old = next(noise), None, None
    levels = np.linspace(T - 1, 0, steps).round().astype(int).tolist()
    for t, s in zip(levels, levels[1:] + [-1]):          # from level t to the cleaner level s; -1 is clean
        ab_t, ab_s = alpha_bar[t].item(), alpha_bar[s].item() if s >= 0 else 1.0
        if sampler == "langevin":                        # walk uphill and jitter, at this level: NCSN algorithm 1
            for _ in range(LANGEVIN):
                x0, eps = guess(model, xt, t, alpha_bar, pred)
                step = 0.1 * (1 - ab_t)                  # in shares of the variance; score = -eps / sqrt(1 - ab)
                xt = xt - step / (1 - ab_t) ** 0.5 * eps + (2 * step) ** 0.5 * next(noise)
        x0, eps = guess(model, xt, t, alpha_bar, pred)
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
            xt = ab_s ** 0.5 * x0 + (1 - ab_s - eta ** 2 * var) ** 0.5 * eps
            if eta > 0:
                xt = xt + eta * var ** 0.5 * next(noise)
        elif sampler == "heun":                          # the mean slope of both ends, EDM algorithm 1
            # differs from the paper: in the angle, not in sigma, which reaches 20,000 under the cosine schedule
            h, slope = angle(ab_s) - angle(ab_t), ode_slope(x0, eps, ab_t)
            there = guess(model, xt + h * slope, s, alpha_bar, pred)
            xt = xt + h * (slope + ode_slope(*there, ab_s)) / 2
        elif sampler == "dpmpp_2m":                      # a line through two x0; 2211.01095 algorithm 2
            lam = 0.5 * math.log(ab_t / (1 - ab_t))      # log of signal over noise
            h = 0.5 * math.log(ab_s / (1 - ab_s)) - lam
            ahead = 0 if x0_old is None else 0.5 * h / (lam - lam_old) * (x0 - x0_old)
            xt = ((1 - ab_s) / (1 - ab_t)) ** 0.5 * xt - ab_s ** 0.5 * math.expm1(-h) * (x0 + ahead)
            x0_old, lam_old = x0, lam


def angle(ab):
    """phi in [0, pi / 2] of a noise level: 0 is clean, pi / 2 pure noise."""
    return math.acos(ab ** 0.5)


def divergence(f, x):
    """f(x) for points x (B, 2), and at each the trace of f's Jacobian, exactly, (B,)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = f(x)
        rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0][:, i] for i in (0, 1)]
    return y.detach(), rows[0] + rows[1]


def log_likelihood(model, x, alpha_bar, pred, steps=100):
    """log p(x) in nats, (B,), of points x (B, 2) under the probability-flow ODE, solved from t = 0 to T-1 with Heun.

    Along a path log p falls by the divergence of the slope (2011.13456 eq. 39), here the exact trace of its 2x2
    Jacobian; at the end p is the standard normal. Points count as noised to t = 0, which is next to nothing."""
    def slope(x, t):
        return divergence(lambda x: ode_slope(*guess(model, x, t, alpha_bar, pred), alpha_bar[t].item()), x)
    levels, stretch = np.linspace(0, T - 1, steps).round().astype(int).tolist(), 0
    for t, s in zip(levels, levels[1:]):
        h = angle(alpha_bar[s].item()) - angle(alpha_bar[t].item())
        v_t, div_t = slope(x, t)
        v_s, div_s = slope(x + h * v_t, s)
        x, stretch = x + h * (v_t + v_s) / 2, stretch + h * (div_t + div_s) / 2
    return stretch - x.square().sum(1) / 2 - math.log(2 * math.pi)


# -----------------------------------------------------------------------------
# The model: a multilayer perceptron on x, its Fourier features, and t.


class MLP(nn.Module):
    """(xt, t) -> out: xt (B, 2), t (B,) in 0..T-1.

    Random Fourier features of x (2006.10739) let it bend quickly: without them, an MLP sees a swiss roll as a blot."""

    def __init__(self, width, depth, features):
        super().__init__()
        self.register_buffer("freq_x", torch.randn(2, features))         # radians per unit of length, in any direction
        self.register_buffer("freq_t", torch.exp(-math.log(10_000) * torch.arange(32) / 32))
        sizes = [2 + 2 * features + 64] + [width] * depth
        self.hidden = nn.ModuleList([nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])])
        self.out = nn.Linear(width, 2)

    def forward(self, xt, t):                                                    # (B, 2), (B,)
        angles = torch.cat([xt @ self.freq_x, t[:, None] * self.freq_t], 1)      # (B, features + 32)
        h = torch.cat([xt, angles.cos(), angles.sin()], 1)                       # (B, 2 + 2 features + 64)
        for layer in self.hidden:
            h = F.silu(layer(h))                                                 # (B, width)
        return self.out(h)                                                       # (B, 2)


# -----------------------------------------------------------------------------
# Data: a target is a shape, scaled to a standard deviation of 2, with Gaussian noise added. That makes it a mixture of
# Gaussians, one around each of its points (thousands stand for all): density and score are known at any noise level.


def shape(data, u):
    """Points of a target's outline, (n, 2), from u (n, 2) uniform in [0, 1). Raises Stop for what is no target."""
    a, b = u.T
    if data == "swiss_roll":      # scikit-learn's make_swiss_roll(hole=True) seen from the side: 3 + 2 + 3 equal parts
        r = np.pi * (1.5 + np.interp(a, [0, 3 / 8, 5 / 8, 1], [0, 1, 2, 3]))
        return np.stack([r * np.cos(r), r * np.sin(r)], 1)
    if data == "moons":
        r, second = 2 * np.pi * (a % 0.5), a >= 0.5
        return np.stack([np.where(second, 1 - np.cos(r), np.cos(r)), np.where(second, .5 - np.sin(r), np.sin(r))], 1)
    if data == "8gaussians":
        r = np.pi / 4 * np.floor(8 * a)
        return np.stack([np.cos(r), np.sin(r)], 1)
    if data == "circles":
        r, radius = 2 * np.pi * a, np.where(b < 0.5, 0.5, 1)
        return np.stack([radius * np.cos(r), radius * np.sin(r)], 1)
    if data == "checkerboard":    # of 4 x 4 fields, the 8 dark ones
        column, row = np.floor(4 * a), 4 * (b % 0.5)
        return np.stack([4 * a, np.floor(row) * 2 + row % 1 + column % 2], 1)
    if data == "pinwheel":        # five arms of normally distributed length and breadth, twisted outwards
        length, breadth = 1 + 0.3 * ndtri(5 * a % 1), 0.05 * ndtri(b)
        r = 2 * np.pi / 5 * np.floor(5 * a) + 0.25 * np.exp(length)
        return np.stack([length * np.cos(r) - breadth * np.sin(r), length * np.sin(r) + breadth * np.cos(r)], 1)
    try:
        with Image.open(data) as im:
            paper = Image.new("RGBA", im.size, "white")
            ink = 127.5 - np.asarray(Image.alpha_composite(paper, im.convert("RGBA")).convert("L"), float)
    except OSError as e:
        raise Stop(f"{data} is none of {', '.join(TARGETS)}, nor a picture: {e.strerror or 'cannot read it'}")
    y, x = np.nonzero(ink > 0)
    if not len(x):
        raise Stop(f"{data} has no dark pixel")
    total = np.cumsum(ink[y, x])
    i = np.searchsorted(total, a * total[-1], side="right")
    return np.stack([x[i] + b, -y[i] - a * total[-1] % 1], 1)


class Target:
    """points(rng, n) of a distribution in the plane, and its true score and density at every noise level."""

    def __init__(self, data, noise, device, n=None):
        self.data, self.noise, golden = data, noise, 1.3247179572447460
        lines = ("swiss_roll", "moons", "8gaussians", "circles")
        n = n or (4096 if data in lines else 16_384)  # an area needs more of them
        u = (np.arange(n)[:, None] / np.array([golden, golden ** 2]) + 0.5) % 1  # an even net: Roberts' R2 sequence
        net = shape(data, u)
        self.middle = net.mean(0)
        self.scale = 2 / (net - self.middle).std()
        self.centres = torch.from_numpy((net - self.middle) * self.scale).to(device)          # (n, 2)

    def points(self, rng, n):
        """n fresh points, float32 (n, 2)."""
        u = rng.random((n, 4))  # four for each, so that the first points do not depend on n
        clean = (shape(self.data, u[:, :2]) - self.middle) * self.scale
        return (clean + self.noise * ndtri(u[:, 2:])).astype(np.float32)

    def mixture(self, x, ab):
        """Of the mixture noised to ab, a number: log density (B,) at x (B, 2), and its score (B, 2), in float64."""
        means, var, results = ab ** 0.5 * self.centres, ab * self.noise ** 2 + 1 - ab, []
        for part in x.double().split(128):  # as much as a CPU's cache holds: four times as fast
            log_p = -torch.cdist(part, means).square() / (2 * var) - math.log(2 * math.pi * var * len(means))
            results.append((log_p.logsumexp(1), (log_p.softmax(1) @ means - part) / var))
        return tuple(map(torch.cat, zip(*results)))


# -----------------------------------------------------------------------------
# Measures: how far apart are two sets of points, (n, 2) each? Each is 0 for
# equal sets; two fresh samples of one distribution get a little more, the floor.


def chamfer(a, b):
    """Squared distances to the nearest point of the other set, summed, both ways (KAIST CS492(D), assignment 1)."""
    return float((cKDTree(b).query(a)[0] ** 2).sum() + (cKDTree(a).query(b)[0] ** 2).sum())


def wasserstein(a, b):
    """The 2-Wasserstein distance, exactly: root of the mean squared distance under the best one-to-one assignment."""
    cost = cdist(a, b, "sqeuclidean")
    return float(cost[linear_sum_assignment(cost)].mean() ** 0.5)


def energy(a, b):
    """Energy distance 2 E|x - y| - E|x - x'| - E|y - y'| over all pairs (Szekely and Rizzo 2013, eq. 6.1)."""
    return float(2 * cdist(a, b).mean() - cdist(a, a).mean() - cdist(b, b).mean())


def measures(x, test):
    """The three of them, x and test float32 (n, 2) NumPy arrays."""
    return dict(chamfer=chamfer(x, test), wasserstein=wasserstein(x, test), energy=energy(x, test))


# -----------------------------------------------------------------------------
# Pictures: the square from -5 to 5 in both directions, drawn at twice the size and averaged down.

SIDE = 320


def wheel(x):
    """A colour for each of the points x (n, 2), by its direction from the middle -> uint8 (n, 3)."""
    wave = np.cos(np.arctan2(x[:, 1], x[:, 0])[:, None] - 2 * np.pi * np.array([0, 1, 2]) / 3)
    return (120 + 100 * wave).astype(np.uint8)


def panel(x=(), colours=(), title="", tails=(), arrows=(), under=None):
    """One square picture -> uint8 (SIDE, SIDE, 3).

    x (n, 2): dots. tails (k, n, 2): where they came from. arrows [(from (m, 2), to (m, 2), colour)]. under: a picture
    to draw upon."""
    image = Image.fromarray(under).resize((2 * SIDE, 2 * SIDE)) if under is not None else \
        Image.new("RGB", (2 * SIDE, 2 * SIDE), "white")
    draw, place = ImageDraw.Draw(image), lambda x: (np.asarray(x) * [1, -1] / 10 + 0.5) * 2 * SIDE
    if len(tails):
        for line in place(np.stack(tails)).transpose(1, 0, 2):
            draw.line([tuple(p) for p in line], (165, 165, 180), 1)
    for a, b, colour in arrows:
        for start, tip in zip(place(a), place(b)):
            along = 8 * (tip - start) / max(np.hypot(*(tip - start)), 1e-6)
            across = along[::-1] * [0.5, -0.5]
            draw.line([*start, *tip], colour, 2)
            draw.polygon([tuple(tip), tuple(tip - along + across), tuple(tip - along - across)], colour)
    for (i, j), colour in zip(place(x) if len(x) else [], colours):
        draw.ellipse([i - 3, j - 3, i + 3, j + 3], tuple(colour))
    image = image.reduce(2)
    ImageDraw.Draw(image).text((8, 6), title, "black")
    return np.asarray(image)


def heat(p):
    """A density on a square grid, rows from the top -> uint8 (h, w, 3): white, yellow, red, black."""
    share = np.clip(p / max(np.quantile(p, 0.995), 1e-9), 0, 1)
    ramp = np.array([[255, 255, 255], [254, 217, 118], [240, 59, 32], [60, 0, 40]])
    return np.stack([np.interp(share, [0, .25, .65, 1], c) for c in ramp.T], 2).astype(np.uint8)


def grid(n):
    """n x n points of the square, row by row from the top, float32 (n * n, 2)."""
    at = (np.arange(n) + 0.5) / n * 10 - 5
    return np.stack([np.tile(at, n), np.repeat(-at, n)], 1).astype(np.float32)


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


def float64_device(name):
    """pick_device, but none without float64, which the closed forms need."""
    device = pick_device(name)
    if device.type == "mps":
        raise Stop("the closed forms need float64, which MPS lacks: use --device cpu")
    return device


INIT, BATCH, NOISE, DROPOUT, IMAGE = range(1, 6)  # the first number of every seed: one stream for each purpose


def mix(*numbers):
    """Whole numbers, always as many for a purpose -> one seed; a change of any of them gives an unrelated one."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


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


# -----------------------------------------------------------------------------
# Training, and what is measured and shown of a model.

ARCHITECTURE = "width depth features pred schedule data".split()
FREE_ON_RESUME = "steps lr out device sampler sample_steps eta".split()
POOL, N = 2 ** 16, 2048  # points to train on; points in measures and pictures


def noise(seed, n, device):
    """Endless standard normal noise (n, 2): point i of draw k follows from (seed, k, i), however many are asked for."""
    for k in itertools.count():
        x = np.random.default_rng((IMAGE, seed, k)).standard_normal((n, 2), np.float32)
        yield torch.from_numpy(x).to(device)


def draw(model, pred, n, args, alpha_bar, seed=None, **other):
    """n samples (n, 2), a function of (seed, index) alone; `other` overrides sampler, steps or eta."""
    how = dict(sampler=args.sampler, steps=args.sample_steps, eta=args.eta) | other
    return sample(model, noise(args.seed if seed is None else seed, n, alpha_bar.device), alpha_bar, pred, **how)


def score_error(model, pred, target, alpha_bar):
    """By noise level, the error of the score E|s - true|^2 relative to E|true|^2, over xt -> {t: error}."""
    rng, errors = np.random.default_rng((NOISE, 0)), {}
    for t in (0, 10, 50, 100, 200, 400, 600, 800, 999):
        ab = alpha_bar[t].item()
        x0, eps = (torch.from_numpy(a).to(alpha_bar.device) for a in
                   (target.points(rng, N), rng.standard_normal((N, 2), np.float32)))
        xt = add_noise(x0, eps, ab)
        with torch.no_grad():
            learnt = -guess(model, xt, t, alpha_bar, pred)[1] / (1 - ab) ** 0.5
        true = target.mixture(xt, ab)[1]
        errors[t] = ((learnt - true).square().sum() / true.square().sum()).item()
    return errors


def report(model, pred, target, args, alpha_bar):
    """Prints the measures of a finished model, each beside its floor -> them, for the log."""
    device, rng = alpha_bar.device, np.random.default_rng((BATCH, args.seed, 1))
    test = target.points(rng, N)
    x = draw(model, pred, N, args, alpha_bar)
    result, floor = measures(x.cpu().numpy(), test), {}
    fresh = [measures(target.points(rng, N), test) for _ in range(5)]
    for k in result:
        values = [m[k] for m in fresh]
        floor[k] = [np.mean(values), np.std(values)]
    if not args.oracle:  # it would take minutes to find what the floor is anyway
        at = torch.from_numpy(test).to(device)
        result["nll"] = -log_likelihood(model, at, alpha_bar, pred).mean().item()
        floor["nll"] = [-target.mixture(at, alpha_bar[0].item())[0].mean().item(), 0.0]
    print(f"{'':12}{'samples':>12}{'floor':>12}   ({N} points; the floor: 5 times {N} true ones)")
    for k in result:
        deviation = "the truth's" if k == "nll" else f"+- {floor[k][1]:.4f}"
        print(f"{k:12}{result[k]:12.4f}{floor[k][0]:12.4f} {deviation}")
    errors = score_error(model, pred, target, alpha_bar)
    print("squared error of the score, relative, by t: " + "  ".join(f"{t}: {e:.1e}" for t, e in errors.items()))
    return dict(measures=result, floor=floor, score_error=errors)


def show(out, model, pred, target, args, alpha_bar, snapshots):
    """forward.png, reverse.gif, field.gif, density.png, training.gif; snapshots: [(step, samples (N, 2))]."""
    rng, device = np.random.default_rng((BATCH, args.seed, 2)), alpha_bar.device
    x0, eps = target.points(rng, N), rng.standard_normal((N, 2)).astype(np.float32)
    levels = [0, 100, 250, 400, 600, 999]
    save_png(out / "forward.png", np.concatenate(
        [panel(add_noise(x0, eps, alpha_bar[t].item()), wheel(x0), f"t = {t}") for t in levels], 1))

    track = []
    def note(t, xt, x0):
        track.append((t, xt.cpu().numpy(), x0.cpu().numpy()))
    note(-1, x := draw(model, pred, N, args, alpha_bar, on_step=note), x)
    colours, frames = wheel(track[-1][1]), []
    for i in np.linspace(0, len(track) - 1, min(len(track), 40)).round().astype(int):
        t, xt, guessed = track[i]
        tails = [p[1][::16] for p in track[max(0, i - 30):i + 1]]
        pair = (panel(xt, colours, "clean" if t < 0 else f"t = {t}: points", tails),
                panel(guessed, colours, "where they are headed"))
        frames.append(np.concatenate(pair, 1))
    save_gif(out / "reverse.gif", frames, 100)

    at, frames = torch.from_numpy(grid(20)).to(device), []
    for t in np.linspace(T - 1, 20, 30).round().astype(int).tolist():
        ab, xt = alpha_bar[t].item(), add_noise(x0, eps, alpha_bar[t].item())
        with torch.no_grad():
            learnt = -guess(model, at, t, alpha_bar, pred)[1]
        true = target.mixture(at, ab)[1] * (1 - ab) ** 0.5    # both times the std of the noise: comparable lengths
        gray, pair = np.full((N, 3), 190, np.uint8), []
        for title, score in (("true score", true), ("learnt score", learnt))[:1 if args.oracle else 2]:
            tip = at + 0.45 * score / (1 + score.norm(dim=1, keepdim=True))
            pair.append(panel(xt, gray, f"{title}, t = {t}", arrows=[(at.cpu(), tip.cpu(), (30, 80, 190))]))
        frames.append(np.concatenate(pair, 1))
    save_gif(out / "field.gif", frames, 100)

    at = torch.from_numpy(grid(96)).to(device)
    p = [("true density", target.mixture(at, alpha_bar[0].item())[0])]
    if not args.oracle:
        p.append(("learnt density", log_likelihood(model, at, alpha_bar, pred, 50)))
    save_png(out / "density.png", np.concatenate(
        [panel(under=heat(log_p.exp().cpu().numpy().reshape(96, 96)), title=title) for title, log_p in p], 1))
    if snapshots and (snapshots[0][0] == 0 or not (out / "training.gif").exists()):  # of the whole run, if there is one
        colours = wheel(snapshots[-1][1])
        save_gif(out / "training.gif", [panel(x, colours, f"step {step}") for step, x in snapshots], 250)


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


def train(args):
    """The whole run. All randomness follows from (seed, step): n steps, resumed for n more, equal 2n steps."""
    began, state = time.time(), None
    if args.resume:
        state = load_checkpoint(args.resume, "ddpm_2d.py")
        keep = {"given", "resume"} | args.given & set(FREE_ON_RESUME)
        adopt(args, state["args"], vars(args).keys() - keep, args.resume)
        if "out" not in args.given:
            args.out = str(Path(args.resume).parent)  # where it lies now: the folder may have been renamed
    check_eta(args)
    device, out = float64_device(args.device), Path(args.out)
    target, alpha_bar = Target(args.data, args.noise, device), make_alpha_bar(args.schedule).to(device)
    out.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k != "given"}
    print(f"{args.data}; {device}; writes to {out}\nsettings: " + " ".join(f"{k}={v}" for k, v in settings.items()))
    if args.oracle:
        def oracle(xt, t):
            return target.mixture(xt, alpha_bar[t[0]].item())[1].to(xt.dtype)
        report(oracle, "score", target, args, alpha_bar)
        show(out, oracle, "score", target, args, alpha_bar, [])
        return

    pool = torch.from_numpy(target.points(np.random.default_rng((BATCH, args.seed)), POOL)).to(device)
    torch.manual_seed(mix(INIT, args.seed))
    model = MLP(args.width, args.depth, args.features).to(device)
    ema, start = copy.deepcopy(model).requires_grad_(False), 0
    opt = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.99), weight_decay=0, fused=device.type != "mps")
    if state:
        load_weights(model, state["model"], args.resume)
        load_weights(ema, state["ema"], args.resume)
        try:
            opt.load_state_dict(state["opt"])
            start = int(state["step"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
            raise Stop(f"--resume {args.resume} has been edited: {e!r}")
        if not 0 <= start <= args.steps:
            raise Stop(f"{args.resume} has done {start} steps already; say how far to go on with --steps")

    def save(step):
        ckpt = dict(script="ddpm_2d.py", args=settings, step=step, key=args.data, model=model.state_dict(),
                    ema=ema.state_dict(), opt=opt.state_dict())
        write_atomically(out / "ckpt.pt", functools.partial(torch.save, ckpt))
        save_safetensors(out / "model.safetensors", ema.state_dict(), dict(
            format="pt", script="ddpm_2d.py", kind="mlp", args=json.dumps(settings),
            data=json.dumps(dict(name=args.data, step=step))))

    own_folder = state is not None and Path(args.resume).resolve().parent == out.resolve()
    earlier = begin_log(out, start, resumed=own_folder)
    began -= max((r["seconds"] for r in earlier if "seconds" in r), default=0)  # a resumed run counts on
    log = open(out / "log.jsonl", "a", buffering=1)
    noted, loss_sum, seen, clock, snapshots = note_signals(), torch.zeros((), device=device), 0, time.time(), []
    log_every = max(1, args.steps // 20)
    shots = {round(args.steps * (i / 24) ** 2) for i in range(25)}  # for training.gif, most of them early
    bar = tqdm(total=args.steps, initial=start, disable=None, unit="step")
    for step in range(start, args.steps + 1):  # one turn more than there are steps, to look at the last
        last = step == args.steps
        if step in shots:
            x = draw(ema, args.pred, N, args, alpha_bar, sampler="ddim", steps=30, eta=0.0)
            snapshots.append((step, x.cpu().numpy()))
        if seen and (step % log_every == 0 or last or noted):
            loss, rate = loss_sum.item() / seen, seen * args.batch_size / (time.time() - clock)
            if not loss < 100:  # also true of NaN; a network that has learnt nothing yet has a loss of a few units
                raise Stop(f"the loss is {loss:.3g} at step {step}: training diverged at --lr {args.lr}; lower it", 1)
            record = dict(data=args.data, step=step, loss=loss, lr=opt.param_groups[0]["lr"], pts_per_s=rate,
                          seconds=time.time() - began)
            log.write(json.dumps(record) + "\n")
            if bar.disable and (step % (4 * log_every) == 0 or last):
                print("  ".join(f"{k} {record[k]:.{d}f}" for k, d in dict(
                    step=0, loss=4, pts_per_s=0, seconds=0).items()), flush=True)
            bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} points/s")
            loss_sum.zero_()
            seen, clock = 0, time.time()
        if noted:
            save(step)
            raise Stop(f"stopped at step {step}; go on: python ddpm_2d.py --resume {out / 'ckpt.pt'}", noted[0])
        if last or step % 10_000 == 0 and step > start:
            save(step)
        if last:
            break

        # one step: data, noise and t from (seed, step); the loss, its gradient, AdamW, the moving average
        for group in opt.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 50)  # warm-up, while Adam's averages settle
        g = torch.Generator(device).manual_seed(mix(BATCH, args.seed, step))
        x0 = pool[torch.randint(POOL, (args.batch_size,), generator=g, device=device)]
        t = torch.randint(T, (args.batch_size,), generator=g, device=device)
        eps = torch.randn(x0.shape, generator=g, device=device)
        loss = loss_fn(model, x0, eps, t, alpha_bar, args.pred).mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        update_ema(ema, model, min(args.ema_decay, (1 + step) / (10 + step)))  # warm-up: forget the random start
        loss_sum += loss.detach()
        seen += 1
        bar.update()
    bar.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_at_once)  # all is saved
    print("measuring, then drawing")
    log.write(json.dumps(dict(step=args.steps, **report(ema, args.pred, target, args, alpha_bar))) + "\n")
    show(out, ema, args.pred, target, args, alpha_bar, snapshots)
    print(f"done in {time.time() - began:.0f} s; see {out}/reverse.gif")


def sample_only(args):
    """--sample N --ckpt FILE: points from a finished model, as points.npy and points.png."""
    device, out = float64_device(args.device), Path(args.out if "out" in args.given else Path(args.ckpt).parent)
    tensors, saved, _ = read_model(args.ckpt, "ddpm_2d.py")
    adopt(args, saved, ARCHITECTURE + sorted({"sampler", "sample_steps", "eta"} - args.given), args.ckpt)
    check_eta(args)
    model = MLP(args.width, args.depth, args.features).to(device).requires_grad_(False)
    load_weights(model, tensors, args.ckpt)
    x = draw(model, args.pred, args.sample, args, make_alpha_bar(args.schedule).to(device)).cpu().numpy()
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "points.npy", lambda f: np.save(f, x))
    save_png(out / "points.png", panel(x, wheel(x)))
    print(f"{len(x)} points in {out / 'points.npy'}, drawn in {out / 'points.png'}")


# -----------------------------------------------------------------------------
# Start: what was asked for, and one sentence with an exit status when it cannot be had.


def main(argv=None):
    """-> the exit status: 0, 1 for a failure at run time, 2 for wrong input, 130 or 143 after Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, stop_at_once)
    try:
        if "RANK" in os.environ:
            raise Stop("points in the plane need one process: start it with python, not with torchrun")
        args = parse_args(argv)
        if args.sample:
            sample_only(args)
        else:
            train(args)
        return 0
    except Stop as e:
        sentence, code = str(e), e.code
    except KeyboardInterrupt as e:
        sentence, code = "stopped at once; finished files are whole", 128 + (e.args or (2,))[0]
    except OSError as e:
        sentence, code = f"{e.filename or 'input or output'}: {e.strerror or e}", 1
    except (MemoryError, RuntimeError) as e:  # CUDA, the CPU and NumPy each have their own
        if not isinstance(e, MemoryError) and "out of memory" not in str(e) and "allocate memory" not in str(e):
            raise
        sentence, code = "out of memory: lower --batch_size, --width or --sample", 1
    print(f"ddpm_2d.py: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
