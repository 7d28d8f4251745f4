"""finetune_lora.py: every network, tokenizer and sampler against diffusers, transformers, sentencepiece and peft, on small
random checkpoints that are built here, and the command line."""
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import finetune_lora as mm
from test_text2img import normal, randomise, write_vocabulary

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="the pinned diffusers wants Python 3.11")
KINDS = ["sd", "sdxl", "dev", "schnell"]


@pytest.fixture(autouse=True)
def fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


# Small pipelines of diffusers

TRAINING = "a photo of a cat dog the quick brown fox jumps over lazy painting riding horse style café naïve".split()


def spread(model, seed=0):
    """Weights that all matter, small enough for signals to keep their size."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=g)
        p.data = p.data + 0.1 * noise if p.ndim == 1 else noise * p[0].numel() ** -0.5
    return model.eval()


def write_unigram(folder):
    """spiece.model of sentencepiece as T5 has it, and what transformers makes of it."""
    import sentencepiece
    from transformers import T5TokenizerFast
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(TRAINING, 12)).capitalize() + str(rng.choice([".", "!", "?", ", and so on."]))
             for _ in range(1000)]
    (folder / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "spiece"), vocab_size=200, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>",
        normalization_rule_name="nmt_nfkc", hard_vocab_limit=False, minloglevel=2)
    for name in ("corpus.txt", "spiece.vocab"):
        (folder / name).unlink()
    tokenizer = T5TokenizerFast.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def clip(kind, vocab):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    config = CLIPTextConfig(vocab_size=vocab, hidden_size=32, intermediate_size=96, num_hidden_layers=3,
                            num_attention_heads=4, max_position_embeddings=77, projection_dim=24,
                            hidden_act="quick_gelu" if kind == "L" else "gelu", bos_token_id=0, eos_token_id=2,
                            pad_token_id=1)
    return randomise((CLIPTextModel if kind == "L" else CLIPTextModelWithProjection)(config), len(kind))


def autoencoder(**more):
    from diffusers import AutoencoderKL
    return spread(AutoencoderKL(block_out_channels=[8, 16, 16, 16], down_block_types=["DownEncoderBlock2D"] * 4,
                                up_block_types=["UpDecoderBlock2D"] * 4, norm_num_groups=8, layers_per_block=1, **more))


def make_pipeline(kind, folder):
    """A whole pipeline of diffusers with random weights, in the layout of the hub."""
    import diffusers
    from transformers import CLIPTokenizer, T5Config, T5EncoderModel
    torch.manual_seed(0)
    vocab = write_vocabulary(folder / "tok")
    told = dict(text_encoder=clip("L", vocab), tokenizer=CLIPTokenizer.from_pretrained(folder / "tok"))
    noise = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                 steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    unet = dict(sample_size=16, norm_num_groups=8, layers_per_block=2)
    if kind == "sd":
        unet = diffusers.UNet2DConditionModel(
            **unet, block_out_channels=[16, 24, 32, 32], cross_attention_dim=32, attention_head_dim=8)
        pipe = diffusers.StableDiffusionPipeline(
            vae=autoencoder(latent_channels=4), unet=spread(unet), safety_checker=None, feature_extractor=None,
            scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, **{k: v for k, v in noise.items() if k != "clip_sample"}),
            requires_safety_checker=False, **told)
    elif kind == "sdxl":
        write_vocabulary(folder / "tok2")
        about = json.loads((folder / "tok2/tokenizer_config.json").read_text())
        (folder / "tok2/tokenizer_config.json").write_text(json.dumps({**about, "pad_token": "!"}))
        unet = diffusers.UNet2DConditionModel(
            **unet, block_out_channels=[16, 32, 32], cross_attention_dim=64, attention_head_dim=[2, 4, 8],
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            transformer_layers_per_block=[1, 2, 3], use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 24)
        pipe = diffusers.StableDiffusionXLPipeline(
            vae=autoencoder(latent_channels=4, scaling_factor=0.13025), unet=spread(unet),
            text_encoder_2=clip("bigG", vocab), tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tok2"),
            scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **{
                k: v for k, v in noise.items() if k not in ("clip_sample", "set_alpha_to_one")}), **told)
    else:
        t5_tokenizer, dev = write_unigram(folder / "t5"), kind == "dev"
        t5 = T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer) + 20, d_model=32, d_kv=8, d_ff=64, num_layers=3,
                                     num_heads=4, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
                                     decoder_start_token_id=0))
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=2, num_single_layers=3, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=dev,
            axes_dims_rope=(4, 6, 6))
        shift = dict(shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
                     max_image_seq_len=4096) if dev else dict(shift=1.0)
        pipe = diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, **shift),
            vae=autoencoder(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                            use_post_quant_conv=False),
            text_encoder_2=spread(t5), tokenizer_2=t5_tokenizer, transformer=spread(transformer), **told)
    pipe.save_pretrained(folder / "pipe", safe_serialization=True)
    for name, source in dict(tokenizer="tok", tokenizer_2={"sdxl": "tok2"}.get(kind, "t5")).items():
        for file in (folder / source).glob("*") if (folder / "pipe" / name).exists() else ():
            (folder / "pipe" / name / file.name).write_bytes(file.read_bytes())
    if kind == "sd":  # as on the hub: without clip_sample DDIM would clip
        file = folder / "pipe/scheduler/scheduler_config.json"
        about = {**json.loads(file.read_text()), "clip_sample": False}
        file.write_text(json.dumps({k: v for k, v in about.items() if k != "timestep_spacing"}))
    pipe = type(pipe).from_pretrained(folder / "pipe")
    pipe.set_progress_bar_config(disable=True)
    return folder / "pipe", pipe.to(torch.float64)


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """kind -> (folder, diffusers' pipeline in float64)."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = make_pipeline(kind, tmp_path_factory.mktemp(kind))
        return made[kind]
    return get


def open_base(folder, *flags, dtype=torch.float64):
    """The base as the command line opens it, in float64."""
    args = mm.parse_args(["--base", str(folder), "--device", "cpu", "--size", "64", *map(str, flags)])
    files = mm.find_base(args.base)
    kind = next(k for k in mm.PRESETS if k in files)
    for k, v in mm.PRESETS[kind].items():
        setattr(args, k, v if getattr(args, k) is None else getattr(args, k))
    base = {"text2img": mm.Text2Img, "flux": mm.FluxBase}.get(kind, mm.StableDiffusion)(files, args, CPU, dtype)
    base.load_text()
    base.load_vae()
    base.load_model()
    base.vae.double()
    return base


# The networks


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_diffusers(kind, pipelines):
    folder, pipe = pipelines(kind)
    base, z = open_base(folder), normal(2, 16 if kind in ("dev", "schnell") else 4, 8, 12).double()
    with torch.no_grad():
        if kind in ("sd", "sdxl"):
            t, context = torch.tensor([981, 17]), normal(2, 77, 32 if kind == "sd" else 64, seed=1).double()
            text, more = [context], {}
            if kind == "sdxl":
                pooled, sizes = normal(2, 24, seed=2).double(), torch.tensor([[512.0, 640, 3, 5, 64, 96]] * 2)
                text, more = [context, pooled, sizes], dict(text_embeds=pooled, time_ids=sizes)
            theirs = pipe.unet(z, t, context, added_cond_kwargs=more).sample
        else:
            t, txt, pooled = torch.tensor([0.9, 0.3]), normal(2, 12, 32, seed=1).double(), normal(2, 32, seed=2).double()
            text = [txt, pooled] + [torch.tensor([3.5, 1.0])] * (kind == "dev")
            packed = pipe._pack_latents(z, 2, 16, 8, 12)
            ids = pipe._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float64)
            theirs = pipe.transformer(packed, txt, pooled, t.double(), ids, torch.zeros(12, 3),
                                      text[2] if kind == "dev" else None).sample
            theirs = pipe._unpack_latents(theirs, 64, 96, 8)
        ours = base.model(z, t, text)
    assert theirs.std() > 0.01
    exact = 1e-9 if kind in ("sd", "sdxl") else 1e-6  # diffusers turns FLUX's q and k in float32
    assert (ours - theirs).abs().max() < exact * theirs.abs().max()


@pytest.mark.parametrize("kind", ["sd", "sdxl", "dev"])
def test_the_autoencoder_is_diffusers(kind, pipelines):
    folder, pipe = pipelines(kind)
    base, x = open_base(folder), normal(2, 3, 64, 48).double()
    how = pipe.vae.config
    with torch.no_grad():
        z = (pipe.vae.encode(x).latent_dist.mode() - (how.shift_factor or 0)) * how.scaling_factor
        again = pipe.vae.decode(z / how.scaling_factor + (how.shift_factor or 0)).sample
        assert torch.allclose(base.encode(x), z, 1e-9, 1e-11)
        assert torch.allclose(base.decode(z), again, 1e-9, 1e-11)


def test_the_old_names_of_an_autoencoder(pipelines, tmp_path):
    """SD 1.5's file on the hub calls attention's layers otherwise; older ones hold them as convolutions."""
    folder, _ = pipelines("sd")
    tensors, about = mm.load_safetensors(folder / "vae/diffusion_pytorch_model.safetensors")
    old = {}
    for k, v in tensors.items():
        for new, name in dict(to_q="query", to_k="key", to_v="value", to_out="proj_attn").items():
            if f".{new}." in k and k.endswith("weight"):
                v = v[:, :, None, None]
            k = k.replace(f".{new}.0.", f".{name}.").replace(f".{new}.", f".{name}.")
        old[k] = v.clone()
    mm.save_safetensors(tmp_path / "old.safetensors", old, about)
    one = mm.open_vae([folder / "vae/diffusion_pytorch_model.safetensors"], dict(norm_num_groups=8))
    two, x = mm.open_vae([tmp_path / "old.safetensors"], dict(norm_num_groups=8)), normal(1, 3, 16, 16)
    assert torch.equal(one.encode(x), two.encode(x))
    scaled = mm.open_vae([tmp_path / "old.safetensors"], dict(norm_num_groups=8, scaling_factor=0.5))
    assert mm.fingerprint(one) == mm.fingerprint(two) != mm.fingerprint(scaled)


# What reads a text

TEXTS = ["a photo of a cat", "", "cat " * 200, "the quick   brown fox, café; naïve!!! horse", "ｆｕｌｌ ½ ﬁne\u00a0x\u200b", "日本 猫",
         "<extra_id_0> cat </s> dog", "tab\there\nnew", "E\u0301 Ωmega ☃ 🙂"]


def test_t5s_ids_are_transformers_and_sentencepieces(pipelines):
    import sentencepiece
    folder, pipe = pipelines("dev")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer_2/spiece.model"))
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz ABC.,!?é½ﬁＡ日☃\u3000")
    texts = TEXTS + ["".join(rng.choice(letters, 40)) for _ in range(300)]
    for name in ("tokenizer.json", "spiece.model"):
        ours = mm.read_unigram(folder / "tokenizer_2" / name)
        for text in texts:
            assert ours(text) == pipe.tokenizer_2(text).input_ids, (name, text)
            if "<" not in text:
                assert ours(text) == [*pieces.encode(text), 1], (name, text)


def test_t5_is_transformers(pipelines):
    folder, pipe = pipelines("dev")
    base = open_base(folder)
    ids = torch.tensor(np.random.default_rng(0).integers(0, 200, (2, 300)))
    with torch.no_grad():
        ours, theirs = base.t5(ids), pipe.text_encoder_2(ids)[0]
    assert (ours - theirs).abs().max() < 1e-5  # its norm's variance is float32


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_read_as_diffusers_reads_them(kind, pipelines):
    folder, pipe = pipelines(kind)
    base = open_base(folder)
    with torch.no_grad():
        for text in TEXTS[:4]:
            ours = base.prepare([text])
            if kind == "sd":
                theirs = [pipe.encode_prompt(text, "cpu", 1, False)[0]]
            elif kind == "sdxl":
                context, _, pooled, _ = pipe.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)
                theirs = [context, pooled, torch.tensor([[64.0, 64, 0, 0, 64, 64]])]
            else:
                txt, pooled = pipe.encode_prompt(text, None, "cpu", max_sequence_length=base.length)[:2]
                theirs = [txt, pooled] + [torch.ones(1)] * (kind == "dev")
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs):
                assert a.shape == b.shape and (a - b).abs().max() < 1e-6, (kind, text)


# Drawing


@pytest.mark.parametrize("kind, sampler", [("sd", "ddim"), ("sd", "euler"), ("sd", "dpmpp_2m"), ("sdxl", "euler"),
                                           ("sdxl", "dpmpp_2m"), ("dev", "euler"), ("schnell", "euler")])
@pytest.mark.parametrize("negative", ["", "a dog"])
def test_pipelines_draw_the_same(kind, sampler, negative, pipelines):
    """The latents after each of four steps, and the picture."""
    import diffusers
    folder, pipe = pipelines(kind)
    flux = kind in ("dev", "schnell")
    if flux and negative:
        pytest.skip("FLUX has no negative prompt")
    base = open_base(folder, "--sampler", sampler, "--sample_steps", 4, "--cfg_scale", 1 if kind == "schnell" else 4)
    z, prompt, scale = normal(1, 16 if flux else 4, 8, 8).double(), "a photo of a cat", base.args.cfg_scale
    scheduler, seen = pipe.scheduler, []
    if not flux:
        pipe.scheduler = dict(ddim=diffusers.DDIMScheduler, euler=diffusers.EulerDiscreteScheduler,
                              dpmpp_2m=diffusers.DPMSolverMultistepScheduler)[sampler].from_config(scheduler.config)
    latents = pipe._pack_latents(z, 1, 16, 8, 8) if flux else z * 1
    more = dict(max_sequence_length=base.length) if flux else dict(negative_prompt=negative or None)
    with torch.no_grad():
        picture = pipe(prompt=prompt, height=64, width=64, num_inference_steps=4, guidance_scale=scale, latents=latents,
                       output_type="pt", callback_on_step_end=lambda p, i, t, k: seen.append(k["latents"].clone()) or k,
                       **more).images
        pipe.scheduler = scheduler
        text = base.prepare([prompt, negative])
        null = base.features(base.null(negative, mm.pick(text, [1])))
        drawn = base.draw(z, base.features(mm.pick(text, [0])), null)
        last = pipe._unpack_latents(seen[-1], 64, 64, 8) if flux else seen[-1]
        ours = (base.decode(drawn) / 2 + 0.5).clamp(0, 1)
    assert len(seen) == 4 and (drawn - last).abs().max() < 5e-4 * last.abs().max()  # their alpha_bar is float32
    assert (ours - picture).abs().max() < 1e-3


# LoRA files

PEFT_TARGETS = {"sd": ["to_q", "to_k", "to_v", "to_out.0", "proj_in"], "sdxl": ["to_q", "to_k", "to_v", "ff.net.0.proj"],
                "dev": ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
                        "attn.add_v_proj", "ff.net.2", "norm1.linear", "proj_mlp", "proj_out"]}
OURS = {"sd": r"\.(to_[qkv]|to_out\.0|proj_in)$", "sdxl": r"\.to_[qkv]$|ff\.net\.0\.proj$",
        "dev": r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj)$|ff\.net\.2$|norm1\.linear$|proj_mlp$|blocks\.\d\.proj_out$"}
TEXT = "text_encoder.*(q|k|v|out)_proj$"


def with_peft(kind, pipelines):
    """A fresh pipeline of diffusers with random LoRAs by peft in network and text encoders, alpha twice the rank."""
    import diffusers
    from peft import LoraConfig
    folder, pipe = pipelines(kind)
    pipe = type(pipe).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(7)
    parts = {name: getattr(pipe, name) for name in ("unet", "transformer", "text_encoder") if hasattr(pipe, name)}
    if kind == "sdxl":
        parts["text_encoder_2"] = pipe.text_encoder_2
    for name, part in parts.items():
        targets = ["q_proj", "k_proj", "v_proj", "out_proj"] if name.startswith("text") else PEFT_TARGETS[kind]
        part.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        for k, p in part.named_parameters():
            if "lora_" in k:
                p.data = torch.randn(p.shape, generator=g) * 0.2
    return folder, pipe.to(torch.float64), parts, diffusers


def state_of(parts):
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict
    return {name: convert_state_dict_to_diffusers(get_peft_model_state_dict(part)) for name, part in parts.items()}


def save_with_diffusers(pipe, parts, folder, **more):
    state = state_of(parts)
    named = {f"{name}_lora_layers": state[name] for name in state}
    type(pipe).save_lora_weights(folder, **named, safe_serialization=True, **more)
    return folder / "pytorch_lora_weights.safetensors"


def outputs(kind, pipe=None, base=None):
    """What network and text encoders make of one input, by diffusers or by finetune_lora.py."""
    z = normal(1, 16 if kind == "dev" else 4, 8, 8).double()
    with torch.no_grad():
        if base is not None:
            text = base.features(base.prepare(["a photo of a cat"]))
            return torch.cat([base.model(z, torch.tensor([0.5 if kind == "dev" else 500]), text).flatten(),
                              *(a.flatten() for a in text)])
        if kind == "dev":
            txt, pooled, ids = pipe.encode_prompt("a photo of a cat", None, "cpu", max_sequence_length=512)
            out = pipe.transformer(pipe._pack_latents(z, 1, 16, 8, 8), txt, pooled, torch.tensor([0.5]).double(),
                                   pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float64), ids,
                                   torch.ones(1)).sample
            return torch.cat([pipe._unpack_latents(out, 64, 64, 8).flatten(), txt.flatten(), pooled.flatten(),
                              torch.ones(1)])
        if kind == "sd":
            text, more = [pipe.encode_prompt("a photo of a cat", "cpu", 1, False)[0]], {}
        else:
            context, _, pooled, _ = pipe.encode_prompt("a photo of a cat", device="cpu", do_classifier_free_guidance=False)
            text = [context, pooled, torch.tensor([[64.0, 64, 0, 0, 64, 64]])]
            more = dict(text_embeds=pooled, time_ids=text[2])
        out = pipe.unet(z, torch.tensor(500), text[0], added_cond_kwargs=more).sample
        return torch.cat([out.flatten(), *(a.flatten() for a in text)])


def with_lora(folder, file, weight=1.0):
    base = open_base(folder)
    loras = mm.read_lora(file, base)
    mm.attach(base, loras, base.args, list(base.parts), weight)
    for adapted in base.adapted():
        adapted.double()
    return base, loras


def close(a, b):
    return (a - b).abs().max() < 2e-6 * b.abs().max()


@pytest.mark.parametrize("kind", ["sd", "sdxl", "dev"])
def test_a_lora_of_peft_does_here_what_it_does_there(kind, pipelines, tmp_path):
    from diffusers.training_utils import _collate_lora_metadata
    folder, pipe, parts, _ = with_peft(kind, pipelines)
    theirs, plain = outputs(kind, pipe), outputs(kind, base=open_base(folder))
    file = save_with_diffusers(pipe, parts, tmp_path, **_collate_lora_metadata(parts))
    base, loras = with_lora(folder, file)
    assert not close(plain, theirs) and close(outputs(kind, base=base), theirs)
    assert {alpha for _, _, alpha in loras.values()} == {8}
    for adapted in base.adapted():
        adapted.merge()
    assert close(outputs(kind, base=base), theirs)
    for adapted in base.adapted():
        adapted.unmerge()
        adapted.weights = [0.0]
    assert torch.equal(outputs(kind, base=base), plain)


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "dev"])
def test_a_lora_from_here_does_there_what_it_does_here(kind, naming, pipelines, tmp_path, monkeypatch):
    folder, pipe = pipelines(kind)
    base = open_base(folder, "--rank", 4, "--alpha", 6)
    names = dict.fromkeys(mm.target_layers(base, [OURS[kind], TEXT]))
    made = mm.attach(base, names, base.args, list(base.parts))
    g = torch.Generator().manual_seed(3)
    for lora in made.values():
        for p in lora.parameters():
            p.data = torch.randn(p.shape, generator=g) * 0.2
        lora.double()
    mm.write_lora(tmp_path / "lora.safetensors", base, made, naming, dict(format="pt"))
    ours, plain = outputs(kind, base=base), outputs(kind, base=open_base(folder))
    assert not close(ours, plain)
    again, loras = with_lora(folder, tmp_path / "lora.safetensors")
    assert loras.keys() == made.keys() and close(outputs(kind, base=again), ours)
    if kind == "dev" and naming == "kohya":
        for_any_width(monkeypatch, 32)
    pipe = type(pipe).from_pretrained(folder)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    assert close(outputs(kind, pipe.to(torch.float64)), ours)


def for_any_width(monkeypatch, D):
    """diffusers knows kohya's FLUX files by the width 3072 alone: its own code, for width D."""
    import inspect
    import diffusers.loaders.lora_conversion_utils as utils
    import diffusers.loaders.lora_pipeline as pipeline
    source = inspect.getsource(utils._convert_kohya_flux_lora_to_diffusers).replace("12288", str(4 * D))
    names = dict(vars(utils))
    exec(source.replace("3072", str(D)), names)
    monkeypatch.setattr(pipeline, "_convert_kohya_flux_lora_to_diffusers",
                        names["_convert_kohya_flux_lora_to_diffusers"])


@pytest.mark.parametrize("kind", ["sd", "sdxl", "dev"])
def test_the_gradients_of_a_training_step_are_pefts(kind, pipelines, tmp_path):
    """Weighted by diffusers' own signal-to-noise ratios; two pictures; in float64."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import _collate_lora_metadata, compute_snr
    folder, pipe, parts, _ = with_peft(kind, pipelines)
    base, _ = with_lora(folder, save_with_diffusers(pipe, parts, tmp_path, **_collate_lora_metadata(parts)))
    z0, eps = normal(2, 16 if kind == "dev" else 4, 8, 8).double(), normal(2, 16 if kind == "dev" else 4, 8, 8, seed=1).double()
    with torch.no_grad():
        text = base.features(base.prepare(["a photo of a cat", "a dog"]))
    t = torch.tensor([0.3, 0.8]) if kind == "dev" else torch.tensor([40, 700])
    base.model.train()
    ours = base.loss(z0, eps, t, text)
    ours.sum().backward()
    if kind == "dev":
        w = t.double().view(-1, 1, 1, 1)
        packed = pipe._pack_latents((1 - w) * z0 + w * eps, 2, 16, 8, 8)
        out = pipe.transformer(packed, text[0], text[1], t.double(), pipe._prepare_latent_image_ids(
            2, 4, 4, "cpu", torch.float64), torch.zeros(text[0].shape[1], 3), text[2]).sample
        theirs = (pipe._unpack_latents(out, 64, 64, 8) - (eps - z0)).square().mean((1, 2, 3))
    else:
        noising = DDPMScheduler.from_config(pipe.scheduler.config)
        more = dict(text_embeds=text[1], time_ids=text[2]) if kind == "sdxl" else {}
        out = pipe.unet(noising.add_noise(z0, eps, t), t, text[0], added_cond_kwargs=more).sample
        snr = compute_snr(noising, t)
        theirs = (out - eps).square().mean((1, 2, 3)) * snr.clamp(max=5) / snr
    theirs.sum().backward()
    assert torch.allclose(ours, theirs, rtol=1e-4)
    network = dict((pipe.transformer if kind == "dev" else pipe.unet).named_parameters())
    checked = 0
    for name, layer in base.model.named_modules():
        if isinstance(layer, mm.Adapted):
            for ab in "AB":
                one, two = getattr(layer.loras[0], ab).weight.grad, network[f"{name}.lora_{ab}.default.weight"].grad
                assert torch.allclose(one, two, 1e-3, 1e-4 * two.abs().max().item() + 1e-12)  # 0 among one position
                checked += 1
    assert checked == sum("lora_" in k for k in network) > 20


def renamed(file, rename, tmp_path):
    """The same tensors under other names."""
    tensors, _ = mm.load_safetensors(file)
    path = tmp_path / "renamed.safetensors"
    mm.save_safetensors(path, dict(pair for k, v in tensors.items() for pair in rename(k, v.clone())), dict(format="pt"))
    return path


@pytest.mark.parametrize("naming", ["lora.down", "lora_linear_layer", "processor", "base_model", "adapter", "alpha",
                                    "text_model", "bare"])
def test_every_naming_is_read(naming, pipelines, tmp_path):
    folder, pipe, parts, _ = with_peft("sd", pipelines)
    if naming in ("processor", "base_model", "bare"):
        parts = {"unet": parts["unet"]}
    file, down = save_with_diffusers(pipe, parts, tmp_path), {"A": "down", "B": "up"}

    def rename(k, v):
        ab, head = "A" if "lora_A" in k or ".down." in k else "B", k[:k.index(".lora")]
        new = {"lora.down": f"{head}.lora.{down[ab]}.weight", "lora_linear_layer": f"{head}.lora_linear_layer.{down[ab]}.weight",
               "base_model": f"base_model.model.{head.removeprefix('unet.')}.lora_{ab}.weight",
               "adapter": f"{head}.lora_{ab}.default.weight", "alpha": f"{head}.lora_{ab}.weight",
               "text_model": f"{head.replace('text_encoder.enc', 'text_encoder.text_model.enc')}.lora_{ab}.weight",
               "bare": f"{head.removeprefix('unet.')}.lora_{ab}.weight"}.get(naming)
        if naming == "processor":
            layer = head.rpartition(".to_")
            if not layer[0]:
                return
            new = f"{layer[0]}.processor.to_{layer[2].removesuffix('.0')}_lora.{down[ab]}.weight"
        yield new, v
        if naming == "alpha" and ab == "A":
            yield f"{head}.alpha", torch.tensor(2.0)
    base, loras = with_lora(folder, renamed(file, rename, tmp_path))
    assert {alpha for _, _, alpha in loras.values()} == {2.0 if naming == "alpha" else 4}
    for name, part in parts.items():
        for k, p in part.named_parameters():
            if k.endswith("lora_A.default.weight") and not (naming == "processor" and "proj_in" in k):
                key = f"{name}.{k.removesuffix('.lora_A.default.weight').removeprefix('text_model.')}"
                assert torch.equal(loras[key][0].flatten(), p.flatten().float()), key


SD15 = dict(in_channels=4, out_channels=4, block_out_channels=[320, 640, 1280, 1280], layers_per_block=2,
            norm_num_groups=32, cross_attention_dim=768, attention_head_dim=8,
            down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
REAL = ROOT.parent / "shared" / "data" / "lora" / "diffusers_old_keys_sd15_rank4.safetensors"


def full_size(kind="sd"):
    with torch.device("meta"):
        model = mm.SDUNet(SD15)
    base = SimpleNamespace(model=model, parts={"unet": model}, kind=kind, trained="unet")
    base.layers = lambda: mm.Base.layers(base)
    return base


def test_the_unet_of_sd15_has_its_size():
    assert sum(p.numel() for p in full_size().model.parameters()) == 859_520_964  # as CompVis' file has


@pytest.mark.skipif(not REAL.exists(), reason="the file of first-generation names is not there")
def test_a_real_lora_of_first_generation_names():
    loras = mm.read_lora(REAL, full_size())
    assert len(loras) == 128 and {A.shape[0] for A, _, _ in loras.values()} == {4}
    assert all(name.startswith("unet.") and A.any() and B.any() for name, (A, B, _) in loras.items())


# Memory


@pytest.mark.parametrize("kind, error", [("int8", 0.01), ("nf4", 0.12)])
def test_quantised_layers(kind, error):
    """Within the step of the code of what they stand for, and with the gradient of what they stand for."""
    layer = torch.nn.Linear(100, 50)
    layer.weight.data = normal(50, 100, seed=1)
    layer.weight.data[3, 5] = 40.0  # an outlier spoils its own block alone
    quantised, x = mm.Quantised(layer, kind), normal(2, 7, 100).requires_grad_()
    w = quantised.unpack(torch.float32)
    assert w.shape == layer.weight.shape
    block = torch.arange(5000).view(50, 100) // 64 == 305 // 64
    relative = ((w - layer.weight) / layer.weight.std())[~block].square().mean().sqrt()
    assert error / 4 < relative < error
    out = quantised(x)
    assert torch.allclose(out, x @ w.T + layer.bias, atol=1e-5)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    (wanted,) = torch.autograd.grad((x @ w.T + layer.bias).square().sum(), x)
    assert torch.allclose(grad, wanted, atol=1e-4)
    held = sum(b.numel() * b.element_size() for b in quantised.buffers() if b.shape != (256, 2))
    assert held < layer.weight.numel() * {"int8": 1.1, "nf4": 0.6}[kind]


def test_nf4_is_the_papers():
    """2305.14314 appendix E: quantiles of a Gaussian at even distances on either side, 0 among them, 8 and 7 of them."""
    from statistics import NormalDist
    offset = 0.5 * (1 / 32 + 1 / 30)  # from 1, where the last quantile would be infinite
    up = [NormalDist().inv_cdf(p) for p in np.linspace(1 - offset, 0.5, 9)[:-1]]
    down = [-NormalDist().inv_cdf(p) for p in np.linspace(1 - offset, 0.5, 8)[:-1]]
    levels = np.array(sorted(down + [0.0] + up)) / max(up)
    assert len(levels) == 16 and np.allclose(mm.NF4, levels, atol=1e-6)
    layer = torch.nn.Linear(64, 16, bias=False)
    layer.weight.data = torch.tensor(mm.NF4)[:, None] * torch.eye(16, 64) + torch.eye(16, 64, dtype=torch.bool).roll(20, 1)
    assert torch.allclose(mm.Quantised(layer, "nf4").unpack(torch.float32), layer.weight, atol=4e-3)  # as bfloat16


@pytest.mark.parametrize("kind", ["sd", "dev"])
def test_recomputed_activations_give_the_same_gradients(kind, pipelines):
    folder, _ = pipelines(kind)
    grads, calls = [], []
    for flags in ([], ["--grad_checkpoint"]):
        base = open_base(folder, "--rank", 2, *flags)
        torch.manual_seed(0)
        made = mm.attach(base, dict.fromkeys(mm.target_layers(base, ["attn"])), base.args, [base.trained])
        for lora in made.values():
            torch.nn.init.normal_(lora.double().B.weight)
        block = (base.model.mid_block["attentions"] if kind == "sd" else base.model.transformer_blocks)[0]
        block.register_forward_pre_hook(lambda *args: calls.append(len(grads)))
        z, eps = normal(1, base.channels, 8, 8).double(), normal(1, base.channels, 8, 8, seed=1).double()
        with torch.no_grad():
            text = base.features(base.prepare(["a cat"]))
        base.loss(z, eps, torch.tensor([0.5 if kind == "dev" else 500]), text).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for lora in made.values() for p in lora.parameters()]))
    assert torch.allclose(*grads, 1e-9, 1e-12) and grads[0].abs().max() > 0
    assert calls == [0, 1, 1]  # the second time on the way back


# A run


def run(*argv):
    return mm.main([str(a) for a in argv])


def photographs(n=6, folder="dog"):
    Path(folder).mkdir()
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 7, 3), np.uint8)
        Image.fromarray(pixels).resize((90, 70)).save(f"{folder}/{i}.png")
    return folder


def tensors(file):
    return mm.load_safetensors(Path(file))[0]


FEW = ["--device", "cpu", "--dtype", "fp32", "--size", 64, "--steps", 2, "--eval_every", 1, "--sample_steps", 2, "--rank", 2,
       "--batch_size", 2]


@pytest.mark.parametrize("kind, flags", [
    ("sd", []), ("sd", ["--targets", "attn", "text", "--class_prompt", "a dog", "--class_images", 3]),
    ("sdxl", ["--quant", "int8", "--format", "kohya"]), ("sdxl", ["--targets", "text", "--class_prompt", "a dog", "a cat",
                                                                  "--class_images", 3, "--negative_prompt", "x"]),
    ("dev", ["--quant", "nf4", "--grad_checkpoint"]), ("dev", ["--targets", "attn", "text"]), ("schnell", []),
    ("sdxl", ["--targets", "attn", "text", "--dtype", "bf16"]), ("dev", ["--targets", "text", "--dtype", "bf16"])])
def test_a_run(kind, flags, pipelines, capsys):
    folder, _ = pipelines(kind)
    photographs()
    told = ["--base", folder, "--data", "dog", "--instance_prompt", "a photo of sks dog"]
    assert run(*told, *FEW, *flags) == 0, capsys.readouterr().err
    out = Path("out/finetune_lora")
    for name in ("lora.safetensors", "ckpt.pt", "log.jsonl", "loss.png", "samples/000002.png"):
        assert (out / name).stat().st_size > 0, name
    state = tensors(out / "lora.safetensors")
    assert all(v.isfinite().all() for v in state.values())
    moved = [k for k, v in state.items() if ("lora_B" in k or "lora_up" in k) and v.any()]
    assert len(moved) > len(state) / 4
    assert any(k.startswith(("text_encoder.", "lora_te")) for k in state) == ("text" in flags)
    draw = ["--base", folder, *FEW[:6], "--sample_steps", 2, "--sample", 2, "--prompt", "a photo of sks dog", "--seed", 5]
    assert run(*draw, "--out", "plain") == 0
    assert run(*draw, "--out", "with", "--lora", f"{out}/lora.safetensors:900") == 0, capsys.readouterr().err
    assert run(*draw, "--out", "none", "--lora", f"{out}/lora.safetensors:0") == 0
    plain, with_it, none = (np.asarray(Image.open(f"{name}/generated/000001.png")).astype(int) for name in
                            ("plain", "with", "none"))
    assert np.abs(plain - with_it).max() > 3 and np.array_equal(plain, none)


def test_compile(pipelines, monkeypatch):
    """The network is one graph, with LoRAs and 4 bits, and gives the same: by the part of the compiler before C++."""
    folder, _ = pipelines("dev")
    photographs(2)
    told = ["--base", folder, "--data", "dog", "--instance_prompt", "x", *FEW, "--quant", "nf4"]
    assert run(*told, "--out", "plain") == 0
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile(self, backend="aot_eager", fullgraph=True))
    assert run(*told, "--out", "compiled", "--compile") == 0
    one, two = tensors("plain/lora.safetensors"), tensors("compiled/lora.safetensors")
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)


def test_resume_is_exact(pipelines, monkeypatch):
    folder, _ = pipelines("sd")
    photographs()
    told = ["--base", folder, "--data", "dog", "--instance_prompt", "x", *FEW, "--lora_dropout", 0.3]
    assert run(*told, "--steps", 4, "--out", "whole") == 0
    assert run(*told, "--steps", 2, "--out", "half") == 0
    assert run("--resume", "half/ckpt.pt", "--steps", 4, "--device", "cpu") == 0
    one, two = tensors("whole/lora.safetensors"), tensors("half/lora.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert run("--resume", "half/ckpt.pt", "--steps", 3) == 2
    assert run("--resume", "half/ckpt.pt", "--rank", 7) == 2
    (Path("dog") / "0.png").unlink()
    assert run("--resume", "half/ckpt.pt", "--steps", 5) == 2


def test_resume_of_a_lora_that_went_on(pipelines):
    """In kohya's names, with parts of SDXL's first text encoder that nothing reads; the file it began with is gone."""
    folder, _ = pipelines("sdxl")
    photographs()
    told = ["--base", folder, "--data", "dog", "--instance_prompt", "x", *FEW[:12], *FEW[14:], "--targets", "attn", "text"]
    assert run(*told, "--rank", 2, "--alpha", 3, "--format", "kohya") == 0
    on = [*told[:-3], "--lora", "out/finetune_lora/lora.safetensors", "--lr", 0.01]
    assert run(*on, "--steps", 3, "--out", "whole") == 0
    assert run(*on, "--steps", 2) == 0  # in the folder of the one that it goes on with
    assert Path("out/finetune_lora/lora.safetensors.old").exists()
    Path("out/finetune_lora/lora.safetensors.old").unlink()
    assert run("--resume", "out/finetune_lora/ckpt.pt", "--steps", 3, "--device", "cpu") == 0
    one, two = tensors("whole/lora.safetensors"), tensors("out/finetune_lora/lora.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_what_is_averaged_and_judged(pipelines, monkeypatch):
    """The average keeps no history of how it was made, and dropout acts in training alone."""
    folder, _ = pipelines("sd")
    photographs(40)
    seen, drops, dropout = [], [], mm.nn.Dropout.forward
    monkeypatch.setattr(mm, "write_lora", lambda path, base, made, *args: seen.extend(made.values()))
    monkeypatch.setattr(mm.nn.Dropout, "forward", lambda self, x: drops.append(torch.is_grad_enabled()) or dropout(self, x))
    saved = []
    monkeypatch.setattr(mm.torch, "save", lambda ckpt, f: saved.append(ckpt))
    assert run("--base", folder, "--data", "dog", "--instance_prompt", "x", *FEW, "--lora_dropout", 0.5) == 0
    assert not any(v.requires_grad for v in saved[-1]["ema"] + saved[-1]["model"])
    assert drops and all(drops)
    record = json.loads(Path("out/finetune_lora/log.jsonl").read_text().splitlines()[-1])
    assert record["val_loss"] > 0


@pytest.mark.parametrize("pattern, part", [("attn", "unet"), ("ff", "unet"), ("text", "text_encoder")])
def test_targets(pattern, part, pipelines):
    for kind in ("sd", "dev"):
        base = open_base(pipelines(kind)[0])
        names = mm.target_layers(base, [pattern])
        parts = {name.partition(".")[0] for name in names}
        assert parts == {part if part != "unet" else base.trained} and len(names) > 5
        if pattern == "ff":
            assert not any("attn" in name or "self_attn" in name for name in names)


def test_a_fused_layer_of_unequal_parts(pipelines):
    """q, k and v of FLUX are one layer in kohya's files: other ranks, other alphas, one of them missing."""
    base = open_base(pipelines("dev")[0])
    names, g = [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qv"], torch.Generator().manual_seed(0)
    loras = {name: (torch.randn(rank, 32, generator=g), torch.randn(32, rank, generator=g), alpha)
             for name, rank, alpha in zip(names, (4, 2), (4, 8))}
    made = mm.attach(base, loras, base.args, ["transformer"])
    for _ in range(2):  # and again: nothing grows
        mm.write_lora(Path("fused.safetensors"), base, made, "kohya", {})
        assert [k for k in tensors("fused.safetensors") if "down" in k] == [
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"]
        read = mm.read_lora(Path("fused.safetensors"), open_base(pipelines("dev")[0]))
        for name, rank in zip(names, (4, 2)):
            A, B, alpha = read[name]
            assert len(A) == rank and torch.allclose(alpha / len(A) * B @ A, made[name].delta(), atol=1e-5)
        base = open_base(pipelines("dev")[0])
        made = mm.attach(base, {name: read[name] for name in names}, base.args, ["transformer"])
    a, b = (made[name].A.weight for name in names)
    assert a.data_ptr() != b.data_ptr()


def test_what_the_metadata_says_of_alpha(pipelines, tmp_path):
    """rsLoRA divides by the root of the rank; a pattern's alpha holds for the layers that it names."""
    from diffusers.training_utils import _collate_lora_metadata
    folder, pipe, parts, _ = with_peft("sd", pipelines)
    about = _collate_lora_metadata(parts)
    for component in about.values():
        component["use_rslora"] = True
        component["alpha_pattern"] = {"attn1.to_q|attn1.to_k": 2, "to_q": 16}
    loras = mm.read_lora(save_with_diffusers(pipe, parts, tmp_path, **about), open_base(folder))
    block = "unet.mid_block.attentions.0.transformer_blocks.0."
    assert [loras[block + name][2] for name in ("attn1.to_q", "attn1.to_k", "attn2.to_q", "attn2.to_k")] == [4, 4, 32, 16]


def test_comfyuis_names(pipelines):
    base = open_base(pipelines("dev")[0])
    key = "diffusion_model.double_blocks.1.txt_attn.qkv"
    mm.save_safetensors(Path("c.safetensors"), {f"{key}.lora_A.weight": torch.randn(2, 32),
                                                f"{key}.lora_B.weight": torch.randn(96, 2)}, {})
    assert {name.rpartition(".")[2] for name in mm.read_lora(Path("c.safetensors"), base)} == {
        "add_q_proj", "add_k_proj", "add_v_proj"}


def test_a_base_in_the_users_own_cache(pipelines, monkeypatch, tmp_path, capsys):
    """Whole, without a network; and what is said where there is none."""
    import shutil
    folder, _ = pipelines("sd")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    shutil.copytree(folder, tmp_path / "hf/hub/models--some--model/snapshots/0123")
    draw = ["--size", 64, "--sample", 1, "--sample_steps", 1, "--prompt", "x", "--device", "cpu"]
    assert run("--base", "some/model", *draw) == 0
    assert run("--base", "other/model", *draw) == 1
    assert "other/model/resolve/main/model_index.json" in capsys.readouterr().err


@pytest.mark.parametrize("kind, flags, wanted", [("schnell", [], (4, 1.0)), ("dev", [], (28, 3.5)), ("sd", [], (25, 7.5)),
                                                 ("schnell", ["--sample_steps", 8], (8, 1.0))])
def test_defaults_by_the_kind_of_base(kind, flags, wanted, pipelines):
    args = mm.parse_args(["--base", str(pipelines(kind)[0]), *map(str, flags)])
    mm.open_base(args, 0, 1, CPU)
    assert (args.sample_steps, args.cfg_scale) == wanted


@pytest.mark.parametrize("targets", ["attn", "text"])
def test_sdxl_is_told_of_enlargement_and_crop(targets, pipelines, monkeypatch):
    """2307.01952 section 2.2: height and width of the file, as it stands, and where the square of 64 pixels was cut."""
    folder, _ = pipelines("sdxl")
    Path("dog").mkdir()
    wide, small, turned = Image.new("RGB", (300, 128)), Image.new("RGB", (32, 32)), Image.new("RGB", (300, 128))
    exif = Image.Exif()
    exif[274] = 6  # lies on its side: 128 wide, 300 high
    turned.save("dog/0.jpg", exif=exif)
    wide.save("dog/1.png")
    small.save("dog/2.png")
    seen, loss = set(), mm.diffusion_loss

    def watched(model, z0, eps, t, text, *more):
        seen.update(tuple(map(int, row)) for row in text[2].tolist())
        return loss(model, z0, eps, t, text, *more)
    monkeypatch.setattr(mm, "diffusion_loss", watched)
    told = [300, 128, 43, 0, 64, 64], [128, 300, 0, 43, 64, 64], [32, 32, 0, 0, 64, 64]
    flags = ["--base", folder, "--data", "dog", "--instance_prompt", "x", *FEW, "--steps", 4, "--targets", targets]
    assert run(*flags) == 0
    assert seen == set(map(tuple, told))
    seen.clear()
    assert run(*flags, "--class_prompt", "a dog", "--class_images", 2) == 0
    assert seen == {*map(tuple, told), (64, 64, 0, 0, 64, 64)}


class Hub:
    """A hub on this machine, with the files of one folder as some/model; gated unless `token` comes along. Answers
    break off after `limit` bytes."""

    def __init__(self, folder, token=None, limit=None):
        hub, self.asked, self.limit = self, [], limit

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                file = folder / self.path.removeprefix("/some/model/resolve/main/")
                allowed = token is None or self.headers.get("Authorization") == f"Bearer {token}"
                status = 401 if not allowed else 200 if file.is_file() else 404
                body = file.read_bytes() if status == 200 else b""
                first = int((self.headers.get("Range") or "bytes=0-")[6:-1])
                hub.asked.append((self.command, self.path.removeprefix("/some/model/resolve/main/"), first))
                self.send_response(206 if first else status)
                self.send_header("Content-Length", str(len(body) - first))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body[first:][:hub.limit])
            do_HEAD = do_GET

            def log_message(self, *args):
                pass
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"


DRAW = ["--base", "some/model", "--size", 64, "--sample", 1, "--sample_steps", 1, "--prompt", "x", "--device", "cpu"]


def test_a_gated_base(pipelines, monkeypatch, capsys):
    folder, _ = pipelines("sd")
    monkeypatch.setenv("HF_HUB_CACHE", "hub")
    with Hub(folder, token="hf_x") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert run(*DRAW) == 1
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and "HF_TOKEN" in said[0] and "agree to its licence" in said[0]
        monkeypatch.setenv("HF_TOKEN", "hf_x")
        assert run(*DRAW) == 0
        asked = len(hub.asked)
        assert run(*DRAW) == 0
        names = {name for _, name, _ in hub.asked[asked:]}
        assert all(not (folder / name).exists() for name in names), "what was downloaded is not asked for again"


def test_a_download_that_breaks_off_goes_on(pipelines, monkeypatch, capsys):
    folder, _ = pipelines("sd")
    monkeypatch.setenv("HF_HUB_CACHE", "hub")
    with Hub(folder, limit=20_000) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert run(*DRAW) == 1
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "broke off" in said and "start again to go on" in said
        part = next(Path("data/weights").rglob("*.part"))
        have, hub.limit = part.stat().st_size, None
        assert have > 0
        hub.asked.clear()
        assert run(*DRAW) == 0, capsys.readouterr().err
        assert ("GET", str(part.relative_to("data/weights/some/model"))[:-5], have) in hub.asked


def test_shards_and_half_precision(pipelines, tmp_path):
    """The names that diffusers gives to a network in several files, with a variant and without."""
    import shutil
    folder, pipe = pipelines("sd")
    expected, drawn = None, []
    for variant, size in ((None, "10GB"), (None, "100KB"), ("fp16", "100KB"), ("fp16", "10GB")):
        shutil.copytree(folder, tmp_path / "base")
        shutil.rmtree(tmp_path / "base/unet")
        pipe.unet.to(torch.float32).save_pretrained(tmp_path / "base/unet", variant=variant, max_shard_size=size)
        files = sorted(p.name for p in (tmp_path / "base/unet").glob("*.safetensors"))
        assert (len(files) > 1) == (size == "100KB") and all((variant or "model") in name for name in files)
        network = open_base(tmp_path / "base").model
        expected = expected or network.state_dict()
        drawn.append(all(torch.equal(v, expected[k]) for k, v in network.state_dict().items()))
        shutil.rmtree(tmp_path / "base")
    pipe.unet.to(torch.float64)
    assert all(drawn)


def test_a_folder_of_pefts(pipelines, tmp_path):
    """What peft itself saves: alpha stands in adapter_config.json beside the weights."""
    from peft import LoraConfig, get_peft_model
    folder, pipe = pipelines("sd")
    network = get_peft_model(type(pipe).from_pretrained(folder).unet, LoraConfig(
        r=4, lora_alpha=12, target_modules=["to_q", "to_k"], alpha_pattern={"attn1.to_k": 6}))
    network.save_pretrained(tmp_path / "peft")
    loras = mm.read_lora(tmp_path / "peft/adapter_model.safetensors", open_base(folder))
    alphas = {name[-10:]: alpha for name, (_, _, alpha) in loras.items()}
    assert alphas == {"attn1.to_q": 12, "attn1.to_k": 6, "attn2.to_q": 12, "attn2.to_k": 12}


def test_smoke_teaches_and_draws(capsys):
    """A random model of text2img.py: trained, read again, drawn from."""
    assert run("--smoke", "--device", "cpu") == 0
    assert Path("out/smoke_lora/generated/000003.png").exists()
    state = tensors("out/smoke_lora/lora.safetensors")
    assert {k.partition(".")[0] for k in state} == {"transformer"} and any("tower" in k for k in state)
    assert run("--base", "out/smoke_lora/base.safetensors", "--format", "kohya") == 2


def test_two_processes_equal_one(pipelines, run_script, tmp_path):
    folder, _ = pipelines("sd")
    photographs()
    told = ["--base", folder, "--data", "dog", "--instance_prompt", "x", *FEW, "--class_prompt", "a dog", "--class_images", 3]
    one = run_script("finetune_lora.py", *told, "--out", "one", cwd=tmp_path)
    two = run_script("finetune_lora.py", *told, "--out", "two", cwd=tmp_path, timeout=300,
                     via=("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"))
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    a, b = tensors("one/lora.safetensors"), tensors("two/lora.safetensors")
    assert all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-6) for k in a)


def test_the_loss_goes_down(pipelines):
    """On one picture, told one thing."""
    folder, _ = pipelines("sd")
    photographs(1)
    assert run("--base", folder, "--data", "dog", "--instance_prompt", "x", *FEW, "--steps", 40, "--eval_every", 40, "--lr", 0.02,
               "--batch_size", 8) == 0
    losses = [json.loads(line)["loss"] for line in Path("out/finetune_lora/log.jsonl").read_text().splitlines()]
    assert np.mean(losses[-2:]) < 0.85 * np.mean(losses[:2])


def test_what_lies_in_out_stays(pipelines, capsys):
    """Files of the user, a folder that an interrupted --sample left, and every LoRA of earlier runs."""
    folder, _ = pipelines("sd")
    photographs(2)
    out, told = Path("out/finetune_lora"), ["--base", folder, "--data", "dog", "--instance_prompt", "x", *FEW, "--steps", 1]
    for name in ("film.mkv.part", "samples/001.png", "downloads/a.1.part", "generated.part/000000.png"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    (out / "ckpt.pt.123.part").write_text("killed")
    for _ in range(3):
        assert run(*told) == 0, capsys.readouterr().err
    assert all((out / name).read_text() == "mine" for name in ("film.mkv.part", "samples/001.png", "downloads/a.1.part"))
    assert not (out / "ckpt.pt.123.part").exists()
    assert sorted(p.name for p in out.glob("lora*")) == ["lora.safetensors", "lora.safetensors.old", "lora.safetensors.old1"]


def test_a_prompt_without_sample_draws(pipelines, monkeypatch):
    """Nothing speaks of training, which would take the place of what was trained."""
    lora_for("sd", pipelines)
    monkeypatch.setattr(mm, "train", None)
    assert run("--base", pipelines("sd")[0], "--size", 64, "--sample_steps", 1, "--device", "cpu", "--lora", "lora.safetensors",
               "--prompt", "a", "b") == 0
    assert len(list(Path("out/finetune_lora/generated").glob("*.png"))) == 8


def test_left_and_right_are_not_mirrored(pipelines, monkeypatch):
    folder, _ = pipelines("sd")
    photographs(2)
    Path("dog/0.txt").write_text("a dog that looks left")
    Path("dog/1.txt").write_text("a dog")
    seen, loss = {}, mm.diffusion_loss
    monkeypatch.setattr(mm, "diffusion_loss", lambda model, z0, *more: seen.update({z0[i].sum().item(): 1 for i in range(
        len(z0))}) or loss(model, z0, *more))
    assert run("--base", folder, "--data", "dog", *FEW, "--steps", 12) == 0
    assert len(seen) == 3, "one of them as it is, and one in both ways"


def test_a_broken_picture_of_the_class_is_drawn_again(pipelines):
    folder, _ = pipelines("sd")
    photographs(2)
    told = ["--base", folder, "--data", "dog", "--instance_prompt", "x", *FEW, "--class_prompt", "a dog", "--class_images", 3]
    assert run(*told) == 0
    files = sorted(Path("data/cache").glob("class-*/*.png"))
    whole = [file.read_bytes() for file in files]
    files[0].write_text("junk")
    files[1].write_bytes(whole[1][:len(whole[1]) // 2])
    Image.new("L", (5, 5)).save(files[2])
    assert run(*told) == 0 and [file.read_bytes() for file in files] == whole


# A full disk, kill -9, no memory


def test_a_full_disk_while_saving(pipelines, capsys):
    """Files may not grow beyond what was saved before: one sentence, what was there stays, and it goes on later."""
    resource = pytest.importorskip("resource")
    folder, _ = pipelines("sd")
    photographs(2)
    assert run("--base", folder, "--data", "dog", "--instance_prompt", "x", *FEW) == 0
    out, whole = Path("out/finetune_lora"), {}
    whole = {name: (out / name).read_bytes() for name in ("ckpt.pt", "lora.safetensors")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole["ckpt.pt"]) // 2, limits[1]))
        assert run("--resume", out / "ckpt.pt", "--steps", 4, "--device", "cpu") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "File too large" in said[0] and "intact" in said[0]
    assert all((out / name).read_bytes() == before for name, before in whole.items()) and not list(out.rglob("*.part"))
    assert run("--resume", out / "ckpt.pt", "--steps", 4, "--device", "cpu") == 0


def test_a_full_disk_while_drawing(pipelines, capsys):
    """The sentence names the file; what was drawn before stays."""
    resource = pytest.importorskip("resource")
    draw = ["--base", pipelines("sd")[0], "--size", 64, "--sample_steps", 1, "--device", "cpu", "--sample", 2, "--prompt", "x"]
    assert run(*draw) == 0
    generated = Path("out/finetune_lora/generated")
    before, limits = {file.name: file.read_bytes() for file in generated.iterdir()}, resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        assert run(*draw, "--seed", 1) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "000000.png" in said and "File too large" in said
    assert {file.name: file.read_bytes() for file in generated.iterdir()} == before
    assert run(*draw, "--seed", 1) == 0


def test_kill(tmp_path):
    """Killed at once while it trains: what was saved last is whole, and the run goes on from there."""
    mm.save_random_base(Path("base.safetensors"))
    flags = ["--base", "base.safetensors", "--class_images", "0", "--eval_every", "1", "--rank", "2", "--sample_steps", "1"]
    with open("err.txt", "w") as err, subprocess.Popen([sys.executable, ROOT / "finetune_lora.py", *flags, "--steps", "9999"],
                                                       stdout=subprocess.DEVNULL, stderr=err) as process:
        deadline = time.time() + 90
        while not Path("out/finetune_lora/samples/000002.png").exists() and process.poll() is None:
            assert time.time() < deadline
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -9
    step = torch.load("out/finetune_lora/ckpt.pt")["step"]
    assert step >= 2 and tensors("out/finetune_lora/lora.safetensors")
    assert run("--resume", "out/finetune_lora/ckpt.pt", "--steps", step + 1, "--device", "cpu") == 0
    steps = [json.loads(line)["step"] for line in Path("out/finetune_lora/log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step + 2)) and not list(Path("out").rglob("*.part"))


@pytest.mark.parametrize("flags, helps, not_again", [
    ([], ["--quant nf4", "--grad_checkpoint", "--accum 2", "--size below 64"], ["--dtype"]),
    (["--quant", "nf4", "--grad_checkpoint", "--accum", 2], ["--size"], ["--quant", "--grad_checkpoint", "--accum"]),
    (["--sample", 1, "--prompt", "x"], ["--quant"], ["--grad_checkpoint", "--accum", "--batch_size"])])
def test_out_of_memory_names_what_helps(flags, helps, not_again, pipelines, monkeypatch, capsys):
    folder, _ = pipelines("sd")
    photographs(1)
    monkeypatch.setattr(mm, "sample" if "--sample" in flags else "train_step", lambda *args: torch.empty(1 << 50))
    told = [*FEW[:2], "--dtype", "auto", *FEW[4:6], "--sample_steps", 2]
    told += [] if "--sample" in flags else ["--data", "dog", "--instance_prompt", "x", *FEW[6:]]
    assert run("--base", folder, *told, "--sampler", "ddim", *flags) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("finetune_lora.py: out of memory") and all(flag in said for flag in helps), said
    assert not any(flag in said for flag in not_again), said


# Wrong input


def without(name):
    def change(folder):
        (folder / name).unlink()
    return change


def edited(name, **changes):
    def change(folder):
        about = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**about, **changes}))
    return change


def cut(name):
    def change(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    return change


BROKEN = {
    "no network": (without("unet/diffusion_pytorch_model.safetensors"), "unet/diffusion_pytorch_model.safetensors"),
    "no autoencoder": (without("vae/config.json"), "vae/config.json"),
    "no vocabulary": (lambda folder: [(folder / "tokenizer" / file).unlink() for file in ("vocab.json", "tokenizer.json")],
                      "tokenizer/tokenizer.json or tokenizer/vocab.json"),
    "no scheduler": (without("scheduler/scheduler_config.json"), "scheduler/scheduler_config.json"),
    "no index": (without("model_index.json"), "model_index.json"),
    "cut weights": (cut("unet/diffusion_pytorch_model.safetensors"), "not a whole .safetensors"),
    "cut text encoder": (cut("text_encoder/model.safetensors"), "not a whole .safetensors"),
    "another pipeline": (edited("model_index.json", _class_name="StableDiffusion3Pipeline"), "StableDiffusion3Pipeline"),
    "other widths": (edited("unet/config.json", block_out_channels=[16, 24, 32, 40]), "another architecture"),
    "no noise at the end": (edited("scheduler/scheduler_config.json", rescale_betas_zero_snr=True), "rescale_betas_zero_snr"),
    "a strange target": (edited("scheduler/scheduler_config.json", prediction_type="sample"), "prediction_type"),
    "a strange schedule": (edited("scheduler/scheduler_config.json", beta_schedule="cosine"), "cosine"),
    "no widths": (edited("unet/config.json", block_out_channels=None), "config.json"),
    "not JSON": (lambda folder: (folder / "unet/config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_base_gets_one_sentence(case, pipelines, tmp_path, capsys):
    import shutil
    folder, _ = pipelines("sd")
    shutil.copytree(folder, tmp_path / "base")
    change, said = BROKEN[case]
    change(tmp_path / "base")
    photographs()
    assert run("--base", "base", "--data", "dog", "--instance_prompt", "x", *FEW) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in err and err.startswith("finetune_lora.py: ")
    assert not Path("out/finetune_lora/lora.safetensors").exists()


WRONG = {
    "no base": (["--base", "nowhere"], "nowhere does not exist"),
    "the default base": ([], "python text2img.py makes it"),
    "no captions": (["--data", "dog"], "no caption"),
    "no pictures": (["--data", "empty", "--instance_prompt", "x"], "0 pictures"),
    "no data": (["--data", "nowhere"], "does not exist"),
    "a high rank": (["--rank", "33"], "--rank 33"),
    "no such layer": (["--targets", "attn", "nonsense"], "--targets nonsense"),
    "no expression": (["--targets", "("], "no regular expression"),
    "size": (["--size", "60"], "multiple of 64"),
    "prompt": (["--sample", "2"], "--prompt"),
    "few samples": (["--sample", "1", "--prompt", "a", "b"], "too few"),
    "no lora": (["--sample", "2", "--prompt", "a", "--lora", "nothing.safetensors:0.5"], "nothing.safetensors"),
    "no weight": (["--sample", "2", "--prompt", "a", "--lora", "nothing.safetensors:much"], "'much' is no weight"),
    "no file": (["--sample", "2", "--prompt", "a", "--lora", "dog/0.png"], "not a whole .safetensors"),
    "two to train": (["--lora", "a", "b"], "several --lora"),
    "no checkpoint": (["--resume", "nothing.pt"], "nothing.pt"),
    "a text2img tool's format": (["--sampler", "heun"], "invalid choice"),
    "a file as folder": (["--out", "dog/0.png"], "is a file"),
    "batch": (["--batch_size", "3", "--accum", "2"], "--batch_size 3"),
    "dropout": (["--lora_dropout", "1"], "--lora_dropout"),
    "an empty prompt file": (["--prompt", "empty.txt"], "is empty"),
    "no number": (["--sample", "2", "--prompt", "a", "--lora", "nothing.safetensors:nan"], "'nan' is no weight"),
    "no guidance": (["--sample", "2", "--prompt", "a", "--negative_prompt", "b", "--cfg_scale", "1"], "a --cfg_scale above 1"),
    "alpha": (["--alpha", "0"], "--alpha 0"), "no folder": (["--out", ""], "--out"),
    "out in data": (["--out", "dog/out"], "would be learnt"), "a mistyped file": (["--base", "out/x.safetensors"], "does not exist"),
    "class prompts": (["--class_prompt", "a", "b", "--class_images", "1"], "too few for 2 class prompts"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_one_sentence(case, pipelines, capsys, monkeypatch):
    folder, _ = pipelines("sd")
    photographs()
    Path("empty").mkdir()
    Path("empty.txt").write_text("")
    flags, said = WRONG[case]
    base = [] if case == "the default base" or "--base" in flags else ["--base", folder]
    data = [] if "--data" in flags else ["--data", "dog", "--instance_prompt", "x"]
    if "--sample" in flags:
        data, few = [], FEW[:6]
    else:
        few = FEW
    with pytest.raises(SystemExit) if said == "invalid choice" else contextlib.nullcontext():
        try:
            code = run(*base, *data, *few, *flags)
        except SystemExit as e:
            code = e.code
            if said == "invalid choice":
                raise
        assert code == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def lora_for(kind, pipelines, path="lora.safetensors"):
    folder, _ = pipelines(kind)
    base = open_base(folder, "--rank", 2)
    made = mm.attach(base, dict.fromkeys(mm.target_layers(base, ["attn"])), base.args, [base.trained])
    mm.write_lora(Path(path), base, made, "diffusers", dict(format="pt"))
    return mm.load_safetensors(path)[0]


@pytest.mark.parametrize("theirs, ours, said", [("dev", "sd", "a LoRA for FLUX.1, and the base is SD 1.5"),
                                                ("sd", "dev", "the base is FLUX.1"), ("sd", "sdxl", "the base is SDXL")])
def test_a_lora_of_another_base(theirs, ours, said, pipelines, capsys):
    lora_for(theirs, pipelines)
    folder, _ = pipelines(ours)
    assert run("--base", folder, "--size", 64, "--sample", 1, "--prompt", "x", "--lora", "lora.safetensors") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("key", ["unet.mid_block.nothing.lora_A.weight", "lora_unet_nothing.lora_down.weight",
                                 "unet.mid_block.attentions.0.proj_in.lora_magnitude_vector", "hello"])
def test_keys_that_fit_nothing_are_never_left_out(key, pipelines, capsys):
    state = lora_for("sd", pipelines)
    mm.save_safetensors(Path("more.safetensors"), {**state, key: torch.zeros(2, 3)}, {})
    mm.save_safetensors(Path("half.safetensors"), dict(list(state.items())[1:]), {})
    folder, _ = pipelines("sd")
    for file, said in (("more", key), ("half", "lora_B" if "lora_A" in list(state)[0] else "lora_A")):
        assert run("--base", folder, "--size", 64, "--sample", 1, "--prompt", "x", "--lora", f"{file}.safetensors") == 2
        assert (said if file == "more" else "1 of its") in capsys.readouterr().err
