"""A short run of `kills.py`: a few operations of every case, cut off in each way."""
import os

import pytest

import kills

CASES = [(c, kills.WAYS[i%4]) for i, c in enumerate(o for o in kills.CASES if o.partition('_')[0] not in kills.INPUTS)]
COMMANDS = dict(evaluate_new='interrupt', reproduce_new='kill', carded_again='kill', tabled_overwrite='full', pushed_new='error', sealed_overwrite='kill', verified_reads='kill', mergekit_overwrite='full') # some of the others

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='trials are forked processes')
@pytest.mark.parametrize('case,way', CASES)
def test_nothing_is_lost(case, way):
    kills.quiet()
    run = kills.run_case(case, way, lambda total: sorted({total*2//3, total-2}))
    assert run['trials'] > 1 and not run['wrong'], run

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='trials are forked processes')
@pytest.mark.parametrize('case,way', COMMANDS.items())
def test_commands_lose_nothing(case, way):
    "Cut off late, when the result is there and nobody was told."
    if not kills.can_run(case): pytest.skip('`make plugins` makes an environment with what it needs')
    kills.quiet()
    run = kills.run_case(case, way, lambda total: [total-1])
    assert run['trials'] == 1 and not run['wrong'], run
