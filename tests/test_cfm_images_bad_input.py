"""cfm_images.py when something is wrong: the tests of ddpm_images.py with the names of the two scripts exchanged, without
what only a diffusion has, and with what only a flow can get wrong."""
import shutil
from pathlib import Path

import numpy as np
import pytest

source = Path(__file__).with_name("test_ddpm_images_bad_input.py").read_text(encoding="utf-8")
for old, new in (("ddpm_images", "?"), ("cfm_images", "ddpm_images"), ("?", "cfm_images")):
    source = source.replace(old, new)
source = source.replace('save_gray_model(Path("bad/gray.safetensors"))', "pass")  # of a model that translates pictures
exec(compile(source, __file__, "exec"))

SKIP = ("condition", "lowres", "gray.safetensors", "--eta", "steep", "euler", "1001", "input for a model")
CASES = {k: v for k, v in CASES.items() if not any(word in f"{k} {v}" for word in SKIP)}  # noqa: F821
MODEL = "out/cfm_images/model.safetensors"
CASES |= {
    **{f"{flag} {value}": (TRAIN, f"--{flag}={value}", f"--{flag}") for flag, value in [  # noqa: F821
        ("tol", 0), ("tol", 2), ("tol", "nan"), ("shift", 0), ("shift", "inf"), ("pairs", 0), ("times", "never"),
        ("coupling", "sinkhorn"), ("pred", "eps"), ("sampler", "ddpm")]},
    "interval of one time": (TRAIN, "--cfg_interval 0.5", "--cfg_interval"),
    "interval the wrong way": (TRAIN, "--cfg_interval 0.8 0.2", "--cfg_interval"),
    "interval beyond 1": (TRAIN, "--cfg_interval 0 1.5", "--cfg_interval"),
    "meanflow with a solver": (TRAIN, "--meanflow --sampler heun", "--meanflow --sampler"),
    "meanflow with guidance": (TRAIN, "--meanflow --class_cond --cfg_scale 2", "--meanflow --cfg_scale"),
    "meanflow compiled": (TRAIN, "--meanflow --compile", "--meanflow --compile"),
    "meanflow and reflow": (TRAIN, f"--meanflow --reflow {MODEL}", "--reflow --init_from"),
    "interval without guidance": (TRAIN, "--cfg_interval 0.1 0.8", "--cfg_interval --cfg_scale"),
    "tol without dopri5": (TRAIN, "--tol 0.01 --sampler heun", "--tol dopri5"),
    "tol too fine for bf16": (SAMPLE, f"--ckpt {MODEL} --sampler dopri5 --tol 1e-9 --dtype bf16", "--tol --dtype"),
    "guidance without classes": (TRAIN, "--cfg_scale 2", "--cfg_scale --class_cond"),
    "reflow of nothing": (TRAIN, "--reflow nowhere.safetensors", "nowhere.safetensors"),
    "reflow of a ckpt.pt": (TRAIN, "--reflow out/cfm_images/ckpt.pt", "ckpt.pt"),
    "reflow of another script": (TRAIN, "--reflow bad/other.safetensors", "bad/other.safetensors ddpm_images.py"),
    "reflow of another width": (TRAIN, f"--reflow {MODEL} --width 64", f"--width 64 {MODEL} 32"),
    "reflow over its teacher": (TRAIN, f"--reflow {MODEL} --out out/cfm_images", f"{MODEL} --out"),
    "reflow with a coupling": (TRAIN, f"--reflow {MODEL} --coupling ot", "--reflow --coupling"),
    "reflow and sample": (SAMPLE, f"--ckpt {MODEL} --reflow {MODEL}", "--reflow --ckpt"),  # noqa: F821
    "reflow with too few pairs": (TRAIN, f"--reflow {MODEL} --pairs 3", "--pairs 16"),
    "init_from: missing": (TRAIN, "--init_from nowhere.safetensors", "nowhere.safetensors"),
    "init_from: another script": (TRAIN, "--init_from bad/other.safetensors", "bad/other.safetensors ddpm_images.py"),
    "init_from: another width": (TRAIN, f"--init_from {MODEL} --width 64", f"--width 64 {MODEL} 32"),
    "init_from: overwritten": (TRAIN, f"--init_from {MODEL} --out out/cfm_images", f"{MODEL} --out"),
    "init_from and reflow": (TRAIN, f"--init_from {MODEL} --reflow {MODEL}", "--init_from --reflow"),
    "init_from and sample": (SAMPLE, f"--init_from {MODEL} --ckpt {MODEL}", "--init_from --sample"),  # noqa: F821
    "init_from and resume": ([], f"--init_from {MODEL} --resume out/cfm_images/ckpt.pt", "--init_from --resume"),
    "from_ddpm: missing": (SAMPLE, "--from_ddpm nowhere", "nowhere"),
    "from_ddpm: a flow": (SAMPLE, f"--from_ddpm {MODEL}", f"{MODEL} cfm_images.py ddpm_images.py"),
    "from_ddpm and ckpt": (SAMPLE, f"--from_ddpm {MODEL} --ckpt {MODEL}", "--from_ddpm --ckpt"),
    "from_ddpm and resume": ([], f"--from_ddpm {MODEL} --resume out/cfm_images/ckpt.pt", "--resume"),
    "from_ddpm and meanflow": (SAMPLE, f"--from_ddpm {MODEL} --meanflow", "--from_ddpm --meanflow"),  # noqa: F821
    "fresh noise for pairs": (TRAIN, "--coupling ot --sampler ancestral", "ancestral --coupling"),  # noqa: F821
    "input with fresh noise": (SAMPLE, f"--ckpt {MODEL} --input bad/flat --sampler ancestral", "--input ancestral"),
    "input missing": (SAMPLE, f"--ckpt {MODEL} --sampler heun --input nowhere", "nowhere"),
    "input empty": (SAMPLE, f"--ckpt {MODEL} --sampler heun --input bad/empty", "--input bad/empty"),
    "input broken": (SAMPLE, f"--ckpt {MODEL} --sampler heun --input bad/tenth --sample 20", "--input bad/tenth 05.png"),
}
del test_eta_of_the_checkpoint_and_another_sampler, test_the_smallest_set  # noqa: F821


@pytest.mark.parametrize("case", CASES)
def test_wrong_input(case, capsys, monkeypatch):
    check_wrong_input(CASES[case], capsys, monkeypatch)  # noqa: F821


@pytest.mark.parametrize("flags", ["--class_cond --cfg_scale 2", "--meanflow --accum 8", "--coupling ot"])
def test_the_smallest_set(flags, capsys):
    """16 pictures, one of them held out, are enough for all that a run draws at its end."""
    images = np.load("pictures.npz")["images"][:16]
    np.savez("new.npz", images=images, labels=np.arange(16) % 2)
    assert run([*TRAIN, "--data", "new.npz", *flags.split()], capsys) == (0, "")  # noqa: F821
    assert Path("new/nfe.png").exists() and Path("new/interpolation.png").exists()


def test_reflow_resumes_only_with_its_teacher(capsys):
    shutil.copytree("out/cfm_images", "new_teacher")
    flags = [*TINY, "--reflow", "new_teacher/model.safetensors", "--pairs", "20"]  # noqa: F821
    assert run([*flags, "--out", "new"], capsys) == (0, "")  # noqa: F821
    shutil.rmtree("new_teacher")
    status, err = run(["--resume", "new/ckpt.pt", "--steps", "3"], capsys)  # noqa: F821
    assert status == 2 and "new_teacher/model.safetensors" in the_sentence(err)  # noqa: F821
