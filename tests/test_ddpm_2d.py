"""ddpm_2d.py: the method against closed forms and ddpm_images.py (itself held against diffusers), and the program."""
import itertools
import json
import os
import signal

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image

import ddpm_2d as d
import ddpm_images

TINY = "--steps 6 --width 16 --depth 2 --features 8 --batch_size 32 --sample_steps 4".split()


@pytest.fixture(autouse=True)
def fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    for s, handler in zip((signal.SIGINT, signal.SIGTERM), before):
        signal.signal(s, handler)


@pytest.fixture
def quick(monkeypatch):
    """Pictures and measures of few points."""
    monkeypatch.setattr(d, "N", 32)
    monkeypatch.setattr(d, "grid", lambda n, grid=d.grid: grid(4) if n < 96 else grid(n))
    monkeypatch.setattr(d, "log_likelihood", lambda model, x, *a: torch.zeros(len(x)))


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(d, "show", lambda *args: None)


def run(*argv):
    try:
        return d.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def oracle(target, alpha_bar):
    return lambda xt, t: target.mixture(xt, alpha_bar[t[0]].item())[1].to(xt.dtype)


def gaussian(mean, std):
    """A target of one Gaussian."""
    target = d.Target("8gaussians", std, "cpu")
    target.centres = torch.tensor([mean], dtype=torch.float64)
    return target


# The method


@pytest.mark.parametrize("schedule", d.SCHEDULES)
@pytest.mark.parametrize("pred", d.PREDICTIONS)
def test_a_perfect_prediction_has_no_loss_and_gives_back_x0(pred, schedule):
    g = torch.Generator().manual_seed(0)
    ab, t = d.make_alpha_bar(schedule), torch.randint(0, 900, (50,), generator=g)
    x0, eps = torch.randn(2, 50, 2, generator=g, dtype=torch.float64)
    a = ab[t][:, None]
    out = {"eps": eps, "x0": x0, "v": a.sqrt() * eps - (1 - a).sqrt() * x0, "score": -eps / (1 - a).sqrt()}[pred]
    xt = d.add_noise(x0, eps, a)
    torch.testing.assert_close(d.to_x0(out, xt, a, pred), x0, rtol=0, atol=1e-9)
    assert d.loss_fn(lambda x, t: out, x0, eps, t, ab, pred).max() < 1e-20
    assert d.loss_fn(lambda x, t: out + 0.1, x0, eps, t, ab, pred).min() > 1e-8
    at = int(t[0])
    guess = d.guess(lambda x, t: out[:1], xt[:1], at, ab, pred)
    torch.testing.assert_close(torch.stack(guess), torch.stack([x0[:1], eps[:1]]), rtol=0, atol=1e-9)


def test_a_weighted_score_is_a_noise_prediction():
    """NCSN's weight, the variance of the noise, makes denoising score matching the loss of DDPM."""
    g = torch.Generator().manual_seed(0)
    ab, t = d.make_alpha_bar("linear"), torch.randint(0, 1000, (50,), generator=g)
    x0, eps, out = torch.randn(3, 50, 2, generator=g, dtype=torch.float64)
    score = -out / (1 - ab[t][:, None]).sqrt()
    torch.testing.assert_close(d.loss_fn(lambda x, t: score, x0, eps, t, ab, "score"),
                               d.loss_fn(lambda x, t: out, x0, eps, t, ab, "eps"))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("schedule", d.SCHEDULES)
def test_samplers_are_those_of_ddpm_images(schedule, sampler):
    """At all 1000 levels, of which fewer steps take others; with a guess within [-1, 1], where nothing is clipped."""
    ab = d.make_alpha_bar(schedule)
    noise = torch.randn(1001, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = (s.sample(lambda xt, t: (xt * 0.7 + t[:, None] / 999).sin(), iter(noise), ab, "x0", sampler, 1000)
            for s in (d, ddpm_images))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler, levels, order", [("ddim", (38, 112, 334), 1), ("heun", (38, 112, 334), 2),
                                                    ("dpmpp_2m", (38, 112, 334), 2)])
def test_order_of_the_solvers(sampler, levels, order):
    """Three times as many steps: a third or a ninth of the error, on a path that is known. Of a Gaussian of variance s^2
    all points move together: x is to the std sqrt(ab s^2 + 1 - ab) at the end what it was at the start."""
    target, ab = gaussian([0.0, 0.0], 0.5), d.make_alpha_bar("cosine")
    start = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    std = lambda t: (ab[t] * 0.25 + 1 - ab[t]).sqrt().item()
    errors = []
    for n in levels:
        states = []
        d.sample(oracle(target, ab), iter([start]), ab, "score", sampler, n, on_step=lambda t, xt, x0: states.append(xt))
        errors.append((states[-1] - start * std(0) / std(999)).norm().item())
    orders = [np.log(a / b) / np.log(3) for a, b in zip(errors, errors[1:])]
    assert all(abs(o - order) < 0.35 for o in orders), (errors, orders)


@pytest.mark.parametrize("sampler, steps, eta", [("ddpm", 250, 0), ("ddim", 100, 0), ("ddim", 250, 0.5), ("heun", 50, 0),
                                                 ("dpmpp_2m", 50, 0), ("langevin", 100, 0)])
@pytest.mark.parametrize("data", ["8gaussians", "moons"])
def test_every_sampler_reaches_the_target_with_the_true_score(data, sampler, steps, eta):
    target, ab = d.Target(data, 0.2, "cpu", 512), d.make_alpha_bar("cosine")
    x = d.sample(oracle(target, ab), d.noise(0, 1000, "cpu"), ab, "score", sampler, steps, eta).numpy()
    fresh = [target.points(np.random.default_rng(i), 1000) for i in range(4)]
    floor = max(d.energy(a, b) for a, b in itertools.combinations(fresh, 2))
    assert d.energy(x, fresh[0]) < 2 * floor


def test_the_likelihood_of_a_gaussian():
    """Of N(m, s^2) noised to t = 0, to 1e-3 nats, also far from the middle."""
    target, ab = gaussian([0.7, -0.4], 0.6), d.make_alpha_bar("cosine")
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.2
    got = d.log_likelihood(oracle(target, ab), x, ab, "score", 400)
    a = ab[0].item()
    normal = torch.distributions.Normal(a ** 0.5 * target.centres[0], (a * 0.36 + 1 - a) ** 0.5)
    torch.testing.assert_close(got, normal.log_prob(x).sum(1), rtol=0, atol=1e-3)


def test_the_likelihood_of_a_mixture():
    target, ab = d.Target("8gaussians", 0.5, "cpu", 512), d.make_alpha_bar("cosine")
    x = torch.from_numpy(target.points(np.random.default_rng(0), 200)).double()
    got = d.log_likelihood(oracle(target, ab), x, ab, "score", 400)
    torch.testing.assert_close(got, target.mixture(x, ab[0].item())[0], rtol=0, atol=0.02)


# Targets


@pytest.mark.parametrize("ab", [0.999, 0.5, 1e-3])
def test_true_density_and_score_are_those_of_torch(ab):
    target, n = d.Target("moons", 0.1, "cpu", 100), 100
    x = torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    part = torch.distributions.Independent(torch.distributions.Normal(ab ** 0.5 * target.centres,
                                                                      torch.tensor((ab * 0.01 + 1 - ab) ** 0.5)), 1)
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(n)), part)
    log_p = mixture.log_prob(x)
    score = torch.autograd.grad(log_p.sum(), x)[0]
    got = target.mixture(x.detach(), ab)
    torch.testing.assert_close(got[0], log_p.detach())
    torch.testing.assert_close(got[1], score)


@pytest.mark.parametrize("data", d.TARGETS)
def test_the_net_of_centres_is_the_target(data):
    """The closed form is that of the points that are drawn: their mean log density is the entropy of the mixture."""
    target = d.Target(data, 0.1, "cpu")
    a, b = target.points(np.random.default_rng(0), 4000), target.points(np.random.default_rng(1), 4000)
    assert abs(a.mean(0)).max() < 0.15 and abs(a.std() - 2) < 0.05 and a.dtype == np.float32
    rng = np.random.default_rng(2)
    net = target.centres.numpy()[rng.permutation(4096)[:4000]] + 0.1 * rng.standard_normal((4000, 2))
    assert d.energy(net, b) < 2 * d.energy(a, b) + 1e-3


def test_swiss_roll_is_scikit_learns():
    """The angles of make_swiss_roll(hole=True): one of eight of the nine fields of 3 x 3, uniform within."""
    u = np.random.default_rng(0).random((20_000, 2))
    x = d.shape("swiss_roll", u)
    angle = np.hypot(*x.T) / np.pi - 1.5
    share = np.histogram(angle, [0, 1, 2, 3])[0] / len(u)
    assert abs(share - np.array([3, 2, 3]) / 8).max() < 0.01
    assert scipy.stats.kstest(angle[angle < 1], "uniform").pvalue > 0.01
    assert abs(x[:, 0] - np.hypot(*x.T) * np.cos(np.hypot(*x.T))).max() < 1e-9


@pytest.mark.parametrize("data", [*d.TARGETS, "wide.png"])
def test_the_std_is_two(data):
    ink = np.full((60, 200), 255, np.uint8)
    ink[10:20, 5:15] = ink[40:50, 180:195] = 0
    Image.fromarray(ink).save("wide.png")
    x = d.Target(data, 0, "cpu").points(np.random.default_rng(0), 4000)
    assert abs(x.mean(0)).max() < 0.15 and abs((x - x.mean(0)).std() - 2) < 0.03


def test_a_picture_as_target():
    ink = np.full((40, 60), 255, np.uint8)
    ink[5:10, 30:50] = 0    # top right
    ink[30:35, 5:15] = 0    # bottom left, half as much
    Image.fromarray(ink).save("two.png")
    target = d.Target("two.png", 0.01, "cpu")
    x = target.points(np.random.default_rng(0), 3000)
    right = x[:, 0] > -0.5
    assert abs(right.mean() - 2 / 3) < 0.03 and x[right, 1].min() > x[~right, 1].max()


# Measures


def test_measures_against_brute_force():
    a, b = np.random.default_rng(0).standard_normal((2, 6, 2))
    cost = ((a[:, None] - b) ** 2).sum(2)
    best = min(cost[range(6), p].mean() for p in itertools.permutations(range(6)))
    assert d.wasserstein(a, b) == pytest.approx(best ** 0.5)
    assert d.chamfer(a, b) == pytest.approx(cost.min(0).sum() + cost.min(1).sum())
    flat = a * [1, 0], b * [1, 0]
    assert d.energy(*flat) == pytest.approx(scipy.stats.energy_distance(a[:, 0], b[:, 0]) ** 2)
    assert d.chamfer(a, a) == d.wasserstein(a, a) == 0 and abs(d.energy(a, a)) < 1e-12


# The program


def test_noise_does_not_depend_on_how_many_are_asked_for():
    a, b = d.noise(3, 10, "cpu"), d.noise(3, 4, "cpu")
    for _ in range(3):
        assert torch.equal(next(a)[:4], next(b))
    assert not torch.equal(next(a), next(d.noise(4, 10, "cpu")))


def weights(path):
    state = torch.load(path, weights_only=True)
    flat = {(k, name): v for k in ("model", "ema") for name, v in state[k].items()}
    return state["step"], flat | {("opt", i, k): v for i, s in state["opt"]["state"].items() for k, v in s.items()}


def test_resume_is_exact(quick, no_pictures, monkeypatch):
    """6 steps; 6 that SIGTERM cuts after the third; 3 steps, and then 3 more: the same weights, bit for bit."""
    assert run(*TINY, "--out", "whole") == 0
    real, calls = d.loss_fn, []

    def cut(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    with monkeypatch.context() as patch:
        patch.setattr(d, "loss_fn", cut)
        assert run(*TINY, "--out", "cut") == 143
    assert weights("cut/ckpt.pt")[0] == 3
    assert run("--resume", "cut/ckpt.pt") == 0
    assert run(*TINY, "--out", "half", "--steps", 3) == 0 and run("--resume", "half/ckpt.pt", "--steps", 6) == 0
    step, whole = weights("whole/ckpt.pt")
    for out in ("cut", "half"):
        assert weights(f"{out}/ckpt.pt")[0] == step == 6
        assert [k for k, v in weights(f"{out}/ckpt.pt")[1].items() if not torch.equal(v, whole[k])] == []
        a, b = (d.load_safetensors(f"{o}/model.safetensors")[0] for o in ("whole", out))  # the EMA, as it was
        assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.mark.parametrize("pred", d.PREDICTIONS)
def test_it_learns(pred):
    """A few hundred steps take the samples most of the way from the noise to the target."""
    args = d.parse_args(["--data", "8gaussians", "--noise", "0.3", "--pred", pred, "--schedule", "linear"])
    target, ab = d.Target(args.data, args.noise, "cpu"), d.make_alpha_bar(args.schedule)
    torch.manual_seed(0)
    model, test = d.MLP(64, 3, 32), target.points(np.random.default_rng(0), 1000)
    pool, opt = torch.from_numpy(target.points(np.random.default_rng(1), 20_000)), None
    opt = torch.optim.AdamW(model.parameters(), 3e-3, fused=True)
    for _ in range(600):
        x0, t = pool[torch.randint(20_000, (256,))], torch.randint(d.T, (256,))
        d.loss_fn(model, x0, torch.randn(256, 2), t, ab, pred).mean().backward()
        opt.step()
        opt.zero_grad()
    x = d.draw(model, pred, 1000, args, ab, sampler="ddim", steps=50).numpy()
    before = d.energy(np.random.default_rng(2).standard_normal((1000, 2)), test)
    assert d.energy(x, test) < 0.35 * before


def test_the_whole_path(run_script, tmp_path):
    done = run_script("ddpm_2d.py", *TINY, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    out = tmp_path / "out/ddpm_2d"
    assert {p.name for p in out.iterdir()} == {"forward.png", "reverse.gif", "field.gif", "density.png", "training.gif",
                                               "log.jsonl", "ckpt.pt", "model.safetensors"}
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert last["measures"].keys() == last["floor"].keys() == {"chamfer", "wasserstein", "energy", "nll"}
    assert all(np.isfinite(v) for v in last["measures"].values())
    assert run("--sample", 50, "--ckpt", out / "model.safetensors", "--out", "again") == 0
    many = np.load("again/points.npy")
    assert run("--sample", 9, "--ckpt", out / "model.safetensors", "--out", "again") == 0
    np.testing.assert_allclose(np.load("again/points.npy"), many[:9], atol=1e-5)
    assert many.shape == (50, 2) and many.dtype == np.float32


def test_eta_for_a_model_of_ddim(quick, no_pictures):
    assert run(*TINY, "--sampler", "ddim", "--steps", 1) == 0
    assert run("--sample", 5, "--ckpt", "out/ddpm_2d/model.safetensors", "--eta", 0.5) == 0


def test_oracle(quick, capsys):
    assert run("--data", "circles", "--oracle", "--sample_steps", "20") == 0
    assert "floor" in capsys.readouterr().out and os.path.exists("out/ddpm_2d/reverse.gif")


# Wrong input


def test_wrong_input(quick, no_pictures, capsys, monkeypatch):
    Image.new("L", (9, 9), 255).save("white.png")
    open("text.txt", "w").write("hello")
    assert run(*TINY, "--out", "ok", "--steps", "1") == 0
    Image.fromarray(np.zeros((9, 9), np.uint8)).save("black.png")
    torch.save({"script": "cfm_2d.py", **dict.fromkeys("args step model ema opt key".split(), 0)}, "other.pt")
    capsys.readouterr()
    cases = {
        "--data nothing": "nothing swiss_roll", "--data white.png": "white.png dark", "--data text.txt": "text.txt picture",
        "--steps 0": "--steps", "--lr nan": "--lr", "--noise -1": "--noise", "--sampler magic": "magic",
        "--sample_steps 1001": "1000", "--features -1": "--features", "--sample 5": "--ckpt", "--ckpt a": "--sample",
        "--resume nowhere.pt": "nowhere.pt", "--resume text.txt": "text.txt", "--resume other.pt": "cfm_2d.py",
        "--resume ok/ckpt.pt --width 32": "--width 32 16", "--sample 5 --ckpt text.txt": "text.txt",
        "--sample 5 --ckpt ok/model.safetensors --pred eps": "--pred eps v", "--eta 0.5": "--eta ddim",
        "--sample 5 --ckpt ok/model.safetensors --data circles": "--data circles",
        "--sample 5 --ckpt ok/model.safetensors --eta 0.5": "--eta ddim", "--resume ok/ckpt.pt --eta 0.5": "--eta ddim",
        "--oracle --resume ok/ckpt.pt": "--oracle", "--oracle --sample 5 --ckpt ok/model.safetensors": "--oracle",
        "--sample 5 --ckpt ok/model.safetensors --resume ok/ckpt.pt": "--resume",
        "--resume ok/ckpt.pt --steps 0": "--steps", "--device gpu": "--device gpu",
    }
    for argv, words in cases.items():
        status, err = run(*argv.split()), capsys.readouterr().err
        sentence = err.strip()
        assert status == 2 and sentence.startswith("ddpm_2d.py: ") and "\n" not in sentence, (argv, err)
        assert [w for w in words.split() if w not in sentence] == [], (argv, sentence)
        assert "Traceback" not in err
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        assert run(*TINY) == 2 and "torchrun" in capsys.readouterr().err
    assert run(*TINY, "--lr", "1e9", "--steps", "500") == 1 and "--lr" in capsys.readouterr().err


def test_too_much_memory_is_a_sentence(quick, no_pictures, capsys, monkeypatch):
    monkeypatch.setattr(d, "update_ema", lambda *args: torch.empty(1 << 60))
    assert run(*TINY) == 1
    err = capsys.readouterr().err.strip()
    assert err.startswith("ddpm_2d.py: out of memory") and "\n" not in err
    monkeypatch.setattr(d, "update_ema", lambda *args: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):  # an error of another kind is not taken for that
        run(*TINY)


def test_a_new_run_keeps_the_old_model(quick, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(d, "show", lambda *args: drawn.append(1))
    assert run(*TINY, "--steps", 1) == 0
    before = open("out/ddpm_2d/model.safetensors", "rb").read()
    assert run(*TINY, "--steps", 2) == 0 and "is now model.safetensors.old" in capsys.readouterr().out
    assert open("out/ddpm_2d/model.safetensors.old", "rb").read() == before
    log = [json.loads(line)["step"] for line in open("out/ddpm_2d/log.jsonl")]
    assert run("--resume", "out/ddpm_2d/ckpt.pt", "--steps", 4) == 0 and ".old" not in capsys.readouterr().out
    resumed = [json.loads(line)["step"] for line in open("out/ddpm_2d/log.jsonl")]
    assert resumed[:len(log)] == log and resumed == sorted(resumed) and len(resumed) > len(log)


def test_training_gif_shows_a_whole_run(quick):
    assert run(*TINY, "--steps", 9) == 0
    whole = Image.open("out/ddpm_2d/training.gif").n_frames
    assert run("--resume", "out/ddpm_2d/ckpt.pt", "--steps", 10) == 0
    assert Image.open("out/ddpm_2d/training.gif").n_frames == whole > 3


def test_a_drawing_on_a_transparent_sheet():
    drawing = np.zeros((40, 40, 4), np.uint8)
    drawing[10:14, 5:35, 3] = 255  # one black stroke
    Image.fromarray(drawing).save("stroke.png")
    x = d.Target("stroke.png", 0.0, "cpu").points(np.random.default_rng(0), 500)
    assert x[:, 0].std() > 5 * x[:, 1].std()


def test_two_files_mixed_up_and_a_folder_renamed(quick, no_pictures, capsys):
    assert run(*TINY, "--out", "old", "--steps", "2") == 0
    os.rename("old", "new")
    assert run("--sample", 5, "--ckpt", "new/ckpt.pt") == 2 and "--resume" in capsys.readouterr().err
    assert run("--resume", "new/model.safetensors") == 2 and "ckpt.pt" in capsys.readouterr().err
    assert run("--resume", "new/ckpt.pt", "--steps", 4) == 0
    assert weights("new/ckpt.pt")[0] == 4 and not os.path.exists("old")


def test_out_is_a_file(capsys):
    open("file", "w").close()
    assert run(*TINY, "--out", "file") == 2 and "file" in capsys.readouterr().err
