"""What Adam's second moments are worth as importance: against Fishers of the demo's two models, by ranks and by merged scores.

  python tools/compare_optimizer.py --out nbs/results/optimizer.json --seeds 0 1 2
Fine-tunes MiniLM on the demo's two corpora as the demo does, with its rows, seeds and recipe, and keeps a checkpoint with
the optimizer's states of every epoch. What was trained stays in --work and is not trained again, and
seeds that are in the file are not measured again."""
import argparse
import json
import time
from pathlib import Path
import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import AutoTokenizer, PrinterCallback, Trainer, set_seed
from transformers.trainer_utils import SaveStrategy
from fisher_nodes import mask_fisher, merge, parameter_fisher
from fisher_nodes.app.demo import TRAINING, corpora, minilm_path, score_all
from fisher_nodes.core.families import body_of
from fisher_nodes.core.places import find_places
from fisher_nodes.engine.batches import collate, make_batches, row_lengths
from fisher_nodes.engine.files import write_record
from fisher_nodes.engine.guard import frozen_eval
from fisher_nodes.engine.models import load_model
from fisher_nodes.engine.optimizer import fold_nodes, optimizer_fisher, optimizer_mask_fisher
from fisher_nodes.methods.full_fisher import ParameterFisher
from fisher_nodes.tasks.finetuning import load_body, new_model, training_arguments, training_rows

ROWS,TRAINED,HELD_OUT,SAMPLE = 128,1500,1000,200_000 # rows to measure on, to train on, to score on; parameters that are ranked
LENGTH = 64
QUIET = dict(progress=False)

def train(corpus, folder, seed, tokenizer):
    "A model as the demo trains it, with a checkpoint of every epoch; the folders of these."
    found = sorted(folder.glob('checkpoint-*'), key=lambda o: int(o.name.split('-')[1]))
    if len(found)==TRAINING['epochs'] and (found[-1]/'optimizer.pt').exists(): return found
    set_seed(seed)
    model = new_model(load_body(minilm_path()), corpus.task)
    rows = training_rows(model, corpus.train, TRAINED, seed, tokenizer=tokenizer, max_length=LENGTH, text=corpus.task.text)
    def pad(rows):
        columns = {k: [row[k] for row in rows] for k in rows[0]}
        return collate(columns, row_lengths(columns), range(len(rows)), {'input_ids': model.config.pad_token_id or 0})
    args = training_arguments(folder, len(rows), seed=seed, **TRAINING)
    args.save_strategy = SaveStrategy.EPOCH
    trainer = Trainer(model, args, data_collator=pad, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return train(corpus, folder, seed, tokenizer)

def ranks(a, b):
    "Rank correlation of two lists of numbers."
    return float(spearmanr(np.asarray(a), np.asarray(b)).statistic)

def node_ranks(a, b):
    "Of two mask Fishers: over all nodes of a kind, and the mean of what it is within each layer."
    out = {}
    for kind in a.kinds:
        x,y = ([o.double().numpy() for o in f.kinds[kind]] for f in (a, b))
        out[kind] = dict(all=ranks(np.concatenate(x), np.concatenate(y)), within=float(np.mean([ranks(*o) for o in zip(x, y)])))
    return out

def role_ranks(a, b, model):
    "Of two parameter Fishers: by role, over a sample of the elements."
    gen,by_role = np.random.default_rng(0),{}
    for n,o in find_places(model).items(): by_role.setdefault(o.roles[0], []).append(n)
    out = {}
    for role,names in by_role.items():
        x,y = (torch.cat([f.values[n].flatten() for n in names]).numpy() for f in (a, b))
        at = gen.choice(len(x), SAMPLE, replace=False) if len(x)>SAMPLE else slice(None)
        out[role] = ranks(x[at], y[at])
    every = [torch.cat([f.values[n].flatten() for n in a.values]).numpy() for f in (a, b)]
    at = gen.choice(len(every[0]), SAMPLE, replace=False)
    return out | dict(everything=ranks(*(o[at] for o in every)))

def batch_squares(model, rows, size, **how):
    "Means of ḡ and of its square over batches, as Adam sees them, but in evaluation mode and at one place."
    params = dict(body_of(model).named_parameters())
    mean,square,n = ({k: torch.zeros_like(p) for k,p in params.items()} for _ in range(2)),None,0
    mean,square = mean
    with frozen_eval(model):
        for p in params.values(): p.requires_grad_()
        for i in range(0, len(rows)-size+1, size):
            batch, = make_batches(model, rows.select(range(i, i+size)), plan=lambda lengths: [list(range(len(lengths)))], **how).batches
            grads = torch.autograd.grad(model(**batch.inputs).loss, [*params.values()], allow_unused=True)
            for k,g in zip(params, grads):
                if g is None: continue
                mean[k] += g
                square[k].addcmul_(g, g)
            n += 1
    return {k: v/n for k,v in mean.items()}, {k: v/n for k,v in square.items()}

def formula(model, rows, full, how):
    "What a batch's mean does to the square: measured, and by the formula; sums over all parameters."
    size = TRAINING['batch_size']
    mean,square = batch_squares(model, rows, size, **how)
    def total(o): return float(sum(v.double().sum() for v in o.values()))
    F,μ2 = total(full.values),total({k: v.square() for k,v in mean.items()})
    return dict(batch_size=size, fisher=F, squared_mean=μ2, measured=total(square), by_formula=(F+(size-1)*μ2)/size), square

def below(values, floor=1e-6):
    "The share of elements that a floor decides."
    return float(sum((v<floor).sum().item() for v in values.values())/sum(v.numel() for v in values.values()))

def look(folders, corpus, seed, how):
    "Every rank correlation of one model, and its Fishers."
    model,folder = load_model(folders[-1]),folders[-1]
    mask = mask_fisher(model, corpus.train, num_samples=ROWS, seed=seed, **how, **QUIET)
    again = mask_fisher(model, corpus.train, num_samples=ROWS, seed=seed+1000, **how, **QUIET)
    full = parameter_fisher(model, corpus.train, num_samples=ROWS, seed=seed, **how, **QUIET)
    twice = parameter_fisher(model, corpus.train, num_samples=ROWS, seed=seed+1000, **how, **QUIET)
    adam,nodes = optimizer_fisher(folder),optimizer_mask_fisher(folder)
    sample = corpus.train.shuffle(seed=seed).select(range(1024))
    large = parameter_fisher(model, sample, seed=seed, **how, **QUIET)
    about,square = formula(model, sample, large, how)
    batch = ParameterFisher({k: v.cpu() for k,v in square.items()})
    early = optimizer_mask_fisher(folders[0])
    found = dict(
        nodes={'other rows': node_ranks(again, mask), 'rule, with Fishers of parameters': node_ranks(fold_nodes(full, model), mask),
               'rule, with squares of batch means': node_ranks(fold_nodes(batch, model), mask), 'Adam': node_ranks(nodes, mask),
               'Adam, after the first epoch': node_ranks(early, mask)},
        parameters={'other rows': role_ranks(twice, full, model), 'squares of batch means': role_ranks(batch, full, model),
                    'Adam': role_ranks(adam, full, model)},
        formula=about, below_floor=dict(fisher=below(full.values), adam=below(adam.values)),
        steps=adam.meta['steps'], scale=float(sum(v.double().sum() for v in adam.values.values())/about['fisher']))
    return found, model, dict(mask=mask, full=full, adam=adam, nodes=nodes)

def power(fisher, p):
    "Every number to that power, as OTA does with one half."
    return ParameterFisher({k: v**p for k,v in fisher.values.items()}, 0, fisher.meta)

def merges(models, found):
    "Every merge by name."
    of = {k: {t: o[k] for t,o in found.items()} for k in ('mask', 'full', 'adam', 'nodes')}
    root = {t: power(o, .5) for t,o in of['adam'].items()}
    def full(fishers, floor): return merge(models, fishers, method='fisher', floor=floor, **QUIET)
    return {'average': merge(models, method='average', **QUIET), 'mask Fisher': merge(models, of['mask'], **QUIET),
            'mask Fisher, from Adam': merge(models, of['nodes'], **QUIET), 'full Fisher': full(of['full'], 1e-6),
            'full Fisher, floor 0': full(of['full'], 0.), 'full Fisher, from Adam': full(of['adam'], 1e-6),
            'full Fisher, from Adam, floor 0': full(of['adam'], 0.),
            'roots, from Adam, floor 0': full(root, 0.)}

def one_seed(work, seed, tokenizer):
    "Everything of one training seed."
    start,data = time.perf_counter(),corpora(seed, LENGTH)
    models,looked,fishers = {},{},{}
    for t,corpus in data.items():
        folders = train(corpus, work/f'{t}-{seed}', seed, tokenizer)
        how = dict(tokenizer=tokenizer, max_length=LENGTH)
        looked[t],models[t],fishers[t] = look(folders, corpus, seed, how)
        print(f'seed {seed}, {t}: {time.perf_counter()-start:.0f} s', flush=True)
    scores = score_all({'own model': models} | merges(models, fishers), data, HELD_OUT, tokenizer, seed)
    print(scores, flush=True)
    return dict(models=looked, scores=scores, seconds=time.perf_counter()-start)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--work', type=Path, default=Path('_optimizer'))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(minilm_path(), trust_remote_code=False)
    found = json.loads(args.out.read_text())['seeds'] if args.out.exists() else {}
    for s in args.seeds:
        if str(s) in found: continue
        found[str(s)] = one_seed(args.work, s, tokenizer)
        write_record(args.out, device='cpu', threads=torch.get_num_threads(), rows=ROWS, trained=TRAINED, held_out=HELD_OUT,
            recipe=TRAINING, seeds=found)

if __name__=='__main__': main()
