#!/usr/bin/env bash
# Packs vLLM without its own attention libraries for a GPU machine that has torch 2.11 and Transformers but no network, so
# that check_vllm.py can run Strobe in a real engine there.
#
#   assemble_vllm.sh pack OUT [HAVE]   with a network: OUT/vllm.tar.xz.* (parts of at most PART bytes) and OUT/contents.txt.
#                                      HAVE lists the distributions that the other machine has, one a line
#   assemble_vllm.sh install OUT DIR   without one: unpacks into DIR; then PYTHONPATH=DIR python check_vllm.py
#
# VLLM (0.26.0), PYTHON_VERSION (3.12) and PART (45M) are taken from the environment.
set -euo pipefail
version=${VLLM:-0.26.0}
python_version=${PYTHON_VERSION:-3.12}
part=${PART:-45M}
# Told of another machine, pip takes a tag for what it says alone: every one that a machine with glibc 2.39 takes.
platforms=(linux_x86_64 manylinux1_x86_64 manylinux2010_x86_64 manylinux2014_x86_64)
for n in $(seq 5 39); do platforms+=("manylinux_2_${n}_x86_64"); done

# Depend on torch or are libraries for one kind of model: without their dependencies, or not at all.
alone='xgrammar|compressed-tensors|apache-tvm-ffi'
left_out='torch|torchaudio|torchvision|torchcodec|PyNvVideoCodec|flashinfer-python|tilelang|nvidia-.*|nvtx'
left_out="$left_out|fastsafetensors|quack-kernels|tokenspeed-mla|humming-kernels|transformers|tokenizers|numba|ninja|cuda-.*"
left_out="$left_out|opencv-python-headless|setuptools|sentencepiece|numpy|hf-xet|huggingface-hub|pillow"

pack() {
  local out=$1 have=${2:-/dev/null}
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  tree=$work/tree
  mkdir -p "$out" "$tree"
  python3 -m pip download --quiet --no-deps --only-binary=:all: "${platforms[@]/#/--platform=}" \
    --python-version "$python_version" --dest "${WHEELS:=$work}" "vllm==$version"
  python3 - "$WHEELS"/vllm-"$version"-*.whl "$tree" <<'PYTHON'
import sys, zipfile

# Left out: its flash attention, kernels of kinds of models that the check has not, and the server in Rust.
OUT = ("vllm/vllm_flash_attn/cute/", "vllm/third_party/deep_gemm/", "vllm/third_party/fmha_sm100/", "vllm/vllm-rs",
       "vllm/third_party/flashmla/", "vllm/entrypoints/serve/instrumentator/static/")
LIBRARIES = ("vllm/_C_stable_libtorch.abi3.so", "vllm/cumem_allocator.abi3.so", "vllm/spinloop.abi3.so",
             "vllm/fs_io_C.abi3.so")
with zipfile.ZipFile(sys.argv[1]) as wheel:
    for name in wheel.namelist():
        if not name.startswith(OUT) and (not name.endswith(".so") or name in LIBRARIES):
            wheel.extract(name, sys.argv[2])
PYTHON
  # Its package raises ImportError where the libraries are missing, and every model's layers import it.
  cat >"$tree/vllm/vllm_flash_attn/__init__.py" <<'PYTHON'
"""Of a vLLM that was packed without its flash attention: the names, whose calls fail."""

from vllm.vllm_flash_attn.flash_attn_interface import (
    FA2_AVAILABLE,
    FA3_AVAILABLE,
    compile_flash_attn_varlen_func_from_specs,
    fa_version_unsupported_reason,
    flash_attn_varlen_func,
    get_scheduler_metadata,
    is_fa_version_supported,
)
PYTHON
  sed -n 's/^Requires-Dist: //p' "$tree"/vllm-*.dist-info/METADATA | grep -v 'extra ==' >"$work/all.txt"
  grep -viE "^($left_out|$alone)([^a-z0-9._-]|$)" "$work/all.txt" >"$work/needs.txt"
  local pip=(python3 -m pip install --quiet --target "$tree" --only-binary=:all: "${platforms[@]/#/--platform=}"
    --implementation cp --python-version "$python_version")
  # What the needs ask for of the things left out is on the other machine: only the needs themselves are resolved.
  "${pip[@]}" -r "$work/needs.txt"
  # vLLM pins apache-tvm-ffi for libraries that are left out; xgrammar's newest needs its newest.
  grep -iE "^($alone)([^a-z0-9._-]|$)" "$work/all.txt" | sed 's/^\(apache-tvm-ffi\)==.*/\1/' >"$work/alone.txt"
  "${pip[@]}" --no-deps -r "$work/alone.txt"
  python3 - "$tree" "$have" <<'PYTHON'
"""Removes the distributions that the other machine has, by what each recorded as its files."""
import pathlib, re, sys

tree, have = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
names = {re.sub("[-_.]+", "-", n.strip()).lower() for n in have.read_text().split("\n") if n.strip()}
for info in tree.glob("*.dist-info"):
    name = re.sub("[-_.]+", "-", info.name.removesuffix(".dist-info").rsplit("-", 1)[0]).lower()
    if name in names:
        for line in (info / "RECORD").read_text().split("\n"):
            file = tree / line.rsplit(",", 2)[0]
            if line and file.is_file():
                file.unlink()
PYTHON
  find "$tree" -name __pycache__ -prune -exec rm -rf {} +
  find "$tree" -depth -type d -empty -delete
  rm -rf "$tree/bin"
  (cd "$tree" && ls -d ./*.dist-info | sed 's,^\./,,; s,\.dist-info$,,') >"$out/contents.txt"
  rm -f "$out"/vllm.tar.xz.*
  tar -C "$tree" --sort=name --owner=0 --group=0 -c . | xz -T2 -6 | split -b "$part" - "$out/vllm.tar.xz."
  ls -l "$out"
}

install() {
  mkdir -p "$2"
  cat "$1"/vllm.tar.xz.* | xz -d | tar -C "$2" -x
  echo "PYTHONPATH=$2"
}

case "${1:-} $#" in
  'pack 2' | 'pack 3' | 'install 3') "$@" ;;
  *) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
