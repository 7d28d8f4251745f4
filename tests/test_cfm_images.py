"""cfm_images.py: paths, couplings, solvers, few steps, the bridge and training, against closed forms and other packages."""
import itertools
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import cfm_images as mm
import ddpm_images

TINY = "--size 16 --patch 4 --width 32 --mults 1,2 --blocks 1 --batch_size 8 --sample_steps 2 --dtype fp32 --device cpu".split()


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


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(mm, "draw_pictures", lambda *args: None)


def run(*flags):
    return mm.main([str(f) for f in flags])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The method


def test_path_and_loss_are_those_of_torchcfm_and_flow_matching():
    torchcfm = pytest.importorskip("torchcfm.conditional_flow_matching")
    paths = pytest.importorskip("flow_matching.path")
    x0, eps, t = randn(6, 3, 4, 4), randn(6, 3, 4, 4, seed=1), torch.linspace(0.05, 0.95, 6).double()
    xt, v = mm.path(x0, eps, t.view(-1, 1, 1, 1))
    matcher = torchcfm.ConditionalFlowMatcher(sigma=0.0)  # its time runs from noise to data
    _, theirs, u = matcher.sample_location_and_conditional_flow(eps, x0, t=1 - t)
    torch.testing.assert_close(xt, theirs, rtol=0, atol=1e-14)
    torch.testing.assert_close(v, -u, rtol=0, atol=1e-14)
    sample = paths.CondOTProbPath().sample(t=1 - t, x_0=eps, x_1=x0)
    torch.testing.assert_close(xt, sample.x_t, rtol=0, atol=1e-14)
    torch.testing.assert_close(v, -sample.dx_t, rtol=0, atol=1e-14)
    wrong = randn(6, 3, 4, 4, seed=2)
    loss = mm.loss_fn(lambda xt, t, y: wrong, x0, eps, t)
    torch.testing.assert_close(loss, (wrong - v).square().mean((1, 2, 3)))


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_weights_the_error_of_x0_by_the_capped_snr(gamma):
    x0, eps, wrong, t = randn(5, 3, 4, 4), randn(5, 3, 4, 4, seed=1), randn(5, 3, 4, 4, seed=2), torch.linspace(.1, .9, 5)
    s = t.double().view(-1, 1, 1, 1)
    v = (mm.path(x0, eps, s)[0] - (x0 + 0.1 * wrong)) / s  # what a guess of x0 that is off by 0.1 wrong amounts to
    want = (((1 - t) / t) ** 2).clamp(max=gamma) * (0.1 * wrong).square().mean((1, 2, 3))
    loss = mm.loss_fn(lambda *a: v, x0, eps, t.double())
    torch.testing.assert_close(mm.loss_weight(t.double(), gamma) * loss, want, rtol=1e-6, atol=0)
    all_alike = (0.1 * wrong).square().mean((1, 2, 3))
    torch.testing.assert_close(mm.loss_weight(t.double(), gamma, True) * loss, all_alike, rtol=1e-6, atol=0)
    assert torch.equal(mm.loss_weight(t, 0.0), torch.ones(5))


def test_times():
    g = lambda: torch.Generator().manual_seed(0)
    assert torch.equal(mm.draw_times("uniform", 1000, g()), torch.rand(1000, generator=g()))
    n = torch.randn(1000, generator=g())
    # flow_matching's skewed_timestep_sample: sigma = exp(1.2 n - 1.2), and its time, 1 at the data, 1 / (1 + sigma)
    torch.testing.assert_close(mm.draw_times("skewed", 1000, g()), 1 - 1 / (1 + torch.exp(1.2 * n - 1.2)))
    assert abs(mm.draw_times("logit_normal", 4001, g()).median() - 0.5) < 0.02
    assert mm.draw_times("noisy", 4001, g()).median() > 0.65


def test_time_grid_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for shift in (1.0, 3.0):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10).tolist())
        np.testing.assert_allclose(mm.time_grid(10, shift), scheduler.sigmas.numpy(), atol=1e-6)


def test_ot_pairs_against_brute_force_within_each_class():
    x0, eps, y = randn(7, 1, 2, 2), randn(7, 1, 2, 2, seed=1), torch.tensor([0, 1, 0, 1, 0, 1, 0])
    cost = lambda e: (x0 - e).square().sum().item()
    orders = list(itertools.permutations(range(7)))
    kept = [p for p in orders if all(y[i] == y[j] for i, j in enumerate(p))]
    for labels, allowed in ((y, kept), (torch.zeros_like(y), orders)):
        best = min(cost(eps[list(p)]) for p in allowed)
        got = mm.couple(x0, eps, labels)
        assert abs(cost(got) - best) < 1e-9
        for c in labels.unique():  # no noise moves to another class
            a, b = (sorted(e[labels == c].flatten(1)[:, 0].tolist()) for e in (got, eps))
            assert a == b
    assert cost(mm.couple(x0, eps, y)) > cost(mm.couple(x0, eps, torch.zeros_like(y)))


class Linear:
    """The true velocity for pictures of independent pixels N(0, s^2): linear in xt. It takes noise to s times noise."""

    def __init__(self, s):
        self.s = s

    def __call__(self, xt, t, *_):
        t = t.view(-1, 1, 1, 1)
        return (t - (1 - t) * self.s ** 2) / ((1 - t) ** 2 * self.s ** 2 + t ** 2) * xt


@pytest.mark.parametrize("solver, steps, error", [("euler", 400, 1e-2), ("midpoint", 50, 1e-5), ("heun", 50, 1e-3),
                                                  ("rk4", 25, 1e-7), ("dopri5", 1, 1e-5)])
def test_a_linear_model_has_a_closed_form(solver, steps, error):
    noise = randn(4, 3, 4, 4)
    x, nfe = mm.sample(Linear(0.5), iter([noise]), solver, mm.time_grid(steps, 1.0), tol=1e-6)
    assert (x - 0.5 * noise).abs().max() < error
    assert solver == "dopri5" or nfe == steps * len(mm.RUNGE_KUTTA[solver])


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_order_of_the_solvers(solver, order):
    """dx/dt = (1 + t) x (1 - x): x / (1 - x) falls by exp(3/2) on the way from 1 to 0."""
    x1, errors = torch.linspace(0.2, 0.8, 5).double().view(5, 1, 1, 1), []
    odds = x1 / (1 - x1) * math.exp(-1.5)
    for steps in (16, 32):
        x, _ = mm.sample(lambda x, t: (1 + t).view(-1, 1, 1, 1) * x * (1 - x), iter([x1]), solver,
                         mm.time_grid(steps, 1.0))
        errors.append((x - odds / (1 + odds)).abs().max().item())
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.2


@pytest.mark.parametrize("s", [0.1, 0.2, 0.5])
def test_dopri5_follows_its_tolerance_and_calls_as_often_as_torchdiffeq(s):
    """Over five tolerances together: single runs are of 20 to 140 calls, six a step, and differ by a few steps."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    model, noise, calls, ours = Linear(s), randn(4, 3, 4, 4), [], 0

    def field(t, x):
        calls.append(1)
        return model(x, t.expand(len(x)))
    for tol in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        x, nfe = mm.sample(model, iter([noise]), "dopri5", [1.0, 0.0], tol)
        times = torch.tensor([1.0, 0.0]).double()
        theirs = torchdiffeq.odeint(field, noise, times, rtol=tol, atol=tol, method="dopri5")[-1]
        ours, error = ours + nfe, (x - s * noise).abs().max()
        assert 1e-2 * tol < error < 10 * tol and error < (theirs - s * noise).abs().max()
    assert 0.8 * len(calls) <= ours <= 1.2 * len(calls), (ours, len(calls))


def test_ancestral_sampling_gives_the_right_distribution():
    x, nfe = mm.sample(Linear(0.5), (randn(200, 3, 8, 8, seed=i) for i in itertools.count()), "ancestral",
                       mm.time_grid(200, 1.0))
    assert nfe == 200 and abs(x.std() - 0.5) < 0.02 and abs(x.mean()) < 0.01


@pytest.mark.parametrize("solver", ["midpoint", "heun", "rk4"])
def test_inversion_of_a_smooth_field(solver):
    field = lambda xt, t, *_: torch.sin(2 * xt + t.view(-1, 1, 1, 1)) - 0.5 * xt.roll(1, -1)
    x0, times = randn(4, 3, 8, 8).clamp(-1, 1), mm.time_grid(25, 1.0)
    noise, _ = mm.sample(field, iter([x0]), solver, times[::-1])
    again, _ = mm.sample(field, iter([noise]), solver, times)
    assert (noise - x0).abs().max() > 0.3 and mm.psnr(again, x0) > 40
    wrong = torch.tensor([0.2, 2.0, 0.2]).double().view(3, 1, 1, 1)
    assert abs(mm.psnr(x0[:3] + wrong, x0[:3]) - 20) < 1e-6  # an error of a tenth of the range, in most of them


def test_guidance_and_its_interval():
    class Model:
        y_null = 8

        def __call__(self, xt, t, y, *r):
            self.seen = len(xt)
            return xt * 0 + (0.0 if y is None else 1.0 * y.view(-1, 1, 1, 1))
    model, xt, y = Model(), randn(3, 1, 2, 2), torch.tensor([1, 2, 3])
    call = mm.guided(model, y, 3.0, (0.2, 0.8))
    for t, scale in ((0.5, 3), (0.2, 3), (0.8, 3), (0.1, 1), (0.9, 1)):
        out = call(xt, torch.full((3,), t, dtype=torch.float64))
        torch.testing.assert_close(out[:, 0, 0, 0], 8 + scale * (y.double() - 8))
        assert model.seen == (6 if scale == 3 else 3), "outside the interval one call is enough"
    assert mm.guided(model, None, 3.0, (0, 1))(xt, torch.ones(3)).abs().max() == 0


# Few steps


def mean_velocity(xt, t, y=None, r=None, s=0.5):
    """Of Linear(s): along its paths x(t) = a(t) x(1) with a^2 = (1 - t)^2 s^2 + t^2."""
    r = t if r is None else r
    a = lambda t: ((1 - t) ** 2 * s ** 2 + t ** 2).sqrt().view(-1, 1, 1, 1)
    u = (a(t) - a(r)) / (t - r).view(-1, 1, 1, 1) / a(t) * xt
    return torch.where((t == r).view(-1, 1, 1, 1), Linear(s)(xt, t), u)


def test_a_mean_velocity_needs_one_step():
    noise = randn(4, 3, 4, 4)
    for steps in (1, 3):
        x, nfe = mm.sample(lambda xt, t, r: mean_velocity(xt, t, None, r), iter([noise]), "heun",
                           mm.time_grid(steps, 1.0), meanflow=True)
        assert nfe == steps
        torch.testing.assert_close(x, 0.5 * noise, rtol=0, atol=1e-12)


def test_the_mean_velocity_minimises_the_meanflow_loss():
    """The target, averaged over pairs with the same xt, is the mean velocity itself: so is its own regression line."""
    n, t, r = 4000, 0.7, 0.2
    x0, eps = 0.5 * randn(n, 1, 1, 1), randn(n, 1, 1, 1, seed=1)
    times = torch.full((n,), t).double(), torch.full((n,), r).double()
    xt, _ = mm.path(x0, eps, t)
    right = mm.meanflow_loss_fn(mean_velocity, x0, eps, *times)
    for off in (-0.2, 0.2):
        frozen = mean_velocity  # the target's slope stays that of the right model: only the guess is moved

        def moved(xt, t, y=None, r=None):
            u = frozen(xt, t, y, r)
            return u + off * xt if torch.is_grad_enabled() else u
        assert mm.meanflow_loss_fn(moved, x0, eps, *times).mean() > right.mean() + 0.001
    same = times[0], times[0]
    torch.testing.assert_close(mm.meanflow_loss_fn(mean_velocity, x0, eps, *same),
                               mm.loss_fn(mean_velocity, x0, eps, times[0]))


def tiny_model(*flags, n_classes=8, seed=0):
    torch.manual_seed(seed)
    model = mm.build_model(mm.parse_args([*TINY, *flags]), n_classes).double()
    for p in model.parameters():
        if p.abs().max() == 0:
            nn.init.normal_(p, std=0.05)
    return model.eval()


def test_the_slope_of_meanflow_is_that_of_finite_differences():
    """What the loss regresses on, for a real network with attention and labels, in float64."""
    model, h = tiny_model("--meanflow", "--class_cond"), 1e-6
    x0, eps, y = randn(4, 3, 16, 16), randn(4, 3, 16, 16, seed=1), torch.tensor([0, 3, 8, 5])
    t, r = torch.tensor([0.9, 0.6, 0.5, 0.3]).double(), torch.tensor([0.1, 0.5, 0.5, 0.0]).double()
    with torch.no_grad():
        xt, v = mm.path(x0, eps, t.view(-1, 1, 1, 1))
        along = model(xt, t, y)
        ahead, behind = (model(xt + s * h * along, t + s * h, y, r) for s in (1, -1))
        target = v - (t - r).view(-1, 1, 1, 1) * (ahead - behind) / (2 * h)
        want = (model(xt, t, y, r) - target).square().mean((1, 2, 3))
    got = mm.meanflow_loss_fn(model, x0, eps, t, r, y)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    got.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_network_as_a_velocity():
    xt, t = randn(3, 3, 16, 16), torch.tensor([0.8, 0.3, 0.01]).double()
    x0_model, v_model = tiny_model("--pred", "x0"), tiny_model("--pred", "v")
    out = v_model(xt, t)  # the same weights
    want = (xt - out) / torch.tensor([0.8, 0.3, mm.T_MIN]).double().view(-1, 1, 1, 1)
    torch.testing.assert_close(x0_model(xt, t), want)
    unet = ddpm_images.UNet(16, 4, 32, [1, 2], 1, 8, 0.0).double()
    unet.load_state_dict(v_model.state_dict())
    torch.testing.assert_close(out, unet(xt, mm.T_SCALE * t))  # the same network as in ddpm_images.py
    with pytest.raises(AssertionError):
        torch.testing.assert_close(out, unet(xt, (mm.T_SCALE - 1) * t))
    labelled, y = tiny_model("--pred", "v", "--class_cond"), torch.tensor([0, 7, 8])
    unet = ddpm_images.UNet(16, 4, 32, [1, 2], 1, 8, 0.0, n_classes=8).double()
    unet.load_state_dict(labelled.state_dict())
    torch.testing.assert_close(labelled(xt, t, y), unet(xt, mm.T_SCALE * t, y))
    assert ((labelled(xt, t, y) - labelled(xt, t)).abs().amax((1, 2, 3)) > 1e-6).tolist() == [True, True, False]
    two = tiny_model("--meanflow")
    torch.testing.assert_close(two(xt, t), two(xt, t, None, t))
    assert (two(xt, t) - two(xt, t, None, 0 * t)).abs().max() > 1e-6


# The bridge


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("pred", ["eps", "v", "x0"])
@pytest.mark.parametrize("theirs, ours", [("ddim", "euler"), ("ddpm", "ancestral")])
def test_samplers_of_a_diffusion_are_samplers_of_a_flow(schedule, pred, theirs, ours):
    """DDIM is Euler, and DDPM is ancestral sampling, in the rescaled coordinates: in float64, on the same noise."""
    torch.manual_seed(0)
    unet = ddpm_images.UNet(16, 4, 32, [1, 2], 1, 8, 0.0, n_classes=3).double().eval()
    for p in unet.parameters():
        if p.abs().max() == 0:
            nn.init.normal_(p, std=0.05)
    ab, y = ddpm_images.make_alpha_bar(schedule), torch.tensor([0, 2])
    noises = [randn(2, 3, 16, 16, seed=i) for i in range(13)]
    want = ddpm_images.sample(lambda xt, t: unet(xt, t.double(), y), iter(noises), ab, pred, theirs, 12)
    levels = np.linspace(mm.T - 1, 0, 12).round().astype(int)
    times = [mm.flow_time(ab[t]).item() for t in levels] + [0.0]
    scale = ab[-1] ** 0.5 + (1 - ab[-1]) ** 0.5
    model = mm.guided(mm.DDPMFlow(unet, ab, pred), y, 1.0, (0, 1))
    got, nfe = mm.sample(model, iter([noises[0] / scale, *noises[1:]]), ours, times)
    assert nfe == 12 and (got - want).abs().max() < 1e-8


# Training


def weights(path, *parts):
    state = torch.load(path, weights_only=True)
    flat = {(k, name): v for k in (parts or ("model", "ema")) for name, v in state[k].items()}
    opt = {} if parts else {("opt", i, k): v for i, s in state["opt"]["state"].items() for k, v in s.items()}
    return state["step"], flat | opt


METHODS = {"plain": [], "ot": ["--coupling", "ot", "--class_cond"], "meanflow": ["--meanflow", "--class_cond"],
           "reflow": ["--reflow", "teacher/model.safetensors", "--pairs", "40"],
           "init_from": ["--meanflow", "--init_from", "teacher/model.safetensors"]}


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_exact(method, faces, no_pictures, monkeypatch):
    """6 steps; 6 that SIGTERM cuts after the second; 3 steps, and then 3 more: the same weights, bit for bit."""
    flags = ["--data", faces, *TINY, *METHODS[method], "--dropout", "0.2", "--eval_every", "2", "--steps", "6"]
    if "teacher/model.safetensors" in flags:
        assert run("--data", faces, *TINY, "--dropout", "0.2", "--steps", 1, "--out", "teacher") == 0
    assert run(*flags, "--out", "whole") == 0
    batch = mm.train_batch

    def cut(data, args, step, *rest):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(data, args, step, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(mm, "train_batch", cut)
        assert run(*flags, "--out", "cut") == 143
    assert run("--resume", "cut/ckpt.pt") == 0
    assert run(*flags[:-2], "--steps", 3, "--out", "half") == 0 and run("--resume", "half/ckpt.pt", "--steps", 6) == 0
    step, whole = weights("whole/ckpt.pt")
    for out in ("cut", "half"):
        assert weights(f"{out}/ckpt.pt")[0] == step == 6
        assert [k for k, v in weights(f"{out}/ckpt.pt")[1].items() if not torch.equal(v, whole[k])] == []
        a, b = (mm.load_safetensors(f"{o}/model.safetensors")[0] for o in ("whole", out))
        assert [k for k in a if not torch.equal(a[k], b[k])] == []


def close(one, two, flags):
    """Equal but for the order of sums, beside how far training moved the weights."""
    (_, a), (_, b) = weights(one, "model"), weights(two, "model")
    torch.manual_seed(mm.mix(mm.INIT, 0))
    first = mm.build_model(mm.parse_args(flags), 8).state_dict()
    moved = max((a["model", k] - first[k]).abs().max() for k in first)
    return moved > 1e-5 and max((a[k] - b[k]).abs().max() for k in a) < 0.02 * moved


@pytest.mark.parametrize("method", ["plain", "meanflow"])
def test_accumulation_changes_nothing(method, faces, no_pictures):
    flags = ["--data", faces, *TINY, *METHODS[method], "--steps", "2"]
    assert run(*flags, "--out", "one") == 0 and run(*flags, "--out", "four", "--accum", "4") == 0
    assert close("one/ckpt.pt", "four/ckpt.pt", flags)


@pytest.mark.parametrize("method", ["plain", "meanflow"])
def test_two_processes_equal_one(method, faces, tmp_path, run_script, no_pictures):
    """torchrun with two gloo processes takes the same steps as one process with the whole batch."""
    flags = ["--data", faces, *TINY, *METHODS[method], "--steps", "3"]
    assert run(*flags, "--out", "one") == 0
    done = run_script("cfm_images.py", *flags, "--out", "two", cwd=tmp_path, timeout=120,
                      via=("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"),
                      env={"GLOO_SOCKET_IFNAME": "lo"})
    assert done.returncode == 0, done.stderr
    assert close("one/ckpt.pt", "two/ckpt.pt", flags)
    one, two = ([json.loads(line) for line in open(f"{out}/log.jsonl")] for out in ("one", "two"))
    one, two = ([r for r in log if "val_loss" in r][-1] for log in (one, two))
    assert abs(one["loss"] - two["loss"]) < 1e-4 and abs(one["val_loss"] - two["val_loss"]) < 1e-4
    assert done.stdout.count("settings:") == 1  # one process talks


def test_times_of_a_batch(faces):
    """Plain training sees the times as they are drawn; MeanFlow sees r <= t, half of them equal."""
    cpu = torch.device("cpu")
    data = mm.open_data(mm.prepare_data(faces, 16))
    for method in ([], ["--meanflow"]):
        args = mm.parse_args([*TINY, "--data", faces, "--batch_size", "400", *method])
        _, _, t, r, y = mm.train_batch(data, args, 7, cpu, 0, 1)
        drawn = mm.draw_times(args.times, (2, 400), torch.Generator().manual_seed(mm.mix(mm.BATCH, 0, 7)))
        if method:
            assert (r <= t).all() and 0.4 < (r == t).float().mean() < 0.6 and torch.equal(t[r < t], drawn.amax(0)[r < t])
        else:
            assert torch.equal(t, drawn[0]) and torch.equal(r, t) and y is None
        halves = [mm.train_batch(data, args, 7, cpu, rank, 2) for rank in (0, 1)]
        assert torch.equal(torch.cat([h[2] for h in halves]), t)


def test_reflow_trains_on_what_its_teacher_makes(faces, no_pictures, capsys):
    assert run("--data", faces, *TINY, "--class_cond", "--steps", 20, "--lr", "3e-3", "--out", "teacher") == 0
    flags = [*TINY, "--class_cond", "--reflow", "teacher/model.safetensors", "--pairs", "40"]
    assert run(*flags, "--steps", 1, "--cfg_scale", 3, "--out", "straight") == 0
    args, cpu = mm.parse_args(flags), torch.device("cpu")
    teacher, classes = mm.load_model(args.reflow, args, cpu)
    data = mm.open_data(mm.make_pairs(teacher, classes, args, cpu))
    assert len(data.images) == 40 and data.classes == [str(i) for i in range(8)]
    assert len(list(Path("data/cache").glob("reflow*.uint8"))) == 1, "guidance is for the student: the same pairs"
    x0, eps, t, r, y = mm.train_batch(data, args, 0, cpu, 0, 1)
    i = data.train[mm.shuffled(len(data.train), 0, 0)[:8]]
    made, _ = mm.generate(teacher, args, iter([eps]), torch.from_numpy(data.labels[i]), sampler="midpoint",
                          times=mm.time_grid(mm.PAIR_STEPS, 1.0))
    assert (made.clamp(-1, 1) - x0).abs().max() < 0.51 * 2 / 255  # kept as bytes, and not mirrored
    start, first = (mm.load_safetensors(f"{out}/model.safetensors")[0] for out in ("teacher", "straight"))
    assert max((start[k] - first[k]).abs().max() for k in start) < 0.01, "it goes on from its teacher's weights"
    again = ["--sample", 1, "--ckpt", "straight/model.safetensors", "--dtype", "fp32", "--device", "cpu"]
    capsys.readouterr()
    assert run(*again, "--sampler", "ancestral") == 2 and "pairs" in capsys.readouterr().err
    assert run(*again, "--cfg_scale", 1) == 0 and "midpoint" in capsys.readouterr().out
    assert Path("straight/generated.png").exists(), "beside its model, unless --out is given"


def test_meanflow_begins_as_the_flow_it_comes_from(faces, no_pictures, capsys):
    """--init_from, before anything is learnt: the mean velocity to any r is the flow's velocity, one step is Euler's."""
    assert run("--data", faces, *TINY, "--class_cond", "--steps", 20, "--lr", "3e-3", "--out", "flow") == 0
    flags = ["--data", faces, *TINY, "--init_from", "flow/model.safetensors", "--lr", 0]
    assert run(*flags, "--meanflow", "--steps", 1, "--out", "mean") == 0
    cpu, noise, y = torch.device("cpu"), torch.randn(2, 3, 16, 16), torch.tensor([0, 3])
    args = mm.parse_args(["--device", "cpu", "--dtype", "fp32", "--sample_steps", "2", "--sampler", "euler"])
    flow, _ = mm.load_model("flow/model.safetensors", args, cpu)
    euler, _ = mm.generate(flow, args, iter([noise]), y)
    mean, _ = mm.load_model("mean/model.safetensors", mm.parse_args(["--device", "cpu"]), cpu)
    jumps, nfe = mm.generate(mean, args, iter([noise]), y, meanflow=True)
    assert nfe == 2 and args.class_cond and euler.std() > 0.1
    torch.testing.assert_close(jumps, euler)
    capsys.readouterr()
    flags[flags.index("flow/model.safetensors")] = "mean/model.safetensors"
    assert run(*flags, "--steps", 1) == 2 and "--meanflow" in capsys.readouterr().err
    assert run(*flags, "--meanflow", "--steps", 1) == 0


def test_a_meanflow_model_on_the_gpu_preset(faces, no_pictures):
    """Its preset compiles, which MeanFlow cannot have; nobody asked for it, so it is no error."""
    assert run("--data", faces, *TINY, "--meanflow", "--steps", 1) == 0
    assert run("--preset", "gpu", "--sample", 1, "--ckpt", "out/cfm_images/model.safetensors", "--device", "cpu") == 0


@pytest.mark.parametrize("flags", [["--class_cond", "--cfg_scale", "2", "--cfg_interval", "0.2", "0.9"], ["--meanflow"],
                                   ["--patch", "1", "--pred", "v", "--times", "skewed", "--min_snr", "0"],
                                   ["--coupling", "ot", "--sampler", "dopri5", "--tol", "0.1"]])
def test_the_whole_path(faces, flags, tmp_path, capsys):
    """Train, look at what a run leaves behind, sample from it at two batch sizes' worth of pictures, invert pictures."""
    assert run("--data", faces, *TINY, *flags, "--steps", "2", "--eval_every", "1") == 0
    out = tmp_path / "out/cfm_images"
    made = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert made == {"ckpt.pt", "model.safetensors", "log.jsonl", "samples/000000.png", "samples/000001.png",
                    "samples/000002.png", "forward.png", "reverse.gif", "training.gif", "interpolation.png", "nfe.png",
                    "nfe.json", "loss.png"}
    assert "to noise and back" in capsys.readouterr().out
    tensors, about = mm.load_safetensors(out / "model.safetensors")
    assert about["script"] == "cfm_images.py" and json.loads(about["data"])["classes"] == [str(i) for i in range(8)]
    record = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert {"step", "loss", "val_loss", "val_bins", "lr", "img_per_s", "seconds"} <= set(record) and record["step"] == 2
    found = json.loads((out / "nfe.json").read_text())
    assert [n for n, _ in found["psnr"]["euler"]] == [1, 2, 4, 8, 16, 32, 64] and found["inversions"]
    again = ["--ckpt", out / "model.safetensors", "--sample_steps", "2", "--dtype", "fp32", "--device", "cpu"]
    assert run("--sample", "3", *again) == 0
    said = capsys.readouterr().out
    assert "NFE" in said
    first = [np.asarray(Image.open(p)) for p in sorted((out / "generated").glob("*.png"))]
    assert [f.shape for f in first] == [(16, 16, 3)] * 3 and (out / "generated.png").exists()
    assert run("--sample", "1", *again) == 0
    second = [np.asarray(Image.open(p)) for p in sorted((out / "generated").glob("*.png"))]
    assert len(second) == 1 and abs(second[0].astype(int) - first[0]).max() <= (40 if "dopri5" in flags else 1)
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.fromarray(mm.draw_face(9, i, 40)[0]).save(tmp_path / f"in/{i}.png")
    assert run("--sample", "3", "--input", "in", *again) == 0
    assert "PSNR to noise and back" in capsys.readouterr().out


def test_a_ddpm_as_a_flow(faces, tmp_path, capsys):
    tiny = [f for f in TINY]
    assert ddpm_images.main(["--data", faces, *tiny, "--class_cond", "--steps", "2"]) == 0
    model = "out/ddpm_images/model.safetensors"
    for sampler in ("heun", "ancestral", "dopri5"):
        assert run("--from_ddpm", model, "--sample", 2, "--sampler", sampler, "--sample_steps", 2, "--cfg_scale", 2) == 0
    assert len(list(tmp_path.glob("out/cfm_images/generated/*.png"))) == 2 and "NFE" in capsys.readouterr().out
    assert ddpm_images.main(["--data", faces, *tiny, "--condition", "gray", "--steps", "1"]) == 0
    assert run("--from_ddpm", model) == 2 and "translates" in capsys.readouterr().err
    assert run("--from_ddpm", "faces.npz") == 2 and "faces.npz" in capsys.readouterr().err
    assert ddpm_images.main(["--data", faces, *tiny, "--steps", "1"]) == 0 and capsys.readouterr()
    assert run("--from_ddpm", model, "--cfg_scale", 2) == 2 and "--class_cond" in capsys.readouterr().err


def test_the_loss_falls_and_the_ema_is_what_is_saved(faces, no_pictures):
    assert run("--data", faces, *TINY, "--steps", "40", "--eval_every", "20", "--lr", "3e-3") == 0
    losses = [json.loads(line).get("val_loss") for line in open("out/cfm_images/log.jsonl")]
    losses = [x for x in losses if x]
    assert len(losses) == 3 and losses[2] < 0.8 * losses[1] < losses[0]
    state = torch.load("out/cfm_images/ckpt.pt", weights_only=True)
    saved = mm.load_safetensors("out/cfm_images/model.safetensors")[0]
    assert all(torch.equal(saved[k], state["ema"][k]) for k in saved)
    assert any(not torch.equal(saved[k], state["model"][k]) for k in saved)


def test_smoke(run_script, tmp_path):
    done = run_script("cfm_images.py", "--smoke", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "drawn_faces" in done.stdout and len(list(tmp_path.glob("out/smoke/generated/*.png"))) == 4
