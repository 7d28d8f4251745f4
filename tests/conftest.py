"""What all tests share: the import path, one thread, no network, and `run_script`, the scripts' real command line."""
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Tests and the scripts that they start must reach no network except servers on this machine: whatever asks for another
# host is sent to a proxy that does not exist, and so fails at once instead of after a time-out.
DEAD = "http://127.0.0.1:9"
OFFLINE = {"http_proxy": DEAD, "https_proxy": DEAD, "all_proxy": None, "no_proxy": "127.0.0.1,localhost,::1",
           "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_ENDPOINT": DEAD, "HF_TOKEN": None}
OFFLINE.update({k.upper(): v for k, v in OFFLINE.items()})
# Left over from a torchrun around pytest, these would make a script wait for its peers.
OFFLINE.update(dict.fromkeys(["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]))
OFFLINE.update({"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "120"})


def set_env(target, changes):
    """Write `changes` into the mapping `target`; the value None removes a variable."""
    for key, value in changes.items():
        target.pop(key, None)
        if value is not None:
            target[key] = str(value)
    return target


signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore Ctrl-C
set_env(os.environ, OFFLINE)  # before torch and huggingface_hub are imported: both read it once
import torch  # noqa: E402

torch.set_num_threads(1)  # on a busy machine two threads of tiny steps wait for each other most of the time


def shim_torchvision():
    """Make `import torchvision` work where its compiled part does not load, e.g. a CUDA wheel on a CPU build of torch.

    Its Python code refers to operators that the compiled part declares. Declared here without a kernel, they cannot
    be called, but models, transforms and whatever imports torchvision work. Keep the result: the declarations live
    as long as the object does.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or "torchvision" in sys.modules:
        return None
    try:
        for compiled in Path(spec.origin).parent.glob("_C.*"):  # torchvision loads the same file again, harmlessly
            torch.ops.load_library(str(compiled))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


TORCHVISION = shim_torchvision()


@pytest.fixture(scope="session")
def run_script(tmp_path_factory):
    """run_script("ddpm_images.py", "--preset", "smoke", env={"RANK": 0}) -> CompletedProcess with text stdout and stderr.

    The script runs in a fresh folder unless `cwd` is given, so it finds no data and leaves nothing in the checkout.
    `env` is added to the environment (None removes a variable); `via` goes between Python and the script, for example
    ("-m", "torch.distributed.run", "--nproc_per_node=2").
    """
    hf_home = tmp_path_factory.mktemp("hf_home")  # empty: the user's own cache must not decide a test

    def run(name, *args, env=None, cwd=None, timeout=120, via=()):
        variables = set_env(set_env(dict(os.environ), {"HF_HOME": hf_home}), env or {})
        command = [sys.executable, *via, str(ROOT / name), *map(str, args)]
        return subprocess.run(command, env=variables, cwd=cwd or tmp_path_factory.mktemp("run"), timeout=timeout,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def drawn_faces(tmp_path_factory):
    """A folder for the smoke runs of both image scripts: its data/cache keeps the 16,000 faces, drawn once."""
    return tmp_path_factory.mktemp("drawn_faces")
