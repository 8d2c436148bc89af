"""One thread, no network, and what the test modules share."""
import os
os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')

import threading

import pytest
import torch

from hub import Hub
from reference import FAMILIES

torch.set_num_threads(1)

EVERY = bool(os.environ.get('FISHER_NODES_EVERY')) # as in `make corner`, which may take longer than a commit
def SLOW(params): return params if EVERY else []
def THIRD(params, first=0): return [*params] if EVERY else [*params][first::3]

@pytest.fixture(params=FAMILIES)
def family(request): return request.param

@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown(); server.server_close()
