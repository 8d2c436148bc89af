"Two tiny models whose validation labels are their own answers, for tests of the explorer."
import torch
from datasets import Dataset
from reference import tiny

from fisher_nodes import MaskFisher, predict

TASKS = ('red', 'blue')

def fisher(seed, layers=2, heads=4, rows=24):
    gen = torch.Generator().manual_seed(seed)
    heads, rows = [torch.rand(layers, n, generator=gen).double() for n in (heads, rows)]
    return MaskFisher(heads, rows, 8)

def rows(model, n=60):
    gen = torch.Generator().manual_seed(n)
    data = Dataset.from_dict(dict(input_ids=torch.randint(4, 60, (n, 8), generator=gen).tolist()))
    return data.add_column('label', predict(model, data, progress=False).argmax(-1).tolist())

def case(tasks=TASKS):
    "Fishers, models, validation rows."
    models = {t: tiny(num_labels=3, seed=i) for i,t in enumerate(tasks)}
    return {t: fisher(i) for i,t in enumerate(tasks)}, models, {t: rows(m) for t,m in models.items()}
