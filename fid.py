"""How far are generated images from real ones? FID and its kin, the same numbers as the reference tools, only sooner.

    python fid.py data/real out/ddpm_images/generated             # two folders (or .zip, or .npz) of images
    python fid.py drawn_faces out/ddpm_images/generated           # against the animal faces that the scripts draw
    python fid.py data/real --stats real.npz                      # the statistics of one set, computed once ...
    python fid.py real.npz out/ddpm_images/generated              # ... for FID and sFID with any other
    python fid.py data/real samples.npz --mode clean              # as clean-fid; legacy_pytorch: as pytorch-fid
    python fid.py data/real samples.npz --network dinov2 --metrics fid,kid       # FD-DINOv2
    python fid.py data/real samples.npz --json | jq .fid
    torchrun --nproc_per_node=8 fid.py data/imagenet samples.npz --metrics fid,sfid

Expected, on two cores (shared AMD EPYC, torch 2.13.0): 27 images/s through Inception, 0.8 s for a distance of 2048
dimensions; against torch-fidelity, pytorch-fid and clean-fid 2.2 to 2.4 times the speed (README.md). GPU: not measured.
Weights (Inception: 96 MB, DINOv2-L: 1.2 GB) are downloaded once into data/weights; an Inception file that pytorch-fid
or torch-fidelity left in torch's cache is used where it lies. Writes nothing else, unless --stats or --cache says so.

Which number is it? FID depends on the network, on how images are resized to its 299 pixels, on how many there are and
on the reference set; all of that is printed with it. --mode legacy_tensorflow, the default, is what TTUR, EDM and
torch-fidelity compute, and FID and sFID of ADM's evaluator; legacy_pytorch is what pytorch-fid computes, and clean what
clean-fid does. KID, Inception Score, precision and recall are torch-fidelity's, with the subsets that it draws.
Papers: FID 1706.08500, its bias 1911.07023, KID 1801.01401, Inception Score 1606.03498, improved precision and recall
1904.06991, sFID 2103.03841 and 2105.05233 (ADM), resizing 2104.11222, FD-DINOv2 2306.04675, Inception 1512.00567,
DINOv2 2304.07193.
"""
import argparse
import contextlib
import datetime
import functools
import glob
import hashlib
import http.client
import json
import math
import mmap
import os
import signal
import struct
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

# -----------------------------------------------------------------------------
# Knobs.

METRICS = ["fid", "kid", "is", "pr", "sfid"]
MODES = ["legacy_tensorflow", "legacy_pytorch", "clean"]


def parse_args(argv=None):
    """The settings. Wrong ones end the script with a sentence and status 2."""
    argv = sys.argv[1:] if argv is None else argv

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    class Parser(argparse.ArgumentParser):
        def error(self, sentence):  # argparse would print the whole usage first
            self.exit(2, f"{self.prog}: {sentence}; --help lists every flag\n")

    p = Parser(prog="fid.py", description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction
    kinds = "FOLDER|.zip|.npz|drawn_faces"
    p.add_argument("real", metavar="REAL", help=f"the reference: {kinds}, or an .npz of statistics")
    p.add_argument("generated", metavar="GENERATED", nargs="?", help="what is judged: the same kinds")
    g = p.add_argument_group("what is compared")
    g.add_argument("--metrics", default=",".join(METRICS), help="pr is precision and recall; fid and sfid alone "
                   "keep no features in memory")
    g.add_argument("--network", choices=["inception", "dinov2", "random"], default="inception",
                   help="the network that sees the images; random: no download, but compares with nothing published")
    g.add_argument("--weights", metavar="FILE", help="read its weights from here: nothing is downloaded")
    g.add_argument("--mode", choices=MODES, help="how images are resized; default clean, for inception "
                   "legacy_tensorflow")
    g.add_argument("--num_images", type=int, help="of each set at most so many, the same each time (of drawn_faces "
                   "10,000)")
    g.add_argument("--size", type=int, help="pixels a side")
    g = p.add_argument_group("output and system")
    g.add_argument("--json", action=flag, default=False, help="one line of JSON on stdout, the table on stderr")
    g.add_argument("--stats", metavar="FILE", help="save the statistics of REAL in this .npz")
    g.add_argument("--cache", action=flag, default=False, help="keep the features in data/cache, and use them again")
    g.add_argument("--batch", type=int, default=32, help="images at a time, on each device")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = p.parse_args(argv)
    args.given = {a.dest for a in p._actions for o in a.option_strings for w in argv if w == o or w.startswith(o + "=")}
    args.metrics = [m.strip() for m in args.metrics.split(",")]
    args.mode = args.mode or ("legacy_tensorflow" if args.network == "inception" else "clean")
    check(args, p.error)
    return args


def check(args, error):
    """Calls error(sentence) for settings that cannot be."""
    if not set(args.metrics) <= set(METRICS):
        error(f"--metrics takes some of {','.join(METRICS)}")
    for name in "num_images size batch".split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            error(f"--{name} has to be at least 1")
    if args.generated is None and not args.stats:
        error("name what is judged, too: fid.py REAL GENERATED; or say --stats FILE")
    if args.stats and Path(args.stats).suffix != ".npz":
        error("--stats has to end in .npz")
    if args.generated:
        a, b = Path(args.real).resolve(), Path(args.generated).resolve()
        if a.is_relative_to(b) or b.is_relative_to(a):
            error(f"{args.real} and {args.generated} are the same, or one lies in the other: compare separate sets")
    if args.size and "drawn_faces" not in (args.real, args.generated):
        error("--size is for drawn_faces; other images are taken as they are")
    if args.weights and args.network == "random":
        error("--network random has no weights: leave out --weights")


# -----------------------------------------------------------------------------
# The distances. Features are what a network makes of an image: N images, (N, D) numbers.


def frechet_distance(mu1, A1, mu2, A2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two normal distributions with means mu (D,) and covariances
    S = A A^T (D, D), each A (D, r); in float64: 1706.08500 eq. 6.

    S1 S2 is not symmetric: its root is slow to find, and rounding makes it complex. But only the trace is asked for,
    the sum of the roots of the eigenvalues of S1 S2. These are also the eigenvalues of M M^T with M = A1^T A2, which is
    symmetric and has none below 0."""
    M = A1.T @ A2
    M = M if M.shape[0] <= M.shape[1] else M.T
    trace = torch.linalg.eigvalsh(M @ M.T).clamp(min=0).sqrt().sum()
    return max(((mu1 - mu2).square().sum() + A1.square().sum() + A2.square().sum() - 2 * trace).item(), 0.0)


def factor(sigma):
    """A (D, r) with A A^T = sigma (D, D): by Cholesky, or where that does not exist, since there were fewer images than
    features, by the eigenvectors of all eigenvalues that rounding alone does not explain."""
    A, failed = torch.linalg.cholesky_ex(sigma)
    if not failed and A.diagonal().min() > 1e-6 * A.diagonal().max():  # below, it is a root of rounding errors
        return A
    w, v = torch.linalg.eigh(sigma)
    keep = w > w.max() * len(w) * 1e-15
    return v[:, keep] * w[keep].sqrt()


def gram(x):
    """Features (N, D) -> (D + 1, D + 1) in float64: N, the sum of the features and of their products, in one matrix.
    Those of two sets add up, so that features can come in batches, on several devices, and need not be kept."""
    x = F.pad(x.double(), (1, 0), value=1)
    return x.T @ x


def gaussian_of(products):
    """gram() of features -> their mean mu (D,) and a factor A (D, r) of their covariance."""
    n, mu = products[0, 0], products[0, 1:] / products[0, 0]
    return mu, factor((products[1:, 1:] - n * torch.outer(mu, mu)) / (n - 1))


def fit_gaussian(x):
    """The same of features (N, D). Those of few images are such a factor themselves, once they are centred."""
    if len(x) > x.shape[1]:
        return gaussian_of(gram(x))
    mu = x.double().mean(0)
    return mu, (x - mu).T / (len(x) - 1) ** 0.5


def fid(real, generated):
    """real, generated: [fit_gaussian() of a set, of its images with even numbers, of the others] -> the Frechet
    distance of the two sets, and by how much it is too high because they are finite. This bias is nearly proportional
    to 1 / N (1911.07023), so that what halving a set adds is what it has itself; with fewer images than features it
    grows more slowly, and there is more. Both halves, because their means lie on either side of the whole's, which
    cancels. A set that is known by its statistics alone, [one fit], is taken as it is."""
    distance, bias = frechet_distance(*real[0], *generated[0]), 0.0
    for half in real[1:]:
        bias += (frechet_distance(*half, *generated[0]) - distance) / 2
    for half in generated[1:]:
        bias += (frechet_distance(*real[0], *half) - distance) / 2
    return distance, bias


def kid(real, generated, subsets=100, size=1000):
    """Kernel Inception Distance, 1801.01401 section 4: MMD^2, unbiased, with the kernel (x . y / D + 1)^3, of features
    (N, D) -> mean and standard deviation over random subsets, the ones that torch-fidelity draws, and their size. Where
    they would be all the same there is one, and no deviation."""
    rng, found, size = np.random.RandomState(2020), [], min(size, len(real), len(generated))
    for _ in range(1 if size == len(real) == len(generated) else subsets):
        x = generated[rng.choice(len(generated), size, replace=False)].double()
        y = real[rng.choice(len(real), size, replace=False)].double()
        xx, yy, xy = (((a @ b.T) / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        own = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        found.append((own / (size * (size - 1)) - 2 * xy.mean()).item())
    return float(np.mean(found)), float(np.std(found)) if len(found) > 1 else None, size


def inception_score(logits, splits=10):
    """exp E KL(p(y|x) || p(y)), 1606.03498 section 4, of logits (N, classes) -> mean and standard deviation over splits
    of the shuffled images, the ones that torch-fidelity makes, and their number."""
    logits = logits[np.random.RandomState(2020).permutation(len(logits))].double()
    scores, splits = [], min(splits, len(logits))
    for part in (logits[i * len(logits) // splits:(i + 1) * len(logits) // splits] for i in range(splits)):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(log_p))  # not log of the mean, which may be log 0
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores)), splits


def precision_recall(real, generated, k=3, rows=1024):
    """Improved precision and recall, 1904.06991 eq. 1 and 2, of features (N, D): the share of generated images that lie
    in the ball of a real one, which reaches to its k-th neighbour; and the reverse. The distances are computed some
    rows at a time, because N x N are too many."""
    def squared(a, b):
        return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)

    def covered(points, centres):
        radius = torch.cat([squared(a, centres).kthvalue(k + 1).values for a in centres.split(rows)])  # 1st: itself
        return torch.cat([(squared(a, centres) <= radius).any(1) for a in points.split(rows)]).double().mean().item()

    middle = real.double().mean(0)  # of no effect on distances, but on their rounding
    real, generated = real.double() - middle, generated.double() - middle
    return covered(generated, real), covered(real, generated)


def compute(metrics, real, generated):
    """What extract() found in two sets, and their `fits` -> the figures, by name."""
    figures = {}
    for metric, name in (("fid", "features"), ("sfid", "spatial")):
        if metric in metrics:
            figures[metric], figures[f"{metric}_bias"] = fid(real["fits"][name], generated["fits"][name])
    if "kid" in metrics:
        both = real["kept"]["features"], generated["kept"]["features"]
        figures["kid"], figures["kid_std"], figures["kid_subset"] = kid(*both)
    if "is" in metrics:
        figures["is"], figures["is_std"], figures["is_splits"] = inception_score(generated["kept"]["logits"])
    if "pr" in metrics:
        both = real["kept"]["features"], generated["kept"]["features"]
        figures["precision"], figures["recall"] = precision_recall(*both)
    return figures


# -----------------------------------------------------------------------------
# Resizing: where "my FID is far from the paper" mostly comes from.


def resize(x, side, mode):
    """uint8 (3, H, W) -> float (3, side, side) in [0, 255].

    legacy_tensorflow: bilinear between two pixels, corner on corner, half a pixel off, as in TensorFlow 1.
    legacy_pytorch: bilinear between two pixels, centre on centre. Both see only two, and so alias when they shrink.
    clean: Pillow's bicubic, which averages over all pixels that fall into one when it shrinks: 2104.11222."""
    x = x.float()
    if mode == "clean":
        return F.interpolate(x[None], (side, side), mode="bicubic", antialias=True)[0].clamp(0, 255)
    if mode == "legacy_pytorch":
        return F.interpolate(x[None], (side, side), mode="bilinear")[0]
    for dim, n in ((1, x.shape[1]), (2, x.shape[2])):
        at = torch.arange(side, device=x.device) * (n / side)
        low = at.long()
        way = (at - low)[:, None] if dim == 1 else at - low
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1)), way)
    return x


# -----------------------------------------------------------------------------
# The networks. Each has a `side`, the pixels it wants, and gives features (B, dim); Inception more.


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. Stride 1 keeps the size unless padding says otherwise."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=None):
        super().__init__()
        kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        if padding is None:
            padding = tuple(k // 2 for k in kernel) if stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches of convolutions (c_out, kernel, stride) side by side, and one that begins with pooling; their channels
    are joined. A list at the end of a branch is a fork, whose convolutions stand side by side as well."""

    def __init__(self, c_in, pool, **branches):
        super().__init__()
        self.pool, self.branches = pool, {}
        for branch, convs in branches.items():
            c, steps = c_in, []
            for number, conv in enumerate(convs, 1):
                fork = dict(zip("ab", conv)) if isinstance(conv, list) else {"": conv}
                steps.append([f"{branch}_{number}{letter}" if len(convs) > 1 else branch for letter in fork])
                for name, (c_out, *how) in zip(steps[-1], fork.values()):
                    self.add_module(name, Conv(c, c_out, *how))
                c = c_out
            self.branches[branch] = steps

    def forward(self, x):                                                        # (B, c_in, H, W)
        if self.pool == "average":
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)           # (B, c_in, H, W)
        else:
            pooled = F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else F.max_pool2d(x, 3, 2)
        out = []
        for branch, steps in self.branches.items():
            h = [pooled if branch == "branch_pool" else x]
            for names in steps:
                h = [self.get_submodule(name)(h[0]) for name in names]
            out += h
        return torch.cat(out + [pooled] * ("branch_pool" not in self.branches), 1)


class Inception(nn.Module):
    """Inception-v3 as TensorFlow published it on 2015-12-05, with the names of pytorch-fid's weight file. Unlike
    torchvision's, its average pooling leaves out the padding, Mixed_7c takes the maximum, and there are 1,008 classes.

    x (B, 3, 299, 299) -> features (B, 2048), logits (B, 1008) without their bias, as the original code of the Inception
    Score takes them, and for sFID 7 channels of a layer that still knows places (B, 7 * 17 * 17)."""
    side, dim, dim_spatial = 299, 2048, 7 * 17 * 17

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3, padding=0)
        for name, c_in, c_pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            self.add_module(f"Mixed_{name}", Mixed(
                c_in, "average", branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(c_pool, 1)]))
        self.Mixed_6a = Mixed(288, "halve", branch3x3=[(384, 3, 2)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)])
        for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            self.add_module(f"Mixed_{name}", Mixed(
                768, "average", branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, (1, 7)), (192, (7, 1))],
                branch7x7dbl=[(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))], branch_pool=[(192, 1)]))
        self.Mixed_7a = Mixed(768, "halve", branch3x3=[(192, 1), (320, 3, 2)],
                              branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)])
        for name, c_in, pool in (("7b", 1280, "average"), ("7c", 2048, "max")):
            self.add_module(f"Mixed_{name}", Mixed(
                c_in, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), [(384, (1, 3)), (384, (3, 1))]],
                branch3x3dbl=[(448, 1), (384, 3), [(384, (1, 3)), (384, (3, 1))]], branch_pool=[(192, 1)]))
        self.fc = nn.Linear(2048, 1008)

    def normalise(self, x, mode):                                                # [0, 255]
        return x / 127.5 - 1 if mode == "legacy_pytorch" else (x - 128) / 128    # TensorFlow's misses +1 by 1/128

    def forward(self, x):                                                        # (B, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))        # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))        # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))   # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))        # (B, 768, 17, 17)
        spatial = x[:, :7].flatten(1)                                            # (B, 2023): mixed_6/conv, 2105.05233
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))        # (B, 2048, 8, 8)
        features = x.mean((2, 3))                                                # (B, 2048)
        return features, features @ self.fc.weight.T, spatial


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


class RandomFeatures(nn.Module):
    """Four random convolutions, each seen by its mean over the image: colours, edges and textures, but no objects. The
    seed is fixed, so figures can be compared with one another, though with nothing published."""
    side, dim, dim_spatial = 64, 960, 0

    def __init__(self):
        super().__init__()
        g, widths = torch.Generator().manual_seed(0), [3, 64, 128, 256, 512]
        self.convs = nn.ModuleList([nn.Conv2d(a, b, 3, 2, 1, bias=False) for a, b in zip(widths, widths[1:])])
        for conv in self.convs:
            conv.weight.data = torch.randn(conv.weight.shape, generator=g) * (2 / conv.weight[0].numel()) ** 0.5

    def normalise(self, x, mode):                                                # [0, 255]
        return x / 127.5 - 1

    def forward(self, x):                                                        # (B, 3, 64, 64)
        found = []
        for conv in self.convs:
            x = F.relu(conv(x))
            found.append(x.mean((2, 3)))
        return torch.cat(found, 1), None, None                                   # (B, 960)


# -----------------------------------------------------------------------------
# Data: a set of images, in a fixed order, read as they are.

PICTURE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
DRAWN = 10_000  # how many drawn faces the reference has, unless --num_images says otherwise


class Images:
    """What REAL or GENERATED names: item i is an image (H, W, 3) in uint8 and Pillow's name of the mode it had, or a
    sentence why it cannot be read. stats: of a file that has them {mu, sigma, perhaps mu_s, sigma_s of sFID}; about:
    how these were made, or {} if nobody knows. ADM's reference files have images and statistics. Raises Stop."""

    def __init__(self, path, num, size):
        self.path, self.size, self.array, self.stats, self.about, p = path, size, None, None, {}, Path(path)
        if path == "drawn_faces":
            self.names, num, stamps = range(num or DRAWN), None, size
        elif p.suffix == ".npz" and p.is_file():
            self.array, self.stats, self.about = read_npz(p)
            self.names = range(0 if self.array is None else len(self.array))
            stamps = [p.stat().st_size, p.stat().st_mtime_ns]
        else:
            self.names, stamps = list_images(p)
            self.zip = None if p.is_dir() else zipfile.ZipFile(p)
        if not self.names and not self.stats:
            raise Stop(f"there are no images in {path}")
        if num and num < len(self.names):
            chosen = np.sort(np.random.default_rng(0).choice(len(self.names), num, replace=False))
            self.names = [self.names[i] for i in chosen]
        self.key = repr([stamps, list(self.names)])

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        name = self.names[i]
        try:
            if self.path == "drawn_faces":
                return draw_face(0, name, self.size or 64)[0], "RGB"
            if self.array is not None:
                return np.array(self.array[name]), "RGB"
            if self.zip is None:
                return read_image(os.path.join(self.path, name))
            with self.zip.open(name) as f:
                return read_image(f)
        except Exception as e:  # a broken file can raise anything in Pillow or zipfile
            return f"{name}: {str(e) or type(e).__name__}".splitlines()[0]


def read_image(file):
    """Any image that Pillow opens -> uint8 (H, W, 3), and the mode it had. As in the reference tools transparency is
    dropped, and a camera's note to turn the picture is not heeded. Unlike in them, 16 bits do not all become white."""
    with Image.open(file) as im:
        mode = im.mode
        if mode.startswith("I"):
            im = Image.fromarray((np.asarray(im) / 257).clip(0, 255).astype(np.uint8))
        return np.array(im.convert("RGB")), mode


def list_images(path):
    """A folder (any depth) or .zip -> names in order, and stamps that tell a changed set."""
    if path.is_dir():
        names = sorted(glob.glob("**", root_dir=path, recursive=True))  # follows links, leaves out hidden files
        stamps = {name: (path / name).stat() for name in names if name.lower().endswith(PICTURE_FILES)}
        stamps = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stamps.items()}
    else:
        try:
            with zipfile.ZipFile(path) as z:
                stamps = {i.filename: i.CRC for i in sorted(z.infolist(), key=lambda i: i.filename)
                          if i.filename.lower().endswith(PICTURE_FILES) and "/." not in f"/{i.filename}"
                          and not i.filename.startswith("__MACOSX")}
        except (FileNotFoundError, zipfile.BadZipFile):
            raise Stop(f"{path} {'is not a folder, .zip or .npz' if path.exists() else 'does not exist'}")
    return list(stamps), stamps


def map_array(path, member, loaded, name):
    """An array of an .npz file, left on the disk unless it is compressed: 50,000 images of 256 pixels are 10 GB."""
    if member.compress_type != zipfile.ZIP_STORED:
        return loaded[name]
    with open(path, "rb") as f:
        f.seek(member.header_offset + 26)
        f.seek(sum(struct.unpack("<HH", f.read(4))), os.SEEK_CUR)  # the lengths of a name and of extra fields follow
        version = np.lib.format.read_magic(f)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(f)
        return np.memmap(path, dtype, "r", f.tell(), shape, "F" if fortran else "C")


def read_npz(path):
    """-> images uint8 (N, H, W, 3) or None, statistics or None, how these were made. Raises Stop for anything else."""
    try:
        with zipfile.ZipFile(path) as z, np.load(path) as f:
            found = {k: f[k] for k in ("mu", "sigma", "mu_s", "sigma_s", "about") if k in f}
            name = next((k for k in ("images", "arr_0") if k in f), None)
            array = None if name is None else map_array(path, z.getinfo(f"{name}.npy"), f, name)
    except Exception as e:  # a damaged file can raise anything
        raise Stop(f"{path} is not a whole .npz file: {e}")
    if array is not None and (array.dtype != np.uint8 or array.shape[3:] != (3,) or not all(array.shape)):
        raise Stop(f"{path}: the images have to be uint8 (N, height, width, 3), not {array.dtype} {array.shape}")
    if array is None and not {"mu", "sigma"} <= set(found):
        raise Stop(f"{path} holds neither images (images or arr_0) nor statistics (mu and sigma)")
    about = {}
    with contextlib.suppress(ValueError, TypeError):  # another program's
        about = dict(json.loads(str(found.pop("about", "{}"))))
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mu in found:
            D = found[mu].size
            if sigma not in found or found[mu].shape != (D,) or found[sigma].shape != (D, D):
                raise Stop(f"{path}: {mu} has to be (D,) and {sigma} (D, D)")
            if not np.isfinite(found[mu]).all() or not np.isfinite(found[sigma]).all():
                raise Stop(f"{path}: {mu} or {sigma} has entries that are not numbers; compute it anew")
            if not np.allclose(found[sigma], found[sigma].T, rtol=1e-3, atol=1e-6 * found[sigma].max()):
                raise Stop(f"{path}: {sigma} is not symmetric, so it is no covariance")
    return array, found if "mu" in found else None, about


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


def load_weights(model, tensors, path):
    """load_state_dict that says in a sentence why the weights in `path` are not those of this model."""
    try:
        model.load_state_dict(tensors)
    except (AttributeError, RuntimeError, TypeError) as e:
        details = " ".join(str(e).partition(":")[2].split()) or str(e)
        raise Stop(f"{path} is of another architecture: {details[:200]}")


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


# -----------------------------------------------------------------------------
# Weights, extraction, and the figures.

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"  # torch-fidelity names the same file weights-inception-...
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
DINOV2 = "facebook/dinov2-large"  # the one of FD-DINOv2
CACHE = Path("data/cache")


def stats_device(device):
    """Where the statistics are computed: MPS has no float64."""
    return device if device.type == "cuda" else torch.device("cpu")


def sha256(path):
    with open(path, "rb") as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_inception():
    """The weight file: in data/weights, or where pytorch-fid or torch-fidelity keeps it, or downloaded. Raises Stop."""
    for path in (Path("data/weights"), Path(torch.hub.get_dir(), "checkpoints")):
        for name in (INCEPTION, INCEPTION.replace("pt_inception", "weights-inception")):
            if (path / name).is_file() and sha256(path / name) == INCEPTION_SHA256:
                return path / name
    path = Path("data/weights", INCEPTION)
    if path.exists():
        raise Stop(f"{path} is not {INCEPTION_URL}: its hash is another; move it away, or say --weights {path}")
    download(INCEPTION_URL, path, lambda part: sha256(part) == INCEPTION_SHA256)
    return path


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


def load_network(args, device, rank, world):
    """The network that --network names, ready for use, and what tells its weights. Raises Stop."""
    if args.network != "random":
        finds = dict(inception=find_inception, dinov2=functools.partial(hub_file, DINOV2, "model.safetensors"))
        try:
            paths = [args.weights] if args.weights else on_each_node(finds[args.network], rank, world)
            path = paths[-1 if len(paths) == 1 else int(os.environ.get("GROUP_RANK", 0))]
        except Stop as e:
            if args.given & {"network", "mode", "json", "stats"}:  # where a stand-in would pass for what was asked for
                raise
            if rank == 0:
                print(f"fid.py: {e}\nfid.py: so --network random it is: no figure can be compared with published ones",
                      file=sys.stderr, flush=True)
            args.network, args.mode = "random", "clean"
    if args.network == "random":
        net, about = RandomFeatures(), "fixed seed 0"
    else:
        if str(path).endswith(".safetensors"):
            tensors = load_safetensors(path)[0]
        else:
            try:
                tensors = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as e:  # a damaged file can raise anything
                raise Stop(f"cannot read the weights in {path}: {getattr(e, 'strerror', None) or type(e).__name__}")
        try:
            net = Inception() if args.network == "inception" else DINOv2(tensors)
            load_weights(net, net.translate(tensors) if args.network == "dinov2" else tensors, path)
        except (KeyError, ValueError):
            raise Stop(f"{path} does not hold the weights of {args.network}")
        about = "sha256 " + sha256(path)
    net.eval().requires_grad_(False)
    for m in net.modules():
        if isinstance(m, Conv):
            m.conv, m.bn = fuse_conv_bn_eval(m.conv, m.bn), nn.Identity()
    return net.to(device, memory_format=torch.channels_last), about  # with the norms folded in, 1.7 times the speed


@torch.inference_mode()
def extract(images, net, args, device, rank, world, keep, stream):
    """Run the network over a set. The processes share the work, and all have the result. Raises Stop. -> dict:

    kept: of each name in `keep` (features, logits, spatial) the values (N, D)
    products: of each name in `stream` gram() of the images with even numbers, and of the others (2, D + 1, D + 1)
    sizes: how many images have which; broken: a sentence about each that cannot be read."""
    N, mine, where = len(images), range(rank, len(images), world), stats_device(device)
    dims = dict(features=net.dim, logits=1008, spatial=net.dim_spatial)
    kept = {name: torch.zeros(N, dims[name], device=where) for name in sorted(keep)}
    products = {name: torch.zeros(2, dims[name] + 1, dims[name] + 1, dtype=torch.float64, device=where)
                for name in sorted(stream)}
    sizes, broken, read = Counter(), [], torch.zeros(N, device=where)
    threads = min(os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) or 1, 16)
    with ThreadPoolExecutor(threads) as pool, tqdm(None, Path(images.path).name, len(mine), unit="img", mininterval=(
            0.1 if sys.stderr.isatty() else 60), disable=rank > 0) as bar:
        for i in (mine[k:k + args.batch] for k in range(0, len(mine), args.batch)):
            batch = list(pool.map(images.__getitem__, i))  # a GPU is busy with the batch before meanwhile
            bar.update(len(batch))
            broken += [item for item in batch if isinstance(item, str)]
            i = torch.tensor([j for j, item in zip(i, batch) if not isinstance(item, str)], device=where)
            batch = [item for item in batch if not isinstance(item, str)]
            if not batch:
                continue
            read[i] = 1
            sizes.update(f"{im.shape[1]}x{im.shape[0]}" + f" {mode}" * (mode != "RGB") for im, mode in batch)
            x = (torch.from_numpy(im).to(where).permute(2, 0, 1) for im, _ in batch)
            x = torch.stack([resize(im, net.side, args.mode) for im in x]).to(device)
            x = net.normalise(x, args.mode).contiguous(memory_format=torch.channels_last)
            values = dict(zip(("features", "logits", "spatial"), net(x)))
            for name in kept:
                kept[name][i] = values[name].to(where)
            for name in products:
                for odd in (0, 1):
                    products[name][odd] += gram(values[name].to(where)[i % 2 == odd])
    whole = sum_over_ranks(read) > 0
    kept = {name: sum_over_ranks(values)[whole] for name, values in kept.items()}
    products = {name: sum_over_ranks(values) for name, values in products.items()}
    everyone = [(sizes, broken)] * world
    if world > 1:
        dist.all_gather_object(everyone, (sizes, broken))
    sizes, broken = sum((s for s, _ in everyone), Counter()), sum((b for _, b in everyone), [])
    if len(broken) > 0.05 * N:
        raise Stop(f"{len(broken)} of the {N} images in {images.path} cannot be read, more than 5 %: {broken[0]} ...")
    if not all(values.isfinite().all() for values in (*kept.values(), *products.values())):
        raise Stop(f"some features of {images.path} are no numbers: are the network's weights whole?", 1)
    return dict(kept=kept, products=products, sizes=dict(sizes), broken=broken)


def extract_cached(images, net, weights, args, device, rank, world, keep, stream):
    """extract(), or with --cache what it gave before for the same images, network, settings and code."""
    what = [images.key, args.network, weights, args.mode, sorted(keep), sorted(stream), Path(__file__).read_text()]
    path, found = Path(CACHE, f"fid-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.pt"), None
    if args.cache:
        with contextlib.suppress(Exception):  # it is not there, or damaged
            found = torch.load(path, map_location=stats_device(device), weights_only=True)
        if sum_over_ranks(torch.tensor(float(found is not None), device=device)) == world:
            return found
    found = extract(images, net, args, device, rank, world, keep, stream)
    if args.cache and rank == 0:
        write_atomically(path, lambda f: torch.save(found, f))
    return found


def fit_all(images, found, device):
    """What fid() takes, [gaussian_of() the set, of its halves], of all that is known of the set, by name."""
    fits = {}
    for name, mu, sigma in (("features", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        if images.stats:
            if mu in images.stats:
                mu, sigma = (torch.from_numpy(images.stats[k]).double().to(device) for k in (mu, sigma))
                fits[name] = [(mu, factor(sigma))]
        elif name in found["products"]:
            even, odd = found["products"][name]
            fits[name] = [gaussian_of(p) for p in (even + odd, even, odd)]
        elif name in found["kept"]:
            x = found["kept"][name]
            fits[name] = [fit_gaussian(part) for part in (x, x[::2], x[1::2])[:3 if len(x) > 3 else 1]]
    return fits


def unavailable(sets, network):
    """{metric: why} for the metrics that these sets and this network, or None, do not allow."""
    why = dict.fromkeys(("is", "sfid"), f"--network {network} has nothing for it")
    why = {} if network in ("inception", None) else why
    for name, images in sets.items():
        if not images.names:
            lost = ("kid", "pr", "is") if name == "generated" else ("kid", "pr")
            why |= dict.fromkeys(lost, f"{images.path} holds statistics, not images")
        elif len(images) < 4:
            why["pr"] = f"{images.path} has fewer than 4 images"
        if images.stats and "mu_s" not in images.stats:
            why["sfid"] = f"{images.path} has no mu_s and sigma_s"
    return why


def check_outputs(args):
    """Fails now, not after an hour, if nothing can be written, or --stats would overwrite what is no statistics."""
    if args.stats and Path(args.stats).exists() and read_npz(Path(args.stats))[0] is not None:
        raise Stop(f"{args.stats} holds images: --stats would overwrite them")
    for folder in [CACHE] * args.cache + [Path(args.stats or "").parent] * bool(args.stats):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def evaluate(args):
    """All that was asked for -> dict of the figures and of what they depend on. Raises Stop."""
    device, rank, world = setup(args)
    torch.set_float32_matmul_precision("highest")  # TF32 is coarser, and moves a FID
    torch.backends.cudnn.allow_tf32 = False
    check_outputs(args)
    sets = {}
    for name, path in (("generated", args.generated), ("real", args.real)):
        if path:
            sets[name] = images = Images(path, args.num_images, args.size)
            if len(images) == 1:
                raise Stop(f"{path} has 1 image; a covariance takes at least 2")
            if name == "generated" and images.names and args.real == "drawn_faces" and args.size is None:
                sizes = (len(item[0]) for item in map(images.__getitem__, range(len(images))) if item[1:] == ("RGB",))
                args.size = next(sizes, None)
    if args.stats and sets["real"].stats:
        raise Stop(f"{args.real} holds statistics already: --stats takes images")
    net, weights = None, None
    if any(not images.stats for images in sets.values()) or all(images.names for images in sets.values()):
        net, weights = load_network(args, device, rank, world)
    asked = args.metrics if args.generated else ["fid", "sfid"]
    why = {metric: reason for metric, reason in unavailable(sets, net and args.network).items() if metric in asked}
    if why and args.generated and "metrics" in args.given:
        raise Stop("; ".join(f"--metrics {metric} cannot be had: {reason}" for metric, reason in why.items()))
    metrics = [metric for metric in asked if metric not in why]

    keys = ("network", "weights", "mode")
    made = {i.path: [i.about.get(key) for key in keys] for i in sets.values() if i.about}
    made |= {"this run": [args.network, weights, args.mode]} if net else {}
    dims = [{i.path: i.stats[mu].size for i in sets.values() if i.stats and mu in i.stats} | (
        {"this run": dim} if net else {}) for mu, dim in (("mu", net and net.dim), ("mu_s", net and net.dim_spatial))]
    for what in (made, dims[0], dims[1] if "sfid" in metrics else {}):
        if len({str(value) for value in what.values()}) > 1:
            raise Stop("these features cannot be compared: " + "; ".join(f"{k}: {v}" for k, v in what.items()))
    found = {}
    for name, images in sets.items():
        found[name] = dict(kept={}, products={}, sizes={}, broken=[])
        keep = {"features"} if {"kid", "pr"} & set(metrics) else set()
        keep |= {"logits"} if "is" in metrics and name == "generated" else set()
        stream = set() if images.stats else {"features"} - keep | ({"spatial"} if "sfid" in metrics else set())
        if net and len(images) <= 2 * net.dim:  # the products would take more room than the features
            keep, stream = keep | stream, set()
        if keep or stream:
            found[name] = extract_cached(images, net, weights, args, device, rank, world, keep, stream)
    if rank:
        return None
    about = dict(zip(keys, next(iter(reversed(made.values())), [None] * 3)))
    with torch.inference_mode():
        for name, images in sets.items():
            found[name]["fits"] = fit_all(images, found[name], stats_device(device))
        if args.stats:
            save_statistics(args.stats, found["real"], about)
        figures = compute(metrics, found["real"], found["generated"]) if args.generated else {}
    described = {name: dict(name=images.path, images=sum(found[name]["sizes"].values()) or images.about.get("images"),
                            sizes=found[name]["sizes"], broken=found[name]["broken"], statistics=bool(images.stats),
                            unknown=bool(images.stats and not images.about)) for name, images in sets.items()}
    return dict(**figures, **about, **described, left_out=why if args.generated else {}, dim=[*dims[0].values()][0],
                num_images=args.num_images, device=str(device), processes=world, torch=torch.__version__)


def save_statistics(path, found, about):
    """mu and sigma as pytorch-fid reads them, of sFID mu_s and sigma_s, and what they were made with."""
    arrays = dict(about=json.dumps(about | dict(images=sum(found["sizes"].values()))))
    for name, suffix in (("features", ""), ("spatial", "_s")):
        if name in found["fits"]:
            mu, A = found["fits"][name][0]
            arrays |= {f"mu{suffix}": mu.cpu().numpy(), f"sigma{suffix}": (A @ A.T).cpu().numpy()}
    write_atomically(Path(path), lambda f: np.savez(f, **arrays))


def table(report):
    """The report for people."""
    lines, sets = [], [name for name in ("real", "generated") if name in report]
    for name in sets:
        r = report[name]
        sizes, what = sorted(r["sizes"].items(), key=lambda item: -item[1]), []
        if r["statistics"]:
            what.append(f"statistics of {r['images']:,} images" if r["images"] and not sizes else "statistics")
        if sizes:
            some = [f"{size} ({n:,})" if len(sizes) > 1 else size for size, n in sizes[:3]] + ["..."] * (len(sizes) > 3)
            what.append(f"{r['images']:,} images of " + ", ".join(some))
        lines.append(f"{name:<12}{r['name']}: {' and '.join(what)}")
        if r["broken"]:
            lines.append(f"{'':<12}left out, because they cannot be read: {len(r['broken'])}: "
                         + "; ".join(r["broken"][:9]))
    if report["network"]:
        lines.append(f"{'features':<12}{report['network']} ({report['dim']}), {report['weights'][:23]}, "
                     f"mode {report['mode']}, torch {report['torch']}, {report['device']} x {report['processes']}")
    few = min(report[name]["images"] or math.inf for name in sets)
    finite = [name for name in sets if not report[name]["statistics"]]
    for key in ("fid", "kid", "is", "precision", "recall", "sfid"):
        if key in report:
            spread = f" +- {report[key + '_std']:.4g}" if report.get(key + "_std") else ""
            bias, note = report.get(key + "_bias", -math.inf), ""
            if key in ("kid", "is"):
                note = f" (subsets of {report['kid_subset']:,})" if key == "kid" else f" ({report['is_splits']} splits)"
            elif bias > report[key]:
                note = " (no more than sets so small have by chance)"
            elif bias > 0.005 * report[key]:
                note = (f" ({'at least' if few < report['dim'] else 'about'} {bias:.3g} of it because "
                        + ("the sets are" if len(finite) == 2 else f"{finite[0]} is") + " finite)")
            name = {"dinov2": "fd_dinov2", "random": "fd_random"}.get(report["network"], key) if key == "fid" else key
            lines.append(f"{name:<12}{report[key]:.6g}{spread}{note}")
    lines += [f"{metric:<12}left out: {why}" for metric, why in report["left_out"].items()]
    if few < report["dim"]:
        lines.append(f"Careful: {few:,} images for {report['dim']:,} features. Compare only with figures of as "
                     "many images; papers take 50,000.")
    for name in sets:
        if report[name]["unknown"]:
            lines.append(f"Careful: {report[name]['name']} does not say with which network, weights and mode it was "
                         "made; pytorch-fid's take --mode legacy_pytorch, clean-fid's clean.")
    if report["network"] == "random":
        lines.append("Careful: --network random compares with nothing published, only with itself.")
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# Start: what was asked for, and one sentence with an exit status when it cannot be had.


def main(argv=None):
    """-> the exit status: 0, 1 for a failure at run time, 2 for wrong input, 130 or 143 after Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, stop_at_once)
    sentence, code = None, 0
    try:
        args = parse_args(argv)
        report = evaluate(args)
        if report:
            print(table(report), file=sys.stderr if args.json else sys.stdout, flush=True)
            if args.stats:
                print(f"statistics of {args.real} in {args.stats}", file=sys.stderr, flush=True)
            if args.json:
                print(json.dumps(report), flush=True)
    except Stop as e:
        sentence, code = str(e) if int(os.environ.get("LOCAL_RANK", 0)) == 0 else None, e.code  # one of each node
    except KeyboardInterrupt as e:
        sentence, code = "stopped, before there were figures", 128 + (e.args or (2,))[0]
    except OSError as e:
        sentence, code = f"{e.filename or 'input or output'}: {e.strerror or e}", 1
    except (MemoryError, RuntimeError) as e:  # CUDA, MPS, the CPU and NumPy each have their own
        if not isinstance(e, MemoryError) and "out of memory" not in str(e) and "allocate memory" not in str(e):
            raise
        sentence, code = "out of memory: lower --batch, or take --metrics fid alone", 1
    if sentence:  # before the next line, which can wait for ranks that are gone
        print(f"fid.py: {sentence}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    status = main()
    if "RANK" in os.environ:  # threads of the process group can outlive the interpreter, which now and then aborts it
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
