"""One thread per process: tests are many and small, and several run at once."""

import os

import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
