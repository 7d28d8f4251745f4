"""Flow matching in the plane: learn the velocity that carries a cloud of noise, or any other, to a cloud of data.

    python cfm_2d.py                                        # noise to a swiss roll, with every picture and measure
    python cfm_2d.py --source 8gaussians --data moons --coupling ot
    python cfm_2d.py --sample 2048 --ckpt out/cfm_2d/model.safetensors --sampler euler --sample_steps 4
    python cfm_2d.py --reflow out/cfm_2d/model.safetensors --out out/reflow         # straighten the paths of a model
    python cfm_2d.py --meanflow --sample_steps 1 --out out/meanflow                 # from noise to data in one step
    python cfm_2d.py --from_ddpm out/ddpm_2d/model.safetensors --out out/bridge     # a DDPM is a flow, too
    python cfm_2d.py --resume out/cfm_2d/ckpt.pt --steps 40000

Expected, first line: 34 s on two cores of a shared AMD EPYC (torch 2.13.0), 17 of them training; of 2,048 samples the
Chamfer distance 5.29 (of true points: 4.02), 2-Wasserstein 0.20 (0.24), energy 0.0042 (0.0035), nll 1.68 (1.66).
Writes out/cfm_2d/: forward.png, reverse.gif, field.gif, density.png, training.gif, log.jsonl, ckpt.pt,
model.safetensors; with --sample points.npy and points.png; with --from_ddpm bridge.png.

Here t = 0 is data and t = 1 noise, as in SD3 and FLUX; torchcfm and flow_matching write 1 - t for it and -v for v.
Papers: flow matching 2210.02747, rectified flow and reflow 2209.03003, minibatch OT and Schrodinger bridges 2302.00482,
MeanFlow 2505.13447, the bridge from DDIM 2403.03206 (SD3) section 2 and 2010.02502 eq. 14, Runge-Kutta: Hairer,
Norsett, Wanner, Solving Ordinary Differential Equations I, chapter II.
"""
import argparse
import copy
import functools
import json
import math
import mmap
import os
import signal
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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
COUPLINGS = ["independent", "ot", "sinkhorn"]
SAMPLERS = ["euler", "midpoint", "heun", "rk4", "dopri5"]


def parse_args(argv=None):
    """The settings, flags given by hand or defaults. Wrong ones end the script with a sentence and status 2."""
    argv = sys.argv[1:] if argv is None else argv

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    class Parser(argparse.ArgumentParser):
        def error(self, sentence):  # argparse would print the whole usage first
            self.exit(2, f"{self.prog}: {sentence}; --help lists every flag\n")

    p = Parser(prog="cfm_2d.py", description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction
    g = p.add_argument_group("data")
    g.add_argument("--data", metavar="|".join([*TARGETS, "PICTURE"]), default="swiss_roll", help="what to learn")
    g.add_argument("--source", metavar="gaussian|...", default="gaussian", help="where to start: noise, or as --data")
    g.add_argument("--noise", type=float, default=0.05, help="std of the noise on the points, whose own std is 2")
    g = p.add_argument_group("model")
    g.add_argument("--width", type=int, default=128, help="channels of a hidden layer; of a UNet, at full size")
    g.add_argument("--depth", type=int, default=3, help="hidden layers")
    g.add_argument("--features", type=int, default=64, help="random Fourier features of x; 0 = none")
    g = p.add_argument_group("flow")
    g.add_argument("--coupling", choices=COUPLINGS, default="independent", help="how noise is paired with data")
    g.add_argument("--coupling_size", type=int, default=512, help="points that ot and sinkhorn match at a time")
    g.add_argument("--sigma", type=float, default=0.5, help="std of sinkhorn's Brownian bridges")
    g.add_argument("--reflow", metavar="FILE", help="straighten this model.safetensors: learn the pairs it makes")
    g.add_argument("--meanflow", action=flag, default=False, help="learn mean velocities, to sample in 1 to 4 steps")
    g.add_argument("--from_ddpm", metavar="FILE", help="train nothing: run this model.safetensors of a DDPM as a flow")
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
    g.add_argument("--sampler", choices=SAMPLERS, default="midpoint", help="how noise becomes data")
    g.add_argument("--sample_steps", type=int, default=25, help="steps from noise to data")
    g.add_argument("--tol", type=float, default=1e-4, help="error that dopri5 allows in a step; it chooses the steps")
    g = p.add_argument_group("output and system")
    g.add_argument("--out", default="out/cfm_2d", help="folder for everything that a run writes")
    g.add_argument("--seed", type=int, default=0, help="seed of all randomness")
    g.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:1, mps")
    args = p.parse_args(argv)
    args.given = {a.dest for a in p._actions for o in a.option_strings for w in argv if w == o or w.startswith(o + "=")}
    check(args, p.error)
    return args


def check(args, error):
    """Calls error(sentence) for settings that cannot be, given by hand or found in a checkpoint."""
    for name in "width depth steps batch_size sample_steps sample coupling_size".split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            error(f"--{name} has to be at least 1")
    for name in "lr ema_decay noise sigma features seed".split():
        top = 1 if name == "ema_decay" else 2 ** 63
        if not 0 <= getattr(args, name) <= top:
            error(f"--{name} has to lie between 0 and {'1' if top == 1 else '2^63'}")
    if not 1e-12 <= args.tol <= 1:
        error("--tol has to lie between 1e-12 and 1")
    if POOL % args.coupling_size:
        error(f"--coupling_size has to divide {POOL}: a power of 2")
    if Path(args.out).is_file():
        error(f"--out {args.out} is a file; it has to be a folder, or nothing yet")
    if sum(map(bool, (args.sample, args.oracle, args.from_ddpm))) > 1:
        error("--sample, --oracle and --from_ddpm exclude one another")
    if bool(args.sample) != bool(args.ckpt) or args.sample and args.resume:
        error("--sample N and --ckpt FILE go together; to go on training use --resume")
    if args.resume and (args.oracle or args.from_ddpm) or args.sample and args.reflow:
        error("--resume and --reflow train; --oracle, --from_ddpm and --sample do not")
    plain = args.source == "gaussian" and args.coupling == "independent" and not args.meanflow
    if (args.oracle or args.from_ddpm) and not plain:
        error("--oracle and --from_ddpm: known for independent gaussian noise only, and not for --meanflow")
    for name in "steps batch_size lr ema_decay coupling coupling_size sigma".split():
        if (args.sample or args.oracle or args.from_ddpm) and name in args.given:
            error(f"--{name} is for training" + ("; for drawing say --sample_steps" if name == "steps" else ""))
    if args.reflow and (args.coupling != "independent" or args.oracle or args.from_ddpm):
        error("--reflow trains on pairs of its own: leave out --coupling, --oracle and --from_ddpm")
    if args.meanflow and args.coupling == "sinkhorn":
        error("--meanflow needs straight lines, and --coupling sinkhorn walks along random bridges")
    if args.meanflow and "sampler" in args.given:
        error("a model of --meanflow knows where paths end: leave out --sampler, say --sample_steps")
    if "sigma" in args.given and args.coupling != "sinkhorn" and not args.resume:
        error("--sigma is for --coupling sinkhorn alone")
    if "coupling_size" in args.given and args.coupling == "independent" and not args.resume:
        error("--coupling_size is for --coupling ot and sinkhorn")
    for name, choices in (("coupling", COUPLINGS), ("sampler", SAMPLERS)):
        if getattr(args, name) not in choices:
            error(f"--{name} is one of {', '.join(choices)}")


# -----------------------------------------------------------------------------
# The method. x0 is a clean point, x1 a point of the source (Gaussian noise, elsewhere called eps, or anything else),
# t in [0, 1] how far it is from the first to the second. A model is any (xt, t) -> velocity, shaped like xt.
# To train: take an x0, an x1 and any t, stand at xt on the line between them, and let the model guess the velocity
# x1 - x0. Many lines cross at xt, so it learns their mean. To sample: follow that mean from a source point at t = 1
# back to t = 0. The cloud of points arrives distributed as the data is, though no single point has to arrive where its
# training line began (2210.02747 theorem 1).


def path(x0, x1, t, sigma=0.0, z=0.0):
    """Where the pair (x0, x1), (B, 2) each, is at time t (B, 1), and its velocity there.

    A straight line (2209.03003 eq. 1); with sigma a Brownian bridge around it, z its noise (SB-CFM in 2302.00482)."""
    xt, v = (1 - t) * x0 + t * x1, x1 - x0
    if sigma > 0:  # t has to keep off 0 and 1, where this velocity has no bound
        spread = sigma * (t * (1 - t)) ** 0.5
        xt, v = xt + spread * z, v + (1 - 2 * t) / (2 * t * (1 - t)) * spread * z
    return xt, v


def loss_fn(model, x0, x1, t, sigma=0.0, z=0.0):
    """Squared error of the velocity, 2210.02747 eq. 9: x0, x1 (B, 2), t (B,) -> (B,)."""
    xt, v = path(x0, x1, t[:, None], sigma, z)
    return (model(xt, t) - v).square().mean(1)


def meanflow_loss_fn(model, x0, x1, t, r):
    """MeanFlow, 2505.13447 eq. 9, 10: model(xt, t, r) learns u, the mean velocity between the times r <= t.

    (t - r) u is the way from r to t. Its derivative by t, along the path, is v = u + (t - r) du/dt: that gives u from v
    and from its own slope. Where r = t this is flow matching."""
    xt, v = path(x0, x1, t[:, None])
    # differs from the paper: along the path of the model's velocity, not of this one pair, whose slopes are noisier; t
    # and r are uniform, and no weight depends on the error
    with torch.no_grad():
        along = model(xt, t)
    u, slope = torch.func.jvp(model, (xt, t, r), (along, torch.ones_like(t), torch.zeros_like(r)))
    return (u - (v - (t - r)[:, None] * slope).detach()).square().mean(1)


def couple(x0, x1, coupling, sigma, seed):
    """A partner in x1 for each point of x0, (n, 2) each -> (n, 2). Lines that cross less make paths straighter.

    ot: the pairing of least total squared distance. sinkhorn: partners drawn from the optimal plan of entropy weight
    2 sigma^2 (SB-CFM in 2302.00482), which is a_i exp(-cost / weight) b_j: found by scaling in turns."""
    cost = cdist(x0, x1, "sqeuclidean")
    cost -= cost.min(1, keepdims=True)  # moves no optimum, makes the search faster and the exponential safer
    cost -= cost.min(0)
    if coupling == "ot":
        return x1[linear_sum_assignment(cost)[1]]
    with np.errstate(all="ignore"):  # a sigma that is too small ends in NaN, which is looked at below
        kernel, b = np.exp(-cost / (2 * sigma ** 2)), np.ones(len(x1))
        for _ in range(10_000):
            a = 1 / (kernel @ b)
            sent = a @ kernel
            off = abs(b * sent - 1).max()
            if not off > 1e-3:
                break
            b = 1 / sent
    if not off <= 1e-3:
        raise Stop(f"--sigma {sigma} is too small for Sinkhorn's iteration; take a larger one or --coupling ot")
    plan = np.cumsum(kernel * b, 1)
    drawn = np.random.default_rng(seed).random((len(x0), 1)) * plan[:, -1:]
    return x1[(plan < drawn).sum(1)]


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


@torch.no_grad()
def sample(model, x1, sampler, steps, tol=1e-4, meanflow=False, on_step=None):
    """Source points x1 (B, 2) carried to t = 0 -> samples and NFE. steps: a number, or the times to stop at.
    on_step(t, xt, v) is called before each step."""
    times = np.linspace(1, 0, steps + 1).tolist() if isinstance(steps, int) else steps
    def velocity(x, t, *r):
        return model(x, *(torch.full((len(x),), s, dtype=x.dtype, device=x.device) for s in (t, *r)))
    if not meanflow:
        return solve(velocity, x1, times, sampler, tol, on_step)
    x = x1
    for t, r in zip(times, times[1:]):  # the mean velocity from t to r is all that a step needs: 2505.13447 eq. 12
        u = velocity(x, t, r)
        if on_step:
            on_step(t, x, u)
        x = x + (r - t) * u
    return x, len(times) - 1


def divergence(f, x):
    """f(x) for points x (B, 2), and at each the trace of f's Jacobian, exactly, (B,)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = f(x)
        rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0][:, i] for i in (0, 1)]
    return y.detach(), rows[0] + rows[1]


def log_likelihood(model, x, source, steps=100):
    """log p(x) in nats, (B,), of points x (B, 2): that at the other end of their paths, solved with Heun from t = 0 to
    1, plus the divergence on the way (2210.02747 appendix C)."""
    def velocity(state, t):
        v, div = divergence(lambda x: model(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device)), state[:, :2])
        return torch.cat([v, div[:, None]], 1)
    state = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
    end, _ = solve(velocity, state, np.linspace(0, 1, steps + 1).tolist(), "heun", None)
    return source.mixture(end[:, :2], 1.0)[0] + end[:, 2]


# -----------------------------------------------------------------------------
# The bridge to diffusion. A DDPM's xt = sqrt(ab) x0 + sqrt(1 - ab) eps, divided by the sum of both roots, is a point
# (1 - t) x0 + t eps of a straight line, with t = sqrt(1 - ab) / (sqrt(ab) + sqrt(1 - ab)). So its network, which sees
# x0 and eps in xt, is a velocity eps - x0 in the coordinates of flow matching, and a step of DDIM is a step of Euler.

T = 1000
SCHEDULES = ["cosine", "linear"]
PREDICTIONS = ["eps", "v", "x0", "score"]


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


def flow_time(ab):
    """t in [0, 1] of a noise level alpha_bar."""
    return (1 - ab) ** 0.5 / (ab ** 0.5 + (1 - ab) ** 0.5)


class DDPMFlow(nn.Module):
    """A network of ddpm_2d.py as a velocity field: (xt, t) -> v, xt (B, 2) in the coordinates of flow matching, t (B,)
    one time for all. Between the T noise levels the network is asked at a fraction of a level, which it takes well;
    beyond the first and the last level it is asked at those."""

    def __init__(self, model, alpha_bar, pred):
        super().__init__()
        self.model, self.pred, self.times = model, pred, flow_time(alpha_bar).cpu().numpy()     # times rise

    def forward(self, xt, t):
        s = float(np.clip(t[0].item(), self.times[0], self.times[-1]))
        level = torch.full_like(t, float(np.interp(s, self.times, np.arange(T))))
        length = (s ** 2 + (1 - s) ** 2) ** 0.5                       # of (1 - s, s): sqrt(ab) is its cosine
        ab, xt = ((1 - s) / length) ** 2, xt / length
        x0 = to_x0(self.model(xt, level), xt, ab, self.pred)
        return (xt - ab ** 0.5 * x0) / (1 - ab) ** 0.5 - x0


@torch.no_grad()
def ddim(model, xt, alpha_bar, pred, levels, on_step=None):
    """The steps of ddpm_2d.py --sampler ddim over `levels` -> the points at the last of them (DDIM eq. 12, eta 0)."""
    for t, s in zip(levels, levels[1:]):
        if on_step:
            on_step(xt)
        ab, ab_s = alpha_bar[t].item(), alpha_bar[s].item()
        x0 = to_x0(model(xt, torch.full((len(xt),), t, device=xt.device)), xt, ab, pred)
        eps = (xt - ab ** 0.5 * x0) / (1 - ab) ** 0.5
        xt = ab_s ** 0.5 * x0 + (1 - ab_s) ** 0.5 * eps
    return xt


# -----------------------------------------------------------------------------
# The model: a multilayer perceptron on x, its Fourier features, and t.


class MLP(nn.Module):
    """(xt, t) -> out: xt (B, 2), t (B,); with two times (xt, t, r) -> the mean velocity from t to r, where r = t unless
    given.

    Random Fourier features of x (2006.10739) let it bend quickly: without them, an MLP sees a swiss roll as a blot."""

    def __init__(self, width, depth, features, times=1):
        super().__init__()
        self.times = times
        self.register_buffer("freq_x", torch.randn(2, features))         # radians per unit of length, in any direction
        self.register_buffer("freq_t", torch.logspace(0, 1, 32))         # radians on the way from data to noise
        sizes = [2 + 2 * features + 64 * times] + [width] * depth
        self.hidden = nn.ModuleList([nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])])
        self.out = nn.Linear(width, 2)

    def forward(self, xt, t, r=None):                                            # (B, 2), (B,), (B,)
        times = [t, torch.zeros_like(t) if r is None else t - r][:self.times]
        angles = torch.cat([xt @ self.freq_x, *(s[:, None] * self.freq_t for s in times)], 1)
        h = torch.cat([xt, angles.cos(), angles.sin()], 1)                       # (B, 2 + 2 features + 64 times)
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


class Normal:
    """The standard normal distribution, with the methods of a Target: the source unless another is named."""

    def points(self, rng, n):
        return rng.standard_normal((n, 2)).astype(np.float32)

    def mixture(self, x, ab):
        return -x.double().square().sum(1) / 2 - math.log(2 * math.pi), -x.double()


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

ARCHITECTURE = "width depth features meanflow data source noise".split()
FREE_ON_RESUME = "steps lr out device sampler sample_steps tol".split()
POOL, N = 2 ** 16, 2048  # points to train on; points in measures and pictures


def draw(model, source, n, args, device, **other):
    """n samples (n, 2) and NFE; `other` overrides sampler, steps or tol. A function of (seed, index) alone, except with
    dopri5, whose steps depend on all points."""
    x1 = source.points(np.random.default_rng((IMAGE, args.seed)), n)
    how = dict(sampler=args.sampler, steps=args.sample_steps, tol=args.tol, meanflow=args.meanflow) | other
    return sample(model, torch.from_numpy(x1).to(device), **how)


def make_source(args, device):
    """What t = 1 is: noise, or another shape."""
    return Normal() if args.source == "gaussian" else Target(args.source, args.noise, device)


def make_pairs(target, source, args, teacher, device):
    """x0, x1 (POOL, 2): which source point belongs to which point. Independent ones are shuffled in each step again."""
    rng = np.random.default_rng((BATCH, args.seed))
    x0, x1 = target.points(rng, POOL), source.points(rng, POOL)
    if teacher:  # reflow: x0 is where the model takes x1, 2209.03003 algorithm 1
        how = dict(sampler="rk4", steps=12, meanflow=args.meanflow)
        x0 = np.concatenate([sample(teacher, torch.from_numpy(part).to(device), **how)[0].cpu().numpy()
                             for part in np.split(x1, 8)])
    elif args.coupling != "independent":
        # differs from the papers: once, before training, not anew in each batch; one pair serves many times t
        began, blocks = time.time(), range(0, POOL, args.coupling_size)
        def block(i):
            part = slice(i, i + args.coupling_size)
            return couple(x0[part], x1[part], args.coupling, args.sigma, mix(NOISE, args.seed, i))
        with ThreadPoolExecutor() as pool:  # SciPy lets go of the interpreter while it searches
            x1 = np.concatenate(list(pool.map(block, blocks)))
        print(f"coupled {POOL} pairs, {args.coupling_size} at a time, in {time.time() - began:.1f} s")
    return torch.from_numpy(x0).to(device), torch.from_numpy(x1).to(device)


def true_velocity(target):
    """E[eps - x0 | xt], which the independent coupling with noise leads to: (xt, t) -> v, t (B,) one time for all."""
    def velocity(xt, t):
        s = min(max(t[0].item(), 1e-4), 1 - 1e-4)
        length = (s ** 2 + (1 - s) ** 2) ** 0.5                       # as a diffusion sees it: see the bridge
        score = target.mixture(xt / length, ((1 - s) / length) ** 2)[1] / length
        eps = -s * score                                              # Tweedie's formula
        return (eps - (xt.double() - s * eps) / (1 - s)).to(xt.dtype)
    return velocity


def load_model(path, args, device, also=()):
    """The model in a model.safetensors of this script; args take over what it was trained with, and the keys `also`."""
    tensors, saved, _ = read_model(path, "cfm_2d.py")
    adopt(args, saved, ARCHITECTURE + sorted(also), path)
    model = MLP(args.width, args.depth, args.features, 1 + args.meanflow).to(device).requires_grad_(False)
    load_weights(model, tensors, path)
    return model


def report(model, target, source, args, device, true=None):
    """Prints the measures of a finished model, each beside its floor -> them, for the log."""
    rng = np.random.default_rng((BATCH, args.seed, 1))
    test = target.points(rng, N)
    x, nfe = draw(model, source, N, args, device)
    result, floor = measures(x.cpu().numpy(), test), {}
    fresh = [measures(target.points(rng, N), test) for _ in range(5)]
    for k in result:
        values = [m[k] for m in fresh]
        floor[k] = [np.mean(values), np.std(values)]
    if args.noise > 0 and not args.oracle:  # without noise the data has no density
        at = torch.from_numpy(test).to(device)
        result["nll"] = -log_likelihood(model, at, source).mean().item()
        floor["nll"] = [-target.mixture(at, 1.0)[0].mean().item(), 0.0]
    print(f"{'':12}{'samples':>12}{'floor':>12}   ({N} points, NFE {nfe}; the floor: 5 times {N} true ones)")
    for k in result:
        deviation = "the truth's" if k == "nll" else f"+- {floor[k][1]:.4f}"
        print(f"{k:12}{result[k]:12.4f}{floor[k][0]:12.4f} {deviation}")

    few = {}
    for sampler, steps in [("euler", 1), ("euler", 2), ("euler", 4), ("euler", 16), ("euler", 64), ("midpoint", 8),
                           ("heun", 8), ("rk4", 4), ("rk4", 16), ("dopri5", 1)]:
        if sampler == "euler" or not args.meanflow:
            x, nfe = draw(model, source, N, args, device, sampler=sampler, steps=steps)
            x = x.cpu().numpy()
            few[f"{sampler} {nfe}"] = [chamfer(x, test), energy(x, test)]
    for i, name in enumerate(("chamfer", "energy")):
        print(f"{name} by sampler and NFE: " + "  ".join(f"{k}: {v[i]:.{4 if i else 1}f}" for k, v in few.items()))
    result = dict(measures=result, floor=floor, by_nfe=few)

    # straightness: S of 2209.03003 eq. 5; path energy: NPE of 2302.00482, against the samples of the model itself
    speeds, slopes = [], []
    def note(t, x, v):
        speeds.append(v.square().sum(1).mean().item())
        slopes.append(v)
    x1 = torch.from_numpy(source.points(np.random.default_rng((IMAGE, args.seed)), N)).to(device)
    x0, _ = sample(model, x1, "midpoint", 50, meanflow=args.meanflow, on_step=note)
    bend = np.mean([(v - (x1 - x0)).square().sum(1).mean().item() for v in slopes])
    shortest = wasserstein(x1.cpu().numpy(), x0.cpu().numpy()) ** 2
    result |= dict(straightness=bend, path_energy=(np.mean(speeds) - shortest) / shortest)
    print(f"straightness {bend:.4f} (0: every path is a line), path energy {result['path_energy']:.1%} above the least")
    if true:
        errors, rng = {}, np.random.default_rng((NOISE, 0))
        for t in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
            x0, x1 = (torch.from_numpy(s.points(rng, N)).to(device) for s in (target, source))
            xt, at = path(x0, x1, t)[0], torch.full((N,), t, device=device)
            with torch.no_grad():
                v = true(xt, at)
                errors[t] = ((model(xt, at) - v).square().sum() / v.square().sum()).item()
        result["velocity_error"] = errors
        print("squared error of the velocity, relative, by t: " + "  ".join(f"{t}: {e:.1e}" for t, e in errors.items()))
    return result


def show(out, model, target, source, args, device, pairs, snapshots, true=None):
    """forward.png, reverse.gif, field.gif, density.png, training.gif; snapshots: [(step, samples (N, 2))]."""
    x0, x1 = (x[:N].cpu().numpy() for x in pairs)
    panels, between = [], lambda t: path(x0, x1, t)[0]
    for t in (0, 0.2, 0.4, 0.6, 0.8, 1):
        panels.append(panel(between(t), wheel(x0), f"t = {t}", [x0[::16], between(t)[::16]]))
    save_png(out / "forward.png", np.concatenate(panels, 1))

    track = []
    def note(t, x, v):
        track.append((t, x.cpu().numpy(), (x - t * v).cpu().numpy()))
    steps = args.sample_steps if args.meanflow else 40
    x, _ = draw(model, source, N, args, device, sampler="midpoint", steps=steps, on_step=note)
    note(0.0, x, x)
    colours, frames = wheel(track[-1][1]), []
    for i, (t, x, guessed) in enumerate(track):
        tails = [p[1][::16] for p in track[:i + 1]]
        frames.append(np.concatenate([panel(x, colours, f"t = {t:.2f}: points", tails),
                                      panel(guessed, colours, "where they are headed")], 1))
    save_gif(out / "reverse.gif", frames, 100)

    at, frames = torch.from_numpy(grid(20)).to(device), []
    for s in np.linspace(1, 0.05, 20):
        t, xt, pair = torch.full((len(at),), s, dtype=torch.float32, device=device), between(s), []
        for title, velocity in (("true velocity", true), ("learnt velocity", None if args.oracle else model)):
            if velocity:
                with torch.no_grad():
                    v = -velocity(at, t)                              # as they move when sampling, towards t = 0
                tip = at + 0.45 * v / (1 + v.norm(dim=1, keepdim=True))
                pair.append(panel(xt, np.full((N, 3), 190, np.uint8), f"{title}, t = {s:.2f}",
                                  arrows=[(at.cpu(), tip.cpu(), (30, 80, 190))]))
        frames.append(np.concatenate(pair, 1))
    save_gif(out / "field.gif", frames, 100)

    if args.noise > 0:
        at = torch.from_numpy(grid(96)).to(device)
        p = [("true density", target.mixture(at, 1.0)[0])]
        if not args.oracle:
            p.append(("learnt density", log_likelihood(model, at, source, 50)))
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
        state = load_checkpoint(args.resume, "cfm_2d.py")
        keep = {"given", "resume"} | args.given & set(FREE_ON_RESUME)
        adopt(args, state["args"], vars(args).keys() - keep, args.resume)
        if "out" not in args.given:
            args.out = str(Path(args.resume).parent)  # where it lies now: the folder may have been renamed
    device, out = float64_device(args.device), Path(args.out)
    teacher = args.reflow and load_model(args.reflow, args, device)
    if teacher and Path(args.reflow).resolve().parent == out.resolve():
        raise Stop(f"this run would write over {args.reflow}: choose another --out")
    target, source = Target(args.data, args.noise, device), make_source(args, device)
    exact = args.source == "gaussian" and args.coupling == "independent" and not args.reflow
    true = true_velocity(target) if exact else None
    out.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k != "given"}
    print(f"{args.source} to {args.data}; {device}; writes to {out}\nsettings: "
          + " ".join(f"{k}={v}" for k, v in settings.items()))
    pairs = make_pairs(target, source, args, teacher, device)
    if args.oracle:
        report(true, target, source, args, device)
        show(out, true, target, source, args, device, pairs, [], true)
        return

    torch.manual_seed(mix(INIT, args.seed))
    model = teacher or MLP(args.width, args.depth, args.features, 1 + args.meanflow).to(device)
    model.requires_grad_()
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
        ckpt = dict(script="cfm_2d.py", args=settings, step=step, key=f"{args.source} {args.data}",
                    model=model.state_dict(), ema=ema.state_dict(), opt=opt.state_dict())
        write_atomically(out / "ckpt.pt", functools.partial(torch.save, ckpt))
        save_safetensors(out / "model.safetensors", ema.state_dict(), dict(
            format="pt", script="cfm_2d.py", kind="mlp", args=json.dumps(settings),
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
            x, _ = draw(ema, source, N, args, device, sampler="midpoint", steps=1 if args.meanflow else 15)
            snapshots.append((step, x.cpu().numpy()))
        if seen and (step % log_every == 0 or last or noted):
            loss, rate = loss_sum.item() / seen, seen * args.batch_size / (time.time() - clock)
            if not loss < 1e4:  # also true of NaN; MeanFlow's may jump
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
            raise Stop(f"stopped at step {step}; go on: python cfm_2d.py --resume {out / 'ckpt.pt'}", noted[0])
        if last or step % 10_000 == 0 and step > start:
            save(step)
        if last:
            break

        # one step: data, noise and t from (seed, step); the loss, its gradient, AdamW, the moving average
        for group in opt.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 50)  # warm-up, while Adam's averages settle
        g = torch.Generator(device).manual_seed(mix(BATCH, args.seed, step))
        i, other = torch.randint(POOL, (2, args.batch_size), generator=g, device=device)
        t, r = torch.rand(2, args.batch_size, generator=g, device=device)
        x0, x1 = pairs[0][i], pairs[1][i if args.reflow or args.coupling != "independent" else other]
        if args.meanflow:
            r[::2] = t[::2]  # half of them plain flow matching, the anchor
            loss = meanflow_loss_fn(model, x0, x1, torch.maximum(t, r), torch.minimum(t, r)).mean()
        elif args.coupling == "sinkhorn":
            z = torch.randn(x0.shape, generator=g, device=device)
            loss = loss_fn(model, x0, x1, t.clamp(1e-3, 1 - 1e-3), args.sigma, z).mean()
        else:
            loss = loss_fn(model, x0, x1, t).mean()
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
    log.write(json.dumps(dict(step=args.steps, **report(ema, target, source, args, device, true))) + "\n")
    show(out, ema, target, source, args, device, pairs, snapshots, true)
    print(f"done in {time.time() - began:.0f} s; see {out}/reverse.gif")


def from_ddpm(args):
    """--from_ddpm FILE: measures and pictures of a DDPM that is sampled as a flow, and both paths in bridge.png."""
    device, out = float64_device(args.device), Path(args.out)
    tensors, saved, _ = read_model(args.from_ddpm, "ddpm_2d.py")
    adopt(args, saved, "width depth features data noise".split(), args.from_ddpm)
    schedule, pred = saved.get("schedule"), saved.get("pred")
    if schedule not in SCHEDULES or pred not in PREDICTIONS:
        raise Stop(f"{args.from_ddpm} does not say what --schedule and --pred were; has it been edited?")
    network, alpha_bar = MLP(args.width, args.depth, args.features), make_alpha_bar(schedule)
    load_weights(network, tensors, args.from_ddpm)
    model = DDPMFlow(network.requires_grad_(False), alpha_bar, pred).to(device)
    target, source = Target(args.data, args.noise, device), Normal()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{args.from_ddpm}: {args.data}, {schedule} schedule, prediction {pred}; {device}; writes to {out}")
    true = true_velocity(target)
    report(model, target, source, args, device, true)
    show(out, model, target, source, args, device, make_pairs(target, source, args, None, device), [], true)

    levels, scale = np.linspace(T - 1, 0, 100).round().astype(int).tolist(), lambda ab: ab ** 0.5 + (1 - ab) ** 0.5
    x1 = torch.from_numpy(source.points(np.random.default_rng((IMAGE, args.seed)), N)).double()
    model, ways = model.cpu().double(), [[], []]
    end = ddim(model.model, x1, alpha_bar, pred, levels, ways[0].append)
    times = [flow_time(alpha_bar[t].item()) for t in levels]
    flow_end, _ = sample(model, x1 / scale(alpha_bar[-1].item()), "euler", times,
                         on_step=lambda t, x, v: ways[1].append(x))
    gap = (flow_end * scale(alpha_bar[0].item()) - end).abs().max()
    save_png(out / "bridge.png", np.concatenate(
        [panel(x.numpy(), wheel(x.numpy()), title, [x[::8] for x in [*way, x]]) for title, way, x in zip(
            ("DDIM, in the coordinates of diffusion", "Euler, in the coordinates of flow matching"), ways,
            (end, flow_end))], 1))
    print(f"DDIM and Euler over the same {len(levels)} levels: largest difference of a coordinate {gap:.1e}; see {out}")


def sample_only(args):
    """--sample N --ckpt FILE: points from a finished model, as points.npy and points.png."""
    device, out = float64_device(args.device), Path(args.out if "out" in args.given else Path(args.ckpt).parent)
    model = load_model(args.ckpt, args, device, {"sampler", "sample_steps", "tol"} - args.given)
    x, nfe = draw(model, make_source(args, device), args.sample, args, device)
    x = x.cpu().numpy()
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "points.npy", lambda f: np.save(f, x))
    save_png(out / "points.png", panel(x, wheel(x)))
    print(f"{len(x)} points in {out / 'points.npy'}, drawn in {out / 'points.png'}; NFE {nfe}")


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
        elif args.from_ddpm:
            from_ddpm(args)
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
    print(f"cfm_2d.py: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
