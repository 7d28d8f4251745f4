"""Flags that several scripts have, and that no other test sets; flags that would do nothing; and that each is tested."""
import importlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent

SMALL = "--smoke --data drawn_faces --device cpu --dtype fp32".split()
each = pytest.mark.parametrize("script", ["latent_dit", "text2img"])


def trained(module, out, *flags):
    assert module.main([*SMALL, "--out", out, *flags]) == 0
    return module.load_safetensors(f"{out}/model.safetensors")[0]


@each
def test_compile_seed_batch_size_and_ema_decay(script, tmp_path, monkeypatch):
    """The network is one graph that gives the same, by the part of the compiler before C++; another seed another.
    --batch_size is what a step sees in all, whatever --accum splits it into."""
    monkeypatch.chdir(tmp_path)
    module, compile = importlib.import_module(script), torch.nn.Module.compile
    monkeypatch.setattr(module, "draw_pictures", lambda *more, **how: 0.0)
    monkeypatch.setattr(module, "sample_only", lambda args: None)
    plain, seen, batch = trained(module, "plain"), [], module.train_batch
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_batch", lambda *more: seen.append(batch(*more)) or seen[-1])
        other = trained(module, "other", *"--seed 1 --ema_decay 0 --batch_size 6 --accum 3".split())
    assert [len(parts[0]) for parts in seen] == [6, 6]
    assert any(not torch.equal(plain[k], other[k]) for k in plain)
    raw = {out: torch.load(f"{out}/ckpt.pt", weights_only=True)["model"] for out in ("plain", "other")}
    assert all(torch.equal(raw["other"][k], other[k]) for k in raw["other"]), "--ema_decay 0: no average"
    assert any(not torch.equal(raw["plain"][k], plain[k]) for k in raw["plain"])
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(compile(
        self, backend="aot_eager", fullgraph=True)))
    same = trained(module, "compiled", "--compile")
    assert compiled and all(torch.allclose(plain[k], same[k], atol=1e-4) for k in plain)


@pytest.mark.parametrize("script", ["ddpm_2d", "cfm_2d"])
def test_seed_and_ema_decay_in_the_plane(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "show", lambda *more, **how: None)
    monkeypatch.setattr(module, "report", lambda *more, **how: {})
    few = "--steps 3 --batch_size 8 --width 8 --depth 1 --features 4 --sample_steps 2 --device cpu".split()
    made = {}
    for out, flags in dict(plain=[], same=["--seed", "0"], other=["--seed", "1"], raw=["--ema_decay", "0"]).items():
        assert module.main([*few, "--out", out, *flags]) == 0
        made[out] = load_file(f"{out}/model.safetensors")
    differ = {out for out in made if any(not torch.equal(made["plain"][k], made[out][k]) for k in made[out])}
    assert differ == {"other", "raw"}
    trained = torch.load("raw/ckpt.pt", weights_only=True)["model"]
    assert all(torch.equal(trained[k], made["raw"][k]) for k in trained), "--ema_decay 0: no average"


@each
def test_preset(script):
    """--preset gpu on a CPU: its settings, but for those given by hand."""
    module = importlib.import_module(script)
    args = vars(module.parse_args("--preset gpu --device cpu --model S --lr 0.5".split()))
    wanted = module.PRESETS["gpu"] | {"model": "S", "lr": 0.5}
    assert len(wanted) > 5 and {k: args[k] for k in wanted} == wanted


@each
def test_shift(script, tmp_path, monkeypatch):
    """Every grid of times that a run solves along is shifted so, and the times it is trained at."""
    monkeypatch.chdir(tmp_path)
    module, seen = importlib.import_module(script), []
    monkeypatch.setattr(module, "draw_pictures", lambda *more, **how: 0.0)
    for name in ("time_grid", "logit_normal"):
        monkeypatch.setattr(module, name, lambda n, shift, *more, real=getattr(module, name), name=name: seen.append(
            (name, shift)) or real(n, shift, *more))
    trained(module, "out", "--time_shift", "2.5")
    assert set(seen) == {("time_grid", 2.5), ("logit_normal", 2.5)}


def test_earlier_pictures_stay_until_the_new_ones_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, folder = importlib.import_module("latent_dit"), Path("out/generated")
    monkeypatch.setattr(module, "draw_pictures", lambda *more, **how: 0.0)
    trained(module, "out")  # draws 4

    def pictures():
        return {file.name: file.read_bytes() for file in (*folder.iterdir(), Path("out/generated.png"))}

    def stop(*more, **how):
        raise KeyboardInterrupt
    publish = module.publish
    again = "--sample 2 --ckpt out/model.safetensors --seed 1 --device cpu".split()
    (folder / "metadata.jsonl").write_text("captions of text2img.py's pictures, which were here")
    before = pictures()
    monkeypatch.setattr(module, "publish", stop)
    assert module.main(again) == 130 and len(before) == 6 and pictures() == before
    assert len(list(Path("out/generated.part").iterdir())) == 2
    monkeypatch.setattr(module, "publish", publish)
    assert module.main(again) == 0 and len(pictures()) == 3 and not Path("out/generated.part").exists()
    assert all(before[name] != new for name, new in pictures().items())


def test_a_model_that_draws_nan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("latent_dit")
    monkeypatch.setattr(module, "draw_pictures", lambda *more, **how: 0.0)
    trained(module, "out")
    path = Path("out/model.safetensors")
    tensors, about = module.load_safetensors(path)
    module.save_safetensors(path, {k: v * torch.nan if k.endswith("out.bias") or k.endswith("out.weight") else v
                                   for k, v in tensors.items()}, about)
    capsys.readouterr()
    assert module.main("--sample 2 --ckpt out/model.safetensors --device cpu --out nan".split()) == 1
    assert "NaN" in capsys.readouterr().err and not Path("nan").exists()


@pytest.mark.parametrize("script", ["latent_dit", "text2img", "finetune_lora"])
def test_guidance_is_not_in_bf16(script):
    """The difference of two answers in bf16, of which guidance takes several times, is theirs in fp32."""
    module, xt, t = importlib.import_module(script), torch.zeros(3, 4), torch.full((3,), 0.5)
    answers = torch.tensor([1.0, 0.99609375]).repeat_interleave(3)[:, None].expand(6, 4).bfloat16()

    class Model:
        y_null = 0

        def __call__(self, *asked):
            return answers
    told = ([torch.ones(3)], [torch.zeros(3)]) if script != "latent_dit" else (torch.ones(3, dtype=torch.long),)
    v = module.guided(Model(), *told, 3.3, [0.0, 1.0])(xt, t)
    with_it, without = answers.float().chunk(2)
    assert v.dtype == torch.float32 and torch.equal(v, without + 3.3 * (with_it - without))


DRAW = "--sample 4 --ckpt model.safetensors"
LORA = "--sample 4 --prompt x --lora lora.safetensors"
WITHOUT_EFFECT = [
    ("ddpm_2d", f"{DRAW} --steps 5", "--steps is for training; for drawing say --sample_steps"),
    ("ddpm_2d", f"{DRAW} --lr 1", "--lr is for training"),
    ("ddpm_2d", "--oracle --steps 5", "--steps is for training; for drawing say --sample_steps"),
    ("cfm_2d", f"{DRAW} --coupling ot", "--coupling is for training"),
    ("cfm_2d", "--from_ddpm model.safetensors --lr 1", "--lr is for training"),
    ("cfm_2d", "--sigma 0.1 --coupling ot", "--sigma is for --coupling sinkhorn alone"),
    ("cfm_2d", "--coupling_size 64", "--coupling_size is for --coupling ot and sinkhorn"),
    *((script, "--data . --out x/y", "--out x/y lies in --data .: its pictures would be learnt the next time")
      for script in ("latent_dit", "text2img", "finetune_lora")),
    ("ddpm_2d", "--oracle --sample 5", "--oracle needs no model: leave out --sample and --resume"),
    ("cfm_2d", "--oracle --sample 5", "--sample, --oracle and --from_ddpm exclude one another"),
    ("latent_dit", f"{DRAW} --compile", "--compile is for training"),
    ("latent_dit", f"{DRAW} --repa", "--repa is for training"),
    ("latent_dit", f"{DRAW} --grad_checkpoint", "--grad_checkpoint is for training"),
    ("latent_dit", "--repa_until 5", "--repa_until is for --repa alone"),
    ("latent_dit", "--vae none --vae_steps 5", "--vae_steps is for --vae tiny alone"),
    ("latent_dit", "--cfg_scale 1 --cfg_interval 0 0.5", "--cfg_interval without --cfg_scale changes nothing"),
    ("text2img", f"{DRAW} --grad_checkpoint", "--grad_checkpoint is for training"),
    ("text2img", "--vae none --vae_steps 5", "--vae_steps is for --vae tiny alone"),
    ("text2img", "--cfg_scale 1 --cfg_interval 0 0.5", "--cfg_interval without --cfg_scale changes nothing"),
    ("finetune_lora", f"{LORA} --steps 5", "--steps is for training; for drawing say --sample_steps"),
    ("finetune_lora", f"{LORA} --rank 2", "--rank is for training"),
    ("finetune_lora", f"{LORA} --no-flip", "--flip is for training"),
    ("finetune_lora", f"{LORA} --min_snr 2", "--min_snr is for training")]


@pytest.mark.parametrize("script, line, sentence", WITHOUT_EFFECT)
def test_a_flag_without_effect_is_refused(script, line, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as e:
        module.parse_args([*line.split(), "--device", "cpu"])
    assert e.value.code == 2 and f"{script}.py: {sentence}; --help" in capsys.readouterr().err


def test_each_flag_is_set_by_a_test():
    """By one of the script's own, or by one of this file that is run with it. The two image scripts share their tests."""
    here = Path(__file__).read_text()
    for file in sorted(ROOT.glob("*.py")):
        name = "*_images" if file.stem.endswith("_images") else file.stem
        own = "".join(test.read_text() for test in sorted((ROOT / "tests").glob(f"test_{name}*.py")))
        tests = own + (here if file.stem in here else "")
        flags = re.findall(r'(?<!early)\.add_argument\("--(\w+)', file.read_text())
        missing = [flag for flag in flags if not re.search(rf"--(no-)?{flag}\b", tests)]
        assert flags and not missing, f"{file.name}: no test sets --{', --'.join(missing)}"
