"""What every process of a launch does for test_processes.py: measure, fail on purpose, and write down what it saw.

    torchrun --nproc_per_node 2 processes_case.py FOLDER"""
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from fisher_nodes import linear_grams, mask_fisher, parameter_fisher
from fisher_nodes.engine import processes
from fisher_nodes.engine.files import whole_file
from fisher_nodes.engine.processes import alone, exchange, find_rank, from_main, is_main, own_share
from reference import collate, examples, ragged_batches, tiny

QUIET = dict(progress=False)

def dataset(n=23, seed=0):
    rows = examples(n, seed=seed)
    return Dataset.from_dict({k: [r[k] for r in rows] for k in rows[0]})

def mixed(batches): # a generator that is gone through once
    yield from batches

MEASURED = { # name -> a call that gives a Fisher or grams, the same alone and together
    'data set': lambda m: mask_fisher(m, dataset(), batch_tokens=20, **QUIET),
    'sample': lambda m: mask_fisher(m, dataset(60), num_samples=17, seed=3, batch_tokens=20, **QUIET),
    'fewer batches than processes': lambda m: mask_fisher(m, dataset(1), **QUIET),
    'list': lambda m: mask_fisher(m, ragged_batches(sizes=(3, 1, 4, 2, 5)), **QUIET),
    'generator, cut': lambda m: mask_fisher(m, mixed(ragged_batches(sizes=(3, 1, 4, 2, 5))), num_samples=9, **QUIET),
    'loader': lambda m: mask_fisher(m, DataLoader(examples(11), 2, collate_fn=collate), **QUIET),
    'released': lambda m: mask_fisher(m, dataset(75), variant='released', **QUIET),
    'released, own batches': lambda m: mask_fisher(m, ragged_batches(sizes=(3, 1, 4, 2, 5)), variant='released', **QUIET),
    'exact': lambda m: mask_fisher(m, dataset(), labels='exact', batch_tokens=20, **QUIET),
    'sampled': lambda m: mask_fisher(m, dataset(), labels='sampled', batch_tokens=20, **QUIET),
    'matrices': lambda m: mask_fisher(m, dataset(), matrices='all', batch_tokens=20, **QUIET),
    'own loss': lambda m: mask_fisher(m, ragged_batches(), loss=lambda m, b: m(b['input_ids']).logits.square().sum(1), **QUIET),
    'parameters': lambda m: parameter_fisher(m, dataset(), batch_tokens=20, **QUIET),
    'parameters, one batch': lambda m: parameter_fisher(m, dataset(1), **QUIET),
    'parameters, one at a time': lambda m: parameter_fisher(m, dataset(5), one_at_a_time=True, **QUIET),
    'parameters, exact, own batches': lambda m: parameter_fisher(m, ragged_batches(), labels='exact', **QUIET),
    'grams': lambda m: linear_grams(m, dataset(), batch_tokens=20, **QUIET),
    'grams, own batches': lambda m: linear_grams(m, mixed(ragged_batches()), **QUIET)}

DTYPES = dict(float64=torch.float64, float32=torch.float32, bfloat16=torch.bfloat16)

def tensors(found):
    "All numbers of a result by name."
    if hasattr(found, 'values'): return dict(found.values)
    fields = {k: getattr(found, k) for k in ('heads', 'rows', 'head_matrices', 'row_matrices')}
    return {k: v for k, v in fields.items() if v is not None}

def bad_label(rank):
    batches = ragged_batches(sizes=(2, 2, 2, 2))
    batches[3]['labels'][1] = 9
    mask_fisher(tiny(), mixed(batches), **QUIET)

def nan_loss(rank, call=mask_fisher, rows=6):
    "The number that is no number is in one batch, which one process has."
    model, batches = tiny(), ragged_batches(sizes=(1,)*rows)
    for b in batches: b['input_ids'][b['input_ids'] == 59] = 4
    batches[4]['input_ids'][0, 0] = 59
    model.base_model.embeddings.word_embeddings.weight.data[59] = torch.nan
    call(model, mixed(batches), **QUIET)

class Strange(Exception):
    "Cannot be made again from its words."
    def __init__(self, a, b): super().__init__(f'{a} and {b}')

def one_fails(rank, error):
    "An exception before any batch, in the last process only."
    def loss(m, b): raise error
    good = lambda m, b: m(b['input_ids']).logits.square().sum(1)
    mask_fisher(tiny(), ragged_batches(), loss=loss if rank == find_rank().count-1 else good, **QUIET)

class Prepared(DataLoader): __module__ = 'accelerate.data_loader'

FAULTS = { # name -> a call that fails, in all processes
    'bad label': bad_label,
    'nan': nan_loss,
    'nan, parameters': lambda r: nan_loss(r, parameter_fisher),
    'nan, grams': lambda r: nan_loss(r, linear_grams),
    'one fails': lambda r: one_fails(r, KeyError('gone')),
    'one fails strangely': lambda r: one_fails(r, Strange(1, 2)),
    'no examples': lambda r: mask_fisher(tiny(), iter([]), **QUIET),
    'bad choice': lambda r: mask_fisher(tiny(), dataset(), labels='nope', **QUIET),
    'other seed': lambda r: mask_fisher(tiny(), dataset(), num_samples=5, seed=r, **QUIET),
    'other model': lambda r: mask_fisher(tiny(seed=r), dataset(), **QUIET),
    'other rows': lambda r: mask_fisher(tiny(), dataset(seed=r), **QUIET),
    'other batches in a list': lambda r: mask_fisher(tiny(), ragged_batches(seed=r), **QUIET),
    'other batches': lambda r: mask_fisher(tiny(), mixed(ragged_batches(seed=r)), **QUIET),
    'fewer batches': lambda r: mask_fisher(tiny(), mixed(ragged_batches()[r:]), **QUIET),
    'other function': lambda r: (parameter_fisher if r else mask_fisher)(tiny(), dataset(), **QUIET),
    'prepared loader': lambda r: mask_fisher(tiny(), Prepared(examples(4), 2, collate_fn=collate), **QUIET),
    'wrapped model': lambda r: mask_fisher(torch.nn.parallel.DistributedDataParallel(tiny()), dataset(), **QUIET)}

def caught(f, rank):
    try: f(rank)
    except Exception as e: return [type(e).__name__, str(e)]

def main(out):
    rank, count = find_rank()
    torch.set_num_threads(1) # more threads add up in another order
    found = {f'{d}/{k}': f(tiny(dtype=t)) for d, t in DTYPES.items() for k, f in MEASURED.items() if d != 'bfloat16' or k == 'data set'}
    torch.save({k: dict(tensors=tensors(v), num_examples=v.num_examples, meta=v.meta) for k, v in found.items()}, out/f'found-{rank}.pt')
    found['float64/data set'].save(out/'saved.safetensors')
    found['float64/parameters'].save(out/'saved-parameters.safetensors')
    exchange() # after this meeting the files are there
    said = dict(place=[rank, count], main=is_main(), wrote=sorted(o.name for o in out.glob('saved*')))
    with alone():
        found['float64/data set'].save(out/f'alone-{rank}.safetensors')
        said['alone'] = [is_main(), mask_fisher(tiny(), dataset(rank+1), **QUIET).num_examples]
    said |= dict(share=own_share(list(range(7))), from_main=from_main(lambda: f'from {rank}'), exchange=exchange(rank))
    said['faults'] = {k: caught(f, rank) for k, f in FAULTS.items()}
    said['afterwards'] = mask_fisher(tiny(), dataset(), **QUIET).num_examples
    (out/f'said-{rank}.json').write_text(json.dumps(said))

def one_ends(out):
    "The last process is killed in the middle of the work."
    rank, count = find_rank()
    def loss(m, b):
        if rank == count-1: os._exit(3)
        return m(b['input_ids']).logits.square().sum(1)
    said = caught(lambda r: mask_fisher(tiny(), ragged_batches(), loss=loss, **QUIET), rank)
    with whole_file(out/f'ends-{rank}.json') as part: part.write_text(json.dumps(said)) # the launcher may end it meanwhile

def only_main(out):
    "What a script under `if is_main` runs into."
    rank, _ = find_rank()
    processes.START = timedelta(seconds=2)
    exchange()
    said = caught(lambda r: mask_fisher(tiny(), dataset(), **QUIET), rank) if is_main() else time.sleep(6)
    (out/f'missing-{rank}.json').write_text(json.dumps(said))
    os._exit(0) # there is nobody to say goodbye to

if __name__ == '__main__': globals()[sys.argv[2]](Path(sys.argv[1]))
