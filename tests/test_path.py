"""The whole path, as the README's block of that name has it: train, teach, serve, ask, compare."""
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image


def block(heading):
    """The first code block below a heading of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(rf"^#+ {heading}\n.*?^```sh\n(.*?)^```", text, re.M | re.S)[1]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("curl")), reason="the README's block needs bash and curl")
def test_the_whole_path(tmp_path):
    """The commands as they stand, but for the port, in a fresh folder with nothing but the scripts."""
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    port, commands = free_port(), block("The whole path")
    assert commands.count("python ") == 5 and ":8000" in commands
    commands = commands.replace(":8000", f":{port}").replace("python serve.py", f"python serve.py --port {port}")
    variables = dict(os.environ, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", HF_HOME=str(tmp_path / "hf"))
    (tmp_path / "path.sh").write_text(commands + "\nwait\n")
    run = subprocess.Popen(["bash", "-euo", "pipefail", "path.sh"], cwd=tmp_path, env=variables, text=True,
                           stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           start_new_session=True)
    try:
        out, err = run.communicate(timeout=400)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 0, out[-3000:] + err[-3000:]
    pictures = sorted((tmp_path / "out/served").iterdir())
    assert [p.name for p in pictures] == ["1.png", "2.png", "3.png", "4.png"]
    drawn = [np.asarray(Image.open(p)) for p in pictures]
    assert all(d.shape == (32, 32, 3) and d.std() > 1 for d in drawn) and not np.array_equal(drawn[0], drawn[1])
    assert '"event": "stopped"' in out + err
    found = re.search(r"fd_random +(\S+)", out)
    assert found and float(found[1]) >= 0 and "4 images of 32x32" in out
