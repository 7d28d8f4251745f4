"""Speed, memory and quality of the scripts on this machine, as Markdown tables.

    make bench                           # all parts, with the models that it finds in out/
    python tests/bench.py --parts plane  # ddpm_2d.py in the protocol of a course that many have taken; five minutes
    python tests/bench.py --parts flow   # cfm_2d.py in the protocol of a paper, and beside torchcfm; half an hour
    python tests/bench.py --parts step   # a training step beside three other networks; some minutes
    python tests/bench.py --parts quality --runs out/ddpm_images:ddpm:50,ddim:10 out/cfm_images
    python tests/bench.py --parts quality --images some/folder
    python tests/bench.py --parts nfe    # quality by calls of the network, of the same --runs
    python tests/bench.py --parts prompts    # how often text2img.py draws what it is told
    python tests/bench.py --parts fid    # fid.py beside torch-fidelity, pytorch-fid and clean-fid; a quarter of an hour
    python tests/bench.py --parts dit    # latent_dit.py beside diffusers' transformer, and by tokens and processes
    python tests/bench.py --parts lora   # finetune_lora.py: a step beside diffusers and peft; what a new animal costs
    python tests/bench.py --parts serve  # serve.py: images a second and waiting by the number of clients; ten minutes

For other programs: draw_faces, species_classifier(size), quality(images), frechet(a, b).
"""
import argparse
import base64
import collections
import contextlib
import copy
import datetime
import functools
import http.client
import inspect
import io
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

THREADS = torch.get_num_threads()  # torch's own choice, all cores; the next import sets one
import conftest  # noqa: E402, finds the scripts, and makes torchvision importable, which the peer needs
import cfm_2d  # noqa: E402
import cfm_images  # noqa: E402
import ddpm_2d  # noqa: E402
import ddpm_images as d  # noqa: E402
import fid  # noqa: E402
import finetune_lora  # noqa: E402
import latent_dit  # noqa: E402
import serve  # noqa: E402
import text2img  # noqa: E402

SPECIES = list(d.TRAITS)


def machine(device):
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = info.partition("model name")[2].partition("\n")[0].lstrip("\t: ") or platform.processor() or "CPU"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu}, {os.cpu_count()} cores, {THREADS} threads"
    return f"{name}; torch {torch.__version__}; {datetime.date.today()}; load average {os.getloadavg()[0]:.1f}"


def table(head, rows):
    print("\n" + "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n", flush=True)


# -----------------------------------------------------------------------------
# Part step: one training step beside a peer of the same number of parameters, image size and batch. Each does what its
# own trainer does: noise and t, forward, backward, clipping, optimizer, EMA. Loading images is left out for both.

DDP, CFM, HF = "denoising-diffusion-pytorch", "torchcfm", "diffusers"
HALF = dict(size=32, patch=1, width=32, mults=[2, 4, 4, 5], blocks=2, attn=3, dropout=0.1, min_snr=0.0)
CASES = {  # ours, what differs from its cpu preset, the peer
    "64x64": (d, {}, DDP), "32x32": (d, dict(size=32, patch=1), DDP),
    "CIFAR-10, flow": (cfm_images, HALF | dict(pred="v"), CFM), "CIFAR-10, DDPM": (d, HALF | dict(pred="eps"), HF)}


def count(model):
    return sum(p.numel() for p in model.parameters())


def build(who, case, setting, device):
    """-> step(), one training step of `who`; batch size, number of parameters, and what they make up."""
    torch.manual_seed(0)
    module, changes, _ = CASES[case]
    args, _ = module.parse_args(["--preset", "cpu", "--device", device, "--out", os.devnull])
    vars(args).update(changes, classes=SPECIES)
    layout = torch.channels_last if "channels_last" in setting else torch.contiguous_format
    x = torch.rand(args.batch_size, 3, args.size, args.size, device=device).contiguous(memory_format=layout)
    model, about = module.UNet(args), f"patch={args.patch}"
    if who == DDP:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA
        with torch.device("meta"):  # parameters are counted, not made
            dim, mults = min(((dim, mults) for mults in ((1, 2, 4), (1, 2, 4, 8)) for dim in range(8, 82, 2)),
                             key=lambda shape: abs(count(Unet(shape[0], dim_mults=shape[1])) - count(model)))
        model = GaussianDiffusion(Unet(dim, dim_mults=mults), image_size=args.size)
        about = f"dim={dim}, dim_mults={mults}"
    elif who == CFM:  # the network of its examples/images/cifar10, half as wide
        from torchcfm.models.unet.unet import UNetModelWrapper
        model = UNetModelWrapper(dim=(3, 32, 32), num_res_blocks=2, num_channels=64, channel_mult=[1, 2, 2, 2],
                                 num_heads=4, num_head_channels=64, attention_resolutions="16", dropout=0.1)
        about = "num_channels=64"
    elif who == HF:   # google/ddpm-cifar10-32, half as wide
        import diffusers
        model = diffusers.UNet2DModel(
            sample_size=32, block_out_channels=[64, 128, 128, 128], layers_per_block=2, dropout=0.1,
            down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"], attention_head_dim=None)
        about = "block_out_channels=[64, 128, 128, 128]"
    model, x0, average = model.to(device, memory_format=layout), 2 * x - 1, None
    if who == DDP:    # as in its Trainer
        opt, ema = torch.optim.Adam(model.parameters(), args.lr, (0.9, 0.99)), EMA(model, beta=0.995, update_every=10)
        loss_of, average = (lambda: model(x)), ema.to(device).update
    elif who == CFM:  # as in its train_cifar10.py
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
        matcher, opt = ConditionalFlowMatcher(sigma=0.0), torch.optim.Adam(model.parameters(), lr=2e-4)

        def loss_of():
            t, xt, u = matcher.sample_location_and_conditional_flow(torch.randn_like(x0), x0)
            return F.mse_loss(model(t, xt), u)
    elif who == HF:   # as in its train_unconditional.py
        from diffusers.training_utils import EMAModel
        noising = diffusers.DDPMScheduler()
        opt = torch.optim.AdamW(model.parameters(), 1e-4, (0.95, 0.999), weight_decay=1e-6)
        average = functools.partial(EMAModel(model.parameters(), use_ema_warmup=True).step, model.parameters())

        def loss_of():
            eps, t = torch.randn_like(x0), torch.randint(0, 1000, (len(x0),), device=device)
            return F.mse_loss(model(noising.add_noise(x0, eps, t), t).sample, eps)
    else:             # as in train()
        opt = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.99), weight_decay=0.01, fused=True)
        call, alpha_bar = functools.partial(model, y=None), d.make_alpha_bar("cosine")

        def loss_of():
            eps = torch.randn_like(x0)
            if module is cfm_images:
                t = torch.sigmoid(torch.randn(len(x0), device=device))
                return cfm_images.loss_fn(call, x0, eps, t, args.pred, args.min_snr).mean()
            t = torch.randint(d.T, (len(x0),), device=device)
            return d.loss_fn(call, x0, eps, t, alpha_bar, args.pred, args.min_snr).mean()
    if average is None:
        ema = copy.deepcopy(model).requires_grad_(False)
        average = functools.partial(d.update_ema, ema, model, args.ema_decay)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled="bf16" in setting):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        average()
    return step, len(x), count(model), f"{about}, {setting}"


def seconds(step, device, n=1):
    began = time.perf_counter()
    for _ in range(n):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / n


def memory(make, *case):
    """GiB, in a fresh process. On a GPU the peak of what torch allocated; on the CPU, by how much two steps lift the
    peak of the resident set above what it was before them. nan where there is no /proc."""
    torch.set_num_threads(THREADS)
    (step, *_), device, status = make(*case), case[-1], Path("/proc/self/status")

    def resident(field):  # not getrusage: on Linux ru_maxrss of a child starts at the peak of its parent
        return int(status.read_text().split(field)[1].split()[0]) / 2 ** 20 if status.exists() else math.nan
    before = resident("VmRSS:")
    seconds(step, device, 2)
    return torch.cuda.max_memory_allocated() / 2 ** 30 if device == "cuda" else resident("VmHWM:") - before


def part_step(args):
    settings, rows = ["bf16 channels_last"] if args.device == "cuda" else ["fp32"], []
    with d.autocast(args.device):
        if args.device == "cpu" and torch.is_autocast_enabled("cpu"):
            settings += ["bf16", "bf16 channels_last"]
    for name, (module, _, peer) in CASES.items():
        best, times, text, used = {}, {"ours": [], peer: []}, {}, {}
        for who in times:  # each in the setting that suits it best
            for case in [(who, name, setting, args.device) for setting in settings]:
                step, *about = build(*case)
                took = min(seconds(step, args.device) for _ in range(3))  # of which the first is a warm-up
                if who not in best or took < best[who][0]:
                    best[who] = took, step, case, about
        for _ in range(args.rounds):  # in turns, so that whatever else the machine does hits both alike
            for who, (took, step, _, _) in best.items():
                times[who].append(seconds(step, args.device, max(1, min(20, round(2 / took)))))
        for who, (_, _, case, (batch, n, about)) in best.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                used[who] = fresh.submit(memory, build, *case).result()
            text[who] = (f"{batch / statistics.median(times[who]):.1f} images/s, {used[who]:.2f} GiB; "
                         f"{n / 1e6:.2f}M parameters, {about}")
        ratios = [b / a for a, b in zip(times["ours"], times[peer])]
        rows.append([f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                     f"{used['ours'] / used[peer]:.2f}", f"{name}, batch {batch}",
                     f"{module.__name__}.py: {text['ours']}", f"{peer}: {text[peer]}"])
    print(f"\n## Training step\n\n{machine(args.device)}; medians (and range) of {args.rounds} alternating rounds")
    table(["speed, ours / peer", "memory, ours / peer", "images", "ours", "the peer"], rows)
    print("The first row is the cpu preset, whose UNet works on patches; the others compare UNets without them.\n"
          + ("Memory: the peak of what torch allocated." if args.device == "cuda" else
             "Memory: by how much two steps lift the resident set: activations, gradients, optimizer state."))


# -----------------------------------------------------------------------------
# Part quality: the species of a drawn face is known, so a classifier that was trained on faces of other seeds can judge
# samples. It knows a ninth class, what is no animal, without which it would be sure of rubbish too.

RUBBISH = ("noise", "shuffled patches", "strong blur", "halves of two species")  # the ninth class


def draw_faces(seed, n, size):
    """-> uint8 (n, size, size, 3), labels (n,). Every second is mirrored; scripts train on seed 0."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        faces = list(pool.map(functools.partial(d.draw_face, seed, size=size), range(n), chunksize=64))
    labels = [SPECIES.index(d.face_traits(np.random.default_rng((seed, i)))[0]) for i in range(n)]
    return np.stack([face[:, ::1 - 2 * (i % 2)] for i, face in enumerate(faces)]), torch.tensor(labels)


def blur(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def rubbish(kind, x, y):
    """Faces x (B, 3, S, S) of species y -> images that show no species, at most B of them."""
    B, _, S, _ = x.shape
    if kind == "noise":  # fine or coarse, faint or strong
        grain = torch.randn(B, 3, *[S // 2 ** torch.randint(0, 4, ()).item()] * 2)
        return F.interpolate(grain, S) * 1.2 * torch.rand(B, 1, 1, 1) + x.mean((2, 3), keepdim=True)
    if kind == "shuffled patches":
        p = x.view(B, 3, 4, S // 4, 4, S // 4).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)   # (B, 16, 3, S / 4, S / 4)
        p = p[torch.arange(B)[:, None], torch.rand(B, 16).argsort(1)].unflatten(1, (4, 4))
        return p.permute(0, 3, 1, 4, 2, 5).reshape(B, 3, S, S)
    if kind == "strong blur":
        return F.interpolate(F.adaptive_avg_pool2d(x, torch.randint(2, 6, ()).item()), S, mode="bilinear")
    share = torch.tensor(0.5)  # "average of two species", which the classifier is not trained on
    if kind == "halves of two species":  # cut in any direction, sharply or softly
        at, angle, soft = torch.linspace(-1, 1, S), 2 * math.pi * torch.rand(B, 1, 1, 1), torch.rand(B, 1, 1, 1) + 0.03
        share = (6 * (at * angle.cos() + at[:, None] * angle.sin()) / soft).sigmoid()    # (B, 1, S, S)
    return (share * x + (1 - share) * x.roll(1, 0))[y != y.roll(1, 0)]


class Classifier(nn.Module):
    """(N, 3, S, S) -> 64 features, each of variance 1 in training, and logits of the species and of no animal."""

    def __init__(self):
        super().__init__()
        layers, c = [], (3, 32, 64, 96, 128)
        for i in range(4):
            layers += [nn.Conv2d(c[i], c[i + 1], 3, 1 if i else 2, 1), nn.BatchNorm2d(c[i + 1]), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if i else []
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * c[-1], 64), nn.BatchNorm1d(64, affine=False)]
        self.features, self.head = nn.Sequential(*layers), nn.Sequential(nn.ReLU(), nn.Linear(64, len(SPECIES) + 1))
        self.register_buffer("reference", torch.zeros(2000, 64))  # features of fresh faces
        self.register_buffer("accuracy", torch.zeros(()))         # on those

    def forward(self, x):
        features = self.features(x)
        return features, self.head(features)

    @torch.no_grad()
    def judge(self, images):
        """uint8 (N, S, S, 3) -> features (N, 64), probabilities (N, 9)."""
        parts = [self(d.to_tensor(part, "cpu")) for part in np.array_split(images, -(-len(images) // 256))]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]).softmax(1)


@functools.lru_cache(maxsize=None)
def species_classifier(size):
    """The Classifier for images of this side: trained once, a minute or two on 2 cores, and kept in data/cache."""
    model, sources = Classifier(), (d.draw_face, d.face_traits, draw_faces, rubbish, Classifier, species_classifier)
    about = repr([*map(inspect.getsource, sources), d.TRAITS, d.FURS, d.EYES, d.BACKGROUNDS])
    cache = Path(f"data/cache/species-{size}-{zlib.crc32(about.encode()):08x}.pt")
    if cache.exists():
        model.load_state_dict(torch.load(cache, weights_only=True))
        return model.eval()
    print(f"training a classifier of {size}x{size} faces", file=sys.stderr, flush=True)
    (images, labels), n_steps, B = draw_faces(1, 12_800, size), 400, 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier()
        opt = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, n_steps)
        for i in torch.randint(len(labels), (n_steps, B)):
            x, y = d.to_tensor(images[i.numpy()], "cpu"), labels[i]
            bad = torch.cat([rubbish(kind, x[k::8], y[k::8]) for k, kind in enumerate(RUBBISH)])
            x = torch.where(torch.rand(B, 1, 1, 1) < 0.5, x, blur(x))  # a little soft, noisy, bright: still an animal
            x, y = torch.cat([x, bad]), torch.cat([y, torch.full((len(bad),), len(SPECIES))])
            x = x + 0.2 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x) + 0.3 * torch.rand(len(x), 1, 1, 1) - 0.15
            F.cross_entropy(model(x.clamp(-1, 1))[1], y).backward()
            opt.step()
            opt.zero_grad()
            schedule.step()
    images, labels = draw_faces(2, len(model.reference), size)
    model.reference[:], p = model.eval().judge(images)
    model.accuracy.fill_((p.argmax(1) == labels).float().mean())
    if model.accuracy < 0.99:
        raise RuntimeError(f"the classifier knows only {100 * model.accuracy:.1f} % of fresh faces")
    d.write_atomically(cache, functools.partial(torch.save, model.state_dict()))
    return model


def frechet(a, b):
    """Fréchet distance of Gaussians fitted to features (N, D) in float64. tr (A B)^½ is the sum of the roots of the
    eigenvalues of A^½ B A^½, which is symmetric."""
    a, b = a.double(), b.double()
    A, B = a.T.cov(), b.T.cov()
    w, V = torch.linalg.eigh(A)
    root = V * w.clamp(min=0).sqrt() @ V.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross).item()


def quality(images):
    """uint8 (N, S, S, 3) -> confident, the share that is one of the species with p > 0.9; entropy, of the species among
    those, in nats (nan if none); frechet, the distance of the features to those of 2,000 drawn faces."""
    model = species_classifier(images.shape[1])
    features, p = model.judge(images)
    sure, species = p[:, :-1].max(1)
    share = torch.bincount(species[sure > 0.9], minlength=len(SPECIES)).double()
    entropy = torch.special.entr(share / share.sum()).sum().item()
    return dict(confident=(sure > 0.9).double().mean().item(), entropy=entropy,
                frechet=frechet(features, model.reference))


def read_folder(folder):
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise SystemExit(f"no images in {folder}")
    with Image.open(files[0]) as first:
        size = min(first.size)
    images = [d.read_image(file, size) for file in files]
    for broken in (image for image in images if isinstance(image, str)):
        raise SystemExit(broken)
    return np.stack(images)


def generated(script, out, **flags):
    """uint8 (N, S, S, 3): what a script with --sample among its flags writes into out/generated."""
    command = [sys.executable, conftest.ROOT / script, f"--out={out}", *(f"--{k}={v}" for k, v in flags.items())]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return read_folder(Path(out, "generated"))


SAMPLERS = {"ddpm_images.py": ["ddpm", "ddim", "dpmpp_2m"],
            "cfm_images.py": ["euler", "midpoint", "heun", "ancestral"]}


def find_runs(args):
    """--runs FOLDER:SAMPLER:STEPS,... -> [folder, script, [(sampler, steps)]]; without --runs those in out/."""
    found = []
    for name in args.runs or [f for f in ("out/ddpm_images", "out/cfm_images") if Path(f, "ckpt.pt").exists()]:
        folder, _, samplers = name.partition(":")
        trained = torch.load(Path(folder, "ckpt.pt"), map_location="cpu", weights_only=True)["args"]
        script = next(script for script, known in SAMPLERS.items() if trained["sampler"] in known)
        found.append((folder, script, [s.partition(":")[::2] for s in samplers.split(",") if s]))
    return found


def sample_run(folder, script, sampler, steps, args):
    """uint8 (N, S, S, 3): args.n samples of a run, from a copy of it, so that its own generated/ stays."""
    flags = dict(sampler=sampler, sample_steps=steps, sample=args.n, device=args.device)
    with tempfile.TemporaryDirectory() as out:
        shutil.copy(Path(folder, "ckpt.pt"), out)
        return generated(script, out, **{k: v for k, v in flags.items() if v})


def part_quality(args):
    sets = {str(folder): read_folder(folder) for folder in args.images}
    for folder, script, samplers in [] if sets and not args.runs else find_runs(args):
        for sampler, steps in samplers or [("", "")]:  # its own
            name = f"{folder}, {sampler or 'its own sampler'}" + f", {steps} steps" * bool(steps)
            sets[name] = sample_run(folder, script, sampler, steps, args)
    for size in sorted({x.shape[1] for x in sets.values()} or {64}):
        model, (real, y) = species_classifier(size), draw_faces(3, args.n, size)
        x, floor = d.to_tensor(real, "cpu"), "fresh drawn faces: the floor"
        torch.manual_seed(0)
        known = {floor: x, "fresh drawn faces, a little blurred": blur(x), "Gaussian noise": torch.randn_like(x)}
        known |= {f"no animal: {kind}": rubbish(kind, x, y) for kind in RUBBISH}
        known["no animal, not in its training: average of two species"] = rubbish("average of two species", x, y)
        shown = {k: v for k, v in sets.items() if v.shape[1] == size} | {k: d.to_uint8(v) for k, v in known.items()}
        scores = {name: quality(images) for name, images in shown.items()}
        print(f"\n## Quality of {size}x{size} images\n\n{machine(args.device)}; judged by a classifier that knows "
              f"{100 * model.accuracy:.2f} % of 2,000 fresh drawn faces")
        rows = [[f"{far / scores[floor]['frechet']:.1f}", f"{far:.2f}", f"{100 * sure:.1f} %",
                 f"{entropy:.3f}".replace("nan", "-"), str(len(shown[name])), name]
                for name, (sure, entropy, far) in ((name, q.values()) for name, q in scores.items())]
        table(["Fréchet / floor", "Fréchet", "one species, p > 0.9", "entropy (ln 8 = 2.079)", "N", "images"], rows)


# -----------------------------------------------------------------------------
# Part nfe: what an image costs, calls of the network, against what it is worth, as part quality judges it.

NFE = (1, 2, 4, 8, 16, 32, 64)


def part_nfe(args):
    rows = []
    for folder, script, samplers in find_runs(args):
        log = Path(folder, "log.jsonl").read_text().splitlines()
        for sampler in [name for name, _ in samplers] or SAMPLERS[script]:
            row = [f"{folder}, {sampler}", f"{json.loads(log[-1])['seconds']:.0f} s"]
            calls = 2 if sampler in ("midpoint", "heun") else 1  # a step
            for nfe in NFE:
                q = quality(sample_run(folder, script, sampler, nfe // calls, args)) if nfe % calls == 0 else None
                row.append(f"{100 * q['confident']:.1f} % ({q['frechet']:.1f})" if q else "-")
            rows.append(row)
            print(*row, file=sys.stderr, flush=True)
    print(f"\n## Quality by calls of the network\n\n{machine(args.device)}; {args.n} samples: the share that is one "
          "species with p > 0.9, and the Fréchet distance")
    table(["run, sampler", "trained in", *(f"NFE {n}" for n in NFE)], rows)


# -----------------------------------------------------------------------------
# Part prompts: whether a drawn face is what its caption says, by its pixels and, for the species, by the classifier.

CAPTION = re.compile(r"an? (\w+) (\w+) with (\w+) eyes on a (\w+) background")


def patch(images, x, y, width, height):
    """Pixels (N, P, 3) of a rectangle around x, y, in half-images from the middle."""
    S = images.shape[1]
    (x0, x1), (y0, y1) = ([round((v + sign * side / 2 + 1) * S / 2) for sign in (-1, 1)]
                          for v, side in ((x, width), (y, height)))
    return images[:, max(y0, 0):y1, max(x0, 0):x1].reshape(len(images), -1, 3).astype(np.float32)


def most_seen(pixels, colors, others=()):
    """The name in colors {name: RGB} to which most pixels (N, P, 3) are nearest, of colors and others."""
    palette = np.array([*colors.values(), *others], np.float32)
    nearest = ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
    return np.array(list(colors))[(nearest[..., None] == np.arange(len(colors))).sum(1).argmax(1)]


def as_told(images, captions):
    """uint8 (N, S, S, 3) and their captions -> {background, fur, eyes, species: (N,), whether it is as the caption says}.
    Colors are looked for where a face of the caption's species would have them."""
    fur, species, eyes, background = np.array([CAPTION.fullmatch(c).groups() for c in captions]).T
    drop = np.array([d.TRAITS[name]["drop"] for name in species])
    corners = np.concatenate([patch(images, x, -.93, .14, .14) for x in (-.93, .93)], 1)
    seen = dict(background=most_seen(corners, d.BACKGROUNDS), fur=fur.copy(), eyes=eyes.copy())
    for y in np.unique(drop):
        some = np.flatnonzero(drop == y)
        seen["fur"][some] = most_seen(patch(images[some], 0, y - .08, .24, .26), d.FURS)
        around = np.concatenate([patch(images[some], x, y - .06, .34, .38) for x in (-.3, .3)], 1)
        seen["eyes"][some] = most_seen(around, d.EYES, [*d.FURS.values(), (44, 32, 44), (255, 255, 255)])
    p = species_classifier(images.shape[1]).judge(images)[1]
    seen["species"] = np.array([*SPECIES, "no animal"])[p.argmax(1).numpy()]
    return {name: seen[name] == told for name, told in
            dict(background=background, fur=fur, eyes=eyes, species=species).items()}


def part_prompts(args):
    """200 held-out captions of drawn faces: how often a model draws what it is told, by the scale of the guidance."""
    default = Path("out/text2img/model.safetensors")
    sets = {}
    for ckpt in args.ckpt or [default] * default.exists():
        for scale in args.scales.split(","):
            with tempfile.TemporaryDirectory() as out:
                images = generated("text2img.py", out, ckpt=ckpt, sample=200, cfg_scale=scale, device=args.device)
                lines = Path(out, "generated/metadata.jsonl").read_text().splitlines()
            sets[f"{ckpt}, --cfg_scale {scale}"] = images, [json.loads(line)["text"] for line in lines]
    size = next(iter(sets.values()))[0].shape[1] if sets else 64
    faces = [text2img.draw_face(3, i, size) for i in range(2000)]
    images, captions = np.stack([f[0] for f in faces]), [f[2] for f in faces]
    sets = {"2,000 fresh drawn faces: the ceiling": (images, captions),
            "the same, each with another's caption: chance": (images, captions[1:] + captions[:1])} | sets
    print(f"\n## As told, {size}x{size}\n\n{machine(args.device)}; captions held out of training")
    rows = []
    for name, (images, captions) in sets.items():
        right = as_told(images, captions)
        right["all four"] = np.all(list(right.values()), 0)
        rows.append([*(f"{100 * r.mean():.1f} %" for r in right.values()), f"{quality(images)['frechet']:.2f}",
                     str(len(images)), name])
    table(["background", "fur", "eyes", "species", "all four", "Fréchet", "N", "images"], rows)


# -----------------------------------------------------------------------------
# Part plane: the swiss roll of KAIST CS492(D), assignment 1: no noise, 3 x 128 units, batch 128, 5,000 steps, judged by
# the Chamfer distance of 2,048 points. Full marks there: under 20 with DDPM, under 40 with 50 steps of DDIM.


def part_plane(args):
    ddpm_2d.show, rows = lambda *a: None, []
    protocol = "--noise 0 --width 128 --depth 3 --batch_size 128 --steps 5000".split()
    cases = {"default": [], "without Fourier features": ["--features", "0"]}
    for name, flags in cases.items():
        found, times = {("ddpm", 1000): [], ("ddim", 50): []}, []
        for seed in range(5):
            with tempfile.TemporaryDirectory() as out:
                ddpm_2d.main([*protocol, *flags, "--seed", str(seed), "--out", out])
                log = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
                times.append(log[-2]["seconds"])
                tensors, about = ddpm_2d.load_safetensors(f"{out}/model.safetensors")
                settings = argparse.Namespace(**json.loads(about["args"]))
                model = ddpm_2d.MLP(settings.width, settings.depth, settings.features)
                model.load_state_dict(tensors)
                target, alpha_bar = ddpm_2d.Target(settings.data, 0, "cpu"), ddpm_2d.make_alpha_bar(settings.schedule)
                for k in range(3):
                    test = target.points(np.random.default_rng((seed, k)), 2048)
                    for sampler, steps in found:
                        x = ddpm_2d.draw(model, settings.pred, 2048, settings, alpha_bar, 100 * seed + k,
                                         sampler=sampler, steps=steps)
                        found[sampler, steps].append(ddpm_2d.chamfer(x.numpy(), test))
        for (sampler, steps), values in found.items():
            rows.append([name, f"{sampler}, {steps} steps", f"{statistics.mean(values):.1f}", f"{max(values):.1f}",
                         f"{statistics.mean(times):.1f} s"])
    floor = [ddpm_2d.chamfer(*(target.points(np.random.default_rng((k, i)), 2048) for i in (0, 1))) for k in range(15)]
    rows.append(["true points", "-", f"{statistics.mean(floor):.1f}", f"{max(floor):.1f}", "-"])
    print(f"\n## Swiss roll\n\n{machine('cpu')}; Chamfer distance over 5 seeds x 3 draws; time to train")
    table(["ddpm_2d.py", "sampler", "mean", "worst", "trained in"], rows)



# -----------------------------------------------------------------------------
# Part flow: eight Gaussians to two moons as hkchengrex/C2OT (2503.10636) measures them: 20,000 steps of 256 points, and
# the squared 2-Wasserstein distance, without a root, of 10,000 points, sampled adaptively and with one step of Euler.
# Published there, mean of 10 runs: OT 0.050 and 0.072, independent coupling 0.120 and 6.232.


class Moons:
    """C2OT's points, which are torchcfm's: a strip one way of each moon, and Gaussians of variance sqrt(0.1). Each of
    its batches is an even grid of the moons; here all points together are, so that a batch is a random draw."""

    def __init__(self, data, noise=None, device=None):
        self.data = data

    def points(self, rng, n):
        if self.data == "8gaussians":
            turn = np.pi / 4 * rng.integers(0, 8, n)
            return (5 * np.stack([np.cos(turn), np.sin(turn)], 1)
                    + 0.1 ** 0.25 * rng.standard_normal((n, 2))).astype(np.float32)
        turn = np.linspace(0, np.pi, n // 2)
        x = np.concatenate([np.stack([np.cos(turn), np.sin(turn)], 1),
                            np.stack([1 - np.cos(turn), 0.5 - np.sin(turn)], 1)])
        return ((x + 0.2 * rng.random((n, 1))) * 3 - 1).astype(np.float32)[rng.permutation(n)]


def squared_w2(a, b):
    """cfm_2d.wasserstein squared, by POT: SciPy takes a quarter of an hour for 10,000 points that lie far apart."""
    import ot
    return float(ot.emd2([], [], ot.dist(a.astype(float), b.astype(float)), numItermax=10 ** 8))


def flow_run(coupling, seed, n, *flags):
    """-> squared W2 of n points, adaptive and with one Euler step; NFE of the first; seconds without the measuring."""
    began = time.time()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        argv = ["--source", "8gaussians", "--data", "moons", "--coupling", coupling, "--seed", str(seed), "--out", out,
                "--batch_size", "256", *flags]
        if cfm_2d.main(argv):
            raise SystemExit(f"cfm_2d.py {' '.join(argv)} failed")
        seconds, args = time.time() - began, cfm_2d.parse_args(argv)
        model = cfm_2d.load_model(f"{out}/model.safetensors", args, "cpu")
    rng = np.random.default_rng((seed, 1))
    x1, test = torch.from_numpy(Moons("8gaussians").points(rng, n)), Moons("moons").points(rng, n)
    adaptive, nfe = cfm_2d.sample(model, x1, "dopri5", 1)
    euler, _ = cfm_2d.sample(model, x1, "euler", 1)
    return squared_w2(adaptive.numpy(), test), squared_w2(euler.numpy(), test), nfe, seconds


def torchcfm_run(seed, n, steps):
    """torchcfm's example: its MLP, its exact OT by POT for each batch of 256, Adam 1e-3; the same figures."""
    from torchcfm.conditional_flow_matching import ExactOptimalTransportConditionalFlowMatcher
    from torchcfm.models.models import MLP
    torch.manual_seed(seed)
    began, rng, data = time.time(), np.random.default_rng(seed), (Moons("8gaussians"), Moons("moons"))
    model, matcher = MLP(dim=2, time_varying=True), ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
    opt = torch.optim.Adam(model.parameters())
    for _ in range(steps):
        opt.zero_grad()
        t, xt, u = matcher.sample_location_and_conditional_flow(*(torch.from_numpy(x.points(rng, 256)) for x in data))
        F.mse_loss(model(torch.cat([xt, t[:, None]], 1)), u).backward()
        opt.step()
    seconds, rng = time.time() - began, np.random.default_rng((seed, 1))
    x1, test = torch.from_numpy(data[0].points(rng, n)), data[1].points(rng, n)
    field = lambda x, t: -model(torch.cat([x, 1 - t[:, None]], 1))  # its time runs the other way
    adaptive, nfe = cfm_2d.sample(field, x1, "dopri5", 1)
    euler, _ = cfm_2d.sample(field, x1, "euler", 1)
    return squared_w2(adaptive.numpy(), test), squared_w2(euler.numpy(), test), nfe, seconds


FLOWS = [("OT", "ot"), ("OT, 1,024 points at a time", "ot", "--coupling_size", "1024"), ("independent", "independent")]


def part_flow(args):
    cfm_2d.Target, cfm_2d.report, cfm_2d.show = Moons, lambda *a: {}, lambda *a: None
    torch.set_num_threads(1)  # steps this small gain nothing from a second one, for either
    print(f"\n## Eight Gaussians to two moons\n\n{machine('cpu')}")

    def spread(values, digits=4):
        return f"{statistics.mean(values):.{digits}f} +- {statistics.pstdev(values):.{digits}f}"
    rows = []
    for name, coupling, *flags in FLOWS:
        found = [flow_run(coupling, seed, 10_000, "--steps", "20000", *flags) for seed in range(args.seeds)]
        w2, euler, nfe, seconds = zip(*found)
        rows.append([name, spread(w2), spread(euler), spread(nfe, 0), spread(seconds, 0)])
        print(*rows[-1], flush=True)
    fresh = [Moons("moons").points(np.random.default_rng(i), 10_000) for i in (0, 1)]
    rows.append(["true points", f"{squared_w2(*fresh):.4f}", "-", "-", "-"])
    table([f"cfm_2d.py, {args.seeds} seeds", "adaptive", "one Euler step", "NFE", "seconds"], rows)

    rows, goal, first = [], 0.05, {}
    for who in ("cfm_2d.py", "torchcfm"):
        for steps in (125, 250, 500, 1000, 2000, 4000, 8000, 16000):
            found = [torchcfm_run(seed, 4000, steps) if who == "torchcfm" else
                     flow_run("ot", seed, 4000, "--steps", str(steps), "--ema_decay", "0.99", "--coupling_size", "256")
                     for seed in range(3)]
            w2, _, _, seconds = (statistics.mean(v) for v in zip(*found))
            rows.append([who, str(steps), f"{w2:.4f}", f"{seconds:.1f}"])
            if w2 < goal:
                first[who] = seconds
                break
    table(["", "steps", "adaptive, 4,000 points", "seconds"], rows)
    if "cfm_2d.py" in first:
        late = "" if "torchcfm" in first else "more than "  # then it did not get there at all
        ratio = first.get("torchcfm", seconds) / first["cfm_2d.py"]
        print(f"{goal} is reached {late}{ratio:.1f} times sooner by cfm_2d.py")


# -----------------------------------------------------------------------------
# Part fid: two folders of drawn faces, 64x64 PNG files, to a FID; the same random Inception weights for all. Each tool
# in a fresh process, with its own reading, resizing, batch size and distance, after its imports. clean-fid's own network
# is a download, so it gets pytorch-fid's. Then the distances alone, on the same features.


def random_inception(path):
    """Inception weights as He et al. draw them, in a file that all the tools can read."""
    g = torch.Generator().manual_seed(0)
    state = fid.Inception().state_dict()
    for name, tensor in state.items():
        if tensor.ndim >= 2:
            state[name] = torch.randn(tensor.shape, generator=g) * (2 / tensor[0].numel()) ** 0.5
    torch.save(state, path)


def fid_run(tool, mode, weights, real, generated):
    """-> FID, seconds, peak of the resident set in GiB."""
    torch.set_num_threads(THREADS)
    multiprocessing.set_start_method("fork", force=True)  # as everywhere on Linux; this process has inherited "spawn"
    if tool == "fid.py":
        def work():
            out, flags = io.StringIO(), ["--weights", weights, "--mode", mode, "--metrics", "fid", "--json"]
            with contextlib.redirect_stdout(out):
                assert fid.main([real, generated, *flags]) == 0
            return json.loads(out.getvalue())["fid"]
    elif tool == "torch-fidelity":
        import torch_fidelity

        def work():
            return torch_fidelity.calculate_metrics(
                input1=generated, input2=real, cuda=torch.cuda.is_available(), fid=True, cache=False, verbose=False,
                feature_extractor_weights_path=weights)["frechet_inception_distance"]
    else:
        from unittest import mock
        import pytorch_fid.inception
        from pytorch_fid.fid_score import calculate_fid_given_paths
        import cleanfid.fid
        device, workers = "cuda" if torch.cuda.is_available() else "cpu", min(8, os.cpu_count())
        state = torch.load(weights, weights_only=True)

        def work():
            with mock.patch.object(pytorch_fid.inception, "load_state_dict_from_url", lambda *a, **k: state):
                if tool == "pytorch-fid":
                    return calculate_fid_given_paths([real, generated], 50, device, 2048, workers)
                net = pytorch_fid.inception.InceptionV3([3], resize_input=False, normalize_input=False)
            net = net.to(device).eval()
            found = [cleanfid.fid.get_folder_features(
                folder, lambda x: net((x - 128) / 128)[0][:, :, 0, 0], workers, batch_size=32,
                device=torch.device(device), mode="clean", verbose=False) for folder in (real, generated)]
            return float(cleanfid.fid.fid_from_feats(*found[::-1]))
    began = time.perf_counter()
    value = work()
    status = Path("/proc/self/status")
    peak = int(status.read_text().split("VmHWM:")[1].split()[0]) / 2 ** 20 if status.exists() else math.nan
    return value, time.perf_counter() - began, peak


def part_fid(args):
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    rows, n = [], args.fid_n
    with tempfile.TemporaryDirectory() as folder:
        weights, sets = f"{folder}/random.pth", [f"{folder}/real", f"{folder}/generated"]
        random_inception(weights)
        for seed, path in enumerate(sets):
            os.mkdir(path)
            for i, picture in enumerate(draw_faces(seed, n, 64)[0]):
                picture = picture if seed == 0 else 255 - picture  # or the distance is lost in rounding
                Image.fromarray(picture).save(f"{path}/{i:05d}.png")
        for peer, mode in zip(("torch-fidelity", "pytorch-fid", "clean-fid"), fid.MODES):
            found = {}
            for tool in ("fid.py", peer):
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                    found[tool] = fresh.submit(fid_run, tool, mode, weights, *sets).result()
            (ours, a, room), (theirs, b, more) = found["fid.py"], found[peer]
            print(found, file=sys.stderr, flush=True)
            rows.append([f"{b / a:.2f}", f"{room / more:.2f}", f"{abs(ours / theirs - 1):.0e}",
                         f"{mode}: {ours:.6g}, {a:.0f} s, {2 * n / a:.1f} images/s, {room:.2f} GiB",
                         f"{peer}: {theirs:.6g}, {b:.0f} s, {more:.2f} GiB"])
    print(f"\n## FID of two folders with {n:,} images each\n\n{machine(args.device)}")
    table(["speed, ours / peer", "memory, ours / peer", "relative difference", "fid.py", "the peer"], rows)

    g, rows = torch.Generator().manual_seed(0), []
    mix = torch.randn(2048, 2048, generator=g) / 45 * torch.logspace(0, -3, 2048)
    x, y = (torch.randn(10_000, 2048, generator=g) @ mix + shift for shift in (0, 0.01))
    stats = [(f.double().mean(0).numpy(), np.cov(f.numpy(), rowvar=False)) for f in (x, y)]
    tensors = [(torch.from_numpy(mu), torch.from_numpy(sigma)) for mu, sigma in stats]
    works = {"fid.py": lambda: fid.frechet_distance(*(v for mu, s in tensors for v in (mu, fid.factor(s)))),
             "pytorch-fid, clean-fid (scipy.linalg.sqrtm)": lambda: calculate_frechet_distance(*stats[0], *stats[1]),
             "torch-fidelity (eigvals)": lambda: fid_statistics_to_metric(
                 *(dict(mu=mu, sigma=s) for mu, s in stats), False)["frechet_inception_distance"]}
    times, values = {name: [] for name in works}, {}
    for _ in range(3):
        for name, work in works.items():
            began = time.perf_counter()
            values[name] = float(work())
            times[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(took) for name, took in times.items()}
    for name, took in middle.items():
        rows.append([name, f"{took:.2f} s", f"{took / middle['fid.py']:.1f}",
                     f"{abs(values[name] / values['fid.py'] - 1):.0e}"])
    for name, work in (("KID, 100 subsets of 1,000", lambda: fid.kid(x, y)),
                       ("precision and recall", lambda: fid.precision_recall(x, y))):
        rows.append([f"fid.py, {name}", f"{seconds(work, 'cpu'):.1f} s", "", ""])
    print("## The distances alone, 10,000 x 2048 features, on the CPU\n")
    table(["what", "time", "times ours", "relative difference"], rows)


# -----------------------------------------------------------------------------
# Part dit: a training step of latent_dit.py beside diffusers' DiT of the same width, depth, heads and tokens; then its
# cost by tokens, and by processes. Noise and t, forward, backward, clipping, fused AdamW, EMA; random latents.

DIT_CASES = {"cpu": [("tiny", 1, 8, 8, 64), ("S", 2, 4, 32, 8)], "cuda": [("B", 2, 4, 32, 256), ("XL", 2, 4, 32, 128)]}


def dit_step(who, size, patch, C, side, B, setting, device):
    """-> a function that does one training step, and the parameters."""
    torch.manual_seed(0)
    depth, D, heads = latent_dit.SIZES[size]
    if who == "ours":
        model = latent_dit.DiT(C, patch, size, 1000).to(device)
        call = model
    else:
        from diffusers import DiTTransformer2DModel
        model = DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=D // heads, in_channels=C, out_channels=C, num_layers=depth,
            sample_size=side, patch_size=patch, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
            norm_elementwise_affine=False, norm_eps=1e-5).to(device)

        def call(zt, t, y):
            return model(zt, timestep=1000 * t, class_labels=y).sample
    ema = copy.deepcopy(model).requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    if device == "cuda":
        model.compile()

    def step():
        z0, eps = torch.randn(2, B, C, side, side, device=device)
        t, y = torch.rand(B, device=device), torch.randint(0, 1000, (B,), device=device)
        with torch.autocast(device, torch.bfloat16, enabled=setting == "bf16"):
            loss = latent_dit.loss_fn(call, z0, eps, t, y).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        latent_dit.update_ema(ema, model, 0.999)
    return step, count(model), 3 * latent_dit.DiT.flops(model, side, side) * B if who == "ours" else None


def part_dit(args):
    rows, device = [], args.device
    peak = latent_dit.peak_flops(torch.device(device)) if device == "cuda" else None
    for size, patch, C, side, B in DIT_CASES[device]:
        for setting in ("fp32", "bf16") if device == "cpu" else ("bf16",):
            steps = {who: dit_step(who, size, patch, C, side, B, setting, device) for who in ("ours", "diffusers")}
            times = {who: [] for who in steps}
            for who, (step, *_) in steps.items():
                seconds(step, device, 2)
            for _ in range(args.rounds):
                for who, (step, *_) in steps.items():
                    times[who].append(seconds(step, device))
            middle = {who: statistics.median(took) for who, took in times.items()}
            ratios, flops = [b / a for a, b in zip(times["ours"], times["diffusers"])], steps["ours"][2]
            rows.append([f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                         f"{size}/{patch}, {(side // patch) ** 2} tokens, batch {B}, {setting}",
                         *(f"{B / middle[who]:.1f} images/s, {steps[who][1] / 1e6:.1f}M parameters" for who in steps),
                         f"{flops / middle['ours'] / 1e12:.2f} TFLOP/s"
                         + (f", MFU {100 * flops / middle['ours'] / peak:.0f} %" if peak else "")])
    print(f"\n## Training step of a diffusion transformer\n\n{machine(device)}; medians (and range) of {args.rounds} "
          "alternating rounds")
    table(["speed, ours / diffusers", "model", "latent_dit.py", "diffusers", "arithmetic of ours"], rows)
    rows = []
    for side in (32, 64, 128):
        step, _, flops = dit_step("ours", "S", 2, 4, side, 1, "bf16", device)
        seconds(step, device)
        took = statistics.median(seconds(step, device) for _ in range(3))
        rows.append([f"{(side // 2) ** 2:,}", f"{took:.2f} s", f"{flops / 1e12:.2f} TFLOP",
                     f"{flops / took / 1e12:.2f} TFLOP/s"])
    print("## A step of DiT-S/2 by tokens, one image, bf16\n")
    table(["tokens", "time", "work", "speed"], rows)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        script = Path(__file__).resolve().parent.parent / "latent_dit.py"
        flags = ["--preset", "cpu", "--vae", "none", "--size", "64", "--patch_size", "8", "--steps", "60",
                 "--eval_every", "60", "--sample_steps", "1", "--device", device]
        for n in (1, 2):
            env = os.environ | {"OMP_NUM_THREADS": str(max(1, THREADS // n))}
            subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", str(script), *flags,
                            "--out", f"{folder}/{n}"], check=True, cwd=folder, env=env, capture_output=True)
            records = [json.loads(line) for line in Path(folder, str(n), "log.jsonl").read_text().splitlines()]
            speed = statistics.median(r["img_per_s"] for r in records[2:] if "img_per_s" in r)
            rows.append([str(n), f"{speed:.0f} images/s"])
    print(f"## By processes (gloo on a CPU; {THREADS} threads in all), the cpu preset's transformer on pixels\n")
    table(["processes", "speed"], rows)


# -----------------------------------------------------------------------------
# Part lora: a training step beside diffusers with peft, on a CPU with small networks of the same make, on a GPU with
# those of SD 1.5, SDXL and FLUX.1-dev, all of random weights; and how well a model knows what it was taught.

PEER = "diffusers + peft"
SD = dict(in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=32, cross_attention_dim=768,
          attention_head_dim=8, down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
          up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
XL = dict(in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=32, cross_attention_dim=2048,
          attention_head_dim=[5, 10, 20], transformer_layers_per_block=[1, 2, 10], use_linear_projection=True,
          down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
          up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], addition_embed_type="text_time",
          addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, block_out_channels=[320, 640, 1280])
FLUX = dict(in_channels=64, joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
            axes_dims_rope=(16, 56, 56), attention_head_dim=128)
LORA_CASES = {  # name: configuration, side of the latents, batch, tokens of text, kinds of frozen weights
    "cpu": {"UNet, a fifth as wide as SD 1.5's": (SD | dict(block_out_channels=[64, 128, 256, 256]), 32, 2, 77,
                                                 ("fp32", "bf16", "int8", "nf4")),
            "FLUX, 2 + 4 blocks of width 512": (FLUX | dict(num_layers=2, num_single_layers=4, num_attention_heads=4),
                                                32, 1, 128, ("fp32", "bf16", "int8", "nf4"))},
    "cuda": {"SD 1.5, 512 pixels": (SD | dict(block_out_channels=[320, 640, 1280, 1280]), 64, 1, 77, ("bf16",)),
             "SDXL, 1024 pixels": (XL, 128, 1, 77, ("bf16", "nf4")),
             "FLUX.1-dev, 512 pixels": (FLUX | dict(num_layers=19, num_single_layers=38, num_attention_heads=24), 64, 1,
                                        512, ("bf16", "int8", "nf4")),
             "FLUX.1-dev, 1024 pixels": (FLUX | dict(num_layers=19, num_single_layers=38, num_attention_heads=24), 128,
                                         1, 512, ("bf16", "int8", "nf4"))}}


def lora_step(who, name, weights, device):
    """-> a training step of a LoRA of rank 16 in all attention, with recomputed activations on a GPU; the network."""
    config, side, B, L, _ = LORA_CASES[device][name]
    flux, dtype = "num_single_layers" in config, torch.float32 if weights == "fp32" else torch.bfloat16
    C, again, g = 16 if flux else 4, device == "cuda", torch.Generator(device).manual_seed(0)
    torch.manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, device=device)
    text = [normal(B, L, config["joint_attention_dim" if flux else "cross_attention_dim"]).to(dtype)]
    if flux:
        text += [normal(B, 768).to(dtype), torch.ones(B, device=device)]
    elif "addition_time_embed_dim" in config:
        text += [normal(B, 1280).to(dtype), torch.full((B, 6), 1024.0, device=device)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        if who == PEER:
            import diffusers
            model = diffusers.FluxTransformer2DModel(**config) if flux else diffusers.UNet2DConditionModel(**config)
        else:
            model = (finetune_lora.Flux if flux else finetune_lora.SDUNet)(config)
    torch.set_default_dtype(before)
    model.requires_grad_(False).train()
    if who == PEER:
        from diffusers.training_utils import cast_training_params, compute_snr
        from peft import LoraConfig
        model.add_adapter(LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=[
            "to_q", "to_k", "to_v", "to_out.0", *["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"] * flux]))
        cast_training_params(model)
        if again:
            model.enable_gradient_checkpointing()
        params, noising = [p for p in model.parameters() if p.requires_grad], diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        n = side // 2
        ids = diffusers.FluxPipeline._prepare_latent_image_ids(B, n, n, device, dtype)

        def loss_of(z0, eps):
            if flux:
                t = torch.sigmoid(torch.randn(B, device=device))
                zt = (1 - t.view(-1, 1, 1, 1)) * z0 + t.view(-1, 1, 1, 1) * eps
                out = model(diffusers.FluxPipeline._pack_latents(zt, B, C, side, side), text[0], text[1], t, ids,
                            torch.zeros(L, 3, device=device), text[2]).sample
                return (diffusers.FluxPipeline._unpack_latents(out, 8 * side, 8 * side, 8) - (eps - z0)).square().mean()
            t = torch.randint(0, 1000, (B,), device=device)
            more = dict(text_embeds=text[1], time_ids=text[2]) if len(text) > 1 else None
            out = model(noising.add_noise(z0, eps, t), t, text[0], added_cond_kwargs=more).sample
            snr = compute_snr(noising, t)
            return ((out - eps).square().mean((1, 2, 3)) * snr.clamp(max=5) / snr).mean()
    else:
        base = object.__new__(finetune_lora.FluxBase if flux else finetune_lora.StableDiffusion)
        base.model, base.device, base.live, base.shift, base.v_prediction = model, torch.device(device), False, 1, False
        base.parts = {base.trained: model}
        base.args = finetune_lora.parse_args(["--rank", "16"])
        base.alpha_bar = finetune_lora.alpha_bar_of(dict(
            num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
        model.grad_checkpoint = again
        for path, layer in list(model.named_modules()) if weights in ("int8", "nf4") else ():
            if isinstance(layer, nn.Linear) and "blocks" in path:
                setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2],
                        finetune_lora.Quantised(layer, weights))
        names = dict.fromkeys(finetune_lora.target_layers(base, ["attn"]))
        made = finetune_lora.attach(base, names, base.args, [base.trained])
        params = [p for lora in made.values() for p in lora.parameters()]

        def loss_of(z0, eps):
            return base.loss(z0, eps, base.times(B, torch.default_generator), text).mean()
    opt = torch.optim.AdamW(params, 1e-4, fused=True)

    def step():
        z0, eps = torch.randn(2, B, C, side, side, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=weights != "fp32"):
            loss = loss_of(z0, eps)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        opt.step()
        opt.zero_grad()
    return step, model, sum(p.numel() for p in params)


def pandas_as_told(pictures, captions):
    """uint8 (N, S, S, 3) and captions of drawn_pandas() -> {ears, fur, eyes, background: (N,), whether they are as
    those of a panda that the caption tells of}. Ears are black; only pandas of all animals have such."""
    ink, white, drop = (44, 32, 44), (255, 255, 255), finetune_lora.TRAITS["panda"]["drop"]
    eyes, background = np.array([re.search(r"with (\w+) eyes on a (\w+)", c).groups() for c in captions]).T
    around = np.concatenate([patch(pictures, x, drop - .06, .34, .38) for x in (-.3, .3)], 1)
    corners = np.concatenate([patch(pictures, x, -.93, .14, .14) for x in (-.93, .93)], 1)
    ears = [most_seen(patch(pictures, x, drop - .54, .32, .32), {"ink": ink, "fur": d.FURS["white"]},
                      [*d.BACKGROUNDS.values(), (246, 132, 150)]) == "ink" for x in (-.54, .54)]
    return dict(ears=ears[0] & ears[1], fur=most_seen(patch(pictures, 0, drop - .08, .24, .26), d.FURS) == "white",
                eyes=most_seen(around, d.EYES, [*d.FURS.values(), ink, white, (150, 135, 140)]) == eyes,
                background=most_seen(corners, d.BACKGROUNDS) == background)


def lora_quality(base, lora):
    """How often 48 pandas that the LoRA was never shown are as told, and what the base can draw still is."""
    def drawn(prompts, n, files):
        with tempfile.TemporaryDirectory() as out:
            Path(out, "prompts.txt").write_text("\n".join(prompts))
            flags = dict(base=base, sample=n, prompt=f"{out}/prompts.txt") | (dict(lora=lora) if files else {})
            return generated("finetune_lora.py", out, **flags)

    def row(told, n):
        whole = np.logical_and.reduce(list(told.values()))
        return [f"{100 * v.mean():.1f} %" for v in (*told.values(), whole)] + [str(n)]
    pictures, captions = finetune_lora.drawn_pandas(64)
    held = [texts[0] for texts in captions[12:]]
    others = json.loads(finetune_lora.load_safetensors(base)[1]["data"])["prompts"]
    others = others[finetune_lora.PRESETS["text2img"]["class_images"]:]          # the first ones train along
    rows = [row(pandas_as_told(np.stack(pictures), [texts[0] for texts in captions]), 24) + ["drawn pandas"]]
    kept = []
    for files, name in ((False, "the base"), (True, "with the LoRA")):
        told = [held[i % len(held)] for i in range(48)]
        rows.append(row(pandas_as_told(drawn(held, 48, files), told), 48) + [name])
        kept.append(row(as_told(drawn(others, len(others), files), others), len(others)) + [name])
    print("## What a LoRA has learnt: pandas, by prompts that training never had\n")
    table(["black ears", "fur", "eyes", "background", "all", "N", "pictures"], rows)
    print("## And what is left: other animals, by prompts that no training had\n")
    table(["background", "fur", "eyes", "species", "all", "N", "pictures"], kept)


def part_lora(args):
    rows, device = [], args.device
    base, lora = Path("out/text2img/model.safetensors"), Path("out/finetune_lora/lora.safetensors")
    if base.exists() and lora.exists():
        lora_quality(base, lora)
    for name, (*_, kinds) in LORA_CASES[device].items():
        for weights in kinds:
            whos = ["ours"] + [PEER] * (weights in ("fp32", "bf16"))
            times, used, trained = {who: [] for who in whos}, {}, {}
            if device == "cpu":  # on a GPU one at a time, or they would not fit
                steps = {who: lora_step(who, name, weights, device) for who in whos}
                for _ in range(args.rounds + 1):
                    for who in whos:
                        times[who].append(seconds(steps[who][0], device))
                trained = {who: steps[who][2] for who in whos}
                del steps
            for who in whos:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                    used[who] = fresh.submit(memory, lora_step, who, name, weights, device).result()
            if device == "cuda":
                for who in whos:
                    step, _, trained[who] = lora_step(who, name, weights, device)
                    times[who] = [seconds(step, device) for _ in range(args.rounds + 1)]
                    del step
                    torch.cuda.empty_cache()
            middle = {who: statistics.median(times[who][1:]) for who in whos}
            both = len(whos) > 1
            rows.append([f"{middle[PEER] / middle['ours']:.2f}" if both else "", f"{used['ours'] / used[PEER]:.2f}"
                         if both else "", f"{name}, {weights}",
                         *(f"{middle[who]:.2f} s, {used[who]:.2f} GiB; {trained[who] / 1e6:.2f}M trained" for who in whos)]
                        + [""] * (not both))
    print(f"\n## Training step of a LoRA, rank 16, all attention\n\n{machine(device)}; medians of {args.rounds} rounds")
    table(["speed, ours / peer", "memory, ours / peer", "network", "finetune_lora.py", PEER], rows)
    rows = []
    for name in LORA_CASES["cpu"]:
        _, whole, _ = lora_step("ours", name, "fp32", "cpu")
        for kind in ("int8", "nf4"):
            errors = {path: (((finetune_lora.Quantised(layer, kind).unpack(torch.float32) - layer.weight).norm()
                              / layer.weight.norm()).item()) for path, layer in whole.named_modules()
                      if isinstance(layer, nn.Linear) and "blocks" in path and "loras" not in path}
            worst = max(errors, key=errors.get)
            rows.append([name, kind, str(len(errors)), f"{100 * statistics.mean(errors.values()):.2f} %",
                         f"{100 * errors[worst]:.2f} % ({worst})"])
    print("## What 8 and 4 bits lose of the weights, by layer: |difference| / |weight|\n")
    table(["network", "bits", "layers", "mean", "worst"], rows)


# -----------------------------------------------------------------------------
# Part serve: how many pictures clients get of a server, and how long they wait, with continuous batching and without.


PROMPTS = ["a gray cat with green eyes on a blue background", "an orange fox with amber eyes on a pink background",
           "a white rabbit", "a brown bear with blue eyes on a teal background"]


class Clients:
    """A server of its own process, and threads that ask it for pictures, each for the next when it has one."""

    def __init__(self, ckpt, device, *flags):
        command = [sys.executable, conftest.ROOT / "serve.py", "--ckpt", ckpt, "--port", "0", "--device", device, *flags]
        began = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        ready = json.loads(self.process.stdout.readline())
        self.port, self.seconds_to_ready = int(ready["url"].rpartition(":")[2]), time.perf_counter() - began
        self.lines = collections.deque(maxlen=1000)
        threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait()

    def ask(self, connection, **body):
        """-> seconds and the answer, or None where the server had no room."""
        began = time.perf_counter()
        connection.request("POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status not in (200, 429):
            raise RuntimeError(f"the server answers {answer.status}")
        return (time.perf_counter() - began, content) if answer.status == 200 else None

    def load(self, clients, total, prompts=PROMPTS, pictures=None, **body):
        """`clients` at the same time, until there are `total` pictures -> seconds of each, images a second. pictures: a
        dict that takes them, by number."""
        took, numbers, lock, began = [], iter(range(total)), threading.Lock(), time.perf_counter()

        def work():
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                prompt = prompts[number % len(prompts)]
                while (answer := self.ask(connection, prompt=prompt, seed=number, **body)) is None:
                    time.sleep(0.05)
                took.append(answer[0])
                if pictures is not None:
                    picture = base64.b64decode(json.loads(answer[1])["data"][0]["b64_json"])
                    pictures[number] = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
        threads = [threading.Thread(target=work) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(took), len(took) / (time.perf_counter() - began)

    def resident(self):
        return int(Path(f"/proc/{self.process.pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1024



def serve_load(args, ckpt):
    """Closed loops of clients: each asks for its next picture when it has one."""
    rows, told, found = [], dict(num_inference_steps=20), {}
    for name, batch in (("together", "16"), ("one by one", "1")):
        with Clients(ckpt, args.device, "--max_batch", batch, "--max_queue", "256") as server:
            server.load(1, 3, **told)
            for clients in (1, 4, 16, 64):
                found[name, clients] = server.load(clients, max(48, 4 * clients), **told)
    for clients in (1, 4, 16, 64):
        (took, speed), (took1, speed1) = found["together", clients], found["one by one", clients]
        rows.append([f"{speed / speed1:.2f}", str(clients), *(f"{v:.1f}" for v in (speed, speed1)),
                     *(f"{t[int(q * (len(t) - 1))]:.2f} s" for t in (took, took1) for q in (0.5, 0.99))])
    print(f"## A server under load: {ckpt}, 20 guided steps\n\n{machine(args.device)}")
    table(["speed, together / one by one", "clients", "images/s together", "one by one", "p50 together", "p99 together",
           "p50 one by one", "p99 one by one"], rows)


def serve_costs(args, ckpt):
    """What a server adds to the work itself, and whether its memory grows."""
    with Clients(ckpt, args.device) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        model = serve.open_model(serve.parse_args(["--ckpt", str(ckpt), "--device", args.device]))
        asked = dict(prompt=PROMPTS[0], negative_prompt="", output_format="png")
        alone, through = [], []
        for _ in range(60):  # not in turns: the threads of the one go on spinning for a moment while the other works
            through.append(server.ask(connection, prompt=PROMPTS[0], seed=0, guidance_scale=1, num_inference_steps=1)[0])
        for _ in range(60):
            began = time.perf_counter()
            picture = serve.Picture(serve.Job(asked, 1.0, ()), 0, 0, model.shape(model.size, model.size), [1.0, 0.0], ())
            model.join(picture)
            serve.step(model, [picture])
            serve.encode(model.decode(picture.z), asked)
            alone.append(time.perf_counter() - began)
        extra = 1000 * (statistics.median(through) - statistics.median(alone))
        began, before, n = time.perf_counter(), [], 0
        while time.perf_counter() - began < args.soak:
            _, speed = server.load(8, 200, num_inference_steps=4, n=2)
            before, n = [*before, server.resident()], n + 400
        print("## What a server adds\n")
        table(["start to ready", "a request of one step, over the same without a server", "pictures in the soak", "seconds",
               "resident after its first, its middle, its last round"], [[
                   f"{server.seconds_to_ready:.1f} s", f"{extra:.1f} ms", str(n), f"{time.perf_counter() - began:.0f}",
                   ", ".join(f"{before[int(k * (len(before) - 1))]:.0f} MB" for k in (0, 0.5, 1))]])


def random_stable_diffusion(folder, device):
    """Stable Diffusion 1.5 with random weights, on a CPU a fifth as wide, into `folder` -> diffusers' pipeline of it."""
    import diffusers
    from test_text2img import write_vocabulary
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    torch.manual_seed(0)
    vocab, wide = write_vocabulary(folder / "words"), 5 if device == "cuda" else 1
    text = CLIPTextConfig(vocab_size=vocab, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                          num_attention_heads=12, projection_dim=768, bos_token_id=0, eos_token_id=2, pad_token_id=1)
    pipe = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(**SD, block_out_channels=[64 * wide, 128 * wide, 256 * wide, 256 * wide]),
        vae=diffusers.AutoencoderKL(
            latent_channels=4, layers_per_block=2, norm_num_groups=32, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512] if device == "cuda" else [32, 64, 128, 128]),
        text_encoder=CLIPTextModel(text), tokenizer=CLIPTokenizer.from_pretrained(folder / "words"), safety_checker=None,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"),
        feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder / "sd")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / "words" / name, folder / "sd/tokenizer")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, torch.bfloat16) if device == "cuda" else pipe


def serve_pipeline(args):
    """Pictures a second of the server, and of diffusers' pipeline in a loop, as the simplest server would call it."""
    side, steps = (512, 30) if args.device == "cuda" else (256, 10)
    told, speeds = dict(size=f"{side}x{side}", num_inference_steps=steps), collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        pipe = random_stable_diffusion(Path(folder), args.device)

        def call(prompts):
            pipe(prompts, num_inference_steps=steps, guidance_scale=7.5, height=side, width=side)
        with Clients(Path(folder, "sd"), args.device, *["--compile"] * (args.device == "cuda")) as server:
            server.load(16, 16, **told)
            call(PROMPTS[:1])
            for _ in range(min(3, args.rounds)):  # in turns
                for clients in (1, 16):
                    speeds[clients].append(server.load(clients, max(4, clients), **told)[1])
                took = seconds(lambda: call(PROMPTS[:1]), args.device, 4)
                speeds["one by one"].append(1 / took)
                speeds["16 in one call"].append(16 / seconds(lambda: call(PROMPTS * 4), args.device))
    rows = []
    for clients, peer in ((1, "one by one"), (16, "one by one"), (16, "16 in one call")):
        ratios = [a / b for a, b in zip(speeds[clients], speeds[peer])]
        rows.append([f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", str(clients), peer,
                     *(f"{statistics.median(speeds[k]):.2f} images/s" for k in (clients, peer))])
    print(f"## Stable Diffusion 1.5{'' if args.device == 'cuda' else ', a fifth as wide'}, random weights, {side} pixels, "
          f"{steps} guided steps of DPM-Solver++\n\n{machine(args.device)}; medians (and range) of alternating rounds")
    table(["speed, ours / diffusers", "clients of serve.py", "diffusers' pipeline", "serve.py", "diffusers"], rows)


def serve_settings(args, ckpt):
    """What steps, arithmetic and batching cost and are worth: held-out captions, asked for by 16 clients."""
    captions = serve.read_model(ckpt, "text2img.py")[2]["prompts"]
    captions, rows, drawn = [captions[i % len(captions)] for i in range(200)], [], {}
    for dtype, batch, steps in [("fp32", 16, (20, 50, 10, 5, 3, 2, 1)), *((dtype, batch, (20,)) for dtype, batch in (
            ("bf16", 16), ("bf16", 1), ("fp32", 1)))]:
        with Clients(ckpt, args.device, "--dtype", dtype, "--max_batch", str(batch)) as server:
            server.load(1, 3, num_inference_steps=2)
            for n in steps:
                alone, _ = server.load(1, 8, num_inference_steps=n)
                pictures = {}
                _, speed = server.load(16, len(captions), captions, pictures, num_inference_steps=n)
                pictures = np.stack([pictures[i] for i in range(len(captions))])
                drawn[dtype, batch, n] = pictures.astype(int)
                other = drawn[dtype if batch == 1 else "fp32", 16, 20]
                right = np.all(list(as_told(pictures, captions).values()), 0)
                rows.append([str(n), dtype, str(batch), f"{100 * right.mean():.1f} %", f"{quality(pictures)['frechet']:.2f}",
                             f"{statistics.median(alone):.2f} s", f"{speed:.1f}",
                             f"{np.abs(drawn[dtype, batch, n] - other).max()}"])
    print(f"## What a served picture costs and is worth: {ckpt}\n\n{machine(args.device)}")
    table(["steps", "--dtype", "--max_batch", "as told", "Fréchet", "one client waits", "images/s, 16 clients",
           "largest difference (of 255) from 20 steps in fp32, of --max_batch 1 from that of 16"], rows)


def part_serve(args):
    serve_pipeline(args)
    ckpt = Path("out/text2img/model.safetensors")
    if ckpt.exists():
        serve_load(args, ckpt)
        serve_costs(args, ckpt)
        serve_settings(args, ckpt)
    else:
        print(f"## serve: there is no {ckpt}; python text2img.py makes it\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    parts = {"plane": part_plane, "flow": part_flow, "step": part_step, "quality": part_quality,
             "prompts": part_prompts, "nfe": part_nfe, "fid": part_fid,
             "dit": part_dit, "lora": part_lora, "serve": part_serve}
    p.add_argument("--parts", default=",".join(parts), help="which to run")
    p.add_argument("--rounds", type=int, default=5, help="step: rounds to take the median of")
    p.add_argument("--fid_n", type=int, default=1000, help="fid: images in each folder")
    p.add_argument("--seeds", type=int, default=10, help="flow: runs of each coupling")
    p.add_argument("--runs", nargs="+", default=[], metavar="FOLDER[:SAMPLER[:STEPS],...]",
                   help="quality, nfe: runs of ddpm_images.py and cfm_images.py; else those in out/")
    p.add_argument("--images", nargs="+", default=[], metavar="FOLDER", help="quality: folders of images")
    p.add_argument("--n", type=int, default=512, help="quality, nfe: images to sample")
    p.add_argument("--ckpt", nargs="+", default=[], help="prompts: model.safetensors files of text2img.py")
    p.add_argument("--scales", default="1,1.5,2,4", help="prompts: scales of the guidance, with commas between")
    p.add_argument("--soak", type=float, default=60, help="serve: seconds of load to watch the memory over")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    if set(args.parts.split(",")) - set(parts):
        p.error(f"--parts takes {', '.join(parts)}, with commas between")
    torch.set_num_threads(THREADS)
    os.environ["OMP_NUM_THREADS"] = str(THREADS)  # for the processes that it starts
    for name in args.parts.split(","):
        parts[name](args)


if __name__ == "__main__":
    main()
