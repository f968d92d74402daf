"""Classify pictures with an exported .onnx file: ONNX Runtime, numpy and Pillow, nothing else.

python classify.py digits.onnx one.png two.png
"""

import json
import math
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

RESAMPLING = {name.lower(): value for name, value in Image.Resampling.__members__.items()}
UNUSUAL = {"resize", "resizer", "channels"}  # of some models of Hugging Face


class Classifier:
    """An exported classifier: pictures -> (label, probability, unknown), as the file's own metadata says."""

    def __init__(self, path: str, threads: int = 1):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.x64quantprecision", "1")  # 8-bit sums saturate without VNNI or AMX
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        held = self.session.get_modelmeta().custom_metadata_map
        self.transform = json.loads(held["preprocess"])
        if self.transform["crop_mode"] != "center" or not UNUSUAL.isdisjoint(self.transform):
            raise SystemExit(f"{path}: prepare() does not do what its images need: {held['preprocess']}")
        self.names = json.loads(held["plan"]).get("class_names")
        self.threshold = (json.loads(held["guard"]).get("threshold") or {}).get("value")  # None: no guard images

    def prepare(self, picture: Image.Image) -> np.ndarray:
        """float32 [C, H, W]: the shorter side resized, the centre cropped, normalised."""
        t = self.transform
        _, height, width = t["input_size"]
        picture = ImageOps.exif_transpose(picture).convert("RGB")
        short = math.floor(min(height, width) / t["crop_pct"])
        w, h = (max(short, int(short * side / min(picture.size))) for side in picture.size)
        picture = picture.resize((w, h), RESAMPLING[t["interpolation"]])
        left, top = round((w - width) / 2), round((h - height) / 2)
        pixels = np.asarray(picture.crop((left, top, left + width, top + height)), np.float32) / 255
        return ((pixels - np.float32(t["mean"])) / np.float32(t["std"])).transpose(2, 0, 1)

    def __call__(self, images: np.ndarray) -> list[tuple[str, float, bool]]:
        """images float32 [B, C, H, W] of `prepare`; one call for the whole batch, from any number of threads."""
        logits, scores = self.session.run(["logits", "score"], {"images": images})
        shares = np.exp(logits - logits.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        labels = [self.names[k] if self.names else str(k) for k in logits.argmax(1)]
        unknown = scores < (-math.inf if self.threshold is None else self.threshold)
        return list(zip(labels, shares.max(1).tolist(), unknown.tolist(), strict=True))


if __name__ == "__main__":
    classifier = Classifier(sys.argv[1])
    found = classifier(np.stack([classifier.prepare(Image.open(path)) for path in sys.argv[2:]]))
    for path, (label, probability, unknown) in zip(sys.argv[2:], found, strict=True):
        print(f"{path}: {label} ({probability:.3f}){' looks unknown' if unknown else ''}")
