"""The house rules: copies stay identical, each script stands alone, and the README tells the truth."""
import argparse
import ast
import difflib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
from pyflakes.checker import Checker

ROOT = Path(__file__).resolve().parent.parent
NINE = ["ddpm_2d.py", "cfm_2d.py", "ddpm_images.py", "cfm_images.py", "fid.py", "latent_dit.py", "text2img.py",
        "finetune_lora.py", "serve.py"]
SCRIPTS = [name for name in NINE if (ROOT / name).exists()]
PACKAGES = {"torch": "torch", "numpy": "numpy", "PIL": "pillow", "scipy": "scipy", "tqdm": "tqdm"}  # import: install
RULER = "# " + 77 * "-"
each_script = pytest.mark.parametrize("script", SCRIPTS)

# Top-level names whose text may differ from script to script, and why. Everything else is a copy.
ALLOWED_TO_DIFFER = {
    "parse_args": "each script has its own knobs",
    "loss_fn": "the method: noise prediction, velocity, latents, captions",
    "sample": "the method: the reverse process of a diffusion, or an ODE",
    "train": "each script sets up its own data, model and pictures",
    "main": "each script chooses among its own tasks",
    "sample_only": "pictures, points: what comes out differs",
    "check": "each script checks its own flags",
    "to_x0": "in the plane the network can predict the score, too",
    "PREDICTIONS": "in the plane the network can predict the score, too",
    "SAMPLERS": "Heun and Langevin are shown in the plane",
    "MLP": "MeanFlow asks for two times, and time runs from 0 to 1 in a flow, to 999 in a diffusion",
    "log_likelihood": "the ODE of a diffusion, in the angle, or of a flow",
    "draw": "samplers of a diffusion or solvers of a flow",
    "report": "the error of the score or of the velocity; a flow counts its calls",
    "show": "the score or the velocity; noise or a coupling",
    "ARCHITECTURE": "the flags that a checkpoint decides",
    "FREE_ON_RESUME": "the flags that may change on --resume",
    "PRESETS": "a diffusion and a flow have other knobs",
    "path": "in the plane a Brownian bridge as well",
    "meanflow_loss_fn": "on images only where r < t, in fp32, and with labels",
    "DDPMFlow": "on images with labels, and clipped as ddpm_images.py clips",
    "COUPLINGS": "Sinkhorn's only in the plane",
    "couple": "OT or Sinkhorn in the plane; OT within each class on images",
    "guided": "a flow is guided in an interval of t",
    "build_model": "a flow's network gives a velocity, and takes no condition",
    "train_batch": "times and couplings of a flow; boxes of a translation",
    "train_step": "the loss of a diffusion or a flow",
    "validate": "levels in 0..T-1 or times in [0, 1]",
    "generate": "a diffusion's sampler, or a flow's solver that counts its calls",
    "draw_pictures": "a flow shows inversions and its solvers",
    "make_pairs": "couplings in the plane, reflow on images",
    "load_model": "points or pictures",
    "SIZES": "with text a size of about 100 million weights; latent_dit.py has those of a paper",
    "attend": "the padding of a text has to be masked",
    "DiTBlock": "cross-attention to a text",
    "DiT": "told a class or a text",
    "Pictures": "labels or captions",
    "prepare_data": "labels or captions",
    "open_data": "labels or captions; whole captions are held out",
    "FURS": "the animal that finetune_lora.py teaches is white",
    "TRAITS": "the animal that finetune_lora.py teaches",
    "restore": "of a LoRA its matrices alone",
    "begin_log": "finetune_lora.py writes lora.safetensors",
}


@lru_cache(maxsize=None)
def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@lru_cache(maxsize=None)
def parser_of(script):
    """The ArgumentParser that the script's parse_args builds, caught at the moment it would parse."""
    class Caught(Exception):
        pass

    def catch(self, *args, **kwargs):
        raise Caught(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Caught) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        importlib.import_module(script[:-3]).parse_args([])
    return caught.value.args[0]


def flags(script):
    return [a for a in parser_of(script)._actions if a.option_strings and a.dest != "help"]


def git_files():
    """The files that git tracks, or would track after `git add .`; None outside a git checkout."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if (ROOT / name).is_file()]


# Identical copies


def blocks(path):
    """{name: (first line, text)} of the top-level functions, classes and constants, with decorators and comments."""
    text, found = path.read_text(encoding="utf-8"), {}
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names, first = [node.name], min([node.lineno] + [d.lineno for d in node.decorator_list])
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names, first = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)], node.lineno
        else:
            continue
        for name in names:
            line, before = found.get(name, (first, ""))  # a name that is defined twice counts with both texts
            found[name] = line, before + "\n".join(lines[first - 1:node.end_lineno]) + "\n"
    return found


def copy_problems(paths, allowed, complete):
    """Sentences about copies that differ, and about entries of `allowed` without a use. `complete`: all nine exist."""
    places, problems = defaultdict(list), []
    for path in paths:
        for name, (line, text) in blocks(path).items():
            places[name].append((f"{path.name}:{line}", text))
    for name, copies in places.items():
        for where, text in copies[1:]:
            if text != copies[0][1] and name not in allowed:
                diff = difflib.unified_diff(copies[0][1].splitlines(True), text.splitlines(True), copies[0][0], where)
                problems.append(f"{name} differs:\n" + "".join(diff))
    for name in allowed:
        texts = [text for _, text in places[name]]
        if len(texts) >= 2 and len(set(texts)) == 1:
            problems.append(f"{name} may differ, but is identical in {len(texts)} scripts: take it off the list")
        if len(texts) < 2 and complete:
            problems.append(f"{name} may differ, but {len(texts)} scripts have it: take it off the list")
    return problems


def test_copies_are_identical():
    problems = copy_problems([ROOT / s for s in SCRIPTS], ALLOWED_TO_DIFFER, SCRIPTS == NINE)
    assert not problems, "\n\n".join(problems)
    assert all(len(reason) > 10 for reason in ALLOWED_TO_DIFFER.values())


TOY = """LR = 1e-3  # for 64 pixels
A, B = 1, 2

@torch.no_grad()
def f(x):
    # why
    return x

class C:
    k = 1
"""


@pytest.mark.parametrize("old, new, name", [
    ("# why", "# how", "f"), ("@torch.no_grad()\n", "", "f"), ("1e-3", "1e-4", "LR"), ("64 pix", "32 pix", "LR"),
    ("B = 1, 2", "B = 1, 3", "B"), ("    k = 1", "    k = 2", "C"), ("class C:", "C = 1\nclass C:", "C")])
def test_the_copy_check_catches(tmp_path, old, new, name):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text(TOY)
    two.write_text("import os\n\n\ndef other():\n    pass\n\n\n" + TOY)
    assert not copy_problems([one, two], {}, True)
    assert "identical" in copy_problems([one, two], {name: "stale"}, False)[0]
    two.write_text(TOY.replace(old, new))
    assert any(p.startswith(f"{name} differs:\n--- one.py:") for p in copy_problems([one, two], {}, True))
    assert not any(p.startswith(f"{name} ") for p in copy_problems([one, two], {name: "on purpose"}, True))
    assert not copy_problems([one], {"f": "one script so far"}, False)
    assert "take it off" in copy_problems([one], {"f": "nowhere else"}, True)[0]


# Each script stands alone


@each_script
def test_imports(script):
    bad, siblings = [], {name[:-3] for name in NINE}
    for node in ast.walk(ast.parse(read(script))):
        called = isinstance(node, ast.Call) and (getattr(node.func, "id", None) or getattr(node.func, "attr", None))
        modules = ([a.name for a in node.names] if isinstance(node, ast.Import) else
                   ["." * node.level + (node.module or "")] if isinstance(node, ast.ImportFrom) else
                   [f"({called})"] if called in ("__import__", "import_module") else [])
        tops = {m: m.split(".")[0] for m in modules}
        bad += [f"{script}:{node.lineno} imports {m}" for m, top in tops.items()
                if top in siblings or top not in PACKAGES and top not in sys.stdlib_module_names]
    assert not bad


@each_script
def test_every_name_is_known_and_used(script):
    """What no test runs, such as a download with a hash, would end in a NameError only at the user's."""
    found = Checker(ast.parse(read(script)), script).messages
    assert [str(message) for message in found] == []


@each_script
def test_nothing_runs_at_import(script):
    tree = ast.parse(read(script))
    assert ast.get_docstring(tree), "the script begins with a docstring"
    quiet = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    assert [f"{script}:{n.lineno}" for n in tree.body[1:-1] if not isinstance(n, quiet)] == []
    assert isinstance(tree.body[-1], ast.If) and ast.unparse(tree.body[-1].test) == "__name__ == '__main__'"


@each_script
def test_sections(script):
    """The reader meets the knobs, the method, the model, the training and main in the same order in every script."""
    tree, lines = ast.parse(read(script)), read(script).splitlines()
    first = {n.name: n.lineno for n in reversed(tree.body) if isinstance(n, ast.FunctionDef)}
    models = [n.lineno for n in tree.body if isinstance(n, ast.ClassDef)
              and n.name not in ("LoRA", "Adapted", "Quantised")  # the method of finetune_lora.py
              and any(ast.unparse(b).split(".")[-1] == "Module" for b in n.bases)]
    assert "parse_args" in first and "main" in first
    assert first["parse_args"] == min(first.values()), "parse_args is the first function"
    order = [first["parse_args"], first.get("loss_fn"), min(models, default=None), first.get("train"), first["main"]]
    order = [line for line in order if line]
    assert order == sorted(order), "parse_args, loss_fn, the first nn.Module, train, main"
    rulers = [i for i, line in enumerate(lines) if re.fullmatch(r"#\s*-{3,}\s*", line)]
    assert len(rulers) >= 3, "rulers mark the sections"
    assert [i + 1 for i in rulers if lines[i] != RULER] == [], f"rulers are {len(RULER)} columns wide"
    assert [i + 1 for i in rulers if not re.search(r"^# \w", f"{lines[i - 1]}\n{lines[i + 1]}", re.M)] == [], "titles"


@each_script
def test_lines(script):
    bad = re.compile(r".{121}|.*\b(TODO|FIXME|XXX)\b|.*\s$")
    assert [f"{script}:{i}" for i, line in enumerate(read(script).splitlines(), 1) if bad.match(line)] == []


# The command line


@pytest.fixture(scope="session")
def helps(run_script):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(SCRIPTS, pool.map(lambda script: run_script(script, "--help"), SCRIPTS)))


@each_script
def test_help(script, helps):
    done = helps[script]
    assert (done.returncode, done.stderr) == (0, "")  # a bare % in a help text ends in a traceback here
    assert [a.option_strings[0] for a in flags(script) if a.option_strings[0] not in done.stdout] == []
    assert "(default:" in done.stdout


@each_script
def test_flags(script):
    assert parser_of(script).allow_abbrev is False
    assert [a.dest for a in flags(script) if not a.help] == []
    assert [s for a in flags(script) for s in a.option_strings[:1] if not re.fullmatch(r"--[a-z][a-z0-9_]*", s)] == []
    unused = [a.dest for a in flags(script) if not re.search(rf"\b(args|known)\.{a.dest}\b", read(script))]
    assert not unused, "flags that change nothing"


def test_same_flag_same_help():
    texts = defaultdict(lambda: defaultdict(list))
    for script in SCRIPTS:
        for action in flags(script):
            texts[action.option_strings[0]][action.help].append(script)
    assert {flag: dict(helps) for flag, helps in texts.items() if len(helps) > 1} == {}


def test_torchrun_lets_every_flag_pass():
    """It abbreviates: a script's flag that begins two of its own options, as --num does, is refused as ambiguous."""
    from torch.distributed.run import get_args_parser
    for script in SCRIPTS:
        for action in flags(script):
            for flag in action.option_strings:
                assert get_args_parser().parse_args([script, flag, "1"]).training_script_args == [flag, "1"]


# The README


def readme_code():
    """(lines of code blocks with continuations joined, inline codes, the text without code blocks) of the README."""
    fence = re.compile(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```", re.M | re.S)
    code, prose = "\n".join(fence.findall(read("README.md"))), fence.sub("", read("README.md"))
    return re.sub(r"\\\n\s*", " ", code).splitlines(), re.findall(r"`([^`\n]+)`", prose), prose


def readme_commands():
    """[(script, argv)] of every `python X.py ...` and `torchrun ... X.py ...` in the README's code blocks."""
    found = []
    for line in readme_code()[0]:
        if not re.match(r"\s*(\$ )?(\w+=\S* )*(\S*python3?|torchrun)\s.*\.py\b", line):
            continue
        words = shlex.split(line.strip(), comments=True)
        stop = next((i for i, w in enumerate(words) if w in ("&&", "||", "|", ";", "&", ">", "2>", ">>")), len(words))
        at = next((i for i, w in enumerate(words[:stop]) if w.endswith(".py")), None)
        if at is not None:
            found.append((words[at], words[at + 1:stop]))
    return found


def test_readme_commands(capsys):
    for script, argv in readme_commands():
        assert (ROOT / script).is_file(), f"README runs {script}, which does not exist"
        if script not in SCRIPTS:
            continue
        try:
            parser_of(script).parse_args(argv)
            # The script's own checks may look for files or a device, so they only judge commands that name neither.
            if not any(re.search(r"/|\.[a-z]|[A-Z]{2}|^--(device|resume|ckpt)", word) for word in argv):
                importlib.import_module(script[:-3]).parse_args(argv)
        except SystemExit as stop:
            assert not stop.code, f"README: {script} {shlex.join(argv)}\n{capsys.readouterr().err}"


def test_readme_names_what_exists():
    code, inline, prose = readme_code()
    files, wrong = git_files(), []
    targets = [m[1] for text in inline + code if (m := re.match(r"\s*(?:\$ )?make ([a-z][\w-]*)", text))]
    wrong += [f"make {t}" for t in targets if not re.search(rf"^{t}:", read("Makefile"), re.M)]
    known = {s for script in SCRIPTS for a in parser_of(script)._actions for s in a.option_strings}
    for text in inline:
        ours = text if text.startswith("--") else text.partition(".py ")[2]
        wrong += [flag for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", ours) if flag not in known]
    shown = re.findall(r"\]\(\s*<?([^)\s>]+)", prose) + re.findall(r"(?:src|href|srcset)=[\"']([^\"' ]+)", prose)
    shown = [s.partition("#")[0] for s in shown if not re.match(r"\w+:|#|//", s)]
    shown += [s for s in inline if re.fullmatch(r"[\w./-]+\.py|assets/\S+", s)]
    wrong += [s for s in shown if not (ROOT / s).exists()
              or files is not None and not any((f + "/").startswith(os.path.normpath(s) + "/") for f in files)]
    assert wrong == [], "the README names what does not exist, or what git ignores"


def lines():
    """{script: (lines, those that stand in no script before it)}"""
    seen, found = set(), {}
    for script in SCRIPTS:
        texts = {text for _, text in blocks(ROOT / script).values()}
        n = len(read(script).splitlines())
        found[script] = n, n - sum(len(text.splitlines()) for text in texts & seen)
        seen |= texts
    return found


def test_readme_counts_lines():
    rows = dict(re.findall(r"^\| \[(\w+\.py)\]\(\w+\.py\) \| ([^|]+) \|", read("README.md"), re.M))
    assert rows == {script: f"{n:,} ({new:,})" for script, (n, new) in lines().items()}


def test_the_course_says_where_it_stands():
    rows = re.findall(r"^\| \[(\w+\.py)\]\(#\w+\) \|.*\|([^|]+)\|$", read("README.md"), re.M)
    assert [script for script, _ in rows] == NINE
    assert [(script, name) for script, names in rows for name in re.findall(r"`(\w+)`", names)
            if name not in blocks(ROOT / script)] == []


def test_readme_anchors():
    heads = re.findall(r"^#+ (.+)$", readme_code()[2], re.M)
    known = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
    assert [a for a in re.findall(r"\]\(#([^)]+)\)", read("README.md")) if a not in known] == []


# The checkout


def test_the_house_is_complete():
    needed = ["README.md", "LICENSE", "Makefile", "requirements.txt", "tests/requirements.txt", ".gitignore", ".ci/run"]
    assert [name for name in needed if not (ROOT / name).is_file()] == []
    assert os.access(ROOT / ".ci/run", os.X_OK)
    installed = re.findall(r"^([\w-]+)", read("requirements.txt"), re.M)
    assert sorted(installed) == sorted(PACKAGES.values())
    assert [p.name for p in ROOT.glob("*.py") if p.name not in NINE] == [], "the house has nine scripts"


@pytest.mark.skipif(git_files() is None, reason="not a git checkout")
def test_tracked_files():
    found, size = [], 0
    for name in git_files():
        content = (ROOT / name).read_bytes()
        found += [f"{name}: {m[0]}" for m in re.finditer(rb"(?<![\w.:/~])/(?:work|root|tmp)/[ -~]{0,30}", content)
                  if b"\0" not in content]  # pictures have zero bytes
        size += len(content)
    assert found == [], "paths of one machine"
    assert size < 20e6, "the pictures weigh too much"
