"""The import, the report, and the behaviour of the compiled libraries."""

import os
import platform
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import pydistill
from pydistill import _host, info
from tests.matrices import sample

ROOT = Path(__file__).parents[2]


def test_report_names_every_operator_and_reason():
    report = subprocess.run(
        [sys.executable, "-m", "pydistill.info"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert re.search(r"CPU instruction set +(base|avx2|avx512|avx512_bf16|amx)\n", report)
    assert "stored top-k labels are decoded and graph cuts computed on the CPU" in report
    assert re.search(r"nn.freeze on CPU +3x3 convolutions in Winograd's form, .*\n", report)
    assert re.search(r"nn.freeze on GPUs +no kernel of ours: channels-last .* --precision bf16, fp16 or tf32", report)
    assert re.search(r'precision "auto" +on GPUs what torch\'s switches say when a run begins, on the CPU ieee', report)
    facts = info.collect()
    ops = {p.stem for p in (ROOT / "pydistill/ops").glob("*.py") if not p.stem.startswith("_")}
    assert set(facts["operators"]) == ops
    table = facts["operators"]["instance_norm_relu_avg_pool"]
    assert table["cpu"] == "available"
    assert (table["cuda"] == "available") == torch.cuda.is_available()
    assert table["triton"] != "no such kernel"  # but the reason why it cannot run, where it cannot
    assert facts["operators"]["conv2d"]["triton"] == "no such kernel"


def test_every_folder_is_an_attribute_and_some_are_imported_only_then():
    code = (
        "import sys, pydistill; assert not {'pydistill.methods', 'pydistill.evaluate'} & set(sys.modules); "
        "names = ['data', 'evaluate', 'info', 'methods', 'trajectory']; assert set(names) <= set(dir(pydistill)); "
        "print(*[getattr(pydistill, name).__name__ for name in names])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.split() == [f"pydistill.{name}" for name in ("data", "evaluate", "info", "methods", "trajectory")]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        pydistill.nothing  # noqa: B018


def test_host_module_does_without_torch():
    code = (
        "import importlib.util as u, sys; "
        f"s = u.spec_from_file_location('_host', {find_spec('pydistill._host').origin!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); "
        "assert 'torch' not in sys.modules; print(m.build_info()['version'], m.isa())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.split() == [pydistill.__version__, _host.isa()]


def test_import_leaves_the_compiler_alone():
    """torch's compiler is larger than torch itself: importing it would double a program's start-up time."""
    code = "import sys, pydistill, pydistill.cli.commands; print({'torch._dynamo', 'sympy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.skipif(find_spec("pydistill._C_cuda") is None, reason="built without CUDA: no nvcc")
def test_cuda_library_loads_without_a_gpu():
    """All its symbols resolve, whichever torch this is; a torch with CUDA loads it by itself."""
    code = "import pydistill, torch; torch.ops.load_library({!r}); print('loaded')"
    code = code.format(find_spec("pydistill._C_cuda").origin)
    if torch.version.cuda is not None:
        assert info.collect()["operators"]["instance_norm_relu_avg_pool"]["cuda"] in (
            "available",
            "no CUDA device is visible",
        )
        code = "import pydistill; print('loaded')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout == "loaded\n", result.stderr


OPERATORS = sorted(source.stem for source in (ROOT / "csrc/kernels").glob("*.inl"))
LONG = {"convnet_step", "frozen_conv2d", "instance_norm_relu_avg_pool"}  # to compile


@pytest.mark.parametrize("operator", sample(OPERATORS, set(OPERATORS) - LONG))
def test_instruction_set_files_share_no_symbols(tmp_path, operator):
    """A weak symbol from such a file, linked into the baseline's, would be an illegal instruction elsewhere."""
    source, built = tmp_path / "avx2.cpp", tmp_path / "avx2.o"  # the source is what CMakeLists.txt makes
    source.write_text(f'#define PYDISTILL_KERNEL {operator}_avx2\n#include "{operator}.inl"\n')
    options = ["-std=c++20", "-O1", "-Wno-psabi", "-mavx2", "-mfma", "-mf16c", "-I", ROOT / "csrc/kernels", "-c", "-o"]
    subprocess.run(["g++", *options, built, source], check=True, timeout=300)
    symbols = subprocess.run(["nm", "-C", built], capture_output=True, text=True, check=True).stdout
    exported = [line for line in symbols.splitlines() if re.search(r" [TWVuBDR] ", line)]
    assert len(exported) == 1, exported
    assert re.search(rf"pydistill::{operator}_avx2(\(|$)", exported[0])


def test_backends_are_never_swapped_silently():
    x = torch.randn(1, 2, 4, 4)
    with pytest.raises(NotImplementedError, match="backend='cuda' cannot run on cpu tensors"):
        pydistill.instance_norm_relu_avg_pool(x, torch.ones(2), torch.zeros(2), backend="cuda")


def test_an_import_without_the_library_says_so():
    code = "import importlib.util as u; u.find_spec = lambda name: None; import pydistill"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "pydistill's compiled operators are missing (pydistill was built without _C)" in result.stderr
    assert "reinstall with `pip install .`" in result.stderr


def test_engine_names_what_runs_a_net():
    from pydistill.info import engine

    net = pydistill.nn.ConvNet(3, 10, width=16, depth=2, image_size=16)
    sizes = "channels=3, height=16, width_px=16, widths=(16, 16), first_padding=1, classes=10, eps=1e-05"
    block = "norm='instance', groups=1, activation='relu', slope=0.01, pool='avg', biased=True"
    assert engine(net, (3, 16, 16)) == f"student: ConvNetShape({sizes}, {block})"
    net = pydistill.nn.ConvNet(3, 10, width=16, depth=2, image_size=16, norm="batch")
    assert "norm='batch'" in engine(net, (3, 16, 16))
    net.features[2] = torch.nn.PReLU()
    wanted = "generic: block 0 has PReLU where a norm or an activation was expected; engine='compiled' would compile it"
    assert engine(net, (3, 16, 16)) == wanted


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="elsewhere the baseline is all there is")
def test_the_baseline_has_no_steps_and_says_so():
    code = """
import torch, pydistill
from pydistill.info import collect, engine
from pydistill.ops import ConvNetShape
net = pydistill.nn.ConvNet(1, 2, width=4, depth=1, image_size=8)
print(collect()["student engine"])
print(engine(net, (1, 8, 8)))
theta0 = torch.cat([p.detach().flatten() for p in net.parameters()])[None]
images, labels = torch.ones(2, 1, 8, 8), torch.tensor([0, 1])
print(pydistill.unroll(net, theta0, images, labels, lr=0.1, steps=1).isfinite().all().item())
shape = ConvNetShape(channels=1, height=8, width_px=8, widths=(4,), first_padding=3, classes=2)
for steps in (lambda: pydistill.unroll(net, theta0, images, labels, lr=0.1, steps=1, engine="student"),
              lambda: pydistill.ops.convnet_logits(shape, theta0, images)):
    try:
        steps()
    except (ValueError, NotImplementedError) as error:
        print(error)
"""
    env = {**os.environ, "PYDISTILL_ISA": "base"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    why = "the student engine needs AVX2, and the instruction set here is the baseline"
    says, named, runs, *refusals = result.stdout.splitlines()
    assert (says, runs) == (why, "True"), result.stderr
    assert named.startswith(f"generic: {why}")
    assert refusals == [f"engine: expected a net that the student engine can run, but {why}", f"convnet_step: {why}"]
