"""ddpm_images.py: schedules, loss, samplers, network and training, against closed forms and diffusers in float64."""
import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import ddpm_images as mm

TINY = "--size 16 --patch 4 --width 32 --mults 1,2 --blocks 1 --batch_size 8 --sample_steps 2 --dtype fp32".split()


@pytest.fixture(autouse=True)
def fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def faces(tmp_path):
    """A small .npz of drawn faces with labels."""
    drawn = [mm.draw_face(5, i, 16) for i in range(64)]
    np.savez(tmp_path / "faces.npz", images=np.stack([d[0] for d in drawn]), labels=np.array([d[1] for d in drawn]))
    return str(tmp_path / "faces.npz")


def run(*flags):
    return mm.main([str(f) for f in flags])


# The method


def test_schedules():
    beta = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(mm.make_alpha_bar("linear").numpy(), np.cumprod(1 - beta), rtol=1e-12)
    t = np.arange(1, 1001) / 1000
    f = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    ab = mm.make_alpha_bar("cosine").numpy()
    np.testing.assert_allclose(ab[:-1], f(t[:-1]) / f(0), rtol=1e-9)  # the clip at 0.999 touches the last level only
    np.testing.assert_allclose(ab[-1] / ab[-2], 0.001, rtol=1e-9)
    assert ab.dtype == np.float64 and (np.diff(ab) < 0).all()


@pytest.mark.parametrize("pred", ["eps", "v", "x0"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_x0_is_recovered_from_the_right_output_and_the_loss_is_zero_there(schedule, pred):
    torch.manual_seed(0)
    ab = mm.make_alpha_bar(schedule)
    x0, eps, t = torch.randn(8, 3, 4, 4).double(), torch.randn(8, 3, 4, 4).double(), torch.arange(8) * 140
    a = ab[t].view(-1, 1, 1, 1)
    xt = mm.add_noise(x0, eps, a)
    assert torch.allclose(xt, a.sqrt() * x0 + (1 - a).sqrt() * eps, rtol=0, atol=1e-14)
    right = {"eps": eps, "x0": x0, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[pred]
    torch.testing.assert_close(mm.to_x0(right, xt, a, pred), x0, rtol=0, atol=1e-8)
    assert mm.loss_fn(lambda *_: right, x0, eps, t, ab, pred).abs().max() < 1e-28
    seen = []
    mm.loss_fn(lambda xt, t: seen.append((xt, t)) or right, x0, eps, t, ab, pred)
    assert torch.equal(seen[0][1], t) and torch.allclose(seen[0][0], xt, atol=1e-14)
    assert torch.allclose(mm.loss_fn(lambda *_: right + 0.5, x0, eps, t, ab, pred), torch.full((8,), 0.25).double())


def test_min_snr_weights_the_error_of_x0_by_the_capped_snr_whatever_is_predicted():
    torch.manual_seed(0)
    ab, t, gamma = mm.make_alpha_bar("cosine"), torch.tensor([30, 300, 500, 700, 900]), 5.0
    x0, eps, wrong = (torch.randn(5, 3, 4, 4).double() for _ in range(3))
    a = ab[t].view(-1, 1, 1, 1)
    xt, guess = mm.add_noise(x0, eps, a), x0 + 0.1 * wrong
    out = {"x0": guess, "eps": (xt - a.sqrt() * guess) / (1 - a).sqrt()}
    out["v"] = a.sqrt() * out["eps"] - (1 - a).sqrt() * guess
    want = (ab[t] / (1 - ab[t])).clamp(max=gamma) * (0.1 * wrong).square().mean((1, 2, 3))
    for pred in out:
        got = mm.loss_fn(lambda *_: out[pred], x0, eps, t, ab, pred, gamma)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


def toy_model(xt, t):
    """A smooth nonlinear stand-in for a network, in the dtype of xt."""
    return torch.tanh(xt.roll(1, -1) + 0.3 * torch.cos(t.to(xt.dtype) / 300).view(-1, 1, 1, 1)) * 0.8


PRED_NAMES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


@pytest.mark.parametrize("pred", ["eps", "v", "x0"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("sampler, eta, steps", [("ddpm", 0, 1000), ("ddpm", 0, 10), ("ddim", 0, 10), ("ddim", 0.6, 10),
                                                 ("ddim", 1, 7), ("dpmpp_2m", 0, 10), ("ddim", 0, 1)])
def test_samplers_equal_diffusers(pred, schedule, sampler, eta, steps):
    """Step for step, on the same noise, in float64."""
    diffusers = pytest.importorskip("diffusers")
    ab, levels = mm.make_alpha_bar(schedule), np.linspace(999, 0, steps).round().astype(int)
    g = torch.Generator().manual_seed(1)
    noise = [torch.randn(2, 3, 8, 8, generator=g, dtype=torch.float64) for _ in range(steps + 1)]
    got = mm.sample(toy_model, iter(noise), ab, pred, sampler, steps, eta)

    common = dict(num_train_timesteps=1000, prediction_type=PRED_NAMES[pred])
    if sampler == "dpmpp_2m":  # it has no clipping, so ours is held against it through a model that stays inside
        scheduler = diffusers.DPMSolverMultistepScheduler(**common, thresholding=False, final_sigmas_type="zero")
        scheduler.convert_model_output = lambda out, *a, sample=None, **k: mm.to_x0(
            out, sample, ab[int(levels[scheduler.step_index])].item(), pred).clamp(-1, 1)
    elif sampler == "ddim":
        scheduler = diffusers.DDIMScheduler(**common, clip_sample=True, set_alpha_to_one=True)
    else:
        scheduler = diffusers.DDPMScheduler(**common, clip_sample=True, variance_type="fixed_small")
        scheduler.custom_timesteps = True
    scheduler.alphas_cumprod = ab
    scheduler.set_timesteps(steps)
    scheduler.timesteps = torch.as_tensor(levels)
    if sampler == "dpmpp_2m":
        scheduler.sigmas = torch.cat([((1 - ab[levels]) / ab[levels]).sqrt(), torch.zeros(1).double()])
    if sampler == "ddpm":  # which level comes next: diffusers assumes even spacing, so hand it ours
        after = dict(zip(levels.tolist(), levels[1:].tolist() + [-1]))
        scheduler.previous_timestep = lambda t: after[int(t)]
        scheduler._get_variance = lambda t, predicted_variance=None: (
            (1 - (ab[after[int(t)]] if after[int(t)] >= 0 else 1.0)) / (1 - ab[int(t)])
            * (1 - ab[int(t)] / (ab[after[int(t)]] if after[int(t)] >= 0 else 1.0)))
        scheduler.one = torch.tensor(1.0).double()
    x, k = noise[0], 1
    for i, t in enumerate(levels.tolist()):
        out = toy_model(x, torch.full((2,), t))
        if sampler == "ddim":
            scheduler.num_inference_steps = 1
            s = levels[i + 1] if i + 1 < steps else -1
            scheduler.config.num_train_timesteps = t - s  # so that its prev_timestep = t - (t - s)
            extra = dict(eta=eta, use_clipped_model_output=True,
                         variance_noise=noise[k] if eta > 0 and s >= 0 else torch.zeros_like(x))
            k += eta > 0
            x = scheduler.step(out, t, x, **extra).prev_sample
        elif sampler == "ddpm":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **kw: noise[k])
                x = scheduler.step(out, t, x).prev_sample
            k += 1
        else:
            x = scheduler.step(out, t, x).prev_sample
    # diffusers casts to float32 inside its DPM-Solver++ step
    torch.testing.assert_close(got, x, rtol=0, atol=5e-6 if sampler == "dpmpp_2m" else 1e-9)


@pytest.mark.parametrize("sampler, steps, eta", [("ddpm", 1000, 0), ("ddim", 1000, 0), ("ddim", 1000, 0.5),
                                                 ("dpmpp_2m", 1000, 0)])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_samplers_reach_a_gaussian_whose_score_is_known(schedule, sampler, steps, eta):
    """For x0 ~ N(m, s^2) the best prediction is linear in xt, and the samples have to be N(m, s^2) again."""
    m, s, ab, g = 0.2, 0.15, mm.make_alpha_bar(schedule), torch.Generator().manual_seed(0)

    def best_x0(xt, t):
        a = ab[t].view(-1, 1, 1, 1)
        return m + a.sqrt() * s ** 2 / (a * s ** 2 + 1 - a) * (xt - a.sqrt() * m)
    noise = (torch.randn(1, 1, 100, 100, generator=g, dtype=torch.float64) for _ in range(steps + 1))
    x = mm.sample(best_x0, noise, ab, "x0", sampler, steps, eta)
    assert abs(x.mean() - m) < 0.006 and abs(x.std() / s - 1) < 0.03  # four standard errors and the discretisation


def test_guidance():
    class Model(nn.Module):
        y_null = 10

        def forward(self, xt, t, y=None, cond=None):
            return xt * 0 + y.view(-1, 1, 1, 1) + cond
    x, t, y = torch.zeros(2, 3, 4, 4), torch.zeros(2), torch.tensor([3, 4])
    cond = torch.tensor([0.25, 0.5]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    for scale, want in ((1, [3.25, 4.5]), (0, [10.25, 10.5]), (2.5, [10.25 - 2.5 * 7, 10.5 - 2.5 * 6])):
        assert mm.guided(Model(), y, cond, scale)(x, t)[:, 0, 0, 0].tolist() == want


def test_conditions():
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(2, 3, 16, 16).contiguous()
    assert mm.make_condition("none", red) is None
    torch.testing.assert_close(mm.make_condition("gray", red), torch.full((2, 1, 16, 16), 2 * 0.299 - 1))
    torch.testing.assert_close(mm.make_condition("lowres", red), red)
    assert (mm.make_condition("edges", red) == -1).all()                # no edges in a flat picture
    step = torch.where(torch.arange(16) < 8, -1.0, 1.0).expand(1, 3, 16, 16)
    edges = mm.make_condition("edges", step)[0, 0, 8]
    assert (edges[[7, 8]] == 1).all() and (edges[:7] == -1).all() and (edges[9:] == -1).all()
    blocks = torch.randn(1, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    low = mm.make_condition("lowres", blocks)
    assert torch.allclose(low, torch.nn.functional.interpolate(blocks[:, :, ::4, ::4], scale_factor=4, mode="bilinear"))
    x = torch.randn(64, 3, 16, 16)
    masked, hole = mm.make_condition("mask", x).split([3, 1], 1)
    assert (hole[:, :, 4:12, 4:12] == 1).all() and (hole == 1).float().mean() == 0.25  # the middle half
    box = torch.rand(64, 4)
    masked, hole = mm.make_condition("mask", x, box).split([3, 1], 1)
    inside = (hole == 1).expand_as(x)
    assert (masked[inside] == 0).all() and torch.equal(masked[~inside], x[~inside])
    area = (hole == 1).float().mean((1, 2, 3))
    want = (0.25 + 0.5 * box[:, 2]) * (0.25 + 0.5 * box[:, 3])
    assert (area - want).abs().max() < 0.1 and abs(area.mean() - want.mean()) < 0.02


# The network


def randomized(model):
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)  # default initialisation hides mistakes behind its ones and zeros
    return model.double().eval()


def test_res_block_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models.resnet import ResnetBlock2D
    ours = randomized(mm.ResBlock(64, 96, 128, False, 0.0))
    theirs = ResnetBlock2D(in_channels=64, out_channels=96, temb_channels=128, groups=32, eps=1e-5,
                           time_embedding_norm="scale_shift", use_in_shortcut=True).double()
    names = {"norm1": "norm1", "conv1": "conv1", "time_emb_proj": "film", "norm2": "norm2", "conv2": "conv2",
             "conv_shortcut": "skip"}
    theirs.load_state_dict({k: ours.state_dict()[names[k.split(".")[0]] + "." + k.split(".")[1]]
                            for k in theirs.state_dict()})
    theirs.nonlinearity = nn.Identity()  # it applies SiLU to the embedding inside, we do it once outside
    x, emb = torch.randn(2, 64, 8, 8).double(), torch.randn(2, 128).double()
    silu, theirs.nonlinearity = nn.SiLU(), nn.SiLU()
    torch.testing.assert_close(ours(x, silu(emb)), theirs(x, emb), rtol=0, atol=1e-11)
    assert diffusers


def test_attention_equals_torch():
    ours, C = randomized(mm.Attention(64)), 64
    theirs = nn.MultiheadAttention(C, 2, batch_first=True).double()
    state = ours.state_dict()
    theirs.load_state_dict({"in_proj_weight": state["qkv.weight"][:, :, 0, 0], "in_proj_bias": state["qkv.bias"],
                            "out_proj.weight": state["proj.weight"][:, :, 0, 0], "out_proj.bias": state["proj.bias"]})
    x = torch.randn(2, C, 6, 6).double()
    n = ours.norm(x).flatten(2).transpose(1, 2)
    want = x + theirs(n, n, n, need_weights=False)[0].transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(ours(x), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("patch, mults, blocks", [(1, [1, 2], 2), (2, [1, 2, 2], 1), (4, [1], 1)])
def test_unet(patch, mults, blocks):
    torch.manual_seed(0)
    net = mm.UNet(16, patch, 32, mults, blocks, 8, 0.0, n_classes=3, c_cond=1)
    x, t, cond = torch.randn(2, 3, 16, 16), torch.tensor([3, 800]), torch.randn(2, 1, 16, 16)
    assert (net(x, t, None, cond) == 0).all()  # zero-initialised end
    net = randomized(net)
    x, cond = x.double(), cond.double()
    y = torch.tensor([0, 2])
    out = net(x, t, y, cond)
    assert out.shape == x.shape
    for change in (net(x, t + 1, y, cond), net(x, t, y.flip(0), cond), net(x, t, y, -cond), net(-x, t, y, cond)):
        assert (change - out).flatten(1).norm(dim=1).min() > 1e-6  # every input counts
    torch.testing.assert_close(net(x, t, None, cond), net(x, t, torch.tensor([3, 3]), cond))  # no label is a label
    torch.testing.assert_close(net(x[1:], t[1:], y[1:], cond[1:]), out[1:])                   # pictures do not mix


def test_ema_is_a_geometric_mean_of_the_past():
    model, ema = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    nn.init.zeros_(ema.weight)
    nn.init.ones_(model.weight)
    for _ in range(10):
        mm.update_ema(ema, model, 0.9)
    assert torch.allclose(ema.weight, torch.tensor(1 - 0.9 ** 10))


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0), ("ddim", 0), ("ddim", 1), ("dpmpp_2m", 0)])
def test_a_picture_depends_on_seed_and_index_alone(sampler, eta):
    args = mm.parse_args([*TINY, "--sampler", sampler, "--eta", str(eta), "--sample_steps", "5", "--seed", "3"])
    net = randomized(mm.build_model(args, 1)).float()
    ab = mm.make_alpha_bar("cosine")
    make = lambda args, i: mm.generate(net, args, ab, i, torch.device("cpu"))
    batch = make(args, range(6))
    torch.testing.assert_close(batch[4:5], make(args, [4]), rtol=0, atol=1e-5)
    torch.testing.assert_close(batch[2:4], make(args, [2, 3]), rtol=0, atol=1e-5)
    args.seed = 4
    assert (make(args, [4]) - batch[4:5]).abs().max() > 1e-3


# Training


def weights(path, *keys):
    state = torch.load(path, weights_only=True)
    flat = {}
    for key in keys or ("model", "ema", "opt"):
        for k, v in (state[key].items() if key != "opt" else enumerate(state["opt"]["state"].values())):
            flat.update({(key, k): v} if torch.is_tensor(v) else {(key, k, j): w for j, w in v.items()})
    return state["step"], flat


def test_resume_is_exact(faces, monkeypatch):
    """Six steps at once, and six steps that SIGTERM cuts after the second: the same weights, bit for bit."""
    flags = ["--data", faces, *TINY, "--class_cond", "--dropout", "0.2", "--eval_every", "4", "--steps", "6", "--accum", "2"]
    assert run(*flags, "--out", "whole") == 0
    batch = mm.train_batch

    def cut(data, args, step, *rest):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(data, args, step, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(mm, "train_batch", cut)
        assert run(*flags, "--out", "cut") == 143
    assert weights("cut/ckpt.pt")[0] == 2
    assert run("--resume", "cut/ckpt.pt") == 0
    (step, whole), (step_cut, resumed) = weights("whole/ckpt.pt"), weights("cut/ckpt.pt")
    assert step == step_cut == 6 and whole.keys() == resumed.keys()
    assert [k for k in whole if not torch.equal(whole[k], resumed[k])] == []
    a, b = (mm.load_safetensors(f"{out}/model.safetensors")[0] for out in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    logs = [[json.loads(line) for line in open(f"{out}/log.jsonl")] for out in ("whole", "cut")]
    assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]] == [0, 1, 2, 3, 4, 5, 6]
    assert [r.get("loss") for r in logs[0]] == [r.get("loss") for r in logs[1]]
    assert [r.get("val_loss") for r in logs[0]] == [r.get("val_loss") for r in logs[1]]


def test_more_steps_than_first_asked_for(faces):
    """n steps, resumed for n more, equal 2n steps: nothing in a run may depend on where it is meant to end."""
    flags = ["--data", faces, *TINY, "--class_cond", "--dropout", "0.2", "--eval_every", "2"]
    assert run(*flags, "--out", "whole", "--steps", "8") == 0
    assert run(*flags, "--out", "half", "--steps", "4") == 0
    assert run("--resume", "half/ckpt.pt", "--out", "half", "--steps", "8") == 0
    (_, whole), (step, resumed) = weights("whole/ckpt.pt"), weights("half/ckpt.pt")
    assert step == 8 and [k for k in whole if not torch.equal(whole[k], resumed[k])] == []
    seconds = [json.loads(line)["seconds"] for line in open("half/log.jsonl")]
    assert seconds == sorted(seconds), "time goes on where it was"


def test_accumulation_changes_nothing(faces):
    flags = ["--data", faces, *TINY, "--class_cond", "--condition", "mask", "--steps", "2"]
    assert run(*flags, "--out", "one") == 0 and run(*flags, "--out", "four", "--accum", "4") == 0
    (_, a), (_, b) = weights("one/ckpt.pt", "model"), weights("four/ckpt.pt", "model")
    start = mm.parse_args([*flags])
    torch.manual_seed(mm.mix(mm.INIT, 0))
    first = mm.build_model(start, 8).state_dict()
    moved = max((a["model", k] - first[k]).abs().max() for k in first)
    assert moved > 1e-5 and max((a[k] - b[k]).abs().max() for k in a) < 0.02 * moved


def test_two_processes_equal_one(faces, tmp_path, run_script):
    """torchrun with two gloo processes takes the same steps as one process with the whole batch."""
    flags = ["--data", faces, *TINY, "--class_cond", "--condition", "gray", "--steps", "3", "--device", "cpu"]
    assert run(*flags, "--out", "one") == 0
    done = run_script("ddpm_images.py", *flags, "--out", "two", cwd=tmp_path, timeout=120,
                      via=("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"), env={"GLOO_SOCKET_IFNAME": "lo"})
    assert done.returncode == 0, done.stderr
    (_, a), (_, b) = weights("one/ckpt.pt", "model", "ema"), weights("two/ckpt.pt", "model", "ema")
    torch.manual_seed(mm.mix(mm.INIT, 0))
    first = mm.build_model(mm.parse_args(flags), 8).state_dict()
    moved = max((a["model", k] - first[k]).abs().max() for k in first)
    assert moved > 1e-5 and max((a[k] - b[k]).abs().max() for k in a) < 0.02 * moved
    one, two = ([json.loads(line) for line in open(f"{out}/log.jsonl")][-1] for out in ("one", "two"))
    assert abs(one["loss"] - two["loss"]) < 1e-4 and abs(one["val_loss"] - two["val_loss"]) < 1e-4
    assert done.stdout.count("settings:") == 1  # one process talks


@pytest.mark.parametrize("flags", [["--class_cond", "--cfg_scale", "2"], ["--condition", "lowres"], ["--condition", "edges"],
                                   ["--condition", "mask"], ["--patch", "1", "--pred", "eps", "--schedule", "linear"]])
def test_the_whole_path(faces, flags, tmp_path):
    """Train, look at what a run leaves behind, sample from it at two batch sizes' worth of pictures."""
    assert run("--data", faces, *TINY, *flags, "--steps", "2", "--eval_every", "1") == 0
    out = tmp_path / "out/ddpm_images"
    made = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert made == {"ckpt.pt", "model.safetensors", "log.jsonl", "samples/000000.png", "samples/000001.png",
                    "samples/000002.png", "forward.png", "reverse.gif", "training.gif", "interpolation.png", "loss.png"}
    assert Image.open(out / "reverse.gif").n_frames == 2
    tensors, about = mm.load_safetensors(out / "model.safetensors")
    assert about["script"] == "ddpm_images.py" and json.loads(about["data"])["classes"] == [str(i) for i in range(8)]
    record = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert {"step", "loss", "val_loss", "val_bins", "lr", "img_per_s", "seconds"} <= set(record) and record["step"] == 2
    assert len(record["val_bins"]) == 10 and math.isfinite(record["val_loss"])
    extra = []
    if "--condition" in flags:
        (tmp_path / "in").mkdir()
        for i in range(3):
            Image.fromarray(mm.draw_face(9, i, 40)[0]).save(tmp_path / f"in/{i}.png")
        extra = ["--input", "in"]
    again = ["--ckpt", out / "model.safetensors", "--sample_steps", "2", "--dtype", "fp32", *extra]
    assert run("--sample", "3", *again) == 0
    first = [np.asarray(Image.open(p)) for p in sorted((out / "generated").glob("*.png"))]
    assert [f.shape for f in first] == [(16, 16, 3)] * 3 and (out / "generated.png").exists()
    assert run("--sample", "1", *again) == 0
    second = [np.asarray(Image.open(p)) for p in sorted((out / "generated").glob("*.png"))]
    assert len(second) == 1 and abs(second[0].astype(int) - first[0]).max() <= 1
    out.rename("moved")
    assert run("--sample", "1", "--ckpt", "moved/model.safetensors", *again[2:]) == 0 and not out.exists()  # beside it


def test_the_loss_falls_and_the_ema_is_what_is_saved(faces, tmp_path):
    assert run("--data", faces, *TINY, "--pred", "x0", "--steps", "40", "--eval_every", "20", "--lr", "3e-3") == 0
    losses = [json.loads(line).get("val_loss") for line in open("out/ddpm_images/log.jsonl")]
    losses = [x for x in losses if x]
    assert len(losses) == 3 and losses[2] < 0.8 * losses[1] < losses[0]
    state = torch.load("out/ddpm_images/ckpt.pt", weights_only=True)
    saved = mm.load_safetensors("out/ddpm_images/model.safetensors")[0]
    assert all(torch.equal(saved[k], state["ema"][k]) for k in saved)
    assert any(not torch.equal(saved[k], state["model"][k]) for k in saved)


def test_a_new_run_keeps_the_old_model(faces, capsys):
    flags = ["--data", faces, *TINY, "--steps", "1"]
    assert run(*flags) == 0
    shutil.copy("out/ddpm_images/ckpt.pt", "before.pt")
    assert run(*flags, "--seed", "1") == 0
    assert open("before.pt", "rb").read() == open("out/ddpm_images/ckpt.pt.old", "rb").read()
    assert "is now ckpt.pt.old" in capsys.readouterr().out


def test_smoke(run_script, tmp_path):
    """What a newcomer may try first: the whole path from the command line, in seconds."""
    done = run_script("ddpm_images.py", "--smoke", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "drawn_faces" in done.stdout and len(list(tmp_path.glob("out/smoke/generated/*.png"))) == 4
