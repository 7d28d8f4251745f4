"""cfm_2d.py: the method against torchcfm, flow_matching, POT, SciPy, torchdiffeq, diffusers and closed forms; the program."""
import itertools
import json
import os
import signal

import numpy as np
import ot
import pytest
import scipy.integrate
import scipy.linalg
import torch
import torchdiffeq
from diffusers import FlowMatchEulerDiscreteScheduler
from flow_matching.path import CondOTProbPath
from PIL import Image
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher, SchrodingerBridgeConditionalFlowMatcher

import cfm_2d as c
import ddpm_2d

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
    """Pictures and measures of few points, few pairs."""
    monkeypatch.setattr(c, "N", 32)
    monkeypatch.setattr(c, "POOL", 2048)
    monkeypatch.setattr(c, "grid", lambda n, grid=c.grid: grid(4) if n < 96 else grid(n))
    monkeypatch.setattr(c, "log_likelihood", lambda model, x, *a: torch.zeros(len(x)))


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(c, "show", lambda *args: None)


def run(*argv):
    try:
        return c.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rand(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The method. Time runs the other way in torchcfm and flow_matching: their t is 1 - t here, and their velocity -v.


def test_path_is_that_of_torchcfm_and_flow_matching():
    x0, x1 = randn(2, 50, 2)
    t = rand(50)
    xt, v = c.path(x0, x1, t[:, None])
    _, theirs, u = ConditionalFlowMatcher(0.0).sample_location_and_conditional_flow(x1, x0, 1 - t)
    torch.testing.assert_close((xt, v), (theirs, -u), rtol=0, atol=1e-12)
    other = CondOTProbPath().sample(t=1 - t, x_0=x1, x_1=x0)
    torch.testing.assert_close((xt, v), (other.x_t, -other.dx_t), rtol=0, atol=1e-12)


def test_the_ends_of_the_path():
    """torch.rand does give a 0 now and then: the line is defined there."""
    x0, x1 = randn(2, 5, 2)
    for t, x in ((0.0, x0), (1.0, x1)):
        xt, v = c.path(x0, x1, torch.full((5, 1), t))
        assert torch.equal(xt, x) and torch.equal(v, x1 - x0)


def test_bridge_path_is_that_of_torchcfm():
    x0, x1, z = randn(3, 50, 2)
    t, sigma = 0.1 + 0.8 * rand(50), 0.7
    xt, v = c.path(x0, x1, t[:, None], sigma, z)
    peer = SchrodingerBridgeConditionalFlowMatcher(sigma)
    theirs = peer.sample_xt(x1, x0, 1 - t, z)
    torch.testing.assert_close(xt, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(v, -peer.compute_conditional_flow(x1, x0, 1 - t, theirs), rtol=0, atol=1e-6)  # it adds 1e-8


def test_a_perfect_velocity_has_no_loss():
    x0, x1, z = randn(3, 50, 2)
    t = rand(50)
    v = c.path(x0, x1, t[:, None], 0.3, z)[1]
    assert c.loss_fn(lambda xt, t: v, x0, x1, t, 0.3, z).max() == 0
    assert c.loss_fn(lambda xt, t: v + 0.1, x0, x1, t, 0.3, z).min() > 1e-3


def test_ot_against_brute_force():
    x0, x1 = np.random.default_rng(0).standard_normal((2, 6, 2))
    best = min(itertools.permutations(range(6)), key=lambda p: ((x0 - x1[list(p)]) ** 2).sum())
    assert (c.couple(x0, x1, "ot", None, 0) == x1[list(best)]).all()


def test_ot_is_pots():
    x0, x1 = np.random.default_rng(0).standard_normal((2, 128, 2)) + [[[0, 0]], [[3, 1]]]
    mine = ((x0 - c.couple(x0, x1, "ot", None, 0)) ** 2).sum(1).mean()
    assert mine == pytest.approx(ot.emd2([], [], ot.dist(x0, x1)), rel=1e-12)


def test_sinkhorn_draws_from_pots_plan():
    x0, x1 = np.random.default_rng(0).standard_normal((2, 5, 2))
    plan = ot.sinkhorn([], [], ot.dist(x0, x1), 2 * 1.0 ** 2, stopThr=1e-12) * 5
    drawn = np.zeros((5, 5))
    for seed in range(4000):
        partner = c.couple(x0, x1, "sinkhorn", 1.0, seed)
        drawn += (partner[:, None] == x1).all(2)
    assert abs(drawn / 4000 - plan).max() < 0.03 and plan.max() < 0.9  # three standard errors are 0.024


def test_sinkhorn_says_when_sigma_is_too_small():
    x0, x1 = np.random.default_rng(0).standard_normal((2, 64, 2))
    with pytest.raises(c.Stop, match="--sigma 0.001"):
        c.couple(x0, x1, "sinkhorn", 0.001, 0)


# Solvers


def test_dopri5_is_scipys():
    *stages, step = c.RUNGE_KUTTA["dopri5"]
    rk = scipy.integrate.RK45
    for row, a, node in zip(stages, rk.A[1:], rk.C[1:]):
        np.testing.assert_allclose(row, a[:len(row)], atol=1e-14)
        assert sum(row) == pytest.approx(node)
    np.testing.assert_allclose(step, rk.B, atol=1e-14)
    np.testing.assert_allclose(abs(np.array(c.DOPRI5_ERROR)), abs(rk.E), atol=1e-14)
    assert (np.sign(c.DOPRI5_ERROR) == -np.sign(rk.E)).all() or (np.sign(c.DOPRI5_ERROR) == np.sign(rk.E)).all()


@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_order_of_the_solvers(solver, order):
    """dx/dt = cos(3t) A x has the solution exp(A sin(3t) / 3) x: half the step, 2^-order of the error."""
    matrix = torch.tensor([[0.3, -1.0], [1.2, -0.2]], dtype=torch.float64)
    x1, errors = randn(20, 2), []
    exact = x1 @ torch.linalg.matrix_exp(-matrix * np.sin(3) / 3).T
    for n in (40, 80, 160):
        got, nfe = c.solve(lambda x, t: np.cos(3 * t) * x @ matrix.T, x1, np.linspace(1, 0, n + 1).tolist(), solver, None)
        errors.append((got - exact).norm().item())
        assert nfe == n * {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}[solver]
    for a, b in zip(errors, errors[1:]):
        assert abs(np.log2(a / b) - order) < 0.15, errors


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-7])
def test_dopri5_follows_its_tolerance_in_no_more_calls_than_torchdiffeq(tol):
    target = c.Target("moons", 0.3, "cpu", 256)
    velocity, calls = c.true_velocity(target), []
    x1 = randn(200, 2)

    def counted(t, x):
        calls.append(1)
        return velocity(x, torch.full((len(x),), t.item(), dtype=x.dtype))
    span = torch.tensor([0.999, 0.01], dtype=torch.float64)  # at the very ends this velocity has a kink
    exact = torchdiffeq.odeint(counted, x1, span, rtol=1e-11, atol=1e-11)[1]
    calls.clear()
    theirs = torchdiffeq.odeint(counted, x1, span, rtol=tol, atol=tol)[1]
    got, nfe = c.sample(velocity, x1, "dopri5", span.tolist(), tol)
    error, their_error = ((x - exact).square().mean().sqrt() for x in (got, theirs))
    assert error < 2 * their_error and error < 30 * tol, (error, their_error)
    assert nfe < 1.2 * len(calls), (nfe, len(calls))  # often fewer: torchdiffeq never shortens a step after a good one


def test_dopri5_takes_a_tiny_last_step():
    """What is left at the end may be next to nothing, after a first step of a 20th of the way."""
    x, nfe = c.solve(lambda x, t: -x * 0, torch.ones(1, 2), [0.0, 1 + 1e-9], "dopri5", 1e-4)
    assert (x == 1).all()
    x, nfe = c.solve(lambda x, t: x, torch.ones(1, 2), [0.0, 1e-9], "dopri5", 1e-4)
    assert nfe > 6 and x.allclose(torch.ones(1, 2))


def test_dopri5_gives_up_with_a_sentence():
    with pytest.raises(c.Stop, match="dopri5"):
        c.solve(lambda x, t: x * float("nan"), randn(3, 2), [1.0, 0.0], "dopri5", 1e-4)
    with pytest.raises(c.Stop, match="dopri5"):
        c.solve(lambda x, t: x ** 2 - 9, torch.full((3, 2), 9.0), [0.0, 1.0], "dopri5", 1e-4)  # runs to infinity


def test_euler_is_that_of_diffusers():
    """FLUX and SD3 are sampled with this scheduler: sigma is our t."""
    scheduler, times = FlowMatchEulerDiscreteScheduler(), [1.0, 0.7, 0.3, 0.1]
    scheduler.set_timesteps(sigmas=times)
    model = lambda x, t: (x + t[:, None]).sin()
    x = randn(20, 2)
    got, nfe = c.sample(model, x, "euler", [*times, 0.0])
    for t, s in zip(scheduler.timesteps, times):
        x = scheduler.step(model(x, torch.full((20,), s, dtype=torch.float64)), t, x).prev_sample.double()
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)  # the scheduler calculates in float32
    assert nfe == 4


# Truth in closed form


def test_true_velocity_of_a_gaussian():
    """x0 ~ N(m, s^2) and eps are jointly normal with xt, so the mean of eps - x0 given xt is linear in xt."""
    target = c.Target("8gaussians", 0.6, "cpu")
    target.centres = torch.tensor([[0.7, -0.4]], dtype=torch.float64)
    for s in (0.05, 0.4, 0.95):
        xt, m, t = randn(30, 2), target.centres, torch.full((30,), s, dtype=torch.float64)
        gain = (s - (1 - s) * 0.36) / ((1 - s) ** 2 * 0.36 + s ** 2)
        torch.testing.assert_close(c.true_velocity(target)(xt, t), -m + gain * (xt - (1 - s) * m), rtol=0, atol=1e-9)


def test_true_velocity_is_the_mean_of_the_pairs():
    """Of a mixture: by counting pairs near a point."""
    target, rng = c.Target("moons", 0.2, "cpu"), np.random.default_rng(0)
    x0, x1 = (torch.from_numpy(s.points(rng, 2_000_000)) for s in (target, c.Normal()))
    xt, v = c.path(x0, x1, 0.5)
    at = torch.tensor([[0.5, 0.3], [-1.0, 0.5], [1.5, -0.5]])
    true = c.true_velocity(target)(at, torch.full((3,), 0.5))
    for i in range(3):
        near = (xt - at[i]).norm(dim=1) < 0.06
        assert (v[near].mean(0) - true[i]).abs().max() < 5 * (v[near].std(0) / near.sum() ** 0.5).max() + 0.02


def test_likelihoods():
    """Of one Gaussian to 1e-3 nats, whatever the source; of a mixture."""
    target = c.Target("8gaussians", 0.6, "cpu")
    target.centres = torch.tensor([[0.7, -0.4]], dtype=torch.float64)
    x = randn(50, 2) * 1.2
    normal = torch.distributions.Normal(target.centres[0], 0.6)
    got = c.log_likelihood(c.true_velocity(target), x, c.Normal(), 200)
    torch.testing.assert_close(got, normal.log_prob(x).sum(1), rtol=0, atol=1e-3)
    target = c.Target("8gaussians", 0.5, "cpu", 512)
    x = torch.from_numpy(target.points(np.random.default_rng(0), 200)).double()
    got = c.log_likelihood(c.true_velocity(target), x, c.Normal(), 200)
    torch.testing.assert_close(got, target.mixture(x, 1.0)[0], rtol=0, atol=0.02)
    shift = lambda xt, t: torch.tensor([2.0, -1.0], dtype=torch.float64) + 0 * xt  # a source that is the target, moved
    moved = c.Target("8gaussians", 0.5, "cpu", 512)
    moved.centres = target.centres + torch.tensor([2.0, -1.0])
    torch.testing.assert_close(c.log_likelihood(shift, x, moved, 5), target.mixture(x, 1.0)[0], rtol=0, atol=1e-9)


def mean_velocity(xt, t, r, s=0.5):
    """From t to r, where x0 ~ N(0, s^2) is to become N(0, 1): all points move together, as the std does."""
    std = lambda t: ((1 - t) ** 2 * s ** 2 + t ** 2).sqrt()[:, None]
    apart = (t - r).abs()[:, None] > 1e-6
    now = ((t - (1 - t) * s ** 2)[:, None] / std(t) ** 2) * xt
    return torch.where(apart, (xt - xt * std(r) / std(t)) / torch.where(apart, (t - r)[:, None], 1), now)


def test_the_mean_velocity_has_no_meanflow_loss():
    t, r = rand(2, 50).sort(0, descending=True)[0]
    model = lambda xt, t, r=None: mean_velocity(xt, t, t if r is None else r)
    xt = randn(50, 2)
    v = model(xt, t)
    x0, x1 = xt - t[:, None] * v, xt + (1 - t[:, None]) * v  # pairs that move as the mean of all pairs does
    assert c.meanflow_loss_fn(model, x0, x1, t, r).max() < 1e-18
    assert c.meanflow_loss_fn(lambda *a: 1.1 * model(*a), x0, x1, t, r).max() > 1e-3
    one, nfe = c.sample(model, randn(50, 2), "euler", 1, meanflow=True)
    assert nfe == 1
    torch.testing.assert_close(one, 0.5 * randn(50, 2))
    torch.testing.assert_close(c.sample(model, randn(50, 2), "euler", 3, meanflow=True)[0], one)


# The bridge


@pytest.mark.parametrize("schedule", c.SCHEDULES)
@pytest.mark.parametrize("pred", c.PREDICTIONS)
def test_a_step_of_ddim_is_a_step_of_euler(schedule, pred):
    ab = c.make_alpha_bar(schedule)
    model = lambda xt, t: (xt * 0.7 + t[:, None].double() / 999).sin()
    flow = c.DDPMFlow(model, ab, pred)
    for t, s in [(999, 980), (700, 300), (300, 299), (40, 3), (1, 0)]:
        length = lambda t: (ab[t].sqrt() + (1 - ab[t]).sqrt()).item()
        xt = randn(20, 2)
        states = []
        ddpm_2d.sample(model, iter([xt]), ab, pred, "ddim", 1000, on_step=lambda *a: states.append(a))  # its first step
        ddim = c.ddim(model, xt, ab, pred, [t, s])
        if t == 999:
            torch.testing.assert_close(c.ddim(model, xt, ab, pred, [999, 998]), states[1][1], rtol=1e-12, atol=1e-12)
        times = [c.flow_time(ab[i].item()) for i in (t, s)]
        euler, _ = c.sample(flow, xt / length(t), "euler", times)
        assert ((euler * length(s) - ddim).abs() / (1 + ddim.abs())).max() < 1e-10


def test_a_perfect_diffusion_is_the_true_velocity():
    """Tweedie's formula in one coordinate system, the flow's closed form in the other."""
    target, ab = c.Target("moons", 0.2, "cpu", 256), c.make_alpha_bar("cosine")
    times = c.flow_time(ab)
    oracle = lambda xt, t: target.mixture(xt, ab[int(t[0])].item())[1]
    flow, true = c.DDPMFlow(oracle, ab, "score"), c.true_velocity(target)
    for level in (30, 400, 900):
        xt, t = randn(30, 2), torch.full((30,), times[level].item(), dtype=torch.float64)
        torch.testing.assert_close(flow(xt, t), true(xt, t), rtol=0, atol=1e-8)


# The program


def test_points_do_not_depend_on_how_many_are_asked_for():
    for source in (c.Normal(), c.Target("moons", 0.1, "cpu")):
        a, b = (source.points(np.random.default_rng(0), n) for n in (10, 4))
        assert (a[:4] == b).all() and a.dtype == np.float32


@pytest.mark.parametrize("coupling", c.COUPLINGS)
def test_pairs(coupling, quick, capsys):
    """The coupling moves partners about and leaves both distributions as they are; ot makes them the nearest."""
    args = c.parse_args(["--coupling", coupling])
    args.coupling_size, args.sigma = 128, 1.0
    target, source = c.Target("moons", 0.1, "cpu"), c.Normal()
    x0, x1 = c.make_pairs(target, source, args, None, "cpu")
    rng = np.random.default_rng((c.BATCH, 0))
    a, b = target.points(rng, c.POOL), source.points(rng, c.POOL)
    assert np.array_equal(x0, a)
    if coupling != "sinkhorn":
        assert {tuple(x) for x in x1.numpy()} == {tuple(x) for x in b}
    assert c.energy(x1.numpy(), b) < 2e-3
    cost = {k: ((x0 - torch.from_numpy(x)) ** 2).sum(1).mean() for k, x in (("now", x1.numpy()), ("before", b))}
    assert cost["now"] == cost["before"] if coupling == "independent" else cost["now"] < 0.6 * cost["before"]
    again = c.make_pairs(target, source, args, None, "cpu")
    assert torch.equal(x1, again[1])


def weights(path):
    state = torch.load(path, weights_only=True)
    flat = {(k, name): v for k in ("model", "ema") for name, v in state[k].items()}
    return state["step"], flat | {("opt", i, k): v for i, s in state["opt"]["state"].items() for k, v in s.items()}


@pytest.mark.parametrize("method", [[], ["--coupling", "sinkhorn", "--sigma", "1"], ["--meanflow"],
                                    ["--source", "moons", "--coupling", "ot"]])
def test_resume_is_exact(method, quick, no_pictures, monkeypatch):
    """6 steps; 6 that SIGTERM cuts after the third; 3 steps, and then 3 more: the same weights, bit for bit."""
    assert run(*TINY, *method, "--out", "whole") == 0
    name = "meanflow_loss_fn" if "--meanflow" in method else "loss_fn"
    real, calls = getattr(c, name), []

    def cut(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    with monkeypatch.context() as patch:
        patch.setattr(c, name, cut)
        assert run(*TINY, *method, "--out", "cut") == 143
    assert weights("cut/ckpt.pt")[0] == 3
    assert run("--resume", "cut/ckpt.pt") == 0
    assert run(*TINY, *method, "--out", "half", "--steps", 3) == 0
    assert run("--resume", "half/ckpt.pt", "--steps", 6) == 0
    step, whole = weights("whole/ckpt.pt")
    for out in ("cut", "half"):
        assert weights(f"{out}/ckpt.pt")[0] == step == 6
        assert [k for k, v in weights(f"{out}/ckpt.pt")[1].items() if not torch.equal(v, whole[k])] == []
        a, b = (c.load_safetensors(f"{o}/model.safetensors")[0] for o in ("whole", out))  # the EMA, as it was
        assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.mark.parametrize("method", [[], ["--coupling", "ot"], ["--coupling", "sinkhorn"], ["--meanflow"]])
def test_it_learns(method, quick, no_pictures, capsys):
    """Some hundred steps take the samples most of the way from the noise to the target, MeanFlow in one step."""
    argv = "--data 8gaussians --noise 0.3 --steps 600 --width 64 --features 32 --batch_size 256 --ema_decay 0.99".split()
    assert run(*argv, *method) == 0
    args = c.parse_args([*argv, *method])
    target, source, model = c.Target("8gaussians", 0.3, "cpu"), c.Normal(), c.load_model("out/cfm_2d/model.safetensors", args, "cpu")
    test, x1 = target.points(np.random.default_rng(0), 1000), source.points(np.random.default_rng((c.IMAGE, 0)), 1000)
    x, nfe = c.draw(model, source, 1000, args, "cpu", steps=1 if "--meanflow" in method else 20)
    assert nfe == (1 if "--meanflow" in method else 40)
    assert c.energy(x.numpy(), test) < 0.25 * c.energy(x1, test)


def test_reflow_straightens(quick, no_pictures, capsys, monkeypatch):
    monkeypatch.setattr(c, "N", 500)
    argv = "--data 8gaussians --noise 0.3 --steps 500 --width 64 --features 32 --batch_size 256 --ema_decay 0.99".split()
    assert run(*argv, "--out", "curved") == 0
    assert run("--reflow", "curved/model.safetensors", "--steps", 300, "--out", "straight") == 0
    last = [json.loads(open(f"{out}/log.jsonl").read().splitlines()[-1]) for out in ("curved", "straight")]
    assert last[1]["straightness"] < 0.1 * last[0]["straightness"]
    energy = [r["by_nfe"]["euler 1"][1] for r in last]
    assert energy[1] < 0.2 * energy[0]
    before = open("curved/model.safetensors", "rb").read()
    assert run("--reflow", "curved/model.safetensors", "--out", "curved") == 2 and "--out" in capsys.readouterr().err
    assert open("curved/model.safetensors", "rb").read() == before


def test_the_whole_path(run_script, tmp_path):
    done = run_script("cfm_2d.py", *TINY, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    out = tmp_path / "out/cfm_2d"
    assert {p.name for p in out.iterdir()} == {"forward.png", "reverse.gif", "field.gif", "density.png", "training.gif",
                                               "log.jsonl", "ckpt.pt", "model.safetensors"}
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert last["measures"].keys() == last["floor"].keys() == {"chamfer", "wasserstein", "energy", "nll"}
    assert all(np.isfinite(v) for v in last["measures"].values()) and len(last["velocity_error"]) == 7
    assert run("--sample", 50, "--ckpt", out / "model.safetensors", "--out", "again") == 0
    many = np.load("again/points.npy")
    assert run("--sample", 9, "--ckpt", out / "model.safetensors", "--out", "again") == 0
    np.testing.assert_allclose(np.load("again/points.npy"), many[:9], atol=1e-5)
    assert many.shape == (50, 2) and many.dtype == np.float32


def test_from_ddpm(quick, monkeypatch, capsys):
    monkeypatch.setattr(ddpm_2d, "N", 32)
    monkeypatch.setattr(ddpm_2d, "show", lambda *args: None)
    assert ddpm_2d.main([*TINY, "--data", "moons", "--out", "ddpm"]) == 0
    assert run("--from_ddpm", "ddpm/model.safetensors") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert float(said.split("coordinate ")[1].split(";")[0]) < 1e-9
    assert Image.open("out/cfm_2d/bridge.png").size == (2 * c.SIDE, c.SIDE)
    assert run("--from_ddpm", "ddpm/model.safetensors", "--data", "circles") == 2
    assert "--data circles" in capsys.readouterr().err


def test_oracle(quick, capsys):
    assert run("--data", "circles", "--oracle") == 0
    assert "floor" in capsys.readouterr().out and os.path.exists("out/cfm_2d/reverse.gif")


def test_a_source_without_noise(quick, capsys):
    """No density then: no likelihood, and the rest as ever."""
    assert run(*TINY, "--source", "circles", "--noise", "0") == 0
    assert "nll" not in capsys.readouterr().out and not os.path.exists("out/cfm_2d/density.png")


# Wrong input


def test_wrong_input(quick, no_pictures, capsys, monkeypatch):
    Image.new("L", (9, 9), 255).save("white.png")
    open("text.txt", "w").write("hello")
    assert run(*TINY, "--out", "ok", "--steps", "1") == 0
    torch.save({"script": "ddpm_2d.py", **dict.fromkeys("args step model ema opt key".split(), 0)}, "other.pt")
    capsys.readouterr()
    cases = {
        "--data nothing": "nothing swiss_roll", "--data white.png": "white.png dark", "--data text.txt": "text.txt picture",
        "--source nothing": "nothing swiss_roll", "--source white.png": "white.png dark",
        "--steps 0": "--steps", "--lr nan": "--lr", "--noise -1": "--noise", "--sampler magic": "magic", "--tol 0": "--tol",
        "--coupling_size 100": "--coupling_size", "--coupling sinkhorn --meanflow": "sinkhorn --meanflow",
        "--coupling sinkhorn --sigma 0.001": "--sigma", "--meanflow --sampler rk4": "--sampler", "--oracle --source moons": "--oracle", "--oracle --coupling ot": "--oracle",
        "--from_ddpm a --coupling ot": "--from_ddpm", "--reflow a --coupling ot": "--reflow --coupling",
        "--oracle --resume a": "--oracle", "--from_ddpm a --resume a": "--from_ddpm",
        "--sample 5 --ckpt ok/model.safetensors --reflow ok/model.safetensors": "--reflow",
        "--oracle --from_ddpm a": "exclude", "--sample 5 --ckpt a --oracle": "exclude",
        "--features -1": "--features", "--sample 5": "--ckpt", "--ckpt a": "--sample",
        "--resume nowhere.pt": "nowhere.pt", "--resume text.txt": "text.txt", "--resume other.pt": "ddpm_2d.py",
        "--resume ok/ckpt.pt --width 32": "--width 32 16", "--sample 5 --ckpt text.txt": "text.txt",
        "--sample 5 --ckpt ok/model.safetensors --source moons": "--source moons gaussian",
        "--sample 5 --ckpt ok/model.safetensors --resume ok/ckpt.pt": "--resume",
        "--resume ok/ckpt.pt --steps 0": "--steps", "--device gpu": "--device gpu",
        "--reflow nowhere": "nowhere", "--reflow text.txt": "text.txt", "--from_ddpm nowhere": "nowhere",
        "--from_ddpm ok/model.safetensors": "cfm_2d.py", "--from_ddpm ok/model.safetensors --reflow ok": "--from_ddpm",
    }
    for argv, words in cases.items():
        status, err = run(*argv.split()), capsys.readouterr().err
        sentence = err.strip()
        assert status == 2 and sentence.startswith("cfm_2d.py: ") and "\n" not in sentence, (argv, err)
        assert [w for w in words.split() if w not in sentence] == [], (argv, sentence)
        assert "Traceback" not in err
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        assert run(*TINY) == 2 and "torchrun" in capsys.readouterr().err
    assert run(*TINY, "--lr", "1e9", "--steps", "500") == 1 and "--lr" in capsys.readouterr().err


def test_too_much_memory_is_a_sentence(quick, no_pictures, capsys, monkeypatch):
    monkeypatch.setattr(c, "update_ema", lambda *args: torch.empty(1 << 60))
    assert run(*TINY) == 1
    err = capsys.readouterr().err.strip()
    assert err.startswith("cfm_2d.py: out of memory") and "\n" not in err
    monkeypatch.setattr(c, "update_ema", lambda *args: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):  # an error of another kind is not taken for that
        run(*TINY)


def test_a_new_run_keeps_the_old_model(quick, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(c, "show", lambda *args: drawn.append(1))
    assert run(*TINY, "--steps", 1) == 0
    before = open("out/cfm_2d/model.safetensors", "rb").read()
    assert run(*TINY, "--steps", 2) == 0 and "is now model.safetensors.old" in capsys.readouterr().out
    assert open("out/cfm_2d/model.safetensors.old", "rb").read() == before
    log = [json.loads(line)["step"] for line in open("out/cfm_2d/log.jsonl")]
    assert run("--resume", "out/cfm_2d/ckpt.pt", "--steps", 4) == 0 and ".old" not in capsys.readouterr().out
    resumed = [json.loads(line)["step"] for line in open("out/cfm_2d/log.jsonl")]
    assert resumed[:len(log)] == log and resumed == sorted(resumed) and len(resumed) > len(log)


def test_training_gif_shows_a_whole_run(quick):
    assert run(*TINY, "--steps", 9) == 0
    whole = Image.open("out/cfm_2d/training.gif").n_frames
    assert run("--resume", "out/cfm_2d/ckpt.pt", "--steps", 10) == 0
    assert Image.open("out/cfm_2d/training.gif").n_frames == whole > 3


def test_a_drawing_on_a_transparent_sheet():
    drawing = np.zeros((40, 40, 4), np.uint8)
    drawing[10:14, 5:35, 3] = 255  # one black stroke
    Image.fromarray(drawing).save("stroke.png")
    x = c.Target("stroke.png", 0.0, "cpu").points(np.random.default_rng(0), 500)
    assert x[:, 0].std() > 5 * x[:, 1].std()
