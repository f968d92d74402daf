"""Ctrl-C after exported files were run and dropped: an exception, not the end of the process."""

import signal
import subprocess
import sys

import pytest

import quantlens as ql

pytestmark = pytest.mark.process

PROGRAM = """
import sys, time, numpy, torch
from quantlens.export.exported import Artefact

first, second = (Artefact(sys.argv[1], threads=1) for _ in range(2))
images = numpy.zeros((1, *first.preprocess.input_size), numpy.float32)
first.run(images), second.run(images)
del first, second
try:
    print("ready", flush=True)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        torch.rand(300, 300).log2()
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize(("runtime", "name"), [("openvino", "model.xml"), ("onnxruntime", "model.onnx")])
def test_ctrl_c_after_two_files_is_an_exception(runtime: str, name: str, tmp_path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip(runtime)
    path = ql.export(ql.load_model("digits-vit"), tmp_path / name)
    # where a shell started the tests in the background, Ctrl-C is ignored, and by what they start, too
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + PROGRAM
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=120)[0] == "interrupted\n"
    assert process.returncode == 0
