"""serve.py: the pictures of text2img.py from a server, alone and in a batch, asked for by the official client, by raw bytes
and by a browser."""
import base64
import contextlib
import http.client
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune_lora
import latent_dit
import serve as mm
import text2img

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a random model of text2img.py, none of whose weights is 0, and two LoRAs of it."""
    folder = tmp_path_factory.mktemp("serve")
    before = os.getcwd()
    os.chdir(folder)
    finetune_lora.save_random_base(Path("out/text2img/model.safetensors"))
    tensors, about = mm.load_safetensors("out/text2img/model.safetensors")
    g, args = torch.Generator().manual_seed(0), json.loads(about["args"])
    others = {k: v for k, v in vars(text2img.parse_args([])).items() if k != "given" and v is not None}
    about["args"] = json.dumps(others | dict(grad_checkpoint=False, sample_steps=10, cfg_scale=2.0) | args)  # as text2img.py itself writes it
    finetune_lora.save_safetensors(Path("out/text2img/model.safetensors"), {
        k: v if k.startswith(("vae", "z_")) else v + 0.05 * torch.randn(v.shape, generator=g) for k, v in tensors.items()}, about)
    Path("loras").mkdir()
    for name, seed in (("red", 1), ("blue", 2)):
        layers = {"transformer.blocks.0.attn.qkv": (576, 192), "transformer.blocks.3.mlp.down": (192, 512),
                  "transformer.tower.encoder.layers.1.self_attn.q_proj": (192, 192)}
        pairs = {f"{layer}.lora_{ab}.weight": 0.2 * torch.randn(shape, generator=g) for layer, (o, i) in layers.items()
                 for ab, shape in (("A", (3, i)), ("B", (o, 3)))}
        finetune_lora.save_safetensors(Path(f"loras/{name}.safetensors"), pairs, dict(format="pt"))
    yield folder
    os.chdir(before)


class Running:
    """A server in this process, its engine too."""

    def __init__(self, *flags):
        self.args = mm.parse_args(["--port", "0", "--device", "cpu", "--dtype", "fp32", *map(str, flags)])
        self.server = mm.Server(self.args)
        self.server.model = self.model = mm.open_model(self.args)
        self.server.fields = mm.fields_of(self.model, self.args)
        self.server.engine = self.engine = mm.Engine(self.model, self.args.max_batch, self.args.max_queue)
        self.engine.start()
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True)
        self.thread.start()
        self.url, self.port = self.server.url, self.server.server_port
        self.until(lambda: self.engine.ready, 200)

    @staticmethod
    def until(true, seconds=30):
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
        assert self.engine.end(60)

    def raw(self, text, patience=10):
        """Bytes to the server -> all that it answers until it closes, or falls silent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=patience) as s:
            with contextlib.suppress(OSError):
                s.sendall(text)
            answer = b""
            with contextlib.suppress(OSError):
                while part := s.recv(1 << 16):
                    answer += part
            return answer

    def ask(self, path="/v1/images/generations", method=None, headers=(), timeout=60, **body):
        """-> status, headers, content: of JSON what it holds."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        told = {"Content-Type": "application/json", **dict(headers)}
        connection.request(method or ("POST" if body else "GET"), path, json.dumps(body) if body else None, told)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        kind = answer.headers.get_content_type()
        return answer.status, answer.headers, json.loads(content) if kind == "application/json" and content else content

    def draw(self, prompt="a cat", **body):
        """-> the pictures of a request, (n, H, W, 3)."""
        status, _, answer = self.ask(prompt=prompt, **body)
        assert status == 200, answer
        return np.stack([pixels(entry["b64_json"]) for entry in answer["data"]])


def pixels(b64):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def server(home):
    running = Running("--lora_dir", "loras", "--max_queue", "16", "--max_batch", "4", "--dtype", "auto")
    yield running
    running.close()


@contextlib.contextmanager
def another(*flags):
    running = Running(*flags)
    try:
        yield running
    finally:
        running.close()


# What is drawn


@pytest.mark.parametrize("flags, body", [
    ([], {}), (["--cfg_scale", "3.5"], dict(guidance_scale=3.5)), (["--cfg_scale", "1"], dict(guidance_scale=1)),
    (["--sample_steps", "3"], dict(num_inference_steps=3)), (["--negative_prompt", "a dog"], dict(negative_prompt="a dog")),
    (["--size", "48"], dict(size="48x48")), (["--cfg_scale", "40", "--cfg_interval", "0.3", "0.7"], dict(guidance_scale=40))])
def test_the_pictures_are_text2imgs(flags, body, server, monkeypatch):
    """As text2img.py --sample draws them from the same seed and settings."""
    told = ["--ckpt", "out/text2img/model.safetensors", "--sample", "1", "--prompt", "a dog with a hat", "--device", "cpu",
            "--dtype", "fp32", "--out", "there", "--seed", "7"]
    if "--cfg_interval" in flags:
        monkeypatch.setattr(server.model, "cfg_interval", [0.3, 0.7])
    assert text2img.main(told + flags) == 0
    theirs = np.asarray(Image.open("there/generated/000000.png")).astype(int)
    ours = server.draw("a dog with a hat", seed=7, **body)[0]
    assert theirs.std() > 5 and np.abs(ours - theirs).max() <= 1


def test_the_picture_of_a_seed_is_the_same_alone_and_in_any_company(server):
    asked = [dict(prompt=p, seed=s, num_inference_steps=n, guidance_scale=c, lora=lora) for p, s, n, c, lora in (
        ("a cat", 1, 8, 1, []), ("a small dog on a hill", 2, 5, 40, []), ("dog", 3, 11, 2.5, []), ("a cat", 4, 6, 7, ["red"]),
        ("a cat", 1, 8, 1, ["red"]), ("a mouse", 5, 9, 1.5, [{"name": "blue", "weight": 0.5}, "red"]))]
    alone = [server.draw(**body)[0] for body in asked]
    before = dict(server.engine.counted)
    together = [None] * len(asked)

    def draw(i):
        together[i] = server.draw(**asked[i])[0]
    threads = [threading.Thread(target=draw, args=(i,)) for i in range(len(asked))]
    turn, go = server.engine.turn, threading.Event()

    def hold(group):  # until all are there
        if len(server.engine.pictures) == len(asked):
            go.set()
        turn(group) if go.is_set() else time.sleep(0.001)
    server.engine.turn = hold
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del server.engine.turn
    steps = server.engine.counted["steps"] - before["steps"]
    assert steps < sum(body["num_inference_steps"] for body in asked), "some went together"
    for one, other in zip(alone, together):
        assert np.abs(one - other).max() <= 1
    assert min(np.abs(a - b).max() for i, a in enumerate(alone) for b in alone[:i]) > 3


def test_the_pictures_of_a_request_have_seeds_one_after_the_other(server):
    pictures = server.draw(n=3, seed=10, num_inference_steps=3)
    for i, picture in enumerate(pictures):
        assert np.abs(picture - server.draw(seed=10 + i, num_inference_steps=3)[0]).max() <= 1
    status, _, answer = server.ask(prompt="a cat", num_inference_steps=1, n=2)
    seeds = [entry["seed"] for entry in answer["data"]]
    assert seeds[1] == seeds[0] + 1 and seeds[0] != server.ask(prompt="a cat", num_inference_steps=1)[2]["data"][0]["seed"]


def test_a_short_request_need_not_wait_for_a_long_one(server):
    """It joins between two steps."""
    ends = {}

    def draw(name, steps):
        server.draw(num_inference_steps=steps)
        ends[name] = time.monotonic()
    long = threading.Thread(target=draw, args=("long", 200))
    long.start()
    server.until(lambda: server.engine.pictures)
    draw("short", 3)
    long.join()
    assert ends["short"] < ends["long"] - 0.2


def test_loras_do_what_they_do_in_finetune_lora(server):
    """Alone, with a weight, two at once, and none: as finetune_lora.py --sample draws."""
    plain = server.draw("a dog", seed=3)[0]
    for files, lora in ((["red"], "red"), (["red:0.5"], {"name": "red", "weight": 0.5}), (["red", "blue:-1"], [
            "red", {"name": "blue", "weight": -1}])):
        told = ["--base", "out/text2img/model.safetensors", "--sample", "1", "--prompt", "a dog", "--device", "cpu", "--dtype",
                "fp32", "--out", "there", "--seed", "3", "--cfg_scale", "2", "--sample_steps", "10", "--lora"]
        told += [re.sub(r"^(\w+)", r"loras/\1.safetensors", file) for file in files]
        assert finetune_lora.main(told) == 0
        theirs = np.asarray(Image.open("there/generated/000000.png")).astype(int)
        ours = server.draw("a dog", seed=3, lora=lora)[0]
        assert np.abs(ours - theirs).max() <= 1 and np.abs(ours - plain).max() > 3
    assert np.abs(server.draw("a dog", seed=3, lora=[{"name": "red", "weight": 0}])[0] - plain).max() == 0


SD = pytest.mark.skipif(sys.version_info < (3, 11), reason="the pinned diffusers wants Python 3.11")


@pytest.fixture(scope="module")
def folder(home, tmp_path_factory):
    """A small Stable Diffusion 1.5 with random weights, as diffusers saves it, and a LoRA of all its attention."""
    from test_finetune_lora import make_pipeline
    folder, _ = make_pipeline("sd", tmp_path_factory.mktemp("sd"))
    args = finetune_lora.parse_args(["--base", str(folder), "--rank", "2", "--device", "cpu"])
    base = finetune_lora.open_base(args, 0, 1, torch.device("cpu"))
    base.load_text()
    base.load_model()
    names = finetune_lora.target_layers(base, ["attn", "text"])
    made = finetune_lora.attach(base, dict.fromkeys(names), args, list(base.parts))
    for lora in made.values():
        torch.nn.init.normal_(lora.B.weight, std=0.3)
    Path(folder, "loras").mkdir()
    finetune_lora.write_lora(Path(folder, "loras/style.safetensors"), base, made, "diffusers", dict(format="pt"))
    return folder


@SD
@pytest.mark.parametrize("flags", [[], ["--quant", "int8"]])
def test_stable_diffusion(flags, folder, monkeypatch):
    """A folder of diffusers': the pictures that finetune_lora.py --sample draws of it with DPM++ 2M, alone and together."""
    monkeypatch.setattr(mm.SDModel, "size", 64)
    asked = [dict(prompt="a photo of a cat", seed=5, num_inference_steps=4), dict(prompt="", seed=6, num_inference_steps=7),
             dict(prompt="a dog", negative_prompt="a cat", seed=7, num_inference_steps=3, guidance_scale=2, lora="style")]
    with another("--ckpt", folder, "--lora_dir", f"{folder}/loras", *flags) as server:
        together = [None] * len(asked)

        def draw(i):
            together[i] = server.draw(**asked[i])[0]
        threads = [threading.Thread(target=draw, args=(i,)) for i in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for body, ours in zip(asked, together):
        told = ["--base", folder, "--device", "cpu", "--dtype", "fp32", "--size", 64, "--sample", 1, "--out", "there", *flags,
                "--prompt", body["prompt"], "--seed", body["seed"], "--sample_steps", body["num_inference_steps"],
                "--cfg_scale", body.get("guidance_scale", 7.5), "--negative_prompt", body.get("negative_prompt", "")]
        told += ["--lora", f"{folder}/loras/style.safetensors"] * ("lora" in body)
        assert finetune_lora.main([str(word) for word in told]) == 0
        theirs = np.asarray(Image.open("there/generated/000000.png")).astype(int)
        assert np.abs(ours - theirs).max() <= 1 and theirs.std() > 5
    assert np.abs(together[2] - together[0]).max() > 3


@SD
def test_more_steps_than_a_diffusion_has_levels(folder, monkeypatch):
    """At 1,000 steps one of them would have no length, and the picture be no number."""
    monkeypatch.setattr(mm.SDModel, "size", 64)
    with another("--ckpt", folder, "--max_steps", 2000) as server:
        for steps in (1000, 1001, 2000):
            status, _, answer = server.ask(prompt="a cat", num_inference_steps=steps)
            assert status == 400 and answer["error"]["param"] == "num_inference_steps"
        model = server.model
        assert all(a > b for steps in (1, 2, 500, 900) for times in [model.times(steps, 64, 64)] for a, b in zip(times, times[1:]))


@pytest.mark.parametrize("flags, asked", [
    ([], {}), (["--no-class_cond"], {}), (["--cfg_scale", 3], dict(guidance_scale=3)), (["--size", 48], dict(size="48x48"))])
def test_models_that_are_told_a_class(flags, asked, tmp_path, monkeypatch):
    """As latent_dit.py draws them, of every class together."""
    monkeypatch.chdir(tmp_path)
    common = ["--device", "cpu", "--dtype", "fp32"]
    of_model = [flag for flag in flags if "class_cond" in str(flag)]
    assert latent_dit.main([str(word) for word in ["--smoke", "--data", "drawn_faces", "--out", "out/x", *common, *of_model]]) == 0
    tensors, about = mm.load_safetensors("out/x/model.safetensors")
    g = torch.Generator().manual_seed(0)
    finetune_lora.save_safetensors(Path("out/x/model.safetensors"), {
        k: v if k.startswith(("vae", "z_")) else v + 0.03 * torch.randn(v.shape, generator=g) for k, v in tensors.items()}, about)
    classes = json.loads(about["data"])["classes"] if json.loads(about["args"])["class_cond"] else []
    n = max(1, len(classes))
    told = ["--ckpt", "out/x/model.safetensors", "--sample", n, "--sample_steps", 5, *common, "--seed", 7]
    told += [flag for flag in flags if flag not in of_model]
    assert latent_dit.main([str(word) for word in told]) == 0
    theirs = [np.asarray(Image.open(f"out/x/generated/{i:06d}.png")).astype(int) for i in range(n)]
    monkeypatch.setattr(mm, "image_noise", lambda seed, indices, shape, device: latent_dit.image_noise(7, [seed], shape, device))
    with another("--ckpt", "out/x/model.safetensors", "--max_batch", 3, "--max_queue", 99) as server:
        ours = [None] * n

        def draw(i):
            label = dict(class_label=i) if i % 2 else dict(prompt=classes[i]) if classes else dict(prompt="")
            status, _, answer = server.ask(seed=i, num_inference_steps=5, **label, **asked)
            assert status == 200, answer
            ours[i] = pixels(answer["data"][0]["b64_json"])
        threads = [threading.Thread(target=draw, args=(i,)) for i in range(n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(np.abs(a - b).max() for a, b in zip(ours, theirs)) <= 1 and np.std(theirs) > 5
        assert server.ask(prompt="a unicorn")[0] == 400 and server.ask(prompt="", negative_prompt="x")[0] == 400
        status, _, answer = server.ask(prompt="", class_label=99)
        assert status == 400 and answer["error"]["param"] == "class_label"
        assert server.ask(prompt="", num_inference_steps=1)[0] == 200
        assert server.ask(prompt="", guidance_scale=2, num_inference_steps=1)[0] == (200 if classes else 400)


@SD
def test_other_folders(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken/unet/config.json").unlink()
    (tmp_path / "xl").mkdir()
    (tmp_path / "xl/model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    for name, said in (("broken", "unet/config.json"), ("xl", "StableDiffusion3Pipeline"), ("nowhere", "nowhere does not exist")):
        assert run("--port", 0, "--ckpt", tmp_path / name if name != "nowhere" else name) == 2
        assert said in capsys.readouterr().err
    for key, change in (("a layer", lambda tensors: {**tensors, "unet.nothing.lora_A.weight": torch.zeros(2, 3)}),
                        ("half", lambda tensors: dict(list(tensors.items())[1:])),
                        ("a shape", lambda tensors: {k: v.repeat(2, *[1] * (v.ndim - 1)) if "lora_B" in k else v
                                                     for k, v in tensors.items()})):
        (tmp_path / key).mkdir()
        tensors, about = mm.load_safetensors(Path(folder, "loras/style.safetensors"))
        finetune_lora.save_safetensors(tmp_path / key / "x.safetensors", change(tensors), about)
        assert run("--port", 0, "--ckpt", folder, "--lora_dir", tmp_path / key) == 2
        assert "is no LoRA of this model" in capsys.readouterr().err


def test_a_compiled_network_sees_few_sizes_of_batch(home, server, monkeypatch):
    """By the part of the compiler before C++; all sizes are seen before it is ready."""
    sizes, compile = [], torch.nn.Module.compile

    def count(self, **how):
        compile(self, backend="aot_eager", fullgraph=True, **how)
        compiled = self._compiled_call_impl
        self._compiled_call_impl = lambda z, *more: sizes.append(len(z)) or compiled(z, *more)
    monkeypatch.setattr(torch.nn.Module, "compile", count)
    with another("--compile", "--max_batch", 3) as other:
        assert sizes == [1, 2, 4, 8]
        pictures = other.draw(n=3, seed=4, num_inference_steps=3, guidance_scale=3)
        assert len(sizes) > 4 and set(sizes) == {1, 2, 4, 8}
    expected = server.draw(n=3, seed=4, num_inference_steps=3, guidance_scale=3)
    assert np.abs(pictures - expected).max() <= 1


# The API


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openais_client(client, server):
    answer = client.images.generate(prompt="a cat", model="text2img", n=2, size="32x32", user="me", quality="high",
                                    extra_body=dict(seed=5, num_inference_steps=4, guidance_scale=2.0))
    drawn = server.draw("a cat", seed=5, num_inference_steps=4, n=2)
    assert len(answer.data) == 2 and abs(answer.created - time.time()) < 60
    assert all(np.array_equal(pixels(entry.b64_json), picture) for entry, picture in zip(answer.data, drawn))
    assert server.ask("/v1/models/te%78t2img")[2]["id"] == "text2img"
    url = client.images.generate(prompt="a cat", response_format="url", output_format="jpeg", extra_body=dict(seed=5)).data[0].url
    assert re.search(r"/v1/images/files/[\w-]{20,}\.jpeg$", url), "cannot be guessed"
    with urllib.request.urlopen(url) as answer:
        assert answer.headers["Cross-Origin-Resource-Policy"] == "cross-origin", "a page of another server can show it"
        assert answer.headers["Content-Type"] == "image/jpeg" and Image.open(io.BytesIO(answer.read())).size == (32, 32)
    assert [model.id for model in client.models.list()] == ["text2img"] == [client.models.retrieve("text2img").id]


def test_openais_client_gets_its_errors(client):
    import openai
    with pytest.raises(openai.BadRequestError) as e:
        client.images.generate(prompt="a cat", n=99)
    assert e.value.param == "n" and e.value.type == "invalid_request_error" and "between 1 and 8" in e.value.message
    with pytest.raises(openai.NotFoundError) as e:
        client.images.generate(prompt="a cat", model="dall-e-3")
    assert e.value.code == "model_not_found"


def test_openais_client_streams(client, server):
    for progress in (True, False):
        events = list(client.images.generate(prompt="a cat", stream=True, partial_images=3, extra_body=dict(
            seed=5, num_inference_steps=8, progress=progress)))
        kinds = [event.type for event in events]
        assert kinds.count("image_generation.partial_image") == 3 and kinds[-1] != "image_generation.progress"
        assert kinds.count("image_generation.completed") == 1
        assert kinds.count("image_generation.progress") == 8 * progress
    partial = [pixels(event.b64_json) for event in events if event.type.endswith("partial_image")]
    last = pixels(next(event for event in events if event.type.endswith("completed")).b64_json)
    errors = [np.abs(picture - last).mean() for picture in partial]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1] > 0, "nearer and nearer"
    assert np.array_equal(last, server.draw(seed=5, num_inference_steps=8)[0])


def test_partial_images_are_numbered_for_each_picture(server):
    text = server.ask(prompt="a cat", n=2, stream=True, partial_images=2, num_inference_steps=6)[2].decode()
    events = [json.loads(part.partition("data: ")[2]) for part in text.split("\n\n") if "partial_image\n" in part]
    assert sorted((e["image_index"], e["partial_image_index"]) for e in events) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_openais_client_does_not_repeat_what_took_too_long(home):
    """By itself it would send the same work three times."""
    openai = pytest.importorskip("openai")
    with another("--deadline", 0.4) as server, pytest.raises(openai.InternalServerError) as e:
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").images.generate(
            prompt="a cat", n=8, extra_body=dict(num_inference_steps=250))
    assert e.value.status_code == 504
    assert sum(n for (path, _), n in server.server.counted.items() if path.endswith("generations")) == 1


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats(kind, server):
    status, _, answer = server.ask(prompt="a cat", seed=1, num_inference_steps=2, output_format=kind, output_compression=95)
    image = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert status == 200 and image.format == kind.upper() and answer["output_format"] == kind
    drawn = server.draw(seed=1, num_inference_steps=2)[0]
    assert np.corrcoef(np.asarray(image.convert("RGB")).mean(2).flatten(), drawn.mean(2).flatten())[0, 1] > 0.85


WRONG = {  # name: body, what the error names, status
    "no prompt": (dict(n=1), "prompt", 400), "a number": (dict(prompt=3), "prompt", 400),
    "a list": (dict(prompt=["a"]), "prompt", 400), "too long": (dict(prompt="x" * 4001), "prompt", 400),
    "too many words": (dict(prompt="word " * 90), "prompt", 400),
    "half a letter": (dict(prompt="\ud800"), "prompt", 400), "n 0": (dict(prompt="a", n=0), "n", 400),
    "n true": (dict(prompt="a", n=True), "n", 400), "n text": (dict(prompt="a", n="2"), "n", 400),
    "n 1.5": (dict(prompt="a", n=1.5), "n", 400), "n large": (dict(prompt="a", n=10 ** 30), "n", 400),
    "steps": (dict(prompt="a", num_inference_steps=10 ** 6), "num_inference_steps", 400),
    "scale": (dict(prompt="a", guidance_scale=-1), "guidance_scale", 400),
    "infinite": (dict(prompt="a", guidance_scale=1e300), "guidance_scale", 400),
    "seed": (dict(prompt="a", seed=-1), "seed", 400), "seed large": (dict(prompt="a", seed=2 ** 53), "seed", 400),
    "size": (dict(prompt="a", size="32"), "size", 400), "size odd": (dict(prompt="a", size="33x32"), "size", 400),
    "size large": (dict(prompt="a", size="6400x6400"), "size", 400), "size 0": (dict(prompt="a", size="0x0"), "size", 400),
    "size digits": (dict(prompt="a", size="٣٢x٣٢"), "size", 400),
    "format": (dict(prompt="a", output_format="tiff"), "output_format", 400),
    "response": (dict(prompt="a", response_format="file"), "response_format", 400),
    "transparent": (dict(prompt="a", background="transparent"), "background", 400),
    "unknown": (dict(prompt="a", steps=3), "steps", 400), "model": (dict(prompt="a", model="gpt"), "model", 404),
    "model path": (dict(prompt="a", model="../../etc/passwd"), "model", 404),
    "lora": (dict(prompt="a", lora="green"), "lora", 400), "lora path": (dict(prompt="a", lora="../loras/red"), "lora", 400),
    "lora list": (dict(prompt="a", lora=["red"] * 9), "lora", 400), "lora 3": (dict(prompt="a", lora=3), "lora", 400),
    "lora weight": (dict(prompt="a", lora=[{"name": "red", "weight": "1"}]), "lora", 400),
    "lora heavy": (dict(prompt="a", lora=[{"name": "red", "weight": 1e9}]), "lora", 400),
    "lora scale": (dict(prompt="a", lora=[{"name": "red", "scale": 1}]), "lora", 400),
    "partial alone": (dict(prompt="a", partial_images=2), "partial_images", 400),
    "progress alone": (dict(prompt="a", progress=True), "progress", 400),
    "lora name": (dict(prompt="a", lora=[{"weight": 1}]), "lora", 400), "lora in lora": (dict(prompt="a", lora=[["red"]]), "lora", 400),
    "stream": (dict(prompt="a", stream=1), "stream", 400), "partial": (dict(prompt="a", partial_images=-1), "partial_images", 400)}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_asked_for(case, server):
    body, param, wanted = WRONG[case]
    status, _, answer = server.ask(**body)
    error = answer["error"]
    assert (status, error["param"], error["type"]) == (wanted, param, "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"} and 5 < len(error["message"]) < 500


def test_null_is_as_if_it_were_not_there(server):
    assert server.ask(prompt="a", n=None, size=None, seed=None, num_inference_steps=1, lora=None)[0] == 200


def post(body, *headers, length=None):
    """The bytes of a request."""
    lines = ["POST /v1/images/generations HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close", *headers]
    lines += [f"Content-Length: {len(body) if length is None else length}"] * (length != "")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def hostile():
    """200 bodies that are no request."""
    good = json.dumps(dict(prompt="a cat", num_inference_steps=1)).encode()
    deep = [b"[" * 30_000, b'{"a":' * 10_000, b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"]
    values = ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "-0.0", "[]", "{}", "null", "true", '"' + "a" * 5000 + '"',
              '{"name": "red", "weight": NaN}', '["red", ["red"]]', '"../../../etc/passwd"', r'"\u0000"', '"CON"', '"/dev/zero"']
    names = ["prompt", "n", "seed", "size", "num_inference_steps", "guidance_scale", "lora", "model", "stream", "__proto__"]
    bodies = deep + [f'{{"prompt": "x", "num_inference_steps": 1, "{name}": {value}}}'.encode() for name in names
                     for value in values]
    bodies += [b"", b"null", b"3", b'"text"', b"[]", b"{", b'{"prompt"}', b"\xff\xfe" + good, b'{"prompt": "\xff"}',
               good[:-1], good + b"x", b"\x00" * 100, "{'prompt': 'a'}".encode(), good.replace(b'"a cat"', b'"a\ncat"')]
    r = random.Random(0)
    while len(bodies) < 200:
        cut = bytearray(good)
        for _ in range(3):
            cut[r.randrange(len(cut))] = r.randrange(256)
        bodies.append(bytes(cut))
    return bodies


def test_hostile_bodies(server):
    """Each gets one answer, of a kind that is known, and the server goes on as before."""
    bodies, seen = hostile(), set()
    assert len(bodies) >= 200
    for body in bodies:
        answer = server.raw(post(body))
        status = int(answer.split(b" ", 2)[1])
        seen.add(status)
        assert status in (200, 400, 404), (body[:200], answer[:300])
        assert answer.count(b"HTTP/1.1 ") == 1
        if status != 200:
            error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert error["message"] and "Traceback" not in error["message"] and "/root" not in error["message"]
    assert seen == {200, 400, 404} and server.draw(num_inference_steps=1).shape == (1, 32, 32, 3)


GOOD = json.dumps(dict(prompt="a", num_inference_steps=1)).encode()
SMUGGLED = {
    "two lengths": post(GOOD, "Content-Length: 3"), "the same twice": post(GOOD, f"Content-Length: {len(GOOD)}"),
    "chunked": post(b"5\r\nhello\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    "both": post(GOOD, "Transfer-Encoding: identity"), "a sign": post(GOOD, length=f"+{len(GOOD)}"),
    "hexadecimal": post(GOOD, length=hex(len(GOOD))), "negative": post(GOOD, length=-1),
    "a list of lengths": post(GOOD, length=f"{len(GOOD)}, {len(GOOD)}"), "a space": post(GOOD, "Content-Length : 5"),
    "folded": post(GOOD, "X-A: b", " Content-Length: 5", "Transfer-Encoding:\tchunked"),
    "no colon": post(GOOD, "Content-Length 5"), "huge": post(GOOD, length=10 ** 13),
    "a lone CR, chunked": post(GOOD, "X: a\r\r", "Transfer-Encoding: chunked")}


@pytest.mark.parametrize("case", SMUGGLED)
def test_smuggling(case, server):
    """What a proxy could read in another way is refused, and the connection closed."""
    answer = server.raw(SMUGGLED[case] + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 413")), answer[:300]
    assert answer.count(b"HTTP/1.1 ") == 1 and b"Connection: close" in answer


def test_a_lone_cr_hides_no_header(server):
    """RFC 9112 2.2: it is no end of a line."""
    hidden = "GET / HTTP/1.1\r\nHost: localhost\r\nX: a\rContent-Length: 44\r\n\r\n".encode()
    answer = server.raw(hidden + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200") == 2, "the second request is no body of the first"
    answer = server.raw(b"GET /healthz HTTP/1.1\r\nX: a\r\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 403") and answer.count(b"HTTP/1.1 ") == 1
    body = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    text = post(body, "X: a\r").replace(b"Connection: close\r\n", b"")
    answer = server.raw(text + b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 ") == 2 and answer.startswith(b"HTTP/1.1 400") and b'"ready"' in answer


def test_other_requests(server):
    for text, status in ((b"GET /nothing HTTP/1.1", 404), (b"GET /../../etc/passwd HTTP/1.1", 404),
                         (b"GET /v1/images/files/../../../serve.py HTTP/1.1", 404), (b"GET /%2e%2e/x HTTP/1.1", 404),
                         (b"GET /v1/images/files/x.png HTTP/1.1", 404), (b"PUT /v1/models HTTP/1.1", 405),
                         (b"DELETE / HTTP/1.1", 405), (b"GET /v1/images/generations HTTP/1.1", 405),
                         (b"POST /healthz HTTP/1.1", 405), (b"GET / HTTP/9.9", 505), (b"GET /", 400), (b"\x16\x03\x01\x02", 400),
                         (b"GET /" + b"a" * 70_000 + b" HTTP/1.1", 414), (b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000, 431),
                         (b"GET / HTTP/1.1" + b"\r\nX: a" * 200, 431)):
        answer = server.raw(text + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert int(answer.split(b" ", 2)[1]) == status, (text[:50], answer[:200])
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        if status == 405:
            assert re.search(rb"\r\nAllow: (GET|POST)", answer) and b'"code": null' in answer
    assert server.raw(post(GOOD).replace(b"application/json", b"text/plain")).startswith(b"HTTP/1.1 415")
    assert server.raw(post(GOOD).replace(b"localhost", b"evil.example")).startswith(b"HTTP/1.1 403")
    assert server.raw(post(b" " * (mm.MAX_BODY + 1))).startswith(b"HTTP/1.1 413")
    assert server.raw(post(GOOD, "Content-Encoding: gzip")).startswith(b"HTTP/1.1 415")
    for host, status in ((b"127.0.0.2", 200), (b"[::1]:80", 200), (b"127.0.0.1.evil.example", 403), (b"0.0.0.0", 403)):
        assert int(server.raw(post(GOOD).replace(b"localhost", host)).split(b" ", 2)[1]) == status
    server.args.public = True
    assert server.raw(post(GOOD).replace(b"localhost", b"any.example")).startswith(b"HTTP/1.1 200"), "behind a proxy"
    server.args.public = False


def test_one_connection_for_several_requests(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    for path, status in (("/healthz", 200), ("/nothing", 404), ("/", 200), ("/metrics", 200)):
        connection.request("GET", path)
        answer = connection.getresponse()
        before = connection.sock
        assert answer.status == status and len(answer.read()) == int(answer.headers["Content-Length"])
        assert connection.sock is before is not None
    connection.request("HEAD", "/")
    answer = connection.getresponse()
    assert answer.status == 200 and int(answer.headers["Content-Length"]) > 1000 and answer.read() == b""
    connection.close()


def test_what_a_server_tells_of_itself(server):
    assert server.ask("/healthz")[2] == dict(status="ok") and server.ask("/readyz")[0] == 200
    _, headers, answer = server.ask("/openapi.json", headers={"X-Request-Id": "my-1"})
    assert headers["X-Request-Id"] == "my-1" and headers["X-Content-Type-Options"] == "nosniff"
    fields = answer["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert re.search(fields["size"]["pattern"], "32x48") and not re.search(fields["size"]["pattern"], "xauto 9")
    assert "/v1/models/{name}" in answer["paths"] and "components" not in answer
    server.raw(b"PUT / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert fields["n"]["maximum"] == 8 and "red" in fields["lora"]["description"]
    server.draw(n=2, num_inference_steps=3)
    text = server.ask("/metrics")[2].decode()
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(found["serve_pictures_total"]) >= 2 and float(found["serve_picture_steps_total"]) >= 6
    assert float(found['serve_requests_total{path="/v1/images/generations",status="200"}']) >= 1
    assert float(found['serve_requests_total{path="/",status="405"}']) >= 1
    assert all(re.fullmatch(r'serve_\w+(\{path="[\w/.]+"(,status="\d+")?\})?', name) for name in found)


def test_the_log(server, capsys, monkeypatch):
    server.draw("a secret", num_inference_steps=2, seed=4)
    server.until(lambda: not server.server.open_requests)
    time.sleep(0.05)
    line = next(json.loads(line) for line in capsys.readouterr().out.splitlines() if "generations" in line)
    assert line["status"] == 200 and line["seed"] == 4 and line["num_inference_steps"] == 2 and line["ms"] >= 0
    assert "secret" not in json.dumps(line)
    monkeypatch.setattr(server.args, "log_prompts", mm.parse_args(["--log_prompts"]).log_prompts)
    server.draw("no secret", num_inference_steps=2)
    server.until(lambda: not server.server.open_requests)
    time.sleep(0.05)
    line = next(json.loads(line) for line in capsys.readouterr().out.splitlines() if "generations" in line)
    assert line["prompt"] == "no secret"


# Overload, hang-ups, slowness, failure


def test_overload(home):
    """Every request is answered: drawn or 429 with a time to wait, and none is lost."""
    with another("--max_batch", 2, "--max_queue", 5, "--max_n", 5) as server:
        answers = []

        def ask():
            answers.append(server.ask(prompt="a cat", num_inference_steps=20)[:2])
        threads = [threading.Thread(target=ask) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = [status for status, _ in answers]
        assert len(statuses) == 24 and set(statuses) == {200, 429} and statuses.count(200) >= 5
        assert all(int(headers["Retry-After"]) >= 1 for status, headers in answers if status == 429)
        assert server.ask(prompt="a cat", n=6)[0] == 400 and server.draw(n=2, num_inference_steps=1).shape[0] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_costs_no_more(stream, server):
    before = server.engine.counted["picture_steps"]
    body = json.dumps(dict(prompt="a cat", n=4, num_inference_steps=250, stream=stream)).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(post(body))
        server.until(lambda: server.engine.pictures)
        s.sendall(b"X")  # of a next request
        waiting = socket.create_connection(("127.0.0.1", server.port))
        waiting.sendall(post(body))
        server.until(lambda: len(server.engine.pictures) > 4)
        waiting.close()
    server.until(lambda: not server.engine.pictures, 10)
    assert server.engine.counted["picture_steps"] - before < 700
    assert server.draw(num_inference_steps=1).shape == (1, 32, 32, 3)


def test_slow_clients(server, monkeypatch):
    """Bytes that drip in, half a body, and a connection that says nothing end in time; others are served meanwhile."""
    monkeypatch.setattr(mm, "READ_SECONDS", 0.7)
    drip, half, silent = (socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(3))
    half.sendall(post(GOOD, length=1000))
    began, closed = time.monotonic(), False
    while not closed and time.monotonic() - began < 8:
        with contextlib.suppress(TimeoutError):
            try:
                drip.sendall(b"X")
                drip.settimeout(0.1)
                closed = drip.recv(100) == b""
            except ConnectionError:
                closed = True
        assert server.ask("/healthz")[0] == 200
    assert closed and time.monotonic() - began < 4
    assert half.recv(1000).startswith(b"HTTP/1.1 408") and silent.recv(100) == b""
    for s in (drip, half, silent):
        s.close()


def test_too_many_clients(home):
    with another("--connections", 2) as server:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        time.sleep(0.2)
        answer = server.raw(post(GOOD))
        assert answer.startswith(b"HTTP/1.1 503") and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        for s in held:
            s.close()
        server.until(lambda: server.raw(b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200"))


def test_a_deadline(home):
    with another("--deadline", 0.5) as server:
        status, _, answer = server.ask(prompt="a cat", n=8, num_inference_steps=250)
        assert status == 504 and answer["error"]["code"] == "timeout" and answer["error"]["type"] == "server_error"
        server.until(lambda: not server.engine.pictures, 5)
        answer = server.ask(prompt="a cat", n=8, num_inference_steps=250, stream=True)[2].decode()
        assert answer.rstrip().split("event: ")[-1].startswith("error") and "longer than" in answer


@pytest.mark.parametrize("error, status", [(RuntimeError("a bug"), 500), (torch.OutOfMemoryError("CUDA out of memory"), 503)])
def test_what_fails_ends_its_own_request_alone(error, status, server, monkeypatch):
    derivative = server.model.derivative

    def fails(z, *more):
        if z.shape[-1] == 6:
            raise error
        return derivative(z, *more)
    monkeypatch.setattr(server.model, "derivative", fails)
    other = []
    thread = threading.Thread(target=lambda: other.append(server.draw(num_inference_steps=60)))
    thread.start()
    server.until(lambda: server.engine.pictures)
    got, _, answer = server.ask(prompt="a cat", size="48x48")
    thread.join()
    assert got == status and answer["error"]["type"] == "server_error" and "bug" not in answer["error"]["message"]
    assert len(other) == 1 and server.draw(num_inference_steps=1).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("steps", [1, 3])
def test_what_is_no_number_is_no_picture(steps, server, monkeypatch):
    """It would be black. Pictures beside it are drawn."""
    derivative = server.model.derivative

    def fails(z, *more):
        return derivative(z, *more) * (torch.nan if z.shape[-1] == 6 else 1)
    monkeypatch.setattr(server.model, "derivative", fails)
    status, _, answer = server.ask(prompt="a cat", size="48x48", num_inference_steps=steps)
    assert status == 500 and "no number" in answer["error"]["message"]
    assert server.draw(num_inference_steps=steps).std() > 5


def test_a_device_that_has_failed_for_good_ends_the_engine(home, monkeypatch, capsys):
    with another() as server:
        def fails(*more, **how):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        monkeypatch.setattr(server.model, "derivative", fails)
        monkeypatch.setattr(mm.torch, "zeros", fails)
        assert server.ask(prompt="a cat")[0] == 500
        server.until(lambda: not server.engine.is_alive())
        assert server.ask("/healthz")[0] == 500 and server.ask("/readyz")[0] == 503
        status, headers, answer = server.ask(prompt="a cat")
        assert status == 503 and "illegal memory access" in answer["error"]["message"]


def test_what_failed_is_no_step(server, monkeypatch):
    before = dict(server.engine.counted)
    monkeypatch.setattr(server.model, "derivative", lambda *more: 1 / 0)
    assert server.ask(prompt="a cat")[0] == 500
    assert dict(server.engine.counted) == before


def test_a_client_that_waits_before_it_asks(server, monkeypatch):
    """The time for a request to come counts from its first byte."""
    monkeypatch.setattr(mm, "READ_SECONDS", 1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as s:
        for _ in range(2):
            time.sleep(0.7)
            head, _, body = post(GOOD).replace(b"Connection: close", b"X: y").partition(b"\r\n\r\n")
            s.sendall(head + b"\r\n\r\n")
            time.sleep(0.6)
            s.sendall(body)
            answer = http.client.HTTPResponse(s)
            answer.begin()
            assert answer.status == 200 and answer.read()


def test_a_step_that_does_not_end(server, monkeypatch):
    """end() waits no longer than it is told."""
    go, derivative = threading.Event(), server.model.derivative
    monkeypatch.setattr(server.model, "derivative", lambda *more: go.wait(20) and derivative(*more))
    drawing = threading.Thread(target=server.draw, kwargs=dict(num_inference_steps=1))
    drawing.start()
    server.until(lambda: server.engine.pictures)
    began = time.monotonic()
    assert server.engine.end(0.3) is False and time.monotonic() - began < 2
    server.engine.ending = False
    go.set()
    drawing.join()


def test_a_key(home, monkeypatch):
    monkeypatch.setenv("SERVE_API_KEY", "a key")
    with another() as server:
        for told, status in (({}, 401), ({"Authorization": "Bearer wrong"}, 401), ({"Authorization": "a key"}, 401),
                             ({"Authorization": "Bearer "}, 401), ({"Authorization": "Bearer a key"}, 200)):
            for path in ("/v1/models", "/v1/models/text2img", "/metrics", "/openapi.json"):
                got, headers, answer = server.ask(path, headers=told)
                assert got == status, (told, answer)
                if got == 401:
                    assert answer["error"]["code"] == "invalid_api_key" and headers["WWW-Authenticate"] == "Bearer"
                else:
                    assert path != "/openapi.json" or answer["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        assert server.ask(prompt="a")[0] == 401
        assert all(server.ask(path)[0] == 200 for path in ("/", "/healthz", "/readyz"))


def test_too_large_a_batch_is_tried_again_in_parts(server, monkeypatch):
    """Where memory is short for four at once, two and two are drawn; and none is lost."""
    derivative, sizes = server.model.derivative, []

    def small(z, *more):
        sizes.append(len(z))
        if len(z) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return derivative(z, *more)
    monkeypatch.setattr(server.model, "derivative", small)
    pictures = server.draw(n=4, seed=3, num_inference_steps=3, guidance_scale=1)
    assert max(sizes) == 4 and sizes.count(4) == 1
    assert 2 < server.engine.fits[server.model.shape(32, 32)] < 2.3, "and by and by it tries more again"
    server.engine.fits[server.model.shape(32, 32)] = 1.99
    sizes.clear()
    server.draw(n=4, num_inference_steps=2, guidance_scale=1)
    assert sizes[:2] == [1, 2], "what took the memory may have gone"
    server.engine.fits.clear()
    monkeypatch.undo()
    assert np.abs(pictures - server.draw(n=4, seed=3, num_inference_steps=3, guidance_scale=1)).max() <= 1


def test_many_long_requests_do_not_keep_a_short_one_waiting(server):
    """More pictures than a batch holds take turns."""
    long = [threading.Thread(target=server.draw, kwargs=dict(n=7, num_inference_steps=60)) for _ in range(2)]
    began = time.monotonic()
    for thread in long:
        thread.start()
    server.until(lambda: len(server.engine.pictures) == 14)
    server.draw(num_inference_steps=2)
    short = time.monotonic() - began
    for thread in long:
        thread.join()
    assert short < 0.5 * (time.monotonic() - began)


# The command line


def start(*flags, cwd, **env):
    process = subprocess.Popen([sys.executable, ROOT / "serve.py", "--port", "0", "--device", "cpu", *map(str, flags)], cwd=cwd,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env})
    line = process.stdout.readline()
    return process, json.loads(line) if line else None


def request(url, seconds=60, **body):
    asked = urllib.request.Request(f"{url}/v1/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=seconds) as answer:
        return json.load(answer)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_finishes_what_was_taken(number, status, home):
    process, ready = start(cwd=home)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(request(ready["url"], prompt="a cat", n=4, num_inference_steps=250)))
    thread.start()
    time.sleep(0.7)
    process.send_signal(number)
    time.sleep(0.8)  # it looks for one five times a second, and then goes on listening for a moment
    with pytest.raises(OSError):
        request(ready["url"], prompt="a cat", num_inference_steps=1)
    thread.join()
    _, err = process.communicate(timeout=30)
    assert process.returncode == status and err == "" and len(answers) == 1 and answers[0]["data"]


def test_a_second_signal_ends_it_at_once(home):
    process, ready = start(cwd=home)

    def ask():
        with contextlib.suppress(OSError):
            request(ready["url"], prompt="a cat", n=8, num_inference_steps=250)
    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    thread.join()
    assert process.returncode == 143


def run(*flags):
    return mm.main([str(flag) for flag in flags])


def test_what_cannot_be_served(home, tmp_path, monkeypatch, capsys):
    def said():
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("serve.py: "), lines
        return lines[0]
    monkeypatch.chdir(tmp_path)
    assert run("--port", 0) == 2 and "python text2img.py" in said()
    shutil.copytree(home / "out", "out")
    model = Path("out/text2img/model.safetensors")
    assert run("--port", 0, "--ckpt", "nothing.safetensors") == 2 and "nothing.safetensors" in said()
    assert run("--port", 0, "--lora_dir", "nothing") == 2 and "--lora_dir nothing" in said()
    Path("empty/below").mkdir(parents=True)
    assert run("--port", 0, "--lora_dir", "empty") == 2 and "has no .safetensors" in said()
    Path("empty/below/lora.safetensors").touch()
    assert run("--port", 0, "--lora_dir", "empty") == 2 and "did you mean empty/below" in said()
    finetune_lora.save_safetensors(Path("other.safetensors"), {"a": torch.zeros(2)}, dict(script="ddpm_2d.py"))
    assert run("--port", 0, "--ckpt", "other.safetensors") == 2 and "ddpm_2d.py" in said()
    Path("loras").mkdir()
    shutil.copy("other.safetensors", "loras")
    assert run("--port", 0, "--lora_dir", "loras") == 2 and "no LoRA of this model" in said()
    Path("cut.safetensors").write_bytes(model.read_bytes()[:-10])
    assert run("--port", 0, "--ckpt", "cut.safetensors") == 2 and "not a whole" in said()
    Path("model.pt").write_bytes(b"")
    assert run("--port", 0, "--ckpt", "model.pt") == 2 and "safetensors" in said()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert run("--port", taken.getsockname()[1]) == 1 and "in use" in said()
    assert run("--host", "203.0.113.1", "--port", 0, "--public") == 1 and "203.0.113.1" in said()
    assert run("--port", 0, "--max_size", 16) == 2 and "--max_size 16" in said()
    for flags, word in ((["--host", "0.0.0.0"], "SERVE_API_KEY"), (["--max_queue", "4"], "--max_n 8"), (["--port", "70000"], "--port"), (["--max_n", "0"], "--max_n"),
                        (["--deadline", "0"], "--deadline"),
                        (["--deadline", "1e12"], "--deadline"), (["--api_key", "schlüssel"], "ASCII")):
        with pytest.raises(SystemExit) as e:
            run(*flags)
        assert e.value.code == 2 and word in said()


# The page


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Browser:
    """Headless Chromium by its DevTools protocol."""

    def __enter__(self):
        connect = pytest.importorskip("websockets.sync.client").connect
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen([CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
                                         f"--user-data-dir={self.folder.name}", "about:blank"], stderr=subprocess.PIPE, text=True)
        line = next(line for line in self.process.stderr if "DevTools listening" in line)
        port = re.search(r"127\.0\.0\.1:(\d+)", line)[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            page = next(page for page in json.load(answer) if page["type"] == "page")
        self.connection = connect(page["webSocketDebuggerUrl"], max_size=None)
        self.socket, self.number, self.complaints = self.connection.__enter__(), 0, []
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")
        return self

    def __call__(self, method, **params):
        self.number += 1
        self.socket.send(json.dumps(dict(id=self.number, method=method, params=params)))
        while (message := json.loads(self.socket.recv(timeout=30))).get("id") != self.number:
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(message["params"])[:500])
        return message["result"]

    def js(self, code):
        return self("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)["result"].get("value")

    def until(self, code, seconds=30):
        deadline = time.monotonic() + seconds
        while not self.js(code):
            assert time.monotonic() < deadline, (code, self.js("document.body.innerText"), self.complaints)
            time.sleep(0.05)

    def open(self, url, width=1000):
        self("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        self("Page.navigate", url=url)
        self.until("document.readyState == 'complete' && typeof say == 'function'")

    def type(self, text):
        self("Input.insertText", text=text)

    def key(self, name, code=0):
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code, text="\r" if name == "Enter" else "")

    def __exit__(self, *error):
        self.connection.__exit__(None, None, None)
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with Browser() as browser:
        yield browser


SAYS = "document.getElementById('say').textContent"


def test_the_page_draws(browser, server):
    """By keyboard alone: a prompt, Enter; progress and pictures on the way; the picture that the API gives."""
    browser.open(server.url)
    browser.until(f"{SAYS} == 'Ready.'")
    assert browser.js("document.activeElement.id") == "prompt"
    browser.js("fill = (id, value) => document.getElementById(id).value = value; fill('seed', 5); fill('num_inference_steps', 8);"
               "fill('n', 2); fill('lora', 'red'); seen = new Set(); new MutationObserver(() => seen.add("
               "document.getElementById('say').textContent)).observe(document.getElementById('say'), {childList: true})")
    browser.type("a cat's hat")
    browser.key("Enter", 13)
    browser.until(f"{SAYS} == 'Done.'")
    pictures = [pixels(url.partition(",")[2]) for url in browser.js("[...document.images].map(image => image.src)")]
    expected = server.draw("a cat's hat", seed=5, num_inference_steps=8, n=2, lora="red")
    assert len(pictures) == 2 and all(np.abs(a - b).max() <= 1 for a, b in zip(pictures, expected))
    assert "Drawing." in browser.js("[...seen]") and browser.js("document.getElementById('bar').value") == 16
    assert browser.js("document.getElementById('prompt').offsetWidth > 0.9 * document.getElementById('form').offsetWidth")
    assert browser.js("document.querySelector('figure a').download").startswith("a_cat_s_hat_5")
    assert not browser.complaints, "no error, and nothing that the Content-Security-Policy forbids"


def test_the_page_waits_for_the_model(browser, server):
    """Opened too early, it says so and goes on by itself; where nobody answers, it says that."""
    engine, server.server.engine = server.server.engine, None
    browser.open(server.url)
    browser.until(f"{SAYS}.includes('being read')")
    browser.complaints.clear()  # Chromium notes the 503
    server.server.engine = engine
    browser.until(f"{SAYS} == 'Ready.'")
    browser.js("fetch = async () => { throw new TypeError('Failed to fetch') }; begin()")
    browser.until(f"{SAYS} == 'The server does not answer.'")
    browser.js("fetch = async () => new Response('<html>', {status: 502, statusText: 'Bad Gateway'}); begin()")
    browser.until(f"{SAYS} == '502 Bad Gateway'")


@pytest.mark.parametrize("flags", ["--class_cond", "--no-class_cond"])
def test_the_page_of_a_model_that_is_told_a_class_or_nothing(flags, browser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert latent_dit.main(f"--smoke --data drawn_faces --out out/x --device cpu --dtype fp32 {flags}".split()) == 0
    told = flags == "--class_cond"
    with another("--ckpt", "out/x/model.safetensors") as server:
        browser.open(server.url)
        browser.until(f"{SAYS} == 'Ready.'")
        assert (browser.js("document.getElementById('prompt').offsetWidth") > 0) == told
        assert (browser.js("document.querySelector('label[for=prompt]').offsetWidth") > 0) == told
        assert browser.js("document.querySelectorAll('#examples button').length") == 0
        assert browser.js("document.activeElement.id") == ("prompt" if told else "go")
        browser.js("document.getElementById('num_inference_steps').value = 2; document.getElementById('go').focus()")
        if told:
            browser.js("document.getElementById('prompt').value = 'fox'")
        browser.key("Enter", 13)
        browser.until(f"{SAYS} == 'Done.'")
        assert browser.js("document.querySelector('figcaption').textContent").startswith("fox" if told else "any")
        assert browser.js("document.images.length") == 1
    with pytest.raises(mm.Stop, match="--quant"):
        mm.open_model(mm.parse_args(["--ckpt", "out/x/model.safetensors", "--quant", "nf4"]))


def test_copy_as_curl(browser, server):
    """What the button copies draws the same picture, in a shell."""
    browser.open(server.url)
    browser.until(f"{SAYS} == 'Ready.'")
    browser.js("navigator.clipboard.writeText = async text => { copied = text }; document.getElementById('seed').value = 6")
    browser.type("a cat's \"hat\" \\ $HOME")
    browser.key("Enter", 13)
    browser.until(f"{SAYS} == 'Done.'")
    browser.js("document.querySelector('figure button').click()")
    browser.until(f"{SAYS} == 'Copied.'")
    if not shutil.which("curl"):
        pytest.skip("there is no curl here")
    answer = json.loads(subprocess.run(browser.js("copied"), shell=True, capture_output=True, text=True, check=True).stdout)
    shown = pixels(browser.js("document.images[0].src").partition(",")[2])
    assert np.abs(pixels(answer["data"][0]["b64_json"]) - shown).max() <= 1


def test_the_page_says_what_is_wrong_and_stops(browser, server):
    browser.open(server.url, width=380)
    browser.until(f"{SAYS} == 'Ready.'")
    assert browser.js("document.documentElement.scrollWidth") <= 380, "fits on a phone"
    browser.js("document.getElementById('size').add(new Option('33x33', '33x33', true, true))")
    browser.type("<img src=x onerror=alert(1)>")
    browser.key("Enter", 13)
    browser.until(f"{SAYS}.includes('multiples of')")
    assert browser.js("document.querySelectorAll('figure').length") == 0
    browser.js("document.getElementById('size').value = 'auto'; document.getElementById('num_inference_steps').value = 250;"
               "document.getElementById('n').value = 8; document.getElementById('go').click()")
    browser.until(f"{SAYS} == 'Drawing.'")
    browser.js("document.getElementById('stop').click()")
    browser.until(f"{SAYS} == 'Stopped.'")
    server.until(lambda: not server.engine.pictures, 10)


def test_the_page_asks_for_a_key(browser, home):
    with another("--api_key", "secret") as server:
        browser.open(server.url)
        browser.until(f"{SAYS}.includes('key')")
        for key, said in (("wrong", "key"), ("secret", "Ready.")):
            browser.js("document.getElementById('key').value = ''; document.getElementById('key').focus()")
            browser.type(key)
            browser.key("Enter", 13)
            browser.until(f"{SAYS}.includes('{said}')")
        browser.js("document.getElementById('num_inference_steps').value = 2")
        browser.js("document.getElementById('prompt').focus()")
        browser.type("a cat")
        browser.key("Enter", 13)
        browser.until(f"{SAYS} == 'Done.'")
