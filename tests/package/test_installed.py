"""Every command as installed: only the package on the path, in an empty folder outside any checkout."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.data.pictures import make_folders

ROOT = Path(__file__).parents[2]
DISTILL = "--width 4 --image-size 8 --students 1"
EXPERTS = "--num-experts 1 --train-epochs 2 --expert-epochs 1 --max-start-epoch 1 --syn-steps 1"
NET = "--network convnet --width 4 --depth 2"
# the cheapest run of every command; a command may use the output of those before it
COMMANDS = (
    f"distill mtt {DISTILL} --depth 2 {EXPERTS} --iterations 1 --student-epochs 1 --whole-epochs 0 --out mtt",
    "distill mtt --out mtt --resume",
    "distill unip --teacher-width 8 --teacher-depth 1 --width 8 --depth 1 --teacher-epochs 1 --epochs 1 --out unip",
    "distill hello --encoder-epochs 1 --encoder-width 4 --teachers 1 --teacher-epochs 1 --fit-epochs 1 --ipc 1 "
    "--student-epochs 1 --students 1 --image-steps 1 --out hello",
    "distill krr_st --width 4 --target-epochs 1 --images 10 --iterations 1 --pool 1 --online-steps 1 "
    "--pretrain-steps 1 --students 1 --out krr_st",
    f"select dq {DISTILL} --depth 2 --teacher-epochs 1 --ipc 2 --bins 2 --student-epochs 1 --out dq",
    f"select pca {DISTILL} --depth 2 --teacher-epochs 1 --ipc 1 --student-epochs 1 --out pca",
    f"squeeze --image-size 8 {NET} --epochs 1 --out teacher",
    "recover --teacher teacher/teacher.safetensors --ipc 1 --iterations 1 --out images",
    "relabel --images images/distilled.safetensors --teacher teacher/teacher.safetensors --epochs 1 --out labels",
    f"post-train --images images/distilled.safetensors --labels labels/labels.store {NET} --out student",
    "experts --width 4 --depth 2 --image-size 8 --num-experts 1 --epochs 1 --out experts.store",
    "evaluate mtt/distilled.safetensors --students 1 --epochs 1",
    "export mtt/distilled.safetensors exported",
    "pack pictures packed --image-size 8 --workers 0",
)
SCRIPT = """
import sys
from pathlib import Path
import pydistill
from pydistill.cli import main
assert Path(pydistill.__file__).is_relative_to(sys.argv[1]), pydistill.__file__
for line in sys.argv[2:]:
    print("$ pydistill", line, flush=True)
    try:
        main(line.split())
    except SystemExit as stopped:
        assert not stopped.code, stopped.code
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder like site-packages, with the package as a wheel lays it out."""
    folder = tmp_path_factory.mktemp("site")
    package = Path(find_spec("pydistill").origin).parent
    shutil.copytree(package, folder / "pydistill")
    for library in ("_C", "_host"):  # elsewhere in an editable installation
        shutil.copy(find_spec(f"pydistill.{library}").origin, folder / "pydistill")
    if find_spec("pydistill.bench") is None:
        shutil.copytree(ROOT / "bench", folder / "pydistill" / "bench", ignore=shutil.ignore_patterns("results"))
    return folder


def python(site, folder, *arguments):
    options = {"env": os.environ | {"PYTHONPATH": str(site)}, "cwd": folder, "timeout": 300}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


def test_every_command_explains_itself_and_runs(site, tmp_path):
    helps = sorted({" ".join(line.split()[: 2 if line.startswith(("distill", "select")) else 1]) for line in COMMANDS})
    lines = ["--help", "bench --help", *(f"{line} --help" for line in helps), *COMMANDS]
    make_folders(tmp_path / "pictures", {"train": 1, "val": 1})
    done = python(site, tmp_path, "-c", SCRIPT, site, *lines)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def test_every_command_is_tried():
    from pydistill.cli import commands
    from pydistill.methods import METHODS, Config

    words = [command.words for group in commands.COMMANDS.values() for command in group]
    untried = [each for each in words if not any(f"{line} ".startswith(f"{each} ") for line in COMMANDS)]
    # bench: tests/integration/test_bench_*.py; the others run as mtt does
    like_mtt = [f"distill {name}" for name, method in METHODS.items() if issubclass(method, Config)]
    assert untried == [*like_mtt[1:], "bench"]


def test_benchmarks_run(site, tmp_path):
    done = python(site, tmp_path, "-m", "pydistill.cli", "bench", "no such case")
    assert done.returncode == 2
    assert "pydistill: no case no such case; there are unroll_step, " in done.stderr
    quick = ("unroll_memory", "--quick", "--providers", "exact", "--out", "found")
    done = python(site, tmp_path, "-m", "pydistill.bench.run", *quick)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exact" in (tmp_path / "found" / "unroll_memory.csv").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure for minutes")
def test_the_gpu_s_benchmark_is_there(site, tmp_path):
    done = python(site, tmp_path, "-m", "pydistill.cli", "bench", "--gpu")
    assert done.returncode == 2
    assert "bench.gpu: no CUDA device is visible" in done.stderr
    assert not (tmp_path / "gpu.jsonl").exists()
    # a bare machine has torch and NumPy
    absent = ["safetensors", "tyro", "rich", "psutil", "PIL", "matplotlib", "sklearn", "scipy", "torchvision", "timm"]
    bare = f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
    done = python(site, tmp_path, "-c", bare + "from pydistill.bench.gpu import __main__; sys.exit(__main__.main([]))")
    assert done.returncode == 2, done.stderr
    for option in (("--resume",), ("--minutes", "3")):
        done = python(site, tmp_path, "-m", "pydistill.cli", "bench", *option)
        assert done.returncode == 2
        assert "pydistill: --minutes, --resume: expected with --gpu only" in done.stderr
