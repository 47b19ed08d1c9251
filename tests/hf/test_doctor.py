"""`strobe doctor`: the function that each framework would call, from processes of their own."""

import importlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import strobe
import strobe.doctor

SOURCE = pathlib.Path(strobe.doctor.__file__)


def run(*command, path=(), **more):
    paths = os.pathsep.join([*map(str, path), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=paths), **more)  # fmt: skip


@pytest.fixture(scope="module")
def whole():
    done = run("-m", "strobe", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_sections(whole):
    assert list(whole) == [
        "system", "packages", "Strobe", "NVRTC", "torch", "what SDPA calls", "what Transformers calls",
        "what vLLM calls", "environment",
    ]  # fmt: skip


def test_versions_and_libraries(whole):
    import torch
    import transformers

    assert whole["packages"]["torch"] == torch.__version__
    assert whole["packages"]["transformers"] == transformers.__version__
    assert whole["Strobe"]["a call on the CPU"] == "works"
    assert whole["Strobe"]["CPU engine"] == strobe.cpu_isa()
    extension = pathlib.Path(strobe._C.__file__)
    assert whole["Strobe"][f"loaded {extension.name}"] == os.path.realpath(extension)


def test_what_transformers_calls(whole):
    calls = whole["what Transformers calls"]
    assert calls["strobe, after strobe.hf.register()"].startswith("Strobe: strobe.hf.attention.attention")
    assert calls["sdpa"].startswith("not Strobe: transformers.integrations.sdpa_attention.sdpa_attention_forward")
    assert set(calls) >= {"flash_attention_2", "flash_attention_3", "flash_attention_4"}


def test_what_sdpa_calls(whole):
    assert whole["what SDPA calls"]["SDPA (flash) and varlen_attn on CUDA tensors"].startswith("torch's own (FA2)")
    assert whole["what SDPA calls"]["after strobe.torch_sdpa.activate()"] == "Strobe"


def install(folder, distribution, module, code, needs=""):
    """A module with the metadata of an installed distribution."""
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text(code)
    info = folder / f"{distribution.replace('-', '_')}-2.8.3.dist-info"
    info.mkdir()
    need = f"Requires-Dist: {needs}\n" if needs else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.8.3\n{need}")
    (info / "RECORD").write_text(f"{module}/__init__.py,,\n")
    (info / "top_level.txt").write_text(module)


DROP_IN = "def flash_attn_varlen_func(): ..."


@pytest.mark.parametrize(
    "needs, kind", [("strobe>=0.1.0", "Strobe"), ("torch", "not Strobe"), ("strobelight", "not Strobe")]
)
def test_a_drop_in_is_told_from_the_original(tmp_path, monkeypatch, needs, kind):
    install(tmp_path, "flash-attn", "flash_attn", DROP_IN, needs)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    said = strobe.doctor.described(importlib.import_module("flash_attn").flash_attn_varlen_func)
    monkeypatch.delitem(sys.modules, "flash_attn")
    assert said.startswith(f"{kind}: flash_attn.flash_attn_varlen_func of flash-attn 2.8.3, {tmp_path}")


def test_a_drop_in_that_transformers_passes_over(tmp_path):
    """Installed, but there is no GPU: Transformers refuses the name."""
    import torch

    install(tmp_path, "flash-attn", "flash_attn", DROP_IN, "strobe")
    done = run(SOURCE, "--probe", "transformers", path=[tmp_path])
    said = json.loads(done.stdout.removeprefix("strobe-doctor "))["flash_attention_2"]
    assert said.startswith("refused: no CUDA device") if not torch.cuda.is_available() else said.startswith("Strobe")


def copy(folder, code):
    """A package strobe whose import does `code`, with the doctor in it."""
    (folder / "strobe").mkdir()
    (folder / "strobe" / "__init__.py").write_text(code)
    shutil.copy(SOURCE, folder / "strobe")
    spec = importlib.util.spec_from_file_location("copied_doctor", folder / "strobe" / "doctor.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "code, says",
    [
        ("raise ImportError('undefined symbol: aoti')", "fails: ImportError: undefined symbol: aoti"),
        ("import os; os.abort()", "fails: ended by signal 6"),
        ("raise SystemExit(3)", "fails: exit status 3"),
        ("import time; time.sleep(60)", "fails: no answer in 1 s"),
    ],
)
def test_an_import_that_fails_is_a_line_of_the_report(tmp_path, monkeypatch, code, says):
    doctor = copy(tmp_path, code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.probed("strobe", 1 if "sleep" in code else 60) == {"import strobe": says}


def test_an_extension_that_does_not_load(tmp_path):
    doctor = copy(tmp_path, "")
    assert "missing" in doctor.extension()["_C"]
    (tmp_path / "strobe" / "_C.abi3.so").write_bytes(b"not a library")
    assert doctor.extension()["_C.abi3.so"].startswith("fails: OSError")


def test_the_command_runs_where_import_strobe_fails(tmp_path):
    copy(tmp_path, "raise ImportError('broken')")
    command = importlib.util.find_spec("strobe_command").submodule_search_locations[0]
    shutil.copytree(command, tmp_path / "strobe_command", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("torch", "transformers", "vllm"):  # nothing to wait for
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    code = "import sys, strobe_command; sys.argv = ['strobe', 'doctor']; sys.exit(strobe_command.main())"
    done = run("-c", code, path=[tmp_path])
    assert done.returncode == 0, done.stderr
    assert "import strobe: fails: ImportError: broken" in done.stdout and "\nNVRTC\n" in done.stdout


def test_what_vllm_calls(tmp_path):
    """The names that the probe reads in vLLM, with Strobe's plug-in behind CUSTOM."""
    registered = "class E:\n    path = None\n    def get_path(self):\n        return self.path\n"
    plugin = "    from vllm.v1.attention.backends.registry import E\n    E.path = 'strobe.vllm.backend.StrobeBackend'\n"
    files = {
        "vllm/__init__.py": "__version__ = '0.26.0'",
        "vllm/plugins.py": f"def load_general_plugins():\n{plugin}",
        "vllm/v1/attention/backends/registry.py": f"{registered}class AttentionBackendEnum:\n    CUSTOM = E()\n",
        "vllm/v1/attention/backends/fa_utils.py": "def flash_attn_varlen_func(): ...",
    }
    for name, code in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    done = run(SOURCE, "--probe", "vllm", path=[tmp_path])
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.removeprefix("strobe-doctor "))
    assert said["vllm"].startswith("0.26.0")
    assert said["FLASH_ATTN"].startswith("not Strobe: vllm.v1.attention.backends.fa_utils.flash_attn_varlen_func")
    assert said["CUSTOM, after the plug-ins"] == "strobe.vllm.backend.StrobeBackend"
