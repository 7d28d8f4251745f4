"""Flow matching on images: a UNet learns the velocity that carries noise to images along straight lines.

    python cfm_images.py                       # animal faces that the script draws itself: no download, no GPU
    python cfm_images.py --data animal_faces   # the AFHQ photographs, downloaded once
    python cfm_images.py --data my_photos --class_cond --cfg_scale 2   # the sub-folders are the classes
    python cfm_images.py --resume              # go on after Ctrl-C as if it had never happened
    python cfm_images.py --sample 64 --sampler midpoint --sample_steps 8   # images by the model in --out
    torchrun --nproc_per_node=8 cfm_images.py --data animal_faces

Measured: 262 s on two cores (README). GPU: not yet.
Papers: flow matching 2210.02747, rectified flow 2209.03003, logit-normal times 2403.03206, x0 as output 2511.13720,
min-SNR 2303.09556, the UNet of ADM 2105.05233, classifier-free guidance 2207.12598, Heun as in EDM 2206.00364.
"""
import argparse
import copy
import glob
import inspect
import json
import math
import os
import signal
import sys
import time
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import distributed as dist, nn
from tqdm import tqdm

# -----------------------------------------------------------------------------
# The method. xt = (1 - t) x0 + t eps is a point on the straight line from an image x0 in [-1, 1] at t = 0 to noise eps
# at t = 1; its velocity there is eps - x0. Many lines cross at xt, so a network regressed on the velocity learns their
# mean. Sampling follows that mean from noise back to an image. (The libraries torchcfm, flow_matching write 1 - t, -v.)

T_MIN = 0.05  # v = (xt - x0) / t makes an error of x0 1 / t times as large: t counts as at least this


def add_noise(x0, eps, t):
    """The point of the line at time t, a number or one per image: 2209.03003 eq. 1."""
    return (1 - t) * x0 + t * eps


def to_velocity(out, xt, t, pred):
    """The velocity that a network output stands for: v or, from x0, (xt - x0) / t. Images are smooth and noise is not:
    on patches only x0 fits through the network (2511.13720)."""
    return (xt - out) / t.clamp(min=T_MIN) if pred == "x0" else out


def loss_fn(model, x0, eps, t, pred, min_snr=0.0):
    """Squared error of the velocity, 2210.02747 eq. 9: x0, eps (B, C, H, W), t (B,) -> (B,). min_snr > 0 weights
    the error of x0, which is t times that of v, by min(SNR, min_snr), 2303.09556, where SNR = ((1 - t) / t)^2."""
    t_ = t.view(-1, 1, 1, 1)
    xt = add_noise(x0, eps, t_)
    v = to_velocity(model(xt, t).to(x0.dtype), xt, t_, pred)
    # differs from the paper: at least 0.05, or the first steps of sampling, nearly pure noise, would stay untrained
    weight = t_ ** 2 * ((1 - t_) / t_).square().clamp(0.05, min_snr) if min_snr > 0 else 1.0
    return (weight * (v - (eps - x0)) ** 2).mean((1, 2, 3))


@torch.no_grad()
def sample(model, noise, pred, sampler, steps, on_step=None, start=1.0, end=0.0):
    """Noise -> images (B, C, H, W), in `steps` steps; with start=0, end=1 images -> noise. noise is an iterator over
    (B, C, H, W): first the start, then what the ancestral sampler adds on the way. on_step(t, xt, x0) is called at each
    step. midpoint and heun call the network twice a step, but heun not in the last."""
    def velocity(x, t):
        t = torch.full((len(x), 1, 1, 1), t, device=x.device)
        return to_velocity(model(x, t.flatten()).to(x.dtype), x, t, pred)
    times = np.linspace(start, end, steps + 1).tolist()
    xt = next(noise)
    for t, s in zip(times, times[1:]):
        h = s - t
        v = velocity(xt, t)
        if on_step:
            on_step(t, xt, xt - t * v)
        if sampler == "euler" or (sampler == "heun" and s == 0):  # v is hardest to know at t = 0: EDM algorithm 1
            xt = xt + h * v
        elif sampler == "midpoint":
            xt = xt + h * velocity(xt + h / 2 * v, t + h / 2)
        elif sampler == "heun":
            xt = xt + h * (v + velocity(xt + h * v, s)) / 2
        elif sampler == "ancestral":  # part of the noise is replaced by fresh noise,
            x0, eps = xt - t * v, xt + (1 - t) * v  # DDPM eq. 7 (2006.11239) in these coordinates
            kept = (s * (1 - t) / (t * (1 - s))) ** 2  # SNR at t over SNR at s
            xt = add_noise(x0, kept ** 0.5 * eps + (1 - kept) ** 0.5 * next(noise), s)
    return xt


def guided(model, y, y_null, cfg_scale, xt, t):
    """The output for labels y, away from the one for "no label" (y_null); cfg_scale is 1 + w of 2207.12598."""
    out = model(xt, t, y)
    if cfg_scale == 1:
        return out
    without = model(xt, t, torch.full_like(y, y_null)).to(xt.dtype)
    return without + cfg_scale * (out.to(xt.dtype) - without)


# -----------------------------------------------------------------------------
# The model: the UNet of ADM (2105.05233), small, on patches of pixels, with a label.


def zero(layer):
    """The layer with weights of zero: a block begins as its skip connection, so that deep networks train at once."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Self-attention over the positions of a feature map, in heads of 32 channels."""

    def __init__(self, c):
        super().__init__()
        self.norm = nn.GroupNorm(32, c)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.proj = zero(nn.Conv2d(c, c, 1))

    def forward(self, x):                                                        # (B, C, H, W)
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, C // 32, 32, H * W)           # (B, 3, heads, 32, N)
        q, k, v = qkv.transpose(-1, -2).unbind(1)                                # (B, heads, N, 32) each
        out = (q @ k.mT * 32 ** -0.5).softmax(-1).to(v.dtype) @ v                # (B, heads, N, 32)
        return x + self.proj(out.transpose(-1, -2).reshape(B, C, H, W))          # (B, C, H, W)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the embedding scales and shifts the second norm (FiLM; ADM section 3)."""

    def __init__(self, c_in, c_out, c_emb, attn, dropout):
        super().__init__()
        self.conv1 = nn.Sequential(nn.GroupNorm(32, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.film = nn.Linear(c_emb, 2 * c_out)
        self.norm = nn.GroupNorm(32, c_out)
        self.conv2 = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), zero(nn.Conv2d(c_out, c_out, 3, padding=1)))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attn = Attention(c_out) if attn else nn.Identity()

    def forward(self, x, emb):                                                   # (B, c_in, H, W), (B, c_emb)
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)              # (B, c_out, 1, 1) each
        h = self.norm(self.conv1(x)) * (1 + scale) + shift                       # (B, c_out, H, W)
        return self.attn(self.skip(x) + self.conv2(h))                           # (B, c_out, H, W)


def timestep_embedding(t, width):
    """Times t (B,) -> sinusoidal features (B, width), 1706.03762 section 3.5."""
    freq = torch.exp(-math.log(10_000) / (width // 2) * torch.arange(width // 2, device=t.device))
    angle = t[:, None] * freq
    return torch.cat([angle.cos(), angle.sin()], 1)


class UNet(nn.Module):
    """(xt, t, y) -> out. xt (B, 3, H, W), t (B,) in [0, 1], y (B,) labels.

    It works on patches, patch^2 times cheaper; a stem and a head on pixels, joined by a skip, hide the patch borders.
    Differs from ADM: heads of 32 channels, single convolutions between levels, as many blocks up as down."""

    def __init__(self, args):
        super().__init__()
        c, D = args.width, 4 * args.width
        self.width, self.patch = args.width, args.patch
        self.time = nn.Sequential(nn.Linear(c, D), nn.SiLU(), nn.Linear(D, D))
        self.y_null = len(args.classes)  # the label after the last means "no label"
        self.label = nn.Embedding(self.y_null + 1, D) if args.class_cond else None
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv_in = nn.Conv2d(8 * self.patch ** 2, c, 3, padding=1)
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), []
        attn = range(len(args.mults) - args.attn, len(args.mults))  # levels with self-attention
        for i, mult in enumerate(args.mults):
            for _ in range(args.blocks):
                self.down.append(ResBlock(c, args.width * mult, D, i in attn, args.dropout))
                c = args.width * mult
                skips.append(c)
            if i < len(args.mults) - 1:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
        self.mid1 = ResBlock(c, c, D, True, args.dropout)
        self.mid2 = ResBlock(c, c, D, False, args.dropout)
        for i, mult in reversed(list(enumerate(args.mults))):
            for _ in range(args.blocks):
                self.up.append(ResBlock(c + skips.pop(), args.width * mult, D, i in attn, args.dropout))
                c = args.width * mult
            if i > 0:
                finer = args.width * args.mults[i - 1]
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, finer, 3, padding=1)))
                c = finer
        self.conv_out = nn.Sequential(nn.GroupNorm(32, c), nn.SiLU(), nn.Conv2d(c, 8 * self.patch ** 2, 3, padding=1))
        self.head = zero(nn.Conv2d(8 + 8, 3, 3, padding=1))

    def forward(self, xt, t, y):                                                 # (B, 3, H, W), (B,), (B,)
        emb = self.time(timestep_embedding(1000 * t, self.width).to(xt.dtype))   # (B, D)
        emb = F.silu(emb if self.label is None else emb + self.label(y))
        x = self.stem(xt)                                                        # (B, 8, H, W)
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))                       # (B, width, H / patch, W / patch)
        skips = []
        for layer in self.down:                                                  # half the side after each level
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            if isinstance(layer, ResBlock):
                skips.append(h)
        h = self.mid2(self.mid1(h, emb), emb)                                    # the lowest resolution
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], 1), emb) if isinstance(layer, ResBlock) else layer(h)
        h = F.pixel_shuffle(self.conv_out(h), self.patch)                        # (B, 8, H, W)
        return self.head(torch.cat([F.silu(h), x], 1))                           # (B, 3, H, W)


# -----------------------------------------------------------------------------
# Training and sampling. All randomness follows from (seed, step) or (seed, image): a resumed run equals one that was
# never interrupted, and any number of processes trains on the same batches.


def get_batch(data, args, step, rank, world):
    """The share of this process in the batch of a step: x0, eps (B, 3, H, W), t (B,), y (B,)."""
    B = args.batch_size
    t = torch.rand(B)
    if args.times == "logit_normal":  # differs from the paper: a fifth stays uniform, or t near 1 would be untrained
        t = torch.where(torch.rand(B) < 0.2, t, torch.sigmoid(torch.randn(B)))
    mirror, drop = torch.rand(2, B)
    eps = torch.randn(B, 3, args.size, args.size)
    mine = slice(B * rank // world, B * (rank + 1) // world)
    i = data.train[(np.arange(B)[mine] + (step - 1) * B) % len(data.train)]  # data.train is shuffled
    x0 = to_tensor(data.images[i], args.device)
    if args.flip:
        x0 = torch.where((mirror[mine] < 0.5).view(-1, 1, 1, 1).to(args.device), x0.flip(-1), x0)
    y = torch.where(drop[mine] < 0.1, len(data.classes), data.labels[i])  # label dropout, for guidance: y_null
    return x0, eps[mine].to(args.device), t[mine].to(args.device), y.to(args.device)


@torch.no_grad()
def validate(model, data, args):
    """The loss on held-out images, at fixed noise and evenly spread t."""
    losses = []
    for k in np.array_split(np.arange(len(data.val)), math.ceil(len(data.val) / 64)):
        i = data.val[k]
        x0, y = to_tensor(data.images[i], args.device), data.labels[i].to(args.device)
        t = torch.from_numpy((k + 0.5) / len(data.val)).float().to(args.device)
        eps = next(image_noise(args.seed, k, x0.shape[1:], args.device))
        with autocast(args.device):
            losses.append(loss_fn(partial(model, y=y), x0, eps, t, args.pred, args.min_snr))
    return torch.cat(losses).mean().item()


def generate(model, args, indices, sampler=None, steps=None, noise=None, on_step=None, start=1.0, end=0.0):
    """Samples number `indices`, (B, 3, size, size): of --label or of all classes in turn."""
    y = torch.as_tensor(indices, device=args.device) % len(args.classes)
    if args.label:
        y = torch.full_like(y, args.classes.index(args.label))
    noise = noise or image_noise(args.seed, indices, (3, args.size, args.size), args.device)
    call = partial(guided, model, y, model.y_null, args.cfg_scale)
    with autocast(args.device):
        return sample(call, noise, args.pred, sampler or args.sampler, steps or args.sample_steps, on_step, start, end)


def show(out, model, args, x0):
    """How it works: the way to noise, the way back, what few steps give, and what lies between two images."""
    n = len(x0[:4])
    eps = next(image_noise(args.seed, range(n), x0.shape[1:], args.device))
    xt = torch.stack([add_noise(x0[:n], eps, t) for t in np.linspace(0, 1, 10).tolist()], 1)
    save_png(out / "forward.png", to_uint8(xt.flatten(0, 1)), 10)

    frames = []  # above: xt, below: the x0 that the model sees in it
    generate(model, args, range(n), on_step=lambda t, *x: frames.append(tile(to_uint8(torch.cat(x)), n)))
    save_gif(out / "reverse.gif", frames[:-1:math.ceil(len(frames) / 25)] + frames[-1:])

    few = [generate(model, args, range(8), "euler", steps) for steps in (1, 2, 4, 8, 16, 64)]
    save_png(out / "steps.png", to_uint8(torch.cat(few)), 8)

    ends = x0[[0, -1]]  # two images to noise and, along an arc between the noises, back
    z = generate(model, args, [0, 0], "midpoint", 64, iter([ends]), start=0.0, end=1.0)
    angle = torch.linspace(0, math.pi / 2, 8, device=args.device).view(-1, 1, 1, 1)
    x = generate(model, args, [0] * 8, "midpoint", 64, iter([angle.cos() * z[0] + angle.sin() * z[1]]))
    save_png(out / "interpolation.png", to_uint8(torch.cat([ends[:1], x, ends[1:]])), 10)
    save_gif(out / "training.gif", [np.asarray(Image.open(p)) for p in sorted(out.glob("samples/*.png"))], 500)


def train(args, ckpt, rank, world):
    """The whole run, or with the checkpoint of --resume the rest of it."""
    out = Path(args.out)
    data = load_data(args.data, args.size)
    if len(data.images) < 16:
        raise SystemExit(f"training takes at least 16 images; --data {args.data} has {len(data.images)}")
    if ckpt and data.classes != args.classes:
        raise SystemExit(f"--data has the classes {data.classes}, the model {args.classes}")
    args.classes = data.classes

    torch.manual_seed(args.seed)
    layout = torch.channels_last if "cuda" in args.device else None  # on a CPU it makes GroupNorm 20 times slower
    model = raw_model = UNet(args).to(args.device, memory_format=layout)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    opt = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.99), weight_decay=0.01, fused=True)
    start, log = 0, []
    if ckpt:
        start, log = ckpt["step"], ckpt["log"]
        for part, state in (model, "model"), (ema, "ema"), (opt, "opt"):
            part.load_state_dict(ckpt[state])
    if "cuda" in args.device:
        model.compile()
    if world > 1:
        model = nn.parallel.DistributedDataParallel(raw_model, [args.device] if "cuda" in args.device else None)
    if rank == 0:
        print(f"{args.data}: {len(data.train)} images; {world} x {args.device}; writes to {out}")

    stop = []
    if world == 1:  # Ctrl-C saves after the step; several processes would stop at different ones
        signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    amp = autocast(args.device)
    losses, clock = [], time.time()
    began = clock - (log[-1]["seconds"] if log else 0)
    bar = tqdm(range(start + 1, args.steps + 1), initial=start, total=args.steps, disable=None if rank == 0 else True)
    for step in bar:
        opt.param_groups[0]["lr"] = args.lr * min(1, step / 50)  # warm-up
        torch.manual_seed(seed_of(args.seed, 1, step))           # the same batch in every process
        x0, eps, t, y = get_batch(data, args, step, rank, world)
        torch.manual_seed(seed_of(args.seed, 2, step, rank))     # dropout: another mask in each
        with amp:
            loss = loss_fn(partial(model, y=y), x0, eps, t, args.pred, args.min_snr).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        update_ema(ema, raw_model, min(args.ema_decay, step / (9 + step)))  # forgets the start
        losses.append(loss.detach())

        # once in a while: the loss, and more rarely validation, checkpoint and samples
        evaluate = step % args.eval_every == 0 or step == args.steps or bool(stop)
        if step % 50 == 0 or evaluate:
            loss = torch.stack(losses).mean() / world
            if world > 1:
                dist.all_reduce(loss)
            speed = len(losses) * args.batch_size / (time.time() - clock)
            log.append(dict(step=step, loss=loss.item(), img_per_s=speed, seconds=time.time() - began))
            bar.set_postfix_str(f"loss {loss.item():.4f}")
            if evaluate and rank == 0:
                log[-1]["val_loss"] = validate(ema, data, args)
                print("  ".join(f"{k} {v:.4g}" for k, v in log[-1].items()))
                if not log[-1]["val_loss"] < 100:  # NaN, too
                    raise SystemExit(f"training diverged: lower --lr; {out}/ckpt.pt, if any, is from before")
                settings = {k: v for k, v in vars(args).items() if k not in OF_THE_MOMENT}
                state = dict(args=settings, step=step, log=log, model=raw_model.state_dict(), ema=ema.state_dict(),
                             opt=opt.state_dict())
                write_atomically(out / "ckpt.pt", partial(torch.save, state))
                write_atomically(out / "log.jsonl", lambda f: f.writelines(json.dumps(r).encode() + b"\n" for r in log))
                plot_loss(out / "loss.png", log)
                save_png(out / f"samples/{step:06d}.png", to_uint8(generate(ema, args, range(64))), 8)
            losses, clock = [], time.time()
        if stop and evaluate:  # a Ctrl-C that came since `evaluate` counts at the next step
            raise SystemExit(f"stopped at step {step}; go on with --resume")
    if rank == 0:
        show(out, ema, args, to_tensor(data.images[data.val[:4]], args.device))
        print(f"done in {time.time() - began:.0f} s: see {out}/samples/{args.steps:06d}.png")


def sample_images(args, ckpt, rank, world):
    """--sample N: images as generated/000000.png ..., the first of them also in generated.png."""
    out = Path(args.out)
    model = UNet(args).to(args.device).eval()
    model.load_state_dict(ckpt["ema"])
    for old in out.glob("generated/" + "[0-9]" * 6 + ".png"):
        if rank == 0 and int(old.stem) >= args.sample:  # of an earlier, larger --sample
            old.unlink()
    share = np.array_split(np.arange(args.sample), world)[rank]
    for k in tqdm(range(0, len(share), 64), "sampling", disable=None if rank == 0 else True):
        i = share[k:k + 64]
        x = generate(model, args, i)
        for number, image in zip(i, to_uint8(x)):
            save_png(out / f"generated/{number:06d}.png", image[None], 1)
        if rank == 0 and k == 0:
            save_png(out / "generated.png", to_uint8(x), 8)
    if rank == 0:
        print(f"{args.sample} images in {out}/generated; see {out}/generated.png")


# -----------------------------------------------------------------------------
# Data: whatever --data names becomes one memory-mapped array of images in data/cache.

AFHQ_URL = "https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1"  # where StarGAN v2's download.sh gets it
UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> the Image.Transpose that undoes it


def read_image(source, size):
    """Number of a drawn face, image file or array -> uint8 (size, size, 3), or the reason why it cannot be read."""
    if isinstance(source, int):
        return draw_face(0, source, size)
    try:
        im = Image.fromarray(source) if isinstance(source, np.ndarray) else Image.open(source)
        if im.mode in ("I", "F"):
            raise ValueError("32 bits have no known range, save it with 8 or 16")
        turn = UPRIGHT.get(im.getexif().get(0x0112))  # ImageOps.exif_transpose also reads other, odd entries
        im = im if turn is None else im.transpose(turn)
        if im.mode.startswith("I;16"):  # convert() would clip at 255
            im = Image.fromarray((np.asarray(im) / 257).round().astype(np.uint8))
        if im.has_transparency_data:
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im.convert("RGBA"))
        return np.asarray(ImageOps.fit(im.convert("RGB"), (size, size), Image.LANCZOS))
    except Exception as e:  # a broken file can raise anything in Pillow
        return f"{source}: {e}"[-200:]


def read_images(sources, size, key):
    """Read images in parallel, once -> uint8 (N, size, size, 3), memory-mapped, and which of the sources they are."""
    cache = Path(f"data/cache/{key}.npy")
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(f".{os.getpid()}.part")
        images = np.lib.format.open_memmap(part, "w+", np.uint8, (max(1, len(sources)), size, size, 3))
        kept, broken = [], []
        with ProcessPoolExecutor() as pool:
            results = pool.map(partial(read_image, size=size), sources, chunksize=32)
            for i, image in enumerate(tqdm(results, "reading", len(sources), disable=None)):
                if isinstance(image, str):
                    broken.append(image)
                else:
                    images[len(kept)] = image
                    kept.append(i)
        if broken:
            print(f"{len(broken)} of {len(sources)} files cannot be read as images, such as {broken[0]}")
        write_atomically(cache.with_suffix(".json"), lambda f: f.write(json.dumps(kept).encode()))
        os.replace(part, cache)
    kept = json.loads(cache.with_suffix(".json").read_text())
    return np.load(cache, mmap_mode="c")[:len(kept)], kept


def list_files(path):
    """The files of a folder, or of a .zip (unpacked into data/cache); of train/ alone where there is also a test/."""
    folder = path
    if zipfile.is_zipfile(path):
        folder = Path(f"data/cache/{path.stem}-{path.stat().st_mtime_ns}")
        if not folder.exists():
            zipfile.ZipFile(path).extractall(f"{folder}.part")
            os.replace(f"{folder}.part", folder)
    if not folder.is_dir():
        raise SystemExit(f"--data {path}: not a folder, .zip or .npz")
    if (folder / "dataset.json").exists():
        raise SystemExit(f"--data {path}: dataset.json is not read; sort images into a folder per class")
    names = sorted(glob.glob("**", root_dir=folder, recursive=True))  # follows links, leaves out hidden files
    files = {folder / name: set(Path(name.lower()).parts) for name in names if not os.path.isdir(folder / name)}
    train = [p for p, parts in files.items() if parts & {"train", "training"}]
    has_test = any(parts & {"val", "valid", "validation", "test", "testing"} for parts in files.values())
    return train if train and has_test else list(files)


def animal_faces():
    """The AFHQ photographs of StarGAN v2 (CC BY-NC 4.0) as a .zip, or "drawn_faces" without a network."""
    path = Path("data/animal_faces.zip")
    path.parent.mkdir(exist_ok=True)
    try:
        if not path.exists() and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            torch.hub.download_url_to_file(AFHQ_URL, f"{path}.part")
            zipfile.ZipFile(f"{path}.part").close()  # raises for half a file, and for a web page
            os.replace(f"{path}.part", path)
    except (OSError, zipfile.BadZipFile) as e:
        print(f"drawn_faces take the place of animal_faces ({e}), or put {AFHQ_URL} at {path}")
    return path if path.exists() else "drawn_faces"


def load_data(data, size):
    """--data -> images uint8 (N, size, size, 3), labels (N,), names of the classes, which are those of the folders, and
    which images train and val have. The first process of a node reads the images, the others find them read."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank > 0:
        dist.barrier()
    path = Path(animal_faces() if data == "animal_faces" else data)
    stamp = [inspect.getsource(read_image), inspect.getsource(draw_face), TRAITS, FURS, EYES, BACKGROUNDS]
    if str(path) == "drawn_faces":
        sources = list(range(16_000))
        labels = [face_traits(np.random.default_rng((0, i)))[0] for i in sources]
    elif path.suffix == ".npz":
        file = np.load(path)
        sources = file["images"]
        labels = file["labels"].astype(str) if "labels" in file else ["all"] * len(sources)
        if sources.dtype != np.uint8 or len(labels) != len(sources):
            raise SystemExit(f"--data {path}: images must be uint8 (N, H, W, 3), labels (N,)")
        stamp.append(os.path.getmtime(path))
    else:
        sources = list_files(path)
        labels = [p.parent.name for p in sources]
        stamp += [(str(p), os.path.getmtime(p) if p.exists() else 0) for p in sources]
    images, kept = read_images(sources, size, f"{path.stem}-{size}-{zlib.crc32(repr(stamp).encode()):08x}")
    if local_rank == 0 and dist.is_initialized():
        dist.barrier()
    classes, y = np.unique(np.array(labels)[kept], return_inverse=True)
    val, train = np.split(np.random.default_rng(0).permutation(len(images)), [min(256, len(images) // 10)])
    return argparse.Namespace(images=images, labels=torch.tensor(y), classes=classes.tolist(), train=train, val=val)


def to_tensor(images, device):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def to_uint8(x):
    """The inverse of to_tensor."""
    return ((x.float() + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


# -----------------------------------------------------------------------------
# Helpers and, at the end, drawn faces, the data set that needs no download.


def seed_of(*numbers):
    """Whole numbers -> a seed unrelated to that of any others; the second is its use: 1 batch, 2 dropout, 3 image."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def image_noise(seed, indices, shape, device):
    """Endless noise (len(indices), *shape). Image i has its own generator, so that it is the same in any batch."""
    generators = [torch.Generator().manual_seed(seed_of(seed, 3, i)) for i in indices]
    while True:
        yield torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay * ema + (1 - decay) * model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def autocast(device):
    """bf16 where the hardware has it; the weights stay fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    fast = device == "cpu" and cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()
    if "cuda" in device:
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast)


def write_atomically(path, write):
    """write(file) to a temporary file, then move it into place, so that no kill leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        write(f)
    os.replace(part, path)


def tile(images, columns):
    """uint8 (N, H, W, 3) -> one image of rows and columns, white where the last row has gaps."""
    n, h, w, _ = images.shape
    images = np.concatenate([images, np.full((-n % columns, h, w, 3), 255, np.uint8)])
    return images.reshape(-1, columns, h, w, 3).swapaxes(1, 2).reshape(-1, columns * w, 3)


def save_png(path, images, columns):
    """uint8 (N, H, W, 3) -> a file with all of them."""
    image = Image.fromarray(tile(images, columns))
    write_atomically(path, lambda f: image.save(f, "PNG"))


def save_gif(path, frames, ms=120):
    """uint8 (H, W, 3) frames -> a looping GIF, last frame held for 2 s."""
    frames = [Image.fromarray(f).quantize(128, dither=Image.Dither.NONE) for f in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[ms] * (len(frames) - 1) + [2000], loop=0)


def plot_loss(path, log):
    """The loss (gray) and val_loss (blue) by step, on a logarithmic scale from 1 at the top to 0.001 at the bottom."""
    image = Image.new("RGB", (640, 360), "white")
    for key, color in ("loss", "gray"), ("val_loss", "blue"):
        points = [(20 + 600 * r["step"] / log[-1]["step"], 20 - 110 * math.log10(r[key])) for r in log if key in r]
        ImageDraw.Draw(image).line(points, color, 3)
    image.save(path)


FURS = {"gray": (138, 146, 160), "brown": (136, 86, 54), "orange": (240, 132, 44), "white": (240, 238, 242),
        "black": (56, 54, 64), "cream": (240, 210, 166)}
EYES = {"green": (70, 200, 84), "blue": (52, 148, 255), "amber": (255, 186, 32), "violet": (186, 88, 232)}
BACKGROUNDS = {"blue": (104, 172, 248), "green": (112, 204, 124), "pink": (255, 146, 190), "yellow": (255, 212, 52),
               "purple": (160, 122, 232), "teal": (44, 178, 184)}
TRAITS = {  # shapes (color, x, y, rx, ry, tilt=0, tip=0) in half-images from the middle of the head, y down; tilt in
    # degrees clockwise; tip 0 is an ellipse, 1 a drop that points up; x > 0: one on each side; drop: the face is lower
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


def face_traits(rng):
    """Species, fur, eyes and background of a face, uniform and independent."""
    return [list(table)[rng.integers(len(table))] for table in (TRAITS, FURS, EYES, BACKGROUNDS)]


def draw_face(seed, index, size):
    """An animal face, uint8 (size, size, 3), which (seed, index) decide: another size is the same face, sharper."""
    rng = np.random.default_rng((seed, index))
    species, fur, eye, ground = face_traits(rng)
    dx, dy, zoom, turn, wide, ear_size, perk, eye_size, apart, gaze, lamp_x, lamp_y = rng.uniform(-1, 1, 12).tolist()
    trait, base, ink, white, pink = TRAITS[species], FURS[fur], (44, 32, 44), (255, 255, 255), (246, 132, 150)

    def blend(a, b, k):
        return tuple(round(u + (v - u) * k) for u, v in zip(a, b))
    # stripes, mane and shade are darker than the fur, but paler than black fur, so that they are always seen
    shade, k = (white, .5) if fur == "black" else ((66, 34, 48), 1)
    colors = {"fur": base, "dark": blend(base, shade, .28 * k), "mark": blend(base, shade, .52 * k), "eye": EYES[eye],
              "light": blend(base, white, .3 + .3 * k), "inner": blend(base, pink, .7), "blush": blend(base, pink, .4),
              "halo": blend(BACKGROUNDS[ground], white, .25), "ink": ink, "white": white, "pink": pink}
    # back to front: halo, body, ears, head, cheeks, what marks the species, mouth, muzzle, nose, eyes
    parts = [("halo", 0, 0, .88, .88), ("dark", 0, 1.1, .55, .5), ("light", 0, 1, .26, .4), *trait.get("back", ())]
    if "ear" in trait:
        x, y, rx, ry, tilt, tip = (*trait["ear"], 0, 0)[:6]
        rx, ry, tilt = rx * (1 + .1 * ear_size), ry * (1 + .1 * ear_size), tilt + 6 * perk
        parts += [("dark", x, y, rx, ry, tilt, tip), ("inner", x, y + .12 * ry, .62 * rx, .68 * ry, tilt, tip)]
    rx, ry, *tip = trait["head"]
    x, y, mx, my = trait["muzzle"]
    nose, ex, ey, r = trait["nose"], .30 + .02 * apart, -.06, .155 + .012 * eye_size
    parts += [("dark", 0, .02, rx, ry, *tip), ("fur", 0, -.015, .98 * rx, .97 * ry, *tip), ("blush", .45, .2, .12, .08),
              *trait.get("front", ()), ("ink", 0, y + .7 * my, .7 * mx, .6 * my), ("light", x, y, mx, my),
              ("light", 0, y - .02, x, .7 * my), ("ink", 0, y + .1 * my, .014, .7 * my),
              ("ink", 0, y - .5 * my, nose, .75 * nose, 180, .3),
              ("light", 0, y - .5 * my - .35 * nose, .4 * nose, .15 * nose),
              ("ink", ex, ey, r, 1.1 * r), ("eye", ex, ey, .84 * r, .94 * r)]
    parts = [(*p, 0, 0)[:7] for p in parts]
    parts = [(c, side * x, y, rx, ry, side * tilt, tip) for c, x, y, rx, ry, tilt, tip in parts
             for side in ((-1, 1) if x > 0 else (1,))]
    for x in (-ex, ex):  # not mirrored: both pupils look the same way, both reflections show the same lamp
        parts += [("ink", x + .025 * gaze, ey, .44 * r, .56 * r, 0, 0), ("white", x - .05, ey - .06, .04, .04, 0, 0),
                  ("white", x + .05, ey + .07, .02, .02, 0, 0)]

    # all outlines at once, x + iy as complex numbers, so that turning is a product                  (parts, 72 points)
    x, y, rx, ry, tilt, tip = np.array([p[1:] for p in parts]).T[..., None]
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    z = x + 1j * y + (rx * np.sin(t) * np.sin(t / 2) ** tip - 1j * ry * np.cos(t)) * np.exp(1j * np.radians(tilt))
    middle = .05 * dx + 1j * (trait["drop"] + .04 * dy)
    z = (z + .05 * wide * z.real) * (.96 + .05 * zoom) * np.exp(1j * np.radians(7 * turn)) + middle
    fine = size * (4 if size <= 128 else 2)  # drawn larger, then averaged down: Pillow's polygons have hard edges
    image = Image.new("RGB", (fine, fine), BACKGROUNDS[ground])
    for part, outline in zip(parts, ((z.view(float) + 1) * fine / 2 - .5).tolist()):  # pixel centres are at i + 1/2
        ImageDraw.Draw(image).polygon(outline, fill=colors[part[0]])

    y, x = (np.mgrid[:size, :size].astype(np.float32) + .5) * (2 / size) - 1
    rim = np.exp(-((np.hypot(x - middle.real, y - middle.imag) - .72) / .16) ** 2)  # the shadow that rounds the head
    light = 1.05 - .05 * lamp_x * x - (.07 + .03 * lamp_y) * y - .05 * (x * x + y * y) - .10 * rim
    return np.clip(np.asarray(image.reduce(fine // size)) * light[..., None], 0, 255).astype(np.uint8)


# -----------------------------------------------------------------------------
# Settings: preset < checkpoint < command line.

PRESETS = {
    "cpu": dict(size=64, patch=4, width=64, mults=[1, 2, 2], blocks=1, attn=2, dropout=0.0, pred="x0", min_snr=0.5,
                steps=1700, batch_size=32, lr=1e-3, ema_decay=0.999, eval_every=425, sample_steps=50),
    "gpu": dict(size=64, patch=1, width=128, mults=[1, 2, 3, 4], blocks=2, attn=2, dropout=0.1, pred="v", min_snr=0.0,
                steps=100_000, batch_size=128, lr=2e-4, ema_decay=0.9999, eval_every=2500, sample_steps=50),
    "smoke": dict(size=32, patch=4, width=32, mults=[1, 2], blocks=1, attn=1, dropout=0.0, pred="x0", min_snr=0.5,
                  steps=2, batch_size=16, lr=1e-3, ema_decay=0.99, eval_every=1, sample_steps=4, out="out/smoke")}
OF_THE_MOMENT = "resume sample label out device".split()  # not taken from a checkpoint


def parse_args(argv=None):
    """-> the settings, and the checkpoint that --resume or --sample starts from."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, default="gpu" if torch.cuda.is_available() else "cpu", help="defaults")
    p.add_argument("--data", default="drawn_faces", help="drawn_faces, animal_faces, or a folder, .zip or .npz")
    p.add_argument("--size", type=int, help="pixels a side")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the images")
    p.add_argument("--class_cond", action="store_true", help="give the model the class of each image")
    p.add_argument("--width", type=int, help="channels at the highest resolution")
    p.add_argument("--patch", type=int, help="side of the patches that the UNet works on; 1 = pixels")
    p.add_argument("--times", choices=["logit_normal", "uniform"], default="logit_normal", help="t drawn in training")
    p.add_argument("--pred", choices=["v", "x0"], help="what the network predicts")
    p.add_argument("--min_snr", type=float, help="gamma of the min-SNR loss weights; 0 = off")
    p.add_argument("--steps", type=int, help="optimizer steps")
    p.add_argument("--batch_size", type=int, help="images per step, over all processes")
    p.add_argument("--lr", type=float, help="learning rate of AdamW")
    p.add_argument("--eval_every", type=int, help="steps between validation, sample grid and checkpoint")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    p.add_argument("--sample", type=int, default=0, metavar="N", help="no training: N images of the model in --out")
    p.add_argument("--label", metavar="NAME", help="the class to sample; else all in turn")
    p.add_argument("--sampler", choices=["ancestral", "euler", "midpoint", "heun"], default="ancestral",
                   help="how noise becomes an image")
    p.add_argument("--sample_steps", type=int, help="steps from noise to image")
    p.add_argument("--cfg_scale", type=float, default=1.0, help="strength of classifier-free guidance; 1 = off")
    p.add_argument("--out", default="out/cfm_images", help="folder of the run")
    p.add_argument("--seed", type=int, default=0, help="seed of all randomness")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu or mps")
    p.set_defaults(**PRESETS[p.get_default("preset")])  # for --help
    p.set_defaults(**PRESETS[p.parse_args(argv).preset])
    args, ckpt = p.parse_args(argv), None
    if args.resume or args.sample:
        if not os.path.exists(f"{args.out}/ckpt.pt"):
            p.error(f"there is no {args.out}/ckpt.pt: train first, or name a run with --out")
        ckpt = torch.load(f"{args.out}/ckpt.pt", map_location="cpu", weights_only=True)
        p.set_defaults(**ckpt["args"])
        args = p.parse_args(argv)
        for k in "size patch width class_cond pred times".split():
            if getattr(args, k) != ckpt["args"].get(k):  # None in a run of another script
                p.error(f"--{k} cannot change: {args.out} was trained with {ckpt['args'].get(k)}")
        if args.resume and ckpt["step"] >= args.steps:
            p.error(f"{args.out} has done {ckpt['step']} steps: say with --steps how far to go on")
        if args.label and args.label not in args.classes:
            p.error(f"--label {args.label}: the classes are {', '.join(args.classes)}")
    elif os.path.isdir(args.out) and os.listdir(args.out):
        p.error(f"--out {args.out} is not empty: go on with its run by --resume, or name a new folder")
    out, data = Path(args.out).resolve(), Path(args.data).resolve()
    if data.exists() and (out == data or out in data.parents or data in out.parents):
        p.error(f"--out {args.out} and --data {args.data} must not lie in each other")
    unit = max(1, args.patch) * 2 ** (len(args.mults) - 1)
    lowest = min(args.size, args.width, args.patch, args.steps, args.batch_size, args.eval_every, args.sample_steps)
    if args.size % unit or args.width % 32 or lowest < 1 or args.sample < 0:
        p.error(f"--size must be a multiple of {unit}, --width of 32, and all numbers positive")
    if args.batch_size % int(os.environ.get("WORLD_SIZE", 1)):
        p.error(f"--batch_size {args.batch_size} cannot be shared by {os.environ['WORLD_SIZE']} processes")
    if (args.label or args.cfg_scale != 1) and not args.class_cond or args.label and not args.sample:
        p.error("--cfg_scale and --label need a model trained with --class_cond, --label also --sample")
    return args, ckpt


def main():
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # file names may be unprintable
    args, ckpt = parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    if world > 1:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if "cuda" in args.device else "gloo", timeout=timedelta(hours=3))
    (sample_images if args.sample else train)(args, ckpt, rank, world)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
