"""latent_dit.py against diffusers and transformers in float64, closed forms, and real photographs and weights where
they lie beside the project."""
import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import latent_dit as mm

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
real_weights = pytest.mark.skipif(not (SHARED / "taesd").is_dir(), reason="the real TAESD weights are not here")


@pytest.fixture(autouse=True)
def fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def randomise(model, seed=0):
    """Weights of which none is 0 or 1, or a norm without its scale would not be seen."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn(p.shape, generator=g)
    return model.eval()


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


# Tokenizers

KL = dict(in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 4,
          up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=[16, 32, 64, 64], layers_per_block=2,
          norm_num_groups=8, sample_size=64)
KINDS = {"sd": dict(latent_channels=4, scaling_factor=0.18215), "sdxl": dict(latent_channels=4, scaling_factor=0.13025),
         "flux": dict(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                      use_post_quant_conv=False)}


@pytest.fixture(scope="module")
def kl_folders(tmp_path_factory):
    """Small autoencoders in the layout of the hub, by kind, and diffusers' own models."""
    from diffusers import AutoencoderKL
    path, models = tmp_path_factory.mktemp("vae"), {}
    for seed, (kind, config) in enumerate(KINDS.items()):
        models[kind] = randomise(AutoencoderKL(**KL, **config), seed)
        models[kind].save_pretrained(path / kind)
    return path, models


def compare(ours, theirs, scale, shift, x):
    ours, theirs = ours.double(), theirs.double()
    with torch.no_grad():
        z = (theirs.encode(x).latent_dist.mode() - shift) * scale
        again = theirs.decode(z / scale + shift).sample
        torch.testing.assert_close(ours.encode(x), z, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours.decode(z), again, rtol=1e-9, atol=1e-9)
    assert z.std() > 1e-3 and again.std() > 1e-3 and ours.channels == z.shape[1] and ours.factor == 64 // z.shape[2]


@pytest.mark.parametrize("kind", KINDS)
def test_autoencoder_kl_is_diffusers(kind, kl_folders):
    path, models = kl_folders
    files, how = mm.find_vae(str(path / kind))
    assert how["scale"] == KINDS[kind]["scaling_factor"] and how["groups"] == 8
    compare(mm.read_vae(files, how), models[kind], how["scale"], how.get("shift", 0), uniform(2, 3, 64, 64))


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_names_of_the_attention(kl_folders, convolutions):
    """Files of 2022 say query, key, value and proj_attn; still older ones hold 1 x 1 convolutions there."""
    path, models = kl_folders
    (file,), how = mm.find_vae(str(path / "sd"))
    tensors, old = mm.load_safetensors(file)[0], {}
    for k, v in tensors.items():
        if ".attentions." in k:
            for ours, theirs in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                k = k.replace(f".{ours}.", f".{theirs}.")
            v = v[:, :, None, None] if convolutions and v.ndim == 2 else v
        old[k] = v
    assert set(old) != set(tensors)
    mm.save_safetensors(Path("old.safetensors"), old, {})
    ours = mm.read_vae(*mm.find_vae("old.safetensors")[:1], how)
    compare(ours, models["sd"], how["scale"], 0, uniform(1, 3, 64, 64))


@pytest.mark.parametrize("channels", [4, 16])
def test_taesd_is_diffusers(channels):
    """In diffusers' layout, and in the original one: two files, and the decoder counted from its clamp."""
    from diffusers import AutoencoderTiny
    theirs = randomise(AutoencoderTiny(latent_channels=channels))
    theirs.save_pretrained("diffusers")
    x = uniform(2, 3, 64, 64)
    tensors = mm.load_safetensors(Path("diffusers/diffusion_pytorch_model.safetensors"))[0]
    Path("original").mkdir()
    for part, more in (("encoder", 0), ("decoder", 1)):
        renamed = {k.split(".", 2)[2]: v for k, v in tensors.items() if k.startswith(part)}
        renamed = {f"{int(k.split('.')[0]) + more}.{k.split('.', 1)[1]}": v for k, v in renamed.items()}
        mm.save_safetensors(Path(f"original/taesd_{part}.safetensors"), renamed, {})
    with torch.no_grad():
        theirs = theirs.double()
        z = theirs.encode(x).latents
        again = theirs.decode(3 * z).sample  # where the clamp bends
        for name in ("diffusers", "original", "original/taesd_encoder.safetensors"):
            ours = mm.read_vae(*mm.find_vae(name)).double()
            assert ours.channels == channels
            torch.testing.assert_close(ours.encode(x), z, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(ours.decode(3 * z), again, rtol=1e-9, atol=1e-9)


def test_cosmos():
    """A scripted stand-in with the signature of NVIDIA's files: bfloat16, a tuple from the encoder, factor 8 or 16."""
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 16, 8, 8)

        def forward(self, x):
            return (self.conv(x),)

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.ConvTranspose2d(16, 3, 8, 8)

        def forward(self, z):
            return self.conv(z)
    Path("nvidia").mkdir()
    encoder, decoder = Encoder().bfloat16(), Decoder().bfloat16()
    torch.jit.script(encoder).save("nvidia/encoder.jit")
    torch.jit.script(decoder).save("nvidia/decoder.jit")
    ours = mm.read_vae(*mm.find_vae("nvidia"))
    assert (ours.channels, ours.factor) == (16, 8)
    x = uniform(2, 3, 32, 32).float()
    with torch.no_grad():
        z = ours.encode(x)
        torch.testing.assert_close(z, encoder.conv(x.bfloat16()).float())
        torch.testing.assert_close(ours.decode(z), decoder.conv(z.bfloat16()).float())
    assert z.shape == (2, 16, 4, 4)


@real_weights
@pytest.mark.parametrize("name, least", [("taesd", 24), ("taef1", 26)])
def test_photographs_come_back(name, least):
    """Real weights, real AFHQ cats: the PSNR that the authors of the weights reach, too."""
    vae = mm.read_vae(*mm.find_vae(str(SHARED / "taesd" / f"{name}_encoder.safetensors")))
    pictures = [np.asarray(Image.open(p).convert("RGB")) for p in sorted((SHARED / "afhq_folder/cat").glob("*.jpg"))]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        again = vae.decode(vae.encode(x)).clamp(-1, 1)
    psnr = (10 * (4 / (again - x).square().mean((1, 2, 3))).log10()).mean().item()
    print(f"{name}: {psnr:.2f} dB")
    assert psnr > least


# The method


def test_path_and_loss():
    z0, eps, t = uniform(4, 2, 3, 3), uniform(4, 2, 3, 3, seed=1), torch.tensor([0.0, 0.25, 0.5, 1])
    zt, v = mm.path(z0, eps, t.view(-1, 1, 1, 1))
    torch.testing.assert_close(zt[0], z0[0])
    torch.testing.assert_close(zt[3], eps[3])
    torch.testing.assert_close(zt[1], 0.75 * z0[1] + 0.25 * eps[1])
    zero = mm.loss_fn(lambda zt, t, y: eps - z0, z0, eps, t)
    torch.testing.assert_close(zero, torch.zeros(4, dtype=torch.float64))
    uneven = torch.arange(4).view(-1, 1, 1, 1)
    torch.testing.assert_close(mm.loss_fn(lambda zt, t, y: eps - z0 + uneven, z0, eps, t), torch.arange(4).double() ** 2)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_times_are_a_shifted_logit_normal(shift):
    """logit of the shifted time is the normal number plus log shift: mean log(shift), deviation 1."""
    t = mm.logit_normal((200_000,), shift, torch.Generator().manual_seed(0)).double()
    logit = (t / (1 - t)).log()
    assert logit.mean().item() == pytest.approx(math.log(shift), abs=0.01)
    assert logit.std().item() == pytest.approx(1, abs=0.01)
    grid = torch.tensor(mm.time_grid(10, shift), dtype=torch.float64)[1:-1]
    plain = torch.linspace(1, 0, 11, dtype=torch.float64)[1:-1]
    torch.testing.assert_close((grid / (1 - grid)), shift * plain / (1 - plain))


def test_the_shift_follows_the_resolution():
    assert [mm.natural_shift(dim) for dim in (4 * 32 * 32, 4 * 64 * 64, 16 * 32 * 32)] == [1, 2, 2]
    assert mm.natural_shift(8 * 8 * 8) == 1  # with less the times next to noise go untrained


def test_sampling_a_gaussian():
    """z0 ~ N(0, s^2): the exact velocity is linear in zt, and Heun's error falls with the square of the step."""
    s = 0.5

    def model(z, t):
        t = t.view(-1, 1, 1, 1)
        return z * (t - (1 - t) * s * s) / ((1 - t) ** 2 * s * s + t * t)
    z = uniform(8, 2, 4, 4).float()
    errors = {(sampler, n): (mm.sample(model, z, sampler, mm.time_grid(n, 1.0)) - s * z).abs().max().item()
              for sampler in mm.SAMPLERS for n in (16, 32, 64)}
    for n in (16, 32):
        assert errors["euler", n] / errors["euler", 2 * n] == pytest.approx(2, rel=0.2)
        assert errors["heun", n] / errors["heun", 2 * n] == pytest.approx(4, rel=0.2)
    seen = []
    mm.sample(model, z, "heun", mm.time_grid(4, 1.0), lambda t, z, v: seen.append(t))
    assert seen == [1, 0.75, 0.5, 0.25]


# The model


def small(n_classes=3, patch=2, C=4, seed=0, **also):
    mm.SIZES["test"] = (3, 48, 4)
    torch.manual_seed(seed)
    model = mm.DiT(C, patch, "test", n_classes, **also).double().eval()
    del mm.SIZES["test"]
    return model


def test_adaln_zero_is_the_identity_at_the_start():
    model, x = small(), uniform(2, 16, 48)
    emb = uniform(2, 48, seed=1)
    for block in model.blocks:
        assert torch.equal(block(x, emb, mm.rope(4, 4, 12, "cpu")), x)
    assert torch.equal(model(uniform(2, 4, 8, 8), torch.tensor([0.1, 0.9]).double()), torch.zeros(2, 4, 8, 8).double())
    other = randomise(small())
    assert not torch.equal(other.blocks[0](x, emb, mm.rope(4, 4, 12, "cpu")), x)


def test_rotary_positions_only_tell_distances():
    """q . k of two tokens is the same wherever the pair stands on the grid, and differs when they come apart."""
    d, H, W = 12, 7, 9
    cos, sin = (a.double().view(H, W, d // 2) for a in mm.rope(H, W, d, "cpu"))
    q, k = uniform(d), uniform(d, seed=1)

    def product(i, j, di, dj):
        turned = [mm.rotate(x[None], (cos[r, c], sin[r, c]))[0] for x, r, c in ((q, i, j), (k, i + di, j + dj))]
        return (turned[0] * turned[1]).sum().item()
    for di, dj in ((0, 0), (1, 0), (0, 1), (3, -2)):
        found = [product(i, j, di, dj) for i in range(0, H - di) for j in range(max(0, -dj), W - max(0, dj))]
        assert max(found) - min(found) < 1e-6
    assert len({round(product(2, 3, di, dj), 6) for di in range(3) for dj in range(3)}) == 9
    turned = mm.rotate(q[None], (cos[3, 4], sin[3, 4]))[0]  # as complex numbers
    angles = torch.cat([torch.full((3,), n).double() * 100.0 ** -(torch.arange(3) / 3) for n in (3, 4)])
    expected = torch.complex(q[:6], q[6:]) * torch.polar(torch.ones(6).double(), angles)
    torch.testing.assert_close(turned, torch.cat([expected.real, expected.imag]), rtol=1e-6, atol=1e-6)


def test_a_larger_grid_is_drawn_together():
    """Each second token of a grid twice as large stands where the tokens of the grid of training stood."""
    cos, sin = (a.view(8, 8, 6) for a in mm.rope(8, 8, 12, "cpu", 0.5))
    for wide, narrow in zip((cos, sin), mm.rope(4, 4, 12, "cpu")):
        torch.testing.assert_close(wide[::2, ::2], narrow.view(4, 4, 6))
    model, t = randomise(small(patch=1)), torch.tensor([0.5]).double()
    z = uniform(1, 4, 4, 4)
    free = model(z, t)
    model.grid = 4
    assert torch.equal(model(z, t), free)
    model.grid = 2
    assert not torch.allclose(model(z, t), free)


def test_the_block_is_what_its_papers_say():
    """Written out once more, token by token and head by head, without fused kernels."""
    model = randomise(small())
    block, x, emb = model.blocks[0], uniform(2, 12, 48), uniform(2, 48, seed=1)
    positions = mm.rope(3, 4, 12, "cpu")

    def rms(x, weight=1):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    m = (emb @ block.adaLN.weight.T + block.adaLN.bias)[:, None]
    shift1, scale1, gate1, shift2, scale2, gate2 = (m[..., 48 * i:48 * i + 48] for i in range(6))
    h = rms(x) * (1 + scale1) + shift1
    qkv, out = h @ block.attn.qkv.weight.T + block.attn.qkv.bias, []
    for head in range(4):
        q, k, v = (qkv[..., 48 * i + 12 * head:48 * i + 12 * head + 12] for i in range(3))
        q, k = (mm.rotate(rms(a, norm.weight), positions) for a, norm in ((q, block.attn.norm_q), (k, block.attn.norm_k)))
        out.append((q @ k.transpose(1, 2) / 12 ** 0.5).softmax(-1) @ v)
    x2 = x + gate1 * (torch.cat(out, -1) @ block.attn.proj.weight.T + block.attn.proj.bias)
    h = (rms(x2) * (1 + scale2) + shift2) @ block.mlp.gate_up.weight.T + block.mlp.gate_up.bias
    h = torch.nn.functional.silu(h[..., :h.shape[-1] // 2]) * h[..., h.shape[-1] // 2:]
    expected = x2 + gate2 * (h @ block.mlp.down.weight.T + block.mlp.down.bias)
    with torch.no_grad():
        torch.testing.assert_close(block(x, emb, positions), expected, rtol=1e-7, atol=1e-7)  # rope is in fp32


def test_it_learns_what_can_be_known():
    """Of white noise the best guess of the velocity is linear in zt, with an error of 2 - (2t - 1)^2 / ((1 - t)^2 + t^2)."""
    torch.manual_seed(0)
    model = mm.DiT(4, 1, "tiny", 3)
    opt, losses, best = torch.optim.AdamW(model.parameters(), 1e-3), [], []
    for step in range(60):
        z0, eps, t = torch.randn(16, 4, 4, 4), torch.randn(16, 4, 4, 4), mm.logit_normal((16,), 0.35, None)
        loss = mm.loss_fn(model, z0, eps, t, torch.randint(0, 4, (16,))).mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
        best.append((2 - (2 * t - 1) ** 2 / ((1 - t) ** 2 + t ** 2)).mean().item())
    assert np.mean(best[-20:]) - 0.05 < np.mean(losses[-20:]) < np.mean(best[-20:]) + 0.1 and losses[0] > 1.8


def test_other_sizes_and_labels():
    model = randomise(small())
    t = torch.tensor([0.3, 0.7]).double()
    for H, W in ((8, 8), (4, 10), (16, 12)):
        assert model(uniform(2, 4, H, W), t, torch.tensor([0, 2])).shape == (2, 4, H, W)
    z = uniform(2, 4, 8, 8)
    assert torch.equal(model(z, t), model(z, t, torch.tensor([3, 3])))  # no label is the label after the last
    assert not torch.allclose(model(z, t, torch.tensor([0, 0])), model(z, t, torch.tensor([1, 1])))


def test_guidance():
    model, z, t = randomise(small()), uniform(2, 4, 8, 8), torch.tensor([0.5, 0.5]).double()
    y = torch.tensor([0, 2])
    with_y, without = model(z, t, y), model(z, t)
    for scale, expected in ((1, with_y), (0, without), (3, without + 3 * (with_y - without))):
        torch.testing.assert_close(mm.guided(model, y, scale, (0, 1))(z, t), expected)
    torch.testing.assert_close(mm.guided(model, y, 3, (0.6, 1))(z, t), with_y)


def test_patches_come_back_to_their_places():
    """The token at a place sees that place: with the last layer as the inverse of the first, and blocks that do
    nothing, what comes out is what went in."""
    model = small(C=2)
    model.embed.weight.data = torch.eye(48)[:, :8].reshape(48, 2, 2, 2).double()
    model.embed.bias.data.zero_()
    model.norm = torch.nn.Identity()
    model.out.weight.data = torch.eye(48)[:8].double()
    z = uniform(1, 2, 6, 4)
    torch.testing.assert_close(model(z, torch.tensor([0.5]).double()), z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", ["tiny", "S"])
def test_flops_are_counted_honestly(size):
    """As PyTorch's own counter counts them, which sees what is really called."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model = mm.DiT(4, 2, size, 10).eval()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert model.flops(16, 16) == counter.get_total_flops()


def test_sizes_are_those_of_the_paper():
    """Within 3 % of the DiT paper's parameters (table 4: 33, 130, 458, 675 million), as SwiGLU replaces its MLP."""
    for size, millions in (("S", 33), ("B", 130), ("L", 458), ("XL", 675)):
        with torch.device("meta"):
            n = sum(p.numel() for p in mm.DiT(4, 2, size, 1000).parameters())
        assert n / 1e6 == pytest.approx(millions, rel=0.03)


def test_recomputed_activations_give_the_same_gradients(monkeypatch):
    plain, again = (randomise(small(grad_checkpoint=g)).train() for g in (False, True))
    for model in (plain, again):
        model(uniform(2, 4, 8, 8), torch.tensor([0.3, 0.7]).double(), torch.tensor([0, 1])).square().sum().backward()
    for a, b in zip(plain.parameters(), again.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    calls, recompute = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(a[0]) or recompute(*a, **k))
    again(uniform(2, 4, 8, 8), torch.tensor([0.3, 0.7]).double())
    assert calls == list(again.blocks)


def test_the_small_autoencoder(monkeypatch):
    """Its loss, written out with PyTorch's own divergence of two normal distributions; and it learns."""
    torch.manual_seed(0)
    vae = randomise(mm.TinyVAE()).double()
    x, noise = uniform(2, 3, 16, 16), uniform(2, 8, 2, 2, seed=1)
    mean, log_var = vae.encoder(x).chunk(2, 1)
    posterior = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, torch.ones(()).double())).mean()
    out = vae.decoder(mean + posterior.stddev * noise)
    expected = torch.nn.functional.l1_loss(out, x) + torch.nn.functional.mse_loss(out, x) + 1e-4 * kl
    torch.testing.assert_close(vae.loss(x, noise), expected)
    torch.testing.assert_close(vae.encode(x), mean)


# Latents and training


SMALL = ["--smoke", "--device", "cpu", "--dtype", "fp32"]


def run(*argv):
    return mm.main([str(a) for a in argv])


def weights(folder):
    return mm.load_safetensors(Path(folder) / "model.safetensors")[0]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the drawn pictures, the tokenizer and the latents of --smoke in data/cache, and a finished run."""
    path, here = tmp_path_factory.mktemp("prepared"), os.getcwd()
    os.chdir(path)
    assert run(*SMALL) == 0
    os.chdir(here)
    return path


@pytest.fixture
def cached(prepared, tmp_path):
    shutil.copytree(prepared / "data", tmp_path / "data")


def test_what_a_run_leaves_behind(prepared):
    from safetensors.numpy import load_file
    out = prepared / "out/smoke"
    for name in ("ckpt.pt", "model.safetensors", "log.jsonl", "loss.png", "reconstruction.png", "forward.png",
                 "guidance.png", "reverse.gif", "training.gif", "samples/000002.png", "generated.png",
                 "generated/000003.png"):
        assert (out / name).stat().st_size > 0, name
    theirs, ours = load_file(out / "model.safetensors"), weights(out)
    assert set(theirs) == set(ours) and all(np.array_equal(theirs[k], ours[k].numpy()) for k in ours)
    assert "vae.decoder.0.weight" in ours and "z_mean" in ours
    about = mm.load_safetensors(out / "model.safetensors")[1]
    assert about["script"] == "latent_dit.py" and about["kind"] == "dit"
    assert json.loads(about["args"])["time_shift"] == mm.natural_shift(8 * 4 * 4)
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 2 and records[-1]["val_loss"] > 0 and not list(out.rglob("*.part"))


def data_and_vae(prepared_path):
    args = mm.parse_args(SMALL)
    data = mm.shared_data(lambda: mm.prepare_data("drawn_faces", 32, 256), 0, 1)
    vae = mm.load_vae(args, 0, 1)
    mm.train_tiny(vae, data, args, torch.device("cpu"), 0, 1)
    return args, data, vae.eval(), mm.fingerprint(vae)


def test_latents_are_those_of_the_pictures(cached):
    args, data, vae, key = data_and_vae(cached)
    cpu = torch.device("cpu")
    mm.encode_data(vae, key, data, args, cpu, 0, 1)
    i, mirrored = np.array([3, 200, 77]), torch.tensor([False, True, False])
    x = mm.load_pictures(data.images, i, cpu)
    x[1] = x[1].flip(-1)
    with torch.no_grad():
        expected = (vae.encode(x) - data.z_mean) / data.z_std
    torch.testing.assert_close(mm.load_latents(data, i, mirrored, cpu), expected, atol=2e-3, rtol=2e-3)
    everything = torch.cat([mm.load_latents(data, np.arange(256), torch.full((256,), m), cpu) for m in (False, True)])
    torch.testing.assert_close(everything.mean((0, 2, 3)), torch.zeros(8), atol=2e-3, rtol=0)
    torch.testing.assert_close(everything.std((0, 2, 3)), torch.ones(8), atol=2e-3, rtol=0)
    data.z_mean, data.z_std = torch.zeros(8, 1, 1), torch.ones(8, 1, 1)
    model = mm.DiT(8, 1, "tiny", 3)
    model.z_mean.fill_(0.5)
    model.z_std.fill_(2)
    with torch.no_grad():
        torch.testing.assert_close(mm.decode(vae, model, expected), vae.decode(expected * 2 + 0.5))


def test_the_cache_of_latents(cached, monkeypatch):
    args, data, vae, key = data_and_vae(cached)
    cpu, calls = torch.device("cpu"), []
    monkeypatch.setattr(type(vae), "encode", lambda self, x, f=type(vae).encode: calls.append(len(x)) or f(self, x))

    def encode(key=key, **other):
        calls.clear()
        now = argparse.Namespace(**{**vars(args), **other})
        mm.encode_data(vae, key, data, now, cpu, 0, 1)
        return sum(calls)
    assert encode() == 0                                   # the run before has made them
    assert encode(key="another tokenizer") == 512          # each picture and its mirror image
    assert encode(flip=False) == 256 and data.latents.shape == (1, 256, 8, 4, 4)
    data.key = "other pictures"
    assert encode() == 512 and encode() == 0
    (file,) = [f for f in Path("data/cache").glob("latents-*.f16") if f.stat().st_mtime == max(
        g.stat().st_mtime for g in Path("data/cache").glob("latents-*.f16"))]
    file.write_bytes(file.read_bytes()[:-2])               # cut short by a full disk
    assert encode() == 512 and not list(Path("data/cache").glob("*.part"))


def test_latents_of_a_run_that_was_cut(cached, monkeypatch):
    """What it has left is not made again; two runs at a time end with the same whole file."""
    args, data, vae, _ = data_and_vae(cached)
    encode, calls, cpu = type(vae).encode, [], torch.device("cpu")
    mm.encode_data(vae, "whole", data, args, cpu, 0, 1)
    whole = np.array(data.latents)

    def cut(self, x):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return encode(self, x)
    monkeypatch.setattr(type(vae), "encode", cut)
    with pytest.raises(KeyboardInterrupt):
        mm.encode_data(vae, "cut", data, args, cpu, 0, 1)
    part, = Path("data/cache").glob("*.part")
    left = np.memmap(part, np.float16, "r+").reshape(2 * 256, -1)
    assert left[15].all() and not left[511].any()
    left[15, left.shape[1] // 2:] = 0  # a full disk can end a write within a latent
    left.flush()
    mm.encode_data(vae, "cut", data, args, cpu, 0, 1)
    assert len(calls) == 20 + 32 - 18 and np.array_equal(data.latents, whole)  # 18 of 32 parts were there

    def nested(self, x):
        calls.append(1)
        if len(calls) == 20:
            mm.encode_data(vae, "both", argparse.Namespace(**vars(data)), args, cpu, 0, 1)
        return encode(self, x)
    monkeypatch.setattr(type(vae), "encode", nested)
    calls.clear()
    mm.encode_data(vae, "both", data, args, cpu, 0, 1)
    assert np.array_equal(data.latents, whole) and not list(Path("data/cache").glob("*.part"))
    monkeypatch.setattr(type(vae), "encode", lambda self, x: encode(self, x) * math.nan)
    with pytest.raises(mm.Stop, match="no numbers"):
        mm.encode_data(vae, "broken", data, args, cpu, 0, 1)


def test_disk_full_while_latents_are_made(prepared, tmp_path):
    """One sentence, no bus error, and what was made stays: with room again the run goes on."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", place],
                                                     capture_output=True)
    if not mount or mount.returncode:
        pytest.skip("mounting takes root")
    try:
        shutil.copytree(prepared / "data", place / "data")
        for file in place.glob("data/cache/latents-*"):
            file.unlink()
        (place / "filler").write_bytes(bytes(shutil.disk_usage(place).free - 60 * 1024))  # 128 kB are needed
        command = [sys.executable, ROOT / "latent_dit.py", *SMALL, "--out", tmp_path / "out"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=place)
        assert done.returncode == 1 and "No space left on device" in done.stderr and "data/cache" in done.stderr
        assert done.stderr.count("\n") == 1 and list(place.glob("data/cache/latents-*.part"))
        (place / "filler").unlink()
        assert subprocess.run(command, capture_output=True, cwd=place).returncode == 0
        assert not list(place.glob("data/cache/*.part"))
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_pixels_need_no_cache(cached):
    args, data, *_ = data_and_vae(cached)
    mm.encode_data(mm.Pixels(), "none", data, args, torch.device("cpu"), 0, 1)
    z = mm.load_latents(data, np.array([5, 5]), torch.tensor([False, True]), torch.device("cpu"))
    x = mm.load_pictures(data.images, np.array([5]), torch.device("cpu"))
    torch.testing.assert_close(z, torch.cat([2 * x, 2 * x.flip(-1)]))


def test_what_a_batch_is_made_of(cached):
    """Times as asked for, a tenth of the labels hidden, half of the pictures mirrored, each picture once in an epoch;
    and two processes get the two halves of what one gets."""
    args, data, vae, key = data_and_vae(cached)
    cpu, n = torch.device("cpu"), len(data.train)
    mm.encode_data(vae, key, data, args, cpu, 0, 1)
    args.batch_size, args.time_shift, args.repa = 2 * n, 3.0, 0.5
    z0, eps, t, y, x = mm.train_batch(data, args, 0, cpu, 0, 1)
    logit = (t / (1 - t)).log()
    assert logit.mean().item() == pytest.approx(math.log(3), abs=4 / len(t) ** 0.5)
    assert (y == 8).float().mean().item() == pytest.approx(0.1, abs=4 * 0.3 / len(t) ** 0.5)
    assert eps.mean().abs() < 0.02 and eps.std().item() == pytest.approx(1, abs=0.02)
    with torch.no_grad():  # the pictures for --repa are those of the latents, mirrored or not
        torch.testing.assert_close(z0, (vae.encode(x) - data.z_mean) / data.z_std, atol=2e-3, rtol=2e-3)
    plain = mm.load_pictures(data.images, data.train, cpu)
    seen = []
    for picture, label in zip(x, y):
        same = [(plain - p).abs().amax((1, 2, 3)).argmin().item() for p in (picture, picture.flip(-1))]
        gap = [(plain[i] - p).abs().max().item() for i, p in zip(same, (picture, picture.flip(-1)))]
        which = int(gap[1] < gap[0])
        assert gap[which] == 0 and label in (8, data.labels[data.train[same[which]]])
        seen.append((same[which], which))
    assert sum(w for _, w in seen) / len(seen) == pytest.approx(0.5, abs=4 * 0.5 / len(seen) ** 0.5)
    for epoch in (seen[:n], seen[n:]):
        assert sorted(i for i, _ in epoch) == list(range(n))
    assert [i for i, _ in seen[:n]] != [i for i, _ in seen[n:]]
    halves = [mm.train_batch(data, args, 0, cpu, rank, 2) for rank in (0, 1)]
    for whole, *parts in zip((z0, eps, t, y, x), *halves):
        assert torch.equal(whole, torch.cat(parts))
    args.repa_until, args.class_cond = 1, False
    assert mm.train_batch(data, args, 1, cpu, 0, 1)[3:] == (None, None)


def test_a_run_is_what_the_formulas_say(cached):
    """Three steps written out: AdamW, its warm-up, clipping, the mean of the weights, and the validation loss."""
    assert run(*SMALL, "--steps", "3", "--eval_every", "3", "--lr", "0.05", "--ema_decay", "0.2") == 0
    args = mm.parse_args([*SMALL, "--lr", "0.05"])
    args.time_shift, cpu = 1.0, torch.device("cpu")
    _, data, vae, key = data_and_vae(cached)
    mm.encode_data(vae, key, data, args, cpu, 0, 1)
    torch.manual_seed(mm.mix(mm.INIT, 0))
    model = mm.DiT(8, 1, "tiny", 8)
    ema = [p.detach().clone() for p in model.parameters()]
    opt, losses = torch.optim.AdamW(model.parameters(), 0.05, (0.9, 0.99), weight_decay=0.01), []
    for step in range(3):
        z0, eps, t, y, _ = mm.train_batch(data, args, step, cpu, 0, 1)
        t4 = t.view(-1, 1, 1, 1)
        loss = (model((1 - t4) * z0 + t4 * eps, t, y) - (eps - z0)).square().mean()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        for p in model.parameters():
            p.grad /= max(norm, 1)
        opt.param_groups[0]["lr"] = 0.05 * (step + 1) / 50
        opt.step()
        opt.zero_grad()
        decay = min(0.2, (1 + step) / (10 + step))
        ema = [decay * e + (1 - decay) * p.detach() for e, p in zip(ema, model.parameters())]
        losses.append(loss.item())
    found = weights("out/smoke")
    for (name, _), e in zip(model.named_parameters(), ema):
        torch.testing.assert_close(found[name], e, atol=2e-5, rtol=1e-3)
    records = [json.loads(line) for line in Path("out/smoke/log.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in records[1:]] == pytest.approx(losses, rel=1e-3)
    model.load_state_dict({k: v for k, v in found.items() if not k.startswith("vae.")})
    validate = lambda: mm.validate(model, data, args, cpu, 0, 1, contextlib.nullcontext)
    assert records[-1]["val_loss"] == pytest.approx(validate()[0], rel=1e-4)
    model = randomise(model)  # or labels would hardly matter yet
    n, errors = len(data.val), []
    for i, p in enumerate(data.val):
        z0 = mm.load_latents(data, np.array([p]), torch.tensor([False]), cpu)
        eps, t = next(mm.image_noise(1, [i], (8, 4, 4), cpu)), (i + 0.5) / n
        with torch.no_grad():
            v = model((1 - t) * z0 + t * eps, torch.tensor([t]), torch.tensor([data.labels[p]]))
        errors.append((v - (eps - z0)).square().mean().item())
    val, bins = validate()
    assert val == pytest.approx(np.mean(errors), rel=1e-4)
    tenth = [e for i, e in enumerate(errors) if 0.3 <= (i + 0.5) / n < 0.4]
    assert bins[3] == pytest.approx(np.mean(tenth), rel=1e-4)


def test_pictures_are_sampled_as_the_flags_say(cached, prepared):
    """Picture 5 alone, with the label that its place or --label gives it, guided, by Euler's method, written out."""
    tensors, about = mm.load_safetensors(prepared / "out/smoke/model.safetensors")
    g, model = torch.Generator().manual_seed(0), Path("model.safetensors")  # two steps have taught it nothing to see
    mm.save_safetensors(model, {k: v if k.startswith(("vae", "z_")) else v + 0.1 * torch.randn(v.shape, generator=g)
                                for k, v in tensors.items()}, about)
    flags = ["--ckpt", model, "--device", "cpu", "--dtype", "fp32", "--sample_steps", 3, "--cfg_scale", 3]
    assert run("--sample", 6, *flags, "--out", "turns") == 0
    assert run("--sample", 6, *flags, "--out", "named", "--label", mm.SPECIES[5]) == 0
    assert run("--sample", 6, *flags, "--out", "numbered", "--label", 5) == 0
    args = mm.parse_args(["--sample", "6", *map(str, flags)])
    net, vae, classes = mm.load_model(str(model), args, torch.device("cpu"), 0, 1)
    z, y, none = next(mm.image_noise(0, [5], (8, 4, 4), "cpu")), classes.index(mm.SPECIES[5]), torch.tensor([8])
    with torch.no_grad():
        for t in (1, 2 / 3, 1 / 3):
            v, v0 = (net(z, torch.tensor([t]), label) for label in (torch.tensor([y]), none))
            z = z - (v0 + 3 * (v - v0)) / 3
        expected = mm.to_uint8(vae.decode(z * net.z_std + net.z_mean))[0].astype(int)
    for folder in ("turns", "named", "numbered"):
        found = np.asarray(Image.open(f"{folder}/generated/000005.png")).astype(int)
        assert abs(found - expected).max() <= 1
    turns, named, numbered = ([(Path(folder) / f"generated/{i:06d}.png").read_bytes() for i in range(6)]
                              for folder in ("turns", "named", "numbered"))
    assert [a == b for a, b in zip(turns, named)] == [False] * 5 + [True] and named == numbered
    assert run("--sample", 1, *flags, "--label", 8) == 2 and run("--sample", 1, *flags, "--label", "unicorn") == 2


def test_the_log_on_a_gpu(cached, monkeypatch):
    """MFU is what the formula says: three forward passes a picture."""
    monkeypatch.setattr(mm, "peak_flops", lambda device: 1e12)
    assert run(*SMALL) == 0
    record = json.loads(Path("out/smoke/log.jsonl").read_text().splitlines()[-1])
    flops = mm.DiT(8, 1, "tiny", 8).flops(4, 4)
    assert record["mfu"] == pytest.approx(3 * flops * record["img_per_s"] / 1e12)


def test_bf16_and_fp32(cached, monkeypatch):
    monkeypatch.setattr(mm, "sample_only", lambda args: None)  # of --smoke, with its own --dtype
    seen, forward = [], mm.SwiGLU.forward
    monkeypatch.setattr(mm.SwiGLU, "forward", lambda self, x: seen.append(forward(self, x).dtype) or forward(self, x))
    stream, block = set(), mm.DiTBlock.forward
    monkeypatch.setattr(mm.DiTBlock, "forward", lambda self, x, *a: stream.add(x.dtype) or block(self, x, *a))
    for dtype, expected in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        seen.clear()
        assert run(*SMALL, "--dtype", dtype, "--out", dtype) == 0 and set(seen) == {expected}
    assert stream == {torch.float32}  # what the blocks add to
    one, two = weights("bf16"), weights("fp32")
    assert all(v.dtype == torch.float32 for v in one.values())
    torch.testing.assert_close(one["out.weight"], two["out.weight"], atol=1e-3, rtol=0.1)


@pytest.mark.parametrize("broken", ["loss", "validation"])
def test_a_run_that_diverges_says_so(broken, cached, monkeypatch, capsys):
    if broken == "loss":
        monkeypatch.setattr(mm, "train_step", lambda *args: torch.tensor(math.nan))
    else:
        monkeypatch.setattr(mm, "validate", lambda *args: (math.nan, []))
    assert run(*SMALL) == 1
    assert "diverged" in capsys.readouterr().err and not Path("out/smoke/ckpt.pt").exists()


def test_the_tokenizer_is_learnt(cached):
    """100 steps are enough to see the colours of a face again."""
    args = mm.parse_args([*SMALL, "--vae_steps", "100"])
    data = mm.shared_data(lambda: mm.prepare_data("drawn_faces", 32, 256), 0, 1)
    vae, x = mm.load_vae(args, 0, 1), mm.load_pictures(data.images, data.val, torch.device("cpu"))
    mm.train_tiny(vae, data, args, torch.device("cpu"), 0, 1)
    with torch.no_grad():
        error = (vae.decode(vae.encode(x)) - x).square().mean().item()
    assert error < 0.4 * (x - x.mean((0, 2, 3), keepdim=True)).square().mean().item()
    again = mm.TinyVAE()
    mm.train_tiny(again, data, args, torch.device("cpu"), 0, 1)  # from data/cache
    assert mm.fingerprint(again) == mm.fingerprint(vae)


def test_a_tokenizer_may_move_but_not_change(prepared, cached):
    """--vae FILE: found again elsewhere, refused when it is another; a tiny one travels with the checkpoints."""
    shutil.copy(prepared / "out/smoke/model.safetensors", "first.safetensors")
    assert run(*SMALL, "--vae", "first.safetensors", "--out", "run") == 0
    Path("first.safetensors").rename("second.safetensors")
    sample = ["--sample", 2, "--ckpt", "run/model.safetensors", "--device", "cpu"]
    Path("run/generated.png").unlink()
    assert run(*sample) == 0 and Path("run/generated.png").exists()  # it holds a copy; and what it draws lies beside it
    assert run("--resume", "run/ckpt.pt", "--device", "cpu", "--steps", 3) == 2
    assert run("--resume", "run/ckpt.pt", "--device", "cpu", "--steps", 3, "--vae", "second.safetensors") == 0
    assert run(*sample, "--vae", "second.safetensors") == 0
    assert run(*SMALL, "--vae_steps", "3", "--out", "other") == 0   # another tokenizer
    for flags in (sample, ["--resume", "run/ckpt.pt", "--device", "cpu", "--steps", 4]):
        assert run(*flags, "--vae", "other/model.safetensors") == 2
    shutil.rmtree("data")
    assert run("--resume", "other/ckpt.pt", "--device", "cpu", "--steps", 3) == 0
    assert not list(Path("data/cache").glob("tiny-vae-*"))          # not trained anew
    assert torch.equal(weights("other")["vae.decoder.0.weight"], mm.load_safetensors(
        Path("other/model.safetensors"))[0]["vae.decoder.0.weight"])


def test_ctrl_c_while_the_last_step_is_evaluated(cached, monkeypatch, capsys):
    validate = mm.validate

    def interrupted(*args):
        if Path("out/smoke/samples/000000.png").exists():
            os.kill(os.getpid(), signal.SIGINT)
        return validate(*args)
    monkeypatch.setattr(mm, "validate", interrupted)
    assert run(*SMALL, "--steps", "1") == 130
    assert Path("out/smoke/ckpt.pt").exists() and "stopped" in capsys.readouterr().err


def test_accumulation_equals_the_big_batch(monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: None)  # it would hide a factor
    g = torch.Generator().manual_seed(0)
    batch = (torch.randn(8, 4, 8, 8, generator=g).double(), torch.randn(8, 4, 8, 8, generator=g).double(),
             torch.rand(8, generator=g).double(), torch.randint(0, 4, (8,), generator=g), None)
    found = []
    for accum in (1, 4):
        model = randomise(small()).train()
        args = argparse.Namespace(accum=accum, repa=0)
        opt = torch.optim.SGD(model.parameters(), 1e-2)
        loss = mm.train_step(model, opt, batch, args, contextlib.nullcontext, None)
        found.append([loss, *model.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_resume_is_exact(cached, monkeypatch):
    """A run that is ended by SIGTERM and goes on is the run that was not, bit for bit."""
    assert run(*SMALL, "--steps", "5", "--eval_every", "5", "--out", "whole") == 0
    step = mm.train_step
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)
    monkeypatch.setattr(mm, "train_step", interrupted)
    assert run(*SMALL, "--steps", "5", "--eval_every", "5", "--out", "cut") == 143
    monkeypatch.setattr(mm, "train_step", step)
    assert run("--resume", "cut/ckpt.pt", "--device", "cpu") == 0
    one, two = weights("whole"), weights("cut")
    assert all(torch.equal(one[k], two[k]) for k in one) and set(one) == set(two)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the pinned transformers wants Python 3.11")
def test_representation_alignment(cached, monkeypatch):
    """The teacher's tokens are transformers'; the loss falls by how much the student agrees; after --repa_until the
    teacher rests, and the weights are saved without the part that only served to compare."""
    from transformers import Dinov2Config, Dinov2Model
    torch.manual_seed(0)
    theirs = Dinov2Model(Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=224,
                                      patch_size=14, layer_norm_eps=1e-6)).eval()
    folder = Path(f"hub/models--{mm.TEACHER.replace('/', '--')}/snapshots/0123")
    theirs.save_pretrained(folder, safe_serialization=True)
    monkeypatch.setenv("HF_HUB_CACHE", "hub")
    teacher = mm.Teacher(0, 1).eval()
    x = uniform(2, 3, 224, 224)
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = theirs.double()((x / 2 + 0.5 - mean) / std).last_hidden_state[:, 1:]
        torch.testing.assert_close(teacher.double()(x, 256), expected, rtol=1e-6, atol=1e-6)
        grid = expected.transpose(1, 2).unflatten(2, (16, 16)).unflatten(3, (8, 2)).unflatten(2, (8, 2)).mean((3, 5))
        found = teacher(x, 64).transpose(1, 2).unflatten(2, (8, 8))  # at half the size bilinear is the mean of 2 x 2
        torch.testing.assert_close(found, grid, rtol=1e-6, atol=1e-6)

    model = mm.DiT(4, 1, "tiny", 3, repa_dim=64)
    z0, eps, t, y = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([0, 3])
    _, told = model(mm.path(z0, eps, t.view(-1, 1, 1, 1))[0], t, y, align=True)
    assert told.shape == (2, 16, 64)
    deeper = mm.copy.deepcopy(model)
    for block in deeper.blocks[2:]:
        randomise(block)
    torch.testing.assert_close(deeper(mm.path(z0, eps, t.view(-1, 1, 1, 1))[0], t, y, align=True)[1], told)  # a third up
    seen = teacher.float()(x.float(), 16)
    for pictures, weight in ((x.float(), 0.5), (None, 0)):
        model.zero_grad()
        args, opt = argparse.Namespace(accum=1, repa=0.5), torch.optim.SGD(model.parameters(), 0)
        opt.zero_grad = lambda: None
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: None)
        mm.train_step(model, opt, (z0, eps, t, y, pictures), args, contextlib.nullcontext, teacher)
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        v, told = model(mm.path(z0, eps, t.view(-1, 1, 1, 1))[0], t, y, align=True)
        alike = (told * seen).sum(-1) / told.norm(dim=-1) / seen.norm(dim=-1)
        ((v - (eps - z0)).square().mean() - weight * alike.mean()).backward()
        for a, b in zip(found, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert run(*SMALL, "--repa", "--repa_until", "1", "--out", "aligned") == 0
    assert not [k for k in weights("aligned") if k.startswith("repa")]
    assert run("--sample", 2, "--ckpt", "aligned/model.safetensors", "--device", "cpu", "--out", "aligned") == 0
    assert run("--resume", "aligned/ckpt.pt", "--device", "cpu", "--steps", 3) == 0
    torchrun(*SMALL, "--repa", "--repa_until", "2", "--steps", "3", "--out", "two")  # DDP wants all weights in use
    assert run(*SMALL, "--repa", "--repa_until", "2", "--steps", "3", "--out", "one") == 0
    one, two = weights("one"), weights("two")  # where a gradient is next to 0, rounding decides Adam's first steps
    far = torch.cat([((two[k] - one[k]).abs() > 2e-5).flatten() for k in one if k.startswith("blocks")])
    assert far.float().mean() < 1e-3


def torchrun(*flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               ROOT / "latent_dit.py", *flags]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_equal_one(prepared, tmp_path):
    """From the same latents, and with each process making half of them anew; gradients in parts, too."""
    flags = [*SMALL, "--steps", "3", "--eval_every", "3"]
    shutil.copytree(prepared / "data", "data")
    assert run(*flags, "--out", "one") == 0
    for file in Path("data/cache").glob("latents-*"):
        file.unlink()
    torchrun(*flags, "--accum", "2", "--out", "two")
    one, two = weights("one"), weights("two")
    for k in one:
        torch.testing.assert_close(two[k], one[k], atol=2e-5, rtol=1e-4)
    ours, theirs = (json.loads((Path(name) / "log.jsonl").read_text().splitlines()[-1]) for name in ("one", "two"))
    assert theirs["val_loss"] == pytest.approx(ours["val_loss"], rel=1e-4)
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)


def test_sampling_at_another_size(prepared):
    model = prepared / "out/smoke/model.safetensors"
    assert run("--sample", 2, "--ckpt", model, "--size", 64, "--device", "cpu", "--out", "big") == 0
    assert Image.open("big/generated/000001.png").size == (64, 64)
    args = mm.parse_args(["--sample", "2", "--ckpt", str(model), "--size", "64"])
    net, *_ = mm.load_model(model, args, torch.device("cpu"), 0, 1)
    assert args.time_shift == 2 and net.grid == 4  # four times the numbers, twice the shift
    assert run("--sample", 2, "--ckpt", model, "--device", "cpu", "--out", "small", "--sampler", "heun") == 0
    assert Image.open("small/generated/000001.png").size == (32, 32)


def write_safetensors(path, header, body=b""):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + body)


def flat(start, end, shape):
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


BAD = {
    "vae nowhere": ("--vae nowhere", "nowhere tiny sd none"),
    "vae of another kind": ("--vae other.safetensors", "other.safetensors kind"),
    "vae cut off": ("--vae cut.safetensors", "cut.safetensors whole"),
    "vae with an absurd header": ("--vae absurd.safetensors", "absurd.safetensors whole"),
    "vae with absurd sizes": ("--vae sizes.safetensors", "sizes.safetensors whole"),
    "vae with overlapping offsets": ("--vae overlap.safetensors", "overlap.safetensors whole"),
    "vae without its second half": ("--vae half_encoder.safetensors", "half_decoder.safetensors"),
    "vae with missing weights": ("--vae part.safetensors", "part.safetensors"),
    "an empty folder": ("--vae empty", "empty"),
    "size that does not fit": ("--size 36", "--size 8"),
    "patch that does not fit": ("--patch_size 3", "--size 24"),
    "model unknown": ("--model huge", "--model"),
    "no steps": ("--steps 0", "--steps 1"),
    "guidance without classes": ("--no-class_cond --cfg_scale 2", "--class_cond"),
    "accum that does not divide": ("--accum 3", "--accum 3 16"),
    "sample without a model": ("--sample 4", "--ckpt"),
    "a model that is none": ("--sample 4 --ckpt half_encoder.safetensors", "half_encoder.safetensors"),
    "resume from weights": ("--resume smoke.safetensors", "smoke.safetensors ckpt.pt"),
    "another model on resume": ("--resume ckpt.pt --model S", "--model ckpt.pt"),
    "interval upside down": ("--cfg_interval 0.9 0.1", "--cfg_interval"),
    "preset unknown": ("--preset tpu", "--preset"),
    "label without sampling": ("--label cat", "--label --sample"),
    "a decoder without its encoder": ("--vae lonely_decoder.safetensors", "lonely_encoder.safetensors"),
    "a folder that cannot be made": ("--out smoke.safetensors/run", "--out smoke.safetensors/run"),
    "a configuration that is none": ("--vae odd", "odd config.json"),
}


@pytest.fixture(scope="module")
def bad_files(prepared, tmp_path_factory):
    path, here = tmp_path_factory.mktemp("bad"), os.getcwd()
    os.chdir(path)
    shutil.copytree(prepared / "data", "data")
    shutil.copy(prepared / "out/smoke/model.safetensors", "smoke.safetensors")
    shutil.copy(prepared / "out/smoke/ckpt.pt", "ckpt.pt")
    Path("cut.safetensors").write_bytes(Path("smoke.safetensors").read_bytes()[:-100])
    Path("absurd.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    write_safetensors("sizes.safetensors", {"a": flat(0, 4, [2 ** 60, 2 ** 60])}, b"1234")
    write_safetensors("overlap.safetensors", {"a": flat(0, 8, [2]), "b": flat(4, 12, [2])}, b"0" * 12)
    mm.save_safetensors(Path("half_encoder.safetensors"), {"14.bias": torch.zeros(4)}, {})
    mm.save_safetensors(Path("part.safetensors"), {"encoder.14.bias": torch.zeros(4)}, {})
    mm.save_safetensors(Path("lonely_decoder.safetensors"), {"14.bias": torch.zeros(4)}, {})
    mm.save_safetensors(Path("other.safetensors"), {"patch.weight": torch.zeros(4)}, {})
    Path("empty").mkdir()
    Path("odd").mkdir()
    from diffusers import AutoencoderKL
    AutoencoderKL(**KL, **KINDS["sd"]).save_pretrained("odd")
    config = json.loads(Path("odd/config.json").read_text())
    Path("odd/config.json").write_text(json.dumps({**config, "norm_num_groups": 0}))
    os.chdir(here)
    return path


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_gets_one_sentence(case, bad_files, monkeypatch, capsys):
    monkeypatch.chdir(bad_files)
    argv, words = BAD[case][0].split(), BAD[case][1].split()
    extra = ["--device", "cpu"] if "--resume" in argv or "--sample" in argv else SMALL
    try:
        status = run(*extra, *argv)
    except SystemExit as e:
        status = e.code
    out = capsys.readouterr()
    said = [line for line in out.err.splitlines() if line.startswith("latent_dit.py:")]
    assert status == 2 and len(said) == 1 and "Traceback" not in out.err, (status, out.err)
    assert all(word in said[0] for word in words) and len(said[0]) < 400, said


@real_weights
def test_photographs_before_and_after(capsys, tmp_path):
    """Photographs against the same after a round trip through TAESD, by fid.py's features: far nearer to each other than
    to other photographs. (Random features: Inception's weights cannot be had without a network.)"""
    import fid
    vae = mm.read_vae(*mm.find_vae(str(SHARED / "taesd/taesd_encoder.safetensors")))
    folders = [SHARED / "afhq_folder/cat", SHARED / "afhq_folder/wild", tmp_path / "again"]
    folders[2].mkdir()
    for file in sorted(folders[0].glob("*.jpg")):
        x = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            Image.fromarray(mm.to_uint8(vae.decode(vae.encode(x)))[0]).save(folders[2] / f"{file.stem}.png")
    found = []
    for other in folders[1:]:
        assert fid.main([str(folders[0]), str(other), "--network", "random", "--device", "cpu", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["fid"])
    assert 0 < found[1] < 0.2 * found[0]
