"""fid.py against closed forms, against pytorch-fid, torch-fidelity and clean-fid, and as its users call it."""
import functools
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import fid as mm

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def run(*argv):
    return mm.main([str(a) for a in argv])


def noise(folder, n, size=32, seed=0, scale=255):
    """n PNG files of smooth noise."""
    rng, Path_ = np.random.default_rng(seed), Path(folder)
    Path_.mkdir(parents=True)
    for i in range(n):
        small = Image.fromarray(rng.integers(0, scale, (4, 4, 3), dtype=np.uint8))
        small.resize((size, size), Image.BICUBIC).save(Path_ / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random Inception weights whose norms and biases are not 1 and 0, as a file; made with torch-fidelity's network."""
    import torch_fidelity.feature_extractor_inceptionv3 as tf

    class Blank(tf.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            return None
    with mock.patch.object(tf, "load_state_dict_from_url", lambda *args, **kwargs: None):
        net = Blank("inception", ["2048"])
    g = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in net.state_dict().items():
        if tensor.ndim >= 2:  # He et al. for the convolutions, and a spread of classes for the Inception Score
            tensor = torch.randn(tensor.shape, generator=g) * (2 / tensor[0].numel()) ** 0.5 * (9 if name == "fc.weight" else 1)
        elif name.endswith(("running_var", "bn.weight")):
            tensor = 0.75 + 0.5 * torch.rand(tensor.shape, generator=g)
        elif tensor.is_floating_point():
            tensor = 0.1 * torch.randn(tensor.shape, generator=g)
        state[name] = tensor
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(state, path)
    return str(path)


# The distances


def root(sigma):
    return torch.linalg.cholesky(sigma)


def test_distance_of_known_gaussians():
    eye, shift = torch.eye(5, dtype=torch.float64), torch.tensor([3., 0, 4, 0, 0], dtype=torch.float64)
    zero = torch.zeros(5, dtype=torch.float64)
    assert mm.frechet_distance(zero, eye, shift, eye) == pytest.approx(25)
    assert mm.frechet_distance(zero, eye, zero, eye) == pytest.approx(0, abs=1e-12)
    assert mm.frechet_distance(zero, eye, zero, 3 * eye) == pytest.approx(5 * (3 - 1) ** 2)  # S = 9 I: (sqrt 9 - 1)^2 each
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=g))[0]  # one basis: the variances part
    a, b = torch.rand(2, 5, dtype=torch.float64, generator=g)
    assert mm.frechet_distance(zero, root(q * a @ q.T), zero, root(q * b @ q.T)) == pytest.approx(
        ((a.sqrt() - b.sqrt()) ** 2).sum().item())


@pytest.mark.parametrize("n, m, d", [(300, 400, 40), (30, 25, 64), (300, 25, 64), (64, 65, 64)])
def test_distance_is_that_of_the_references(n, m, d):
    """Also with fewer images than features, where no Cholesky factor exists; float64 in, so 1e-8 relative."""
    from cleanfid.fid import frechet_distance as clean
    from pytorch_fid.fid_score import calculate_frechet_distance as pytorch
    from torch_fidelity.metric_fid import fid_statistics_to_metric as fidelity
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), 1.3 * rng.normal(size=(m, d)) + 0.2
    stats = [dict(mu=f.mean(0), sigma=np.cov(f, rowvar=False)) for f in (x, y)]
    theirs = [fidelity(*stats, False)["frechet_inception_distance"], *(f(*stats[0].values(), *stats[1].values())
                                                                        for f in (pytorch, clean))]
    features = mm.frechet_distance(*mm.fit_gaussian(torch.from_numpy(x)), *mm.fit_gaussian(torch.from_numpy(y)))
    products = []
    for f in (x, y):
        products.append(sum(mm.gram(torch.from_numpy(batch)) for batch in np.array_split(f, 7)))
        mu, A = mm.gaussian_of(products[-1])
        np.testing.assert_allclose(mu, f.mean(0), atol=1e-12)
        np.testing.assert_allclose(A @ A.T, np.cov(f, rowvar=False), atol=1e-9 if len(f) <= d else 1e-11)
    streamed = mm.frechet_distance(*mm.gaussian_of(products[0]), *mm.gaussian_of(products[1]))
    singular = min(n, m) <= d  # there sqrtm itself is wrong in the sixth digit
    assert features == pytest.approx(streamed, rel=1e-7)
    assert [features] * 3 == pytest.approx(theirs, rel=1e-5 if singular else 1e-8)


def test_rank_deficient_distance_is_right():
    """Two sets of 20 in 64 dimensions, held against the singular values of one small matrix of 50 digits' worth of care:
    nuclear norm of the centred features' product, in closed form from their SVD."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 64, dtype=torch.float64, generator=g), torch.randn(20, 64, dtype=torch.float64, generator=g)
    a, b = (f - f.mean(0) for f in (x, y))
    exact = ((x.mean(0) - y.mean(0)).square().sum() + (a.square().sum() + b.square().sum()) / 19
             - 2 * torch.linalg.svdvals(a @ b.T).sum() / 19).item()
    assert mm.frechet_distance(*mm.fit_gaussian(x), *mm.fit_gaussian(y)) == pytest.approx(exact, rel=1e-9)
    sigmas = [a.T @ a / 19, b.T @ b / 19]
    assert mm.frechet_distance(x.mean(0), mm.factor(sigmas[0]), y.mean(0), mm.factor(sigmas[1])) == pytest.approx(exact, rel=1e-9)
    assert mm.frechet_distance(*mm.fit_gaussian(x), *mm.fit_gaussian(x)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shift", [0, 0.5])
@pytest.mark.parametrize("n", [40, 1000])
def test_the_bias_is_what_it_says(n, shift):
    """Two normal distributions of one covariance: the true distance is that of their means, what is over is bias. Also
    where the true distance is the larger part, and a single half, off to one side, would tell nothing."""
    g, told, real = torch.Generator().manual_seed(0), [], []
    for _ in range(5):
        x, y = torch.randn(2, n, 64, dtype=torch.float64, generator=g)
        fid, bias = mm.fid(*([mm.fit_gaussian(part) for part in (f, f[::2], f[1::2])] for f in (x, y + shift)))
        told.append(bias)
        real.append(fid - 64 * shift ** 2)
        assert bias == pytest.approx(told[0], rel=0.2)
    assert np.mean(told) == pytest.approx(np.mean(real), rel=0.35 if n == 40 else 0.2)


def features(n, m, d=24):
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, d, generator=g).double(), (1.1 * torch.randn(m, d, generator=g) + 0.2).double()


def test_kid_is_torch_fidelitys():
    from torch_fidelity.metric_kid import kid_features_to_metric
    real, generated = features(300, 200)
    theirs = kid_features_to_metric(generated, real, kid_subsets=20, kid_subset_size=100, verbose=False, rng_seed=2020)
    *ours, size = mm.kid(real, generated, 20, 100)
    assert size == 100 and ours == pytest.approx(
        [theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]], rel=1e-9)
    assert mm.kid(real[:200], generated)[1:] == (None, 200)  # a hundred times the same: no deviation


def test_inception_score_is_torch_fidelitys():
    from torch_fidelity.metric_isc import isc_features_to_metric
    logits = 3 * torch.randn(203, 12, generator=torch.Generator().manual_seed(0))
    theirs = isc_features_to_metric(logits)
    assert mm.inception_score(logits) == pytest.approx(
        (theirs["inception_score_mean"], theirs["inception_score_std"], 10), rel=1e-9)
    sure = torch.eye(4).repeat(1000, 1) * 1e3  # four classes, all alike, all certain: exactly 4
    assert mm.inception_score(sure)[0] == pytest.approx(4, rel=0.02)


def test_precision_and_recall_are_torch_fidelitys():
    from torch_fidelity.metric_prc import prc_features_to_metric
    real, generated = features(300, 200, d=8)
    theirs = prc_features_to_metric(generated, real, prc_neighborhood=3, prc_batch_size=10000, verbose=False)
    assert 0.1 < theirs["recall"] < 0.98
    assert mm.precision_recall(real, generated, rows=64) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert mm.precision_recall(real, real) == (1, 1) and mm.precision_recall(real, real + 100) == (0, 0)


# Resizing and the networks


@pytest.mark.parametrize("shape", [(32, 32), (64, 48), (299, 299), (512, 300)])
@pytest.mark.parametrize("mode", mm.MODES)
def test_resizing_is_that_of_the_references(mode, shape):
    from cleanfid.resize import build_resizer
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as tf1
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    if mode == "legacy_tensorflow":
        theirs = tf1(torch.from_numpy(image).permute(2, 0, 1)[None].float(), size=(299, 299), align_corners=False)[0]
    else:
        theirs = torch.from_numpy(build_resizer(mode)(image)).permute(2, 0, 1)
    ours = mm.resize(torch.from_numpy(image).permute(2, 0, 1), 299, mode)
    torch.testing.assert_close(ours, theirs, atol=1e-2 if mode == "clean" else 2e-3, rtol=0)  # of 255


def test_inception_is_the_references_block_by_block(inception_file):
    """In float64, every block on its own and all of them together, before and after the norms are folded in."""
    import pytorch_fid.inception as pf
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    theirs = FeatureExtractorInceptionV3("inception", ["64", "192", "768", "2048", "logits_unbiased"], inception_file).double()
    theirs.feature_extractor_internal_dtype = torch.float64
    state = torch.load(inception_file, weights_only=True)
    with mock.patch.object(pf, "load_state_dict_from_url", lambda *args, **kwargs: state):
        pytorch = pf.InceptionV3([3], resize_input=False, normalize_input=False).double().eval()
    ours = mm.Inception().double().eval()
    ours.load_state_dict(theirs.state_dict())
    g = torch.Generator().manual_seed(0)
    seen = {}
    for name, block in ours.named_children():
        if name.startswith("Mixed"):
            block.register_forward_hook(lambda m, x, y, name=name: seen.update({name: (x[0], y)}))
    image = torch.randint(0, 256, (1, 3, 299, 299), generator=g, dtype=torch.uint8)
    with torch.no_grad():
        x = ours.normalise(image.double(), "legacy_tensorflow")
        got = ours(x)
        assert len(seen) == 11
        for name, (x_in, y) in seen.items():
            torch.testing.assert_close(y, getattr(theirs, name)(x_in), atol=1e-10, rtol=1e-10)
        logits, pool = theirs(image)[4], pytorch(x)[0][:, :, 0, 0]
        torch.testing.assert_close(got[0], pool, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(got[1].float(), logits, atol=1e-6, rtol=1e-6)
        before = seen["Mixed_6d"][1]
        torch.testing.assert_close(got[2], theirs.Mixed_6d.branch1x1(seen["Mixed_6d"][0])[:, :7].flatten(1))
        assert got[2].shape == (1, ours.dim_spatial) and before.std() > 0.01 and pool.std() > 0.01
        args = mm.parse_args(["a", "b", "--weights", inception_file])
        folded, about = mm.load_network(args, torch.device("cpu"), 0, 1)
        assert about == f"sha256 {mm.sha256(inception_file)}"
        torch.testing.assert_close(folded.double()(x)[0], pool, atol=1e-4, rtol=1e-4)
    assert ours.normalise(torch.tensor([0., 255]), "legacy_pytorch").tolist() == [-1, 1]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the pinned transformers wants Python 3.11")
def test_dinov2_is_transformers():
    from transformers import Dinov2Config, Dinov2Model
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=70, patch_size=14,
                          layer_norm_eps=1e-6)
    theirs = Dinov2Model(config).eval()
    for p in theirs.parameters():
        p.data.add_(0.1 * torch.randn(p.shape))
    theirs.save_pretrained("dino", safe_serialization=True)
    args = mm.parse_args(["a", "b", "--network", "dinov2", "--weights", "dino/model.safetensors"])
    ours, _ = mm.load_network(args, torch.device("cpu"), 0, 1)
    x = torch.randn(2, 3, 224, 224, dtype=torch.float64)

    def positions(tokens, height, width):
        """FD-DINOv2 runs the authors' code, not transformers', and theirs differ here: facebookresearch/dinov2,
        vision_transformer.py, interpolate_pos_encoding with interpolate_offset 0.1 and no antialiasing."""
        table = theirs.embeddings.position_embeddings
        grid = table[:, 1:].reshape(1, 5, 5, 128).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, scale_factor=(16.1 / 5, 16.1 / 5), mode="bicubic", antialias=False)
        assert grid.shape[2:] == (16, 16) == (height // 14, width // 14)
        return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, 128)], 1)
    theirs.embeddings.interpolate_pos_encoding = positions
    with torch.no_grad():
        expected = theirs.double()(x).last_hidden_state[:, 0]
        torch.testing.assert_close(ours.double()(x)[0], expected, atol=1e-9, rtol=1e-9)
    y = ours.normalise(torch.full((1, 3, 2, 2), 255.), "clean")[0, :, 0, 0]
    torch.testing.assert_close(y, (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]))


def test_random_features_never_change():
    """Everybody's figures come from the same network: a few numbers of it, as measured when it was written."""
    net = mm.RandomFeatures()
    assert net.convs[3].weight[7, 11, 1].tolist() == pytest.approx(GOLDEN, abs=1e-6)


GOLDEN = [0.022614, 0.000968, 0.003907]


# The command


def figures(capsys, *argv):
    capsys.readouterr()
    status = run(*argv, "--json")
    out = capsys.readouterr()
    assert status == 0, out.err
    return json.loads(out.out)


def test_the_same_fid_as_each_reference(inception_file, capsys):
    """Folders of PNG files in, FID out: each tool with its own reading, resizing, network and distance."""
    from cleanfid.fid import frechet_distance, get_folder_features
    import cleanfid.features as cf
    import pytorch_fid.inception as pf
    from pytorch_fid.fid_score import calculate_fid_given_paths
    import torch_fidelity
    noise("a", 12, 32), noise("b", 10, 40, seed=1, scale=200)
    state = torch.load(inception_file, weights_only=True)
    ours = {mode: figures(capsys, "a", "b", "--weights", inception_file, "--mode", mode, "--device", "cpu")
            for mode in mm.MODES}
    with mock.patch.object(pf, "load_state_dict_from_url", lambda *args, **kwargs: state):
        pytorch = calculate_fid_given_paths(["a", "b"], 5, "cpu", 2048, 0)
    fidelity = torch_fidelity.calculate_metrics(
        input1="b", input2="a", cuda=False, feature_extractor="inception-v3-compat", fid=True, isc=True, kid=True, prc=True, kid_subset_size=10, verbose=False,
        cache=False, feature_extractor_weights_path=inception_file, isc_splits=10, save_cpu_ram=True)
    net = mm.Inception().eval()
    net.load_state_dict(state)

    def extractor(x):
        with torch.no_grad():
            return net((x - 128) / 128)[0]
    sets = [get_folder_features(name, extractor, num_workers=0, device=torch.device("cpu"), mode="clean", verbose=False)
            for name in "ab"]
    clean = frechet_distance(*(f(s) for s in sets for f in (lambda s: s.mean(0, dtype=float),
                                                            lambda s: np.cov(s, rowvar=False))))
    assert cf is not None
    assert ours["legacy_pytorch"]["fid"] == pytest.approx(pytorch, rel=1e-5)
    assert ours["clean"]["fid"] == pytest.approx(clean, rel=1e-5)
    ours = ours["legacy_tensorflow"]
    assert ours["fid"] == pytest.approx(fidelity["frechet_inception_distance"], rel=1e-5)
    assert ours["kid"] == pytest.approx(fidelity["kernel_inception_distance_mean"], rel=1e-4)
    assert ours["kid_std"] == pytest.approx(fidelity["kernel_inception_distance_std"], rel=1e-4)
    assert ours["is"] == pytest.approx(fidelity["inception_score_mean"], rel=1e-5)
    assert (ours["precision"], ours["recall"]) == pytest.approx((fidelity["precision"], fidelity["recall"]))
    assert ours["sfid"] > 0 and ours["real"]["sizes"] == {"32x32": 12} and ours["generated"]["images"] == 10
    assert ours["weights"] == f"sha256 {mm.sha256(inception_file)}" and ours["mode"] == "legacy_tensorflow"


R = ["--network", "random", "--device", "cpu"]


def test_all_kinds_of_sets_agree(capsys):
    """A nested folder, a .zip of it, an .npz of its images and its statistics give the same FID."""
    noise("set/x/y", 8), noise("set/z", 6, seed=1), noise("other", 9, seed=2)
    files = sorted(Path("set").rglob("*.png"))
    Path("set/notes.txt").write_text("no image")
    with zipfile.ZipFile("set.zip", "w") as z:
        for f in files:
            z.write(f)
    pictures = np.stack([np.asarray(Image.open(f)) for f in files])
    np.savez("images.npz", images=pictures)
    np.savez_compressed("adm.npz", arr_0=pictures, mu=np.zeros(960), sigma=np.eye(960))
    np.savez("arr.npz", arr_0=np.asfortranarray(pictures))
    np.savez_compressed("small.npz", images=pictures)
    assert run("set", "--stats", "stats/set.npz", *R) == 0
    first = figures(capsys, "set", "other", *R)
    for kind in ("set.zip", "images.npz", "arr.npz", "small.npz"):
        again = figures(capsys, kind, "other", *R)
        for key in ("fid", "kid", "precision", "recall"):
            assert again[key] == pytest.approx(first[key], rel=1e-9)
    again = figures(capsys, "stats/set.npz", "other", *R)
    assert again["fid"] == pytest.approx(first["fid"], rel=1e-6) and "kid" not in again and "kid" in again["left_out"]
    with mock.patch.object(np.lib.npyio.NpzFile, "__getitem__", lambda f, k: 1 / 0):  # read where they lie
        assert isinstance(mm.read_npz(Path("images.npz"))[0], np.memmap)
    mixed = figures(capsys, "adm.npz", "other", *R)  # as ADM's references: FID by the statistics, the rest by the images
    assert mixed["kid"] == pytest.approx(first["kid"]) and mixed["fid"] != pytest.approx(first["fid"])
    with np.load("stats/set.npz") as f:
        assert f["mu"].shape == (960,) and f["sigma"].shape == (960, 960)
        np.savez("plain.npz", mu=f["mu"], sigma=f["sigma"])  # as pytorch-fid writes them
    assert figures(capsys, "plain.npz", "other", *R)["fid"] == pytest.approx(first["fid"], rel=1e-6)
    both = figures(capsys, "stats/set.npz", "plain.npz")  # needs no network
    assert both["fid"] == pytest.approx(0, abs=1e-6) and both["mode"] == "clean"


def pixels(file):
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def test_streaming_equals_keeping(capsys, monkeypatch):
    """More images than twice the features are streamed: the same figures."""
    noise("a", 30), noise("b", 25, seed=1)
    kept = figures(capsys, "a", "b", *R)
    monkeypatch.setattr(mm.RandomFeatures, "dim", 10)
    monkeypatch.setattr(mm.RandomFeatures, "forward", cut := lambda self, x, f=mm.RandomFeatures.forward: (f(self, x)[0][:, :10], None, None))
    few = figures(capsys, "a", "b", *R)
    assert few["dim"] == 10 and few["fid"] < kept["fid"] and cut
    net = mm.RandomFeatures().eval()
    x = [torch.cat([net(net.normalise(mm.resize(pixels(f), 64, "clean")[None], ""))[0]
                    for f in sorted(Path(folder).iterdir())]) for folder in "ab"]
    expected = mm.frechet_distance(*mm.fit_gaussian(x[0]), *mm.fit_gaussian(x[1]))
    assert few["fid"] == pytest.approx(expected, rel=1e-6)
    halves = [[mm.fit_gaussian(f), mm.fit_gaussian(f[::2]), mm.fit_gaussian(f[1::2])] for f in x]
    assert few["fid_bias"] == pytest.approx(mm.fid(*halves)[1], rel=1e-4)
    only = figures(capsys, "a", "b", *R, "--metrics", "fid")
    assert only["fid"] == pytest.approx(few["fid"], rel=1e-9) and "kid" not in only


def test_cache(capsys, monkeypatch):
    noise("a", 8), noise("b", 6, seed=1)
    first = figures(capsys, "a", "b", *R, "--cache")
    for file in Path("data/cache").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    assert figures(capsys, "a", "b", *R, "--cache") == first  # damaged: computed anew
    monkeypatch.setattr(mm, "extract", None)
    assert figures(capsys, "a", "b", *R, "--cache") == first
    (Path("a") / "0000.png").unlink()
    with pytest.raises(TypeError):
        run("a", "b", *R, "--cache")


def test_statistics_of_many_images(capsys, monkeypatch):
    """--stats streams, whatever --metrics says, and tells how many images it saw."""
    noise("a", 30), noise("b", 25, seed=1)
    monkeypatch.setattr(mm.RandomFeatures, "dim", 10)
    monkeypatch.setattr(mm.RandomFeatures, "forward", lambda self, x, f=mm.RandomFeatures.forward: (f(self, x)[0][:, :10], None, None))
    with mock.patch.object(mm, "save_statistics", wraps=mm.save_statistics) as saved:
        assert run("a", "--stats", "a.npz", *R) == 0
    assert saved.call_args[0][1]["kept"] == {} and saved.call_args[0][1]["products"]["features"].shape == (2, 11, 11)
    capsys.readouterr()
    assert run("a.npz", "b", *R) == 0
    out = capsys.readouterr().out
    assert "statistics of 30 images" in out and "does not say" not in out and "because generated is finite" in out
    assert figures(capsys, "a.npz", "b", *R)["fid"] == pytest.approx(figures(capsys, "a", "b", *R)["fid"], rel=1e-9)


def test_stats_never_overwrites_images(capsys):
    noise("a", 5)
    np.savez("set.npz", arr_0=np.zeros((5, 8, 8, 3), np.uint8))
    before = Path("set.npz").read_bytes()
    assert run("a", "--stats", "set.npz", *R) == 2 and "set.npz" in capsys.readouterr().err
    assert Path("set.npz").read_bytes() == before
    assert run("a", "--stats", "a.npz", *R) == 0 == run("a", "--stats", "a.npz", *R)


def test_statistics_of_unknown_origin(capsys):
    noise("a", 5)
    np.savez("x.npz", mu=np.zeros(960), sigma=np.eye(960), about="not ours")
    assert run("x.npz", "a", *R) == 0
    assert "x.npz does not say" in capsys.readouterr().out


def test_a_set_against_its_copy(capsys):
    noise("a", 6), noise("b", 6)
    assert run("a", "b", *R) == 0
    out = capsys.readouterr().out
    assert "no more than sets so small have by chance" in out and "(subsets of 6)" in out
    kid = [line for line in out.splitlines() if line.startswith("kid")][0]
    assert "+-" not in kid
    report = figures(capsys, "a", "b", *R)
    assert 0 <= report["fid"] < 1e-6 and report["kid_std"] is None


def test_a_zip_against_drawn_faces(capsys):
    """As large as the zip's own images, and read by several threads: nothing is lost."""
    noise("b", 120, 40)
    with zipfile.ZipFile("b.zip", "w") as z:
        for f in sorted(Path("b").iterdir()):
            z.write(f)
    one, two = (figures(capsys, "drawn_faces", name, *R, "--num_images", 120) for name in ("b", "b.zip"))
    assert two["generated"]["broken"] == [] and one["fid"] == two["fid"] and two["real"]["sizes"] == {"40x40": 120}


def test_modes_of_images(capsys):
    """16 bits stay what they are; what has transparency is told."""
    noise("a", 8), noise("b", 8)
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    Image.fromarray(ramp).save("a/ramp.png")
    Image.fromarray((ramp / 257).astype(np.uint8)).save("b/ramp.png")
    Image.open("a/0003.png").convert("RGBA").save("a/0003.png")
    report = figures(capsys, "a", "b", *R)
    assert report["fid"] == pytest.approx(0, abs=1e-5)
    assert report["real"]["sizes"] in ({"32x32": 7, "32x32 RGBA": 1, f"32x32 {mode}": 1} for mode in ("I;16", "I"))


def test_linked_folders_are_followed_and_hidden_files_are_not_images(capsys):
    noise("elsewhere/cat", 5), noise("b", 5, seed=1)
    Path("a").mkdir()
    Path("a/cat").symlink_to(Path("elsewhere/cat").resolve())
    Path("a/.trash.png").write_bytes(b"")
    assert figures(capsys, "a", "b", *R)["real"]["images"] == 5


def test_drawn_faces_are_drawn_as_large_as_what_is_judged(capsys):
    noise("b", 5, 48)
    report = figures(capsys, "drawn_faces", "b", *R, "--num_images", 5)
    assert report["real"]["sizes"] == {"48x48": 5} == report["generated"]["sizes"]
    report = figures(capsys, "drawn_faces", "b", *R, "--num_images", 7, "--size", 32)
    assert report["real"]["sizes"] == {"32x32": 7} and report["generated"]["images"] == 5
    assert figures(capsys, "drawn_faces", "b", *R, "--num_images", 4)["generated"]["images"] == 4


def test_a_broken_image_is_named_and_left_out(capsys):
    noise("a", 30), noise("b", 6, seed=1)
    (Path("a") / "0003.png").write_bytes(b"\x89PNG broken")
    report = figures(capsys, "a", "b", *R)
    assert report["real"]["images"] == 29 and "0003.png" in report["real"]["broken"][0]
    Image.open("a/0004.png").convert("L").save("a/0004.png")
    Image.open("a/0005.png").convert("RGBA").save("a/0005.png")
    assert figures(capsys, "a", "b", *R)["real"]["images"] == 29
    for i in range(6, 9):
        (Path("a") / f"{i:04d}.png").write_bytes(b"")
    assert run("a", "b", *R) == 2 and "4 of the 30" in capsys.readouterr().err


def test_two_processes_equal_one(capsys, tmp_path):
    noise("a", 23), noise("b", 14, seed=1)
    (Path("a") / "0003.png").write_bytes(b"")
    one = figures(capsys, "a", "b", *R)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29533", ROOT / "fid.py", "a",
               "b", *R, "--json", "--batch", "4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    assert two["processes"] == 2 and two["real"]["images"] == 22
    for key in ("fid", "fid_bias", "kid", "precision", "recall"):
        assert two[key] == pytest.approx(one[key], rel=1e-6, abs=1e-9)


def test_no_network_no_weights(capsys):
    noise("a", 5), noise("b", 5, seed=1)
    assert run("a", "b", "--device", "cpu") == 0
    out = capsys.readouterr()
    assert "random" in out.err and mm.INCEPTION_URL in out.err and "fd_random" in out.out
    for asked in (["--json"], ["--mode", "clean"], ["--stats", "a.npz"]):  # these would pass for Inception's
        assert run("a", "b", "--device", "cpu", *asked) == 1 and capsys.readouterr().out == ""
    assert run("a", "b", "--network", "inception", "--device", "cpu") == 1 and "by hand" in capsys.readouterr().err
    assert run("a", "b", "--network", "dinov2", "--device", "cpu") == 1 and "dinov2-large" in capsys.readouterr().err


def test_weights_that_torch_already_has_are_used(monkeypatch, inception_file):
    """pytorch-fid keeps its file in torch's cache; it is taken if its hash is right, and nothing is downloaded."""
    path = Path(torch.hub.get_dir(), "checkpoints", mm.INCEPTION)
    path.parent.mkdir(parents=True)
    path.write_bytes(Path(inception_file).read_bytes())
    with pytest.raises(mm.Stop, match="broke off"):
        mm.find_inception()
    Path("data/weights").mkdir(parents=True, exist_ok=True)
    Path("data/weights", mm.INCEPTION).write_bytes(b"something else")
    with pytest.raises(mm.Stop, match="hash"):
        mm.find_inception()
    monkeypatch.setattr(mm, "INCEPTION_SHA256", mm.sha256(inception_file))
    assert mm.find_inception() == path


def test_features_that_are_no_numbers(capsys, monkeypatch):
    noise("a", 5), noise("b", 5, seed=1)
    monkeypatch.setattr(mm.RandomFeatures, "normalise", lambda self, x, mode: x * float("nan"))
    assert run("a", "b", *R) == 1 and "no numbers" in capsys.readouterr().err


@pytest.mark.parametrize("digest, token", [("right", "secret"), ("wrong", ""), ("none", "")])
def test_a_file_of_the_hub(digest, token, monkeypatch):
    """The hub names the hash and points to a store; the token is for the hub, never for the store."""
    body, seen = os.urandom(3000), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.command, self.path, self.headers.get("Authorization")))
            store = self.path == "/store"
            self.send_response(200 if store else 302)
            if not store:
                self.send_header("Location", f"http://localhost:{self.server.server_port}/store")
                if digest != "none":
                    named = hashlib.sha256(body if digest == "right" else b"other").hexdigest()
                    self.send_header("X-Linked-Etag", f'"{named}"')
            self.send_header("Content-Length", str(len(body) if store else 0))
            self.end_headers()
            if store and self.command == "GET":
                self.wfile.write(body)
        do_HEAD = do_GET

        def log_message(self, *args):
            pass
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", "hub")
    monkeypatch.setenv("HF_TOKEN", token)
    try:
        if digest == "wrong":
            with pytest.raises(mm.Stop, match="what came is not the file"):
                mm.hub_file("some/repo", "model.safetensors")
            assert not list(Path("data/weights").rglob("model.safetensors"))
            return
        path = mm.hub_file("some/repo", "model.safetensors")
        assert path == Path("data/weights/some/repo/model.safetensors") and path.read_bytes() == body
        link, key = "/some/repo/resolve/main/model.safetensors", f"Bearer {token}" if token else None
        assert seen == [("HEAD", link, key), ("GET", link, key), ("GET", "/store", None)]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert mm.hub_file("some/repo", "model.safetensors") == path and len(seen) == 3  # not again
    users = Path("hub/models--some--repo/snapshots/0123/model.safetensors")
    users.parent.mkdir(parents=True)
    users.write_bytes(b"")
    assert mm.hub_file("some/repo", "model.safetensors") == users


BAD = {
    "nothing": ("nowhere b", "nowhere"),
    "no images": ("empty b", "empty"),
    "one image": ("one b", "one 2"),
    "the same": ("b ./b", "b same"),
    "drawn twice": ("drawn_faces drawn_faces", "drawn_faces same"),
    "one in the other": ("b b/inner", "b/inner lies"),
    "size of a folder": ("b c --size 8", "--size drawn_faces"),
    "sFID of other lengths": ("spatial.npz spatial2.npz --metrics sfid", "10 7"),
    "generated missing": ("b", "--stats"),
    "a text file": ("notes.txt b", "notes.txt"),
    "npz of floats": ("floats.npz b", "floats.npz uint8"),
    "npz of nothing": ("keys.npz b", "keys.npz mu sigma"),
    "npz cut off": ("cut.npz b", "cut.npz"),
    "statistics with NaN": ("nan.npz b", "nan.npz"),
    "statistics of other lengths": ("short.npz b", "short.npz 10 960"),
    "statistics that do not fit": ("odd.npz b", "odd.npz sigma"),
    "statistics not symmetric": ("skew.npz b", "skew.npz symmetric"),
    "statistics of another mode": ("b other.npz", "other.npz clean"),
    "kid of statistics": ("stats.npz b --metrics kid", "kid stats.npz"),
    "is of random": ("c b --metrics is", "is random"),
    "sfid of random": ("c b --metrics fid,sfid", "sfid random"),
    "pr of three": ("three b --metrics pr", "pr three 4"),
    "metric unknown": ("c b --metrics fid,mse", "--metrics"),
    "mode unknown": ("c b --mode lanczos", "--mode"),
    "num zero": ("c b --num_images 0", "--num_images"),
    "weights of random": ("c b --weights w.pth", "--weights random"),
    "weights missing": ("c b --network inception --weights nowhere.pth", "nowhere.pth"),
    "weights not weights": ("c b --network inception --weights notes.txt", "notes.txt"),
    "weights of another": ("c b --network inception --weights w.pth", "w.pth"),
    "weights of dino": ("c b --network dinov2 --weights w.pth", "w.pth dinov2"),
    "stats not npz": ("c --stats stats.txt", ".npz"),
    "stats of stats": ("stats.npz --stats new.npz", "stats.npz images"),
    "a device": ("c b --device cuda:9", "cuda:9"),
}


@pytest.fixture(scope="module")
def bad_sets(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    here = os.getcwd()
    os.chdir(path)
    noise("b", 5), noise("c", 6, seed=1), noise("one", 1), noise("three", 3)
    Path("empty").mkdir()
    Path("notes.txt").write_text("hello")
    eye, mu = np.eye(960), np.zeros(960)
    np.savez("floats.npz", images=np.zeros((4, 8, 8, 3)))
    np.savez("keys.npz", mean=mu)
    np.savez("nan.npz", mu=mu * np.nan, sigma=eye)
    np.savez("short.npz", mu=np.zeros(10), sigma=np.eye(10))
    for name, n in (("spatial", 10), ("spatial2", 7)):
        np.savez(f"{name}.npz", mu=mu, sigma=eye, mu_s=np.zeros(n), sigma_s=np.eye(n))
    np.savez("odd.npz", mu=mu, sigma=np.eye(10))
    np.savez("skew.npz", mu=mu, sigma=eye + np.triu(np.ones((960, 960))))
    np.savez("stats.npz", mu=mu, sigma=eye)
    np.savez("other.npz", mu=mu, sigma=eye, about=json.dumps(dict(network="random", weights="fixed seed 0", mode="clean",
                                                                  )).replace("clean", "legacy_pytorch"))
    Path("cut.npz").write_bytes(Path("nan.npz").read_bytes()[:1000])
    torch.save({"a": torch.zeros(2)}, "w.pth")
    os.chdir(here)
    return path


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_gets_one_sentence(case, bad_sets, monkeypatch, capsys):
    monkeypatch.chdir(bad_sets)
    argv, words = BAD[case][0].split(), BAD[case][1].split()
    if "--network" not in argv:
        argv += ["--network", "random"]
    if "--device" not in argv:
        argv += ["--device", "cpu"]
    try:
        status = run(*argv)
    except SystemExit as e:
        status = e.code
    out = capsys.readouterr()
    said = [line for line in out.err.splitlines() if line.startswith("fid.py:")]
    assert status == 2 and len(said) == 1 and out.out == "", (status, out.err)
    assert all(word in said[0] for word in words) and "Traceback" not in out.err and len(said[0]) < 400, said


def test_what_cannot_be_written_is_said_first(capsys, monkeypatch):
    noise("a", 5), noise("b", 5, seed=1)
    Path("file").write_text("")
    monkeypatch.setattr(mm, "extract", None)
    assert run("a", "b", "--stats", "file/x.npz", *R) == 1 and "file" in capsys.readouterr().err
    Path("data").write_text("")
    assert run("a", "b", "--cache", *R) == 1 and "data" in capsys.readouterr().err


def test_a_full_disk(capsys, monkeypatch):
    noise("a", 5)
    Path("x.npz").write_bytes(b"")
    monkeypatch.setattr(mm, "check_outputs", lambda args: None)
    with mock.patch.object(np, "savez", side_effect=OSError(28, "No space left on device")):
        assert run("a", "--stats", "x.npz", *R) == 1
    assert "No space left" in capsys.readouterr().err and sorted(os.listdir()) == ["a", "x.npz"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once(number):
    noise("b", 5)
    command = [sys.executable, ROOT / "fid.py", "drawn_faces", "b", *R, "--num_images", "100000", "--metrics", "fid"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs are started deaf to it
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        head = process.stderr.read(20)  # the bar: it has begun
        time.sleep(1)
        process.send_signal(number)
        start = time.monotonic()
        rest = process.communicate(timeout=60)[1]
    assert head and process.returncode == 128 + number and "Traceback" not in rest and "stopped" in rest
    assert time.monotonic() - start < 8


def test_the_table(capsys):
    noise("a", 5), noise("b", 6, seed=1)
    assert run("a", "b", *R) == 0
    out = capsys.readouterr().out
    for words in ("5 images of 32x32", "6 images of 32x32", "random (960)", "mode clean", "fd_random ", "precision", "left out",
                  "Careful: 5 images for 960 features", math.inf):
        assert str(words) in out or words == math.inf
