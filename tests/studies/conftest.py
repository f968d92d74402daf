"""Puts `study_fakes` on the path of the tests of this folder, and keeps torch to one thread."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
