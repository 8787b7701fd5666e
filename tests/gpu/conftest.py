"""GPU tests run on a bare machine: `python -m pytest -m gpu tests/gpu` in a copy of the tree."""

from __future__ import annotations

from bare_machine import do_without_safetensors

do_without_safetensors()
