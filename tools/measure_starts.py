"""How alike the weights of two models are, after one start and after two: what the warning of a merge goes by.

  python tools/measure_starts.py MINILM --folders _glue/minilm --out nbs/results/starts.json
Fine-tunes MINILM, and a body with the same shape and random weights, on a few hundred rows of SST-2 and MRPC with
several learning rates and epochs; FOLDERS hold further models, one folder a task. What OUT has is not measured again."""
import argparse
import json
import tempfile
from functools import cache, partial
from itertools import combinations
from pathlib import Path
import torch
from tqdm.auto import tqdm
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from fisher_nodes import finetune
from fisher_nodes.core.families import body_state
from fisher_nodes.core.start import start_cosines
from fisher_nodes.engine.files import write_record
from fisher_nodes.tasks.tasks import load_task

ROWS = 256
TRAINED = [(5e-5, 3), (3e-4, 3), (1e-3, 3), (3e-3, 3)] # learning rate, epochs

def shuffled(body):
    "The same function with heads and neurons in another order."
    gen,c = torch.Generator().manual_seed(0),body.config
    d = c.hidden_size//c.num_attention_heads
    with torch.no_grad():
        for layer in body.encoder.layer:
            heads = torch.randperm(c.num_attention_heads, generator=gen)
            at = (heads[:,None]*d+torch.arange(d)).flatten()
            own = layer.attention.self
            for m in (own.query, own.key, own.value): m.weight.copy_(m.weight[at]); m.bias.copy_(m.bias[at])
            out = layer.attention.output.dense
            out.weight.copy_(out.weight[:,at])
            rows = torch.randperm(c.intermediate_size, generator=gen)
            up,down = layer.intermediate.dense,layer.output.dense
            up.weight.copy_(up.weight[rows]); up.bias.copy_(up.bias[rows])
            down.weight.copy_(down.weight[:,rows])
    return body

def likeness(a, b):
    "Of two models or bodies."
    return start_cosines({'a': body_state(a), 'b': body_state(b)}, a)[0][0]

def change(base, a, b):
    "Of what fine-tuning changed in two models."
    return start_cosines({'a': body_state(a), 'b': body_state(b)}, a, body_state(base))[0][0]

def partly(base, other, n):
    "A body whose first layers are another's."
    body,other = AutoModel.from_pretrained(base),AutoModel.from_pretrained(other)
    for i in range(n): body.encoder.layer[i].load_state_dict(other.encoder.layer[i].state_dict())
    return body

@cache
def train(start, task, lr, epochs, seed, folder):
    "A model fine-tuned on a few rows."
    rows = load_task(f'glue:{task}')[0]
    finetune(start, rows, task, out=folder, num_samples=ROWS, learning_rate=lr, epochs=epochs, batch_size=32,
             seed=seed, progress=False)
    return AutoModelForSequenceClassification.from_pretrained(folder)

def fresh(base, seed, folder):
    "A body of the same shape that learned nothing."
    torch.manual_seed(seed)
    AutoModel.from_config(AutoModel.from_pretrained(base).config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder

def all_pairs(base, scratch):
    "Name of each pair -> what gives its two models."
    load = AutoModel.from_pretrained
    starts = [fresh(base, i, scratch/f'fresh{i}') for i in (0, 1)]
    def two(lr, epochs, *starts):
        return [train(o, t, lr, epochs, 0, scratch/f'{t}-{lr}-{epochs}-{Path(o).name}') for o,t in zip(starts, ('sst2', 'mrpc'))]
    found = {f'one start, learning rate {lr:g}, {epochs} epochs': partial(two, lr, epochs, base, base) for lr,epochs in TRAINED}
    return found | {
        'two random starts, learning rate 0.001, 3 epochs': partial(two, 1e-3, 3, *starts),
        'one random start, learning rate 0.001, 3 epochs': partial(two, 1e-3, 3, starts[0], starts[0]),
        'pre-trained against random': lambda: (load(base), load(starts[0])),
        'heads and neurons in another order': lambda: (load(base), shuffled(load(base))),
        **{f'{n} of 6 layers from a random start': lambda n=n: (load(base), partly(base, starts[0], n)) for n in (1, 3)}}

def folder_pairs(folder):
    "All pairs of the models in a folder, by their tasks."
    load = AutoModelForSequenceClassification.from_pretrained
    paths = {o.parent.name: o.parent for o in sorted(folder.glob('*/config.json'))}
    return {f'{folder.name}: {a}, {b}': lambda a=a, b=b: (load(paths[a]), load(paths[b])) for a,b in combinations(paths, 2)}

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('base')
    parser.add_argument('--folders', type=Path, nargs='*', default=[])
    parser.add_argument('--out', type=Path, required=True)
    args = parser.parse_args()
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    pairs,layers,changes = (before.get(k, {}) for k in ('pairs', 'layers', 'changes'))
    folders = {k: o for f in args.folders for k,o in folder_pairs(f).items()}
    base = AutoModel.from_pretrained(args.base)
    changes |= {k: change(base, *o()).cosine for k,o in folders.items() if k not in changes}
    write_record(args.out, seed=0, device='cpu', rows=ROWS, pairs=pairs, layers=layers, changes=changes)
    with tempfile.TemporaryDirectory() as d:
        todo = folders | all_pairs(args.base, Path(d))
        for what in (bar := tqdm([o for o in todo if o not in layers], unit='pair')):
            bar.set_description(what)
            found = likeness(*todo[what]())
            pairs[what],layers[what] = found.cosine,found.of_layer
            write_record(args.out, seed=0, device='cpu', rows=ROWS, pairs=pairs, layers=layers, changes=changes)

if __name__=='__main__': main()
