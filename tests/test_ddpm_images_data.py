"""ddpm_images.py's data: drawn faces, reading pictures of any kind, the cache, downloads, the safetensors format."""
import contextlib
import io
import itertools
import json
import shutil
import signal
import socket
import struct
import threading
import time
import urllib.request
import zipfile
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from PIL import Image

import ddpm_images as d

SHARED = Path(__file__).resolve().parent.parent / "../shared/data"
photographs = pytest.mark.skipif(not SHARED.exists(), reason="no photographs on this machine")
TINY = ("--size 16 --patch 4 --width 32 --mults 1 --blocks 1 --batch_size 8 --steps 2 --eval_every 1 --sample_steps 2 "
        "--device cpu").split()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test in a folder of its own; a run of the script changes what signals do, so that is put back."""
    monkeypatch.chdir(tmp_path)
    handlers, threads = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)], torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models: two threads only wait for each other, for long on a busy machine
    yield tmp_path
    torch.set_num_threads(threads)
    for number, handler in handlers:
        signal.signal(number, handler)


# Drawn faces


@pytest.fixture(scope="module")
def faces():
    return [d.draw_face(0, i, 64) for i in range(400)]


def words(caption):
    """a FUR SPECIES with EYES eyes on a BACKGROUND background"""
    article, fur, species, _, eyes, _, _, _, background, _ = caption.split()
    assert article == ("an" if fur[0] in "aeiou" else "a")
    return fur, species, eyes, background


def test_faces_are_deterministic(faces):
    for i in (0, 17, 399):
        picture, label, caption = d.draw_face(0, i, 64)
        assert np.array_equal(picture, faces[i][0]) and (label, caption) == faces[i][1:]
        assert picture.dtype == np.uint8 and picture.shape == (64, 64, 3)
    assert not np.array_equal(d.draw_face(0, 0, 64)[0], d.draw_face(1, 0, 64)[0])
    assert len({p.tobytes() for p, _, _ in faces}) == len(faces), "all different"


def test_another_size_is_the_same_face():
    for i in range(20):
        (small, *about), (large, *about_large) = d.draw_face(3, i, 32), d.draw_face(3, i, 128)
        shrunk = np.asarray(Image.fromarray(large).resize((32, 32), Image.BOX)).astype(float)
        assert about == about_large and np.abs(shrunk - small).mean() < 6  # of 255
        others = np.abs(shrunk - d.draw_face(3, i + 1, 32)[0]).mean()
        assert others > 12, "the bound above tells faces apart"


def test_every_attribute_occurs_and_none_is_rare(faces):
    columns = list(zip(*(words(caption) for _, _, caption in faces)))
    for column, names, at_least in zip(columns, (d.FURS, d.SPECIES, d.EYES, d.BACKGROUNDS), (6, 8, 4, 6)):
        counts = Counter(column)
        assert set(counts) == set(names) and len(names) >= at_least
        assert min(counts.values()) > 0.5 * len(faces) / len(names), "uniform: 400 draws fall no lower by chance"
    assert all(d.SPECIES[label] == words(caption)[1] for _, label, caption in faces)


def nearest(pixels, table, within=60):
    """The name in `table` to whose colour most of the pixels are nearest, of those nearer than `within`."""
    distance = np.linalg.norm(pixels.reshape(-1, 1, 3) - np.array(list(table.values()), float), axis=-1)
    return list(table)[np.bincount(distance.argmin(1)[distance.min(1) < within], minlength=len(table)).argmax()]


def test_captions_say_what_the_pictures_show(faces):
    right = Counter()
    for picture, label, caption in faces:
        fur, _, eyes, background = words(caption)
        drop = d.TRAITS[d.SPECIES[label]]["drop"]  # the middle of the head, in half-pictures below that of the picture

        def box(x, y, rx, ry):
            (a, b), (e, f) = (np.round((np.array([c - r, c + r]) + 1) * 32).astype(int) for c, r in ((x, rx), (y, ry)))
            return picture[e:f, a:b].reshape(-1, 3)
        right["eyes"] += nearest(np.concatenate([box(s * .3, drop - .06, .15, .15) for s in (-1, 1)]), d.EYES) == eyes
        right["fur"] += nearest(box(0, drop - .275, .3, .075), d.FURS) == fur
        corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]]
        right["background"] += all(nearest(corner, d.BACKGROUNDS, 255) == background for corner in corners)
    assert right["background"] == len(faces)
    assert right["fur"] > 0.97 * len(faces) and right["eyes"] > 0.95 * len(faces)


# Reading one picture


def ramp(height, width):
    """Smooth, different in every pixel and along every axis, so that each crop, mirroring and turn shows."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x // (width - 1), 255 * y // (height - 1), 255 * (x + y) // (width + height - 2)], -1
                    ).astype(np.uint8)


def read(image, size=16, form="PNG", **options):
    """read_picture of an image (or array) that is first saved in a format, as float."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, form, **options)
    picture = d.read_picture(io.BytesIO(file.getvalue()), size)
    assert picture.dtype == np.uint8 and picture.shape == (size, size, 3)
    return picture.astype(float)


def near(picture, want, by=1):
    want = np.broadcast_to(want, picture.shape)
    assert np.abs(picture - want).max() <= by, f"{picture.reshape(-1, 3)[:4]} is not {want.reshape(-1, 3)[:4]}"


RAMP = ramp(16, 16)
GRAY, ALPHA = RAMP[..., 0], RAMP[..., 1]


def on_white(colour, alpha):
    return colour * (alpha / 255) + 255 * (1 - alpha / 255)


def palette_picture(**options):
    image = Image.fromarray((np.arange(256).reshape(16, 16) % 3).astype(np.uint8), "P")
    image.putpalette([250, 10, 20, 30, 240, 50, 60, 70, 230])
    colours = np.array([[250, 10, 20], [30, 240, 50], [60, 70, 230]], float)
    if options:
        colours[options["transparency"]] = 255
    return read(image, **options), colours[np.arange(256).reshape(16, 16) % 3]


def png_16_bits(pixels):
    """An RGB PNG with 16 bits per channel, which Pillow reads but cannot write."""
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *pixels.shape[1::-1], 16, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_modes():
    near(read(RAMP), RAMP, 0)
    near(read(GRAY), GRAY[..., None], 0)
    near(read(np.dstack([GRAY, ALPHA])), on_white(GRAY, ALPHA)[..., None])
    near(read(np.dstack([RAMP, ALPHA[::-1]])), on_white(RAMP, ALPHA[::-1, :, None]))
    near(*palette_picture())
    near(*palette_picture(transparency=1))
    near(*palette_picture(form="GIF", transparency=1))
    near(read(Image.fromarray(RAMP), transparency=(0, 0, 0)), np.where(RAMP.any(-1, keepdims=True), RAMP, 255))
    near(read(Image.fromarray(GRAY > 99)), 255 * (GRAY > 99)[..., None])
    cmyk = np.dstack([RAMP, GRAY // 4])
    near(read(Image.fromarray(cmyk, "CMYK"), form="TIFF"), (255. - RAMP) * (1 - GRAY[..., None] // 4 / 255), 2)
    flat = Image.new("CMYK", (16, 16), (200, 100, 0, 0))
    near(read(flat, form="JPEG", quality=95), (55, 155, 255), 4)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray(form):
    deep = (np.arange(256).reshape(16, 16) * 257).astype(np.uint16)
    deep[0, :4] = 32768, 65535, 0, 128
    near(read(deep, form=form), deep[..., None] / 257)


def test_16_bit_rgb():
    deep = RAMP.astype(np.uint16) * 257
    near(d.read_picture(io.BytesIO(png_16_bits(deep)), 16).astype(float), RAMP)


UPRIGHT = ramp(16, 24)  # wider than high: turning it the wrong way shows in the crop too
STORED = {1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1], 5: UPRIGHT.transpose(1, 0, 2),
          6: np.rot90(UPRIGHT, 1), 7: np.rot90(UPRIGHT.transpose(1, 0, 2), 2), 8: np.rot90(UPRIGHT, -1)}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(orientation):
    """As the EXIF standard numbers them; 6 is a phone held upright."""
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(STORED[orientation])
    near(read(stored, exif=exif), UPRIGHT[:, 4:20])
    large = np.ascontiguousarray(stored.repeat(16, 0).repeat(16, 1))  # JPEG, and so large that it is decoded smaller
    near(read(large, form="JPEG", exif=exif, quality=95), UPRIGHT[:, 4:20], 12)


def test_odd_shapes():
    frames = [Image.new("RGB", (16, 16), c) for c in ("#102030", "#ff0000", "#00ff00")]
    near(read(frames[0], form="GIF", save_all=True, append_images=frames[1:]), (16, 32, 48))
    near(read(Image.new("RGB", (1, 1), (9, 99, 199))), (9, 99, 199), 0)
    wide = np.full((20, 20_000, 3), (255, 0, 0), np.uint8)
    wide[:, 9960:10_040] = 0, 0, 255
    near(read(wide), (0, 0, 255), 0)
    near(read(wide.transpose(1, 0, 2)), (0, 0, 255), 0)


@pytest.mark.parametrize("height, width", [(16, 48), (50, 21), (21, 50), (33, 16), (301, 97)])
def test_the_crop_is_in_the_centre(height, width):
    """What is symmetric stays so, and each side of the crop is where it has to be."""
    y, x = np.mgrid[:height, :width]
    middle = np.stack([np.abs(2 * x - width + 1), np.abs(2 * y - height + 1), np.full_like(x, 50)], -1)
    middle = (middle * 255 // max(height, width)).astype(np.uint8)
    picture = read(middle)
    near(picture, picture[:, ::-1])
    near(picture, picture[::-1])
    side = min(height, width)
    top, left = (height - side) / 2, (width - side) / 2
    want = np.asarray(Image.fromarray(middle).resize((16, 16), Image.BOX, (left, top, left + side, top + side)))
    near(picture, want.astype(float), 12)  # a box and a Lanczos filter differ a little where the slope changes


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("side", [64, 256, 1000])
def test_antialiasing(side, form):
    fine = (np.indices((side, side)).sum(0) % 2 * 255).astype(np.uint8)
    near(read(fine, form=form, **({"quality": 100} if form == "JPEG" else {})), 127.5, 4)


@photographs
def test_photographs():
    for file in sorted(SHARED.glob("afhq_folder/*/*"))[::5]:
        want = np.asarray(Image.open(file).convert("RGB").resize((32, 32), Image.LANCZOS)).astype(float)
        assert np.abs(d.read_picture(file, 32) - want).mean() < 2, file.name


# Reading a whole set


def solid(i, height=20, width=24):
    """Picture number i < 52 of a set, a PNG: its colour says which one it is."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (5 * i, 255 - 5 * i, 77)).save(file, "PNG")
    return file.getvalue()


def put(root, files):
    """{path: bytes, or the number of a picture} -> the folder `root`, and root.zip, in the opposite order."""
    files = {name: solid(v) if isinstance(v, int) else v for name, v in files.items()}
    for name, content in files.items():
        Path(root, name).parent.mkdir(parents=True, exist_ok=True)
        Path(root, name).write_bytes(content)
    with zipfile.ZipFile(f"{root}.zip", "w") as z:
        for name in sorted(files, reverse=True):
            z.writestr(name, files[name])
    return Path(root)


def prepare(path, size=16):
    return d.open_data(d.prepare_data(str(path), size))


def contents(data):
    """{number of the picture: name of its class}, after a check that each picture is whole."""
    assert (data.images == data.images[:, :1, :1]).all() and (data.images[..., 2] == 77).all(), "solid colours"
    numbers = data.images[:, 0, 0, 0] // 5
    assert len(set(numbers.tolist())) == len(data.images) == len(data.labels)
    return {n: data.classes[y] for n, y in zip(numbers.tolist(), data.labels)}


def by_class(*names, each=8, before="", after=""):
    """Eight pictures in a folder per class, and what contents() should say of them."""
    files = {f"{before}{name}/{after}{i}.png": i for i, name in
             enumerate(itertools.chain.from_iterable([n] * each for n in names))}
    return files, {i: name for i, name in enumerate(itertools.chain.from_iterable([n] * each for n in names))}


CLASSES, WANT = by_class("ant", "bee", "cow")
LAYOUTS = {
    "flat": ({f"{i:02}.png": i for i in range(16)}, dict.fromkeys(range(16), "all")),
    "classes": (CLASSES, WANT),
    "nested": by_class("ant", "bee", "cow", after="deep/er/"),
    "wrapper": by_class("ant", "bee", "cow", before="photos/"),
    "two wrappers": by_class("ant", "bee", "cow", before="my/photos/"),
    "train and val": ({**by_class("ant", "bee", before="afhq/train/")[0], "afhq/val/ant/50.png": 50,
                       "afhq/val/cow/51.png": 51}, by_class("ant", "bee")[1]),
    "train without classes": ({**{f"train/{i}.png": i for i in range(16)}, "val/50.png": 50},
                              dict.fromkeys(range(16), "all")),
    "macOS": ({**by_class("ant", "bee", "cow", before="photos/")[0], "__MACOSX/photos/0.png": b"\0\5"}, WANT),
    "other files": ({**CLASSES, "ant/notes.txt": b"hello", "metadata.jsonl": b"{}", "ant/0.txt": b"an ant"}, WANT),
    "a class named train": by_class("car", "train"),
    "dot files": ({**CLASSES, "ant/._0.png": b"\0\5\x16\7", ".thumbs/1.png": 50}, WANT),
    "upper case": ({name.replace(".png", ".PNG"): i for name, i in CLASSES.items()}, WANT),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    files, want = LAYOUTS[layout]
    put("photos", files)
    folder, archive = prepare("photos"), prepare("photos.zip")
    assert contents(folder) == contents(archive) == want
    assert folder.classes == archive.classes == sorted(set(want.values())) and folder.broken == []
    assert folder.images.shape == archive.images.shape == (len(want), 16, 16, 3) and folder.images.dtype == np.uint8


def test_a_zip_holds_the_same_arrays_as_its_folder():
    """In whatever order the files lie in it: `zip -r` does not sort them."""
    put("photos", CLASSES)
    folder, archive = prepare("photos"), prepare("photos.zip")
    assert np.array_equal(folder.images, archive.images) and np.array_equal(folder.labels, archive.labels)


def test_npz():
    images, y = np.stack([np.full((20, 24, 3), (5 * i, 0, 77), np.uint8) for i in range(20)]), np.arange(20) % 3 * 4 + 3
    np.savez("plain.npz", images=images)
    np.savez("labelled.npz", images=images, labels=y, captions=["?"] * 20)
    data = prepare("plain.npz")
    assert contents(data) == {i: data.classes[0] for i in range(20)} and len(data.classes) == 1
    assert contents(prepare("labelled.npz", 32)) == {i: str(y[i]) for i in range(20)}
    wide = ramp(16, 24)[None].repeat(16, 0)
    np.savez("wide.npz", images=wide)
    near(prepare("wide.npz").images.astype(float), wide[:, :, 4:20])


@photographs
def test_real_sets():
    data = prepare(SHARED / "afhq_folder", 32)
    assert data.classes == ["cat", "dog", "wild"] and np.bincount(data.labels).tolist() == [15, 11, 15]
    emoji = prepare(SHARED / "emoji_noto_64.npz", 64)
    assert np.array_equal(emoji.images, np.load(SHARED / "emoji_noto_64.npz")["images"])


def test_a_stray_picture_is_of_no_class():
    """A contact sheet beside the class folders must not be taught as the first class."""
    put("photos", {**CLASSES, "sheet.png": 50})
    with contextlib.suppress(d.Stop):
        assert contents(prepare("photos")).get(50) not in ("ant", "bee", "cow")


def test_drawn_faces_are_the_same_set_in_any_folder(tmp_path, monkeypatch):
    """A run on them can be taken to another machine and go on there."""
    here = d.Pictures("drawn_faces", 16)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert d.Pictures("drawn_faces", 16).key == here.key != d.Pictures("drawn_faces", 32).key


def damaged():
    """Files that no program can show, each broken in another way."""
    whole, jpeg = solid(0, 200, 200), io.BytesIO()
    Image.fromarray(ramp(200, 200)).save(jpeg, "JPEG")
    return {"empty.png": b"", "text.jpg": b"not a picture\n", "cut.png": whole[:-40], "cut.jpg": jpeg.getvalue()[:2000],
            "flipped.png": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:], "head.gif": b"GIF89a", "head.bmp": b"BM",
            "noise.tif": b"II*\0" + bytes(range(200)), "noise.webp": b"RIFF\xff\0\0\0WEBPVP8 " + bytes(99)}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", damaged())
def test_a_damaged_picture_is_a_sentence(name):
    put("photos", {name: damaged()[name]})
    for path in ("photos", "photos.zip"):
        why, label = d.Pictures(path, 16)[0]
        assert label == -1 and name in why and "\n" not in why


def test_whatever_a_decoder_raises_is_a_sentence(monkeypatch):
    """Pillow's plugins raise nearly anything, RuntimeError for AVIF for example, with words or without."""
    put("photos", {"0.png": 0})
    for error in (RuntimeError("two\nlines"), struct.error("short"), IndexError(), KeyError("mode"), MemoryError(),
                  zlib.error("-3"), NotImplementedError("method 99"), Image.DecompressionBombError("too large")):
        def read_picture(file, size):
            raise error
        with monkeypatch.context() as patch:
            pictures = d.Pictures("photos", 16)
            patch.setattr(d, "read_picture", read_picture)
            why, label = pictures[0]
        assert label == -1 and why.startswith("0.png: ") and len(why) > 7 and "\n" not in why


def test_a_damaged_zip_entry_is_a_sentence():
    """The checksum of the pictures inside a .zip, its compression, a password: what zipfile raises for them."""
    with zipfile.ZipFile("photos.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for i in range(3):
            z.writestr(f"{i}.bmp", bytes(range(256)) * 40)
    raw = bytearray(Path("photos.zip").read_bytes())
    spots = [i for i in range(len(raw)) if raw[i:i + 4] == b"PK\3\4"]
    raw[spots[0] + 45:spots[0] + 60] = b"\xff" * 15                         # the compressed bytes
    entries = [i for i in range(len(raw)) if raw[i:i + 4] == b"PK\1\2"]
    for i, at in ((spots[1] + 6, entries[1] + 8), (spots[2] + 8, entries[2] + 10)):
        raw[i], raw[at] = (1, 1) if i == spots[1] + 6 else (99, 99)         # encrypted; an unknown method
    Path("photos.zip").write_bytes(raw)
    for i in range(3):
        why, label = d.Pictures("photos.zip", 16)[i]
        assert label == -1 and f"{i}.bmp" in why and "\n" not in why


def fifty(broken):
    files, want = by_class("ant", "bee", each=25)
    for i, name in enumerate(list(files)):
        if i in broken:
            files[name] = b"broken"
            del want[i]
    return files, want


@pytest.mark.parametrize("path", ["photos", "photos.zip"])
def test_four_percent_broken_are_left_out(path, capsys):
    files, want = fifty({7, 30})
    put("photos", files)
    data = prepare(path)
    assert contents(data) == want and len(data.images) == 48
    assert sorted(why.split(":")[0] for why in data.broken) == ["ant/7.png", "bee/30.png"]
    assert sorted([*data.train, *data.val]) == list(range(48))
    if path == "photos":
        assert d.main([*TINY, "--data", path]) == 0
        out = capsys.readouterr().out
        assert "read: 2: " in out and "ant/7.png" in out and "bee/30.png" in out


@pytest.mark.parametrize("broken, kept, want", [(5, 45, "5 of"), (50, 0, "50 of"), (0, 15, "15"), (1, 15, "1 of")])
def test_too_few_pictures(broken, kept, want):
    files = {f"{i:02}.png": b"broken" if i < broken else i for i in range(broken + kept)}
    put("photos", files)
    for path in ("photos", "photos.zip"):
        with pytest.raises(d.Stop, match=want) as stop:
            prepare(path)
        assert stop.value.code == 2 and path in str(stop.value) and "\n" not in str(stop.value)
        assert broken == 0 or ".png" in str(stop.value), "names a broken one"
    assert not [p for p in Path("data").rglob("*") if p.is_file()], "nothing half-done stays behind"


def test_the_limits():
    put("photos", {f"{i:02}.png": b"broken" if i == 3 else i for i in range(20)})
    assert len(prepare("photos").images) == 19, "5 % broken is not more than 5 %"
    put("few", {f"{i:02}.png": i for i in range(16)})
    assert len(prepare("few").images) == 16


def test_cache(monkeypatch):
    """The second time no picture is read; another file, size or name, or an edited file, and all are."""
    root, reads, loader = put("photos", CLASSES), [], torch.utils.data.DataLoader
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *a, **k: reads.append(1) or loader(*a, **k))
    first = d.prepare_data("photos", 16)
    assert d.prepare_data("photos", 16) == d.prepare_data(str(root.absolute()), 16) == first and len(reads) == 1
    assert d.prepare_data("photos", 32) != first and d.prepare_data("photos.zip", 16) != first and len(reads) == 3
    shutil.copytree("photos", "others")
    assert d.prepare_data("others", 16) != first and d.prepare_data("photos", 16) == first and len(reads) == 4
    changes = (lambda: (root / "ant/0.png").write_bytes(solid(40)), lambda: (root / "bee/x.png").write_bytes(solid(41)),
               lambda: (root / "cow/16.png").unlink(), lambda: (root / "ant/1.png").rename(root / "cow/1.png"))
    for change in changes:
        before, n = d.prepare_data("photos", 16), len(reads)
        change()
        after = d.prepare_data("photos", 16)
        assert after != before and d.prepare_data("photos", 16) == after and len(reads) == n + 1
    want = {**WANT, 1: "cow", 40: "ant", 41: "bee"}
    assert contents(d.open_data(after)) == {i: name for i, name in want.items() if i not in (0, 16)}
    assert d.open_data(first).key != d.open_data(after).key
    assert not list(Path("data").rglob("*.part"))


def test_the_cache_is_never_half_written(monkeypatch):
    put("photos", CLASSES)
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):
        def fail(*args):
            raise error
        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, OSError, d.Stop)):
            patch.setattr(d.json, "dumps", fail)
            d.prepare_data("photos", 16)
        assert not [p for p in Path("data").rglob("*") if p.is_file()]
    assert contents(prepare("photos")) == WANT


@pytest.mark.parametrize("n, n_val", [(16, 1), (50, 5), (3000, 256)])
def test_train_and_val(n, n_val):
    np.savez("some.npz", images=np.random.default_rng(0).integers(0, 256, (n, 2, 2, 3), np.uint8))
    one, two = prepare("some.npz", 2), prepare("some.npz", 2)
    assert len(one.val) == n_val and not set(one.val) & set(one.train)
    assert sorted([*one.val, *one.train]) == list(range(n))
    assert np.array_equal(one.val, two.val) and np.array_equal(one.train, two.train)
    assert n < 3000 or 0.3 < (one.val < n / 2).mean() < 0.7, "spread over the whole set"


# Downloads


class Server:
    """An HTTP server on this machine. `answers` are called with the handler, one per request, the last one again."""

    def __init__(self, *answers):
        self.asked, self.stop = [], threading.Event()
        answers, outer = list(answers), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.headers.get("Range"))
                with contextlib.suppress(OSError):
                    (answers.pop(0) if len(answers) > 1 else answers[0])(self)

            def log_message(self, *args):
                pass
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/afhq.zip"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def send(body, at_most=None, ranges=True, length=None, then=lambda: None):
    """An answer with `body`, or what the Range header asks of it, but at most so many bytes before it hangs up."""
    def answer(h):
        asked = h.headers.get("Range") if ranges else None
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if asked and start >= len(body):
            return h.send_error(416)
        h.send_response(206 if asked else 200)
        if asked:
            h.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if length is not False:
            h.send_header("Content-Length", str((length or len(body)) - start))
        h.end_headers()
        h.wfile.write(body[start:][:at_most])
        h.wfile.flush()
        then()
    return answer


def fail(code):
    return lambda h: h.send_error(code)


BODY = np.random.default_rng(0).bytes(3_000_000)
FILE = Path("there/file.bin")
PART = Path("there/file.bin.part")


def fetched(server, **options):
    d.download(server.url, FILE, **options)
    return FILE.read_bytes() == BODY and not PART.exists()


@pytest.mark.parametrize("length", [None, False], ids=["", "no Content-Length"])
def test_download(length):
    with Server(send(BODY, length=length)) as server:
        assert fetched(server) and server.asked == [None]


def test_download_goes_on_where_it_was_cut():
    with Server(send(BODY, 1_000_000), send(BODY, 500_000), send(BODY)) as server:
        assert fetched(server) and server.asked == [None, "bytes=1000000-", "bytes=1500000-"]


def test_download_goes_on_with_what_an_earlier_run_left():
    PART.parent.mkdir()
    PART.write_bytes(BODY[:1234])
    with Server(send(BODY)) as server:
        assert fetched(server) and server.asked == ["bytes=1234-"]


def test_download_from_a_server_without_ranges():
    with Server(send(BODY, 1_000_000, ranges=False), send(BODY, ranges=False)) as server:
        assert fetched(server) and server.asked == [None, "bytes=1000000-"]


@pytest.mark.parametrize("stale", [BODY + b"more", BODY], ids=["longer", "as long"])
def test_download_when_the_part_is_not_shorter_than_the_file(stale):
    PART.parent.mkdir()
    PART.write_bytes(stale)
    with Server(send(BODY)) as server:
        assert fetched(server) and server.asked[0] == f"bytes={len(stale)}-"


def test_many_cuts_lose_nothing():
    """A bad line that brings some bytes each time ends in the whole file, at the latest in the second run."""
    with Server(*[send(BODY, 400_000)] * 7, send(BODY)) as server:
        for _ in range(2):
            with contextlib.suppress(d.Stop):
                d.download(server.url, FILE)
        assert FILE.read_bytes() == BODY and server.asked == [None] + [f"bytes={400_000 * k}-" for k in range(1, 8)]


def test_a_server_that_hangs(monkeypatch):
    real, waits = urllib.request.urlopen, []

    def urlopen(request, timeout):
        waits.append(timeout)
        return real(request, timeout=0.2)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    half, nothing = (send(BODY, n, then=lambda: server.stop.wait(20)) for n in (1_500_000, 0))
    with Server(half, nothing) as server:
        began = time.time()
        with pytest.raises(d.Stop):
            d.download(server.url, FILE)
        assert time.time() - began < 8 and max(waits) <= 60 and not FILE.exists()
    assert PART.read_bytes() == BODY[:PART.stat().st_size] and PART.stat().st_size >= 1_000_000, "kept for the next run"


def dead_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}/afhq.zip"


PAGE = b"<html>The file is too popular today.</html>"
FAILURES = {"404": fail(404), "500": fail(500), "a page instead of the file": send(PAGE), "nothing": send(b""),
            "shorter than promised": send(BODY[:999], length=5000, ranges=False),
            "shorter than promised, with ranges": send(BODY[:999], length=5000),
            "refused": None, "no network": None}


@pytest.mark.parametrize("failure", FAILURES)
def test_animal_faces_that_cannot_be_had(failure, monkeypatch, capsys):
    with Server(FAILURES[failure] or fail(404)) as server:
        url = {"refused": dead_port(), "no network": "https://www.example.invalid/afhq.zip"}.get(failure, server.url)
        monkeypatch.setattr(d, "ANIMAL_FACES_URL", url)
        began = time.time()
        assert d.animal_faces() == "drawn_faces" and time.time() - began < 10
    out, err = capsys.readouterr()
    line, = [line for line in out.splitlines() if "cannot be had" in line]
    assert err == "" and url in line and "data/animal_faces/afhq.zip" in line and "drawn_faces" in line
    assert not [p for p in Path("data").rglob("*") if p.is_file() and p.stat().st_size in (0, len(PAGE))], "no rubbish"


def test_a_run_without_animal_faces_says_what_it_used(monkeypatch, capsys):
    monkeypatch.setattr(d, "ANIMAL_FACES_URL", dead_port())
    monkeypatch.setattr(d, "DRAWN_FACES", 32)
    assert d.main([*TINY, "--data", "animal_faces"]) == 0
    out, err = capsys.readouterr()
    said, = [line for line in out.splitlines() if "to train on" in line]
    assert "drawn_faces" in said and "animal_faces" not in said
    about = json.loads(d.load_safetensors("out/ddpm_images/model.safetensors")[1]["data"])
    assert about["name"] == "drawn_faces" and about["classes"] == list(d.SPECIES)
    state = d.load_checkpoint("out/ddpm_images/ckpt.pt", "ddpm_images.py")
    rest = {k: v for k, v in state.items() if k not in ("args", "model", "ema", "opt")}
    assert "drawn_faces" in repr(rest), "the checkpoint says what was used"
    assert "drawn_faces" in Path("out/ddpm_images/log.jsonl").read_text(), "and the log"
    assert d.main([*TINY, "--resume", "out/ddpm_images/ckpt.pt"]) == 0, "and the next run goes on with that"


def test_animal_faces(monkeypatch, capsys):
    files, want = by_class("cat", "dog", "wild", before="afhq/train/")
    put("afhq", {**files, "afhq/val/cat/50.png": 50})
    body = Path("afhq.zip").read_bytes()
    with Server(send(body, len(body) // 2), send(body)) as server:
        monkeypatch.setattr(d, "ANIMAL_FACES_URL", server.url)
        data = prepare("animal_faces")
        assert contents(data) == want and data.classes == ["cat", "dog", "wild"]
        assert "CC BY-NC 4.0" in capsys.readouterr().out
        prepare("animal_faces")
        assert server.asked == [None, f"bytes={len(body) // 2}-"], "fetched once"
        Path("data/animal_faces/afhq.zip").unlink()
        shutil.move("afhq/afhq", "data/animal_faces/afhq")
        assert contents(prepare("animal_faces")) == want and len(server.asked) == 2, "put there by hand"


# The safetensors format

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool]
META = {"format": "pt", "args": json.dumps({"é": ["\n", "\"", 1.5]})}


def tensors_of(dtype):
    x = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0)) * 50
    tensors = {"w": x, "scalar": x[0, 0, 0], "none": x[:0], "a.b": x[1].T}
    return {k: v.to(dtype, copy=True) for k, v in tensors.items()}


def same(one, two):
    return one.keys() == two.keys() and all(
        one[k].dtype == two[k].dtype and one[k].shape == two[k].shape and torch.equal(one[k], two[k]) for k in one)


EVERYTHING = {f"{dtype}.{k}": v for dtype in DTYPES for k, v in tensors_of(dtype).items()}


@pytest.mark.parametrize("tensors", [*map(tensors_of, DTYPES), EVERYTHING, {}], ids=[*map(str, DTYPES), "all", "empty"])
def test_safetensors_both_ways(tensors):
    ours, theirs = Path("ours.safetensors"), Path("theirs.safetensors")
    d.save_safetensors(ours, tensors, META)
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, theirs, {"format": "pt"})
    assert same(safetensors.torch.load_file(ours), tensors)
    with safetensors.safe_open(ours, "pt") as f:
        assert f.metadata() == META
    for path, metadata in ((ours, META), (theirs, {"format": "pt"})):
        loaded, about = d.load_safetensors(path)
        assert same(loaded, tensors) and about == metadata
    d.save_safetensors(ours, tensors, {"format": "pt"})
    assert ours.read_bytes() == theirs.read_bytes(), "byte for byte"


def test_safetensors_of_a_model():
    model = d.UNet(16, 4, 32, [1, 2], 1, 4, 0.0, 3, 1)
    d.save_safetensors(Path("ours"), model.state_dict(), META)
    safetensors.torch.save_file(model.state_dict(), "theirs", {"format": "pt"})
    d.save_safetensors(Path("again"), d.load_safetensors("ours")[0], {"format": "pt"})
    assert Path("again").read_bytes() == Path("theirs").read_bytes()
    loaded = d.load_safetensors("ours")[0]
    loaded["conv_in.bias"] += 1
    assert same(d.load_safetensors("ours")[0], model.state_dict()), "to change what was loaded leaves the file alone"


def packed(header, body=bytes(24)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape, low, high, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [low, high]}


WHOLE = packed({"a": entry([2, 3], 0, 24)})
DAMAGED = {
    "no bytes": b"", "three bytes": b"\1\0\0", "cut in the header": WHOLE[:30], "cut in the tensors": WHOLE[:-1],
    "header longer than the file": struct.pack("<Q", 10_000) + WHOLE[8:],
    "header length of 2^63": struct.pack("<Q", 1 << 63) + WHOLE[8:], "header length 0": bytes(8) + WHOLE[8:],
    "not JSON": packed(b"{a: 1}"), "not text": packed(b"\xff\xfe\xfd"), "a list": packed([1]),
    "nested": packed(b"[" * 9000),
    "beyond the end": packed({"a": entry([2, 3], 8, 32)}), "backwards": packed({"a": entry([0], 24, 0)}),
    "negative offset": packed({"a": entry([2, 3], -24, 0)}),
    "size is not the shape's": packed({"a": entry([5], 0, 24)}),
    "overlap": packed({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}),
    "the same bytes twice": packed({"a": entry([6], 0, 24), "b": entry([6], 0, 24)}),
    "a gap": packed({"a": entry([2], 0, 8), "b": entry([2], 16, 24)}), "bytes left over": WHOLE + b"1234",
    "unknown dtype": packed({"a": entry([24], 0, 24, "F7")}), "no shape": packed({"a": {"dtype": "F32"}}),
    "negative shape": packed({"a": entry([-2, -3], 0, 24)}), "fractional shape": packed({"a": entry([2.0, 3], 0, 24)}),
    "shape of words": packed({"a": entry(["2", "3"], 0, 24)}), "three offsets": packed(
        {"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 8, 24]}}), "an entry is a number": packed({"a": 1}),
    "metadata is a list": packed({"__metadata__": [1], "a": entry([2, 3], 0, 24)}),
    "metadata is not text": packed({"__metadata__": {"args": 1}, "a": entry([2, 3], 0, 24)})}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_safetensors(damage):
    file = Path("damaged.safetensors")
    file.write_bytes(WHOLE)
    assert d.load_safetensors(file)[0]["a"].shape == (2, 3)
    file.write_bytes(DAMAGED[damage])
    with pytest.raises(Exception):
        safetensors.torch.load_file(file)  # the library refuses it too
    with pytest.raises(d.Stop) as stop:
        d.load_safetensors(file)
    assert stop.value.code == 2 and "damaged.safetensors" in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize("path", ["nowhere.safetensors", "."])
def test_safetensors_that_cannot_be_opened(path):
    with pytest.raises(d.Stop, match="No such file|Is a directory") as stop:
        d.load_safetensors(path)
    assert path in str(stop.value)


def test_a_failed_save_leaves_the_old_file():
    d.save_safetensors(Path("model"), tensors_of(torch.float32), META)
    before = Path("model").read_bytes()
    with pytest.raises(Exception):
        d.save_safetensors(Path("model"), {"z": torch.zeros(2, dtype=torch.complex64)}, META)

    def write(f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    with pytest.raises(d.Stop, match="model.*No space left on device") as stop:
        d.write_atomically(Path("model"), write)
    assert stop.value.code == 1 and Path("model").read_bytes() == before
    assert [p.name for p in Path(".").iterdir()] == ["model"]
