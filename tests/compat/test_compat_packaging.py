"""The distributions as they are installed, and docs/compatibility.md: every public name is in its tables."""

import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import flash_attn
import flash_attn_vllm
import pytest
import torch
from oracle import check, lengths, offsets, packed, tensors
from test_compat_defects_swaa import BUILD, paged

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    "flash_attn": "flash-attn",
    "flash_attn.flash_attn_interface": "flash-attn",
    "flash_attn.swaa": "flash-attn",
    "flash_attn.bert_padding": "flash-attn",
    "flash_attn.layers.rotary": "flash-attn",
    "flash_attn.ops.triton.rotary": "flash-attn",
    "flash_attn_2_cuda": "flash-attn",
    "flash_attn_vllm": "flash-attn-vllm",
    "flash_attn_vllm.flash_attn_interface": "flash-attn-vllm",
    "flash_attn_vllm.bert_padding": "flash-attn-vllm",
    "flash_attn_vllm.layers.rotary": "flash-attn-vllm",
    "flash_attn_2_cuda_vllm": "flash-attn-vllm",
    "flex_head_fa": "flex-head-fa",
    "flex_head_fa.flash_attn_interface": "flex-head-fa",
    "flex_head_fa.bert_padding": "flex-head-fa",
    "flex_head_fa.layers.rotary": "flex-head-fa",
    "flex_head_fa_2_cuda": "flex-head-fa",
    "flash_attn_interface": "flash-attn-3",
    "flash_attn_3.flash_attn_interface": "flash-attn-3",
    "flash_attn_config": "flash-attn-3",
}
VERSIONS = {"flash-attn": "2.8.3", "flash-attn-vllm": "2.8.3", "flex-head-fa": "0.1.2", "flash-attn-3": "3.0.0"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the four wheels unpacked."""
    folder = tmp_path_factory.mktemp("site")
    for distribution in VERSIONS:
        done = subprocess.run(
            [sys.executable, "-c", BUILD.format(str(folder))], cwd=ROOT / "compat" / distribution,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with zipfile.ZipFile(folder / done.stdout.split()[-1]) as wheel:
            wheel.extractall(folder)
    return folder


PROGRAM = """
import sys; sys.path[:] = [{site!r}, *{path!r}]
import importlib, importlib.metadata as metadata
owners = metadata.packages_distributions()
for module, distribution in {modules!r}.items():
    file = importlib.import_module(module).__file__
    assert file.startswith({site!r}), file
    assert distribution in owners[module.split(".")[0]], (module, owners)
    assert metadata.version(distribution) == {versions!r}[distribution]
import flash_attn, flash_attn_3
assert flash_attn.__version__ == metadata.version("flash-attn")
assert flash_attn_3.__version__ == metadata.version("flash-attn-3")
"""


def test_wheels_own_their_modules(site):
    """Transformers and TransformerEngine look at distributions, not at modules."""
    program = PROGRAM.format(site=str(site), path=sys.path, modules=MODULES, versions=VERSIONS)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_tables(module):
    names = getattr(importlib.import_module(module), "__all__", ["CONFIG", "show"])
    text = (ROOT / "docs" / "compatibility.md").read_text()
    section = text.split(f"\n## {MODULES[module]}\n")[1].split("\n## ")[0]
    if MODULES[module] in ("flash-attn-vllm", "flex-head-fa") and module.endswith(("bert_padding", "rotary")):
        section = text  # "as those of flash_attn"
    seven = set(flash_attn.__all__) if "the seven functions" in section else set()
    missing = [n for n in names if f"`{n}`" not in section and n not in seven and not n.startswith("_wrapped_")]
    assert not missing
    assert module in text
    for name in names:
        assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", ["losses.cross_entropy", "modules.mha", "ops.triton.layer_norm", "utils.benchmark"])
def test_modules_that_are_not_there_can_be_probed_for(name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"flash_attn.{name}")


@pytest.mark.parametrize("module", [flash_attn, flash_attn_vllm], ids=lambda m: m.__name__)
def test_pages_of_16_with_out_and_seqused_by_keyword(module):
    lens_q, lens_k = [7, 1], [50, 33]
    q, k, v = tensors(None, 8, 83)
    pages_k, pages_v, table = paged(k, v, lens_k, 16)
    buffer = torch.full_like(q, float("nan"))
    out = module.flash_attn_varlen_func(
        q, pages_k, pages_v, offsets(lens_q), None, 7, 50, causal=True, window_size=(9, 0), keep_first=4,
        force_fa_decode=True, block_table=table, seqused_k=lengths(*lens_k), out=buffer,
    )  # fmt: skip
    assert out.data_ptr() == buffer.data_ptr()
    mask = dict(causal=True, window=(9, 0), keep_first=4, force_fa_decode=True)
    check(buffer, lambda *x: packed(*x, lens_q, lens_k, **mask)[0], q, k, v)


@pytest.mark.parametrize("wrong", ["q", "kv", "qkv", "cu_seqlens"])
def test_wrong_tensors_are_refused_in_words(wrong):
    q, k, v = tensors(None, 9, 9)
    cu, stacked = offsets([4, 5]), torch.stack((k, v, v), 1)
    with pytest.raises((ValueError, TypeError), match="flash_attn_varlen"):
        if wrong == "q":
            flash_attn.flash_attn_varlen_func(q[:, 0], k, v, cu, cu, 5, 5)
        elif wrong == "kv":
            flash_attn.flash_attn_varlen_kvpacked_func(q, stacked, cu, cu, 5, 5)
        elif wrong == "qkv":
            flash_attn.flash_attn_varlen_qkvpacked_func(stacked[:, :2], cu, 5)
        else:
            flash_attn.flash_attn_varlen_func(q, k, v, cu[:0], cu, 5, 5)
