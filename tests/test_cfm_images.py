"""cfm_images.py: paths, loss, solvers and inversion, against closed forms, torchcfm, flow_matching and ddpm_images.py.
What it shares with ddpm_images.py (runs, sentences, data) is tested for both in test_ddpm_images.py."""
import argparse
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cfm_images as c
import ddpm_images


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noises(n, *shape):
    return (randn(*shape, seed=i) for i in range(n))


# The method


def test_path_and_loss_are_those_of_torchcfm_and_flow_matching():
    torchcfm = pytest.importorskip("torchcfm.conditional_flow_matching")
    paths = pytest.importorskip("flow_matching.path")
    x0, eps, t, seen = randn(6, 3, 4, 4), randn(6, 3, 4, 4, seed=1), torch.linspace(0.05, 0.95, 6).double(), []
    xt = c.add_noise(x0, eps, t.view(-1, 1, 1, 1))
    matcher = torchcfm.ConditionalFlowMatcher(sigma=0.0)  # its time runs from noise to data
    _, theirs, u = matcher.sample_location_and_conditional_flow(eps, x0, t=1 - t)
    torch.testing.assert_close(xt, theirs, rtol=0, atol=1e-14)
    sample = paths.CondOTProbPath().sample(t=1 - t, x_0=eps, x_1=x0)
    torch.testing.assert_close(xt, sample.x_t, rtol=0, atol=1e-14)
    torch.testing.assert_close(u, sample.dx_t, rtol=0, atol=1e-14)
    wrong = randn(6, 3, 4, 4, seed=2)
    loss = c.loss_fn(lambda *call: seen.extend(call) or wrong, x0, eps, t, "v")
    torch.testing.assert_close(loss, (wrong + u).square().mean((1, 2, 3)))
    assert torch.equal(seen[0], xt) and torch.equal(seen[1], t)
    for pred, right in {"v": -u, "x0": x0}.items():
        for min_snr in (0.0, 0.5):
            assert c.loss_fn(lambda *_: right, x0, eps, t, pred, min_snr).abs().max() < 1e-24
    near_0 = torch.tensor(0.001).double()  # where (xt - x0) / t is divided by T_MIN
    torch.testing.assert_close(c.to_velocity(x0, eps, near_0, "x0"), (eps - x0) / c.T_MIN)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
@pytest.mark.parametrize("pred", ["v", "x0"])
def test_min_snr_weights_the_error_of_x0(gamma, pred):
    """By the SNR, but at most by gamma, and at least by a small number, which is found from t = 1."""
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.8, 0.97, 1.0]).double()
    x0, eps, error = randn(7, 3, 4, 4), randn(7, 3, 4, 4, seed=1), 0.1 * randn(7, 3, 4, 4, seed=2)
    s = t.view(-1, 1, 1, 1)
    v = (c.add_noise(x0, eps, s) - (x0 + error)) / s  # what a guess of x0 that is off by `error` amounts to
    loss = c.loss_fn(lambda *_: {"v": v, "x0": x0 + error}[pred], x0, eps, t, pred, gamma)
    weight = loss / error.square().mean((1, 2, 3))
    floor = weight[-1].item()
    assert 0 < floor < 0.1
    torch.testing.assert_close(weight, ((1 - t) / t).square().clamp(floor, gamma), rtol=1e-7, atol=0)


@pytest.mark.parametrize("times", ["logit_normal", "uniform"])
def test_times(times):
    """2403.03206: the logit of t is N(0, 1), of a fifth uniform; or t is uniform."""
    data = argparse.Namespace(images=np.zeros((4, 1, 1, 3), np.uint8), labels=torch.zeros(4, dtype=torch.int64),
                              classes=["a"], train=np.arange(4))
    torch.manual_seed(0)
    args = argparse.Namespace(batch_size=20_000, size=1, flip=True, device="cpu", times=times)
    t = c.get_batch(data, args, 1, 0, 1)[2]
    assert 0 < t.min() and t.max() < 1
    cdf = 0.8 * torch.special.ndtr(torch.logit(t)) + 0.2 * t if times == "logit_normal" else t  # then it is uniform
    assert (cdf.sort().values - torch.linspace(0, 1, len(t))).abs().max() < 0.015  # Kolmogorov-Smirnov


# Samplers


def linear(xt, t, s=0.5):
    """The true velocity for images of independent pixels N(0, s^2): linear in xt. It takes noise to s times noise."""
    t = t.view(-1, 1, 1, 1)
    return (t - (1 - t) * s ** 2) / ((1 - t) ** 2 * s ** 2 + t ** 2) * xt


@pytest.mark.parametrize("sampler, steps, calls, error", [("euler", 400, 400, 7e-3), ("midpoint", 50, 100, 1e-5),
                                                          ("heun", 50, 99, 1.3e-3)])
@pytest.mark.parametrize("pred", ["v", "x0"])
def test_a_linear_model_has_a_closed_form(sampler, steps, calls, error, pred):
    """Forwards, and backwards from images to noise. The last step of heun is one of Euler."""
    seen, shown, noise = [], [], randn(4, 3, 4, 4)

    def model(xt, t):
        seen.append(t)
        return linear(xt, t) if pred == "v" else xt - t.view(-1, 1, 1, 1) * linear(xt, t)
    x = c.sample(model, iter([noise]), pred, sampler, steps, lambda *step: shown.append(step))
    bound = error if pred == "v" else 0.05  # T_MIN changes the last steps
    assert (x - 0.5 * noise).abs().max() < bound and len(seen) == calls and len(shown) == steps
    t, xt, x0 = shown[steps // 2]
    torch.testing.assert_close(x0, xt - t * linear(xt, torch.full((4,), t)), rtol=0, atol=1e-6)
    if pred == "v":
        back = c.sample(model, iter([0.5 * noise]), pred, sampler, steps, start=0.0, end=1.0)
        assert (back - noise).abs().max() < 4 * error


@pytest.mark.parametrize("sampler", ["midpoint", "heun"])
def test_inversion(sampler):
    """From an image to noise and back is the image again, if the model is smooth."""
    def field(xt, t):
        return torch.sin(2 * xt + t.view(-1, 1, 1, 1)) - 0.5 * xt.roll(1, -1)
    x0 = randn(4, 3, 8, 8).clamp(-1, 1)
    noise = c.sample(field, iter([x0]), "v", sampler, 25, start=0.0, end=1.0)
    assert (noise - x0).abs().max() > 0.3 and (c.sample(field, iter([noise]), "v", sampler, 25) - x0).abs().max() < 0.01


def test_ancestral_sampling_gives_the_right_distribution():
    x = c.sample(linear, noises(201, 100, 3, 8, 8), "v", "ancestral", 200)
    assert abs(x.std() - 0.5) < 0.02 and abs(x.mean()) < 0.015


@pytest.mark.parametrize("theirs, ours", [("ddim", "euler"), ("ddpm", "ancestral")])
def test_samplers_of_a_diffusion_are_samplers_of_a_flow(theirs, ours):
    """xt of a diffusion, divided by the sum of its two factors, lies on the line of a flow. So DDIM is Euler, and DDPM
    is ancestral sampling: here at levels that are evenly spaced for the flow, with the same model and noise."""
    visited, n = [], 10
    ddpm_images.sample(lambda xt, t: xt, noises(n, 1), ddpm_images.make_alpha_bar("cosine"), "x0", theirs, n,
                       lambda t, *_: visited.append(t))
    t = torch.zeros(ddpm_images.T, dtype=torch.float64)
    t[visited] = torch.linspace(1, 1 / n, n, dtype=torch.float64)
    squares = (1 - t) ** 2 + t ** 2

    def model(xt, t):
        return 0.9 * torch.tanh(2 * xt + xt.roll(1, -1))
    a = ddpm_images.sample(lambda xt, i: model(squares[i].view(-1, 1, 1, 1) ** 0.5 * xt, i), noises(n, 2, 3, 4, 4),
                           (1 - t) ** 2 / squares, "x0", theirs, n)
    b = c.sample(model, noises(n + 1, 2, 3, 4, 4), "x0", ours, n)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # t of a flow is float32


# The network and the command line


def test_the_network_is_that_of_ddpm_images():
    """With the same weights, at 1000 t: the embedding of a time is made for 0..999."""
    args = argparse.Namespace(width=32, patch=4, mults=[1, 2], blocks=1, attn=1, dropout=0.0, classes=["a", "b"],
                              class_cond=True, condition="none")
    net, theirs = c.UNet(args).double().eval(), ddpm_images.UNet(args).double().eval()
    xt, t, y = randn(3, 3, 16, 16), torch.tensor([0.8, 0.3, 0.01]), torch.tensor([0, 1, 2])
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.05)
    theirs.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(xt, t, y), theirs(xt, 1000 * t, y))


def test_cfm_images_on_the_command_line(run_script, drawn_faces, monkeypatch):
    """Two steps on drawn faces, what they leave behind, and samples by each solver."""
    flags = "--preset smoke --class_cond --pred v --min_snr 1 --times uniform --out cfm".split()
    done = run_script("cfm_images.py", *flags, cwd=drawn_faces)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "drawn_faces: 15744 images" in done.stdout and "done in" in done.stdout
    out = drawn_faces / "cfm"
    made = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert made == {"ckpt.pt", "log.jsonl", "loss.png", "samples/000001.png", "samples/000002.png", "forward.png",
                    "reverse.gif", "training.gif", "interpolation.png", "steps.png"}
    assert Image.open(out / "steps.png").size == (8 * 32, 6 * 32)
    ends = np.asarray(Image.open(out / "interpolation.png"))  # ten columns: an image, eight between, another
    assert ends.shape == (32, 320, 3) and np.abs(ends[:, :32].astype(int) - ends[:, 32:64]).mean() < 10
    monkeypatch.chdir(drawn_faces)
    for n, sampler in ((3, "euler"), (2, "midpoint"), (2, "heun"), (1, "ancestral")):
        monkeypatch.setattr(sys, "argv", f"cfm_images.py --sample {n} --out cfm --device cpu --sampler {sampler} "
                            "--sample_steps 3 --label fox --cfg_scale 2".split())
        c.main()
        assert sorted(p.name for p in out.glob("generated/*")) == [f"{i:06}.png" for i in range(n)]
    assert Image.open(out / "generated.png").size == (8 * 32, 32)
