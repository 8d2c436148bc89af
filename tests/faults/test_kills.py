"""A short run of `kills.py`: a few operations of every case, cut off in each way."""
import os

import pytest

import kills

CASES = [(c, kills.WAYS[i%4]) for i, c in enumerate(kills.CASES)]

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='trials are forked processes')
@pytest.mark.parametrize('case,way', CASES)
def test_nothing_is_lost(case, way):
    kills.quiet()
    run = kills.run_case(case, way, lambda total: sorted({total*2//3, total-2}))
    assert run['trials'] > 1 and not run['wrong'], run
