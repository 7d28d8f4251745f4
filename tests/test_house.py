"""The house rules: scripts stand alone and stay short, copies stay identical, and the README tells the truth."""
import argparse
import ast
import difflib
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
from pyflakes.checker import Checker

ROOT = Path(__file__).resolve().parent.parent
BUDGET = {  # script: at most so many lines that are not blank, and so many KB (1,000 bytes)
    "ddpm_2d.py": (340, 20.5), "cfm_2d.py": (355, 21.5), "ddpm_images.py": (680, 46), "cfm_images.py": (640, 43),
    "fid.py": (390, 24), "latent_dit.py": (910, 59), "text2img.py": (1010, 67), "finetune_lora.py": (1330, 90),
    "serve.py": (1060, 71)}
NINE = list(BUDGET)
NEW = ["ddpm_images.py", "cfm_images.py"]  # rewritten so far; once NEW is NINE, OLD and OLD_MAY_DIFFER can go
OLD = [script for script in NINE if script not in NEW]
SIBLINGS = {  # pair: at most so many changed lines in their diff
    ("ddpm_2d.py", "cfm_2d.py"): 250, ("ddpm_images.py", "cfm_images.py"): 290, ("latent_dit.py", "text2img.py"): 500}
PACKAGES = {"torch": "torch", "numpy": "numpy", "PIL": "pillow", "scipy": "scipy", "tqdm": "tqdm"}  # import: install
BANNED = [  # say image, color, add noise, flag; class-conditional; sample or generate
    r"(?i)picture|colour|drown|\bknobs?\b", r"\b(tell|told)\b.{0,20}\b(class|label)", r"\bdraws?( N| new| the)? images"]
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
each_script = pytest.mark.parametrize("script", NINE)
each_new_script = pytest.mark.parametrize("script", NEW)

# Top-level names whose text may differ from script to script, and why. Everything else is a copy.
NEW_MAY_DIFFER = {
    "add_noise": "the method: alpha_bar of a diffusion, or a straight line",
    "loss_fn": "the method: noise prediction or velocity",
    "sample": "the method: the reverse process of a diffusion, or an ODE",
    "UNet": "a diffusion takes a condition for image translation",
    "get_batch": "the distribution of t",
    "validate": "the levels of t, and the condition",
    "generate": "a diffusion's sampler or a flow's",
    "show": "what is worth a look differs between a diffusion and a flow",
    "train": "the condition, the arguments of the loss",
    "sample_images": "a diffusion translates images",
    "PRESETS": "settings that work best for each method",
    "parse_args": "each method has its own flags"}
OLD_MAY_DIFFER = dict.fromkeys(
    "parse_args loss_fn sample train main sample_only check SAMPLERS MLP log_likelihood draw report show ARCHITECTURE "
    "FREE_ON_RESUME PRESETS path guided build_model train_batch train_step validate generate draw_pictures load_model "
    "SIZES attend DiTBlock DiT Pictures prepare_data open_data FURS TRAITS restore begin_log".split(), "the old form")


def report(problems):
    if problems:
        pytest.fail("\n".join(map(str, problems)), pytrace=False)


@lru_cache(maxsize=None)
def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@lru_cache(maxsize=None)
def parser_of(script):
    """Return the ArgumentParser that the script's parse_args builds, caught when it first parses."""
    def catch(parser, *args, **kwargs):
        raise StopIteration(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopIteration) as caught:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        importlib.import_module(script[:-3]).parse_args([])
    return caught.value.value


def flags(script):
    return [a for a in parser_of(script)._actions if a.option_strings and a.dest != "help"]


def git_files():
    """List the files that git tracks, or would track after `git add .`."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if (ROOT / name).is_file()]


def first_line(node):
    """Return the line on which a top-level statement begins, its decorators included."""
    return min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", [])])


# Identical copies


def blocks(path):
    """{name: (first line, text)} of the top-level functions, classes and constants, with decorators and comments."""
    text, found = path.read_text(encoding="utf-8"), {}
    for node in ast.parse(text).body:
        names = [node.name] if isinstance(node, DEFINITIONS) else []
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        for name in names:
            line, before = found.get(name, (first_line(node), ""))  # a name defined twice counts with both texts
            found[name] = line, before + "\n".join(text.splitlines()[first_line(node) - 1:node.end_lineno]) + "\n"
    return found


def differing(paths):
    """{name: diff} of the top-level names that two or more of the files have, with different texts."""
    first, found = {}, defaultdict(str)
    for path in paths:
        for name, (line, text) in blocks(path).items():
            place, wanted = first.setdefault(name, (f"{path.name}:{line}", text))
            if text != wanted:
                found[name] += "".join(difflib.unified_diff(
                    wanted.splitlines(True), text.splitlines(True), place, f"{path.name}:{line}"))
    return found


def copy_problems(paths, may_differ):
    differ = differing(paths)
    return ([f"{name} differs:\n{diff}" for name, diff in differ.items() if name not in may_differ]
            + [f"{name} may differ, but does not: take it off the list" for name in may_differ if name not in differ])


@pytest.mark.parametrize("scripts, may_differ", [(NEW, NEW_MAY_DIFFER), (OLD, OLD_MAY_DIFFER)], ids=["new", "old"])
def test_copies_are_identical(scripts, may_differ):
    report(copy_problems([ROOT / script for script in scripts], may_differ))
    assert len(NEW_MAY_DIFFER) <= 24


@pytest.mark.parametrize("pair", [pair for pair in SIBLINGS if set(pair) <= set(NEW)], ids="-".join)
def test_siblings_differ_little(pair):
    names = list(differing([ROOT / script for script in pair]))
    diff = list(difflib.unified_diff(*[read(script).splitlines() for script in pair], n=0))
    changed = sum(line[0] in "+-" for line in diff[2:])
    assert len(names) <= 12 and changed <= SIBLINGS[pair], f"{changed} changed lines; {len(names)} names: {names}"


@pytest.mark.parametrize("old, new, name", [
    ("# why", "# how", "f"), ("@torch.no_grad()\n", "", "f"), ("1e-3", "1e-4", "LR"), ("64 pix", "32 pix", "LR"),
    ("k = 1", "k = 2", "C"), ("class C:", "C = 1\nclass C:", "C")])
def test_the_copy_check_catches(tmp_path, old, new, name):
    toy = "LR = 1e-3  # for 64 pixels\n@torch.no_grad()\ndef f(x):\n    # why\n    return x\nclass C:\n    k = 1\n"
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text(toy)
    two.write_text("def other():\n    pass\n" + toy)
    assert copy_problems([one, two], {}) == [], "the same, though on other lines"
    assert len(copy_problems([one, two], {name: "", "other": ""})) == 2, "entries of the list that are not needed"
    two.write_text(toy.replace(old, new))
    assert [problem.partition(" ")[0] for problem in copy_problems([one, two], {})] == [name]
    assert copy_problems([one, two], {name: ""}) == []


# The house is complete; each script stands alone, is short, and in order


def test_the_house_is_complete():
    needed = ["README.md", "LICENSE", "Makefile", "requirements.txt", "tests/requirements.txt", ".gitignore", ".ci/run"]
    report([f"there is no {name}" for name in needed if not (ROOT / name).is_file()])
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert sorted(re.findall(r"^([\w-]+)", read("requirements.txt"), re.M)) == sorted(PACKAGES.values())
    assert sorted(path.name for path in ROOT.glob("*.py")) == sorted(NINE), "the house has nine scripts"


def test_tracked_files():
    found, size = [], 0
    for name in git_files():
        content = (ROOT / name).read_bytes()
        size += len(content)
        if b"\0" not in content:  # images have zero bytes
            found += [f"{name}: {m[0]}" for m in re.finditer(rb"(?<![\w.:/~])/(?:work|root|tmp)/[ -~]{0,30}", content)]
    report(found)  # paths of one machine
    assert size < 20e6, "the checkout weighs too much"


@each_script
def test_imports(script):
    found = re.findall(r"__import__|import_module", read(script))
    for node in ast.walk(ast.parse(read(script))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append("." * node.level + (node.module or ""))
    allowed = (set(PACKAGES) | sys.stdlib_module_names) - {name[:-3] for name in NINE}
    report([f"{script} imports {name}" for name in found if name.split(".")[0] not in allowed])


@each_script
def test_nothing_runs_at_import(script):
    tree = ast.parse(read(script))
    assert ast.get_docstring(tree), "the script begins with a docstring"
    quiet = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, *DEFINITIONS)
    report([f"{script}:{node.lineno} runs" for node in tree.body[1:-1] if not isinstance(node, quiet)])
    assert isinstance(tree.body[-1], ast.If) and ast.unparse(tree.body[-1].test) == "__name__ == '__main__'"


@each_script
def test_lint(script):
    found = [str(message) for message in Checker(ast.parse(read(script)), script).messages]
    bad = [r".{121}", r"\s+$", r"\b(TODO|FIXME|XXX)\b"]
    if script in NEW:
        bad += BANNED
    for i, line in enumerate(read(script).splitlines(), 1):
        found += [f"{script}:{i}: {match[0]}" for pattern in bad for match in re.finditer(pattern, line)]
    report(found)


@each_new_script
def test_budget(script):
    lines = len([line for line in read(script).splitlines() if line.strip()])
    kilobytes = (ROOT / script).stat().st_size / 1000
    assert lines <= BUDGET[script][0] and kilobytes <= BUDGET[script][1], f"{lines} lines, {kilobytes:.1f} KB"


@each_new_script
def test_sections(script):
    """A reader meets the method, the model, training, data and settings in the same order in every script."""
    body = ast.parse(read(script)).body
    assert body[0].end_lineno <= 25, "the docstring is long"
    first = {node.name: first_line(node) for node in reversed(body) if isinstance(node, DEFINITIONS)}
    assert min(first.values()) <= 60, "the method begins late"
    first.update({"the first nn.Module": first_line(node) for node in reversed(body)
                  if isinstance(node, ast.ClassDef) and "nn.Module" in map(ast.unparse, node.bases)})
    wanted = ["loss_fn", "sample", "the first nn.Module", "get_batch", "train", "load_data", "parse_args", "main"]
    wanted = [name for name in wanted if name in first]
    assert sorted(wanted, key=first.get) == wanted


@each_new_script
def test_two_blank_lines(script):
    """Two blank lines stand before each function and class, or before the comment right above it."""
    bad, lines = [], read(script).splitlines()
    for node in ast.parse(read(script)).body:
        above = lines[:first_line(node) - 1]
        while above and above[-1].startswith("#"):
            above.pop()
        if isinstance(node, DEFINITIONS) and [bool(line) for line in above[-3:]] != [True, False, False]:
            bad.append(f"{script}:{first_line(node)} {node.name}")
    report(bad)


# The command line and the README


def test_help(run_script):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = dict(zip(NINE, pool.map(lambda script: run_script(script, "--help"), NINE)))
    # a bare % in a help text ends in a traceback here
    report([f"{script}: {run.stderr}" for script, run in done.items() if run.returncode != 0 or run.stderr])
    report([f"{script} shows no --{a.dest}" for script in NINE for a in flags(script)
            if a.option_strings[0] not in done[script].stdout])
    report([f"{script} shows no defaults" for script in NINE if "(default:" not in done[script].stdout])


@each_script
def test_flags(script):
    assert parser_of(script).allow_abbrev is False
    most = 99 if script in OLD else 28 if script == "finetune_lora.py" else 24
    reads = r"\b(args|known|parse_args\(argv\))\."
    report([f"--{a.dest} has no help text" for a in flags(script) if not a.help]
           + [f"--{a.dest} is not in snake_case" for a in flags(script) if a.option_strings[0] != f"--{a.dest.lower()}"]
           + [f"--{a.dest} is not used" for a in flags(script) if not re.search(rf"{reads}{a.dest}\b", read(script))]
           + [f"--{a.dest} is one flag too many" for a in flags(script)[most:]])


@pytest.mark.parametrize("scripts", [NEW, OLD], ids=["new", "old"])
def test_same_flag_same_help(scripts):
    texts = defaultdict(lambda: defaultdict(list))
    for script in scripts:
        for action in flags(script):
            texts[action.option_strings[0]][action.help].append(script)
    report([f"{flag}: {dict(helps)}" for flag, helps in texts.items() if len(helps) > 1])


@each_script
def test_torchrun_lets_every_flag_pass(script):
    """It abbreviates: a script's flag that begins two of its own options, as --num does, is refused as ambiguous."""
    from torch.distributed.run import get_args_parser
    for flag in [flag for action in flags(script) for flag in action.option_strings]:
        assert get_args_parser().parse_args([script, flag, "1"]).training_script_args == [flag, "1"]


def readme():
    """The code blocks with continuations joined, the text without them, and the inline codes of that text."""
    fence = re.compile(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```", re.M | re.S)
    code, prose = "\n".join(fence.findall(read("README.md"))), fence.sub("", read("README.md"))
    return re.sub(r"\\\n\s*", " ", code), prose, re.findall(r"`([^`\n]+)`", prose)


def test_readme_commands(capsys):
    start = r"^\s*(?:\$ )?(?:\w+=\S* )*(?:\S*python3?|torchrun) +(?:\S+ +)*?"
    commands = re.findall(start + r"(\S+\.py)(?!\S)(.*?)(?= [#&|;]| 2?>|$)", readme()[0], re.M)
    wrong = [f"there is no {script}" for script, _ in commands if not (ROOT / script).is_file()]
    for script, rest in commands:
        if script in NINE:
            argv = shlex.split(rest)
            try:
                parser_of(script).parse_args(argv)
                # the script's own checks, except where they would look for a file, a run or a device
                if not re.search(r"/|\.[a-z]|[A-Z]{2}|--(device|resume|sample|ckpt)\b", rest):
                    importlib.import_module(script[:-3]).parse_args(argv)
            except SystemExit as stop:
                if stop.code:
                    wrong.append(f"{script}{rest}: {stop.code} {capsys.readouterr().err[-200:]}")
    report(wrong)


def test_readme_names_what_exists():
    code, prose, inline = readme()
    known = {flag for script in NINE for action in parser_of(script)._actions for flag in action.option_strings}
    wrong = []
    for text in inline:
        ours = text if text.startswith("--") else text.partition(".py ")[2]
        wrong += [flag for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", ours) if flag not in known]
    targets = re.findall(r"^\s*(?:\$ )?make ([a-z][\w-]*)", "\n".join([code, *inline]), re.M)
    wrong += [f"make {target}" for target in targets if f"\n{target}:" not in read("Makefile")]
    shown = re.findall(r"\]\(\s*<?([^)\s>]+)", prose) + re.findall(r"(?:src|href|srcset)=[\"']([^\"' ]+)", prose)
    shown = [name.partition("#")[0] for name in shown if not re.match(r"\w+:|#|//", name)]
    shown += [name for name in inline if re.fullmatch(r"[\w./-]+\.py|assets/\S+", name)]
    exists = {str(path) for name in git_files() for path in [Path(name), *Path(name).parents]}
    anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)", prose, re.M)}
    wrong += [anchor for anchor in re.findall(r"\]\(#([^)]+)\)", prose) if anchor not in anchors]
    wrong += [name for name in shown if os.path.normpath(name) not in exists]
    report([f"the README names {name}, which does not exist or is ignored by git" for name in wrong])


def test_readme_tables():
    """One names where a script's ideas stand; the other says `lines (new lines)`, new since the scripts before it."""
    rows = re.findall(r"^\| \[(\w+\.py)\]\(#\w+\) \|.*\|([^|]+)\|$", read("README.md"), re.M)
    assert [script for script, _ in rows] == NINE
    report([f"{script} has no {name}" for script, names in rows for name in re.findall(r"`(\w+)`", names)
            if name not in blocks(ROOT / script)])
    rows = dict(re.findall(r"^\| \[(\w+\.py)\]\(\w+\.py\) \| ([^|]+) \|", read("README.md"), re.M))
    seen, wanted = set(), {}
    for script in NINE:
        texts = {text for _, text in blocks(ROOT / script).values()}
        lines = len(read(script).splitlines())
        copied = sum(len(text.splitlines()) for text in texts & seen)
        wanted[script] = f"{lines:,} ({lines - copied:,})"
        seen |= texts
    report([f"{script} has {wanted[script]}" for script in NINE if rows.get(script) != wanted[script]])
