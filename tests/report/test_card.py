"""Model cards, and repositories of the Hugging Face hub with them: what they say, where they are written, what is
refused. The hub is a folder here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import quantlens as ql
from quantlens.errors import BadWeightsError, QuantlensError, QuantlensWarning, StorageError
from quantlens.report.card import code, escaped

SOURCE = "embedded:digits-calibration"


@pytest.fixture(scope="module")
def made(digits):
    """(quantized model, its result with per-image outputs)."""
    qmodel = ql.quantize(digits["model"], SOURCE, method="percentile", bits="W4A8", head_bits=8, p=0.99)
    sets = {"letters": "embedded:letters[0:12]"}
    result = ql.evaluate(qmodel, "embedded:digits-test[0:40]", sets, keep="scores", scores=["msp"], cache_dir=False)
    return qmodel, result


@pytest.fixture
def file(made, tmp_path) -> Path:
    return made[0].save(tmp_path / "folder" / "d.safetensors")


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_says_what_was_measured_and_how_to_make_it_again(made, file) -> None:
    qmodel, result = made
    text = ql.card(file, result)
    assert (file.parent / "README.md").read_text(encoding="utf-8") == text
    about = metadata(text)
    assert about["library_name"] == "quantlens"
    assert {"percentile", "w4a8", "quantlens"} <= set(about["tags"])
    assert "base_model" not in about  # a file of weights, of which the hub's name is not known
    assert "license" not in about
    (one,) = about["model-index"]
    in_distribution, out = one["results"]
    values = {metric["type"]: metric["value"] for metric in in_distribution["metrics"]}
    assert values["accuracy"] == result.id["top1"]
    assert values["nll"] == result.id["nll"]
    assert {m["type"]: m["value"] for m in out["metrics"]}["roc_auc"] == result.ood["letters"]["msp"]["auroc"]
    n, right = 40, round(40 * result.id["top1"])
    row = next(line for line in text.splitlines() if line.startswith("| top-1"))
    z2, p = 1.959964**2, right / n
    low = (p + z2 / (2 * n) - (z2 * (p * (1 - p) / n + z2 / (4 * n * n))) ** 0.5) / (1 + z2 / n)  # Wilson, 1927
    assert f"{100 * p:.2f} ({100 * low:.2f} to " in row
    assert f"| {100 * result.fp32['id']['top1']:.2f} (" in row
    assert f"| {100 * result.change['id']['top1']:+.2f} |" in row
    assert "40 images of `embedded:digits-test[0:40]`" in text
    assert "letters: 12 images of `embedded:letters[0:12]`" in text
    assert f"{file.stat().st_size / 1e6:.2f} MB" in text
    assert qmodel.checkpoint_sha256 in text
    assert "quantlens quantize digits-vit --calibration 'embedded:digits-calibration?n=32&seed=0'" in text
    assert "--head-bits 8 --option p=0.99 --out d.safetensors" in text
    assert "quantlens reproduce d.result.json\n" in text
    kept = json.loads((file.parent / "d.result.json").read_text(encoding="utf-8"))
    low, high = kept["intervals"]["id.nll"]
    assert low < result.id["nll"] < high
    assert ql.card(file) == text  # of the result that lies beside it


def test_the_hub_reads_the_metadata(made) -> None:
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard(ql.card(*made)).data
    assert data.library_name == "quantlens"
    accuracy = next(r for r in data.eval_results if r.metric_type == "accuracy")
    assert (accuracy.metric_value, accuracy.dataset_type) == (made[1].id["top1"], "embedded")


def test_what_was_not_measured_is_said(made, file) -> None:
    text = ql.card(file)
    assert "Nothing was measured" in text
    assert "## Out of distribution\n\nNot measured." in text
    assert "model-index" not in metadata(text)
    alone = ql.evaluate(made[0], "embedded:digits-test[0:10]", reference=False, cache_dir=False)
    text = ql.card(file, alone.to_dict())
    assert re.search(r"\| top-1 % ↑ \| [\d.]+ \(.*\) \| not measured \| – \|", text)
    assert "the rest has none" in text


@pytest.mark.slow
def test_the_commands_of_a_card_make_the_same_again(made, file, monkeypatch) -> None:
    import shlex

    from quantlens.cli import main

    text = ql.card(file, made[1])
    quantize, reproduce = (shlex.split(line)[1:] for line in re.findall(r"^quantlens [a-z].*$", text, re.M))
    monkeypatch.chdir(file.parent)
    before = ql.load(file)
    file.unlink()
    assert main.run([*quantize, "-q"]) == 0
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(ql.load(file)(images), before(images))
    assert main.run([*reproduce, "-q"]) == 0


def test_widths_by_module_are_code_as_they_are(loaded, pictures) -> None:
    widths = {"default": "W8A8", "blocks.0.mlp": "W4A4"}
    qmodel = ql.quantize(loaded["vit"], pictures, method="minmax", bits=widths)
    (row,) = (line for line in ql.card(qmodel).splitlines() if line.startswith("| bits |"))
    assert json.loads(row.split("by module: ")[1].strip(" |`")).items() >= widths.items()


def test_no_command_where_none_can_make_it(small_models, loaded, pictures) -> None:
    qmodel = ql.quantize(loaded["vit"], pictures, method="minmax", bits="W8A8")
    text = ql.card(qmodel)
    assert "No command makes the checkpoint again: the float model was a module that only Python had." in text
    assert "base_model" not in metadata(text)


def test_the_base_model_is_timms_where_its_weights_were_used(made) -> None:
    import copy
    from dataclasses import replace

    qmodel = copy.deepcopy(made[0])
    qmodel.plan.provenance = replace(qmodel.provenance, model="vit_tiny_patch16_224", checkpoint="pretrained")
    about = metadata(ql.card(qmodel))
    assert about["base_model"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert about["license"] == "apache-2.0"
    about = metadata(ql.card(qmodel, base_model="me/mine", license="mit"))
    assert (about["base_model"], about["license"]) == ("me/mine", "mit")


@pytest.mark.parametrize("name", ["a|b\n# c", "`x` ``y``", "<img src=x>", "--- \nlicense: mit", "*[l](u)*"])
def test_what_a_person_wrote_is_text(made, name) -> None:
    import copy
    from dataclasses import replace

    qmodel = copy.deepcopy(made[0])
    qmodel.plan.provenance = replace(qmodel.provenance, model=name, method=name)
    text = ql.card(qmodel)
    assert "license" not in metadata(text)
    body = text.split("---\n", 2)[2]
    assert body.count("\n# ") == 1  # the title
    for line in body.splitlines():
        outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", line)  # what is in code is shown as it is
        assert not re.search(r"(?<!\\)<|(?<!\\)\[l", outside), line
        if line.startswith("| base model"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3


def test_text_and_code() -> None:
    assert escaped("a_b*c\n| d") == r"a\_b\*c \| d"
    assert code("x`y") == "``x`y``"
    assert code("`") == "`` ` ``"


def test_a_readme_of_somebody_is_not_written_over(made, file, tmp_path) -> None:
    own = file.parent / "README.md"
    own.write_text("# Mine\n")
    with pytest.raises(StorageError, match="is no card of quantlens and is kept"):
        ql.card(file)
    assert own.read_text() == "# Mine\n"
    own.unlink()
    ql.card(file)
    ql.card(file)  # its own is written anew
    second = made[0].save(file.with_name("e.safetensors"))
    with pytest.raises(StorageError, match=r"is the card of d\.safetensors"):
        ql.card(second)
    file.unlink()
    ql.card(second)


def test_a_result_of_another_model_is_rejected(made, file) -> None:
    other = made[1].to_dict() | {"seed": 7}
    with pytest.raises(QuantlensError, match="of another model: its seed is 7, the model's 0"):
        ql.card(file, other)
    with pytest.raises(QuantlensError, match="a card takes a result"):
        ql.card(file, 3)
    (file.parent / "d.result.json").write_text(json.dumps(other))
    with pytest.warns(QuantlensWarning, match="the card is without"):
        assert "Nothing was measured" in ql.card(file)


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that is a folder: hub/user/repo/revision/files."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    root, calls = tmp_path / "hub", []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            for revision in ("main", "c0ffee"):
                shutil.copytree(folder_path, root / repo_id / revision)
            return SimpleNamespace(oid="c0ffee")

    def snapshot_download(repo_id, *, revision=None, allow_patterns):
        found = root / repo_id / (revision or "main")
        if not found.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nand more")
        copy = tmp_path / "cache" / repo_id
        for name in allow_patterns:
            if (found / name).is_file():
                copy.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(found / name, copy / name)
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(root=root, calls=calls, errors=huggingface_hub.errors, api=Api)


def test_what_is_pushed_is_loaded(made, hub, digits) -> None:
    qmodel, result = made
    name = ql.push_to_hub(qmodel, "me/digits", result, private=True, token="secret")
    assert name == "hf:me/digits@c0ffee"
    assert hub.calls == [("token", "secret"), ("create", "me/digits", True, True)]
    folder = hub.root / "me/digits/main"
    files = {p.name for p in folder.iterdir()}
    assert files == {"README.md", "config.json", "digits-vit-w4a8.safetensors", "digits-vit-w4a8.result.json"}
    assert json.loads((folder / "config.json").read_text())["library_name"] == "quantlens"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert 'ql.load("hf:me/digits")' in text
    assert "secret" not in "".join(p.read_text(errors="replace") for p in folder.iterdir())
    expected = qmodel(digits["images"][:4])
    for written in (name, "hf:me/digits", "hf:me/digits/digits-vit-w4a8.safetensors@main", folder, f"hf:{folder}"):
        assert torch.equal(ql.load(written)(digits["images"][:4]), expected), written


def test_a_file_is_pushed_as_it_is(made, file, hub) -> None:
    ql.card(file, made[1])
    ql.push_to_hub(file, "me/digits")
    folder = hub.root / "me/digits/main"
    assert (folder / "d.safetensors").read_bytes() == file.read_bytes()
    assert "| top-1" in (folder / "README.md").read_text(encoding="utf-8")  # the result beside it went along
    with pytest.raises(BadWeightsError, match="no quantized checkpoint at"):
        ql.push_to_hub(file.with_name("absent.safetensors"), "me/other")
    assert not (hub.root / "me/other").exists()


def test_what_the_hub_refuses_is_one_sentence(made, hub, monkeypatch) -> None:
    def fails(error):
        def create_repo(self, *given, **more):
            raise error

        monkeypatch.setattr(hub.api, "create_repo", create_repo)

    client = next(c for c in hub.errors.HfHubHTTPError.__mro__ if c.__name__ in ("HTTPError", "RequestException"))

    class NoNetwork(client):
        def __init__(self):
            Exception.__init__(self, "Name or service not known")

    answer = SimpleNamespace(status_code=403, headers={}, request=None)
    for error, said in (
        (NoNetwork(), "there is no network"),
        (ConnectionError("refused"), "there is no network"),
        (hub.errors.LocalTokenNotFoundError("x"), "no token is known"),
        (hub.errors.HFValidationError("Repo id must be …\nmore"), "Repo id must be …"),
        (hub.errors.HfHubHTTPError("403", response=answer), "the token is missing or does not allow it"),
    ):
        fails(error)
        with pytest.raises(StorageError, match="me/x cannot be written on the Hugging Face hub: ") as caught:
            ql.push_to_hub(made[0], "me/x")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    fails(RuntimeError("a fault"))
    with pytest.raises(RuntimeError):
        ql.push_to_hub(made[0], "me/x")


def test_what_holds_no_checkpoint(made, hub, tmp_path) -> None:
    with pytest.raises(BadWeightsError, match="me/none cannot be read from the Hugging Face hub: there is no network"):
        ql.load("hf:me/none")
    float_model = hub.root / "me/float/main"
    float_model.mkdir(parents=True)
    (float_model / "config.json").write_text('{"model_type": "vit"}')
    for name in ("hf:me/float", float_model, f"hf:{float_model}", "hf:./none"):
        with pytest.raises(BadWeightsError, match="holds no quantized checkpoint"):
            ql.load(name)
    for name in ("a", "b"):
        made[0].save(float_model / f"{name}.safetensors")
    with pytest.raises(BadWeightsError, match=r"holds 2 quantized checkpoints \(a.safetensors, b.safetensors\)"):
        ql.load(float_model)
    (float_model / "config.json").write_text('{"library_name": "quantlens", "checkpoint": "../x.safetensors"}')
    with pytest.raises(BadWeightsError, match="does not name a checkpoint file"):
        ql.load(float_model)


def test_quantized_by_transformers(tmp_path, hub, monkeypatch) -> None:
    """On the fly, and from a folder that was pushed: the logits are those of `ql.quantize`."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**size, image_size=32, patch_size=8, num_labels=5)
    module = transformers.ViTForImageClassification(config).eval()
    module.save_pretrained(tmp_path / "float")
    images = torch.randn(3, 3, 32, 32)
    auto, how = transformers.AutoModelForImageClassification, {"bits": "W4A8", "method": "minmax"}
    expected = ql.quantize(module, images, **how)(images).logits
    with pytest.raises(QuantlensError, match="takes calibration images"):
        auto.from_pretrained(tmp_path / "float", quantization_config=ql.QuantlensConfig(**how))
    given = ql.QuantlensConfig(calibration=images, head_bits=8, **how)
    assert given.to_dict() == {"quant_method": "quantlens", "seed": 0, "head_bits": 8, **how}
    given = ql.QuantlensConfig(calibration=images, **how)
    model = auto.from_pretrained(tmp_path / "float", quantization_config=given)
    ql.push_to_hub(model.quantized, "me/vit")
    folder = hub.root / "me/vit/main"
    for one in (model, auto.from_pretrained(folder)):
        assert isinstance(one, transformers.ViTForImageClassification)
        assert torch.equal(one(pixel_values=images).logits, expected)
        assert torch.equal(one(images, return_dict=False)[0], expected)
        assert (one.dtype, one.device.type) == (torch.float32, "cpu")
        with pytest.raises(QuantlensError, match="pixel_values alone, not labels"):
            one(images, labels=torch.zeros(3))
        with pytest.raises(ValueError, match="not serializable"):
            one.save_pretrained(tmp_path / "again")
    assert ql.load(folder)(images).logits.equal(expected)
    monkeypatch.delitem(transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "quantlens")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        auto.from_pretrained(folder)


def test_a_part_moves_with_the_whole(made) -> None:
    import copy

    whole = torch.nn.Sequential(copy.deepcopy(made[0]))
    whole[0].simulation()
    whole.to("meta")
    assert whole[0].device.type == "meta"
    assert whole(torch.empty(2, 3, 32, 32, device="meta")).device.type == "meta"
