"""Flags that all training scripts of pictures have, and that no other test sets."""
import importlib

import pytest
import torch

SMALL = "--smoke --data drawn_faces --device cpu --dtype fp32".split()
each = pytest.mark.parametrize("script", ["ddpm_images", "cfm_images", "latent_dit", "text2img"])


def trained(module, out, *flags):
    assert module.main([*SMALL, "--out", out, *flags]) == 0
    return module.load_safetensors(f"{out}/model.safetensors")[0]


@each
def test_compile_seed_and_ema_decay(script, tmp_path, monkeypatch):
    """The network is one graph that gives the same, by the part of the compiler before C++; another seed another."""
    monkeypatch.chdir(tmp_path)
    module, compile = importlib.import_module(script), torch.nn.Module.compile
    monkeypatch.setattr(module, "draw_pictures", lambda *more, **how: 0.0)
    monkeypatch.setattr(module, "sample_only", lambda args: None)
    plain, other = trained(module, "plain"), trained(module, "other", "--seed", "1", "--ema_decay", "0")
    assert any(not torch.equal(plain[k], other[k]) for k in plain)
    raw = {out: torch.load(f"{out}/ckpt.pt", weights_only=True)["model"] for out in ("plain", "other")}
    assert all(torch.equal(raw["other"][k], other[k]) for k in raw["other"]), "--ema_decay 0: no average"
    assert any(not torch.equal(raw["plain"][k], plain[k]) for k in raw["plain"])
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(compile(
        self, backend="aot_eager", fullgraph=True)))
    same = trained(module, "compiled", "--compile")
    assert compiled and all(torch.allclose(plain[k], same[k], atol=1e-4) for k in plain)


@pytest.mark.parametrize("script", ["ddpm_images", "cfm_images"])
def test_flip(script, tmp_path, monkeypatch):
    """--no-flip: no picture is learnt as its mirror image."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "draw_pictures", lambda *more, **how: 0.0)
    monkeypatch.setattr(module, "sample_only", lambda args: None)
    batches, batch = [], module.train_batch
    monkeypatch.setattr(module, "train_batch", lambda *more: batches.append(batch(*more)) or batches[-1])
    for flag in ("--no-flip", "--flip"):
        trained(module, "out", flag)
    straight, mirrored = batches[0][0], batches[2][0]
    same = [torch.equal(a, b) for a, b in zip(straight, mirrored)]
    assert len(batches) == 4 and 0 < sum(same) < len(same)
    assert all(a or torch.equal(x.flip(-1), y) for a, x, y in zip(same, straight, mirrored))
