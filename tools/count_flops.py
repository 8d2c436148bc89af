"""Operations of methods: whole merges of two models with rows, counted by torch, solves included.

  python tools/count_flops.py FOLDER mnli rte --out nbs/results/best/flops.json
FOLDER holds one folder per task, as `fisher-nodes finetune --glue` makes them; rows are those of GLUE."""
import argparse
import time
from pathlib import Path
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from fisher_nodes import merge
from fisher_nodes.engine.batches import make_batches, sample_rows
from fisher_nodes.engine.files import write_record
from fisher_nodes.experiment.grid import find_entry, load_checkpoint, rows_to_read

NAMES = ('average', 'mask-fisher', 'fisher-exact', 'regmean-0.99', 'sequential-regmean', 'chain-of-merges',
         'residual-body', 'residual-regression', 'actmat', 'wudi', 'prodistill')

def cholesky(shape, *args, out_shape=None, **kwargs):
    "A third of the cube."
    *batch,n,_ = shape
    return torch.Size(batch).numel()*n**3//3

def solve(right, root, *args, out_shape=None, **kwargs):
    "Forth and back through a triangle."
    *batch,n,m = right
    return torch.Size(batch).numel()*2*n*n*m

SOLVES = {torch.ops.aten.linalg_cholesky_ex: cholesky, torch.ops.aten.cholesky_solve: solve}

def count(work):
    "Operations, and those of solves among them."
    with FlopCounterMode(display=False, custom_mapping=SOLVES) as counter: work()
    found = counter.get_flop_counts().get('Global', {})
    return counter.get_total_flops(), sum(found.get(o, 0) for o in SOLVES)

def forward(checkpoints, n):
    "One pass of every model over its rows."
    for c in checkpoints.values():
        rows = sample_rows(len(c.train), n, 0)
        batches = make_batches(c.model, c.train.select(rows), tokenizer=c.tokenizer, max_length=c.task.max_length)
        with torch.no_grad():
            for b in batches.batches: c.model(**b.inputs)

def run(checkpoints, name, n):
    "Measure and merge as the grid does."
    e = find_entry(name)
    models = {t: c.model for t,c in checkpoints.items()}
    rows = rows_to_read([*checkpoints], n, checkpoints) if e.statistic else {}
    how = dict(labels=e.labels) if e.statistic and 'labels' in e.statistic.takes else {}
    base = next(iter(models.values())).base_model if e.needs_base else None
    merge(models, method=e.method, refit_heads=e.refit_heads, base=base, progress=False, **rows, **how, **e.options)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('tasks', nargs=2)
    parser.add_argument('--num-samples', type=int, default=128)
    parser.add_argument('--out', type=Path, required=True)
    args = parser.parse_args()
    checkpoints = {t: load_checkpoint(args.folder/t, t, limit=8) for t in args.tasks}
    body,_ = count(lambda: forward(checkpoints, args.num_samples))
    found = {}
    for name in tqdm(NAMES, unit='method'):
        start = time.perf_counter()
        total,solves = count(lambda: run(checkpoints, name, args.num_samples))
        found[name] = dict(flops=total, solves=solves, seconds=time.perf_counter()-start)
    write_record(args.out, num_samples=args.num_samples, tasks=args.tasks, seed=0, device='cpu',
                 forward=body, methods=found)

if __name__=='__main__': main()
