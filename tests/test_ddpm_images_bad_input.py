"""ddpm_images.py when something is wrong: one sentence that names the culprit, the right exit status, nothing lost.

2 is for wrong input, 1 for a failure at run time, 130 and 143 for Ctrl-C and SIGTERM (DESIGN.md section 7)."""
import contextlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_images as d

SCRIPT = Path(d.__file__)
TINY = ("--size 16 --patch 4 --width 32 --mults 1 --blocks 1 --batch_size 8 --steps 2 --eval_every 1 "
        "--sample_steps 2").split()
CKPT, MODEL = "out/ddpm_images/ckpt.pt", "out/ddpm_images/model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a finished run of two steps in out/ddpm_images, a model that colourises, and bad/ full of traps."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
        np.savez("pictures.npz", images=images)
        make_traps(Path("bad"), images)
        with tame():
            assert d.main([*TINY, "--data", "pictures.npz", "--device", "cpu"]) == 0
            spoil_checkpoints(Path("bad"))
            save_gray_model(Path("bad/gray.safetensors"))
    return folder


class tame:
    """One thread, and afterwards the signals as before: a run of the script changes what they do."""

    def __enter__(self):
        self.handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)  # tiny models: two threads only wait for each other, for long on a busy machine

    def __exit__(self, *error):
        torch.set_num_threads(self.threads)
        for number, handler in self.handlers:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    """Each test runs in `home`, and leaves what was there as it was; the names of its own output start with "new"."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", [SCRIPT.name])  # argparse names the program after it
    kept = [home / "pictures.npz", *home.glob("out/**/*"), *home.glob("data/**/*")]
    before = {p: p.read_bytes() for p in kept if p.is_file()}
    with tame():
        yield
    lost = [p for p, content in before.items() if not p.exists() or p.read_bytes() != content]
    half = list(home.rglob("*.part"))
    for p in lost:
        p.write_bytes(before[p])  # so that one failure does not fail the tests after it
    for p in [*half, *home.glob("new*")]:
        shutil.rmtree(p) if p.is_dir() else p.unlink()
    assert (lost, half) == ([], [])


def png(i):
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (i, 99, 200)).save(file, "PNG")
    return file.getvalue()


def make_traps(bad, images):
    def write(name, content):
        (bad / name).parent.mkdir(parents=True, exist_ok=True)
        (bad / name).write_bytes(content)
    (bad / "empty").mkdir(parents=True)
    for i in range(20):
        write(f"tenth/{i:02}.png", b"broken" if i in (5, 9) else png(i))
        write(f"flat/{i:02}.png", png(i))
        write(f"texts/{i}.txt", b"no picture")
    for i in range(5):
        write(f"five/{i}.png", png(i))
    write("text.txt", b"hello\n" * 99)
    write("text.npz", b"hello\n" * 99)
    write("nothing.npz", b"")
    write("text.zip", b"hello\n" * 99)
    write("cut.npz", Path("pictures.npz").read_bytes()[:9000])
    with zipfile.ZipFile(bad / "no_pictures.zip", "w") as z:
        z.writestr("readme.txt", "hello")
    for name in ("no_pictures.zip", "pictures.npz"):  # whole at its end, but what it lists there is not
        content = (bad / name if name.endswith("zip") else Path(name)).read_bytes()
        write(f"list{name[-4:]}", content.replace(b"PK\x01\x02", b"PK\x07\x07"))
    np.savez(bad / "floats.npz", images=images / 255.0)
    np.savez(bad / "gray.npz", images=images[..., 0])
    np.savez(bad / "names.npz", pictures=images)
    np.savez(bad / "number.npz", images=np.uint8(7))
    np.savez(bad / "flat_objects.npz", images=np.array([images[0], None], dtype=object))
    np.savez(bad / "no_pixels.npz", images=images[:, :0])
    np.savez(bad / "labels.npz", images=images, labels=np.arange(39))
    np.savez(bad / "label_pairs.npz", images=images, labels=np.zeros((40, 2), int))
    with open(bad / "array.npz", "wb") as f:
        np.save(f, images)  # an .npy with the wrong name


def edited(state, path, value=None, drop=False):
    """A copy of nested dicts in which state[path[0]][path[1]]... is another value, or gone."""
    state = dict(state)
    if len(path) > 1:
        state[path[0]] = edited(state[path[0]], path[1:], value, drop)
    elif drop:
        del state[path[0]]
    else:
        state[path[0]] = value
    return state


def spoil_checkpoints(bad):
    whole, raw = torch.load(CKPT, weights_only=True), Path(CKPT).read_bytes()
    weight = next(k for k in whole["model"] if whole["model"][k].ndim == 4)
    spoilt = {
        "other": edited(whole, ["script"], "cfm_images.py"), "list": [1, 2], "args_none": edited(whole, ["args"], None),
        "no_opt": edited(whole, ["opt"], drop=True), "no_args": edited(whole, ["args"], drop=True),
        "no_lr": edited(whole, ["args", "lr"], drop=True), "lr_word": edited(whole, ["args", "lr"], "fast"),
        "mults_words": edited(whole, ["args", "mults"], ["1", "2"]), "blocks_0": edited(whole, ["args", "blocks"], 0),
        "condition": edited(whole, ["args", "condition"], "smell"), "step_word": edited(whole, ["step"], "two"),
        "batch_0": edited(whole, ["args", "batch_size"], 0), "step_minus": edited(whole, ["step"], -7),
        "model_number": edited(whole, ["model"], 5), "weight_word": edited(whole, ["model", weight], "big"),
        "no_weight": edited(whole, ["model", weight], drop=True), "no_best": edited(whole, ["best"], drop=True),
        "shape": edited(whole, ["model", weight], torch.zeros(2, 3)),
        "ema_shape": edited(whole, ["ema", weight], torch.zeros(2, 3)), "key": edited(whole, ["key"], "0123"),
        "opt_list": edited(whole, ["opt"], [1]), "opt_groups": edited(whole, ["opt", "param_groups"], []),
        "opt_shape": edited(whole, ["opt", "state", 0, "exp_avg"], torch.zeros(2, 3)),
        "opt_empty": edited(whole, ["opt", "state"], {}),
        "opt_word": edited(whole, ["opt", "state", 0, "exp_avg"], "half"),
    }
    for name, state in spoilt.items():
        torch.save(state, bad / f"{name}.pt")
    (bad / "cut.pt").write_bytes(raw[:len(raw) // 2])
    (bad / "text.pt").write_bytes(b"hello\n" * 99)
    (bad / "nothing.pt").write_bytes(b"")
    torch.save(Image.new("RGB", (2, 2)), bad / "pickle.pt")

    tensors, about = d.load_safetensors(MODEL)
    args, data = json.loads(about["args"]), json.loads(about["data"])
    headers = {
        "other": edited(about, ["script"], "cfm_images.py"), "no_about": {},
        "no_args": edited(about, ["args"], drop=True),
        "args_text": edited(about, ["args"], "{"), "args_list": edited(about, ["args"], "[]"),
        "data_text": edited(about, ["data"], "{"),
        "classes": edited(about, ["data"], json.dumps({**data, "classes": 3})),
        **{f"{k}_{v if isinstance(v, (int, str)) else 'list'}": edited(about, ["args"], json.dumps({**args, k: v}))
           for k, v in (("width", 64), ("width", "32"), ("width", -32), ("mults", ["1"]), ("patch", 0),
                        ("condition", "smell"), ("schedule", "steep"), ("pred", "w"), ("class_cond", True))}}
    for name, header in headers.items():
        d.save_safetensors(bad / f"{name}.safetensors", tensors, header)
    raw = Path(MODEL).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    text = json.dumps({**json.loads(raw[8:8 + length]), "__metadata__": ["pt"]}).encode()
    (bad / "meta_list.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length:])
    (bad / "cut.safetensors").write_bytes(raw[:-1000])


def save_gray_model(path):
    tensors, about = d.load_safetensors(MODEL)
    args = d.parse_args([*TINY, "--condition", "gray", "--device", "cpu"])
    model = d.build_model(args, 1)
    settings = {**json.loads(about["args"]), "condition": "gray"}
    d.save_safetensors(path, model.state_dict(), {**about, "args": json.dumps(settings)})


def the_sentence(err):
    """The one sentence on stderr."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[-1].startswith(f"{SCRIPT.name}: ") and len(lines[-1]) < 500, err
    return lines[-1]


def run(argv, capsys):
    """-> the exit status and stderr of the script, called in this process, on the CPU unless `argv` says otherwise."""
    capsys.readouterr()
    try:
        status = d.main(["--device", "cpu", *argv])
    except SystemExit as stop:  # argparse
        status = stop.code
    return status, capsys.readouterr().err


SAMPLE = ["--sample", "2", "--sample_steps", "2", "--out", "new"]
TRAIN = [*TINY, "--data", "pictures.npz", "--out", "new"]
CASES = {  # what is wrong: (arguments before, arguments, words that the sentence has to say)
    # --data
    "no such path": (TRAIN, "--data nowhere/photos", "nowhere/photos"),
    "no such npz": (TRAIN, "--data nowhere.npz", "nowhere.npz"),
    "empty folder": (TRAIN, "--data bad/empty", "bad/empty 0"),
    "folder of text files": (TRAIN, "--data bad/texts", "bad/texts 0"),
    "five pictures": (TRAIN, "--data bad/five", "bad/five 5 16"),
    "a text file": (TRAIN, "--data bad/text.txt", "bad/text.txt"),
    "a picture": (TRAIN, "--data bad/flat/00.png", "bad/flat/00.png"),
    "text named zip": (TRAIN, "--data bad/text.zip", "bad/text.zip"),
    "zip with a damaged list": (TRAIN, "--data bad/list.zip", "bad/list.zip"),
    "zip without pictures": (TRAIN, "--data bad/no_pictures.zip", "bad/no_pictures.zip 0"),
    "10 % broken": (TRAIN, "--data bad/tenth", "bad/tenth 05.png"),
    **{f"npz: {name}": (TRAIN, f"--data bad/{name}.npz", f"bad/{name}.npz") for name in
       "text nothing cut list floats gray names number flat_objects no_pixels labels label_pairs array".split()},
    # --resume: here the first arguments are none, so that what the checkpoint says is what counts
    "resume: missing": ([], "--resume nowhere.pt", "--resume nowhere.pt"),
    "resume: a folder": ([], "--resume bad", "--resume bad"),
    "resume: a model.safetensors": ([], f"--resume {MODEL}", f"--resume {MODEL}"),
    **{f"resume: {name}": ([], f"--resume bad/{name}.pt --steps 3 --out new", f"bad/{name}.pt {words}")
       for name, words in {
        "other": "cfm_images.py", "cut": "", "text": "", "nothing": "", "pickle": "", "list": "", "no_opt": "",
        "no_args": "", "args_none": "", "no_lr": "lr", "lr_word": "lr", "mults_words": "mults", "blocks_0": "blocks",
        "condition": "condition", "batch_0": "batch_size", "step_word": "", "step_minus": "step", "model_number": "",
        "weight_word": "", "no_weight": "weight", "no_best": "best", "shape": "[2, 3]", "ema_shape": "[2, 3]",
        "opt_list": "", "opt_groups": "", "opt_shape": "", "opt_empty": "", "opt_word": "",
        "key": "pictures.npz"}.items()},
    "resume: another --seed": ([], f"--resume {CKPT} --seed 5", f"--seed 5 {CKPT} 0"),
    "resume: another --seed with =": ([], f"--resume {CKPT} --seed=5", f"--seed 5 {CKPT} 0"),
    "resume: another --size": ([], f"--resume {CKPT} --size 32", f"--size 32 {CKPT} 16"),
    "resume: --no-flip": ([], f"--resume {CKPT} --no-flip", f"flip {CKPT}"),
    "resume: other --data": ([], f"--resume {CKPT} --data bad/flat", f"--data bad/flat {CKPT}"),
    "resume: fewer --steps than done": ([], f"--resume {CKPT} --steps 1", f"--steps {CKPT} 2"),
    # numbers
    "size not divisible": (TRAIN, "--size 18", "--size 4"),
    "size not divisible by the halvings": (TRAIN, "--size 20 --mults 1,2", "--size 8"),
    **{f"{flag} {value}": (TRAIN, f"--{flag}={value}", f"--{flag}") for flag, value in [
        ("size", 0), ("steps", 0), ("steps", -1), ("steps", "many"), ("batch_size", 0), ("batch_size", 2.5),
        ("accum", 3), ("accum", 0), ("blocks", 0), ("width", 40), ("patch", 0), ("mults", "1,0"), ("mults", "1;2"),
        ("mults", ""), ("lr", "nan"), ("lr", -1), ("lr", "inf"), ("dropout", 2), ("ema_decay", 1.5), ("eval_every", 0),
        ("eta", -1), ("sample_steps", 0), ("sample_steps", 1001), ("seed", -1), ("cfg_scale", "nan"), ("min_snr", -5),
        ("sampler", "euler"), ("schedule", "steep"), ("dtype", "fp8"), ("condition", "smell"), ("preset", "tpu")]},
    "lowres of a size without quarters": (TRAIN, "--condition lowres --size 18 --patch 2", "--size lowres"),
    # flags
    "unknown flag": (TRAIN, "--learning_rate 1", "--learning_rate"),
    "abbreviated flag": (TRAIN, "--batch 8", "--batch"),
    "value missing": (TRAIN, "--data", "--data"),
    "device value missing": (TRAIN, "--device", "--device"),
    "a word too many": (TRAIN, "photos", "photos"),
    "device nonsense": (TRAIN, "--device nonsense", "--device nonsense"),
    "device that holds nothing": (TRAIN, "--device meta", "--device meta"),
    "device that is not here": (TRAIN, "--device cuda:77", "--device cuda:77"),
    "class_cond without classes": (TRAIN, "--class_cond", "--class_cond"),
    "class_cond, one folder": (TRAIN, "--class_cond --data bad/flat", "--class_cond"),
    # --sample
    "sample 0": ([], f"--sample 0 --ckpt {MODEL}", "--sample"),
    "sample -3": ([], f"--sample -3 --ckpt {MODEL}", "--sample"),
    "sample without ckpt": ([], "--sample 4", "--sample --ckpt"),
    "ckpt without sample": ([], f"--ckpt {MODEL}", "--sample --ckpt"),
    "resume with sample": ([], f"--sample 4 --ckpt {MODEL} --resume {CKPT}", "--sample --resume"),
    "input without sample": (TRAIN, "--input bad/flat", "--sample --input"),
    "ckpt missing": (SAMPLE, "--ckpt nowhere.safetensors", "nowhere.safetensors"),
    "ckpt is a folder": (SAMPLE, "--ckpt bad", "bad"),
    "ckpt is a ckpt.pt": (SAMPLE, f"--ckpt {CKPT}", CKPT),
    "ckpt is text": (SAMPLE, "--ckpt bad/text.txt", "bad/text.txt"),
    "ckpt is empty": (SAMPLE, "--ckpt bad/nothing.pt", "bad/nothing.pt"),
    **{f"ckpt: {name}": (SAMPLE, f"--ckpt bad/{name}.safetensors", f"bad/{name}.safetensors {words}")
       for name, words in {
        "cut": "", "other": "cfm_images.py", "no_about": "", "meta_list": "", "no_args": "args", "args_text": "",
        "args_list": "", "data_text": "", "classes": "", "width_64": "", "width_32": "width", "width_-32": "width",
        "mults_list": "mults", "patch_0": "patch", "condition_smell": "condition", "schedule_steep": "schedule",
        "pred_w": "pred", "class_cond_True": ""}.items()},
    "ckpt of another width": (SAMPLE, f"--ckpt {MODEL} --width 64", f"--width 64 {MODEL} 32"),
    "ckpt of another size": (SAMPLE, f"--ckpt {MODEL} --size 32", f"--size 32 {MODEL} 16"),
    "input for a model without condition": (SAMPLE, f"--ckpt {MODEL} --input bad/flat", f"{MODEL} --input"),
    "no input for one with": (SAMPLE, "--ckpt bad/gray.safetensors", "bad/gray.safetensors gray --input"),
    "input missing": (SAMPLE, "--ckpt bad/gray.safetensors --input nowhere", "nowhere"),
    "input empty": (SAMPLE, "--ckpt bad/gray.safetensors --input bad/empty", "--input bad/empty"),
    "input broken": (SAMPLE, "--ckpt bad/gray.safetensors --input bad/tenth --sample 20", "--input bad/tenth 05.png"),
    "input is text": (SAMPLE, "--ckpt bad/gray.safetensors --input bad/text.txt", "bad/text.txt"),
}


def check_wrong_input(case, capsys, monkeypatch):
    """All of it is found before the first step; AdamW's fused kernel, for one, checks no shapes and corrupts memory."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kwargs: pytest.fail("it went on and trained"))
    before, argv, words = case
    status, err = run([*before, *argv.split()], capsys)
    sentence = the_sentence(err)
    assert status == 2, sentence
    assert [w for w in words.split() if w not in sentence] == [], sentence
    assert not Path("new").exists() or not any(Path("new").rglob("*.pt")), "nothing was trained"


@pytest.mark.parametrize("case", CASES)
def test_wrong_input(case, capsys, monkeypatch):
    check_wrong_input(CASES[case], capsys, monkeypatch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(capsys):
    for argv in ([*TRAIN, "--device", "cuda"], [*SAMPLE, "--ckpt", MODEL, "--device=cuda"],
                 ["--smoke", "--device", "cuda"]):
        status, err = run(argv, capsys)
        assert status == 2 and "--device cuda" in the_sentence(err)


def test_devices_under_torchrun(monkeypatch):
    """More processes than GPUs, or all of them on one GPU: said before NCCL says it less clearly."""
    for name, value in {"RANK": "5", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(d.Stop, match="8 processes, but 4 GPUs"):
        d.pick_device("cuda")
    with pytest.raises(d.Stop, match="--device cuda:0 under torchrun"):
        d.pick_device("cuda:0")


@pytest.mark.parametrize("flags", ["--condition lowres", "--condition gray --class_cond --cfg_scale 2",
                                   "--condition edges", "--condition mask --accum 8", "--class_cond --sampler ddpm"])
def test_the_smallest_set(flags, capsys):
    """16 pictures, one of them held out, are enough for all that a run draws at its end."""
    images = np.load("pictures.npz")["images"][:16]
    np.savez("new.npz", images=images, labels=np.arange(16) % 2)
    assert run([*TRAIN, "--data", "new.npz", *flags.split()], capsys) == (0, "")
    assert Path("new/training.gif").exists() and Path("new/interpolation.png").exists()


def test_the_folder_is_known_however_it_is_spelt(capsys, home):
    """--resume with an absolute path goes on in the folder, and puts nothing of it aside."""
    shutil.copytree("out/ddpm_images", "new")
    argv = ["--resume", str(home / "new/ckpt.pt"), "--out", "new", "--steps", "3"]
    assert run(argv, capsys) == (0, "") and not list(Path("new").glob("*.old"))
    assert [json.loads(line)["step"] for line in open("new/log.jsonl")] == [0, 1, 2, 3]


def test_moved_data(capsys):
    """The pictures are the same in another folder."""
    shutil.copytree("bad/flat", "new")
    assert run([*TINY, "--data", "new", "--out", "new_out"], capsys) == (0, "")
    Path("new").rename("new_place")
    assert run(["--resume", "new_out/ckpt.pt", "--data", "new_place", "--steps", "3"], capsys) == (0, "")


def test_eta_of_the_checkpoint_and_another_sampler(capsys):
    assert run([*TRAIN, "--sampler", "ddim", "--eta", "1"], capsys) == (0, "")
    argv = [*SAMPLE, "--ckpt", "new/model.safetensors"]
    assert run([*argv, "--sampler", "ddpm"], capsys) == (0, "") and run([*argv, "--eta", "0.5"], capsys) == (0, "")


def test_out_of_memory(capsys, monkeypatch):
    monkeypatch.setattr(d, "train_step", lambda *args: torch.empty(1 << 60))
    status, err = run(TRAIN, capsys)
    assert status == 1 and "memory" in the_sentence(err) and "--batch_size" in err


def test_other_errors_are_not_taken_for_a_lack_of_memory(capsys, monkeypatch):
    def train_step(*args):
        raise RuntimeError("a bug")
    monkeypatch.setattr(d, "train_step", train_step)
    with pytest.raises(RuntimeError, match="a bug"):
        run(TRAIN, capsys)


def test_changed_data(capsys):
    """The same --data with other pictures: going on would not be the run that was cut."""
    shutil.copy("pictures.npz", "new.npz")
    assert run([*TINY, "--data", "new.npz", "--out", "new_out"], capsys) == (0, "")
    np.savez("new.npz", images=np.load("pictures.npz")["images"][::-1])
    status, err = run(["--resume", "new_out/ckpt.pt"], capsys)
    assert status == 2 and "new.npz" in the_sentence(err) and "new_out/ckpt.pt" in err


@pytest.mark.parametrize("argv", [["--sample", "2", "--ckpt", MODEL], TRAIN], ids=["sample", "train"])
@pytest.mark.parametrize("where", ["new.txt", "new.txt/deeper"])
def test_out_is_a_file(where, argv, capsys):
    Path("new.txt").write_text("precious")
    status, err = run([*argv, "--out", where], capsys)
    assert status in (1, 2) and "new.txt" in the_sentence(err)
    assert Path("new.txt").read_text() == "precious"


def weights_are_whole(path):
    state = d.load_checkpoint(path, "ddpm_images.py")
    assert all(v.isfinite().all() and v.abs().max() < 10 for k in ("model", "ema") for v in state[k].values()), "spoilt"
    return state


def test_divergence(capsys):
    """The weights are lost one step before the loss says so; no checkpoint may hold them."""
    shutil.copytree("out/ddpm_images", "new")
    status, err = run([*TRAIN, "--lr", "1e3", "--steps", "40"], capsys)
    sentence = the_sentence(err)
    assert status == 1 and "diverge" in sentence
    assert "step" in sentence and "--lr" in sentence and "1000" in sentence, "step, lr and advice"
    for path in Path("new").glob("ckpt.pt*"):
        weights_are_whole(path)
    assert Path("new/ckpt.pt.old").read_bytes() == Path(CKPT).read_bytes()


@pytest.mark.parametrize("steps, eval_every", [(20, 2), (900, 5)], ids=["", "checkpoints between the log intervals"])
def test_loss_that_is_not_a_number(steps, eval_every, capsys, monkeypatch):
    real, calls = d.loss_fn, []

    def loss_fn(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return real(*args, **kwargs) * (float("nan") if sum(calls) > 7 else 1)
    monkeypatch.setattr(d, "loss_fn", loss_fn)
    status, err = run([*TRAIN, "--steps", str(steps), "--eval_every", str(eval_every)], capsys)
    assert status == 1 and "diverge" in the_sentence(err) and "nan" in err
    state = weights_are_whole("new/ckpt.pt")
    assert 5 <= state["step"] <= 7
    monkeypatch.setattr(d, "loss_fn", real)
    assert run(["--resume", "new/ckpt.pt", "--steps", "9"], capsys) == (0, "")
    assert weights_are_whole("new/ckpt.pt")["step"] == 9


def test_foreign_files_in_out(capsys):
    """What the user put into the folder is neither read as ours nor deleted."""
    shutil.copytree("out/ddpm_images", "new")
    for name in ("new/samples/best one.png", "new/notes.txt"):
        Path(name).write_bytes(b"mine")
    assert run(TRAIN, capsys) == (0, "")
    assert run(["--resume", "new/ckpt.pt", "--steps", "3"], capsys) == (0, "")
    assert Path("new/samples/best one.png").read_bytes() == Path("new/notes.txt").read_bytes() == b"mine"


def test_torn_log(capsys):
    """A disk that was full, or a power cut, leaves half a line in log.jsonl."""
    shutil.copytree("out/ddpm_images", "new")
    with open("new/log.jsonl", "a") as f:
        f.write('{"step": 2, "lo')
    assert run(["--resume", "new/ckpt.pt", "--out", "new", "--steps", "3"], capsys) == (0, "")
    assert [json.loads(line)["step"] for line in Path("new/log.jsonl").read_text().splitlines()] == [0, 1, 2, 3]


def test_earlier_run_is_kept(capsys):
    """A second run into the same folder puts the weights of the first aside."""
    shutil.copytree("out/ddpm_images", "new")
    assert run([*TRAIN, "--seed", "1"], capsys) == (0, "")
    assert Path("new/ckpt.pt.old").read_bytes() == Path(CKPT).read_bytes() != Path("new/ckpt.pt").read_bytes()
    assert Path("new/model.safetensors.old").read_bytes() == Path(MODEL).read_bytes()


# Signals


def goes_on(out, step, capsys):
    """The checkpoint is of `step`, and from there the run can go on."""
    assert weights_are_whole(f"{out}/ckpt.pt")["step"] == step
    assert set(d.load_safetensors(f"{out}/model.safetensors")[0]) == set(d.load_safetensors(MODEL)[0])
    assert run(["--resume", f"{out}/ckpt.pt", "--steps", str(step + 1), "--out", out], capsys) == (0, "")
    assert weights_are_whole(f"{out}/ckpt.pt")["step"] == step + 1


SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_in_a_step(number, capsys, monkeypatch):
    """The step in hand is finished and saved."""
    real = d.train_batch

    def train_batch(args, *rest):
        if rest[1] == 3:
            os.kill(os.getpid(), number)
        return real(args, *rest)
    monkeypatch.setattr(d, "train_batch", train_batch)
    status, err = run([*TRAIN, "--steps", "9", "--eval_every", "9"], capsys)
    assert status == SIGNALS[number] and "--resume new/ckpt.pt" in the_sentence(err) and "step 4" in err
    monkeypatch.setattr(d, "train_batch", real)
    goes_on("new", 4, capsys)


@pytest.mark.parametrize("argv", [TRAIN, [*SAMPLE, "--ckpt", MODEL]], ids=["train", "sample"])
@pytest.mark.parametrize("number", SIGNALS)
def test_signal_before_the_first_step(number, argv, capsys, monkeypatch):
    monkeypatch.setattr(d, "build_model", lambda *args: os.kill(os.getpid(), number) or time.sleep(5))
    status, err = run(argv, capsys)
    assert status == SIGNALS[number] and the_sentence(err)


def start(*argv, **options):
    return subprocess.Popen([sys.executable, SCRIPT, "--device", "cpu", *argv], stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def finish(process):
    """-> exit status, stderr. With the process end the workers that it left behind, if it crashed."""
    try:
        _, err = process.communicate(timeout=60)
        return process.returncode, err
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def stopped(home):
    """Three runs in processes of their own, each stopped by a signal after its first checkpoint."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    runs = {n: start(*TINY, "--data", "pictures.npz", "--steps", "100000", "--eval_every", "3",
                     "--out", f"run{n.value}", cwd=home) for n in numbers}
    deadline, done = time.time() + 90, {}
    try:
        for n, process in runs.items():
            while not (home / f"run{n.value}/model.safetensors").exists() and process.poll() is None:
                assert time.time() < deadline
                time.sleep(0.05)
            process.send_signal(n)
            done[n] = finish(process)
    finally:
        for process in runs.values():
            process.kill()
    for part in (home / "run9").rglob("*.part"):
        part.unlink()  # nothing can tidy up after kill -9
    return done


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_to_a_process(number, stopped, home, capsys):
    status, err = stopped[number]
    out = f"run{number.value}"
    assert status == SIGNALS[number] and f"--resume {out}/ckpt.pt" in the_sentence(err)
    step = weights_are_whole(f"{out}/ckpt.pt")["step"]
    assert f"step {step}" in err
    shutil.copytree(out, "new")
    goes_on("new", step, capsys)


def test_kill(stopped, home, capsys):
    assert stopped[signal.SIGKILL] == (-9, "")
    shutil.copytree("run9", "new")
    step = weights_are_whole("new/ckpt.pt")["step"]
    assert step % 3 == 0, "from an evaluation"
    goes_on("new", step, capsys)


# A full disk


def test_disk_full_while_saving(capsys):
    """Files may not grow beyond 200 kB: the sample grid still fits, the checkpoint does not."""
    resource = pytest.importorskip("resource")
    shutil.copytree("out/ddpm_images", "new")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    status, err = finish(start("--resume", "new/ckpt.pt", "--steps", "4", "--out", "new", preexec_fn=limit))
    sentence = the_sentence(err)
    assert status == 1 and "new/ckpt.pt" in sentence and "File too large" in sentence
    assert Path("new/ckpt.pt").read_bytes() == Path(CKPT).read_bytes()
    assert not list(Path("new").rglob("*.part"))
    goes_on("new", 2, capsys)


@pytest.fixture
def small_disk(home):
    """A file system of 1 MB, where this user may mount one."""
    place = home / "new_disk"
    place.mkdir()
    mount = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place],
                                                     capture_output=True)
    if not mount or mount.returncode:
        pytest.skip("mounting takes root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)  # -l: even if a process is left that works there


def test_disk_full_while_reading_the_data(small_disk):
    """The cache is memory-mapped: without care, a full disk would be a bus error."""
    np.savez("new.npz", images=np.random.default_rng(1).integers(0, 256, (600, 32, 32, 3)).astype(np.uint8))
    status, err = finish(start(*TINY, "--size", "32", "--data", "../new.npz", cwd=small_disk))
    sentence = the_sentence(err)
    assert status == 1 and "No space left on device" in sentence and "data/cache" in sentence
    assert not [p for p in small_disk.rglob("*") if p.is_file()]


def test_disk_full_while_training(small_disk, capsys):
    shutil.copytree("data", small_disk / "data")
    (small_disk / "filler").write_bytes(bytes(400_000))
    status, err = finish(start(*TINY, "--data", "../pictures.npz", "--width", "64", cwd=small_disk))
    sentence = the_sentence(err)
    assert status == 1 and "No space left on device" in sentence and "out/ddpm_images/" in sentence
    assert not list(small_disk.rglob("*.part")) and not list(small_disk.rglob("ckpt.pt"))
