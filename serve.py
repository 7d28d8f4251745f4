"""Host a trained model: the OpenAI images API and a page for the browser, from one file.

    python serve.py                                        # what text2img.py trained, at http://127.0.0.1:8000
    python serve.py --ckpt out/text2img/model.safetensors --lora_dir out/finetune_lora
    SERVE_API_KEY=secret python serve.py --host 0.0.0.0 --port 80
    curl http://127.0.0.1:8000/v1/images/generations -H "Content-Type: application/json" \\
         -d '{"prompt": "a gray cat with green eyes on a blue background", "n": 4, "seed": 7}'

The idea is the first screen after the flags: pictures that are under way take their next step together, each from its
own time to its own next, so that a request need not wait for those before it to end.

Expected, with the small model of text2img.py: ready in 2 s on two cores of a shared Intel Xeon (torch 2.13.0); pictures
of 20 guided steps 2.0 a second for one client, 3.6 for 64 of them. GPU: not measured yet. It writes its log to stdout
and, into data/weights, what it had to take from the hub.

Papers: continuous batching, there of language models, Orca (OSDI 2022); flow matching 2210.02747; guidance 2207.12598,
in an interval 2404.07724; LoRA 2106.09685.
"""
import argparse
import base64
import collections
import functools
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import json
import math
import mmap
import os
import queue
import re
import secrets
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from PIL import Image, features
from tqdm import tqdm

# -----------------------------------------------------------------------------
# Knobs.

DEFAULT_CKPTS = [f"out/{name}/model.safetensors" for name in ("text2img", "latent_dit")]


def parse_args(argv=None):
    """The settings. Wrong ones end the script with a sentence and status 2."""
    argv = sys.argv[1:] if argv is None else argv

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    class Parser(argparse.ArgumentParser):
        def error(self, sentence):  # argparse would print the whole usage first
            self.exit(2, f"{self.prog}: {sentence}; --help lists every flag\n")

    p = Parser(prog="serve.py", description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction
    g = p.add_argument_group("model", "without --ckpt, the first of these that exists: " + ", ".join(DEFAULT_CKPTS))
    g.add_argument("--ckpt", metavar="FILE|FOLDER|OWNER/NAME", help="the model.safetensors to sample from")
    g.add_argument("--lora_dir", metavar="FOLDER", help="its .safetensors are LoRAs that requests can name")
    g.add_argument("--quant", choices=["int8", "nf4"], help="hold the frozen weights in 8 or 4 bits")
    g = p.add_argument_group("server")
    g.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all of this machine's")
    g.add_argument("--port", type=int, default=8000, help="port to listen at; 0: any that is free")
    g.add_argument("--api_key", metavar="KEY", help="what clients have to send; better in SERVE_API_KEY, as all "
                   "users of a machine see the flags of its processes")
    g.add_argument("--public", action=flag, default=False, help="listen beyond this machine without a key")
    g.add_argument("--log_prompts", action=flag, default=False, help="write prompts into the log")
    g = p.add_argument_group("limits")
    g.add_argument("--max_batch", type=int, default=16, help="pictures in one step of the network")
    g.add_argument("--max_queue", type=int, default=64, help="pictures under way; more are answered 429")
    g.add_argument("--max_n", type=int, default=8, help="pictures in one request")
    g.add_argument("--max_steps", type=int, default=250, help="steps of one picture")
    g.add_argument("--max_size", type=int, help="pixels a side; default twice those of training")
    g.add_argument("--deadline", type=float, default=120, help="seconds after which a request is given up")
    g.add_argument("--connections", type=int, default=256, help="clients at the same time")
    g = p.add_argument_group("output and system", "on a CPU --dtype auto is fp32 here, not bf16, so that pictures do "
                             "not depend on their company")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    g.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto",
                   help="arithmetic of the network; what is trained is always fp32")
    g.add_argument("--compile", action=flag, default=False, help="torch.compile the network")
    args = p.parse_args(argv)
    check(args, p.error)
    return args


def check(args, error):
    """Calls error(sentence) for settings that cannot be."""
    for name in "max_batch max_queue max_n max_steps max_size connections".split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            error(f"--{name} has to be at least 1")
    if args.max_n > args.max_queue:
        error(f"--max_n {args.max_n} is more than --max_queue {args.max_queue}, and so could never be had")
    if not 0 < args.deadline < 2 ** 31:
        error("--deadline has to be more than 0 seconds and less than 2^31")
    if not 0 <= args.port < 65536:
        error("--port has to lie between 0 and 65535")
    args.api_key = args.api_key or os.environ.get("SERVE_API_KEY") or None
    if args.api_key and not args.api_key.isascii():  # which clients send in one encoding or the other
        error("the API key has to be of ASCII letters, digits and signs")
    if not is_loopback(args.host) and not args.api_key and not args.public:
        error(f"--host {args.host} lets others in: set SERVE_API_KEY, or say --public if all may use it")

# -----------------------------------------------------------------------------
# The method. Each model here is an ODE whose solution z = x0 + t d leads from noise to data: a flow in the time t, with
# the velocity d = eps - x0, or a diffusion in its noise level t = sigma, with d = eps: divided by sqrt(alpha_bar), its
# xt = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps has this form, too (2206.00364). Euler's method asks the network for
# d and goes from t to the next time; a network is told t for each picture of a batch, so that each can be at another.
#
# A request, from left to right:
#   HTTP thread: parse_json, make_job, Engine.submit | engine thread: Model.join, step ..., Model.decode, Job.tell
#   | HTTP thread: Handler.events, collect or stream.
# Of what the threads share, Engine.pictures and refusal change under the lock `changed`; Job.news is a queue; Job.over
# only ever becomes true.


class Job:
    """One request, between the thread that answers it and the engine: what it asks for, what the network is told and
    kept away from (tensors with a first dimension of 1), and what there is to tell."""

    def __init__(self, asked, cfg_scale, partial_at):
        self.asked, self.cfg_scale, self.partial_at = asked, cfg_scale, partial_at
        self.pictures, self.text, self.text_null = [], None, None
        self.news, self.over, self.id = queue.SimpleQueue(), False, None
        self.began, self.started = time.monotonic(), None

    def tell(self, what, about=None):
        self.over |= what == "failed"
        self.news.put((what, about))


class Picture:
    """One picture under way. z (C, h, w), in `shape`, and times from noise to data, of which `k` are done; prev_x0:
    the last estimate of x0; lora: names and weights. job is the request it is for, index its place in that."""

    def __init__(self, job, index, seed, shape, times, lora):
        self.job, self.index, self.seed, self.shape, self.times, self.lora = job, index, seed, shape, times, lora
        self.z, self.prev_x0, self.k = None, None, 0

    @property
    def group(self):
        """What has to be equal for pictures to take a step together."""
        return self.shape, self.lora

    @property
    def done(self):
        return self.k == len(self.times) - 1


@torch.no_grad()
def step(model, pictures):
    """The next step of pictures of one group -> the estimate of x0 of each. Those that are guided are in the batch
    twice, told their text and text_null (2207.12598); outside an interval of t guidance is left out (2404.07724)."""
    timesteps = torch.tensor([model.timestep(p.times[p.k]) for p in pictures], device=model.device)
    t, s = (torch.tensor([p.times[p.k + i] for p in pictures], device=model.device).view(-1, 1, 1, 1) for i in (0, 1))
    z = torch.stack([p.z for p in pictures])                                     # (B, C, h, w)
    first, last = model.cfg_interval
    guided = [i for i, p in enumerate(pictures) if p.job.cfg_scale != 1
              and first - 1e-6 <= p.times[p.k] <= last + 1e-6]
    texts = [p.job.text for p in pictures] + [pictures[i].job.text_null for i in guided]
    text = [torch.cat(parts) for parts in zip(*texts)]                           # (B + guided, ...) each
    d = model.derivative(*(torch.cat([a, a[guided]]) for a in (z, t, timesteps)), text)
    d, uncond = d.split([len(pictures), len(guided)])
    if guided:
        cfg_scale = torch.tensor([pictures[i].job.cfg_scale for i in guided], device=z.device).view(-1, 1, 1, 1)
        d = d.index_copy(0, torch.tensor(guided, device=z.device), uncond + cfg_scale * (d[guided] - uncond))
    x0 = z - t * d
    towards = torch.stack([look_back(p, x) for p, x in zip(pictures, x0)]) if model.multistep else x0
    for p, moved, x in zip(pictures, s / t * z + (1 - s / t) * towards, x0):     # = z + (s - t) d where towards is x0
        p.z, p.prev_x0, p.k = moved, x, p.k + 1
    return x0


def look_back(picture, x0):
    """DPM-Solver++(2M), 2211.01095 algorithm 2: not to x0 as it is estimated now, but on from the last estimate."""
    last, t, s = picture.times[picture.k - 1], picture.times[picture.k], picture.times[picture.k + 1]
    if picture.k == 0 or s == 0:
        return x0
    return x0 + (x0 - picture.prev_x0) * math.log(t / s) / (2 * math.log(last / t))


class Engine(threading.Thread):
    """The one thread that owns the device. All pictures under way take turns, as many of a group in one step as there
    is room for: a short request need not wait for a long one, nor a small picture for a large."""

    def __init__(self, model, max_batch, max_queue):
        super().__init__(daemon=True, name="engine")
        self.model, self.max_batch, self.max_queue, self.changed = model, max_batch, max_queue, threading.Condition()
        self.pictures, self.ready, self.refusal, self.ending = [], False, None, False
        self.fits = {}  # {shape: pictures that a step has memory for}, of shapes for which it was short
        self.counted, self.seconds_a_step = collections.Counter(), 0.05

    def submit(self, job):
        """Takes all pictures of a request. Raises Refused."""
        with self.changed:
            if self.refusal:
                raise Refused(503, self.refusal, headers={"Retry-After": "10"})
            self.pictures = [p for p in self.pictures if not p.job.over]
            if len(self.pictures) + len(job.pictures) > self.max_queue:
                left = sum(len(p.times) - p.k for p in self.pictures) * self.seconds_a_step
                raise Refused(429, f"{len(self.pictures)} pictures are under way already; try again later",
                              code="rate_limit_exceeded", headers={"Retry-After": str(max(1, math.ceil(left / 2)))})
            self.pictures.extend(job.pictures)
            self.changed.notify()

    def end(self, seconds):
        """-> whether it has ended, within these seconds."""
        with self.changed:
            self.ending = True
            self.changed.notify()
        self.join(seconds)
        return not self.is_alive()

    def run(self):
        try:
            self.model.warm_up(self.max_batch)
            self.ready = True
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.pictures or self.ending)
                    if self.ending:
                        return
                    self.pictures = [p for p in self.pictures if not p.job.over]
                    group = [p for p in self.pictures if p.group == self.pictures[0].group]
                if group:
                    self.turn(group[:min(self.max_batch, int(self.fits.get(group[0].shape, self.max_batch)))])
        except BaseException as e:  # without this thread nothing is drawn: all are told, and the server ends
            log(event="error", error=traceback.format_exc()[-2000:])
            with self.changed:
                self.ready, self.refusal = False, f"the engine has stopped: {type(e).__name__}: {e}"
                for p in self.pictures:
                    p.job.tell("failed", Refused(500, "the engine has stopped"))
                self.pictures = []

    def turn(self, group):
        """A step of these pictures, which then go to the end of the queue."""
        began = time.perf_counter()
        self.model.use(group[0].lora)
        for p in group:
            if p.z is None:
                p.job.started = p.job.started or time.monotonic()
                self.guard([p], self.model.join, p)
        group = [p for p in group if not p.job.over]
        estimates = self.guard(group, step, self.model, group) if group else None
        for p, x0 in zip(group, () if estimates is None else estimates):
            p.job.tell("step")
            z = p.z if p.done else x0
            if not (p.done or p.k in p.job.partial_at) or p.job.over:
                pass
            elif not z.isfinite().all():  # it would be decoded to black
                p.job.tell("failed", Refused(500, "the model has drawn what is no number", headers=FINAL))
            else:
                pixels = self.guard([p], self.model.decode, z)
                if pixels is not None:
                    self.counted["pictures"] += p.done
                    p.job.tell("picture" if p.done else "partial", (p, pixels))
            if p.done:
                p.z = p.prev_x0 = None  # a slow reader should not hold the device's memory
        with self.changed:
            self.pictures = [p for p in self.pictures if p not in group] + [p for p in group if not p.done]
        if estimates is None:
            return
        if group[0].shape in self.fits:
            self.fits[group[0].shape] += 0.02  # one more after 50 steps: what took the memory may have gone
        self.counted.update(steps=1, picture_steps=len(group))
        self.seconds_a_step += 0.1 * ((time.perf_counter() - began) / len(group) - self.seconds_a_step)

    def guard(self, pictures, make, *args):
        """make(*args), or None where it fails. That ends the requests of these pictures and no others; but where memory
        is short for several together, smaller groups try it again."""
        try:
            return make(*args)
        except Exception as e:
            log(event="error", id=pictures[0].job.id, error=traceback.format_exc()[-2000:])
            short = isinstance(e, MemoryError) or re.search("out of memory|allocate memory|ALLOC_FAILED", str(e))
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        torch.zeros(1, device=self.model.device).item()  # raises where the device has failed for good, and ends run()
        if short and len(pictures) > 1:
            self.fits[pictures[0].shape] = len(pictures) // 2
            return None
        for p in pictures:
            p.job.tell("failed", Refused(503, "there is too little memory for this now", headers={"Retry-After": "10"})
                       if short else Refused(500, "the model has failed at this request", headers=FINAL))
        return None


# -----------------------------------------------------------------------------
# What is served. Of each kind of model the engine asks the same: noise and texts to begin with, a time grid, d, pixels.


class Model:
    """What the engine needs to know of a model. size and unit: pixels a side in training, and what sides are multiples
    of; sample_steps, cfg_scale: unless a request says otherwise; cfg_interval: where guidance acts; multistep: whether
    steps look back, as DPM-Solver++ does; parts: what LoRAs can be put into, by name; network: what gives d. Each kind
    adds shape() of z and times() of a picture, check_text(), which says what is wrong with a text, and read(), which
    makes tensors of it."""
    cfg_interval, multistep, classes = (0, math.inf), False, ()

    def __init__(self, name, file, args):
        self.name, self.created, self.args = name, int(file.stat().st_mtime), args
        self.device, self.loras, self.adapted, self.plain = pick_device(args.device), {}, [], True
        # on a CPU bf16 makes a picture depend on its company by 3/255
        exact = args.dtype == "auto" and self.device.type == "cpu"
        self.dtype = pick_dtype("fp32" if exact else args.dtype, self.device)
        self.amp = functools.partial(torch.autocast, self.device.type, torch.bfloat16,
                                     enabled=self.dtype == torch.bfloat16)

    def settle(self, module):
        """To the device, frozen, and there in the layout of memory that a GPU's convolutions want."""
        module = module.to(self.device).eval().requires_grad_(False)
        return module.to(memory_format=torch.channels_last) if self.device.type == "cuda" else module

    def layers(self):
        """{name: layer} of all that can have a LoRA."""
        return {f"{part}.{name.removesuffix('.layer')}": layer for part, model in self.parts.items()
                for name, layer in model.named_modules()
                if isinstance(layer, (nn.Linear, nn.Conv2d, Quantised)) and "loras" not in name}

    def add_lora(self, name, path):
        """Puts the LoRA of a file beside its layers, to be used when its name is asked for. Raises Stop."""
        places, layers = [], self.layers()
        for layer, (A, B) in read_lora_pairs(path, layers).items():
            part, _, rest = layer.partition(".")
            parent, child = self.parts[part].get_submodule(rest.rpartition(".")[0]), rest.rpartition(".")[2]
            if not isinstance(getattr(parent, child), Adapted):
                setattr(parent, child, Adapted(layers[layer]))
                self.adapted.append(getattr(parent, child))
            lora, adapted = LoRA(layers[layer], len(A), len(A)), getattr(parent, child)
            lora.A.weight.data.copy_(A)
            lora.B.weight.data.copy_(B)
            adapted.loras.append(lora.to(self.device).requires_grad_(False))
            adapted.weights.append(0.0)
            places.append((adapted, len(adapted.loras) - 1))
        self.loras[name] = places

    def use(self, lora):
        """Lets these LoRAs act, ((name, weight), ...), and no others."""
        self.plain = not lora
        for adapted in self.adapted:
            adapted.weights = [0.0] * len(adapted.weights)
        for name, weight in lora:
            for adapted, i in self.loras[name]:
                adapted.weights[i] += weight

    def join(self, picture):
        """Noise and texts of a picture that joins: the same noise as picture 0 of --seed of the training script."""
        job, noise = picture.job, next(image_noise(picture.seed, [0], picture.shape, self.device))[0]
        with self.amp(), torch.no_grad():
            if job.text is None:
                job.text = self.read(job.asked["prompt"])
            if job.text_null is None and job.cfg_scale != 1:
                job.text_null = self.read(job.asked.get("negative_prompt", ""))
        picture.z = noise * self.init_noise_sigma(picture.times[0])

    def init_noise_sigma(self, t):
        """The standard deviation of the noise that a picture begins with."""
        return 1.0

    def warm_up(self, max_batch):
        """A step, so that the first request does not wait for what is done once; not of large pictures on a CPU."""
        if self.device.type == "cpu" and self.size > 128:
            return
        shape, times = self.shape(self.size, self.size), self.times(1, self.size, self.size)
        for n in [1 << k for k in range((2 * max_batch - 1).bit_length() + 1)] if self.args.compile else [1]:
            job = Job(dict(prompt=self.examples[0]), 1.0, ())
            pictures = [Picture(job, i, 0, shape, times, ()) for i in range(n)]
            for p in pictures:
                self.join(p)
            step(self, pictures)
        self.decode(pictures[0].z)

    def timestep(self, t):
        """What the network is told for the time t."""
        return t

    def call_network(self, z, timesteps, text):
        """What the network says. Compiled, it is for each size of batch anew, and so sees 1, 2, 4, 8 ... alone: what is
        missing is filled with the last picture. Pictures of another size or with a LoRA do without, lest all wait."""
        n, network = len(z), self.network
        if self.args.compile and self.plain and z.shape[1:] == self.shape(self.size, self.size):
            full = torch.arange(1 << (n - 1).bit_length(), device=z.device).clamp(max=n - 1)
            z, timesteps, *text = (a[full] for a in (z, timesteps, *text))
        elif self.args.compile:
            network = self.network.forward
        with self.amp():
            return network(z, timesteps, *self.network_args(text))[:n].float()

    def network_args(self, text):
        """The arguments that a text is to the network."""
        return [text]

    def derivative(self, z, t, timesteps, text):
        """z (B, C, h, w), t (B, 1, 1, 1), timesteps (B,) and what the network is told -> d of z = x0 + t d."""
        return self.call_network(z, timesteps, text)

    @torch.no_grad()
    def decode(self, z):
        """z (C, h, w) -> uint8 (H, W, 3)."""
        with self.amp():
            return to_uint8(decode(self.vae, self.network, z[None]).float())[0]


def read_lora_pairs(path, layers):
    """A LoRA of finetune_lora.py in the names of diffusers, with alpha in B -> {layer: (A, B)}. Raises Stop for one
    that does not fit these layers."""
    tensors, _ = load_safetensors(path)
    found, lost = {}, []
    for key, v in tensors.items():
        m = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key)
        name = m and m[1].replace(".text_model.", ".", 1)
        if name in layers:
            found.setdefault(name, {})[m[2]] = v
        else:
            lost.append(key)
    for name, pair in found.items():
        layer = layers[name]
        conv = isinstance(layer, nn.Conv2d)
        sides = (layer.in_channels, *layer.kernel_size, layer.out_channels) if conv else \
            (layer.in_features, layer.out_features)
        if len(pair) < 2 or len(pair["A"]) != pair["B"].shape[1] or (*pair["A"].shape[1:], len(pair["B"])) != sides:
            lost.append(name)
    if lost or not found:
        raise Stop(f"{path} is no LoRA of this model in the names of diffusers, as finetune_lora.py writes it: "
                   + (f"{len(lost)} keys do not fit, such as {lost[0]}" if lost else "it is empty"))
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def too_long(text, tokenise, most):
    """What is wrong with a text, or None."""
    if max(map(len, text.split()), default=0) > 100:  # CLIP's tokenizer takes seconds for such
        return "has a word of more than 100 letters"
    known = getattr(tokenise, "known", {})
    if len(known) > 10_000:  # each word that was ever asked for
        known.clear()
    tokens = len(tokenise(text))
    return f"has {tokens} tokens, and {most} are all that the model reads" if tokens > most else None


def own_vae(tensors, saved, path):
    """The autoencoder of a model.safetensors: in it, on the hub, or none. Raises Stop."""
    own = {k[4:]: v for k, v in tensors.items() if k.startswith("vae.")}
    if own:
        vae = TinyVAE()
        load_weights(vae, own, path)
        return vae
    if saved["vae"] == "none":
        return Pixels()
    if saved["vae"] not in AUTOENCODERS:
        raise Stop(f"{path} was made with --vae {saved['vae']}; this script reads tiny, none, "
                   + ", ".join(AUTOENCODERS))
    repo, file, how = AUTOENCODERS[saved["vae"]]
    return open_vae([hub_file(repo, file)], how)


class TextModel(Model):
    """A model.safetensors of text2img.py: a flow of latents, told by tokens and their mask."""
    kind, guidance = "text2img", True

    def __init__(self, path, args, script):
        super().__init__(path.resolve().parent.name, path, args)
        tensors, saved, about = read_model(path, script)
        self.size, self.shift = saved["size"], saved["time_shift"]
        self.sample_steps, self.cfg_scale = saved["sample_steps"], saved["cfg_scale"]
        self.cfg_interval, self.examples = saved["cfg_interval"], about["prompts"]
        self.vae = own_vae(tensors, saved, path)
        self.reader = load_reader(SimpleNamespace(text=saved["text"]), 0, 1)
        tower = CLIPText(**TINY) if saved["text"] == "tiny" else None
        self.network = DiT(self.vae.channels, saved["patch_size"], saved["model"], self.reader.dim,
                           self.reader.pooled_dim, tower)
        self.unit = self.vae.factor * saved["patch_size"]
        self.network.grid = saved["size"] // self.unit
        if self.reader.key != about["text_key"] or fingerprint(self.vae) != about["vae_key"]:
            same = self.reader.key == about["text_key"]
            raise Stop(f"{path} was trained with another {'--vae' if same else 'text encoder'}")
        load_weights(self.network, {k: v for k, v in tensors.items() if not k.startswith("vae.")}, path)
        self.network, self.vae = self.settle(self.network), self.settle(self.vae)
        if args.quant:
            for layer in [k for k, m in self.network.named_modules() if isinstance(m, nn.Linear) and "blocks" in k]:
                quantise(self.network, layer, args.quant)
        self.parts = {"transformer": self.network}

    def shape(self, width, height):
        return self.vae.channels, height // self.vae.factor, width // self.vae.factor

    def times(self, steps, width, height):
        return time_grid(steps, self.shift * max(1, max(width, height) / self.size))

    def check_text(self, text):
        return too_long(text, self.reader.tokenise, self.reader.length)

    def read(self, text):
        """-> txt (1, L, dim), txt_mask (1, L), pooled (1, P), with L always the same: any can be in one batch."""
        tokens = read_texts(self.reader, [text], self.device)
        txt, txt_mask, pooled = self.network.encode_text(text_batch(tokens, [0], self.device))
        more = self.reader.length - txt.shape[1]
        return F.pad(txt, (0, 0, 0, more)), F.pad(txt_mask, (0, more)), pooled


def time_grid(steps, shift):
    """steps + 1 times from 1 to 0; shift > 1 puts more of them where there is much noise (2403.03206 eq. 23)."""
    t = np.linspace(1, 0, steps + 1)
    return (shift * t / (1 + (shift - 1) * t)).tolist()


class SDModel(Model):
    """Stable Diffusion 1.5: a folder in diffusers' layout, or from the hub. In z = x / sqrt(alpha_bar), in which
    the noise has the deviation sigma, a diffusion is an ODE in t = sigma with d = eps (2206.00364)."""
    kind, guidance, unit, multistep, size, sample_steps, cfg_scale = "sd", True, 64, True, 512, 25, 7.5
    examples = ["an astronaut riding a horse on the moon, photograph", "a bowl of fruit, oil painting"]

    def __init__(self, name, args):
        files = find_base(name)
        if "sd" not in files:
            raise Stop(f"{name} is another kind of model; of folders this script serves those of Stable Diffusion 1.5")
        super().__init__(Path(name).resolve().name, files["sd"][0], args)
        dtype = self.dtype
        scheduler = read_json(files["scheduler"][0])
        try:
            self.alpha_bar, get = alpha_bar_of(scheduler), scheduler.get
            self.spacing = get("timestep_spacing", "linspace"), get("steps_offset", 0), "dpmpp_2m"
            odd = [k for k in ("rescale_betas_zero_snr", "trained_betas") if get(k)]
            if odd or get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
                raise Stop(f"{name}: this script does not know {', '.join(odd) or 'its prediction_type'}")
            self.v_prediction = get("prediction_type", "epsilon") == "v_prediction"
            with torch.device("meta"):
                self.network = SDUNet(read_json(files["unet"][0]))
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as e:
            raise Stop(f"{name} has a config.json that this script does not understand: {e!r}")
        self.prompts = Prompts(files, "text_encoder", "tokenizer", self.device, dtype)
        config, *weights = files["unet"]
        load_frozen(self.network, read_tensors(weights), weights[0], self.device, dtype, args.quant)
        config, *weights = files["vae"]
        self.vae = self.settle(open_vae(weights, read_json(config)))
        self.network = self.settle(self.network)
        self.sigmas = ((1 - self.alpha_bar) / self.alpha_bar).sqrt().numpy()
        self.parts = {"unet": self.network, "text_encoder": self.prompts.tower}

    def shape(self, width, height):
        return self.network.conv_in.in_channels, height // 8, width // 8

    def times(self, steps, width, height):
        return [*np.interp(spaced(steps, len(self.sigmas), *self.spacing), range(len(self.sigmas)),
                           self.sigmas).tolist(), 0.0]

    def init_noise_sigma(self, t):
        return math.sqrt(1 + t * t)

    def check_text(self, text):
        return too_long(text, self.prompts.bpe, self.prompts.tower.length)

    def read(self, text):
        return [self.prompts.read(self.prompts.ids([text])[0].to(self.device))[1]]           # (1, 77, D)

    def timestep(self, t):
        return float(np.interp(t, self.sigmas, range(len(self.sigmas))))

    def derivative(self, z, t, timesteps, text):
        xt = z / (1 + t ** 2).sqrt()
        out = self.call_network(xt, timesteps, text)
        return (xt * t + out) / (1 + t ** 2).sqrt() if self.v_prediction else out

    @torch.no_grad()
    def decode(self, z):
        with self.amp():
            return to_uint8(self.vae.decode(z[None]).float())[0]


class ClassModel(Model):
    """What is told a class, by name or number, or nothing at all."""

    def describe(self, path, script):
        """Reads a model.safetensors -> its tensors, settings and data; takes over what all such models have."""
        tensors, saved, about = read_model(path, script)
        self.size, self.sample_steps, told = saved["size"], saved["sample_steps"], saved["class_cond"]
        self.classes = list(about["classes"]) if told else []
        if self.args.quant:
            raise Stop(f"--quant is for models that are told a text; {path} is told a class, or nothing")
        self.guidance, self.cfg_scale = bool(self.classes), saved["cfg_scale"] if self.classes else 1.0
        self.cfg_interval, self.parts = saved["cfg_interval"], {}
        self.examples = self.classes or [""]
        return tensors, saved, about

    def check_text(self, text):
        if not self.classes and text:
            return "has to be empty: this model is told nothing"
        names = [*self.classes, *map(str, range(len(self.classes))), ""]
        return None if text in names else f"has to be a class: {', '.join(self.classes)[:300]}; or empty"

    def read(self, text):
        if not self.classes:
            return []
        y = self.classes.index(text) if text in self.classes else int(text or len(self.classes))     # none: the last
        return [torch.tensor([y], device=self.device)]

    def network_args(self, text):
        return text


class LatentModel(ClassModel):
    """A model.safetensors of latent_dit.py: a flow of latents."""
    kind, widths = "latent_dit", {"tiny": (6, 192, 3), "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16),
                                  "XL": (28, 1152, 16)}

    def __init__(self, path, args, script):
        super().__init__(path.resolve().parent.name, path, args)
        tensors, saved, about = self.describe(path, script)
        self.vae = own_vae(tensors, saved, path)
        self.network = LabelDiT(self.vae.channels, saved["patch_size"], *self.widths[saved["model"]], len(self.classes))
        self.unit, self.shift = self.vae.factor * saved["patch_size"], saved["time_shift"]
        if fingerprint(self.vae) != about["vae_key"]:
            raise Stop(f"{path} was trained with another --vae")
        load_weights(self.network, {k: v for k, v in tensors.items() if not k.startswith(("vae.", "repa."))}, path)
        self.network.grid = self.size // self.unit
        self.network, self.vae = self.settle(self.network), self.settle(self.vae)

    shape, times = TextModel.shape, TextModel.times


# -----------------------------------------------------------------------------
# The API: what a request may ask for. One table says what is checked and what /openapi.json tells of it.


class Refused(Exception):
    """A request that is not done, with the status, the error and the headers that the client gets."""

    def __init__(self, status, message, param=None, code=None, headers=()):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers)

    def body(self):
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else \
            "invalid_request_error"
        return {"error": dict(message=str(self), type=kind, param=self.param, code=self.code)}


FINAL = {"x-should-retry": "false"}  # to OpenAI's clients, which would do the same work twice more in vain
IGNORED = ("quality", "style", "moderation", "user")  # of OpenAI's, without meaning here
MAX_BODY = 64 * 1024


def fields_of(model, args):
    """What POST /v1/images/generations takes, {name: JSON schema}."""
    text = dict(type="string", maxLength=2000)
    fields = dict(
        prompt=dict(text, description="what to draw, such as: " + model.examples[0]),
        negative_prompt=dict(text, default="", description="what to keep away from, by guidance"),
        class_label=dict(anyOf=[dict(type="string"), dict(type="integer")], description="the same as prompt: one of "
                         + ", ".join(model.classes)),
        model=dict(type="string", enum=[model.name]),
        n=dict(type="integer", minimum=1, maximum=args.max_n, default=1, description="how many pictures"),
        size=dict(type="string", pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", default="auto",
                  description=f"auto or like {model.size}x{model.size}, which is what auto means: width x height in "
                              f"pixels, multiples of {model.unit}"),
        seed=dict(type="integer", minimum=0, maximum=2 ** 53 - 1,
                  description="seed of the first picture, the next has the next; random unless given"),
        num_inference_steps=dict(type="integer", minimum=1, maximum=args.max_steps,
                                 default=min(args.max_steps, model.sample_steps),
                                 description="steps from noise to data"),
        guidance_scale=dict(type="number", minimum=0, maximum=100, default=model.cfg_scale,
                            description="strength of classifier-free guidance; 1: off, which halves the work"),
        lora=dict(anyOf=[dict(type="string"), dict(type="object"), dict(type="array")],
                  description='a LoRA\'s name, or several, as "name" or {"name": ..., "weight": 0.8}; there are: '
                              + (", ".join(model.loras) or "none")),
        response_format=dict(type="string", enum=["b64_json", "url"], default="b64_json"),
        output_format=dict(type="string", enum=["png", "jpeg"] + ["webp"] * features.check("webp"), default="png"),
        output_compression=dict(type="integer", minimum=0, maximum=100, default=90,
                                description="quality of jpeg and webp, in percent"),
        background=dict(type="string", enum=["auto", "opaque"], default="auto"),
        stream=dict(type="boolean", default=False, description="pictures as server-sent events"),
        partial_images=dict(type="integer", minimum=0, maximum=8, default=0,
                            description="with stream: how many pictures to send on the way"),
        progress=dict(type="boolean", default=False, description="with stream: an event for each step, too; "
                      "OpenAI's clients take it for a partial image without a picture"))
    if not model.classes:
        del fields["class_label"]
    if isinstance(model, ClassModel):
        del fields["negative_prompt"]
        fields["prompt"]["default"] = ""
    if not model.guidance:
        del fields["guidance_scale"]
    return fields | {name: dict(description="taken for the sake of clients, without effect") for name in IGNORED}


def check_value(name, value, schema, called=None):
    """Raises Refused unless a value is as its JSON schema says, of which it knows what fields_of() has."""
    def wrong(sentence):
        raise Refused(400, f"{called or name} {sentence}", name, "invalid_value")
    kinds = dict(string=(str, "text"), integer=(int, "a whole number"), number=((int, float), "a number"),
                 boolean=(bool, "true or false"), array=(list, "a list"), object=(dict, "an object"))
    types = [kinds[s["type"]] for s in schema.get("anyOf", [schema] * ("type" in schema))]
    if types and not any(isinstance(value, t) and isinstance(value, bool) == (t is bool) for t, _ in types):
        wrong("has to be " + " or ".join(words for _, words in types))
    if name == "model" and value not in schema["enum"]:
        raise Refused(404, f"there is no model {value[:100]!r}; this server has {schema['enum'][0]}", name,
                      "model_not_found")
    if "enum" in schema and value not in schema["enum"]:
        wrong(f"has to be one of {', '.join(schema['enum'])}")
    if "minimum" in schema and not schema["minimum"] <= value <= schema["maximum"]:
        wrong(f"has to lie between {schema['minimum']} and {schema['maximum']}")
    if "maxLength" in schema and len(value) > schema["maxLength"]:
        wrong(f"has {len(value)} characters, and {schema['maxLength']} is the most")
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        wrong("has to be " + schema["description"])


def parse_json(body):
    """The object that is the body of a request. Raises Refused."""
    def no_constant(name):
        raise ValueError(f"{name} is no JSON")
    try:
        asked = json.loads(body.decode("utf-8"), parse_constant=no_constant)
    except (ValueError, RecursionError) as e:
        why = "it is nested too deeply" if isinstance(e, RecursionError) else str(e).partition(";")[0]
        raise Refused(400, f"the body is not JSON in UTF-8: {why[:100]}", code="invalid_json")
    if not isinstance(asked, dict):
        raise Refused(400, "the body has to be a JSON object, such as {\"prompt\": \"...\"}", code="invalid_json")
    return asked


def make_job(asked, model, fields):
    """The body of a request -> its Job. Raises Refused."""
    asked = {name: value for name, value in asked.items() if value is not None}      # null: as if it were not there
    for name, value in asked.items():
        if name not in fields:
            raise Refused(400, f"{name[:100]!r} is not known; there are {', '.join(fields)}", name[:100],
                          "unknown_parameter")
        check_value(name, value, fields[name])
    if "class_label" in asked:
        if asked.get("prompt"):
            raise Refused(400, "class_label and prompt say the same: one of them", "class_label", "invalid_value")
        asked["prompt"] = str(asked["class_label"])
    for name in ("partial_images", "progress"):
        if asked.get(name) and not asked.get("stream"):
            raise Refused(400, f"{name} is for stream", name, "invalid_value")
    if asked.get("stream") and asked.get("response_format") == "url":
        raise Refused(400, "response_format has to be b64_json with stream", "response_format", "invalid_value")
    asked = {name: schema["default"] for name, schema in fields.items() if "default" in schema} | asked
    if "prompt" not in asked:
        raise Refused(400, "prompt is missing", "prompt", "missing_required_parameter")
    for name in [name for name in ("prompt", "negative_prompt") if name in fields]:
        param = "class_label" if name == "prompt" and "class_label" in asked else name
        try:
            asked[name].encode()
        except UnicodeEncodeError:
            raise Refused(400, f"{param} is not Unicode: it has half of a surrogate pair", param, "invalid_value")
        if wrong := model.check_text(asked[name]):
            raise Refused(400, f"{param} {wrong}", param, "invalid_value")
    width, height = [model.size] * 2 if asked["size"] == "auto" else map(int, asked["size"].split("x"))
    if width % model.unit or height % model.unit or max(width, height) > model.max_size:
        raise Refused(400, f"the sides of size have to be multiples of {model.unit}, and at most {model.max_size}",
                      "size", "invalid_value")
    lora = []
    named = asked.get("lora", [])
    named = named if isinstance(named, list) else [named]
    if len(named) > 8:
        raise Refused(400, "lora has more than 8 entries", "lora", "invalid_value")
    for entry in named:
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or entry.keys() - {"name", "weight"}:
            raise Refused(400, 'an entry of lora is "name" or {"name": ..., "weight": 0.8}', "lora", "invalid_value")
        if entry["name"] not in model.loras:
            there = ", ".join(model.loras) or "none"
            raise Refused(400, f"there is no LoRA {entry['name'][:100]!r}; there are: {there}", "lora",
                          "lora_not_found")
        weight = entry.get("weight", 1)
        check_value("lora", weight, dict(type="number", minimum=-10, maximum=10), "the weight of a lora")
        lora.append((entry["name"], float(weight)))
    seed = asked.setdefault("seed", secrets.randbelow(2 ** 31))
    check_value("seed", seed + asked["n"] - 1, fields["seed"])
    times = model.times(asked["num_inference_steps"], width, height)
    if any(a <= b for a, b in zip(times, times[1:])):
        raise Refused(400, "num_inference_steps is more than this model has noise levels", "num_inference_steps",
                      "invalid_value")
    steps, k = len(times) - 1, asked["partial_images"] if asked["stream"] else 0
    job = Job(asked, float(asked.get("guidance_scale", 1)), {steps * i // (k + 1) for i in range(1, k + 1)} - {0})
    shape = model.shape(width, height)
    job.pictures = [Picture(job, i, seed + i, shape, times, tuple(sorted(lora))) for i in range(asked["n"])]
    asked["size"] = f"{width}x{height}"
    return job


def encode(picture, asked):
    """uint8 (H, W, 3) -> the bytes of a file."""
    file, kind = io.BytesIO(), asked["output_format"]
    Image.fromarray(picture).save(file, kind, **({} if kind == "png" else dict(quality=asked["output_compression"])))
    return file.getvalue()


class Shelf:
    """Pictures for response_format url, in memory: the newest, for an hour, under names that cannot be guessed."""
    most, seconds = 256 * 2 ** 20, 3600

    def __init__(self):
        self.pictures, self.size, self.lock = collections.OrderedDict(), 0, threading.Lock()

    def put(self, content, kind):
        name, now = f"{secrets.token_urlsafe(18)}.{kind}", time.monotonic()
        with self.lock:
            self.pictures[name], self.size = (now, content), self.size + len(content)
            while self.size > self.most or now - next(iter(self.pictures.values()))[0] > self.seconds:
                self.size -= len(self.pictures.popitem(last=False)[1][1])
        return name

    def get(self, name):
        with self.lock:
            put, content = self.pictures.get(name, (0, None))
        return content if content and time.monotonic() - put < self.seconds else None


# -----------------------------------------------------------------------------
# HTTP. A thread for each client; the threads wait, the engine works.

READ_SECONDS, WRITE_SECONDS = 20, 30  # for a whole request to come; for a part of an answer to be taken


def is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class InTime(socket.SocketIO):
    """Reads from a socket until a deadline, however slowly the bytes drip in."""
    until = math.inf

    def readinto(self, b):
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request came too slowly")
        self._sock.settimeout(left)
        return super().readinto(b)


class Lines(io.BufferedReader):
    """A lone CR is no end of a line (RFC 9112 2.2), but Python's parser of headers takes it for one: a header could
    hide another."""

    def readline(self, size=-1):
        line = super().readline(size)
        return line.replace(b"\r", b" ", line.count(b"\r") - line.endswith(b"\r\n"))


class Server(http.server.ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def __init__(self, args):
        self.address_family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        super().__init__((args.host, args.port), Handler)
        self.args, self.engine, self.model, self.fields, self.shelf = args, None, None, None, Shelf()
        self.slots, self.lock = threading.Semaphore(args.connections), threading.Lock()
        self.counted, self.durations, self.open_requests = collections.Counter(), collections.Counter(), 0
        host = f"[{args.host}]" if ":" in args.host else args.host
        self.url = f"http://{host}:{self.server_port}"

    def process_request(self, request, client_address):
        if self.slots.acquire(blocking=False):
            try:
                return super().process_request(request, client_address)
            except RuntimeError:  # no more threads
                self.slots.release()
        with self.lock:
            self.counted["other", 503] += 1
        log(event="refused", status=503, client=client_address[0], error="too many clients")
        content = json.dumps(Refused(503, "too many clients; try again later").body()).encode()
        try:
            request.settimeout(0.1)
            request.recv(MAX_BODY)  # a client that is cut off while it still sends would not see the answer
            request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Type: application/json\r\n"
                            b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(content), content))
        except OSError:
            pass
        self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):                           # OSError: a client has gone
            log(event="error", error=traceback.format_exc()[-2000:])


class Handler(http.server.BaseHTTPRequestHandler):
    """One client. Each request gets one answer and one line in the log."""
    protocol_version, server_version, sys_version, status = "HTTP/1.1", "serve.py", "", 0

    def setup(self):
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.reader = InTime(self.connection, "rb")
        self.rfile = Lines(self.reader)

    def handle_one_request(self):
        try:
            for _ in range(2):  # to wait for a request, and from its first byte for all of it
                self.reader.until = time.monotonic() + READ_SECONDS
                self.rfile.peek(1)
        except TimeoutError:
            self.close_connection = True
        else:
            super().handle_one_request()

    def finish(self):
        """An answer to a request that was not read to its end would be lost with the connection: let it arrive."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
            self.reader.until, b = time.monotonic() + 2, bytearray(1 << 16)
            while self.reader.readinto(b):
                pass
        except OSError:
            pass
        super().finish()

    def log_message(self, *args):
        pass

    def log_error(self, form, *args):
        """Of the base class, for what was not read to the end of its head."""
        log(event="dropped", client=self.client_address[0], error=form % args)

    def version_string(self):
        return self.server_version  # without a blank for the missing sys_version

    def send_error(self, code, message=None, explain=None):
        """Of the base class, for what is no HTTP."""
        self.close_connection, self.about, self.id = True, {}, secrets.token_hex(8)
        self.request_version, began = "HTTP/1.1", time.monotonic()               # to have a head at all
        self.command, self.where = getattr(self, "command", None), getattr(self, "path", "").partition("?")[0]
        allow = {"Allow": ROUTES[self.where][0]} if self.where in ROUTES else {"Allow": "GET, HEAD, POST"}
        self.refuse(Refused(405, f"there is no {self.command} here", headers=allow) if code == 501 else
                    Refused(code, message or self.responses[code][1] or self.responses[code][0]))
        self.count(began)

    def answer(self):
        if self.request_version == "HTTP/0.9":
            return self.send_error(400, "a request ends with HTTP/1.1")
        self.about, self.status, began = {}, 0, time.monotonic()
        given = self.headers.get("X-Request-Id", "")
        self.id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else secrets.token_hex(8)
        self.where = re.sub(r"^https?://[^/?#]*", "", self.path).partition("?")[0].partition("#")[0]
        with self.server.lock:
            self.server.open_requests += 1
        body = None
        try:
            handler = self.route()
            body = self.read_body()
            handler(self, body)
        except Refused as e:
            unread = body is None and self.headers.get("Content-Length", "0") != "0"
            self.close_connection |= unread or "Transfer-Encoding" in self.headers
            self.refuse(e)
        except TimeoutError:
            self.close_connection = True
            if self.status:  # an answer that nobody takes
                self.status = 499
            else:
                self.refuse(Refused(408, "the request came too slowly"))
        except ConnectionError:
            self.close_connection, self.status = True, 499                       # nginx's number for: has hung up
        except Exception:
            log(event="error", id=self.id, error=traceback.format_exc()[-2000:])
            self.close_connection = True
            if not self.status:
                self.refuse(Refused(500, "this has failed; the log of the server says why"))
        finally:
            with self.server.lock:
                self.server.open_requests -= 1
            self.count(began)
    do_GET = do_HEAD = do_POST = answer

    def count(self, began):
        """A request is over: for /metrics and the log."""
        took, known = time.monotonic() - began, self.where if self.where in ROUTES else "other"
        with self.server.lock:
            self.server.counted[known, self.status] += 1
            self.server.durations[known] += took
        log(event="request", id=self.id, method=self.command, path=self.where[:200], status=self.status,
            ms=round(1000 * took), client=self.client_address[0], **self.about)

    def read_body(self):
        """The body, whose length has to be told in the one way that cannot be misread. Raises Refused."""
        lengths = self.headers.get_all("Content-Length", [])
        if "Content-Encoding" in self.headers:
            raise Refused(415, "bodies are not taken compressed")
        if self.headers.defects or "Transfer-Encoding" in self.headers or len(lengths) > 1 \
                or any(not re.fullmatch(r"[0-9]{1,12}", length, re.ASCII) for length in lengths):
            self.close_connection = True
            raise Refused(400, "the headers do not say in one way how long the body is: send one Content-Length, and "
                          "no chunks")
        length = int(lengths[0]) if lengths else 0
        if length > MAX_BODY:
            self.close_connection = True
            raise Refused(413, f"the body has {length} bytes, and {MAX_BODY} is the most")
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionError("hung up")
        return body

    def route(self):
        """-> what answers this request, before its body is read. Raises Refused."""
        server, names = self.server, self.headers.get_all("Host", [])
        host = re.sub(r":\d*$", "", names[0] if names else "localhost").strip("[]").lower()
        if len(names) > 1:
            raise Refused(400, "there are two Hosts")
        if not (server.args.public or server.args.api_key or is_loopback(host)):  # DNS rebinding
            raise Refused(403, f"this server is for this machine alone, by the name localhost, not {host[:100]}; "
                          "started with a key, or with --public, it answers to every name")
        method, handler = ROUTES.get(self.where, (None, None))
        if self.where.startswith(FILES):
            method, handler = "GET", Handler.file
        if self.where.startswith("/v1/models/"):
            method, handler = "GET", Handler.one_model
        if handler is None:
            raise Refused(404, f"there is nothing at {self.where[:100]}; /openapi.json tells what there is")
        if method != {"HEAD": "GET"}.get(self.command, self.command):
            raise Refused(405, f"{self.where} takes {method}", headers={"Allow": method})
        if self.command == "POST" and self.headers.get_content_type() != "application/json":
            raise Refused(415, "Content-Type has to be application/json")  # a page of another origin cannot send that
        if self.where not in OPEN and not self.where.startswith(FILES) and server.args.api_key:
            scheme, _, key = self.headers.get("Authorization", "").partition(" ")
            right = hmac.compare_digest(key.encode("latin-1"), server.args.api_key.encode())
            if scheme.lower() != "bearer" or not right:
                raise Refused(401, "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                              code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self.where not in OPEN and server.engine is None:
            raise Refused(503, "the model is being read", headers={"Retry-After": "2"})
        return handler

    def respond(self, status, content, kind="application/json", **headers):
        """A whole answer; content: bytes, or what is to be JSON."""
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.head(status, kind, {"Content-Length": str(len(content)), **headers})
        for k in range(0, len(content) if self.command != "HEAD" else 0, 1 << 16):
            self.wfile.write(content[k:k + (1 << 16)])  # for each part the client has WRITE_SECONDS

    def head(self, status, kind, headers):
        self.status = status
        self.connection.settimeout(WRITE_SECONDS)
        self.send_response(status)
        self.close_connection |= bool(self.server.engine and self.server.engine.refusal)
        for name, value in {"Content-Type": kind, "X-Request-Id": self.id, "X-Content-Type-Options": "nosniff",
                            "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
                            "Cross-Origin-Resource-Policy": "same-origin", **headers,
                            **({"Connection": "close"} if self.close_connection else {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def refuse(self, e):
        self.about["error"] = str(e)[:200]
        try:
            self.respond(e.status, e.body(), **e.headers)
        except OSError:
            self.close_connection = True

    # what there is

    def page(self, body):
        self.respond(200, PAGE, "text/html; charset=utf-8", **{
            "Content-Security-Policy": f"default-src 'none'; connect-src 'self'; img-src data:; "
            f"style-src '{PAGE_HASHES[0]}'; script-src '{PAGE_HASHES[1]}'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"})

    def healthz(self, body):
        failed = self.server.engine and not self.server.engine.is_alive()
        self.respond(500 if failed else 200, dict(status="failed" if failed else "ok"))

    def readyz(self, body):
        engine = self.server.engine
        ready = bool(engine and engine.ready and not engine.refusal)
        self.respond(200 if ready else 503, dict(status="ready" if ready else "not ready"))

    def models(self, body):
        self.respond(200, dict(object="list", data=[self.about_model()]))

    def one_model(self, body):
        if urllib.parse.unquote(self.where) != f"/v1/models/{self.server.model.name}":
            raise Refused(404, "there is no such model", "model", "model_not_found")
        self.respond(200, self.about_model())

    def about_model(self):
        model, fields = self.server.model, self.server.fields
        return dict(
            id=model.name, object="model", created=model.created, owned_by="serve.py", kind=model.kind, size=model.size,
            unit=model.unit, max_size=model.max_size, loras=list(model.loras),
            examples=model.examples[:3], classes=model.classes, max_n=self.server.args.max_n,
            defaults={name: schema["default"] for name, schema in fields.items() if "default" in schema})

    def openapi(self, body):
        error = dict(description="what is wrong", content={"application/json": dict(schema=dict(type="object"))})
        done = dict(description="OK")
        name = [dict(name="name", required=True, schema=dict(type="string"), **{"in": "path"})]
        paths = {where: {method.lower(): dict(summary=handler.__name__, responses={"200": done})}
                 for where, (method, handler) in ROUTES.items()}
        for where in ("/v1/models/{name}", FILES + "{name}"):
            paths[where] = dict(get=dict(parameters=name, responses={"200": done, "404": error}))
        statuses = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
        paths["/v1/images/generations"]["post"] = dict(
            summary="draws pictures", responses={"200": done, **{str(status): error for status in statuses}},
            requestBody=dict(required=True, content={"application/json": dict(schema=dict(
                type="object", additionalProperties=False, properties=self.server.fields,
                anyOf=[dict(required=["prompt"])] + [dict(required=["class_label"])] * bool(self.server.model.classes)
            ))}))
        key = dict(security=[dict(key=[])],
                   components=dict(securitySchemes=dict(key=dict(type="http", scheme="bearer"))))
        self.respond(200, dict(openapi="3.1.0", info=dict(title="serve.py", version="1"), paths=paths,
                               **(key if self.server.args.api_key else {})))

    def metrics(self, body):
        engine, server, lines = self.server.engine, self.server, []
        with server.lock:
            counted, durations = dict(server.counted), dict(server.durations)

        def metric(name, kind, **values):
            lines.append(f"# TYPE serve_{name} {kind}")
            lines.extend(f"serve_{labels} {value}" for labels, value in values.items())
        metric("requests_total", "counter", **{f'requests_total{{path="{path}",status="{status}"}}': n
                                               for (path, status), n in counted.items()})
        metric("request_seconds", "summary", **{
            f'request_seconds_{what}{{path="{path}"}}': value for path, seconds in durations.items() for what, value in
            (("sum", round(seconds, 6)), ("count", sum(n for (p, _), n in counted.items() if p == path)))})
        for name in ("pictures", "steps", "picture_steps"):
            metric(f"{name}_total", "counter", **{f"{name}_total": engine.counted[name]})
        metric("pictures_under_way", "gauge", pictures_under_way=len(engine.pictures))
        metric("ready", "gauge", ready=int(engine.ready))
        self.respond(200, ("\n".join(lines) + "\n").encode(), "text/plain; version=0.0.4")

    def file(self, body):
        content = self.server.shelf.get(self.where.removeprefix(FILES))
        if content is None:
            raise Refused(404, "there is no such picture, or no more: the newest are kept, for an hour at most")
        self.respond(200, content, f"image/{self.where.rpartition('.')[2]}",
                     **{"Cross-Origin-Resource-Policy": "cross-origin"})  # for <img> on the pages of other servers

    def generations(self, body):
        asked = parse_json(body)
        job = make_job(asked, self.server.model, self.server.fields)
        job.id = self.id
        self.about |= {k: job.asked[k] for k in ("n", "size", "num_inference_steps", "seed")}
        if job.pictures[0].lora:
            self.about["lora"] = job.pictures[0].lora
        if self.server.args.log_prompts:
            self.about["prompt"] = job.asked["prompt"]
        self.server.engine.submit(job)
        try:
            (self.stream if job.asked["stream"] else self.collect)(job)
        finally:
            job.over = True  # whatever happened here: it costs no more
            self.about["queue_ms"] = round(1000 * ((job.started or time.monotonic()) - job.began))

    def events(self, job):
        """What the engine tells of a job, until all is drawn. Raises Refused, and ConnectionError when the client has
        hung up meanwhile."""
        left = len(job.pictures)
        while left:
            try:
                what, about = job.news.get(timeout=0.2)
            except queue.Empty:
                what = about = None
            if what == "failed":
                raise about
            if self.hung_up():
                raise ConnectionError("hung up")
            if time.monotonic() - job.began > self.server.args.deadline:
                raise Refused(504, f"this took longer than {self.server.args.deadline:g} seconds", code="timeout",
                              headers=FINAL)
            if what:
                left -= what == "picture"
                yield what, about

    def hung_up(self):
        """Whether the client has closed its side. Where the system cannot say so, that shows at the end of what it has
        sent."""
        if hasattr(select, "POLLRDHUP"):
            poll = select.poll()
            poll.register(self.connection, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
            return bool(poll.poll(0))
        try:
            self.connection.settimeout(0)
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        finally:
            self.connection.settimeout(WRITE_SECONDS)

    def entry(self, picture, pixels):
        """What the answer says of one picture."""
        asked, content = picture.job.asked, encode(pixels, picture.job.asked)
        if asked["response_format"] == "url":
            host = self.headers.get("Host") or self.server.url.partition("//")[2]
            name = self.server.shelf.put(content, asked["output_format"])
            scheme = "https" if self.headers.get("X-Forwarded-Proto") == "https" else "http"
            return dict(url=f"{scheme}://{host}{FILES}{name}", seed=picture.seed)
        return dict(b64_json=base64.b64encode(content).decode(), seed=picture.seed)

    def collect(self, job):
        drawn = {about[0].index: self.entry(*about) for what, about in self.events(job) if what == "picture"}
        self.respond(200, dict(created=int(time.time()), data=[drawn[i] for i in range(len(drawn))],
                               background="opaque", model=self.server.model.name, size=job.asked["size"],
                               output_format=job.asked["output_format"]))

    def stream(self, job):
        """Server-sent events: OpenAI's, and image_generation.progress where it is asked for. What fails after the
        head goes as an event."""
        self.close_connection, done, sent = True, 0, collections.Counter()
        total = sum(len(p.times) - 1 for p in job.pictures)
        self.head(200, "text/event-stream", {})

        def send(kind, **about):
            text = json.dumps(dict(type=kind, **about))
            self.wfile.write(f"event: {kind}\ndata: {text}\n\n".encode())
        common = dict(created_at=int(time.time()), size=job.asked["size"], output_format=job.asked["output_format"],
                      quality="auto", background="opaque")
        try:
            for what, about in self.events(job):
                if what == "step":
                    done += 1
                    if job.asked["progress"]:
                        send("image_generation.progress", step=done, steps=total)
                else:
                    kind, i = "completed" if what == "picture" else "partial_image", about[0].index
                    more = {} if what == "picture" else dict(partial_image_index=sent[i])
                    sent[i] += 1
                    send(f"image_generation.{kind}", image_index=i, **self.entry(*about), **more, **common)
        except Refused as e:
            self.about["error"], self.status = str(e), e.status                  # for the log: 200 has been said
            send("error", **e.body())


FILES = "/v1/images/files/"
ROUTES = {"/": ("GET", Handler.page), "/healthz": ("GET", Handler.healthz), "/readyz": ("GET", Handler.readyz),
          "/metrics": ("GET", Handler.metrics), "/openapi.json": ("GET", Handler.openapi),
          "/v1/models": ("GET", Handler.models), "/v1/images/generations": ("POST", Handler.generations)}
OPEN = ("/", "/healthz", "/readyz")  # without the API key; the names of files cannot be guessed


def log(**about):
    """One line of JSON."""
    try:
        sys.stdout.write(json.dumps(dict(time=round(time.time(), 3), **about)) + "\n")
        sys.stdout.flush()
    except OSError:  # nobody reads it any more
        pass


# -----------------------------------------------------------------------------
# The page: one file, nothing from elsewhere.

STYLE = """
:root { color-scheme: light dark; --line: #8884; --accent: #d2591e; font: 16px/1.45 system-ui, sans-serif; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; }
h1 { font-size: 1.2rem; margin: 0 0 .8rem; } h1 small { font-weight: normal; opacity: .65; margin-left: .5rem; }
main { display: grid; gap: 1.2rem; grid-template-columns: minmax(16rem, 22rem) 1fr; }
@media (max-width: 44rem) { main { grid-template-columns: 1fr; } }
label { display: block; margin: .7rem 0 .2rem; font-size: .9rem; }
textarea, input, select, button { font: inherit; padding: .45rem .7rem; border: 1px solid var(--line); }
textarea, input, select, button { border-radius: .5rem; background: none; color: inherit; }
textarea, input, select { width: 100%; }
option { color: initial; }
[hidden] { display: none !important; }
.row { display: grid; grid-template-columns: repeat(3, 1fr); gap: .6rem; }
textarea { resize: vertical; }
button { cursor: pointer; }
button.main { background: var(--accent); border-color: var(--accent); color: #fff; font-weight: 600; }
button:disabled { opacity: .5; cursor: default; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.bar { margin: 1rem 0; display: flex; gap: .6rem; flex-wrap: wrap; }
progress { width: 100%; height: .5rem; accent-color: var(--accent); }
#say { min-height: 1.5em; margin: .3rem 0; } #say.bad { color: #c22; }
#examples button { font-size: .8rem; padding: .15rem .5rem; margin: .3rem .3rem 0 0; text-align: left; }
#gallery { display: grid; gap: 1rem; align-content: start; }
#gallery { grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); }
figure { margin: 0; } figure.small img { image-rendering: pixelated; } figure.under img { filter: saturate(.7); }
img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block; border-radius: .6rem; background: #8883; }
figcaption { font-size: .8rem; margin-top: .3rem; overflow-wrap: anywhere; } figcaption a { margin-right: .6rem; }
"""

SCRIPT = """
const $ = id => document.getElementById(id);
const fields = ['negative_prompt', 'num_inference_steps', 'guidance_scale', 'seed', 'n', 'size'];
let model = null, stop = null;
const key = () => sessionStorage.getItem('key') || '';
const headers = () => ({'Content-Type': 'application/json', ...(key() && {Authorization: 'Bearer ' + key()})});
const say = (text, bad) => { $('say').textContent = text; $('say').className = bad ? 'bad' : ''; };

async function wrong(answer) {
  try { return (await answer.json()).error.message; } catch { return answer.status + ' ' + answer.statusText; }
}

async function start() {
  const answer = await fetch('v1/models', {headers: headers()});
  $('lock').hidden = answer.status != 401;
  if (answer.status == 401) {
    say(key() ? 'The key is wrong.' : 'This server asks for a key.', key() != ''); $('key').focus(); return;
  }
  if (answer.status == 503) { say(await wrong(answer)); setTimeout(begin, 1000); return; }
  if (!answer.ok) throw new Error(await wrong(answer));
  model = (await answer.json()).data[0];
  $('name').textContent = model.id;
  for (const name of fields) {
    $(name).value = model.defaults[name] ?? '';
    $(name).parentElement.hidden = name != 'seed' && !(name in model.defaults);
  }
  $('prompt').required = 'negative_prompt' in model.defaults;
  if (model.classes.length) {
    const choice = document.createElement('select');
    choice.id = 'prompt'; choice.append(new Option('any', ''), ...model.classes.map(text => new Option(text, text)));
    $('prompt').replaceWith(choice);
    choice.labels[0].textContent = 'Class';
  }
  $('n').max = model.max_n;
  const sides = [...new Set([.5, 1, 1.5, 2].map(k => k * model.size))].filter(
    side => side % model.unit == 0 && side <= model.max_size);
  const sizes = sides.flatMap(w => sides.map(h => w + 'x' + h));
  $('size').replaceChildren(new Option(`auto: ${model.size}`, 'auto'),
    ...sizes.map(s => new Option(s, s)));
  $('lora').replaceChildren(new Option('none', ''), ...model.loras.map(s => new Option(s, s)));
  $('loras').hidden = !model.loras.length;
  $('lora').onchange();
  const told = model.classes.length || model.examples.some(Boolean);
  $('prompt').hidden = $('prompt').labels[0].hidden = !told;
  $('examples').replaceChildren(...(model.classes.length ? [] : model.examples.filter(Boolean)).map(text => {
    const b = document.createElement('button'); b.type = 'button'; b.textContent = text;
    b.onclick = () => { $('prompt').value = text; $('prompt').focus(); }; return b; }));
  say('Ready.'); $('go').disabled = false; $(told ? 'prompt' : 'go').focus();
}

function asked() {
  const body = {prompt: $('prompt').value};
  for (const name of fields) if ($(name).value !== '')
    body[name] = ['negative_prompt', 'size'].includes(name) ? $(name).value : Number($(name).value);
  if ($('lora').value) body.lora = [{name: $('lora').value, weight: Number($('weight').value || 1)}];
  return body;
}

function card(body) {
  const f = document.createElement('figure'), img = new Image(), caption = document.createElement('figcaption');
  img.alt = body.prompt || 'a picture'; f.append(img, caption); f.className = 'under';
  if (model.size <= 128) f.classList.add('small');
  caption.textContent = 'waiting'; $('gallery').prepend(f);
  return {f, img, caption};
}

function finish({f, img, caption}, body, event) {
  f.classList.remove('under');
  const one = {...body, seed: event.seed, n: 1};
  const down = document.createElement('a'), again = document.createElement('button');
  down.href = img.src;
  down.download = body.prompt.replace(/[^a-z0-9]+/gi, '_').slice(0, 60) + '_' + event.seed + '.png';
  down.textContent = 'download';
  again.type = 'button'; again.textContent = 'copy as curl';
  const secret = key() ? ' -H "Authorization: Bearer $SERVE_API_KEY"' : '';
  again.onclick = async () => {
    const text = "curl " + new URL("v1/images/generations", location.href) + secret
      + " -H 'Content-Type: application/json' -d '" + JSON.stringify(one).replaceAll("'", "'\\\\''") + "'";
    try { await navigator.clipboard.writeText(text); say('Copied.'); } catch { say(text); }
  };
  const how = ['seed ' + event.seed, body.num_inference_steps && body.num_inference_steps + ' steps',
    body.guidance_scale != undefined && 'guidance ' + body.guidance_scale, body.size != 'auto' && body.size,
    body.negative_prompt && 'avoid ' + body.negative_prompt, ...(body.lora || []).map(l => l.name + ' x ' + l.weight)];
  caption.replaceChildren(body.prompt || 'any', document.createElement('br'), how.filter(Boolean).join(', ') + ' ',
    down, again);
}

async function draw() {
  const body = asked(), cards = [], focused = document.activeElement == $('go');
  for (let i = (body.n || 1) - 1; i >= 0; i--) cards[i] = card(body);  // the newest stand first
  stop = new AbortController();
  $('stop').hidden = $('bar').hidden = false; $('bar').removeAttribute('value');
  if (focused) $('stop').focus();  // a button that is disabled loses it
  $('go').disabled = true;
  say('Waiting for its turn.');
  if (innerWidth < 704) cards[0].f.scrollIntoView({block: 'center'});  // below the settings, on a phone
  let left = cards.length;
  try {
    const answer = await fetch('v1/images/generations', {method: 'POST', headers: headers(), signal: stop.signal,
      body: JSON.stringify({...body, stream: true, progress: true, partial_images: 5})});
    if (answer.status == 401) { begin(); throw new Error('The key is wrong.'); }
    if (!answer.ok) throw new Error(await wrong(answer));
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let text = ''; ;) {
      const {value, done} = await reader.read();
      if (done) break;
      const parts = (text + value).split('\\n\\n'); text = parts.pop();
      for (const part of parts) {
        const event = JSON.parse(part.slice(part.indexOf('data: ') + 6));
        if (event.error) throw new Error(event.error.message);
        if (event.type == 'image_generation.progress') {
          $('bar').max = event.steps; $('bar').value = event.step;
          if (event.step == 1) say('Drawing.');
          continue;
        }
        const c = cards[event.image_index];
        c.img.src = 'data:image/' + event.output_format + ';base64,' + event.b64_json;
        c.caption.textContent = 'under way';
        if (event.type == 'image_generation.completed') { finish(c, body, event); left--; }
      }
    }
    if (left) throw new Error('The connection broke off.');
    say('Done.');
  } catch (e) {
    for (const c of cards) if (c.f.classList.contains('under')) c.f.remove();
    say(e.name == 'AbortError' ? 'Stopped.' : e instanceof TypeError ? silent : e.message, e.name != 'AbortError');
  }
  $('go').disabled = false;
  if (document.activeElement == $('stop')) $('go').focus();
  $('stop').hidden = $('bar').hidden = true;
}

$('form').onsubmit = event => { event.preventDefault(); if (!$('go').disabled) draw(); };
$('form').addEventListener('invalid', () => say(''), true);  // the browser says it
$('lora').onchange = () => $('weight').parentElement.hidden = !$('lora').value;
$('prompt').onkeydown = event => {
  if (event.key != 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $('form').requestSubmit();
};
$('stop').onclick = () => stop.abort();
$('lock').onsubmit = event => { event.preventDefault(); sessionStorage.setItem('key', $('key').value); begin(); };
const silent = 'The server does not answer.';  // fetch throws a TypeError then
const begin = () => start().catch(e => say(e instanceof TypeError ? silent : e.message, true));
begin();
"""

PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Draw a picture</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>
<h1>Draw a picture<small id="name"></small></h1>
<form id="lock" hidden><label for="key">API key</label><input id="key" type="password" autocomplete="off">
<div class="bar"><button>Use it</button></div></form>
<main><form id="form">
<label for="prompt">Prompt</label><textarea id="prompt" rows="3" required></textarea><div id="examples"></div>
<div class="bar"><button class="main" id="go" disabled>Draw</button>
<button type="button" id="stop" hidden>Stop</button></div>
<progress id="bar" hidden aria-label="progress"></progress><p id="say" role="status" aria-live="polite">Loading.</p>
<div><label for="negative_prompt">Avoid (negative prompt)</label><input id="negative_prompt"></div>
<div class="row">
<div><label for="num_inference_steps">Steps</label><input id="num_inference_steps" type="number" min="1"></div>
<div><label for="guidance_scale">Guidance</label><input id="guidance_scale" type="number" min="0" step="any"></div>
<div><label for="seed">Seed</label><input id="seed" type="number" min="0" placeholder="random"></div></div>
<div class="row"><div><label for="n">Pictures</label><input id="n" type="number" min="1"></div>
<div><label for="size">Size</label><select id="size"></select></div></div>
<div class="row" id="loras" hidden><div><label for="lora">LoRA</label><select id="lora"></select></div>
<div><label for="weight">LoRA weight</label>
<input id="weight" type="number" min="-10" max="10" step="any" value="1"></div></div>
</form><section id="gallery" aria-label="Pictures"></section></main><script>{SCRIPT}</script></body></html>
""".encode()
PAGE_HASHES = ["sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
               for text in (STYLE, SCRIPT)]


# -----------------------------------------------------------------------------
# From here to the last section: the networks and what reads their files, the same text as in the scripts that train
# them. First LoRA and weights in 8 or 4 bits, as in finetune_lora.py.


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
# The UNet of Stable Diffusion, 2112.10752. B images, C channels, D width of a token, L text tokens. The names of the
# weights are those of the files, in diffusers' layout.


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


def alpha_bar_of(config):
    """What is left of the data's variance at each t in 0..T-1, by the scheduler's config.json, float64."""
    T, first, last = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    root = {"scaled_linear": 0.5, "linear": 1}[config["beta_schedule"]]
    return torch.cumprod(1 - torch.linspace(first ** root, last ** root, T, dtype=torch.float64) ** (1 / root), 0)


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


# -----------------------------------------------------------------------------
# What reads the text: the words of text2img.py's own tower, or CLIP.


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
# The transformer of latent_dit.py, which is told a class.


class LabelBlock(nn.Module):
    """The block of latent_dit.py, adaLN-Zero (2212.09748 section 3.2): time and class set shift, scale and gate."""

    def __init__(self, D, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(D, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp, self.adaLN = SelfAttention(D, heads), SwiGLU(D), nn.Linear(D, 6 * D)

    def forward(self, x, emb, positions):                                        # (B, N, D), (B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN(emb)[:, None].chunk(6, -1)    # (B, 1, D) each
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, positions)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)       # (B, N, D)


class LabelDiT(nn.Module):
    """(zt, t, y) -> velocity, as in latent_dit.py. zt (B, C, H, W), t (B,) in [0, 1], y (B,) labels or None."""

    def __init__(self, C, patch, depth, D, heads, n_classes):
        super().__init__()
        self.patch, self.heads, self.grid = patch, heads, None
        self.embed = nn.Conv2d(C, D, patch, patch)
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.label = nn.Embedding(n_classes + 1, D) if n_classes else None       # the last means "no label"
        self.blocks = nn.ModuleList([LabelBlock(D, heads) for _ in range(depth)])
        self.norm, self.adaLN = nn.RMSNorm(D, eps=1e-6, elementwise_affine=False), nn.Linear(D, 2 * D)
        self.out = nn.Linear(D, patch * patch * C)
        self.register_buffer("z_mean", torch.zeros(C, 1, 1))
        self.register_buffer("z_std", torch.ones(C, 1, 1))

    def forward(self, zt, t, y=None):                                            # (B, C, H, W), (B,), (B,)
        x = self.embed(zt).to(self.out.weight.dtype)
        H, W = x.shape[2:]                                                       # (B, D, H / patch, W / patch)
        positions = rope(H, W, x.shape[1] // self.heads, x.device, self.grid / max(H, W))
        x = x.flatten(2).transpose(1, 2)                                         # (B, N, D)
        emb = self.time(waves(1000 * t, 256).to(self.out.weight.dtype))          # (B, D); waves wants 0..1000
        emb = F.silu(emb if y is None else emb + self.label(y))
        for block in self.blocks:
            x = block(x, emb, positions)                                         # (B, N, D)
        shift, scale = self.adaLN(emb)[:, None].chunk(2, -1)
        x = self.out(self.norm(x) * (1 + scale) + shift)                         # (B, N, C patch^2)
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (H, W)), self.patch)           # (B, C, H, W)


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


# -----------------------------------------------------------------------------
# A folder in diffusers' layout, or such a repository of the hub.


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


def to_device(x, device):
    """x.to(device), without waiting for the step that a GPU is still at, for which the copy has to be pinned."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def to_uint8(x):
    """The inverse: (B, 3, H, W) in [-1, 1] -> numpy uint8 (B, H, W, 3)."""
    return ((x.float() + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


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
# Start: what was asked for, and one sentence with an exit status when it cannot be had.


def open_model(args):
    """The model of --ckpt and its LoRAs. Raises Stop."""
    name = args.ckpt or next((name for name in DEFAULT_CKPTS if Path(name).exists()), None)
    if name is None:
        raise Stop("there is no model in out/ yet: python text2img.py trains one in 10 to 20 minutes, or say --ckpt "
                   "FILE")
    kinds = {"text2img.py": TextModel, "latent_dit.py": LatentModel}
    if Path(name).is_file():
        _, about = load_safetensors(name)
        if about.get("script") not in kinds:
            raise Stop(f"{name} was made by {about.get('script', 'another program')}; this script serves models of "
                       + ", ".join(kinds))
        try:
            model = kinds[about["script"]](Path(name), args, about["script"])
        except (KeyError, TypeError, ValueError) as e:
            raise Stop(f"{name} does not describe its model: {e!r}; has it been edited?")
    else:
        model = SDModel(name, args)
    model.max_size = args.max_size or 2 * model.size
    if model.max_size < model.size:
        raise Stop(f"--max_size {args.max_size} is less than the model draws, {model.size}")
    if args.lora_dir and not Path(args.lora_dir).is_dir():
        raise Stop(f"--lora_dir {args.lora_dir} is no folder")
    files = sorted(Path(args.lora_dir).glob("*.safetensors")) if args.lora_dir else []
    if args.lora_dir and not files:
        below = next(iter(sorted(Path(args.lora_dir).glob("*/lora*.safetensors"))), None)
        raise Stop(f"--lora_dir {args.lora_dir} has no .safetensors"
                   + (f"; did you mean {below.parent}?" if below else ""))
    for file in files:
        model.add_lora(file.stem, file)
    if args.compile:
        torch._dynamo.config.cache_size_limit = 64  # of sizes of batch
        model.network.compile(dynamic=False)
    return model


def say(sentence):
    """For who sits before it; the log is for programs."""
    if sys.stderr.isatty():
        print(f"serve.py: {sentence}", file=sys.stderr, flush=True)


def serve(args):
    """Until a signal comes -> the exit status. After it what was taken is finished, and nothing more is taken."""
    try:
        server = Server(args)  # before the model is read: a port that is taken should not cost a minute
    except (OSError, OverflowError) as e:
        raise Stop(f"cannot listen at --host {args.host} --port {args.port}: {getattr(e, 'strerror', None) or e}", 1)
    threading.Thread(target=server.serve_forever, daemon=True, kwargs=dict(poll_interval=0.1)).start()
    began, came = time.time(), []
    say("the model is being read" + (" and compiled, which takes minutes" if args.compile else ""))
    server.model = model = open_model(args)
    server.fields = fields_of(model, args)
    engine = Engine(model, args.max_batch, args.max_queue)

    def note(number, frame):
        if came:
            os._exit(128 + number)
        came.append(number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    engine.start()
    server.engine = engine
    while engine.is_alive() and not came:
        if engine.ready and began:
            log(event="ready", url=server.url, model=model.name, loras=list(model.loras), device=str(model.device),
                dtype=str(model.dtype)[6:], seconds=round(time.time() - began, 2))
            say(f"open {server.url} in a browser; Ctrl-C ends this")
            began = None
        time.sleep(0.02 if began else 0.2)
    if engine.is_alive():
        with engine.changed:
            engine.refusal = "the server is going down"
        log(event="draining", pictures=len(engine.pictures))
        say(f"{len(engine.pictures)} pictures are finished first; Ctrl-C again ends this at once")
    until = time.monotonic() + args.deadline
    time.sleep(0.3)  # for clients that came just now to be told
    while (engine.pictures and engine.is_alive() or server.open_requests) and time.monotonic() < until:
        time.sleep(0.02)
    server.shutdown()
    if not engine.is_alive():
        raise Stop(engine.refusal, 1)
    ended, code = engine.end(max(0, until - time.monotonic())), 130 if came[0] == signal.SIGINT else 0
    log(event="stopped")
    if not ended:  # at the first step still, perhaps compiling: Python could not end beside that thread
        os._exit(code)
    return code


def main(argv=None):
    """-> the exit status: 0 after SIGTERM (143 before the model is there), 1 for a failure, 2 for wrong input, 130."""
    signal.signal(signal.SIGTERM, stop_at_once)
    try:
        return serve(parse_args(argv))
    except Stop as e:
        sentence, code = str(e), e.code
    except KeyboardInterrupt as e:
        sentence, code = "stopped before the model was there", 128 + (e.args or (2,))[0]
    except OSError as e:
        sentence, code = f"{e.filename or 'input or output'}: {e.strerror or e}", 1
    except (MemoryError, RuntimeError) as e:  # CUDA, MPS, the CPU and NumPy each have their own
        if not isinstance(e, MemoryError) and "out of memory" not in str(e) and "allocate memory" not in str(e):
            raise
        sentence, code = "out of memory: lower --max_batch, or serve a smaller model", 1
    print(f"serve.py: {sentence}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
