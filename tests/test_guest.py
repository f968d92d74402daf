"""Every public call is a good guest: settings of the process change no result, and stay as they are."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import signal
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from safetensors import safe_open

import quantlens as ql
from quantlens import ambient
from quantlens.attention.maps import class_activation, gradient_rollout
from quantlens.data import load_images

CALIBRATION, IMAGES, OOD = (
    "embedded:digits-calibration?n=8&seed=0",
    "embedded:digits-test?n=16&seed=0",
    "embedded:letters[0:8]",
)
STUDY = {
    "models": ["digits-vit"],
    "methods": ["minmax"],
    "bits": ["W8A8"],
    "seeds": [0],
    "calibration": {"source": "embedded:digits-calibration", "n": 8},
    "id": IMAGES,
    "device": "cpu",
}


# ---- the calls -------------------------------------------------------------------------------------------------------


def digest(*tensors):
    """Tensors as text that is equal for equal bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        value = tensor.detach().clone()
        found.update(f"{value.dtype} {value.device} {list(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def told(found):
    """What a result says of itself, without the time it took and the state of the process."""
    changing = {"seconds", "environment", "latency"}
    if isinstance(found, dict):
        return {key: told(value) for key, value in found.items() if key not in changing}
    return [told(value) for value in found] if isinstance(found, list | tuple) else found


def quantized(place, **settings):
    made = ql.quantize(place.model, settings.pop("images", place.calibration), bits="W4A4", **settings)
    return digest(*made.graph.tensors().values(), *(t for q in made.quantizers for t in q.tensors().values()))


def evaluated(place):
    settings = {"fit": CALIBRATION, "cache_dir": False, "keep": True}
    found = ql.evaluate(place.quantized, IMAGES, {"letters": OOD}, **settings)
    return told(found.to_dict()), told(ql.compare(found, found, resamples=100).to_dict())


def attended(place):
    found = ql.attention.compare(place.model, place.quantized, place.images, limit=4, map="grad-cam")
    found.save(place.folder / "attention", show=2)
    return {name: hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest() for name, a in found.arrays().items()}


def exported(place, ending):
    path = ql.export(place.quantized, place.folder / f"model{ending}", guard_images=place.images)
    return digest(*(torch.from_numpy(x) for x in ql.Artefact(path).run(place.images[:2].numpy())))


def exported_to_torch(place):
    path = ql.export(place.quantized, place.folder / "model.pt2")
    with ambient.isolation():  # what torch makes of the file is torch's
        return digest(torch.export.load(path).module()(place.images))


def saved(place):
    path = ql.save(place.quantized, place.folder / "model.safetensors")
    with safe_open(path, "pt") as file:
        return file.metadata()["sha256"]


def loaded(place):
    made = ql.load(place.checkpoint)
    assert not any(t.is_inference() for t in made.graph.tensors().values())
    return digest(*made.graph.tensors().values())


def timed(place):
    found = ql.bench(place.exported, fp32=place.model, threads=3, rounds=1, id="embedded:digits-test[0:8]")
    return [(timing["label"], timing["top1"]) for timing in found.timings]


def studied(place):
    from quantlens.studies.runner import run_study

    out = place.folder / "study"
    run_study(STUDY, out, progress=False)
    return told(ql.results(out).rows())


def trained(place):
    from quantlens.zoo.train import DIGITS_VIT, train

    recipe = replace(DIGITS_VIT, train="embedded:digits-train[0:32]", epochs=1, depth=1)
    return digest(*train(recipe).state_dict().values())


CALLS = {
    "a module": lambda place: digest(*ql.load_model(place.model.module).state_dict().values()),
    "a shipped model": lambda place: digest(*ql.load_model("digits-vit").state_dict().values()),
    "a timm name": lambda place: digest(*ql.load_model("test_vit").state_dict().values()),
    "minmax": lambda place: quantized(place, method="minmax"),
    "quantlens-fast": quantized,
    "trained": lambda place: quantized(place, method="qdrop", iterations=2),
    "a source": lambda place: quantized(place, method="minmax", images=CALIBRATION),
    "forward": lambda place: digest(place.quantized(place.images)),
    "allocate": lambda place: told(ql.allocate(place.model, place.calibration, "MP6").to_dict()),
    "inspect": lambda place: told(ql.inspect(place.model, place.calibration, "W4A4", method="minmax").to_dict()),
    "evaluate": evaluated,
    "attention": attended,
    "lens": lambda place: digest(ql.attention.Lens(place.quantized).rollout(place.images)),
    "class activation": lambda place: digest(class_activation(place.quantized, place.images)),
    "gradient rollout": lambda place: digest(gradient_rollout(place.model, place.images)),
    "onnx": lambda place: exported(place, ".onnx"),
    "openvino": lambda place: exported(place, ".xml"),
    "pt2": exported_to_torch,
    "save": saved,
    "load": loaded,
    "verify": lambda place: ql.verify(place.exported, place.quantized).equal,
    "bench": timed,
    "study": studied,
    "train": trained,
}


class Place:
    """A small model, what was made of it, images, and a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.model = ql.load_model("digits-vit")
        self.quantized = ql.quantize(self.model, CALIBRATION, method="minmax", bits="W8A8")
        self.calibration, self.images = (
            load_images(spec, self.model.preprocess, cache_dir=False).tensor() for spec in (CALIBRATION, IMAGES)
        )
        self.checkpoint = self.quantized.save(folder / "quantized.safetensors")
        self.exported = ql.export(self.quantized, folder / "quantized.onnx")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("guest"))


@pytest.fixture(scope="module")
def usual(place):
    """call -> what it gives where nothing is set."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = CALLS[name](place)
        return found[name]

    return of


# ---- what a process has set ------------------------------------------------------------------------------------------


@contextmanager
def restored(setter, before, value):
    setter(value)
    try:
        yield
    finally:
        setter(before)


STATES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: restored(torch.set_default_dtype, torch.float32, torch.float64),
    "bfloat16": lambda: restored(torch.set_default_dtype, torch.float32, torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "default device": lambda: restored(torch.set_default_device, None, "meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "deterministic": lambda: restored(torch.use_deterministic_algorithms, False, True),
    "reduced precision": lambda: restored(torch.set_float32_matmul_precision, "highest", "medium"),
    "other random numbers": lambda: restored(seed_all, 0, 5),
}


@contextmanager
def all_at_once():
    with ExitStack() as stack:
        for name, state in STATES.items():
            if name not in ("bfloat16", "default device"):
                stack.enter_context(state())
        yield


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def settings():
    """What a call must leave as it is."""
    kind, keys, *rest = np.random.get_state()
    return {
        "random": random.getstate(),
        "numpy": (kind, keys.tobytes(), rest),
        "torch": digest(torch.get_rng_state()),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "warnings": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }


def changed(before):
    after = settings()
    return {name for name, value in before.items() if after[name] != value}


LONG = ("pt2", "openvino", "bench", "trained", "study", "train", "attention", "lens", "class activation")


@pytest.mark.parametrize(
    "call", [pytest.param(call, marks=pytest.mark.slow) if call in LONG else call for call in CALLS]
)
@pytest.mark.usefixtures("captured_anew")
def test_what_is_set_around_a_call_changes_nothing_and_stays(call, place, usual):
    check(call, all_at_once, place, usual)


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.usefixtures("captured_anew")
def test_each_setting_alone_changes_nothing_and_stays(call, state, place, usual):
    check(call, STATES[state], place, usual)


def check(call, state, place, usual):
    expected = usual(call)
    with state():
        before = settings()
        found = CALLS[call](place)
        assert changed(before) == set()
    assert found == expected


def test_settings_stay_after_an_error_too(place):
    def fail(done, total):
        torch.set_num_threads(torch.get_num_threads() + 1)
        raise KeyboardInterrupt

    with all_at_once():
        before = settings()
        with pytest.raises(KeyboardInterrupt):
            ql.quantize(place.model, place.calibration, method="minmax", progress=fail)
        assert changed(before) == set()


def test_the_order_of_an_image_in_memory_changes_nothing(place):
    def other(tensor):
        return tensor.to(memory_format=torch.channels_last)

    model = ql.load_model(place.model.module.to(memory_format=torch.channels_last), preprocess=place.model.preprocess)
    usual = ql.quantize(place.model, place.calibration, bits="W4A4")
    made = ql.quantize(model, other(place.calibration), bits="W4A4")
    assert torch.equal(made(other(place.images)), usual(place.images))


def test_a_thread_gives_the_same_and_leaves_its_parents_settings(place, usual):
    found = []
    with all_at_once():
        before = settings()
        thread = threading.Thread(target=lambda: found.append(CALLS["quantlens-fast"](place)))
        thread.start()
        thread.join()
        assert changed(before) == set()
    assert found == [usual("quantlens-fast")]


def in_a_child(folder):
    from pathlib import Path

    return CALLS["minmax"](Place(Path(folder)))


@pytest.mark.process
def test_a_spawned_child_gives_the_same(tmp_path, place, usual):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(in_a_child, str(tmp_path)).result() == usual("minmax")


# ---- threads that wait -----------------------------------------------------------------------------------------------


class Runtime:
    """Stands for GNU's OpenMP runtime: keeps who asked for a team of how many."""

    omp_get_thread_num = None

    def __init__(self):
        self.teams = []

    def GOMP_parallel(self, function, data, count, flags):
        self.teams.append((threading.current_thread(), count))


@pytest.fixture
def runtime(monkeypatch):
    made = Runtime()
    monkeypatch.setattr(ambient, "_gnu_openmp", lambda: made)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    return made


def test_more_threads_than_processors_are_there_as_long_as_somebody_computes(runtime):
    with ambient.short_waits(), ambient.short_waits():
        ((thread, count),) = runtime.teams
        assert count + 2 > 8
        assert thread.is_alive()
    thread.join(60)
    assert not thread.is_alive()
    with ambient.short_waits():
        assert len(runtime.teams) == 2


def test_waits_that_the_environment_settles_stay_as_they_are(runtime, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with ambient.short_waits():
        assert runtime.teams == []


def test_one_thread_waits_for_nobody(runtime, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with ambient.short_waits():
        assert runtime.teams == []
