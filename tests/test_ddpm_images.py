"""ddpm_images.py: method and network, against closed forms and diffusers. Of both scripts: runs, sentences, data."""
import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import cfm_images
import ddpm_images as d

SMALL = "--preset smoke --size 16 --batch_size 8 --device cpu".split()
both = pytest.mark.parametrize("script", [d, cfm_images], ids=["ddpm", "cfm"])
each_pred = pytest.mark.parametrize("pred", ["eps", "v", "x0"])
each_schedule = pytest.mark.parametrize("schedule", ["linear", "cosine"])


@pytest.fixture(autouse=True)
def fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(script, *flags):
    """The script's main() with these flags, in this process. Training changes what Ctrl-C does; that is put back."""
    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
        try:
            script.main()
        finally:
            signal.signal(signal.SIGINT, handler)


def stopped(script, *flags):
    """-> how a run with these flags ends: the exit status 2 of argparse, or the sentence, whose exit status is 1."""
    with pytest.raises(SystemExit) as stop:
        run(script, *flags)
    return stop.value.code


@pytest.fixture(scope="module")
def drawn():
    """64 small drawn faces, and their species."""
    species = [d.face_traits(np.random.default_rng((5, i)))[0] for i in range(64)]
    return dict(images=np.stack([d.draw_face(5, i, 16) for i in range(64)]), labels=species)


@pytest.fixture
def npz(drawn):
    np.savez("faces.npz", **drawn)
    return ["--data", "faces.npz"]


def no_show(monkeypatch, script):
    """Training without the images at its end, which take most of the time of a short run."""
    monkeypatch.setattr(script, "show", lambda *args: None)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The method


def levels(steps):
    """The t of `steps` network calls. If sample() takes other times, this is the one place to change."""
    return np.linspace(d.T, 0, steps, endpoint=False).round().astype(int) - 1


def test_schedules():
    beta = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(d.make_alpha_bar("linear").numpy(), np.cumprod(1 - beta), rtol=1e-12)
    ab, f = d.make_alpha_bar("cosine").numpy(), np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(ab[:-1], f[1:-1] / f[0], rtol=1e-9)  # the clip at 0.999 touches the last level only
    np.testing.assert_allclose(ab[-1] / ab[-2], 0.001, rtol=1e-9)
    assert ab.dtype == np.float64


@each_pred
@each_schedule
def test_the_right_output_gives_back_x0_and_has_no_loss(schedule, pred):
    ab, t, x0, eps = d.make_alpha_bar(schedule), torch.arange(8) * 140, randn(8, 3, 4, 4), randn(8, 3, 4, 4, seed=1)
    a, seen = ab[t].view(-1, 1, 1, 1), []
    xt = d.add_noise(x0, eps, a)
    torch.testing.assert_close(xt, a.sqrt() * x0 + (1 - a).sqrt() * eps, rtol=0, atol=1e-14)
    right = {"eps": eps, "x0": x0, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[pred]
    torch.testing.assert_close(d.to_x0(right, xt, a, pred), x0, rtol=0, atol=1e-8)
    loss = d.loss_fn(lambda *call: seen.extend(call) or right, x0, eps, t, ab, pred)
    assert loss.abs().max() < 1e-28 and torch.equal(seen[1], t)
    torch.testing.assert_close(seen[0], xt, rtol=0, atol=1e-14)
    torch.testing.assert_close(d.loss_fn(lambda *_: right + 0.5, x0, eps, t, ab, pred), torch.full((8,), 0.25).double())


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_weights_the_error_of_x0_whatever_is_predicted(gamma):
    """By the SNR, but at most by gamma, and of x0 and v at least by a small number, found from the noisiest level."""
    ab, t = d.make_alpha_bar("cosine"), torch.tensor([30, 300, 500, 700, 800, 995])
    x0, eps, error = randn(6, 3, 4, 4), randn(6, 3, 4, 4, seed=1), 0.1 * randn(6, 3, 4, 4, seed=2)
    a = ab[t].view(-1, 1, 1, 1)
    xt = d.add_noise(x0, eps, a)
    out = {"x0": x0 + error, "eps": (xt - a.sqrt() * (x0 + error)) / (1 - a).sqrt()}
    out["v"] = a.sqrt() * out["eps"] - (1 - a).sqrt() * out["x0"]
    snr, size = ab[t] / (1 - ab[t]), error.square().mean((1, 2, 3))
    weights = {p: d.loss_fn(lambda *_: out[p], x0, eps, t, ab, p, gamma) / size for p in out}
    for weight in weights.values():
        torch.testing.assert_close(weight[:-1], snr[:-1].clamp(max=gamma), rtol=1e-7, atol=0)
    assert snr[-1] < 0.001 < 0.01 < weights["x0"][-1] < 0.1 and abs(weights["v"][-1] / weights["x0"][-1] - 1) < 0.06


def toy_model(xt, t):
    """A smooth nonlinear stand-in for a network, in the dtype of xt."""
    return 0.8 * torch.tanh(xt.roll(1, -1) + 0.3 * torch.cos(t.to(xt.dtype) / 300).view(-1, 1, 1, 1))


@each_pred
@each_schedule
@pytest.mark.parametrize("sampler, steps", [("ddpm", 1000), ("ddpm", 7), ("ddim", 10), ("ddim", 1), ("dpmpp_2m", 10)])
def test_samplers_equal_diffusers(pred, schedule, sampler, steps, monkeypatch):
    """Step for step, on the same noise, in float64."""
    diffusers = pytest.importorskip("diffusers")
    ab, times, seen = d.make_alpha_bar(schedule), levels(steps), []
    noise = [randn(2, 3, 4, 4, seed=i) for i in range(steps)]
    got = d.sample(toy_model, iter(noise), ab, pred, sampler, steps, lambda t, *_: seen.append(t))
    assert seen == times.tolist()

    name = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}[sampler]
    kind = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[pred]
    theirs = getattr(diffusers, name)(prediction_type=kind)
    theirs.alphas_cumprod = ab
    theirs.set_timesteps(steps)
    theirs.timesteps = torch.as_tensor(times)
    if sampler == "dpmpp_2m":  # it knows no clipping, so it is given ours
        theirs.sigmas = torch.cat([((1 - ab[times]) / ab[times]).sqrt(), torch.zeros(1)])
        theirs.convert_model_output = lambda out, sample: d.to_x0(
            out, sample, ab[times[theirs.step_index]].item(), pred).clamp(-1, 1)
    x, fresh = noise[0], iter(noise[1:] + noise[:1])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(fresh))
    for t, s in zip(times, [*times[1:], -1]):
        extra = {}
        if sampler == "ddim":  # which takes the steps to be evenly spaced, so each is made one of its own spacing
            theirs.config.num_train_timesteps, theirs.num_inference_steps = t - s, 1
            extra = dict(use_clipped_model_output=True)
        x = theirs.step(toy_model(x, torch.full((2,), t)), int(t), x, **extra).prev_sample
    # diffusers rounds to float32 inside DPM-Solver++, and adds noise of 1e-10 at the end of DDPM
    torch.testing.assert_close(got, x, rtol=0, atol=5e-5 if sampler == "dpmpp_2m" else 1e-8)


@each_schedule
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_samplers_reach_a_gaussian_whose_score_is_known(schedule, sampler):
    """For x0 ~ N(m, s^2) the best prediction is linear in xt, and the samples have to be N(m, s^2) again."""
    m, s, ab = 0.2, 0.15, d.make_alpha_bar(schedule)

    def best_x0(xt, t):
        a = ab[t].view(-1, 1, 1, 1)
        return m + a.sqrt() * s ** 2 / (a * s ** 2 + 1 - a) * (xt - a.sqrt() * m)
    x = d.sample(best_x0, (randn(1, 1, 100, 100, seed=i) for i in range(1000)), ab, "x0", sampler, 1000)
    assert abs(x.mean() - m) < 0.006 and abs(x.std() / s - 1) < 0.03  # four standard errors and the discretisation


@both
def test_guidance(script):
    def model(xt, t, y):
        return xt * 0 + y.view(-1, 1, 1, 1)
    x, t, y = torch.zeros(2, 3, 4, 4), torch.zeros(2), torch.tensor([3, 4])
    for scale, want in ((1, [3, 4]), (0, [10, 10]), (2.5, [10 - 2.5 * 7, 10 - 2.5 * 6])):
        assert script.guided(model, y, 10, scale, x, t)[:, 0, 0, 0].tolist() == want
    bf16 = script.guided(lambda xt, t, y: model(xt, t, y).bfloat16() / 3, y, 10, 2.5, x, t)
    assert bf16.dtype == torch.float32, "the difference is not rounded to bf16"


def test_conditions():
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(2, 3, 16, 16).contiguous()
    assert d.make_condition("none", red) is None
    torch.testing.assert_close(d.make_condition("gray", red), torch.full((2, 1, 16, 16), 2 * 0.299 - 1))
    torch.testing.assert_close(d.make_condition("lowres", red), red)
    assert (d.make_condition("edges", red) == -1).all(), "no edges in a flat image"
    step = torch.where(torch.arange(16) < 8, -1.0, 1.0).expand(1, 3, 16, 16)
    for edges in (d.make_condition("edges", step)[0, 0], d.make_condition("edges", step.mT)[0, 0].T):
        assert (edges[:, [7, 8]] == 1).all() and (edges[:, :7] == -1).all() and (edges[:, 9:] == -1).all()
    blocks = torch.randn(1, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    want = F.interpolate(blocks[:, :, ::4, ::4], scale_factor=4, mode="bilinear")
    torch.testing.assert_close(d.make_condition("lowres", blocks), want)
    x = torch.rand(2, 3, 16, 24) + 1
    hole = d.make_condition("hole", x)
    assert (hole[:, :, 4:12, 6:18] == 0).all() and (hole == 0).float().mean() == 0.25 and x.min() >= 1
    assert torch.equal(hole[hole != 0], x[hole != 0])


# The network


def make_unet(script=d, **changed):
    args = argparse.Namespace(width=32, patch=4, mults=[1, 2], blocks=1, attn=1, dropout=0.0, classes=["a", "b", "c"],
                              class_cond=True, condition="none")
    return script.UNet(argparse.Namespace(**vars(args) | changed))


def randomized(model):
    """Weights without the ones and zeros of initialisation, which hide mistakes; float64."""
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    return model.double().eval()


def test_res_block_equals_diffusers():
    resnet = pytest.importorskip("diffusers.models.resnet")
    ours = randomized(d.ResBlock(64, 96, 128, False, 0.0))
    theirs = resnet.ResnetBlock2D(in_channels=64, out_channels=96, temb_channels=128, groups=32, eps=1e-5,
                                  time_embedding_norm="scale_shift").double()
    names = {"norm1": "conv1.0", "conv1": "conv1.2", "time_emb_proj": "film", "norm2": "norm", "conv2": "conv2.2",
             "conv_shortcut": "skip"}
    state = {k: ours.state_dict()[f"{names[k.split('.')[0]]}.{k.split('.')[1]}"] for k in theirs.state_dict()}
    theirs.load_state_dict(state)
    x, emb = randn(2, 64, 8, 8), randn(2, 128, seed=1)
    torch.testing.assert_close(ours(x, F.silu(emb)), theirs(x, emb), rtol=0, atol=1e-11)  # theirs has the SiLU inside


def test_attention_equals_torch():
    ours, theirs = randomized(d.Attention(64)), nn.MultiheadAttention(64, 2, batch_first=True).double()
    qkv, proj = ours.qkv, ours.proj
    theirs.load_state_dict({"in_proj_weight": qkv.weight[:, :, 0, 0], "in_proj_bias": qkv.bias,
                            "out_proj.weight": proj.weight[:, :, 0, 0], "out_proj.bias": proj.bias})
    x = randn(2, 64, 6, 6)
    n = ours.norm(x).flatten(2).mT
    want = x + theirs(n, n, n, need_weights=False)[0].mT.reshape(x.shape)
    torch.testing.assert_close(ours(x), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("patch, mults, blocks, attn", [(1, [1, 2], 2, 1), (2, [1, 2, 2], 1, 2), (4, [1], 1, 0)])
def test_unet(patch, mults, blocks, attn):
    net = make_unet(patch=patch, mults=mults, blocks=blocks, attn=attn, condition="gray")
    x, t, y, cond = randn(2, 3, 16, 16), torch.tensor([3, 800]), torch.tensor([0, 2]), randn(2, 1, 16, 16, seed=1)
    assert (net.double()(x, t, y, cond) == 0).all(), "it begins at zero"
    net = randomized(net)
    out = net(x, t, y, cond)
    assert out.shape == x.shape
    other = net(-x, t, y, cond), net(x, t + 1, y, cond), net(x, t, y.flip(0), cond), net(x, t, y, -cond)
    for changed in other:
        assert (changed - out).flatten(1).norm(dim=1).min() > 1e-6, "every input counts"
    torch.testing.assert_close(net(x[1:], t[1:], y[1:], cond[1:]), out[1:])  # images do not mix
    assert (net(x, t, torch.full_like(y, net.y_null), cond) - out).abs().max() > 1e-6, "no label is a label too"
    attentions = [m for m in net.modules() if isinstance(m, d.Attention)]  # down, up, and between
    assert len(attentions) == 2 * attn * blocks + 1
    assert {m.norm.num_channels for m in attentions[:attn * blocks]} <= {32 * mult for mult in mults[-attn:]}


# Training and sampling


@both
def test_get_batch(script):
    """Two processes take the halves of one batch; half of the images are mirrored, a tenth of the labels dropped."""
    images, labels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8), torch.arange(20) % 3
    data = argparse.Namespace(images=images, labels=labels, classes=["a", "b", "c"], train=np.arange(2, 20))
    args = argparse.Namespace(batch_size=600, size=8, flip=True, device="cpu", times="logit_normal")

    def batch(rank=0, world=1, step=1):
        torch.manual_seed(1)
        return script.get_batch(data, args, step, rank, world)
    x0, eps, t, y = batch()
    for whole, a, b in zip((x0, eps, t, y), batch(0, 2), batch(1, 2)):
        assert torch.equal(whole, torch.cat([a, b]))
    source = script.to_tensor(images, "cpu")
    same = (x0[:, None] == source).flatten(2).all(2)
    mirrored = (x0[:, None] == source.flip(-1)).flatten(2).all(2)
    assert (same ^ mirrored).sum() == 600 and not (same | mirrored)[:, :2].any(), "no validation images"
    assert (same | mirrored)[:, 2:].any(0).all() and 0.4 < mirrored.any(1).float().mean() < 0.6
    label = labels[(same | mirrored).int().argmax(1)]
    assert set((y[y != label]).tolist()) == {3} and 0.05 < (y == 3).float().mean() < 0.15
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02
    args.flip = False
    assert (batch()[0][:, None] == source).flatten(2).all(2).any(1).all()
    args.batch_size = 12  # 18 images to train on: every one of them once before any comes again
    walked = torch.cat([batch(step=step)[0] for step in (1, 2, 3)])
    assert torch.equal(walked, torch.cat([source[2:], source[2:]]))
    if script is d:
        assert t.min() < 10 and t.max() > 990 and abs(t.float().mean() - 499.5) < 50


@both
def test_validation_is_the_same_each_time(script):
    """The held-out images, at levels and noise that do not depend on the generator."""
    data = argparse.Namespace(images=np.zeros((90, 16, 16, 3), np.uint8), labels=torch.zeros(90, dtype=torch.int64),
                              val=np.arange(10, 90))
    args, seen = script.parse_args(SMALL)[0], []

    def model(xt, t, **_):
        seen.extend(t.tolist())
        return 0.5 * xt
    assert script.validate(model, data, args) == script.validate(model, data, args) > 0
    gaps = np.diff(seen[:80]) * (1 if script is cfm_images else 1 / d.T)
    assert seen[:80] == seen[80:] and gaps.min() > 0.011 and 0.98 < gaps.sum() < 1, "levels from 0 to 1, evenly spread"


@both
def test_an_image_depends_on_seed_and_number_alone(script, monkeypatch):
    monkeypatch.setattr(script, "autocast", lambda device: contextlib.nullcontext())  # bf16 rounds batches differently
    net = randomized(make_unet(script)).float()
    for sampler in ("ddpm", "dpmpp_2m") if script is d else ("ancestral", "heun"):
        args = argparse.Namespace(seed=3, size=16, device="cpu", classes=["a", "b", "c"], label=None, condition="none",
                                  schedule="cosine", pred="x0", cfg_scale=2.0, sampler=sampler, sample_steps=5)
        batch = script.generate(net, args, range(6))
        for i in ([4], [3, 4], [0, 1, 4]):
            torch.testing.assert_close(script.generate(net, args, i), batch[i], rtol=0, atol=1e-5)
        args.label = "b"
        one_class = script.generate(net, args, range(6))
        assert (one_class - batch).abs().amax((1, 2, 3)).gt(1e-4).tolist() == [True, False, True] * 2, "classes in turn"
        args.label, args.seed = None, 4
        assert (script.generate(net, args, [4]) - batch[4:5]).abs().max() > 1e-3


@both
def test_ema_and_seeds(script):
    model, ema = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    nn.init.zeros_(ema.weight)
    nn.init.ones_(model.weight)
    for _ in range(10):
        script.update_ema(ema, model, 0.9)
    torch.testing.assert_close(ema.weight, torch.full((2, 2), 1 - 0.9 ** 10))
    seeds = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1 << 32, 1, 2), (0, 1, 3)]
    assert len({script.seed_of(*numbers) for numbers in seeds}) == len(seeds)


def test_a_failed_write_leaves_the_old_file():
    d.write_atomically(Path("folder/file"), lambda file: file.write(b"whole"))
    with pytest.raises(TypeError):
        d.write_atomically(Path("folder/file"), lambda file: file.write("not bytes"))
    assert Path("folder/file").read_bytes() == b"whole"


def checkpoint(out):
    return torch.load(f"{out}/ckpt.pt", weights_only=True)


def weights(out):
    """All tensors of a checkpoint, by name: of the model, its EMA and the optimizer."""
    ckpt = checkpoint(out)
    tensors = {(part, k): v for part in ("model", "ema") for k, v in ckpt[part].items()}
    return tensors | {("opt", i, k): v for i, state in ckpt["opt"]["state"].items() for k, v in state.items()}


def last_record(out):
    return json.loads(Path(out, "log.jsonl").read_text().splitlines()[-1])


@both
def test_resume_is_exact(script, npz, monkeypatch, capsys):
    """6 steps; 6 that Ctrl-C cuts after the second; 3 and then 3 more: the same bits."""
    no_show(monkeypatch, script)
    monkeypatch.setitem(script.PRESETS["smoke"], "dropout", 0.2)
    flags = [*SMALL, *npz, "--class_cond", "--eval_every", 4, "--steps", 6, "--out"]
    run(script, *flags, "whole")
    get_batch, calls = script.get_batch, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return get_batch(*args)
    with monkeypatch.context() as patch:
        patch.setattr(script, "get_batch", interrupted)
        assert stopped(script, *flags, "cut") == "stopped at step 2; go on with --resume"
    assert checkpoint("cut")["step"] == 2
    run(script, "--resume", "--out", "cut", "--device", "cpu")
    run(script, *flags, "half", "--steps", 3)
    run(script, "--resume", "--out", "half", "--steps", 6, "--device", "cpu")
    run(script, *flags, "other", "--seed", 1)
    whole = weights("whole")
    for out in ("cut", "half", "other"):
        resumed = weights(out)
        assert checkpoint(out)["step"] == 6 and whole.keys() == resumed.keys()
        different = [k for k in whole if not torch.equal(whole[k], resumed[k])]
        assert different if out == "other" else not different
    assert last_record("whole")["val_loss"] == last_record("cut")["val_loss"] == last_record("half")["val_loss"]


@both
def test_two_processes_equal_one(script, npz, run_script, tmp_path, monkeypatch):
    """torchrun with two gloo processes takes the same steps, and generates the same images, as one process."""
    def two(*flags):
        done = run_script(f"{script.__name__}.py", *flags, cwd=tmp_path, env={"GLOO_SOCKET_IFNAME": "lo"},
                          via="-m torch.distributed.run --nproc_per_node=2 --standalone".split())
        assert done.returncode == 0, done.stderr
        return done.stdout
    no_show(monkeypatch, script)
    flags = [*SMALL, *npz, "--class_cond", "--steps", 3, "--eval_every", 3]
    run(script, *flags, "--out", "one")
    assert two(*flags, "--out", "two").count("writes to") == 1, "one process talks"
    one, other = weights("one"), weights("two")
    torch.manual_seed(0)
    first = script.UNet(argparse.Namespace(**checkpoint("one")["args"])).state_dict()
    moved = sum((one["model", k] - first[k]).square().sum() for k in first) ** 0.5
    apart = sum((one["model", k] - other["model", k]).square().sum() for k in first) ** 0.5
    assert apart < 0.05 * moved, (apart, moved)
    for key in ("loss", "val_loss"):
        assert abs(last_record("one")[key] / last_record("two")[key] - 1) < 0.01
    if script is d:
        images = []
        for how in (partial(run, script), two):
            how("--sample", 5, "--out", "one", "--device", "cpu")
            images.append([np.asarray(Image.open(f"one/generated/{i:06}.png")).astype(int) for i in range(5)])
            shutil.rmtree("one/generated")
        assert np.abs(np.subtract(*images)).max() <= 1


@both
def test_the_loss_falls_and_the_ema_is_what_samples(script, npz, monkeypatch):
    no_show(monkeypatch, script)
    run(script, *SMALL, *npz, "--steps", 60, "--eval_every", 20, "--lr", 3e-3, "--out", "run", "--no-flip")
    log = [json.loads(line) for line in open("run/log.jsonl")]
    losses = [record["val_loss"] for record in log if "val_loss" in record]
    assert [r["step"] for r in log] == [20, 40, 50, 60] and len(losses) == 3 and losses[2] < 0.9 * losses[0]
    assert set(log[-1]) == {"step", "loss", "val_loss", "img_per_s", "seconds"}

    def sample():
        run(script, "--sample", 2, "--out", "run", "--device", "cpu")
        return [Path(f"run/generated/{i:06}.png").read_bytes() for i in range(2)]
    before, ckpt = sample(), checkpoint("run")
    assert any(not torch.equal(ckpt["model"][k], ckpt["ema"][k]) for k in ckpt["ema"])
    ckpt["model"] = {k: torch.zeros_like(v) for k, v in ckpt["model"].items()}
    torch.save(ckpt, "run/ckpt.pt")
    assert sample() == before


@both
def test_a_diverged_loss_keeps_the_checkpoint(script, npz, monkeypatch):
    values = iter([0.5, float("nan")])
    monkeypatch.setattr(script, "validate", lambda *args: next(values))
    said = stopped(script, *SMALL, *npz, "--out", "run")
    assert said.startswith("training diverged: lower --lr; run/ckpt.pt") and checkpoint("run")["step"] == 1


def test_ddpm_images_on_the_command_line(run_script, drawn_faces, monkeypatch):
    """What a newcomer tries first: two steps on drawn faces, then some samples."""
    done = run_script("ddpm_images.py", "--preset", "smoke", "--class_cond", "--out", "ddpm", cwd=drawn_faces)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "drawn_faces: 15744 images" in done.stdout and "done in" in done.stdout
    out = drawn_faces / "ddpm"
    made = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert made == {"ckpt.pt", "log.jsonl", "loss.png", "samples/000001.png", "samples/000002.png", "forward.png",
                    "reverse.gif", "training.gif", "interpolation.png"}
    assert Image.open(out / "samples/000002.png").size == (256, 256) and Image.open(out / "reverse.gif").n_frames == 4
    monkeypatch.chdir(drawn_faces)
    assert checkpoint("ddpm")["args"]["classes"] == sorted(d.TRAITS)
    (out / "generated").mkdir()
    (out / "generated/mine.png").write_bytes(b"a file of the user")
    sample = "--out ddpm --device cpu --sample_steps 2 --cfg_scale 2 --sampler".split()
    for n, sampler in ((3, "ddim"), (1, "dpmpp_2m")):  # with fewer images, those of the earlier --sample go
        run(d, "--sample", n, *sample, sampler, "--label", "fox")
        assert sorted(p.name for p in out.glob("generated/*")) == [*(f"{i:06}.png" for i in range(n)), "mine.png"]
        assert Image.open(out / f"generated/{n - 1:06}.png").size == (32, 32)


@pytest.mark.parametrize("condition", ["lowres", "gray", "edges", "hole"])
def test_image_translation(condition, npz):
    """--sample restores the first images of --data, or of the data of training: condition, sample, original."""
    run(d, *SMALL, *npz, "--steps", 1, "--condition", condition, "--out", "run", "--pred", "v", "--schedule", "linear")
    for i in range(3):
        save(d.draw_face(9, i, 40), f"mine/{i}.png")
    for path, n in (("mine", 3), ("faces.npz", 2)):
        run(d, "--sample", n, "--out", "run", "--device", "cpu", *(["--data", path] if path == "mine" else []))
        data, grid = d.load_data(path, 16), np.asarray(Image.open("run/generated.png"))
        originals = data.images[:n]
        assert grid.shape == (16, 9 * 16, 3)
        for i, original in enumerate(originals):
            cond = d.make_condition(condition, d.to_tensor(original[None], "cpu")).expand(-1, 3, -1, -1)
            made = np.asarray(Image.open(f"run/generated/{i:06}.png"))
            assert np.array_equal(grid[:, 48 * i:48 * i + 48], np.hstack([d.to_uint8(cond)[0], made, original]))


# Sentences


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, drawn):
    """A folder with data of all kinds and, by the name of each script, a run of a class-conditional model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("workshop"))
        np.savez("faces.npz", **drawn)
        put("photos", {f"all/{i}.png": i for i in range(16)})
        put("few", {f"{i}.png": i for i in range(15)})
        put("edm", {"dataset.json": b"{}"})
        np.savez("short.npz", images=drawn["images"], labels=drawn["labels"][:9])
        np.savez("float.npz", images=drawn["images"] / 255)
        for script in (d, cfm_images):
            no_show(patch, script)
            flags = [*SMALL, "--data", "faces.npz", "--steps", 1, "--out"]
            run(script, *flags, script.__name__, "--class_cond")
            run(script, *flags, f"{script.__name__}_plain")
        return Path.cwd()


SENTENCES = {  # flags: what the script says; RUN stands for the folder of a run
    "--data nowhere": "--data nowhere: not a folder, .zip or .npz",
    "--data few": "training takes at least 16 images; --data few has 15",
    "--data edm": "dataset.json is not read",
    "--size 20": "error: --size must be a multiple of 8",
    "--width 48": "--width of 32",
    "--steps 0": "positive",
    "--cfg_scale 2": "need a model trained with --class_cond",
    "--out RUN": "error: --out RUN is not empty: go on with its run by --resume, or name a new folder",
    "--out photos/run --data photos": "error: --out photos/run and --data photos must not lie in each other",
    "--out photos --data photos/all": "is not empty",
    "--out new/run --data new/../.": "error: --out new/run and --data new/../. must not lie in each other",
    "--sample 2 --out nowhere": "error: there is no nowhere/ckpt.pt: train first, or name a run with --out",
    "--sample 2 --out RUN --label wolf": "error: --label wolf: the classes are bear, cat, dog",
    "--sample 2 --out RUN_plain --cfg_scale 2": "need a model trained with --class_cond",
    "--resume --steps 9 --out RUN --label cat": "--label also --sample",
    "--resume --out RUN": "error: RUN has done 1 steps: say with --steps how far to go on",
    "--data short.npz": "images must be uint8 (N, H, W, 3), labels (N,)",
    "--data float.npz": "images must be uint8 (N, H, W, 3), labels (N,)",
    "--sample 2 --out RUN --data RUN/samples": "must not lie in each other",
    "--sample -1 --out RUN": "positive",
    "--batch_size 16": "error: --batch_size 16 cannot be shared by 3 processes",
    "--resume --out RUN --patch 2": "error: --patch cannot change: RUN was trained with 4",
    "--resume --out RUN_plain --class_cond": "error: --class_cond cannot change",
    "--sample 2 --out RUN --size 32": "error: --size cannot change: RUN was trained with 16",
    "--resume --steps 9 --out RUN --data photos": "has the classes ['all'], the model ['bear', 'cat',",
    "--samp 2 --out RUN": "error: unrecognized arguments: --samp"}


@both
@pytest.mark.parametrize("flags", SENTENCES)
def test_sentences(script, flags, workshop, monkeypatch, capsys):
    """What a person does wrong is one sentence, and no file of theirs changes."""
    def files():
        return {p: p.stat().st_mtime_ns for p in Path(".").rglob("*") if "data" not in p.parts}
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("WORLD_SIZE", "3" if "batch_size" in flags else "1")
    before, (flags, want) = files(), (text.replace("RUN", script.__name__) for text in (flags, SENTENCES[flags]))
    if "--out" not in flags:
        flags += " --out new"
    if "--sa" not in flags and "--resume" not in flags:
        flags = f"{' '.join(SMALL)} {flags}"
    code = stopped(script, *flags.split())
    said = capsys.readouterr().err if code == 2 else code
    assert want in said and ("error: " in said) == (code == 2) and files() == before, said


@both
def test_a_run_of_the_other_script(script, workshop, monkeypatch, capsys):
    monkeypatch.chdir(workshop)
    other = d if script is cfm_images else cfm_images
    assert stopped(script, "--sample", 2, "--out", other.__name__) == 2
    assert f"{other.__name__} was trained with None" in capsys.readouterr().err


def test_a_translation_knows_no_classes(capsys):
    assert stopped(d, *SMALL, "--out", "new", "--condition", "gray", "--class_cond") == 2
    assert "exclude each other" in capsys.readouterr().err


@both
def test_a_flag_comes_before_the_preset(script):
    args, _ = script.parse_args("--preset gpu --width 64 --lr 0.5 --device cpu".split())
    wanted = script.PRESETS["gpu"] | dict(width=64, lr=0.5)
    assert {k: v for k, v in vars(args).items() if k in wanted} == wanted


# Drawn faces


@pytest.mark.parametrize("size, means", [
    (64, [175.02, 178.82, 176.51, 153.12, 171.00, 145.19, 146.45, 164.41, 127.76, 182.66]),
    (33, [175.16, 178.62, 176.93, 152.86, 171.51, 145.53, 147.01, 164.64, 127.60, 183.05])])
def test_drawn_faces_never_change(size, means):
    """The mean of the upper half of each, not a checksum: processors round differently."""
    upper = [d.draw_face(0, i, size)[:size // 2].mean() for i in range(10)]
    np.testing.assert_allclose(upper, means, atol=0.01)
    traits = [d.face_traits(np.random.default_rng((0, i))) for i in range(400)]
    for column, table in zip(zip(*traits), (d.TRAITS, d.FURS, d.EYES, d.BACKGROUNDS)):
        assert min(map(column.count, table)) > 0.5 * len(traits) / len(table), "uniform: 400 fall no lower by chance"
    corners = [d.draw_face(0, i, size)[0, 0] / d.BACKGROUNDS[traits[i][3]] for i in range(10)]
    assert 0.85 < np.min(corners) <= np.max(corners) < 1.15, "a face has the traits of its number"


# Reading one image


def save(image, path, **options):
    """An array or Image as a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)


def read(image, path="image.png", size=16, **options):
    """read_image of an image that is first saved as a file, as float."""
    save(image, path, **options)
    result = d.read_image(path, size)
    assert isinstance(result, np.ndarray), result
    assert result.dtype == np.uint8 and result.shape == (size, size, 3)
    return result.astype(float)


def near(image, want, by=1):
    assert np.abs(image - want).max() <= by, f"{image.reshape(-1, 3)[:4]}"


def ramp(height, width):
    """Smooth and different along every axis, so that each crop, mirroring and turn shows."""
    y, x = np.mgrid[:height, :width]
    channels = 255 * x // (width - 1), 255 * y // (height - 1), 255 * (x + y) // (width + height - 2)
    return np.stack(channels, -1).astype(np.uint8)


RAMP = ramp(16, 16)
GRAY, ALPHA = RAMP[..., 0], RAMP[..., 1, None]


def test_modes():
    near(read(RAMP), RAMP, 0)
    near(read(GRAY), GRAY[..., None], 0)
    for alpha in (ALPHA, ALPHA[::-1]):  # transparent is white
        white = 255 * (1 - alpha / 255)
        near(read(np.dstack([GRAY, alpha])), GRAY[..., None] * (alpha / 255) + white)
        near(read(np.dstack([RAMP, alpha])), RAMP * (alpha / 255) + white)
    near(read(RAMP, transparency=(0, 0, 0)), np.where(RAMP.any(-1, keepdims=True), RAMP, 255))
    palette = Image.fromarray(GRAY // 100, "P")
    palette.putpalette([250, 10, 20, 30, 240, 50, 60, 70, 230])
    colors = np.array([[250, 10, 20], [30, 240, 50], [60, 70, 230]])[GRAY // 100]
    near(read(palette), colors)
    near(read(palette, "image.gif", transparency=1), np.where(GRAY[..., None] // 100 == 1, 255, colors))
    near(read(Image.fromarray(GRAY > 99)), 255 * (GRAY > 99)[..., None])
    near(read(Image.new("CMYK", (16, 16), (200, 100, 0, 0)), "image.jpg", quality=95), (55, 155, 255), 4)


def test_16_and_32_bits():
    """16 bits are scaled; 32 bits have no known range, and never become a black image."""
    deep = (np.arange(256).reshape(16, 16) * 257).astype(np.uint16)
    deep[0, :4] = 32768, 65535, 0, 128
    for path in ("image.png", "image.tif"):
        near(read(deep, path), deep[..., None] / 257, 0.5)
    big_endian = Image.frombytes("I;16B", (16, 16), deep.astype(">u2").tobytes())
    near(read(big_endian, "image.tif"), deep[..., None] / 257, 0.5)
    unknown = {"float.tif": np.full((16, 16), 0.5, np.float32), "int.tif": np.full((16, 16), 128, np.int32),
               "16.pgm": deep}  # which Pillow reads as 32 bits
    for name, pixels in unknown.items():
        save(pixels, name)
        assert d.read_image(name, 16).startswith(f"{name}: 32 bits")


UPRIGHT = ramp(16, 24)  # wider than high: turning it the wrong way shows in the crop too
STORED = {1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1], 5: UPRIGHT.transpose(1, 0, 2),
          6: np.rot90(UPRIGHT, 1), 7: np.rot90(UPRIGHT.transpose(1, 0, 2), 2), 8: np.rot90(UPRIGHT, -1)}


@pytest.mark.filterwarnings("ignore:.*tag")
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(orientation):
    """As the EXIF standard numbers them; 6 is a phone held upright. Another entry may be odd: here text is a number,
    which Pillow's exif_transpose cannot write again."""
    exif = Image.Exif()
    exif[274], exif[305], exif[315] = orientation, "software", "x" * 100
    plain = exif.tobytes()
    odd = plain.replace(b"\x01\x31\x00\x02", b"\x01\x31\x00\x0c")  # of tag 305
    for block in (plain, odd):
        near(read(np.ascontiguousarray(STORED[orientation]), exif=block), UPRIGHT[:, 4:20])
    large = np.ascontiguousarray(STORED[orientation].repeat(16, 0).repeat(16, 1))
    near(read(large, "image.jpg", exif=plain, quality=95), UPRIGHT[:, 4:20], 12)
    near(read(STORED[orientation][..., 0].astype(np.uint16) * 257, exif=plain), UPRIGHT[:, 4:20, :1])


def test_a_large_jpeg_is_reduced_exactly():
    """And not decoded at an eighth of its size first, which distorts where 8 does not divide the side."""
    face = d.draw_face(0, 0, 1025)
    want = np.asarray(Image.fromarray(face).resize((64, 64), Image.LANCZOS)).astype(float)
    error = np.abs(read(face, "image.jpg", 64, quality=95) - want)
    assert error.mean() < 1 and error.max() < 10


@pytest.mark.parametrize("height, width", [(16, 48), (50, 21), (301, 97), (20, 20_000)])
def test_the_crop_is_in_the_center(height, width):
    """And averaged, not sampled: a box and a Lanczos filter differ only where the slope changes."""
    y, x = np.mgrid[:height, :width]
    middle = np.stack([np.abs(2 * x - width + 1), np.abs(2 * y - height + 1), np.full_like(x, 50)], -1)
    image, side = (middle * 255 // max(height, width)).astype(np.uint8), min(height, width)
    top, left = (height - side) / 2, (width - side) / 2
    want = np.asarray(Image.fromarray(image).resize((16, 16), Image.BOX, (left, top, left + side, top + side)))
    near(read(image), want.astype(float), 12)
    near(read((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)), 127.5, 4)


# Reading a data set


def solid(i):
    """Image number i < 52 of a set, a PNG: its color says which one it is."""
    file = io.BytesIO()
    Image.new("RGB", (24, 20), (5 * i, 255 - 5 * i, 77)).save(file, "PNG")
    return file.getvalue()


def put(root, files):
    """{path: bytes, or the number of an image} -> the folder `root` and root.zip, in the opposite order."""
    with zipfile.ZipFile(f"{root}.zip", "w") as z:
        for name, content in sorted(files.items(), reverse=True):
            content = solid(content) if isinstance(content, int) else content
            path = Path(root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            z.writestr(name, content)


def contents(path, size=16):
    """What load_data reads: {number of the image: name of its class}."""
    data = d.load_data(str(path), size)
    numbers = data.images[:, 0, 0, 0] // 5
    assert (data.images == data.images[:, :1, :1]).all() and (data.images[..., 2] == 77).all(), "solid colors"
    assert len(set(numbers.tolist())) == len(data.images) == len(data.labels) and data.classes == sorted(data.classes)
    return {n: data.classes[y] for n, y in zip(numbers.tolist(), data.labels)}


def in_folders(*names, before="", after="", start=0):
    """Eight images in a folder per class, and what contents() should say of them."""
    want = {start + i: name for i, name in enumerate(np.repeat(names, 8).tolist())}
    return {f"{before}{name}/{after}{i}.png": i for i, name in want.items()}, want


def split(train, test):
    """Two classes to train on, and other images of them."""
    files, want = in_folders("ant", "bee", before=f"{train}/")
    return files | in_folders("ant", "bee", before=f"{test}/", start=30)[0], want


CLASSES, WANT = in_folders("ant", "bee", "cow")
LAYOUTS = {
    "flat": ({f"{i:02}.png": i for i in range(16)}, None),  # the class is the name of the folder
    "classes": (CLASSES, WANT),
    "a folder around them": in_folders("ant", "bee", "cow", before="my/photos/"),
    "Train and Test": split("Train", "Test"),
    "afhq/train and val": split("afhq/train", "afhq/val"),
    "training and validation": split("training", "validation"),
    "a class named train": in_folders("car", "train"),
    "hidden files": ({**CLASSES, "ant/._0.png": b"\0", ".thumbs/1.png": 50, "__MACOSX/ant/._0.png": b"\0"}, WANT),
    "upper case": ({name.replace(".png", ".PNG"): i for name, i in CLASSES.items()}, WANT),
    "no image, no suffix": ({**CLASSES, "ant/notes.txt": b"hello", "cow/50": 50}, {**WANT, 50: "cow"})}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, capsys):
    files, want = LAYOUTS[layout]
    put("photos", files)
    for path in ("photos", "photos.zip"):
        found = contents(path)
        assert found == want or want is None and set(found) == set(range(16)) and len(set(found.values())) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == (2 if "ant/notes.txt" in files else 0)
    assert all(line.startswith("1 of 26 files cannot be read as images, such as ") for line in said)
    a, b = (d.load_data(path, 16).images for path in ("photos", "photos.zip"))
    assert np.array_equal(a, b), "a .zip holds the same array as its folder"


def test_a_hostile_zip_writes_nothing_outside(tmp_path):
    Path("here").mkdir()
    os.chdir("here")
    with zipfile.ZipFile("data.zip", "w") as z:
        for i, name in enumerate(["../out.png", f"{tmp_path}/out.png", "ant/../../../out.png"]):
            z.writestr(name, solid(i))
    assert set(contents("data.zip")) <= {0, 1, 2}
    outside = [p for p in tmp_path.rglob("*.png") if tmp_path / "here/data/cache" not in p.parents]
    assert not outside


def test_npz():
    images, y = np.stack([np.full((20, 24, 3), (5 * i, 0, 77), np.uint8) for i in range(20)]), np.arange(20) % 3 * 4 + 3
    np.savez("plain.npz", images=images)
    np.savez("labelled.npz", images=images, labels=y)
    assert contents("plain.npz") == dict.fromkeys(range(20), "all")
    assert contents("labelled.npz", 32) == {i: str(y[i]) for i in range(20)}
    np.savez("wide.npz", images=UPRIGHT[None].repeat(16, 0))
    near(d.load_data("wide.npz", 16).images.astype(float), UPRIGHT[:, 4:20])


def test_formats_links_and_broken_files(capsys):
    """Whatever Pillow reads is read, linked folders are followed, and each file that is no image is counted."""
    put("photos", {**in_folders("ant")[0], "ant/cut.png": solid(1)[:-40], "ant/empty.png": b""})
    for i, suffix in enumerate(["jfif", "webp", "bmp", "tif", "ppm", "tga", "jp2", "gif"], 20):
        save(np.full((16, 16, 3), (5 * i, 0, 77), np.uint8), f"photos/bee/{i}.{suffix}")
    save(d.draw_face(0, 0, 64), "whole.jpg")
    Path("photos/bee/cut.jpg").write_bytes(Path("whole.jpg").read_bytes()[:1000])
    save(np.full((16, 16), 0.5, np.float32), "photos/bee/float.tif")
    put("elsewhere", {f"{i}.png": i for i in range(40, 48)})
    Path("photos/linked").symlink_to("../elsewhere")
    Path("photos/ant/dangling.png").symlink_to("nowhere.png")
    data = d.load_data("photos", 16)
    assert data.classes == ["ant", "bee", "linked"] and np.bincount(data.labels).tolist() == [8, 8, 8]
    said, = capsys.readouterr().out.splitlines()
    assert said.startswith("5 of 29 files cannot be read as images, such as photos/ant/cut.png: ")


def test_cache(monkeypatch):
    """The second time no image is read; after any change all are."""
    put("photos", CLASSES)
    assert contents("photos") == WANT
    with monkeypatch.context() as patch:
        patch.setattr(d, "ProcessPoolExecutor", None)
        assert contents("photos") == WANT
    Path("photos/ant/0.png").write_bytes(solid(40))
    Path("photos/bee/8.png").rename("photos/cow/8.png")
    assert contents("photos") == {**{k: v for k, v in WANT.items() if k}, 40: "ant", 8: "cow"}
    assert d.load_data("photos", 32).images.shape == (24, 32, 32, 3)


def test_train_and_val():
    for n, n_val in ((16, 1), (3000, 256)):
        np.savez(f"{n}.npz", images=np.zeros((n, 2, 2, 3), np.uint8))
        data, again = d.load_data(f"{n}.npz", 2), d.load_data(f"{n}.npz", 2)
        assert len(data.val) == n_val and sorted([*data.val, *data.train]) == list(range(n))
        assert np.array_equal(data.val, again.val) and np.array_equal(data.train, again.train)
    assert 0.3 < (data.val < n / 2).mean() < 0.7, "spread over the whole set"


def test_names_that_the_terminal_cannot_print(monkeypatch):
    """Class and file names in another encoding, on a terminal that has ASCII alone: a run, to its end."""
    no_show(monkeypatch, d)
    name = os.fsdecode(b"caf\xe9 \xe7\x8c\xab")  # Latin-1, then UTF-8
    put("photos", {f"{folder}/{i}.png": i for i, folder in enumerate(["cat"] * 16 + ["dog"])})
    Path(f"photos/cat/notes{name}.txt").write_bytes(b"no image")
    Path("photos/cat").rename(f"photos/{name}")
    screen = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    run(d, *SMALL, "--data", "photos", "--steps", 1, "--class_cond", "--out", name)
    run(d, "--sample", 1, "--label", name, "--out", name, "--device", "cpu")
    said = screen.buffer.getvalue().decode("ascii")
    assert "1 of 18 files cannot be read as images, such as photos/caf? ?/notescaf? ?.txt" in said and "done in" in said
    assert checkpoint(name)["args"]["classes"] == [name, "dog"] and Path(name, "generated/000000.png").exists()


def test_animal_faces(monkeypatch, capsys):
    """A download, or a .zip put there by hand; without a network one line, and drawn faces."""
    with monkeypatch.context() as patch:
        patch.setattr(d, "read_images", lambda sources, *_: (np.zeros((len(sources), 1, 1, 3)), range(len(sources))))
        data = d.load_data("animal_faces", 16)
    said, = capsys.readouterr().out.splitlines()
    assert said.startswith("drawn_faces take the place of animal_faces (")
    assert d.AFHQ_URL in said and "data/animal_faces.zip" in said
    assert len(data.images) == 16_000 and data.classes == sorted(d.TRAITS)
    assert not Path("data/animal_faces.zip").exists()
    files, want = split("afhq/train", "afhq/val")
    put("afhq", files)
    Path("afhq.zip").rename("data/animal_faces.zip")
    assert contents("animal_faces") == want
