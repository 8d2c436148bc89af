"""How alike the weights of two models are, after one start and after two: what the warning of a merge goes by.

  python tools/measure_starts.py MINILM --folders _glue/minilm --out nbs/results/starts.json
Fine-tunes MINILM, and a body with the same shape and random weights, on a few hundred rows of SST-2 and MRPC with
several learning rates and epochs; FOLDERS hold further models, one folder a task."""
import argparse
import tempfile
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

def cosine(a, b):
    "Of two models or bodies."
    return start_cosines({'a': body_state(a), 'b': body_state(b)}, a)[0][0].cosine

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

def trained_pairs(base, scratch):
    "Pairs of what was just trained."
    for lr,epochs in TRAINED:
        two = [train(base, t, lr, epochs, 0, scratch/f'{t}-{lr}-{epochs}') for t in ('sst2', 'mrpc')]
        yield f'one start, learning rate {lr:g}, {epochs} epochs', cosine(*two)
    starts = [fresh(base, i, scratch/f'fresh{i}') for i in (0, 1)]
    two = [train(o, t, 1e-3, 3, 0, scratch/f'f{t}') for o,t in zip(starts, ('sst2', 'mrpc'))]
    yield 'two random starts, learning rate 0.001, 3 epochs', cosine(*two)
    yield 'one random start, learning rate 0.001, 3 epochs', cosine(two[0], train(starts[0], 'mrpc', 1e-3, 3, 0, scratch/'same'))
    own = AutoModel.from_pretrained(base)
    yield 'pre-trained against random', cosine(own, AutoModel.from_pretrained(starts[0]))
    yield 'heads and neurons in another order', cosine(own, shuffled(AutoModel.from_pretrained(base)))

def folder_pairs(folder):
    "All pairs of the models in a folder, by their tasks."
    load = AutoModelForSequenceClassification.from_pretrained
    models = {o.parent.name: load(o.parent) for o in sorted(folder.glob('*/config.json'))}
    for a,b in combinations(models, 2): yield f'{folder.name}: {a}, {b}', cosine(models[a], models[b])

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('base')
    parser.add_argument('--folders', type=Path, nargs='*', default=[])
    parser.add_argument('--out', type=Path, required=True)
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as d, tqdm(unit='pair') as bar:
        for pairs in (*map(folder_pairs, args.folders), trained_pairs(args.base, Path(d))):
            for what,o in pairs:
                found[what] = o
                bar.set_description(what)
                bar.update()
    write_record(args.out, seed=0, device='cpu', rows=ROWS, pairs=found)

if __name__=='__main__': main()
