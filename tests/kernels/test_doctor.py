from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import pytest
import torch

from us3l_kernels import backends, doctor, functional
from us3l_kernels.backends import BACKENDS
from us3l_kernels.errors import SettingError


def test_report_names_every_backend_and_why_not():
    findings = {f.subject: f for f in doctor.report()}
    for name, backend in BACKENDS.items():
        assert findings[f"backend {name}"].ok == (backend.unavailable() is None)
    assert "conv2d (cpu: float64, float32, bfloat16, float16)" in findings["backend aten"].detail
    assert (
        findings["torch"].detail == torch.__version__.partition("+")[0] or findings["torch"].detail == torch.__version__
    )
    assert findings["GPU"].ok == torch.cuda.is_available()


def test_a_missing_library_is_said(monkeypatch):
    monkeypatch.setattr(doctor._native, "_C", None)
    monkeypatch.setattr(doctor._native, "why", "undefined symbol: aoti_torch_xyz")
    findings = {f.subject: f for f in doctor.report()}
    assert not findings["native library (csrc/cpu)"].ok
    assert "undefined symbol: aoti_torch_xyz" in findings["native library (csrc/cpu)"].detail


def test_an_instruction_set_that_is_not_there_is_said(monkeypatch):
    def isa():
        raise SettingError("US3L_ISA: expected one of portable on this CPU, got 'sse'")

    monkeypatch.setattr(doctor._native, "isa", isa)
    findings = {f.subject: f for f in doctor.report()}
    for subject in ("native library (csrc/cpu)", "backend native"):
        assert not findings[subject].ok and "got 'sse'" in findings[subject].detail


def test_auto_logs_who_declined(caplog):
    with caplog.at_level(logging.DEBUG, logger="us3l_kernels"):
        functional.batch_norm(torch.randn(4, 3).double(), None, None, training=True)
    assert any("not on native" in r.getMessage() and "float64" in r.getMessage() for r in caplog.records)


def test_backend_from_the_environment(monkeypatch):
    """What is asked for is taken at import; what cannot be is refused then (and by the command line: test_cli)."""
    code = "from us3l_kernels import backends; print(backends.requested())"
    environment = {**os.environ, "US3L_BACKEND": "linear=reference"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "'linear': 'reference'" in done.stdout, done.stderr
    monkeypatch.setenv("US3L_BACKEND", "cudnn")
    with pytest.raises(SettingError, match=re.escape(f"expected one of {['auto', *BACKENDS]}, got 'cudnn'")):
        backends._from_environment()
