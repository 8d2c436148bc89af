"""One process of a grid that several divide, writing down which work it does.

    torchrun --nproc_per_node 2 grid_case.py OUT LOGS ARGUMENTS_AS_JSON [FAULT]"""
import json
import sys
from pathlib import Path

from fisher_nodes.experiment import grid
from fisher_nodes.engine.processes import find_rank

out, logs, (kwargs, *fault) = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
rank = find_rank().rank
log = (logs/f'{rank}.jsonl').open('a', buffering=1)

def noted(kind, f, key):
    def run(*args, **kw):
        if fault == [kind] and rank == 1: raise ValueError('the disk is full')
        log.write(json.dumps([kind, *key(*args, **kw)])+'\n')
        return f(*args, **kw)
    return run

grid.run_group = noted('merge', grid.run_group, lambda group, cell, *a, **k: [cell.file, '+'.join(group)])
grid._score = noted('evaluate', grid._score, lambda model, checkpoint, **k: [checkpoint.task.name, len(checkpoint.validation)])
def statistic(checkpoint, cell, **how):
    "Which statistic of which model a cell asks for."
    choices = sorted((grid.measure_choices(checkpoint, cell) | how).items())
    return [cell.entry.statistic.kind.__name__, checkpoint.model.name_or_path, str(choices)]

grid._measure = noted('measure', grid._measure, statistic)

kwargs = json.loads(kwargs)
try: grid.reproduce(kwargs.pop('checkpoints'), out, **kwargs)
except ValueError as e: (logs/f'error-{rank}').write_text(str(e)); sys.exit(7)
