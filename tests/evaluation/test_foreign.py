"""Models that quantlens did not make: files of other tools, modules, callables."""

from __future__ import annotations

import copy
import hashlib
import json

import numpy as np
import pytest
import torch
from study_fakes import PREPROCESS, FakeModel

import quantlens as ql
from foreign_files import write
from quantlens.data import as_image_set
from quantlens.errors import BadWeightsError, QuantlensError, QuantlensWarning, UnknownNameError, UnsupportedError
from quantlens.evaluation.foreign import open_foreign
from quantlens.evaluation.result import Result
from quantlens.evaluation.run import evaluate

ID, LETTERS, FIT = "embedded:digits-test[0:60]", "embedded:letters[0:40]", "embedded:digits-fit[0:60]"


@pytest.fixture(autouse=True)
def _runtime():
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason="the deploy extra is not installed")


@pytest.fixture(scope="module")
def floats() -> Result:
    return evaluate(FakeModel(), ID, {"letters": LETTERS}, fit=FIT)


def measured(model, **settings) -> Result:
    return evaluate(model, ID, {"letters": LETTERS}, reference=FakeModel(), **settings)


def agrees(result: Result, floats: Result, tolerance: float = 1e-5) -> bool:
    same = [result.id[name] == pytest.approx(floats.id[name], abs=tolerance) for name in ("top1", "nll", "ece")]
    pairs = zip(result.ood["letters"]["msp"].values(), floats.ood["letters"]["msp"].values(), strict=True)
    return all(same) and all(a == pytest.approx(b, abs=tolerance) for a, b in pairs)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_file_is_measured_as_its_float_model_is(tmp_path, floats) -> None:
    path = write(tmp_path / "their.onnx")
    result = measured(path, scores=["msp", "knn"])
    assert agrees(result, floats)
    said = json.loads(json.dumps(result.to_dict()))
    assert (said["model"], said["method"], said["bits"]) == ("fake", "foreign:onnx", None)
    assert said["foreign"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert said["foreign"]["preprocess_from"] == "the float model fake"
    assert said["size_mb"] == path.stat().st_size / 1e6
    assert said["change"]["id"]["top1"] == 0
    assert "features" in said["scores_unavailable"]["knn"]
    assert Result.from_dict(said).to_dict() == said
    assert result.title == "fake foreign:onnx"


@pytest.mark.parametrize(
    ("spelled", "tolerance"),
    [
        ({"layout": "NHWC"}, 1e-5),
        ({"batch": 1}, 1e-5),
        ({"batch": 7}, 1e-5),  # neither 60 nor 40 is a multiple: the last batch is filled up, and the rest cut off
        ({"kind": "UINT8"}, 1e-5),
        ({"kind": "UINT8", "layout": "NHWC", "batch": 1}, 1e-5),
        ({"kind": "FLOAT16"}, 2e-3),
        ({"external": True}, 1e-5),
        ({"names": ("anything",)}, 1e-5),
        ({"names": ("one", "two")}, 1e-5),
    ],
)
def test_inputs_and_outputs_as_they_come(tmp_path, floats, spelled, tolerance) -> None:
    assert agrees(measured(write(tmp_path / "m.onnx", **spelled), scores=["msp"]), floats, tolerance)


def test_external_data_counts_as_part_of_the_file(tmp_path) -> None:
    path = write(tmp_path / "m.onnx", external=True)
    data = tmp_path / "m.data"
    model = open_foreign(path, reference=FakeModel())
    assert model.size_mb == (path.stat().st_size + data.stat().st_size) / 1e6
    assert model.foreign["sha256"] == hashlib.sha256(path.read_bytes() + data.read_bytes()).hexdigest()
    data.unlink()
    with pytest.raises(BadWeightsError, match="cannot be run by ONNX Runtime"):
        open_foreign(path, reference=FakeModel())


def test_a_second_output_gives_the_scores_that_need_features(tmp_path, floats) -> None:
    result = measured(write(tmp_path / "m.onnx", names=("logits", "features")), fit=FIT)
    for score in ("knn", "mahalanobis"):
        assert result.ood["letters"][score]["auroc"] == pytest.approx(floats.ood["letters"][score]["auroc"], abs=1e-4)
    assert "classifier" in result.scores_unavailable["vim"]


def test_a_tensor_inside_the_graph_can_be_named(tmp_path, floats) -> None:
    path = write(tmp_path / "m.onnx")
    model = open_foreign(path, reference=FakeModel(), features="inner")
    result = measured(model, fit=FIT, scores=["knn"])
    assert result.ood["letters"]["knn"]["auroc"] == pytest.approx(floats.ood["letters"]["knn"]["auroc"], abs=1e-4)
    alone = open_foreign(path, preprocess=PREPROCESS, output="inner", task="features")
    assert alone.outputs(torch.zeros(3, 3, 32, 32)).logits.shape == (3, 64)
    with pytest.raises(UnknownNameError, match="iner"):
        open_foreign(path, reference=FakeModel(), features="iner")


def test_probabilities_are_not_taken_for_logits(tmp_path, floats) -> None:
    with pytest.warns(QuantlensWarning, match="probabilities"):
        result = measured(write(tmp_path / "m.onnx", softmax=True), scores=["msp"])
    assert agrees(result, floats, 1e-4)
    assert "probabilities" in result.to_dict()["foreign"]["output"]


def test_an_image_is_run_alone_where_others_beside_it_change_it(tmp_path) -> None:
    path = write(tmp_path / "m.onnx", beside=True)
    results = [measured(path, scores=["msp"], batch_size=size) for size in (1, 60)]
    assert results[0].id["nll"] == pytest.approx(results[1].id["nll"], abs=1e-6)
    assert results[1].to_dict()["foreign"]["images_together"] == 1


def test_openvino(tmp_path, floats) -> None:
    openvino = pytest.importorskip("openvino", reason="the deploy extra is not installed")
    source = write(tmp_path / "m.onnx", names=("logits", "features"))
    openvino.save_model(openvino.convert_model(str(source)), tmp_path / "m.xml", compress_to_fp16=False)
    result = measured(tmp_path / "m.xml", fit=FIT)
    assert agrees(result, floats)
    assert result.ood["letters"]["knn"]["auroc"] == pytest.approx(floats.ood["letters"]["knn"]["auroc"], abs=1e-4)
    both = [tmp_path / "m.xml", tmp_path / "m.bin"]
    assert result.method == "foreign:openvino"
    assert result.size_mb == sum(file.stat().st_size for file in both) / 1e6


def test_what_cannot_be_measured_is_refused_in_a_sentence(tmp_path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"\x08\x07no onnx at all")
    two = write(tmp_path / "two.onnx", second_input=True)
    plain, pixels = write(tmp_path / "m.onnx"), write(tmp_path / "u8.onnx", kind="UINT8")
    larger = FakeModel(num_classes=9)
    cases = [
        (bad, {}, BadWeightsError, "cannot be run by ONNX Runtime"),
        (tmp_path / "absent.onnx", {}, BadWeightsError, "no exported model at"),
        (two, {}, UnsupportedError, r"takes 2 inputs \(x, y\)"),
        (pixels, {}, UnsupportedError, "pixels that the graph normalises itself"),
        (plain, {"reference": larger}, UnsupportedError, "gives 8 classes and the float model has 9"),
        (plain, {"preprocess": {**PREPROCESS.to_dict(), "input_size": (3, 64, 64)}}, UnsupportedError, "takes images"),
    ]
    for path, given, kind, sentence in cases:
        with pytest.raises(kind, match=sentence):
            open_foreign(path, **given)
    with pytest.raises(QuantlensError, match="does not say how its images are prepared"):
        evaluate(plain, ID)
    with pytest.raises(QuantlensError, match="id is missing"):
        evaluate(open_foreign(plain, reference=FakeModel()))


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "it is empty"), (b"version https://git-lfs", "a pointer of Git LFS"), (b"<!DOCTYPE html>", "a web page")],
)
@pytest.mark.parametrize("name", ["m.onnx", "m.xml"])
def test_downloads_that_are_no_models(tmp_path, content, said, name) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadWeightsError, match=said):
        open_foreign(tmp_path / name)


def test_a_file_with_operators_of_its_maker_says_which(tmp_path) -> None:
    onnx = pytest.importorskip("onnx", reason="the deploy extra is not installed")
    proto = onnx.load(str(write(tmp_path / "m.onnx")))
    proto.graph.node[0].op_type, proto.graph.node[0].domain = "ExtendedMatMul", "com.amd.quark"
    proto.opset_import.append(onnx.helper.make_opsetid("com.amd.quark", 1))
    onnx.save(proto, str(tmp_path / "quark.onnx"))
    with pytest.raises(BadWeightsError, match=r"no operator com\.amd\.quark:ExtendedMatMul; open the file with"):
        open_foreign(tmp_path / "quark.onnx")


def test_openvino_says_what_is_wrong_not_where_in_its_source(tmp_path) -> None:
    openvino = pytest.importorskip("openvino", reason="the deploy extra is not installed")
    openvino.save_model(openvino.convert_model(str(write(tmp_path / "m.onnx"))), tmp_path / "m.xml")
    (tmp_path / "m.bin").unlink()
    with pytest.raises(BadWeightsError, match="bin file") as refused:
        open_foreign(tmp_path / "m.xml")
    assert ".cpp" not in str(refused.value)


def test_tensors_need_no_preprocessing(tmp_path) -> None:
    result = evaluate(write(tmp_path / "m.onnx"), (torch.rand(9, 3, 32, 32), np.arange(9) % 8))
    assert (result.id["n"], result.model) == (9, "m")


def test_two_files_and_the_float_model_are_compared_image_by_image(tmp_path) -> None:
    weight = torch.round(FakeModel().weight * 3) / 3
    coarse = write(tmp_path / "coarse.onnx", model=FakeModel(weight=weight))
    settings = {"id": ID, "ood": {"letters": LETTERS}, "resamples": 200}
    found = ql.compare(FakeModel(), coarse, **settings)
    metrics = {one.path: one for one in found.groups[0].metrics}
    expected = measured(coarse, scores=["msp"])
    assert metrics["id.nll"].difference == pytest.approx(expected.change["id"]["nll"])
    assert metrics["id.nll"].low is not None
    assert "ood.letters.msp.auroc" in metrics
    with pytest.raises(QuantlensError, match="give the images"):
        ql.compare(str(coarse), str(coarse))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """(the model, its ONNX file without our record)."""
    onnx = pytest.importorskip("onnx", reason="the deploy extra is not installed")
    model, folder = ql.load_model("digits-vit"), tmp_path_factory.mktemp("vit")
    proto = onnx.load(str(ql.export(model, folder / "ours.onnx")))
    del proto.metadata_props[:]
    onnx.save_model(proto, str(folder / "float.onnx"))
    return model, folder / "float.onnx"


@pytest.mark.parametrize("static", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_onnxruntime_quantizes(vit, tmp_path, static) -> None:
    """Near the float model, smaller, and foreign."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

    model, source = vit
    images = as_image_set("embedded:digits-calibration[0:8]", model.preprocess)
    batches = iter([{"images": images.tensor().numpy()}])

    class Reader(CalibrationDataReader):
        def get_next(self):
            return next(batches, None)

    path = tmp_path / "int8.onnx"
    if static:
        quantize_static(str(source), str(path), Reader(), quant_format=QuantFormat.QDQ)
    else:
        quantize_dynamic(str(source), str(path))
    result = evaluate(open_foreign(path, reference=model), ID, reference=False)
    assert result.method == "foreign:onnx"
    assert result.size_ratio < 0.5
    assert result.id["top1"] > 0.9
    assert result.to_dict()["foreign"]["output"] == "logits"  # not the score that our export also gives
    assert ("images_together" in result.to_dict()["foreign"]) is not static


# ---- modules ---------------------------------------------------------------------------------------------------------


class Small(torch.nn.Module):
    """A classifier with dropout, whose forward cannot be captured when `odd`."""

    def __init__(self, classes: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(3 * 32 * 32, 64), torch.nn.Linear(64, classes)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, images):
        return self.head(self.drop(torch.relu(self.body(images.flatten(1)))))


def test_a_module_is_measured_as_it_is_and_left_as_it_was() -> None:
    module = Small()
    model = ql.load_model(module, preprocess=PREPROCESS)
    expected = evaluate(model, ID, {"letters": LETTERS}, fit=FIT)
    result = evaluate(module, ID, {"letters": LETTERS}, fit=FIT, reference=model)
    assert module.training
    assert (result.method, result.bits) == ("foreign:torch", None)
    assert result.size_mb == sum(p.nbytes for p in module.parameters()) / 1e6
    assert result.scores_unavailable == {}
    for score in ("msp", "vim", "react", "mahalanobis"):
        assert result.ood["letters"][score]["auroc"] == pytest.approx(expected.ood["letters"][score]["auroc"], abs=1e-6)


def test_a_callable_and_half_precision() -> None:
    module = Small().eval()
    result = evaluate(lambda images: {"logits": module(images)}, ID, reference=FakeModel())
    assert (result.method, result.size_mb) == ("foreign:callable", None)
    half = evaluate(copy.deepcopy(module).bfloat16(), ID, reference=FakeModel())
    assert half.id["nll"] == pytest.approx(result.id["nll"], abs=0.02)
    assert half.size_mb == sum(p.numel() for p in module.parameters()) * 2 / 1e6
    with pytest.raises(UnsupportedError, match="cannot be run on images"):
        evaluate(lambda images: images @ images.new_zeros(7, 7), ID, reference=FakeModel())
    with pytest.raises(UnsupportedError, match="gives output"):
        evaluate(lambda images: images, ID, reference=FakeModel())


def test_what_a_runtime_or_an_archive_gives() -> None:
    """Arrays by a runtime's own keys, a frozen program of TorchScript, a program of torch.export."""
    module = Small().eval()
    expected = evaluate(module, ID, reference=FakeModel()).id["nll"]
    traced = torch.jit.freeze(torch.jit.trace(module, torch.zeros(2, 3, 32, 32)))
    program = torch.export.export(module, (torch.zeros(3, 3, 32, 32),))
    for given in (
        lambda images: module(images).detach().numpy(),
        lambda images: {("port", 0): module(images).detach().numpy()},
        traced,
        program,
    ):
        assert evaluate(given, ID, reference=FakeModel()).id["nll"] == pytest.approx(expected, abs=1e-6)


class Branching(Small):
    def forward(self, images):
        return super().forward(images if float(images.sum()) > 0 else images * 1)


def test_a_float_model_that_cannot_be_captured_is_measured_as_it_is() -> None:
    model = ql.load_model(Branching(), preprocess=PREPROCESS)
    with pytest.warns(QuantlensWarning, match="measured as it is"):
        result = evaluate(model, ID)
    assert (result.method, result.bits) == ("fp32", "FP32")
    assert result.id["nll"] == pytest.approx(evaluate(Small().eval(), ID, reference=FakeModel()).id["nll"], abs=1e-6)


@pytest.mark.parametrize(
    "config", ["Int8DynamicActivationInt8WeightConfig", pytest.param("Int8WeightOnlyConfig", marks=pytest.mark.slow)]
)
def test_torchao(vit, config) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model, _ = vit
    module = copy.deepcopy(model.module)
    torchao.quantize_(module, getattr(torchao, config)())
    floats = evaluate(model, ID, {"letters": LETTERS}, fit=FIT, scores=["msp", "vim"])
    result = evaluate(module, ID, {"letters": LETTERS}, fit=FIT, reference=floats, scores=["msp", "vim"])
    assert (result.model, result.method) == ("digits-vit", "foreign:torchao")
    assert result.size_ratio < 0.5  # int8 codes, not the float32 that the tensors pretend to be
    assert result.scores_unavailable == {}
    assert abs(result.change["ood"]["letters"]["vim"]["auroc"]) < 0.02
    assert result.change["id"]["nll"] != 0


def test_an_exported_module_of_a_fixed_batch() -> None:
    """As pt2e's converted modules are: a graph, traced with three images."""
    module = Small().eval()
    graph = torch.export.export(module, (torch.zeros(3, 3, 32, 32),)).module()
    result = evaluate(graph, ID, {"letters": LETTERS}, fit=FIT, reference=FakeModel(), scores=["msp", "knn"])
    expected = evaluate(module, ID, {"letters": LETTERS}, fit=FIT, reference=FakeModel(), scores=["msp", "knn"])
    assert result.method == "foreign:pt2e"
    assert result.id["nll"] == pytest.approx(expected.id["nll"], abs=1e-6)
    assert result.ood["letters"]["knn"]["auroc"] == pytest.approx(expected.ood["letters"]["knn"]["auroc"], abs=1e-6)


def test_images_of_any_size_in_a_loader() -> None:
    """Nobody said how large the images are, and the module takes one size alone."""
    pairs = torch.utils.data.TensorDataset(torch.rand(10, 3, 32, 32), torch.arange(10) % 8)
    loader = torch.utils.data.DataLoader(pairs, batch_size=4)
    assert evaluate(Small(), loader).id["n"] == 10


def test_a_model_of_features() -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 16))
    foreign = open_foreign(module, preprocess=PREPROCESS, task="features")
    result = evaluate(foreign, ID, {"letters": LETTERS}, fit=FIT)
    assert (result.to_dict()["task"], result.id["num_features"]) == ("features", 16)
    assert 0 <= result.id["knn1"] <= 1
